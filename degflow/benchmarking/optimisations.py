"""The factor that each optimisation should gain, by counting, and the factor that it gains."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from degflow.benchmarking.inference import compiled_copy, evaluations, ours, pixel_by_pixel
from degflow.benchmarking.measure import Table, alternate, flop, run_process
from degflow.benchmarking.plain import plain_decode, plainly, released
from degflow.degrader import Degrader, pad
from degflow.flow import Velocity, integrate
from degflow.models.precision import computing

PRODUCTS = ("conv", "addmm", "mm", "bmm", "linear", "scaled_dot_product")  # in the names of operators with most FLOP
Way = Callable[[int], Any]  # for `alternate`
LARGE_PAGES = "THP_MEM_ALLOC_ENABLE"


@torch.inference_mode()
def optimisations(
    degrader: Degrader,
    hr: Tensor,
    repeats: int,
    count: int = 8,
    compiled: bool = True,
    model: str = "shipped",
    side: int = 1024,
) -> Table:
    """Factors by which the optimisations make degrading faster.

    Args:
        degrader: the model, on the device that is measured.
        hr: "1 3 H W".
        repeats: alternating repeats of each way.
        count: scales of the sweep.
        compiled: measure torch.compile too.
        model: the degrader's file.
        side: of the square image for large pages (only on the CPU of a Linux machine).
    """
    rows = [
        _few_evaluations(degrader, hr, repeats),
        _shared(degrader, hr, repeats, count),
        *_decoding(degrader, hr, repeats),
    ]
    if compiled:
        rows.append(_compiled(degrader, hr, repeats))
    if hr.device.type == "cpu" and sys.platform == "linux":
        rows.append(_large_pages(model, side, repeats))
    about = (
        f"{hr.shape[-1]} x {hr.shape[-2]} pixels, float32, medians of {repeats} alternating repeats. Factors: how many "
        "times faster with the optimisation than without it, everything else unchanged."
    )
    return Table("Optimisations, predicted and achieved", about, ("", "predicted", "by", "achieved"), rows)


def _row(
    what: str, without: Way, optimised: Way, hr: Tensor, repeats: int, predicted: float = 0, by: str = "FLOP"
) -> tuple[str, ...]:
    """Time a way with and without an optimisation; the prediction is, unless given, the ratio of their FLOP."""
    predicted = predicted or flop(without) / flop(optimised)
    timings = alternate({"without": without, "optimised": optimised}, repeats, hr.device.type)
    return what, f"{predicted:.2f}", by, f"{timings['optimised'].faster_than(timings['without']):.2f}"


def _few_evaluations(degrader: Degrader, hr: Tensor, repeats: int) -> tuple[str, ...]:
    """RK45 at 1e-5 through host memory against our solver, both with the plain decoder."""
    scales, (solver, steps) = [(degrader.low + degrader.high) / 2], degrader.flow.solver

    def fixed(velocity: Velocity, begin: Tensor, first: float, times: list[float]) -> tuple[list[Tensor], int]:
        return [integrate(velocity, begin, begin.new_tensor(times), steps=steps, solver=solver)], 0

    theirs = released(degrader, hr, scales).evaluations
    what = f"evaluations: {evaluations(degrader, scales)} in place of RK45's {theirs} at 1e-5"
    ways = lambda _: released(degrader, hr, scales), lambda _: plainly(degrader, hr, scales, fixed)
    return _row(what, *ways, hr, repeats)


def _shared(degrader: Degrader, hr: Tensor, repeats: int, count: int) -> tuple[str, ...]:
    """A call for each scale against one call for all."""
    scales = torch.linspace(degrader.low, degrader.high, count + 1, dtype=torch.float64)[1:].tolist()
    ways = lambda _: [ours(degrader, hr, [scale]) for scale in scales], lambda _: ours(degrader, hr, scales)
    return _row(f"one call for {count} scales", *ways, hr, repeats)


def _decoding(degrader: Degrader, hr: Tensor, repeats: int) -> Iterator[tuple[str, ...]]:
    """The decoder as in the paper, then with its 1x1 convolutions multiplied out, then with its head for n pixels."""
    with computing("float32", hr.device.type):  # as in a degrader's call: without it a GPU's convolutions take TF32
        yield from _decoding_exactly(degrader, hr, repeats)


def _decoding_exactly(degrader: Degrader, hr: Tensor, repeats: int) -> Iterator[tuple[str, ...]]:
    networks, image = degrader.autoencoder, pad(hr, degrader.multiple)
    decoder, (latent, skips) = networks.decoder, networks.encode(image)

    def pixels_apart(repeat: int) -> Tensor:
        with pixel_by_pixel(decoder):
            return networks.decode(latent, skips)

    what = "decoder's 1x1 convolutions multiplied out"
    yield _row(what, lambda _: plain_decode(decoder, latent, skips), pixels_apart, hr, repeats)
    n, fine = decoder.together, torch.randn(1, decoder.head.in_channels, *image.shape[-2:], device=hr.device)
    fine = fine.contiguous(memory_format=torch.channels_last)
    parts = alternate({"all": pixels_apart, "head": lambda _: decoder.head(fine)}, repeats, hr.device.type)
    whole, head = parts["all"].median, parts["head"].median
    predicted = whole / (
        whole - head * (1 - (2 + n) / (3 * n))
    )  # a head for n pixels has 2 + n columns in place of 3 n
    what, by = f"decoder's last convolution for {n} pixels at once", "that convolution's time, wide products"
    yield _row(what, pixels_apart, lambda _: networks.decode(latent, skips), hr, repeats, predicted, by)


def _compiled(degrader: Degrader, hr: Tensor, repeats: int) -> tuple[str, ...]:
    """As it is against torch.compile, which could at best make everything free that is not a product."""
    scales, fast, device = [degrader.high], compiled_copy(degrader, hr), hr.device.type
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")) as profiler:
        ours(degrader, hr, scales)
    kind = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    # On a GPU the list has the operators with their kernels' time, and the kernels once more.
    operators = [event for event in profiler.key_averages() if event.device_type.name == "CPU"]
    spent = {event.key: getattr(event, kind) for event in operators}
    bound = sum(spent.values()) / sum(time for name, time in spent.items() if any(part in name for part in PRODUCTS))
    ways = lambda _: ours(degrader, hr, scales), lambda _: ours(fast, hr, scales)
    return _row("torch.compile", *ways, hr, repeats, bound, "if all but the products cost nothing")


_PAGES = """
import resource, statistics, sys, time
import torch
from degflow import Degrader
model, side, repeats = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(1)
degrader, hr = Degrader.load(model), torch.rand(1, 3, side, side) * 2 - 1
degrader(hr[..., :64, :64], torch.tensor([degrader.high]))
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before, seconds = faults(), []
for _ in range(repeats):
    begun = time.process_time()
    degrader(hr, torch.tensor([degrader.high]))
    seconds.append(time.process_time() - begun)
