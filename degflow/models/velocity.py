"""The velocity network v(z, t) (DegFlow, section 2.2): a U-Net over the whole latent.

GroupNorm and attention see every position, so this network is never tiled.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from degflow.config import option
from degflow.models.dropout import Bits, SampleDropout, number_layers

TIME_FACTOR = 999.0  # of the time embedding, as released


@dataclass(frozen=True)
class VelocityConfig:
    """Size of a `VelocityNetwork`; the defaults are the released network's."""

    latent_channels: int = option(4, "C_z, channels of the latent; a training takes those of rae")
    width: int = option(128, "channels at the latent's resolution")
    multipliers: tuple[int, ...] = option((1, 2, 2, 2), "channels at each resolution, as multiples of width")
    blocks: int = option(4, "residual blocks at each resolution")
    dropout: float = option(0.1, "dropout inside the residual blocks, while training")

    def __post_init__(self):
        for name in ("latent_channels", "blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"velocity.{name}={getattr(self, name)}: must be at least 1")
        if self.width < 8 or self.width % 8:
            raise ValueError(f"velocity.width={self.width}: must be a multiple of 8")
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(f"velocity.multipliers={list(self.multipliers)}: at least one entry, each at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"velocity.dropout={self.dropout}: must lie in [0, 1)")

    @property
    def multiple(self) -> int:
        """The latent's height and width must be multiples of this."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def working_channels(self) -> float:
        """Numbers alive at the peak of an evaluation without gradients, per latent pixel."""
        widths = [self.width * multiplier for multiplier in self.multipliers]
        kept = sum((self.blocks + 1) * width / 4**level for level, width in enumerate(widths))
        before = widths[min(1, len(widths) - 1)]
        # At the finest level: the block that upsamples holds seven tensors of its width; one that merges holds its
        # input, the norm and the activation of it, and three of its outputs.
        return kept + max(7 * before, 3 * (widths[0] + before) + 3 * widths[0])


def _norm(channels: int) -> nn.GroupNorm:
    limit = min(channels // 4, 32)
    groups = next(count for count in range(limit, 0, -1) if channels % count == 0)
    return nn.GroupNorm(groups, channels, eps=1e-6)


class TimeEmbedding(nn.Module):
    """Sinusoids of 999 t, then two linear layers."""

    def __init__(self, config: VelocityConfig):
        super().__init__()
        self.width = config.width
        self.first = nn.Linear(config.width, 4 * config.width)
        self.second = nn.Linear(4 * config.width, 4 * config.width)

    def forward(self, time: Tensor) -> Tensor:
        """Times "B" in [0, 1] -> "B 4*width"."""
        half = self.width // 2
        rates = torch.exp(torch.arange(half, device=time.device) * (-math.log(10000) / (half - 1)))
        angles = (time * TIME_FACTOR if time.dtype == torch.float64 else time.float() * TIME_FACTOR)[:, None] * rates
        waves = torch.cat((angles.sin(), angles.cos()), 1).to(self.first.weight.dtype)
        return self.second(F.silu(self.first(waves)))


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, convolution, plus the embedding, GroupNorm, SiLU, dropout, convolution; sum over sqrt 2."""

    def __init__(self, inputs: int, outputs: int, config: VelocityConfig, resample: str = ""):
        super().__init__()
        self.resample = resample
        self.norm1 = _norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.embed = nn.Linear(4 * config.width, outputs)
        self.norm2 = _norm(outputs)
        self.dropout = SampleDropout(config.dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs or resample else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor, bits: Bits | None = None) -> Tensor:
        """ "B C H W", the embedding and dropout's bits -> "B C' H W", H and W doubled or halved by `resample`."""
        y = F.silu(self.norm1(x))
        if self.resample == "up":
            x, y = (F.interpolate(part, scale_factor=2.0, mode="nearest") for part in (x, y))
        elif self.resample == "down":
            x, y = (F.avg_pool2d(part, 2) for part in (x, y))
        y = self.conv1(y) + self.embed(F.silu(embedding))[:, :, None, None]
        y = self.conv2(self.dropout(F.silu(self.norm2(y)), bits))
        return (self.skip(x) + y) / math.sqrt(2)


class Attention(nn.Module):
    """Single-head attention over all positions; sum over sqrt 2."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = _norm(channels)
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """ "B C H W" -> the same shape."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)[:, None]  # without an axis of heads no fused kernel takes it
        mixed = F.scaled_dot_product_attention(self.query(tokens), self.key(tokens), self.value(tokens))[:, 0]
        return (x + self.out(mixed).transpose(1, 2).reshape(x.shape)) / math.sqrt(2)


class VelocityNetwork(nn.Module):
    """dz/dt as a function of the latent and the time.

    Args:
        config: widths and depths.
    """

    def __init__(self, config: VelocityConfig = VelocityConfig()):
        super().__init__()
        self.config = config
        widths = [config.width * multiplier for multiplier in config.multipliers]
        self.embedding = TimeEmbedding(config)
        self.stem = nn.Conv2d(config.latent_channels, config.width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        channels, kept = config.width, [config.width]
        for level, width in enumerate(widths):
            for _ in range(config.blocks):
                self.down.append(ResidualBlock(channels, width, config))
                channels = width
                kept.append(channels)
            if level < len(widths) - 1:
                self.down.append(ResidualBlock(channels, channels, config, "down"))
                kept.append(channels)
        self.middle = nn.ModuleList(
            (ResidualBlock(channels, channels, config), Attention(channels), ResidualBlock(channels, channels, config))
        )
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(config.blocks + 1):
                self.up.append(ResidualBlock(channels + kept.pop(), width, config))
                channels = width
            if level:
                self.up.append(ResidualBlock(channels, channels, config, "up"))
        self.head_norm = _norm(channels)
        self.head = nn.Conv2d(channels, config.latent_channels, 3, padding=1)
        self.layers, self.widest = number_layers(self), max(widths)

    def forward(self, latent: Tensor, time: Tensor, key: Tensor | None = None) -> Tensor:
        """Velocity.

        Args:
            latent: "B C_z H W"; H and W multiples of 2^(levels - 1).
            time: "B" in [0, 1].
            key: int64 "B", decides each sample's dropout (see `sample_keys`); needed in training mode alone.

        Returns:
            dz/dt, "B C_z H W".
        """
        embedding, bits = self.embedding(time), None
        if key is not None and self.training and self.config.dropout:
            bits = Bits.of(key, self.layers, self.widest, *latent.shape[2:])
        x = self.stem(latent)
        kept = [x]
        for block in self.down:
            x = block(x, embedding, bits)
            kept.append(x)
        before, attention, after = self.middle
        x = after(attention(before(x, embedding, bits)), embedding, bits)
        for block in self.up:
            x = block(x if block.resample else torch.cat((x, kept.pop()), 1), embedding, bits)
        return self.head(F.silu(self.head_norm(x)))
