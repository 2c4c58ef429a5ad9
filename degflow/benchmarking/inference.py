"""The networks: how accurate each solver is, and what an LR image costs beside the released procedure."""

import contextlib
import copy
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from degflow.benchmarking.measure import Table, Timing, alternate, flop
from degflow.degrader import PRECISIONS, Degrader, pad
from degflow.flow import SOLVER, STEPS
from degflow.models import FlowMap, VelocityNetwork
from degflow.models.autoencoder import Decoder, Expand

ASKED_AS_A_FIELD = " The released procedure evaluates a flow map as it does any field."
ONE, SWEEP = ", one scale", ", sweep"  # the names of the timed ways end in these
START = 1e-3  # where the released procedure's integration begins
CANDIDATES = (
    *(("euler", steps) for steps in (8, 16)),
    *(("heun", steps) for steps in (2, 4, 6)),
    *(("rk4", steps) for steps in (1, 2, 3, 4, 5)),
    *(("rk5", steps) for steps in (1, 2, 3, 4)),
)


class Swept(NamedTuple):
    """LR images "N 3 H W" of one HR image, and how often the velocity network was evaluated."""

    images: Tensor
    evaluations: int


def plain_decode(decoder: Decoder, latent: Tensor, skips: tuple[Tensor, ...]) -> Tensor:
    """The decoder as in the paper: each 1x1 convolution by itself, each skip concatenated.

    Args:
        decoder: whose weights are used.
        latent, skips: as of `ResidualAutoencoder.decode`.
    """
    x, expands = decoder.stem(latent), cast(Iterable[Expand], decoder.expands)
    for level, expand, skip in zip(decoder.levels[:-1], expands, reversed(skips), strict=True):
        x = expand.narrow(F.pixel_shuffle(expand.widen(level(x)), 2))
        x = expand.merge(torch.cat((x, skip), 1) if expand.hr_skips else x)
    return decoder.head(F.gelu(decoder.levels[-1](x)))


@contextlib.contextmanager
def pixel_by_pixel(decoder: Decoder) -> Iterator[None]:
    """Let the decoder's head compute one pixel at a time, without the zeros in its products for several pixels."""
    together, decoder.together = decoder.together, 1
    try:
        yield
    finally:
        decoder.together = together


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
        start: the time that the encoder's latent is given.
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
    """RK45 at 1e-7 in float64 from time 0, the reference of every solver."""
    return released(copy.deepcopy(degrader).double(), hr.double(), scales, 1e-7, 0.0)


def decibels(image: Tensor, reference: Tensor) -> list[float]:
    """PSNR over RGB of each of "N 3 H W" in [-1, 1], unquantised; 200 for equal images."""
    errors = (image.double() - reference.double()).square().mean((1, 2, 3)).tolist()
    return [10 * math.log10(4 / max(error, 4e-20)) for error in errors]


def accuracy(degrader: Degrader, crops: Sequence[Tensor], count: int = 9, name: str = "") -> Table:
    """PSNR of each solver against `exact`, at `count` scales read from one integration and at each one's own end.

    Args:
        degrader: the model.
        crops: HR images "1 3 H W".
        count: scales, evenly spaced over the trained range without its start.
        name: of the model, for the title.
    """
    scales = torch.linspace(degrader.low, degrader.high, count + 1, dtype=torch.float64)[1:]
    references = [exact(degrader, hr, scales.tolist()) for hr in crops]
    exactly = statistics.median(reference.evaluations for reference in references)
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
        calls = evaluations(degrader, scales.tolist(), solver, steps)
        rows.append((title, str(calls), *map(_spread, (dense, ends))))
    about = (
        f"PSNR in dB of the LR image against SciPy's RK45 at 1e-7 in float64 ({exactly:.0f} evaluations), "
        f"{len(crops)} photographs x {count} scales: smallest / median. Dense: all scales from one integration, "
        "as in the dataset job. Own end: each scale integrated to its own time."
    )
    return Table(f"Accuracy of the solvers{name}", about, ("solver", "evaluations", "dense", "own end"), rows)


def _spread(values: Sequence[float]) -> str:
    return f"{min(values):.1f} / {statistics.median(values):.1f}"