print(statistics.median(seconds), (faults() - before) / repeats)
fresh, before, begun = torch.empty(2**24), faults(), time.process_time()
fresh.fill_(1)
first, count, begun = time.process_time() - begun, faults() - before, time.process_time()
fresh.fill_(1)
print((first - time.process_time() + begun) / count)
"""


def _large_pages(model: str, side: int, repeats: int) -> tuple[str, ...]:
    """Pages of 4 KiB against pages of 2 MiB, each in its own process on one thread."""
    small, large = (list(_in_a_process(model, side, repeats, **{LARGE_PAGES: asked})) for asked in ("0", "1"))
    (seconds, faults, cost), (fewer_seconds, fewer, _) = small, large
    predicted = seconds / (seconds - (faults - fewer) * cost)
    what = f"pages of 2 MiB for large tensors ({side} x {side}, one thread)"
    by = f"{faults:.0f} page faults of {cost * 1e6:.2f} µs, then {fewer:.0f}"
    return what, f"{predicted:.2f}", by, f"{seconds / fewer_seconds:.2f}"


def _in_a_process(model: str, side: int, repeats: int, **environment: str) -> Iterator[float]:
    command = [sys.executable, "-c", _PAGES, model, str(side), str(repeats)]
    return map(float, run_process(command, **environment).split())
