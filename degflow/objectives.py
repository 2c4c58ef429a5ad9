"""The training objectives: a batch of samples -> losses.

`RAEObjective` is stage 1 (DegFlow, section 2.1), `LFMObjective` the published stage 2 (section 2.2), and
`ResidualObjective` stage 2 for flows that draw (`models.residual`), `LatentObjective` the same on latents that were
encoded before. Whatever is random in a sample (its level, its times, its noise) was drawn with the sample. So every
tensor here has a fixed shape, and nothing waits for a device. The published stage 2 may train at several points of its
path for each sample, which is encoded once for all of them.
In a narrower precision (`models.precision`) only the trained network and the decoder compute: what they are compared
with, the frozen encoder's latents and LPIPS, is made in float32.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from degflow.models import ResidualAutoencoder, ResidualFlow, Spread
from degflow.models.counter import sample_keys
from degflow.models.precision import exactly
from degflow.models.residual import Guide, lost_detail
from degflow.trajectory import NaturalCubicSpline, PiecewiseLinear, next_knot, taylor_step

BINS = 4  # of the time, for which the flow's error is logged apart


class Losses(NamedTuple):
    """The scalar to minimise, and its parts by name, for the log.

    `by_time` "2 BINS" has, for each quarter of the way along the flow, the sum of the samples' errors in it and their
    number, both divided by the batch's size.
    """

    total: Tensor
    parts: dict[str, Tensor]
    by_time: Tensor | None = None


class RAEObjective(nn.Module):
    """Stage 1: L1 between D(E(I); skips) and I, for I the HR image or an LR level.

    The skips are the HR image's, as published, or those of the image after the optics.

    Args:
        autoencoder: the network to train.
    """

    def __init__(self, autoencoder: ResidualAutoencoder):
        super().__init__()
        self.network = autoencoder

    def forward(self, target: Tensor, guide: Tensor, number: Tensor | None = None) -> Losses:
        """Losses of a batch.

        Args:
            target: uint8 "B 3 H W", I.
            guide: uint8 "B 3 H W", the image whose skips the decoder gets.
            number: the samples' numbers; nothing here depends on them.
        """
        image = to_float(target)
        latent, _ = self.network.encode(image)
        decoded = self.network.decode(latent, self.network.skips(to_float(guide)))
        loss = F.l1_loss(decoded.float(), image)
        return Losses(loss, {"l1": loss.detach()})


class _Stage2(nn.Module):
    """What the objectives of stage 2 share: a frozen autoencoder beside the network that is trained."""

    def __init__(self, autoencoder: ResidualAutoencoder, network: nn.Module, seed: int):
        super().__init__()
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.network = network
        self.seed = seed

    def train(self, mode: bool = True) -> "_Stage2":
        """Set the mode of the trained network; the frozen parts stay in eval mode."""
        super().train(False)
        self.network.train(mode)
        self.training = mode
        return self


class LFMObjective(_Stage2):
    """The published stage 2: conditional flow matching on the path through the levels' latents, and LPIPS.

    Args:
        autoencoder: the trained autoencoder; frozen here.
        velocity: the network to train.
        path: `NaturalCubicSpline` or `PiecewiseLinear` over the levels' times.
        perceptual: LPIPS ("B 3 H W", "B 3 H W") -> "B", or None to do without.
        weight: of the LPIPS term.
        seed: decides dropout, with a sample's number.
    """

    def __init__(
        self,
        autoencoder: ResidualAutoencoder,
        velocity: nn.Module,
        path: NaturalCubicSpline | PiecewiseLinear,
        perceptual: nn.Module | None = None,
        weight: float = 0.1,
        seed: int = 0,
    ):
        super().__init__(autoencoder, velocity, seed)
        self.path = path
        self.perceptual = perceptual.requires_grad_(False) if perceptual is not None and weight else None
        self.weight = weight

    def forward(self, images: Tensor, time: Tensor, number: Tensor) -> Losses:
        """Losses of a batch.

        Args:
            images: uint8 "B K 3 H W", HR first.
            time: "B P" in [0, 1], of P points of each sample's path.
            number: int64 "B", the samples' numbers.
        """
        points = time.shape[1]
        image, time = to_float(images), time.float().flatten()
        with exactly(image.device.type):
            values, skips = self._encode(image)
            point = self.path.at(_each(values, points), time)
        keys = (number[:, None] * points + torch.arange(points, device=number.device)).flatten()
        velocity = self.network(point.position, time, sample_keys(self.seed, keys)).float()
        flow = F.mse_loss(velocity, point.velocity)
        by_time = _by_time(velocity, point.velocity, time)
        if self.perceptual is None:
            return Losses(flow, {"cfm": flow.detach()}, by_time)
        # Where a Taylor step lands at the next knot, decoded, against that level's image.
        after, gap = next_knot(self.path.knots, time)
        decoder = self.autoencoder.decoder
        merged = tuple(_each(part, points) for part in decoder.merged(skips))
        decoded = decoder(taylor_step(point, velocity, gap), merged).float()
        level = after.view(len(image), points, 1, 1, 1).expand(-1, -1, *image.shape[2:])
        with exactly(image.device.type):
            lpips = self.perceptual(decoded, image.gather(1, level).flatten(0, 1)).mean()
        return Losses(flow + self.weight * lpips, {"cfm": flow.detach(), "lpips": lpips.detach()}, by_time)

    @torch.no_grad()
    def _encode(self, image: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Latents of all levels "B K C_z h w" and the HR image's skips."""
        latent, skips = self.autoencoder.encode(image[:, 0])
        lower = self.autoencoder.encode(image[:, 1:].flatten(0, 1))[0].unflatten(0, (len(image), -1))
        return torch.cat((latent[:, None], lower), 1), skips


