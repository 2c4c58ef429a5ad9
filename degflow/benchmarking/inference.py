"""The networks at work: which solver is accurate enough, and what an LR image costs beside the released procedure."""

import copy
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from degflow.benchmarking.measure import Table, Timing, alternate
from degflow.degrader import PRECISIONS, Degrader, pad
from degflow.flow import SOLVER, STEPS, integrate
from degflow.models import FlowMap
from degflow.models.autoencoder import Decoder, Expand

START = 1e-3  # where the released procedure's integration begins
CANDIDATES = (
    *(("euler", steps) for steps in (8, 16)),
    *(("heun", steps) for steps in (2, 4, 6)),
    *(("rk4", steps) for steps in (1, 2, 3, 4, 5)),
    *(("rk5", steps) for steps in (1, 2, 3, 4)),
)


class Swept(NamedTuple):
    """LR images "N 3 H W" of one HR image, and how often the velocity network was asked."""

    images: Tensor
    evaluations: int


def plain_decode(decoder: Decoder, latent: Tensor, skips: tuple[Tensor, ...]) -> Tensor:
    """The decoder as the paper draws it, each 1x1 convolution by itself and the skip at its side.

    Args:
        decoder: whose weights are used.
        latent, skips: as of `ResidualAutoencoder.decode`.
    """
    x, expands = decoder.stem(latent), cast(Iterable[Expand], decoder.expands)
    for level, expand, skip in zip(decoder.levels[:-1], expands, reversed(skips), strict=True):
        x = expand.narrow(F.pixel_shuffle(expand.widen(level(x)), 2))
        x = expand.merge(torch.cat((x, skip), 1) if expand.hr_skips else x)
    return decoder.head(F.gelu(decoder.levels[-1](x)))


@torch.inference_mode()
def released(
    degrader: Degrader, hr: Tensor, scales: Sequence[float], tolerance: float = 1e-5, start: float = START
) -> Swept:
    """The released procedure: one image, SciPy's RK45 through host memory up to the last scale, a decode for each.

    Args:
        degrader: whose networks are used.
        hr: "1 3 H W".
        scales: where the solution is read, increasing.
        tolerance: rtol and atol.
        start: the time at which the encoder's latent is taken to stand.
    """
    from scipy.integrate import solve_ivp

    latent, skips = degrader.autoencoder.encode(pad(hr, degrader.multiple))
    times = degrader.timeline.time(torch.tensor(scales, dtype=torch.float64)).clamp(start, 1)

    def field(at: float, flat: np.ndarray) -> np.ndarray:
        z = torch.from_numpy(flat).to(latent).view_as(latent)
        time = torch.tensor([at], dtype=latent.dtype, device=latent.device)
        return degrader.velocity(z, time, latent).flatten().cpu().numpy()

    first, end = latent.flatten().cpu().numpy(), float(times[-1])
    if end == start:
        states, evaluations = [first] * len(times), 0
    else:
        solution = solve_ivp(field, (start, end), first, "RK45", times.numpy(), rtol=tolerance, atol=tolerance)
        states, evaluations = list(solution.y.T.copy()), solution.nfev
    ends = [torch.from_numpy(state).to(latent).view_as(latent) for state in states]
    made = [plain_decode(degrader.autoencoder.decoder, end, skips) for end in ends]
    height, width = hr.shape[-2:]
    return Swept(torch.cat(made)[..., :height, :width].clamp(-1, 1), evaluations)


def exact(degrader: Degrader, hr: Tensor, scales: Sequence[float]) -> Swept:
    """RK45 at 1e-7 in float64 from time 0: what every solver is compared with."""
    return released(copy.deepcopy(degrader).double(), hr.double(), scales, 1e-7, 0.0)


def decibels(image: Tensor, reference: Tensor) -> list[float]:
    """PSNR over RGB of each of "N 3 H W" in [-1, 1], unquantised; 200 for equal images."""
    errors = (image.double() - reference.double()).square().mean((1, 2, 3)).tolist()
    return [10 * math.log10(4 / max(error, 4e-20)) for error in errors]


