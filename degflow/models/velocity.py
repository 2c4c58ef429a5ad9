"""The velocity network v(z, t) (DegFlow, section 2.2): a U-Net over the whole latent.

GroupNorm and attention see every position, so this network is never tiled.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from degflow.config import option
from degflow.flow import integrate
from degflow.models.dropout import SampleDropout, number_layers


@dataclass(frozen=True)
class VelocityConfig:
    """Size of a `VelocityNetwork`; the defaults are the released network's."""

    latent_channels: int = option(4, "C_z, channels of the latent")
    width: int = option(128, "channels at the latent's resolution")
    multipliers: tuple[int, ...] = option((1, 2, 2, 2), "channels of each level / width")
    blocks: int = option(4, "residual blocks in each level")
    dropout: float = option(0.1, "dropout inside the residual blocks, while training")
    time_factor: float = option(
        999.0, "the time embedding sees time_factor * t; 20 gives a field that needs fewer evaluations"
    )

    linear_terms: int = option(
        0, "3x3 convolutions of the latent, weighted by the time, that are added to the U-Net; 0: none, as released"
    )
    source: bool = option(
        False, "the network also sees where the path began, the HR image's latent; false: as published"
    )
    flow_map: bool = option(
        False,
        "the network sees the HR image's latent alone and gives those of all levels; the path is the spline through "
        "them, solved by one evaluation; false: as published",
    )

    def __post_init__(self):
        if self.linear_terms < 0:
            raise ValueError(f"velocity.linear_terms={self.linear_terms}: must not be negative")
        for name in ("latent_channels", "blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"velocity.{name}={getattr(self, name)}: must be at least 1")
        if self.width < 8 or self.width % 8:
            raise ValueError(f"velocity.width={self.width}: must be a multiple of 8")
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(f"velocity.multipliers={list(self.multipliers)}: at least one entry, each at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"velocity.dropout={self.dropout}: must lie in [0, 1)")
        if self.flow_map and self.source:
            raise ValueError("velocity.source=True: must be false with flow_map=true, which sees the source alone")

    @property
    def inputs(self) -> int:
        """Channels that the network sees: the latent's, twice with `source`."""
        return self.latent_channels * (2 if self.source else 1)

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
    """Sinusoids of time_factor * t, then two linear layers."""

    def __init__(self, config: VelocityConfig):
        super().__init__()
        self.width, self.factor = config.width, config.time_factor
        self.first = nn.Linear(config.width, 4 * config.width)
        self.second = nn.Linear(4 * config.width, 4 * config.width)

    def forward(self, time: Tensor) -> Tensor:
        """Times "B" in [0, 1] -> "B 4*width"."""
        half = self.width // 2
        rates = torch.exp(torch.arange(half, device=time.device) * (-math.log(10000) / (half - 1)))
        angles = (time * self.factor if time.dtype == torch.float64 else time.float() * self.factor)[:, None] * rates
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

    def forward(self, x: Tensor, embedding: Tensor, key: Tensor | None = None) -> Tensor:
        """ "B C H W", the embedding and the samples' keys -> "B C' H W", H and W doubled or halved by `resample`."""
        y = F.silu(self.norm1(x))
        if self.resample == "up":
            x, y = (F.interpolate(part, scale_factor=2.0, mode="nearest") for part in (x, y))
        elif self.resample == "down":
            x, y = (F.avg_pool2d(part, 2) for part in (x, y))
        y = self.conv1(y) + self.embed(F.silu(embedding))[:, :, None, None]
        y = self.conv2(self.dropout(F.silu(self.norm2(y)), key))
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


class LinearTerms(nn.Module):
    """sum_j c_j(t) conv_j(z), z with its source: what is linear in them, which GroupNorm makes hard for the U-Net.

    It starts at zero. Most of a degradation is linear, and short trainings find that part here.
    """

    def __init__(self, config: VelocityConfig, outputs: int):
        super().__init__()
        self.terms = config.linear_terms
        self.conv = nn.Conv2d(config.inputs, self.terms * outputs, 3, padding=1)
        self.weights = nn.Linear(4 * config.width, self.terms)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, seen: Tensor, embedding: Tensor) -> Tensor:
        """What the network sees, "B C H W" (`VelocityConfig.inputs`), and the embedding -> "B outputs H W"."""
        terms = self.conv(seen).unflatten(1, (self.terms, -1))
        return torch.einsum("bj,bjchw->bchw", self.weights(F.silu(embedding)), terms)


class VelocityNetwork(nn.Module):
    """dz/dt as a function of the latent and the time, and with `source` of the latent that the path began at.

    Of all fields, flow matching's best one gives each time's latents the right distribution. It does not promise the
    right partner: what noise adds to the spread of captured LR latents is then made up by detail of HR that is kept.
    With the source known, the field's path is the mean of the captured ones.

    Args:
        config: widths and depths.
        outputs: channels of the result; 0: those of the latent.
    """

    def __init__(self, config: VelocityConfig = VelocityConfig(), outputs: int = 0):
        super().__init__()
        self.config = config
        outputs = outputs or config.latent_channels
        widths = [config.width * multiplier for multiplier in config.multipliers]
        self.embedding = TimeEmbedding(config)
        self.stem = nn.Conv2d(config.inputs, config.width, 3, padding=1)
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
        self.head = nn.Conv2d(channels, outputs, 3, padding=1)
        self.linear = LinearTerms(config, outputs) if config.linear_terms else None
        number_layers(self)

    def carry(self, source: Tensor, time: Tensor, key: Tensor | None = None, *, steps: int, solver: str) -> Tensor:
        """Integrate from time 0.

        Args:
            source: "B C_z H W", the HR images' latents.
            time: "B", or "B N" for N times of each from one integration.
            key: as in a call.
            steps, solver: of `integrate`.

        Returns:
            Latents "B C_z H W" or "B N C_z H W", in the dtype of `source`.
        """

        def velocity(latent: Tensor, at: Tensor) -> Tensor:
            return self(latent, at, source, key).to(source.dtype)

        return integrate(velocity, source, time, steps=steps, solver=solver)

    def velocity_and_ends(
        self,
        latent: Tensor,
        time: Tensor,
        source: Tensor,
        key: Tensor | None,
        chosen: Tensor,
        ends: Tensor,
        *,
        steps: int,
        solver: str,
    ) -> tuple[Tensor, Tensor]:
        """A call, and `carry` of the samples with the indices `chosen` to their times `ends`."""
        keys = None if key is None else key[chosen]
        return self(latent, time, source, key), self.carry(source[chosen], ends, keys, steps=steps, solver=solver)

    def forward(self, latent: Tensor, time: Tensor, source: Tensor | None = None, key: Tensor | None = None) -> Tensor:
        """Velocity.

        Args:
            latent: "B C_z H W"; H and W multiples of 2^(levels - 1).
            time: "B" in [0, 1].
            source: the HR image's latent, as `latent`; needed with `config.source`, else not looked at.
            key: int64 "B", decides each sample's dropout (see `sample_keys`); needed in training mode alone.

        Returns:
            dz/dt, "B C_z H W".

        Raises:
            ValueError: no source for a network that needs it.
        """
        if self.config.source:
            if source is None:
                raise ValueError("source: needed, for this network was built with velocity.source=true")
            latent = torch.cat((latent, source), 1)
        embedding = self.embedding(time)
        x = self.stem(latent)
        kept = [x]
        for block in self.down:
            x = block(x, embedding, key)
            kept.append(x)
        before, attention, after = self.middle
        x = after(attention(before(x, embedding, key)), embedding, key)
        for block in self.up:
            x = block(x if block.resample else torch.cat((x, kept.pop()), 1), embedding, key)
        velocity = self.head(F.silu(self.head_norm(x)))
        return velocity if self.linear is None else velocity + self.linear(latent, embedding)