class ResidualObjective(_Stage2):
    """Stage 2 for draws: conditional flow matching from the Gaussian of residuals to captured ones.

    Args:
        autoencoder: the trained autoencoder; frozen here.
        flow: with its optics and its spread fitted; its network is trained.
        seed: decides the Gaussian samples, with a sample's number.
    """

    def __init__(self, autoencoder: ResidualAutoencoder, flow: ResidualFlow, seed: int = 0):
        super().__init__(autoencoder, flow.network, seed)
        self.spread = flow.spread

    def forward(self, hr: Tensor, skeleton: Tensor, lr: Tensor, time: Tensor, tau: Tensor, number: Tensor) -> Losses:
        """Losses of a batch.

        Args:
            hr, skeleton, lr: uint8 "B 3 H W": HR, the same after the optics, and the captured LR image.
            time: "B" in [0, 1], of the captured scale. tau: "B" in [0, 1], the place along the flow.
            number: int64 "B", the samples' numbers.
        """
        guide, captured = residuals(self.autoencoder, self.spread, hr, skeleton, lr, time.float())
        return self._match(guide, captured, tau, number)

    def _match(self, guide: Guide, captured: Tensor, tau: Tensor, number: Tensor) -> Losses:
        """Conditional flow matching to captured whitened residuals "B C_z h w"."""
        keys, tau = sample_keys(self.seed, number), tau.float()
        begin = self.spread.sample(keys, guide.time, captured.shape[2], captured.shape[3])
        place = torch.lerp(begin, captured, tau[:, None, None, None])
        velocity = self.network(place, tau, guide).float()
        flow = F.mse_loss(velocity, captured - begin)
        return Losses(flow, {"cfm": flow.detach()}, _by_time(velocity, captured - begin, tau))


class LatentObjective(ResidualObjective):
    """`ResidualObjective` on latents that were encoded before, with the gain as one more channel (`training.latents`).

    The autoencoder computes nothing here. It is part of the objective so that a checkpoint notes which one it was.

    Args: see `ResidualObjective`.
    """

    def forward(self, hr: Tensor, skeleton: Tensor, lr: Tensor, time: Tensor, tau: Tensor, number: Tensor) -> Losses:
        """Losses of a batch; hr, skeleton and lr are "B C_z+1 h w", the rest as in `ResidualObjective`."""
        source, optics, captured = (latent[:, :-1] for latent in (hr, skeleton, lr))
        guide = Guide(optics, source, skeleton[:, -1:], time.float())
        return self._match(guide, whitened(self.spread, guide, captured), tau, number)


@torch.no_grad()
def residuals(
    autoencoder: ResidualAutoencoder, spread: Spread, hr: Tensor, skeleton: Tensor, lr: Tensor, time: Tensor
) -> tuple[Guide, Tensor]:
    """What is known of captured latents, and their whitened residuals "B C_z h w"; arguments as above."""
    image = to_float(torch.stack((hr, skeleton, lr), 1))
    with exactly(image.device.type):
        latents = autoencoder.encode(image.flatten(0, 1))[0].unflatten(0, (-1, 3))
    source, optics, captured = latents.unbind(1)
    guide = Guide(optics, source, lost_detail(image[:, 0], image[:, 1], autoencoder.config.compression), time)
    return guide, whitened(spread, guide, captured)


def whitened(spread: Spread, guide: Guide, captured: Tensor) -> Tensor:
    """Captured latents "B C_z h w" -> their residuals, whitened."""
    _, deviation = spread.at(guide.time)
    return (captured - guide.optics) / (guide.gain * deviation)


@torch.no_grad()
def _by_time(velocity: Tensor, wanted: Tensor, time: Tensor) -> Tensor:
    """`Losses.by_time` of velocities "B C h w" at times "B"."""
    quarter = (BINS * time).long().clamp(max=BINS - 1)
    inside = (quarter[:, None] == torch.arange(BINS, device=time.device)).float()
    error = (velocity - wanted).square().flatten(1).mean(1)
    return torch.stack(((error[:, None] * inside).sum(0), inside.sum(0))) / len(time)


def _each(values: Tensor, points: int) -> Tensor:
    """Each of "B ..." as often as a sample has points, "B P ..." as one."""
    return values.repeat_interleave(points, 0) if points > 1 else values


def to_float(images: Tensor) -> Tensor:
    """Uint8 -> float32 in [-1, 1], same shape."""
    return images.float() / 127.5 - 1