def accuracy(degrader: Degrader, crops: Sequence[Tensor], count: int = 9, name: str = "") -> Table:
    """How closely each solver follows `exact`, at `count` scales read from one integration and at each one's own end.

    Args:
        degrader: the model.
        crops: HR images "1 3 H W".
        count: scales, evenly spaced over the trained range without its start.
        name: of the model, for the title.
    """
    scales = torch.linspace(degrader.low, degrader.high, count + 1, dtype=torch.float64)[1:]
    references = [exact(degrader, hr, scales.tolist()) for hr in crops]
    evaluations = statistics.median(reference.evaluations for reference in references)
    rows = []
    halves = [(SOLVER, STEPS, precision) for precision in PRECISIONS if precision != "float32"]
    mapped = isinstance(degrader.velocity, FlowMap)
    candidates = ((SOLVER, STEPS),) if mapped else CANDIDATES
    for solver, steps, precision in (*((*candidate, "float32") for candidate in candidates), *halves):
        dense, ends = [], []
        for hr, reference in zip(crops, references, strict=True):
            options = {"steps": steps, "solver": solver, "precision": precision}
            dense += decibels(degrader(hr, scales[None], **options)[0], reference.images)
            ends += decibels(degrader(hr.expand(count, -1, -1, -1), scales, **options), reference.images)
        title = ("flow map" if mapped else f"{solver} x {steps}") + f", {precision}".replace(", float32", "")
        rows.append((title, "1" if mapped else str(_evaluations(solver, steps)), *map(_spread, (dense, ends))))
    about = (
        f"PSNR in dB of the LR image against SciPy's RK45 at 1e-7 in float64 ({evaluations:.0f} evaluations), "
        f"{len(crops)} photographs x {count} scales: smallest / median. Dense: all scales from one integration, "
        "as in the dataset job. Own end: each scale integrated to its own time."
    )
    return Table(f"Accuracy of the solvers{name}", about, ("solver", "evaluations", "dense", "own end"), rows)


def _spread(values: Sequence[float]) -> str:
    return f"{min(values):.1f} / {statistics.median(values):.1f}"


