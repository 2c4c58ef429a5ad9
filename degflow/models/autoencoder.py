"""The residual autoencoder (DegFlow, section 2.1): one encoder for every level, and a decoder whose skips come from HR,
or from HR after the optics.

Convolutions and per-pixel LayerNorm only, so no output pixel depends on anything beyond a fixed receptive field.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from degflow.config import option
from degflow.models.precision import exactly


@dataclass(frozen=True)
class AutoencoderConfig:
    """Size of a `ResidualAutoencoder`; the defaults are the released network's."""

    base_width: int = option(128, "channels at full resolution")
    multipliers: tuple[int, ...] = option(
        (1, 1, 2, 4),
        "channels at each resolution, as multiples of base_width, full resolution first; with n entries the latent's "
        "sides are 2^(n - 1) times smaller",
    )
    blocks: int = option(2, "residual blocks at each resolution")
    latent_channels: int = option(4, "C_z, channels of the latent")
    gate_init: float = option(0.0, "initial gate of each residual block (beta, gamma); 0.5 makes short trainings learn")
    hr_skips: bool = option(
        True, "give the decoder the encoder features of the image that `skips` names; false: none, the paper's ablation"
    )

    def __post_init__(self):
        for name in ("base_width", "blocks", "latent_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"autoencoder.{name}={getattr(self, name)}: must be at least 1")
        if len(self.multipliers) < 2 or min(self.multipliers) < 1:
            raise ValueError(f"autoencoder.multipliers={list(self.multipliers)}: at least two entries, each at least 1")

    @property
    def compression(self) -> int:
        """r: pixels along a side of the image per pixel of the latent."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(self.base_width * multiplier for multiplier in self.multipliers)

    @property
    def halo(self) -> int:
        """The receptive field of encoder and decoder, in latent pixels on each side.

        Counts the pixels that a cut edge changes: a 3x3 convolution adds one, a stride of 2 halves the count, an
        upsampling doubles it, a skip may bring more.
        """
        block, changed, skips = 2 * self.blocks, 1, []
        for level in range(len(self.multipliers)):
            changed = (changed // 2 + 1 if level else changed) + block
            skips.append(changed)
        encoder = changed + 1
        changed = 1 + block
        for skip in reversed(skips[:-1]):
            changed = max(2 * changed, skip) + block
        decoder = -(-(changed + 1) // self.compression)
        return max(encoder, decoder)

    @property
    def skip_channels(self) -> float:
        """Numbers in the skips per image pixel."""
        return sum(width / 4**level for level, width in enumerate(self.widths[:-1]))

    @property
    def working_channels(self) -> float:
        """Numbers alive at the peak of decoding without gradients, the merged skips apart, per image pixel."""
        widths = self.widths  # `encode` needs less, its skips included
        level = max(5 * width / 4**n for n, width in enumerate(widths))
        expand = max((0.25 * coarse + 2 * fine) / 4**n for n, (fine, coarse) in enumerate(pairwise(widths)))
        return max(level, expand)


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of each pixel, "B C H W"."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise; free of copies when x is channels_last."""
        normed = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, eps=1e-5)
        return normed.permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """x + two times (ChannelNorm, GELU, 3x3 convolution without bias)."""

    def __init__(self, channels: int):
        super().__init__()
        self.norms = nn.ModuleList(ChannelNorm(channels) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """ "B C H W" -> the same shape."""
        y = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            y = conv(F.gelu(norm(y)))
        return x + y


class Level(nn.Module):
    """Optional stride-2 convolution, then x + gate * block(x) for each block."""

    def __init__(self, channels: int, config: AutoencoderConfig, reduce_from: int | None = None):
        super().__init__()
        self.reduce = nn.Conv2d(reduce_from, channels, 3, stride=2, padding=1) if reduce_from else nn.Identity()
        self.blocks = nn.ModuleList(ResidualBlock(channels) for _ in range(config.blocks))
        self.gates = nn.ParameterList(
            nn.Parameter(torch.full((1, channels, 1, 1), config.gate_init)) for _ in range(config.blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        """ "B C H W" -> "B C' H W", or half of H and W where the level reduces."""
        x = self.reduce(x)
        for gate, block in zip(self.gates, self.blocks, strict=True):
            x = torch.addcmul(x, gate, block(x))
        return x


class Expand(nn.Module):
    """Double the resolution and merge the skip.

    The network is W (1x1 convolution to 4 x width), a pixel shuffle, N (1x1 convolution), and M (1x1 convolution of the
    result beside the skip). All of it is linear. So M N W is one matrix, without tensors between. What M makes of the
    skip is a separate term (`merged`), computed once for all latents that are decoded with it.
    """

    def __init__(self, coarse: int, fine: int, hr_skips: bool):
        super().__init__()
        self.widen = nn.Conv2d(coarse, 4 * coarse, 1)
        self.narrow = nn.Conv2d(coarse, fine, 1)
        self.merge = nn.Conv2d(2 * fine if hr_skips else fine, fine, 1)
        self.hr_skips = hr_skips

    def merged(self, skip: Tensor) -> Tensor:
        """The skip "B fine 2H 2W" -> its part of the result, of the same shape."""
        weight, bias = matrix(self.merge)
        if not self.hr_skips:
            return bias[None, :, None, None].expand(len(skip), -1, *skip.shape[-2:])
        return F.linear(skip.permute(0, 2, 3, 1), weight[:, -skip.shape[1] :], bias).permute(0, 3, 1, 2)

    def forward(self, x: Tensor, merged: Tensor) -> Tensor:
        """ "B coarse H W" and the skip's part "B fine 2H 2W" -> "B fine 2H 2W"."""
        weight, bias = self._multiplied()
        moved = F.linear(x.permute(0, 2, 3, 1), weight, bias).unflatten(3, (2, 2, -1))  # B H W 2 2 fine
        there = merged.permute(0, 2, 3, 1).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # B H 2 W 2 fine
        return (there + moved.transpose(2, 3)).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)

    def _multiplied(self) -> tuple[Tensor, Tensor]:
        """M N W and its bias, "4*fine coarse" and "4*fine", the pixels of a 2 x 2 block one after the other."""
        (merge, _), (narrow, shift), (wide, shifts) = map(matrix, (self.merge, self.narrow, self.widen))
        merge = merge[:, : len(narrow)]
        with exactly(merge.device.type):  # multiplied out first, rounded afterwards
            narrow, shift = merge @ narrow, merge @ shift
            weight = torch.einsum("fm,mpc->pfc", narrow, wide.unflatten(0, (-1, 4)))
            bias = torch.einsum("fm,mp->pf", narrow, shifts.unflatten(0, (-1, 4))) + shift
        return weight.flatten(0, 1), bias.flatten()


def matrix(convolution: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Weight "out in" and bias of a 1x1 convolution."""
    return convolution.weight[..., 0, 0], cast(Tensor, convolution.bias)


class Encoder(nn.Module):
    """Image -> latent and the features of every level but the coarsest."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths = config.widths
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        self.levels = nn.ModuleList([Level(widths[0], config)])
        self.levels.extend(Level(coarse, config, reduce_from=fine) for fine, coarse in pairwise(widths))
        self.head = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, image: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Image "B 3 H W" -> latent, skips; see `ResidualAutoencoder.encode`."""
        skips = self.skips(image)
        x = self.levels[-1](skips[-1])
        with exactly(x.device.type):
            return self.head(x.to(self.head.weight.dtype)), skips

    def skips(self, image: Tensor) -> tuple[Tensor, ...]:
        """Image "B 3 H W" -> skips alone."""
        x, features = self.stem(image), []
        for level in list(self.levels)[:-1]:
            x = level(x)
            features.append(x)
        return tuple(features)


class Decoder(nn.Module):
    """Latent and skips -> image."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        widths = config.widths[::-1]
        self.stem = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.levels = nn.ModuleList(Level(width, config) for width in widths)
        self.expands = nn.ModuleList(Expand(coarse, fine, config.hr_skips) for coarse, fine in pairwise(widths))
        self.head = nn.Conv2d(widths[-1], 3, 3, padding=1)
        self.together = min(4, config.compression)

    def merged(self, skips: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What the skips add to every latent that is decoded with them; as many tensors, of the same shapes."""
        expands = cast(Iterable[Expand], self.expands)
        return tuple(expand.merged(skip) for expand, skip in zip(expands, reversed(skips), strict=True))[::-1]

    def forward(self, latent: Tensor, merged: tuple[Tensor, ...]) -> Tensor:
        """Latent and `merged` skips -> image; see `ResidualAutoencoder.decode`."""
        x = self.stem(latent)
        for level, expand, part in zip(self.levels[:-1], self.expands, reversed(merged), strict=True):
            x = expand(level(x), part)
        x = self.levels[-1](x)
        with exactly(x.device.type):  # rounded, it would show in 8-bit images
            return self._pixels(F.gelu(x.to(self.head.weight.dtype)))

    def _pixels(self, x: Tensor) -> Tensor:
        """The head for `together` pixels of a row at once, "B C H W" -> "B 3 H W".

        Processors work on 16 channels or more at a time, of which 3 would leave most idle: so the pixels' kernels lie
        side by side in one of 3 x (2 + together), with a stride of as many pixels.
        """
        n, weight, bias = self.together, self.head.weight, cast(Tensor, self.head.bias)
        weight = torch.cat([F.pad(weight, (pixel, n - 1 - pixel)) for pixel in range(n)])
        rows = F.conv2d(x, weight, bias.repeat(n), stride=(1, n), padding=1).permute(0, 2, 3, 1)
        return rows.unflatten(3, (n, 3)).flatten(2, 3).permute(0, 3, 1, 2)


class ResidualAutoencoder(nn.Module):
    """E and D of the paper.

    Args:
        config: widths and depths.
    """

    def __init__(self, config: AutoencoderConfig = AutoencoderConfig()):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] # ChannelNorm works on it without copies

    def encode(self, image: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Image -> (latent, skips).

        Args:
            image: "B 3 H W" in [-1, 1]; H and W multiples of r.

        Returns:
            latent "B C_z H/r W/r", and skips h^(l) "B C_l H/2^l W/2^l" for l = 0 .. log2(r) - 1.
        """
        return self.encoder(image)

    def skips(self, image: Tensor) -> tuple[Tensor, ...]:
        """The skips of `encode` alone, for less work."""
        return self.encoder.skips(image)

    def decode(self, latent: Tensor, skips: tuple[Tensor, ...]) -> Tensor:
        """Latent of any level, and skips of HR (or of HR after the optics) -> image "B 3 H W", not clamped."""
        return self.decoder(latent, self.decoder.merged(skips))

    @torch.no_grad()
    def rescale_latent(self, factor: Tensor) -> None:
        """Multiply each latent channel by `factor` ("C_z") and undo it in the decoder: the same images, other units."""
        self.encoder.head.weight.mul_(factor[:, None, None, None])
        if self.encoder.head.bias is not None:
            self.encoder.head.bias.mul_(factor)
        self.decoder.stem.weight.div_(factor[None, :, None, None])
