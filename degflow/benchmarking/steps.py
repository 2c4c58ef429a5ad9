"""Training steps: stage 1, stage 2 of the model's own kind, and an SR network."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from degflow.benchmarking.measure import Table, alternate, flop
from degflow.benchmarking.predict import GPU, REST, Kernel, kernels, total
from degflow.config import load
from degflow.degrader import Degrader
from degflow.flow import PathFlow
from degflow.models.precision import computing, differentiating
from degflow.objectives import LatentObjective, LFMObjective, Losses, RAEObjective, ResidualObjective
from degflow.restoration.networks import NetworkConfig, RestorationObjective, build
from degflow.training.average import Average
from degflow.training.latents import FLIPS
from degflow.training.rae import TrainRAEConfig
from degflow.training.residual import TrainResidualConfig
from degflow.trajectory import NaturalCubicSpline

FEWER, ONCE = "stage 2, points=4", "stage 2, encode_once=true"
DECAY = 0.99  # of the averaged weights


class Step(NamedTuple):
    """A training step, which takes the number of the repeat and returns its loss, and how many weights it trains."""

    run: Callable[[int], Tensor]
    weights: int

    def seconds(self, gpu: GPU, precision: str) -> float:
        """What a GPU should take, if this step is one on the device meta; Adam reads 16 bytes a weight, writes 12."""
        adam = Kernel(REST, 0, 16 * self.weights, 12 * self.weights)
        return total([*kernels(lambda: self.run(0), {}), adam], gpu, precision)


def training(
    degrader: Degrader,
    perceptual: nn.Module | None,
    network: NetworkConfig | None,
    gpu: GPU,
    precision: str,
    repeats: int,
    crop: int = 64,
    batch: int = 8,
) -> Table:
    """Steps per second of both stages and of an SR network, with the prediction for a GPU.

    Args:
        degrader: its networks are trained (a copy), on its device.
        perceptual: of the published stage 2; None leaves LPIPS out.
        network: the SR network; None: none.
        gpu: that the prediction is for.
        precision: of the trained network's products.
        repeats: of each step, in turn.
        crop, batch: of all steps.
    """
    device = next(degrader.parameters()).device.type
    own = steps(degrader, perceptual, network, precision, crop, batch)
    ways = {name: step.run for name, step in own.items()}
    shadows = steps(copy.deepcopy(degrader).to("meta"), copy.deepcopy(perceptual), network, precision, crop, batch)
    work = {name: flop(way) for name, way in ways.items()}
    seconds = {name: step.seconds(gpu, precision) for name, step in shadows.items()}
    rows = []
    for name, timing in alternate(ways, repeats, device).items():
        rates = f"{1 / timing.median:.3g}", f"{work[name] / 1e9:.3g}", f"{work[name] / timing.median / 1e9:.3g}"
        rows.append((name, *rates, f"{1 / seconds[name]:.3g}"))
    stage, more = "that of flows that draw", f"{ONCE!r} takes latents that were encoded before."
    if isinstance(degrader.flow, PathFlow):
        stage = f"the published one, {'with' if perceptual else 'without'} LPIPS"
        more = f"With points=4 a step has {few(batch)} crops, and four points of the path for each."
    about = (
        f"With Adam, batch {batch} of {crop} x {crop} crops at {len(degrader.levels)} levels, {precision}, medians of "
        f"{repeats} alternating repeats; stage 2 is {stage}. {more} Predicted for {gpu.tflops:g} TFLOP/s in bfloat16 "
        f"and {gpu.terabytes:g} TB/s."
    )
    return Table("Training steps", about, ("", "steps/s", "GFLOP", "GFLOP/s", "steps/s predicted for a GPU"), rows)


def trainings(degrader: Degrader, gpu: GPU) -> Table:
    """What the trainings by `realsr_rae` and `realsr_residual` should take; the degrader has their size."""
    shadow, where = copy.deepcopy(degrader).to("meta"), ("scenes.data=none", "output=none")
    stage1 = load(TrainRAEConfig, ("config=realsr_rae", *where))
    stage2 = load(TrainResidualConfig, ("config=realsr_residual", "rae=none", *where))
    rows = []
    for name, way, config in (("stage 1: realsr_rae", "stage 1", stage1), ("stage 2: realsr_residual", ONCE, stage2)):
        fit = config.fit
        step = steps(shadow, None, None, fit.precision, config.scenes.crop, fit.batch)[way]
        seconds = step.seconds(gpu, fit.precision)
        hours = seconds * fit.steps / 3600
        rows.append((name, f"{fit.steps} of {fit.batch} crops", f"{1e3 * seconds:.3g}", f"{hours:.2g}"))
    image = torch.empty(1, 3, 1000, 1000, device="meta")
    encoding = total(kernels(lambda: shadow.autoencoder.encode(image), {}), gpu, "float32")
    copies = len(FLIPS) * (1 + stage2.retouch)
    count = copies * (2 * len(degrader.levels) - 1) * sum(1 / factor**2 for factor in stage2.scenes.reductions)
    about = (
        f"**Predicted, not measured**: for one GPU with {gpu.tflops:g} TFLOP/s in bfloat16 and {gpu.terabytes:g} TB/s, "
        f"without loading, validation and checkpoints. Before stage 2 all scenes are encoded in float32, at least "
        f"{count * encoding:.2g} s for each megapixel of a scene's HR image (more where tiles overlap)."
    )
    return Table("Trainings at the size for RealSR, predicted", about, ("", "steps", "ms/step", "hours"), rows)


def optimised(
    degrader: Degrader, precision: str, repeats: int, compiled: bool, crop: int = 64, batch: int = 8
) -> Table:
    """A step of each stage as a training takes it, beside one without the optimisations.

    Args:
        degrader: its networks are trained (copies), on its device.
        precision: of the optimised step's products; the plain one's are float32.
        repeats: of each step, in turn.
        compiled: the optimised step's objective is compiled.
        crop, batch: of all steps.
    """
    device, ways = next(degrader.parameters()).device.type, dict[str, Callable[[int], Tensor]]()
    plain, fast = (objectives(copy.deepcopy(degrader), None, crop, batch) for _ in range(2))
    pairs = {"stage 1": "stage 1", "stage 2": ONCE if ONCE in fast else "stage 2"}
    for stage, quicker in pairs.items():
        objective, sample = plain[stage]
        ways[f"{stage}, plain"] = _stepping(objective, "float32", sample, _plain_update(_trained(objective)))
        objective, sample = fast[quicker]
        if compiled:
            objective.compile()
        ways[stage] = _stepping(objective, precision, sample, _update(_trained(objective)))
    for way in ways.values():
        way(0)
    timings, rows = alternate(ways, repeats, device), []
    for stage in pairs:
        pair = timings[f"{stage}, plain"], timings[stage]
        rates = (f"{1 / timing.median:.3g}" for timing in pair)
        rows.append((stage, *rates, f"{pair[1].faster_than(pair[0]):.2f}"))
    what = ["Adam and the average of the weights in one operation each", precision, "compiled" if compiled else ""]
    what.append(f"latents encoded before ({ONCE})" if ONCE in fast else "")
    about = (
        f"Batch {batch} of {crop} x {crop} crops on {device}, without LPIPS, medians of {repeats} alternating repeats. "
        "Plain: Adam and the average weight by weight, float32, not compiled, crops encoded in each step. Optimised: "
        f"{', '.join(word for word in what if word)}."
    )
    header = ("", "plain steps/s", "optimised steps/s", "times as fast")
    return Table("Training steps without and with the optimisations", about, header, rows)


def steps(
    degrader: Degrader,
    perceptual: nn.Module | None,
    network: NetworkConfig | None,
    precision: str,
    crop: int,
    batch: int,
) -> Mapping[str, Step]:
    """A training step of each kind, on the degrader's device, on random images."""
    found = objectives(copy.deepcopy(degrader), perceptual, crop, batch)
    if network:
        hr, lr = (found["stage 1"][1][n] for n in (1, 0))
        sr = RestorationObjective(build(network)).to(hr.device)
        found[f"SR: {network.name}"] = sr, (lr, hr)
    return {name: _stepper(objective, precision, *sample) for name, (objective, sample) in found.items()}


