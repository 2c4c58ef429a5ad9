"""Training steps of the two stages beside careless ones, without their optimisations."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from degflow.benchmarking.inference import plain_decode
from degflow.benchmarking.measure import Table, alternate, flop
from degflow.models import FlowMap, ResidualAutoencoder, VelocityNetwork
from degflow.objectives import LFMObjective, RAEObjective, to_float
from degflow.trajectory import NaturalCubicSpline, next_knot, taylor_step

KNOTS = (0.0, 1 / 3, 1.0)


def careless_rae(objective: RAEObjective, images: Tensor, draw: Tensor) -> Tensor:
    """Stage 1's loss with HR encoded for its skips, every target encoded, even HR again, and a plain decoder."""
    image = to_float(images)
    level = (draw * images.shape[1]).long().clamp(max=images.shape[1] - 1)
    target = image[torch.arange(len(level), device=level.device), level]
    _, skips = objective.network.encode(image[:, 0])
    latent, _ = objective.network.encode(target)
    return F.l1_loss(plain_decode(objective.network.decoder, latent, skips), target)


def careless_lfm(objective: LFMObjective, images: Tensor, draw: Tensor) -> Tensor:
    """Stage 2's loss with a graph through the frozen encoder, levels encoded one by one, HR twice, plain decoding."""
    image = to_float(images)
    values = torch.stack([objective.autoencoder.encode(level)[0] for level in image.unbind(1)], 1)
    _, skips = objective.autoencoder.encode(image[:, 0])
    point = objective.path.at(values, draw)
    velocity = objective.network(point.position, draw, values[:, 0])
    loss = F.mse_loss(velocity, point.velocity)
    if objective.perceptual is None:
        return loss
    after, gap = next_knot(objective.path.knots, draw)
    generated = plain_decode(objective.autoencoder.decoder, taylor_step(point, velocity, gap), skips)
    target = image[torch.arange(len(image), device=image.device), after]
    return loss + objective.weight * objective.perceptual(generated, target).mean()


def training(
    autoencoder: ResidualAutoencoder,
    velocity: VelocityNetwork | FlowMap,
    perceptual: nn.Module | None,
    repeats: int,
    crop: int = 64,
    batch: int = 8,
) -> Table:
    """Steps per second of both stages; `perceptual` None leaves LPIPS out of stage 2, and the table says so."""
    device = next(velocity.parameters()).device
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, 3, crop, crop), generator=generator, dtype=torch.uint8).to(device)
    draws = torch.rand(repeats + 1, batch, generator=generator).to(device)
    rae = RAEObjective(copy.deepcopy(autoencoder).train())
    frozen, trained = copy.deepcopy(autoencoder), copy.deepcopy(velocity).train()
    lfm = LFMObjective(frozen, trained, NaturalCubicSpline(KNOTS).to(device), perceptual)
    loose = copy.deepcopy(lfm)
    loose.autoencoder.requires_grad_(True)
    ways = {
        "stage 1": _stepper(rae, lambda images, draw: rae(images, draw).total, images, draws),
        "stage 1, careless": _stepper(rae, lambda images, draw: careless_rae(rae, images, draw), images, draws),
        "stage 2": _stepper(
            lfm, lambda images, draw: lfm(images, draw, torch.arange(len(draw), device=device)).total, images, draws
        ),
        "stage 2, careless": _stepper(loose, lambda images, draw: careless_lfm(loose, images, draw), images, draws),
    }
    work = {name: flop(way) for name, way in ways.items()}
    timings = alternate(ways, repeats, device.type)
    rows = []
    for stage in ("stage 1", "stage 2"):
        ours, careless = timings[stage], timings[f"{stage}, careless"]
        rates = (f"{1 / timing.median:.2f}" for timing in (ours, careless))
        predicted = work[f"{stage}, careless"] / work[stage]
        rows.append((stage, *rates, f"{predicted:.2f}", f"{ours.faster_than(careless):.2f}"))
    about = (
        f"Steps per second with Adam, batch {batch} of {crop} x {crop} crops at 3 levels, float32, medians of "
        f"{repeats} alternating repeats; stage 2 {'with LPIPS on all of it' if perceptual else 'without LPIPS'}. "
        "Careless: every level encoded by itself, HR twice, the decoder's 1x1 convolutions one by one, and in stage 2 "
        "gradients for the frozen autoencoder. Predicted: by the FLOP of a step."
    )
    return Table("Training steps", about, ("", "degflow", "careless", "predicted", "factor"), rows)


def _stepper(
    objective: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], images: Tensor, draws: Tensor
) -> Callable[[int], float]:
    network: nn.Module = objective.network  # type: ignore[assignment]
    adam = torch.optim.Adam(network.parameters(), lr=1e-5)

    def step(repeat: int) -> float:
        value = loss(images, draws[repeat])
        value.backward()
        adam.step()
        for parameter in objective.parameters():
            parameter.grad = None
        return float(value.detach())

    return step
