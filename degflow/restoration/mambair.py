"""MambaIR (Guo et al. 2024, section 3): residual groups of state space blocks that scan an image in four directions."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from degflow.config import option
from degflow.restoration.scan import selective_scan

_FEATURES = 64  # before the upsampling


@dataclass(frozen=True)
class MambaIRConfig:
    """Size of a MambaIR body; the defaults are the paper's."""

    width: int = option(180, "channels")
    depths: tuple[int, ...] = option((6, 6, 6, 6, 6, 6), "state space blocks of each group")
    expand: float = option(2.0, "channels of the scan / width")
    states: int = option(16, "states of each scanned channel")
    compress: int = option(3, "the convolutions of a block have width / compress channels inside")
    squeeze: int = option(30, "channel attention has width / squeeze channels inside")
    drop_path: float = option(0.1, "stochastic depth of the last block's scan, while training")

    def __post_init__(self):
        if not self.depths or min(self.depths) < 1:
            raise ValueError(f"mambair.depths={list(self.depths)}: at least one entry, each at least 1")
        for name in ("width", "expand", "states", "compress", "squeeze"):
            if getattr(self, name) <= 0:
                raise ValueError(f"mambair.{name}={getattr(self, name)}: must be above 0")
        if self.width < max(self.compress, self.squeeze):
            raise ValueError(f"mambair.width={self.width}: must be at least compress and squeeze")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"mambair.drop_path={self.drop_path}: must lie in [0, 1)")