def _evaluations(solver: str, steps: int, end_time: float = 1.0) -> int:
    calls = 0

    def still(z: Tensor, time: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.zeros_like(z)

    integrate(still, torch.zeros(1, 1), torch.tensor([[end_time]]), steps=steps, solver=solver)
    return calls


def comparison(
    degrader: Degrader, hr: Tensor, repeats: int, count: int = 30, compiled: bool = False, name: str = ""
) -> Table:
    """One random scale per image, and a sweep: the released procedure beside ours.

    Args:
        degrader: the model, on the device that is measured.
        hr: "1 3 H W".
        repeats: how often; each has a scale of its own.
        count: scales of the sweep.
        compiled: measure ours with torch.compile as well.
        name: of the model, for the title.
    """
    mapped = isinstance(degrader.velocity, FlowMap)
    generator = torch.Generator().manual_seed(0)
    drawn = (degrader.low + (degrader.high - degrader.low) * torch.rand(repeats, generator=generator)).double()
    sweep = torch.linspace(degrader.low, degrader.high, count, dtype=torch.float64)
    ours = {"degflow": degrader}
    compiling = 0.0
    if compiled:
        ours["degflow, compiled"] = copy.deepcopy(degrader)
        ours["degflow, compiled"].compile(dynamic=False)
        compiling = time.perf_counter()
        ours["degflow, compiled"](hr, sweep[None, :1])
        compiling = time.perf_counter() - compiling
    needed: dict[int, int] = {}  # evaluations of each repeat's scale

    def stop(repeat: int) -> Swept:
        made = released(degrader, hr, [float(drawn[repeat])])
        needed[repeat] = made.evaluations
        return made

    ways = {
        "released, stopped at the scale": stop,
        "released, sweep": lambda n: released(degrader, hr, sweep.tolist()),
    }
    for way, model in ours.items():
        ways[way] = lambda n, model=model: model(hr, drawn[None, n : n + 1])
        ways[f"{way}, sweep"] = lambda n, model=model: model(hr, sweep[None])
    device = hr.device.type
    for once in ways.values():
        once(0)
    timings = alternate(ways, repeats, device)
    asked = sorted({*sweep.tolist(), float(drawn[-1])})
    wanted = exact(degrader, hr, asked).images
    places, last = [asked.index(scale) for scale in sweep.tolist()], asked.index(float(drawn[-1]))
    stopped, swept = timings["released, stopped at the scale"], timings["released, sweep"]
    rows = []
    for way, timing in timings.items():
        many = "sweep" in way
        made = timing.result.images if isinstance(timing.result, Swept) else timing.result[0]
        agreement = min(decibels(made, wanted[places] if many else wanted[last : last + 1]))
        if not isinstance(timing.result, Swept):
            calls = _our_calls(many, drawn, degrader)
        else:
            calls = str(timing.result.evaluations) if many else f"{statistics.mean(needed.values()):.0f} (mean)"
        factors = ["" if many else f"{timing.faster_than(stopped):.1f}", f"{timing.faster_than(swept):.1f}"]
        rows.append((way, calls, *_rates(timing, hr, count if many else 1), *factors, f"{agreement:.1f}"))
    height, width = hr.shape[-2:]
    about = (
        f"{width} x {height} pixels, one image at a time, float32, medians of {repeats} alternating repeats, each with "
        f"a scale of its own; a sweep is {count} scales. Factors: how many times faster than the released procedure "
        "stopped at the same scale, and than its sweep. Agreement: smallest PSNR against RK45 at 1e-7 in float64."
        + (" The released procedure evaluates a flow map as it does any field." if mapped else "")
        + (f" Compiling took {compiling:.0f} s." if compiled else "")
    )
    header = ("", "evaluations", "s", "LR images/s", "LR MP/s", "peak GB", "x stopped", "x sweep", "agreement dB")
    return Table(f"Against the released procedure, {width} x {height}{name}", about, header, rows)


def _our_calls(many: bool, drawn: Tensor, degrader: Degrader) -> str:
    if isinstance(degrader.velocity, FlowMap):
        return "1"
    if many:
        return str(_evaluations(SOLVER, STEPS))
    times = degrader.timeline.time(drawn)
    return f"{statistics.mean(_evaluations(SOLVER, STEPS, float(time)) for time in times):.0f} (mean)"


def _rates(timing: Timing, hr: Tensor, images: int) -> tuple[str, ...]:
    rate = images / timing.median
    megapixels = rate * hr[0, 0].numel() / 1e6
    return f"{timing.median:.2f}", f"{rate:.2f}", f"{megapixels:.3f}", f"{timing.peak / 1e9:.2f}"


def roofline(degrader: Degrader, hr: Tensor, repeats: int, side: int = 2048) -> Table:
    """FLOP/s over encoding, flow and decoding, over that of a large matrix product in the same type."""
    scale = torch.full((1, 1), degrader.high)
    with FlopCounterMode(display=False) as counter:
        degrader(hr, scale)
    matrix = torch.randn(side, side, device=hr.device, dtype=hr.dtype)
    ways = {"product": lambda n: matrix @ matrix, "degrader": lambda n: degrader(hr, scale)}
    timings = alternate(ways, repeats, hr.device.type)
    peak, achieved = 2 * side**3 / timings["product"].median, counter.get_total_flops() / timings["degrader"].median
    share = statistics.median(
        counter.get_total_flops() / b / (2 * side**3 / a)
        for a, b in zip(timings["product"].seconds, timings["degrader"].seconds, strict=True)
    )
    row = (f"{hr.shape[-1]} x {hr.shape[-2]}", f"{counter.get_total_flops() / 1e9:.0f}")
    row = (*row, f"{achieved / 1e9:.0f}", f"{peak / 1e9:.0f}", f"{share:.0%}")
    about = f"One image to the largest scale, {hr.dtype}; the product is {side} x {side}. Attention is not counted."
    return Table("Roofline", about, ("image", "GFLOP", "GFLOP/s", "of a product", "share"), [row])


_LARGE = """
import sys, time, torch
from degflow.benchmarking.measure import forget_peak, peak
from degflow.degrader import Degrader
model, height, width, memory, threads = sys.argv[1], *map(float, sys.argv[2:])
torch.set_num_threads(int(threads))
degrader = Degrader.load(model or None)
hr = torch.rand(1, 3, int(height), int(width)) * 2 - 1
degrader(hr[..., :64, :64], torch.tensor([2.0]))
before, begun = forget_peak("cpu"), time.perf_counter()
degrader(hr, torch.tensor([[2.0]]), memory=memory)
print(time.perf_counter() - begun, peak("cpu") - before, peak("cpu"))
"""


def large(degrader: Degrader, model: str, height: int, width: int, memory: float, threads: int) -> Table:
    """A large image inside a memory budget, on the CPU, in a process of its own."""
    command = [sys.executable, "-c", _LARGE, model, *map(str, (height, width, memory, threads))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, above, total = map(float, done.stdout.split())
    _, grid, keep = degrader.fit(height, width, memory)
    allowed = memory + 12e-9 * height * width
    how = f"{grid.rows} x {grid.columns} tiles, skips {'kept' if keep else 'computed twice'}"
    row = (f"{width} x {height}", f"{memory:g}", how, f"{seconds:.0f}", f"{above / 1e9:.2f}", f"{allowed:.2f}")
    about = (
        f"One scale, float32, {threads} CPU threads; peak above what the process held before, the LR image included."
    )
    header = ("image", "memory GB", "cut into", "s", "peak GB", "allowed GB", "whole process GB")
    return Table("A large image in bounded memory", about, header, [(*row, f"{total / 1e9:.2f}")])