def objectives(
    degrader: Degrader, perceptual: nn.Module | None, crop: int, batch: int
) -> dict[str, tuple[nn.Module, tuple[Tensor, ...]]]:
    """The objectives of both stages, which train the degrader's networks, and random samples on its device."""
    device, generator = next(degrader.parameters()).device, torch.Generator().manual_seed(0)
    shape = (batch, len(degrader.levels), 3, crop, crop)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device)
    time, points = (torch.rand(batch, n, generator=generator).to(device) for n in (1, 4))
    number, flow, part = torch.arange(batch, device=device), degrader.flow, slice(few(batch))
    rae = RAEObjective(copy.deepcopy(degrader.autoencoder).requires_grad_(True))
    ways: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {"stage 1": (rae, (images[:, 1], images[:, 0], number))}
    if isinstance(flow, PathFlow):
        path = NaturalCubicSpline(degrader.timeline.knots).to(device)
        lfm = LFMObjective(degrader.autoencoder, flow.network, path, perceptual.to(device) if perceptual else None)
        ways["stage 2"] = lfm, (images, time, number)
        ways[FEWER] = lfm, (images[part], points[part], number[part])
    else:
        known = time[:, 0], points[:, 0], number
        residual = ResidualObjective(degrader.autoencoder, flow)
        ways["stage 2"] = residual, (images[:, 0], images[:, 0], images[:, 1], *known)
        side = crop // degrader.autoencoder.config.compression
        latents = torch.rand(3, batch, flow.latent_channels + 1, side, side, generator=generator).to(device)
        ways[ONCE] = LatentObjective(degrader.autoencoder, flow), (*latents, *known)
    return ways


