"""Training steps: stage 1, and stage 2 of the model's own kind."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from degflow.benchmarking.measure import Table, alternate, flop
from degflow.degrader import Degrader
from degflow.flow import PathFlow
from degflow.objectives import LFMObjective, RAEObjective, ResidualObjective
from degflow.trajectory import NaturalCubicSpline


def training(degrader: Degrader, perceptual: nn.Module | None, repeats: int, crop: int = 64, batch: int = 8) -> Table:
    """Steps per second of both stages; `perceptual` None leaves LPIPS out of the published stage 2."""
    degrader, device = copy.deepcopy(degrader), next(degrader.parameters()).device
    generator = torch.Generator().manual_seed(0)
    levels = len(degrader.levels)
    shape = (batch, levels, 3, crop, crop)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device)
    time, tau = torch.rand(2, batch, generator=generator).to(device)
    number, flow = torch.arange(batch, device=device), degrader.flow
    rae = RAEObjective(copy.deepcopy(degrader.autoencoder).requires_grad_(True)).train()
    ways = {"stage 1": _stepper(rae, images[:, 1], images[:, 0], number)}
    if isinstance(flow, PathFlow):
        path = NaturalCubicSpline(degrader.timeline.knots).to(device)
        lfm = LFMObjective(degrader.autoencoder, flow.network, path, perceptual).train()
        about = f"stage 2 is the published one, {'with' if perceptual else 'without'} LPIPS"
        ways["stage 2"] = _stepper(lfm, images, time, number)
    else:
        residual = ResidualObjective(degrader.autoencoder, flow).train()
        about = "stage 2 is that of flows that draw"
        ways["stage 2"] = _stepper(residual, images[:, 0], images[:, 0], images[:, 1], time, tau, number)
    work = {name: flop(way) for name, way in ways.items()}
    rows = []
    for name, timing in alternate(ways, repeats, device.type).items():
        rates = f"{1 / timing.median:.2f}", f"{work[name] / 1e9:.0f}", f"{work[name] / timing.median / 1e9:.0f}"
        rows.append((name, *rates))
    about = (
        f"With Adam, batch {batch} of {crop} x {crop} crops at {levels} levels, float32, medians of {repeats} "
        f"alternating repeats; {about}."
    )
    return Table("Training steps", about, ("", "steps/s", "GFLOP", "GFLOP/s"), rows)


def _stepper(objective: nn.Module, *sample: Tensor) -> Callable[[int], float]:
    network: nn.Module = objective.network  # type: ignore[assignment]
    adam = torch.optim.Adam(network.parameters(), lr=1e-5)

    def step(repeat: int) -> float:
        losses = objective(*sample)
        losses.total.backward()
        adam.step()
        adam.zero_grad()
        return float(losses.total.detach())

    return step
