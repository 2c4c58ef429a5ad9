"""What a captured LR image adds to the optics' image of HR: a distribution of latent residuals, and a flow to draw it.

For one image and scale: S = K_s HR is the image after the optics (`capture.optics`), z_S = E(S), z_HR = E(HR). The
residual E(captured LR) - z_S holds noise, demosaicing patterns, sharpening and JPEG. It is written as

    residual = gain * deviation_t * y

    gain         how strong residuals are at a latent pixel: the root of the detail that the optics took there
    deviation_t  a number for each latent channel, at the time t of the scale
    y            "whitened": unit variance in each channel, over all places

The spread is a Gaussian for y with the captured covariance of channels. `ResidualNetwork` is the velocity that carries
its samples to captured ones: conditional flow matching from one distribution to the other, given z_S, z_HR and t
(compare Stochastic Flow Matching, arXiv 2410.19814).

What decoded draws lack is added in pixels (see `grain`), and what they have too much is filtered out (`cutoff`).
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from degflow.config import option
from degflow.flow import Carried, Draw, Finish, See, Seen, integrate
from degflow.models.autoencoder import ChannelNorm, matrix
from degflow.models.cutoff import Cutoff
from degflow.models.grain import Grain
from degflow.models.spread import Spread

FLOOR = 0.25 / 127.5  # of the lost detail: a quarter of an 8-bit level in [-1, 1]


@dataclass(frozen=True)
class ResidualConfig:
    """Size of a `ResidualNetwork`."""

    latent_channels: int = option(4, "C_z, channels of the latent; a training takes those of rae")
    width: int = option(128, "channels inside")
    blocks: int = option(8, "residual blocks; 0: no network, residuals are drawn from the Gaussian alone")
    expansion: int = option(3, "channels inside a block / width")

    def __post_init__(self):
        for name, least in (("latent_channels", 1), ("width", 8), ("blocks", 0), ("expansion", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"residual.{name}={getattr(self, name)}: must be at least {least}")
        if self.width % 2:
            raise ValueError(f"residual.width={self.width}: must be even")

    @property
    def working_channels(self) -> float:
        """Numbers alive at the peak of an evaluation without gradients, per latent pixel."""
        return 4 * self.latent_channels + (3 + 2 * self.expansion) * self.width


class Guide(NamedTuple):
    """What is known of a captured latent before it is drawn."""

    optics: Tensor  # z_S, "B C_z h w"
    source: Tensor  # z_HR, "B C_z h w"
    gain: Tensor  # "B 1 h w"
    time: Tensor  # of the scale, "B"


def lost_detail(hr: Tensor, skeleton: Tensor, compression: int) -> Tensor:
    """The gain of a latent pixel: the root of the rms of HR - S in the image pixels that it stands for.

    The variance of captured residuals follows the rms of what the optics took, not its square. A larger square would
    bring the noise of an edge to flat places beside it.

    Args:
        hr, skeleton: "B 3 H W" in [-1, 1], H and W multiples of the compression.
        compression: image pixels along a latent pixel.

    Returns:
        "B 1 h w".
    """
    square = F.avg_pool2d((hr - skeleton).square().mean(1, keepdim=True), compression)
    return (square.sqrt() + FLOOR).sqrt()


class _Block(nn.Module):
    """x + gated MLP of a normalised 5 x 5 depthwise convolution, scaled and shifted by the two times."""

    def __init__(self, config: ResidualConfig):
        super().__init__()
        width = config.width
        self.mix = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = ChannelNorm(width)
        self.modulate = nn.Linear(width, 3 * width)
        self.widen = nn.Conv2d(width, config.expansion * width, 1)
        self.narrow = nn.Conv2d(config.expansion * width, width, 1)
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """ "B C H W" and "B C" -> "B C H W"."""
        scale, shift, gate = self.modulate(embedding)[:, None, None].chunk(3, 3)  # "B 1 1 C" each
        y = self.norm(self.mix(x)).permute(0, 2, 3, 1)
        y = torch.addcmul(shift, y, 1 + scale)
        y = F.linear(F.gelu(F.linear(y, *matrix(self.widen))), *matrix(self.narrow))
        return torch.addcmul(x, 0.5 + gate.permute(0, 3, 1, 2), y.permute(0, 3, 1, 2))


class ResidualNetwork(nn.Module):
    """dy/dtau of the flow from the Gaussian (tau 0) to captured residuals (tau 1).

    Convolutions and per-pixel norms alone, so that a place depends on its surroundings and not on the image's size.

    Args:
        config: widths and depths.
    """

    def __init__(self, config: ResidualConfig = ResidualConfig()):
        super().__init__()
        self.config = config
        self.stem = nn.Conv2d(3 * config.latent_channels + 1, config.width, 3, padding=1)
        self.embed = nn.Sequential(nn.Linear(2 * 16, config.width), nn.SiLU(), nn.Linear(config.width, config.width))
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.blocks))
        self.norm = ChannelNorm(config.width)
        self.head = nn.Conv2d(config.width, config.latent_channels, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def forward(self, y: Tensor, tau: Tensor, guide: Guide) -> Tensor:
        """Velocity.

        Args:
            y: whitened residuals, "B C_z h w".
            tau: place along the flow, "B" in [0, 1].
            guide: what is known.

        Returns:
            dy/dtau, "B C_z h w".
        """
        seen = torch.cat((y, guide.optics, guide.source - guide.optics, guide.gain.log()), 1)
        x = self.stem(seen.contiguous(memory_format=torch.channels_last))
        embedding = F.silu(self.embed(torch.cat((_waves(tau), _waves(guide.time)), 1).to(x.dtype)))
        for block in self.blocks:
            x = block(x, embedding)
        return self.head(F.gelu(self.norm(x)))


class ResidualFlow(nn.Module):
    """Draws captured latents: the optics' latent, plus a residual carried from the Gaussian to captured ones.

    Velocities of straight paths from independent pairs have an exact property at tau = 0: x_0 + v(x_0, 0) is the mean
    of what is captured. So `spread` 0 costs one evaluation.

    Args:
        optics: (hr "B 3 H W", scale "B") -> S, of the same shape.
        spread: fitted.
        network: a `ResidualNetwork`; without one (blocks=0) residuals are drawn from the Gaussian.
        compression: image pixels along a latent pixel.

    Its `grain` and `cutoff` do nothing until they are fitted.
    """

    multiple, draws = 1, True
    solver = ("rk4", 2)  # 8 evaluations; Heun's method in 4 steps loses a fifth of the variance
    images = 2
    reach, finish_channels = Cutoff.reach, 1  # the grain's gain

    def __init__(self, optics: nn.Module, spread: Spread, network: ResidualNetwork, compression: int):
        super().__init__()
        times = tuple(spread.times.tolist())
        self.grain, self.cutoff = Grain(times), Cutoff(times)
        self.optics, self.spread, self.network, self.compression = optics, spread, network, compression
        self.has_solver = network.config.blocks > 0
        self.latent_channels, self.working_channels = network.config.latent_channels, network.config.working_channels
        self.optics_channels: float = cast(Any, optics).working_channels

    def guide(self, hr: Tensor, scale: Tensor) -> Tensor:
        """HR after the optics."""
        return self.optics(hr, scale)

    def carry(self, see: See, hr: Tensor, draw: Draw) -> Iterator[Carried]:
        """See `Flow`; each scale has an image after the optics, and an integration, of its own."""
        source = see(hr, False)
        for n in range(draw.scale.shape[1]):
            yield self._carry(see, hr, source, draw, n)  # no variable holds its skips while the next scale is carried

    def describe(self) -> dict[str, Any]:
        """See `Flow`."""
        optics, times = cast(Any, self.optics).describe(), self.spread.times.tolist()
        return {"residual": asdict(self.network.config), "optics": optics, "times": times}

    def _carry(self, see: See, hr: Tensor, source: Seen, draw: Draw, n: int) -> Carried:
        """Carry the latents to the n-th scale."""
        seen = see(self.optics(hr, draw.scale[:, n]), True)
        gain = lost_detail(source.image, seen.image, self.compression)
        asked = (draw.time[:, n], draw.seed[:, n], draw.place)
        time, seed, place = (x.to(hr.device, non_blocking=True) for x in asked)
        guide = Guide(seen.latent, source.latent, gain, time)
        latent = self.latent(guide, seed, draw.spread, draw.steps, draw.solver, place)
        return Carried(latent, seen, self._finish(source.image, seen.image, time, seed, draw.spread, place))

    def _finish(self, hr: Tensor, skeleton: Tensor, time: Tensor, seed: Tensor, spread: float, place: Tensor) -> Finish:
        """Grain for a window of the decoded image, unless spread is 0; then the cutoff."""
        gain = spread * self.grain.gain(hr, skeleton, time) if spread else None

        def finish(image: Tensor, top: int, left: int) -> Tensor:
            if gain is not None:
                height, width = image.shape[-2:]
                begin = torch.stack((place[:, 0] * self.compression + top, place[:, 1] * self.compression + left), 1)
                noise = self.grain.sample(seed, time, height, width, begin)
                image = image + gain[..., top : top + height, left : left + width] * noise
            return self.cutoff(image, time)

        return finish

    def latent(
        self, guide: Guide, seed: Tensor, spread: float, steps: int, solver: str, place: Tensor | None = None
    ) -> Tensor:
        """Draw one latent "B C_z h w" for each guide.

        Args:
            guide: what is known.
            seed: int64 "B".
            spread: 1 gives draws, 0 their mean; between them, what lies in proportion between the two.
            steps, solver: of `integrate`, from tau 0 to 1.
            place: as in `Draw`.
        """
        y, (_, deviation) = guide.optics.new_zeros(guide.optics.shape), self.spread.at(guide.time)

        def velocity(y: Tensor, tau: Tensor) -> Tensor:
            return self.network(y, tau, guide).to(y.dtype)

        if self.has_solver and spread < 1:
            y = velocity(y, guide.time.new_zeros(len(y)))
        if spread > 0:
            drawn = self.spread.sample(seed, guide.time, y.shape[2], y.shape[3], place)
            if self.has_solver:
                drawn = integrate(velocity, drawn, torch.ones(len(y)), steps=steps, solver=solver)
            y = torch.lerp(y, drawn, spread)
        return guide.optics + guide.gain * deviation * y


def _waves(time: Tensor) -> Tensor:
    """Smooth features "B 16" of times "B" in [0, 1]."""
    angles = time.float()[:, None] * math.pi * torch.arange(1, 9, device=time.device)
    return torch.cat((angles.sin(), angles.cos()), 1)