def few(batch: int) -> int:
    """Crops that have as many points, four each, as `batch` crops have with one."""
    return max(1, batch // 4)


def _trained(objective: nn.Module) -> nn.Module:
    return objective.train().network  # type: ignore[return-value]


def _stepper(objective: nn.Module, precision: str, *sample: Tensor) -> Step:
    network = _trained(objective)
    weights, update = sum(parameter.numel() for parameter in network.parameters()), lambda: None
    if not sample[0].is_meta:
        update = torch.optim.Adam(network.parameters(), lr=1e-5, fused=True).step
    return Step(_stepping(objective, precision, sample, update), weights)


def _stepping(
    objective: nn.Module, precision: str, sample: Sequence[Tensor], update: Callable[[], object]
) -> Callable[[int], Tensor]:
    """A step that takes the number of the repeat; `update` changes the weights by their gradients."""

    def step(repeat: int) -> Tensor:
        with computing(precision, sample[0].device.type):
            losses: Losses = objective(*sample)
        with differentiating(precision):
            losses.total.backward()
        update()
        objective.zero_grad()
        return losses.total.detach()

    return step


def _update(network: nn.Module) -> Callable[[], None]:
    """Adam and the average of the weights, as `training` has them on a GPU."""
    adam, average = torch.optim.Adam(network.parameters(), lr=1e-5, fused=True), Average(network, DECAY)

    def update() -> None:
        adam.step()
        average.update(1000)

    return update


def _plain_update(network: nn.Module) -> Callable[[], None]:
    """The same weight by weight."""
    adam = torch.optim.Adam(network.parameters(), lr=1e-5, foreach=False, fused=False)
    averages = [parameter.detach().clone() for parameter in network.parameters()]

    def update() -> None:
        adam.step()
        for average, parameter in zip(averages, network.parameters(), strict=True):
            average.lerp_(parameter.detach(), 1 - DECAY)

    return update
