"""The networks: how accurate each solver is, and what an LR image costs beside the released procedure."""

import contextlib
import copy
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from degflow.benchmarking.measure import Table, Timing, alternate, flop, run_process
from degflow.benchmarking.plain import exact, released
from degflow.benchmarking.predict import GPU, kernels, total
from degflow.degrader import Degrader
from degflow.flow import PathFlow
from degflow.models.autoencoder import Decoder
from degflow.models.precision import PRECISIONS, computing

ONE, SWEEP = ", one scale", ", sweep"  # the names of the timed ways end in these
CANDIDATES = (
    *(("euler", steps) for steps in (8, 16)),
    *(("heun", steps) for steps in (1, 2, 4, 8, 16, 32)),
    *(("rk4", steps) for steps in (1, 2, 4, 8)),
    *(("rk5", steps) for steps in (1, 2, 3, 4)),
)


@contextlib.contextmanager
def pixel_by_pixel(decoder: Decoder) -> Iterator[None]:
    """Let the decoder's head compute one pixel at a time, without the zeros in its products for several pixels."""
    together, decoder.together = decoder.together, 1
    try:
        yield
    finally:
        decoder.together = together


def ours(degrader: Degrader, hr: Tensor, scales: Sequence[float], **options: Any) -> Tensor:
    """Degrade one image "1 3 H W" to N scales, with seed 0 at each; "N 3 H W"."""
    scale = torch.tensor([scales], dtype=torch.float64)
    return degrader(hr, scale, seed=torch.zeros_like(scale, dtype=torch.int64), **options)[0]


def evaluations(degrader: Degrader, scales: Sequence[float], **options: Any) -> int:
    """How often degrading one image to these scales evaluates the flow's network, counted on a tiny image."""
    calls = []
    handle = degrader.flow.network.register_forward_hook(lambda *_: calls.append(1))
    try:
        ours(degrader, next(degrader.parameters()).new_zeros(1, 3, 8, 8), scales, **options)
    finally:
        handle.remove()
    return len(calls)