@torch.inference_mode()
def evaluations(degrader: Degrader, scales: Sequence[float], solver: str = SOLVER, steps: int = STEPS) -> int:
    """How often one integration to these scales evaluates the U-Net, counted on a latent of zeros."""
    networks = (module for module in degrader.velocity.modules() if isinstance(module, VelocityNetwork))
    calls, config = [], degrader.velocity.config
    handle = next(networks).register_forward_hook(lambda *_: calls.append(1))
    latent = next(degrader.parameters()).new_zeros(1, config.latent_channels, config.multiple, config.multiple)
    time = degrader.timeline.time(torch.tensor([scales], dtype=torch.float64)).clamp(0, 1)
    try:
        degrader.velocity.carry(latent, time.to(latent), steps=steps, solver=solver)
    finally:
        handle.remove()
    return len(calls)


def comparison(
    degrader: Degrader,
    hr: Tensor,
    repeats: int,
    count: int = 30,
    compiled: bool = False,
    precision: str = "float32",
    name: str = "",
) -> Table:
    """One random scale per image, and a sweep: the released procedure beside ours.

    Args:
        degrader: the model, on the device that is measured.
        hr: "1 3 H W".
        repeats: of each way; each repeat has its own scale.
        count: scales of the sweep.
        compiled: measure degflow with torch.compile as well.
        precision: of degflow, see `Degrader`.
        name: of the model, for the title.
    """
    sweep = torch.linspace(degrader.low, degrader.high, count, dtype=torch.float64).tolist()
    scales = {ONE: [[scale] for scale in _drawn(degrader, repeats).tolist()], SWEEP: [sweep] * repeats}
    ours, compiling = {"degflow": degrader}, 0.0
    if compiled:
        begun = time.perf_counter()
        ours["degflow, compiled"] = compiled_copy(degrader, hr, precision)
        compiling = time.perf_counter() - begun
    ways, calls = _ways(degrader, hr, ours, scales, precision)
    timings = alternate(ways, repeats, hr.device.type)
    asked = sorted({*sweep, *scales[ONE][-1]})
    wanted = exact(degrader, hr, asked).images
    rows = []
    for way in (f"{way}{kind}" for way in ("released", *ours) for kind in scales):
        timing, last = timings[way], scales[SWEEP if way.endswith(SWEEP) else ONE][-1]
        agreement = min(decibels(timing.result, wanted[[asked.index(scale) for scale in last]]))
        factors = f"{timing.faster_than(timings[f'released{ONE}']):.1f}" if way.endswith(ONE) else ""
        factors = factors, f"{timing.faster_than(timings[f'released{SWEEP}']):.1f}"
        rows.append((way, _mean(calls[way]), *_rates(timing, hr, len(last)), *factors, f"{agreement:.1f}"))
    height, width = hr.shape[-2:]
    about = (
        f"{width} x {height} pixels, one image at a time, ours in {precision}, medians of {repeats} alternating "
        f"repeats, each with a scale of its own; a sweep is {count} scales. Factors: how many times faster than the "
        "released procedure stopped at the same scale, and than its sweep. Agreement: smallest PSNR against RK45 at "
        "1e-7 in float64."
        + (ASKED_AS_A_FIELD if isinstance(degrader.velocity, FlowMap) else "")
        + (f" Compiling took {compiling:.0f} s." if compiled else "")
    )
    header = ("", "evaluations", "s", "LR images/s", "LR MP/s", "peak GB", "x stopped", "x sweep", "agreement dB")
    return Table(f"Against the released procedure, {width} x {height}{name}", about, header, rows)


def _ways(
    degrader: Degrader,
    hr: Tensor,
    ours: Mapping[str, Degrader],
    scales: Mapping[str, list[list[float]]],
    precision: str,
) -> tuple[dict[str, Callable[[int], Tensor]], dict[str, list[int]]]:
    """What `comparison` times, each called once already; and their evaluations, to which the released ones are added.

    Args:
        degrader, hr, precision: as of `comparison`.
        ours: name -> degrader, as it is and compiled.
        scales: ONE or SWEEP -> the scales of each repeat.
    """
    calls: dict[str, list[int]] = {}
    ways: dict[str, Callable[[int], Tensor]] = {}
    for kind, each in scales.items():
        ways[f"released{kind}"] = _counted(degrader, hr, each, calls.setdefault(f"released{kind}", []))
        for way, model in ours.items():
            calls[f"{way}{kind}"] = [evaluations(degrader, asked) for asked in each]
            ways[f"{way}{kind}"] = lambda n, model=model, each=each: model(
                hr, torch.tensor(each[n : n + 1], dtype=torch.float64), precision=precision
            )[0]
    for once in ways.values():
        once(0)
    for kind in scales:
        calls[f"released{kind}"].clear()
    return ways, calls