class Scan2d(nn.Module):
    """The vision state space module: a gated stream, scanned along rows and columns in both directions."""

    def __init__(self, width: int, expand: float, states: int):
        super().__init__()
        inner, self.rank, self.states = round(expand * width), math.ceil(width / 16), states
        self.enter = nn.Linear(width, 2 * inner, bias=False)
        self.local = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        bound = inner**-0.5
        self.select = nn.Parameter(torch.empty(4, self.rank + 2 * states, inner).uniform_(-bound, bound))
        bound = self.rank**-0.5
        self.delta_weight = nn.Parameter(torch.empty(4, inner, self.rank).uniform_(-bound, bound))
        # Step sizes start uniformly on a logarithmic scale between 0.001 and 0.1; the bias is their inverse softplus.
        steps = torch.empty(4, inner).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.delta_bias = nn.Parameter(steps + torch.log(-torch.expm1(-steps)))
        self.log_decay = nn.Parameter(torch.arange(1.0, states + 1).log().expand(4, inner, states).clone())
        self.direct = nn.Parameter(torch.ones(4, inner, 1))
        self.norm = nn.LayerNorm(inner)
        self.leave = nn.Linear(inner, width, bias=False)
        for layer in (self.enter, self.leave):
            nn.init.trunc_normal_(layer.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """ "B H W C" -> the same shape."""
        stream, gate = self.enter(x).chunk(2, -1)
        stream = F.silu(self.local(stream.permute(0, 3, 1, 2)))
        scanned = self._scan(stream).permute(0, 2, 3, 1)
        return self.leave(self.norm(scanned) * F.silu(gate))

    def _scan(self, image: Tensor) -> Tensor:
        """ "B D H W" -> the sum of its four scans."""
        height, width = image.shape[-2:]
        forth = torch.stack((image.flatten(2), image.transpose(2, 3).flatten(2)), 1)
        sequences = torch.cat((forth, forth.flip(-1)), 1)
        selected = torch.einsum("bgdl,gsd->bgsl", sequences, self.select)
        raw, B, C = selected.split((self.rank, self.states, self.states), 2)
        raw = torch.einsum("bgrl,gdr->bgdl", raw, self.delta_weight)
        delta = F.softplus(raw.float() + self.delta_bias[..., None])
        y = selective_scan(sequences, delta, -self.log_decay.exp(), B, C) + self.direct * sequences
        y = y[:, :2] + y[:, 2:].flip(-1)
        rows, columns = y[:, 0].unflatten(-1, (height, width)), y[:, 1].unflatten(-1, (width, height))
        return rows + columns.transpose(2, 3)


class ChannelAttention(nn.Module):
    """Two convolutions through a bottleneck; then each channel is weighted by a function of the channels' means."""

    def __init__(self, width: int, compress: int, squeeze: int):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(width, width // compress, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width // compress, width, 3, padding=1),
        )
        self.weigh = nn.Sequential(
            nn.Conv2d(width, width // squeeze, 1),
            nn.ReLU(),
            nn.Conv2d(width // squeeze, width, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """ "B H W C" -> the same shape."""
        features = self.conv(x.permute(0, 3, 1, 2))
        return (features * self.weigh(features.mean((2, 3), keepdim=True))).permute(0, 2, 3, 1)


class StateSpaceBlock(nn.Module):
    """Scan, then channel attention; each after a LayerNorm, and added to a learned multiple of its input.

    Args:
        config: sizes.
        drop: probability with which a sample goes without the scan, while training.
    """

    def __init__(self, config: MambaIRConfig, drop: float):
        super().__init__()
        self.drop = drop
        self.norm1, self.norm2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.scan = Scan2d(config.width, config.expand, config.states)
        self.attention = ChannelAttention(config.width, config.compress, config.squeeze)
        self.keep1, self.keep2 = nn.Parameter(torch.ones(config.width)), nn.Parameter(torch.ones(config.width))

    def forward(self, x: Tensor) -> Tensor:
        """ "B H W C" -> the same shape."""
        x = self.keep1 * x + self._dropped(self.scan(self.norm1(x)))
        return self.keep2 * x + self.attention(self.norm2(x))

    def _dropped(self, x: Tensor) -> Tensor:
        """Without some of the samples, while training; the others stand for them (stochastic depth)."""
        if not self.training or not self.drop:
            return x
        return x * x.new_empty(len(x), 1, 1, 1).bernoulli_(1 - self.drop) / (1 - self.drop)


class Group(nn.Module):
    """State space blocks and a convolution, added to the input."""

    def __init__(self, config: MambaIRConfig, drops: list[float]):
        super().__init__()
        self.blocks = nn.Sequential(*(StateSpaceBlock(config, drop) for drop in drops))
        self.conv = nn.Conv2d(config.width, config.width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """ "B C H W" -> the same shape."""
        return x + self.conv(self.blocks(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


class MambaIR(nn.Module):
    """The body: input channels -> deep features -> an image with sides four times as long.

    Args:
        config: sizes.
        inputs, outputs: channels.
        one_step: one pixel-shuffle of 4 instead of two of 2.
    """

    def __init__(self, config: MambaIRConfig, inputs: int, outputs: int, one_step: bool = False):
        super().__init__()
        self.first = nn.Conv2d(inputs, config.width, 3, padding=1)
        self.first_norm = nn.LayerNorm(config.width)
        drops = iter(torch.linspace(0, config.drop_path, sum(config.depths)).tolist())
        self.groups = nn.Sequential(*(Group(config, [next(drops) for _ in range(n)]) for n in config.depths))
        self.norm = nn.LayerNorm(config.width)
        self.conv_after_body = nn.Conv2d(config.width, config.width, 3, padding=1)
        self.tail = nn.Sequential(
            nn.Conv2d(config.width, _FEATURES, 3, padding=1), nn.LeakyReLU(), upsampler(_FEATURES, outputs, one_step)
        )

    def forward(self, x: Tensor) -> Tensor:
        """ "B inputs H W" -> "B outputs 4H 4W"."""
        x = self.first(x)
        deep = self.groups(self.first_norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        deep = self.norm(deep.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.tail(x + self.conv_after_body(deep))


def upsampler(features: int, outputs: int, one_step: bool) -> nn.Sequential:
    """Features "B C H W" -> "B outputs 4H 4W", by two pixel-shuffles of 2 and a convolution, or by one of 4."""
    if one_step:
        return nn.Sequential(nn.Conv2d(features, 16 * outputs, 3, padding=1), nn.PixelShuffle(4))
    double = [(nn.Conv2d(features, 4 * features, 3, padding=1), nn.PixelShuffle(2)) for _ in range(2)]
    return nn.Sequential(*double[0], *double[1], nn.Conv2d(features, outputs, 3, padding=1))