def margins(
    degrader: Degrader, photographs: Sequence[Tensor], crop: int, widths: Sequence[int], scales: Sequence[float]
) -> Table:
    """How far the LR image of a crop with a margin is from that part of the whole photograph's.

    Args:
        degrader: whose images are compared, before they are rounded.
        photographs: each "1 3 H W"; the crop is taken from the middle.
        crop: side in pixels.
        widths: of the margin, in pixels, multiples of the degrader's.
        scales: to degrade to.
    """
    unlike: dict[int, list[Tensor]] = {width: [] for width in widths}
    for hr in photographs:
        whole = ours(degrader, hr, scales)
        multiple, sides = degrader.multiple, hr.shape[-2:]
        begin = [max(0, side - crop) // 2 // multiple * multiple for side in sides]
        for width in widths:
            first = [max(0, start - width) for start in begin]
            rows, columns = (slice(a, b + crop + width) for a, b in zip(first, begin, strict=True))
            made = ours(degrader, hr[..., rows, columns], scales, place=torch.tensor([first]))
            top, left = (b - a for a, b in zip(first, begin, strict=True))
            inner = made[..., top : top + crop, left : left + crop]
            rows, columns = (slice(start, start + crop) for start in begin)
            unlike[width].append(127.5 * (inner - whole[..., rows, columns]).flatten(1))
    header = ("margin, pixels", *(f"{what} at x{scale:g}" for scale in scales for what in ("largest", "rms")))
    rows = []
    for width, parts in unlike.items():
        apart = torch.cat(parts, 1)
        values = zip(apart.abs().amax(1).tolist(), apart.square().mean(1).sqrt().tolist(), strict=True)
        rows.append((str(width), *(text for largest, rms in values for text in (f"{largest:.1f}", f"{rms:.2f}"))))
    about = (
        f"LR of crops of {crop} pixels beside LR of the whole photograph; {len(photographs)} photographs, in levels."
    )
    return Table("What a crop's margin leaves", about, header, rows)


def decibels(image: Tensor, reference: Tensor) -> list[float]:
    """PSNR over RGB of each of "N 3 H W" in [-1, 1], unquantised; 200 for equal images."""
    errors = (image.double() - reference.double()).square().mean((1, 2, 3)).tolist()
    return [10 * math.log10(4 / max(error, 4e-20)) for error in errors]


def accuracy(degrader: Degrader, crops: Sequence[Tensor], count: int = 9, name: str = "") -> Table:
    """PSNR of each solver against `exact`, at `count` scales of each image, asked for as the dataset job does.

    Args:
        degrader: the model.
        crops: HR images "1 3 H W".
        count: scales, evenly spaced over the trained range without its start.
        name: of the model, for the title.
    """
    scales = torch.linspace(degrader.low, degrader.high, count + 1, dtype=torch.float64)[1:].tolist()
    references = [exact(degrader, hr, scales) for hr in crops]
    exactly = statistics.median(reference.evaluations for reference in references)
    narrower = [precision for precision in PRECISIONS if precision not in _same_as_float32(crops[0].device)]
    halves = [(*degrader.flow.solver, precision) for precision in narrower]
    rows = []
    for solver, steps, precision in (*((*candidate, "float32") for candidate in CANDIDATES), *halves):
        options, found = {"solver": solver, "steps": steps}, []
        for hr, reference in zip(crops, references, strict=True):
            found += decibels(ours(degrader, hr, scales, precision=precision, **options), reference.images)
        title = f"{solver} x {steps}" + f", {precision}".replace(", float32", "")
        calls = evaluations(degrader, scales[-1:], **options)
        rows.append((title, str(calls), f"{min(found):.1f}", f"{statistics.median(found):.1f}"))
    about = (
        f"PSNR in dB of the LR image against SciPy's RK45 at 1e-7 in float64 ({exactly:.0f} evaluations for all "
        f"scales of an image), {len(crops)} photographs x {count} scales. Evaluations: for the largest scale."
    )
    return Table(f"Accuracy of the solvers{name}", about, ("solver", "evaluations", "smallest", "median"), rows)


def _same_as_float32(device: torch.device) -> set[str]:
    return {"float32"} if device.type == "cuda" else {"float32", "tf32"}


def expected(
    degrader: Degrader, hr: Tensor, scales: Sequence[float], gpu: GPU, precision: str = "float32", fused: bool = False
) -> float:
    """Seconds that `ours` should take on a GPU; fused: see `predict.Kernel.fused`."""
    shadow = copy.deepcopy(degrader).to("meta")
    return total(kernels(lambda: ours(shadow, hr.to("meta"), scales), {}), gpu, precision, fused)


def comparison(
    degrader: Degrader,
    hr: Tensor,
    repeats: int,
    gpu: GPU,
    count: int = 30,
    compiled: bool = False,
    precision: str = "float32",
    name: str = "",
) -> Table:
    """One scale, and on the published path a sweep, which shares one integration: the released procedure beside ours.

    Args:
        degrader: the model, on the device that is measured.
        hr: "1 3 H W".
        repeats: of each way.
        gpu: that the prediction is for. The released procedure, which goes through host memory, has none.
        count: scales of the sweep.
        compiled: measure degflow with torch.compile as well.
        precision: of degflow, see `Degrader`.
        name: of the model, for the title.
    """
    scales = {ONE: [(degrader.low + degrader.high) / 2]}
    if isinstance(degrader.flow, PathFlow):
        scales[SWEEP] = torch.linspace(degrader.low, degrader.high, count, dtype=torch.float64).tolist()
    models, compiling = {"degflow": degrader}, 0.0
    if compiled:
        begun = time.perf_counter()
        models["degflow, compiled"] = compiled_copy(degrader, hr, precision)
        compiling = time.perf_counter() - begun
    ways: dict[str, Callable[[int], Tensor]] = {}
    calls, references = {}, {}
    for kind, asked in scales.items():
        references[kind] = exact(degrader, hr, asked).images
        calls[f"released{kind}"] = released(degrader, hr, asked).evaluations
        ways[f"released{kind}"] = lambda n, asked=asked: released(degrader, hr, asked).images
        for way, model in models.items():
            calls[f"{way}{kind}"] = evaluations(degrader, asked)
            ways[f"{way}{kind}"] = lambda n, model=model, asked=asked: ours(model, hr, asked, precision=precision)
            ways[f"{way}{kind}"](0)
    timings, rows = alternate(ways, repeats, hr.device.type), []
    for way in (f"{way}{kind}" for way in ("released", *models) for kind in scales):
        timing, kind = timings[way], SWEEP if way.endswith(SWEEP) else ONE
        rates = _rates(timing, hr, len(scales[kind]))
        factors = [
            f"{timing.faster_than(timings[f'released{other}']):.1f}" if way.endswith((ONE, other)) else ""
            for other in scales
        ]
        agreement, seconds = min(decibels(timing.result, references[kind])), "–"
        if not way.startswith("released"):
            fused = way.startswith("degflow, compiled")
            seconds = f"{expected(degrader, hr, scales[kind], gpu, precision, fused):.3g}"
        rows.append((way, str(calls[way]), *rates, *factors, f"{agreement:.1f}", seconds))
    (height, width), sweep = hr.shape[-2:], f"; a sweep is {count} scales" * (SWEEP in scales)
    about = (
        f"{width} x {height} pixels, one image at a time, ours in {precision}, medians of {repeats} alternating "
        f"repeats, to scale {scales[ONE][0]:g}{sweep}. Factors: how many times faster than the released procedure. "
        "Agreement: smallest PSNR against RK45 at 1e-7 in float64. "
        f"s predicted: for a GPU with {gpu.tflops:g} TFLOP/s in bfloat16 and {gpu.terabytes:g} TB/s; compiled, as if "
        "all but products cost nothing." + (f" Compiling took {compiling:.0f} s." if compiled else "")
    )
    factors = [f"x released{kind}" for kind in scales]
    rates = ("s", "LR images/s", "LR MP/s", "peak GB")
    header = ("", "evaluations", *rates, *factors, "agreement dB", "s predicted for a GPU")
    return Table(f"Against the released procedure, {width} x {height}{name}", about, header, rows)


def _rates(timing: Timing, hr: Tensor, images: int) -> tuple[str, ...]:
    rate = images / timing.median
    megapixels = rate * hr[0, 0].numel() / 1e6
    return f"{timing.median:.3g}", f"{rate:.3g}", f"{megapixels:.3g}", f"{timing.peak / 1e9:.2f}"


def compiled_copy(degrader: Degrader, hr: Tensor, precision: str = "float32") -> Degrader:
    """A copy, compiled for this size."""
    copied = copy.deepcopy(degrader)
    copied.compile(dynamic=False)
    copied(hr, torch.full((len(hr), 1), degrader.high), precision=precision)
    return copied


def roofline(
    degrader: Degrader, hr: Tensor, repeats: int, side: int = 2048, compiled: bool = False, precision: str = "float32"
) -> Table:
    """FLOP/s of encoding, flow and decoding, divided by those of large matrix products in the same precision.

    On a GPU they are larger, and many: one product of 2048 x 2048 takes less time than its launch.
    """
    side, products = (4 * side, 20) if hr.device.type == "cuda" else (side, 1)
    scale = torch.full((len(hr), 1), degrader.high)
    matrix = torch.randn(side, side, device=hr.device, dtype=PRECISIONS[precision])
    models = {"degflow": degrader} | ({"degflow, compiled": compiled_copy(degrader, hr, precision)} if compiled else {})

    def product(n: int) -> Tensor:
        with computing(precision, hr.device.type):
            made = matrix
            for _ in range(products):
                made = matrix @ matrix
            return made

    ways = {"product": product}
    ways |= {way: lambda n, model=model: model(hr, scale, precision=precision) for way, model in models.items()}
    for once in ways.values():
        once(0)
    timings = alternate(ways, repeats, hr.device.type)
    with pixel_by_pixel(degrader.autoencoder.decoder):
        work = flop(lambda n: degrader(hr, scale))
    rows, alone, most = [], timings["product"], products * 2 * side**3
    for way in models:
        rates = (work / timings[way].median, most / alone.median)
        share = timings[way].faster_than(alone) * work / most
        rows.append((way, f"{work / 1e9:.0f}", *(f"{rate / 1e9:.0f}" for rate in rates), f"{share:.0%}"))
    about = (
        f"One image of {hr.shape[-1]} x {hr.shape[-2]} pixels to the largest scale, {precision}; the product is "
        f"{side} x {side}. Attention and the optics are not counted."
    )
    return Table("Roofline", about, ("", "GFLOP", "GFLOP/s", "of a product", "share"), rows)


_LARGE = """
import sys, time, torch
from degflow.benchmarking.measure import forget_peak, peak
from degflow.degrader import Degrader
model, height, width, memory, threads = sys.argv[1], *map(float, sys.argv[2:])
torch.set_num_threads(int(threads))
degrader = Degrader.load(model)
hr = torch.rand(1, 3, int(height), int(width)) * 2 - 1
scale = torch.tensor([[degrader.high]])
degrader(hr[..., :64, :64], scale)
before, begun = forget_peak("cpu"), time.perf_counter()
degrader(hr, scale, memory=memory)
print(time.perf_counter() - begun, peak("cpu") - before, peak("cpu"))
"""


def large(degrader: Degrader, model: str, height: int, width: int, memory: float, threads: int) -> Table:
    """A large image within a memory budget, on the CPU, in its own process."""
    command = [sys.executable, "-c", _LARGE, model, *map(str, (height, width, memory, threads))]
    seconds, above, total = map(float, run_process(command).split())
    _, grid, keep = degrader.plan(height, width, memory)
    allowed = memory + 12e-9 * height * width
    how = f"{grid.rows} x {grid.columns} tiles, skips {'kept' if keep else 'computed twice'}"
    row = (f"{width} x {height}", f"{memory:g}", how, f"{seconds:.0f}", f"{above / 1e9:.2f}", f"{allowed:.2f}")
    about = f"One scale, float32, {threads} CPU threads; peak above the process's memory before, with the LR image."
    header = ("image", "memory GB", "cut into", "s", "peak GB", "allowed GB", "whole process GB")
    return Table("A large image in bounded memory", about, header, [(*row, f"{total / 1e9:.2f}")])