def _counted(
    degrader: Degrader, hr: Tensor, scales: Sequence[Sequence[float]], calls: list[int]
) -> Callable[[int], Tensor]:
    """The released procedure for each repeat's scales; `calls` gets its evaluations."""

    def way(repeat: int) -> Tensor:
        made = released(degrader, hr, scales[repeat])
        calls.append(made.evaluations)
        return made.images

    return way


def compiled_copy(degrader: Degrader, hr: Tensor, precision: str = "float32") -> Degrader:
    """A copy, compiled for this size."""
    copied = copy.deepcopy(degrader)
    copied.compile(dynamic=False)
    copied(hr, torch.full((len(hr), 1), degrader.high), precision=precision)
    return copied


def _drawn(degrader: Degrader, count: int) -> Tensor:
    """Random scales, the same ones in every run."""
    generator = torch.Generator().manual_seed(0)
    return (degrader.low + (degrader.high - degrader.low) * torch.rand(count, generator=generator)).double()


def _mean(counts: Sequence[int]) -> str:
    return str(counts[0]) if len(set(counts)) == 1 else f"{statistics.mean(counts):.0f} (mean)"


def _rates(timing: Timing, hr: Tensor, images: int) -> tuple[str, ...]:
    rate = images / timing.median
    megapixels = rate * hr[0, 0].numel() / 1e6
    return f"{timing.median:.2f}", f"{rate:.2f}", f"{megapixels:.3f}", f"{timing.peak / 1e9:.2f}"


def roofline(
    degrader: Degrader, hr: Tensor, repeats: int, side: int = 2048, compiled: bool = False, precision: str = "float32"
) -> Table:
    """FLOP/s of encoding, flow and decoding, divided by those of a large matrix product in the same precision."""
    scale = torch.full((len(hr), 1), degrader.high)
    matrix = torch.randn(side, side, device=hr.device, dtype=PRECISIONS[precision])
    models = {"degflow": degrader} | ({"degflow, compiled": compiled_copy(degrader, hr, precision)} if compiled else {})
    ways = {"product": lambda n: matrix @ matrix}
    ways |= {way: lambda n, model=model: model(hr, scale, precision=precision) for way, model in models.items()}
    for once in ways.values():
        once(0)
    timings = alternate(ways, repeats, hr.device.type)
    with pixel_by_pixel(degrader.autoencoder.decoder):
        work = flop(lambda n: degrader(hr, scale))
    rows, product = [], timings["product"]
    for way in models:
        rates = (work / timings[way].median, 2 * side**3 / product.median)
        share = timings[way].faster_than(product) * work / (2 * side**3)
        rows.append((way, f"{work / 1e9:.0f}", *(f"{rate / 1e9:.0f}" for rate in rates), f"{share:.0%}"))
    about = (
        f"One image of {hr.shape[-1]} x {hr.shape[-2]} pixels to the largest scale, {precision}; the product is "
        f"{side} x {side}. Attention is not counted."
    )
    return Table("Roofline", about, ("", "GFLOP", "GFLOP/s", "of a product", "share"), rows)


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
    """A large image within a memory budget, on the CPU, in its own process."""
    command = [sys.executable, "-c", _LARGE, model, *map(str, (height, width, memory, threads))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, above, total = map(float, done.stdout.split())
    _, grid, keep = degrader.fit(height, width, memory)
    allowed = memory + 12e-9 * height * width
    how = f"{grid.rows} x {grid.columns} tiles, skips {'kept' if keep else 'computed twice'}"
    row = (f"{width} x {height}", f"{memory:g}", how, f"{seconds:.0f}", f"{above / 1e9:.2f}", f"{allowed:.2f}")
    about = f"One scale, float32, {threads} CPU threads; peak above the process's memory before, with the LR image."
    header = ("image", "memory GB", "cut into", "s", "peak GB", "allowed GB", "whole process GB")
    return Table("A large image in bounded memory", about, header, [(*row, f"{total / 1e9:.2f}")])
