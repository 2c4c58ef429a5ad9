"""The two training objectives: a batch of aligned crops -> losses (DegFlow, sections 2.1 and 2.2)."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from degflow.capture.filters import blur
from degflow.models import FlowMap, ResidualAutoencoder, VelocityNetwork
from degflow.models.dropout import sample_keys
from degflow.trajectory import NaturalCubicSpline, PiecewiseLinear, next_knot, taylor_step

Landing = Literal["taylor", "integrated"]
SIGMAS = (0.6, 3.2)  # pixels; a Gaussian of 1.3 comes closest to the simulated x2, one of 2.7 to x4


class Losses(NamedTuple):
    """The scalar to minimise, and its parts by name, for the log."""

    total: Tensor
    parts: dict[str, Tensor]


class RAEObjective(nn.Module):
    """Stage 1: L1 between D(E(I); skips of HR) and I, I being HR or an LR level at random.

    Args:
        autoencoder: the network to train.
        blurred: share of the samples whose I is HR blurred by a Gaussian of SIGMAS pixels instead. A captured LR image
            holds noise, under which what the decoder leaves in of HR's is hard to see; a blurred one, like the mean
            that a flow arrives at, holds none.
        freeze_encoder: train the decoder alone, so that the latents stay what they are.
    """

    def __init__(self, autoencoder: ResidualAutoencoder, blurred: float = 0.0, freeze_encoder: bool = False):
        super().__init__()
        self.network = autoencoder
        self.blurred = blurred
        self.network.encoder.requires_grad_(not freeze_encoder)

    def forward(self, images: Tensor, draw: Tensor, number: Tensor | None = None) -> Losses:
        """Losses of a batch.

        Args:
            images: uint8 "B K 3 H W", HR first.
            draw: "B" in [0, 1); picks each sample's level, or how much it is blurred.
            number: the samples' numbers; nothing here depends on them.
        """
        image = to_float(images)
        smooth = draw < self.blurred
        level = ((draw - self.blurred).clamp(min=0) / (1 - self.blurred) * images.shape[1]).long()
        level = level.clamp(max=images.shape[1] - 1)
        target = image[torch.arange(len(level), device=level.device), level]
        if bool(smooth.any()):
            low, high = SIGMAS
            sigma = low + (high - low) * draw[smooth] / self.blurred
            target = target.index_copy(0, smooth.nonzero()[:, 0], blur(image[smooth, 0], sigma))
        latent, skips = self.network.encode(image[:, 0])
        degraded = smooth | (level > 0)
        if bool(degraded.any()):
            moved = self.network.encode(target[degraded])[0]
            latent = latent.index_copy(0, degraded.nonzero()[:, 0], moved.to(latent.dtype))
        loss = F.l1_loss(self.network.decode(latent, skips).float(), target)
        return Losses(loss, {"l1": loss.detach()})


class LFMObjective(nn.Module):
    """Stage 2: conditional flow matching on the path through the latents, and LPIPS and L1 of what it decodes to.

    The mean of the losses of a step's parts, of equal size, is the loss of the whole batch: dropout, and which samples
    are decoded, depend on a sample's number alone.

    Args:
        autoencoder: the trained autoencoder; frozen here.
        velocity: the network to train.
        path: `NaturalCubicSpline` or `PiecewiseLinear` over the levels' times.
        perceptual: LPIPS ("B 3 H W", "B 3 H W") -> "B", or None to do without.
        weight: of the LPIPS term.
        pixel_weight: of an L1 term of the same images.
        landing: what these two look at, at the level that comes next after a sample's time: "taylor", the decoding of
            one Taylor step from the path between the captured levels (DegFlow, section 2.2), which also knows that
            path's acceleration; "integrated", of the end of the network's own path from HR, as a degrader decodes it.
        landing_samples: how many samples of each step get these two terms, evenly spread over it; 0 means all.
        batch: samples per step, over all processes; needed with landing_samples.
        seed: decides dropout, with a sample's number.
    """

    def __init__(
        self,
        autoencoder: ResidualAutoencoder,
        velocity: VelocityNetwork | FlowMap,
        path: NaturalCubicSpline | PiecewiseLinear,
        perceptual: nn.Module | None = None,
        weight: float = 0.1,
        pixel_weight: float = 0.0,
        landing: Landing = "taylor",
        landing_samples: int = 0,
        batch: int = 0,
        seed: int = 0,
    ):
        super().__init__()
        if landing_samples > batch:
            raise ValueError(f"landing_samples={landing_samples}: must not exceed batch={batch}")
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.network = velocity
        self.path = path
        self.perceptual = perceptual.requires_grad_(False) if perceptual is not None and weight else None
        self.weight, self.pixel_weight, self.landing = weight, pixel_weight, landing
        self.landing_samples, self.batch, self.seed = landing_samples, batch, seed

    def train(self, mode: bool = True) -> "LFMObjective":
        """Set the velocity network's mode; the frozen parts stay in eval mode."""
        super().train(False)
        self.network.train(mode)
        self.training = mode
        return self

    def forward(self, images: Tensor, draw: Tensor, number: Tensor) -> Losses:
        """Losses of a batch.

        Args:
            images: uint8 "B K 3 H W", HR first.
            draw: "B" in [0, 1); the samples' times.
            number: int64 "B"; step * batch + place in the step's batch.
        """
        image, time = to_float(images), draw.float()
        with torch.no_grad():
            latent, skips = self.autoencoder.encode(image[:, 0])
            lower = self.autoencoder.encode(image[:, 1:].flatten(0, 1))[0]
            values = torch.cat((latent[:, None], lower.unflatten(0, (len(image), -1))), 1).float()
            with torch.autocast(values.device.type, enabled=False):  # it would round the path to half precision
                point = self.path.at(values, time)
        keys, (after, gap) = sample_keys(self.seed, number), next_knot(self.path.knots, time)
        alone = self.perceptual is None and self.pixel_weight == 0
        chosen = number[:0] if alone else self._chosen(number)
        if self.landing == "integrated" and len(chosen):
            where, ends = (point.position, time, values[:, 0], keys), self.path.knots[after[chosen]]
            velocity, landed = self.network.velocity_and_ends(*where, chosen, ends, solver="rk4", steps=2)
            velocity = velocity.float()
        else:
            velocity = self.network(point.position, time, values[:, 0], keys).float()
            landed = taylor_step(point, velocity, gap)[chosen]
        flow = F.mse_loss(velocity, point.velocity)
        if alone:
            return Losses(flow, {"cfm": flow.detach()})
        if not len(chosen):
            return self._total(flow, image[:0, 0], image[:0, 0], len(number))
        decoded = self.autoencoder.decode(landed, tuple(skip[chosen] for skip in skips))
        return self._total(flow, decoded.float(), image[chosen, after[chosen]], len(number))

    def _total(self, flow: Tensor, decoded: Tensor, target: Tensor, count: int) -> Losses:
        """Adds the terms of the decoded images; `count`: samples in this part of the step's batch."""
        parts, total = {"cfm": flow.detach()}, flow
        # The part may hold more or fewer of the chosen than its share.
        share = self.batch / self.landing_samples if self.landing_samples else 1.0
        for name, weight, distance in (("lpips", self.weight, self.perceptual), ("l1", self.pixel_weight, _l1)):
            if weight and distance is not None:
                mean = distance(decoded, target).sum() / count * share if len(decoded) else flow.new_zeros(())
                parts[name], total = mean.detach(), total + weight * mean
        return Losses(total, parts)

    def _chosen(self, number: Tensor) -> Tensor:
        """Places of the samples whose images are decoded."""
        place, count = number % max(self.batch, 1), self.landing_samples
        every = torch.ones_like(number, dtype=torch.bool)
        return (place * count % self.batch < count if count else every).nonzero()[:, 0]


def _l1(image: Tensor, reference: Tensor) -> Tensor:
    """Mean absolute difference of each image, "B 3 H W" -> "B"."""
    return (image - reference).abs().mean((1, 2, 3))


def to_float(images: Tensor) -> Tensor:
    """Uint8 -> float32 in [-1, 1], same shape."""
    return images.float() / 127.5 - 1
