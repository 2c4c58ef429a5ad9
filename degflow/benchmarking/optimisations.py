"""The factor that each optimisation should gain, by counting, and the factor that it gains."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from degflow.benchmarking.inference import compiled_copy, evaluations, pixel_by_pixel, plain_decode, released
from degflow.benchmarking.measure import Table, alternate, flop
from degflow.degrader import Degrader, pad
from degflow.flow import SOLVER, STEPS

PRODUCTS = ("conv", "addmm", "mm", "bmm", "linear", "scaled_dot_product")  # in the names of operators with most FLOP
LARGE_PAGES = "THP_MEM_ALLOC_ENABLE"


@torch.inference_mode()
def optimisations(
    degrader: Degrader,
    hr: Tensor,
    repeats: int,
    count: int = 8,
    compiled: bool = True,
    model: str = "",
    side: int = 1024,
) -> Table:
    """Factors by which the optimisations make degrading faster.

    Args:
        degrader: the model, on the device that is measured.
        hr: "1 3 H W".
        repeats: alternating repeats of each way.
        count: scales of the sweep.
        compiled: measure torch.compile too.
        model: the degrader's file, empty for the one that ships.
        side: of the square image for large pages (only on the CPU of a Linux machine).
    """
    rows = [
        _few_evaluations(degrader, hr, repeats),
        _shared(degrader, hr, repeats, count),
        _merged(degrader, hr, repeats),
        _head(degrader, hr, repeats),
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


class _Parts:
    """The steps of degrading one image, each by itself; the decoder in both forms."""

    def __init__(self, degrader: Degrader, hr: Tensor):
        self.degrader, self.image = degrader, pad(hr, degrader.multiple).clone()
        self.latent, self.skips = degrader.autoencoder.encode(self.image)
        self.merged = degrader.autoencoder.decoder.merged(self.skips)

    def ways(self) -> dict[str, Callable[[int], Any]]:
        """For `alternate`."""
        networks, decoder = self.degrader.autoencoder, self.degrader.autoencoder.decoder
        time = torch.full((1,), 0.5, device=self.image.device)
        return {
            "encode": lambda n: networks.encode(self.image),
            "evaluate": lambda n: self.degrader.velocity(self.latent, time, self.latent),
            "decode plainly": lambda n: plain_decode(decoder, self.latent, self.skips),
            "merge": lambda n: decoder.merged(self.skips),
            "decode": lambda n: decoder(self.latent, self.merged),
        }

    def seconds(self, repeats: int) -> dict[str, float]:
        """Median of each."""
        ways = self.ways()
        for once in ways.values():
            once(0)
        timings = alternate(ways, repeats, self.image.device.type)
        return {name: timing.median for name, timing in timings.items()}


def _few_evaluations(degrader: Degrader, hr: Tensor, repeats: int) -> tuple[str, ...]:
    """RK45 at 1e-5 through host memory against ours, both with the plain decoder."""
    scale = (degrader.low + degrader.high) / 2
    time = degrader.timeline.time(torch.tensor([[scale]], dtype=torch.float64)).float().to(hr.device)

    def ours(repeat: int) -> Tensor:
        latent, skips = degrader.autoencoder.encode(pad(hr, degrader.multiple))
        latent = degrader.velocity.carry(latent, time, steps=STEPS, solver=SOLVER)[:, 0]
        return plain_decode(degrader.autoencoder.decoder, latent, skips)

    theirs = released(degrader, hr, [scale]).evaluations
    few, parts = evaluations(degrader, [scale]), _Parts(degrader, hr).seconds(repeats)
    rest = parts["encode"] + parts["decode plainly"]
    predicted = (rest + theirs * parts["evaluate"]) / (rest + few * parts["evaluate"])
    timings = alternate({"theirs": lambda n: released(degrader, hr, [scale]), "ours": ours}, repeats, hr.device.type)
    achieved = timings["ours"].faster_than(timings["theirs"])
    return _row(
        f"evaluations: {few} in place of RK45's {theirs} at 1e-5",
        predicted,
        "evaluations, and the parts' times",
        achieved,
    )


def _shared(degrader: Degrader, hr: Tensor, repeats: int, count: int) -> tuple[str, ...]:
    """A call for each scale against one call for all."""
    scales = torch.linspace(degrader.low, degrader.high, count + 1, dtype=torch.float64)[1:]
    parts = _Parts(degrader, hr).seconds(repeats)
    before = parts["encode"] + parts["merge"]
    singles = sum(
        before + parts["decode"] + evaluations(degrader, [scale]) * parts["evaluate"] for scale in scales.tolist()
    )
    together = before + evaluations(degrader, scales.tolist()) * parts["evaluate"] + count * parts["decode"]
    ways = {
        "each": lambda n: [degrader(hr, scale[None, None]) for scale in scales],
        "all": lambda n: degrader(hr, scales[None]),
    }
    timings = alternate(ways, repeats, hr.device.type)
    achieved = timings["all"].faster_than(timings["each"])
    return _row(f"one encoding and flow for {count} scales", singles / together, "the parts' times", achieved)


def _merged(degrader: Degrader, hr: Tensor, repeats: int) -> tuple[str, ...]:
    """The decoder as in the paper against the one with multiplied 1x1 convolutions and merged skips."""
    ways = {name: way for name, way in _Parts(degrader, hr).ways().items() if name.startswith("decode")}
    with pixel_by_pixel(degrader.autoencoder.decoder):
        work = {name: flop(way) for name, way in ways.items()}
        timings = alternate(ways, repeats, hr.device.type)
    achieved = timings["decode"].faster_than(timings["decode plainly"])
    return _row("decoder's 1x1 convolutions multiplied out", work["decode plainly"] / work["decode"], "FLOP", achieved)


def _head(degrader: Degrader, hr: Tensor, repeats: int) -> tuple[str, ...]:
    """The decoder's head for one pixel at a time against n, which need 3 x (2 + n) / 9n of the wide products."""
    parts, decoder = _Parts(degrader, hr), degrader.autoencoder.decoder
    decode, n = parts.ways()["decode"], decoder.together
    fine = torch.randn(1, decoder.head.in_channels, *parts.image.shape[-2:], device=hr.device)
    fine = fine.contiguous(memory_format=torch.channels_last)

    def one_by_one(repeat: int) -> None:
        with pixel_by_pixel(decoder):
            decode(repeat)

    ways = {"several": decode, "one": one_by_one, "head": lambda n: decoder.head(fine)}
    for once in ways.values():
        once(0)
    timings = alternate(ways, repeats, hr.device.type)
    before, head = timings["one"].median, timings["head"].median
    predicted = before / (before - head * (1 - (2 + n) / (3 * n)))
    achieved = timings["several"].faster_than(timings["one"])
    return _row(
        f"decoder's last convolution for {n} pixels at once", predicted, "the head's time, wide products", achieved
    )


def _compiled(degrader: Degrader, hr: Tensor, repeats: int) -> tuple[str, ...]:
    """Without torch.compile against with it; at best, all but the products would cost nothing."""
    scale, fast, device = torch.full((1, 1), degrader.high), compiled_copy(degrader, hr), hr.device.type
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")) as profiler:
        degrader(hr, scale)
    kind = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    spent = {event.key: getattr(event, kind) for event in profiler.key_averages()}
    products = sum(time for name, time in spent.items() if any(part in name for part in PRODUCTS))
    timings = alternate(
        {"plain": lambda n: degrader(hr, scale), "compiled": lambda n: fast(hr, scale)}, repeats, device
    )
    bound = sum(spent.values()) / products
    return _row(
        "torch.compile",
        bound,
        "if all but the products cost nothing",
        timings["compiled"].faster_than(timings["plain"]),
    )


_PAGES = """
import resource, statistics, sys, time
import torch
from degflow import Degrader
model, side, repeats = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(1)
degrader, hr = Degrader.load(model or None), torch.rand(1, 3, side, side) * 2 - 1
degrader(hr[..., :64, :64], torch.tensor([2.0]))
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
    return _row(
        what, predicted, f"{faults:.0f} page faults of {cost * 1e6:.2f} µs, then {fewer:.0f}", seconds / fewer_seconds
    )


def _in_a_process(model: str, side: int, repeats: int, **environment: str) -> Iterator[float]:
    command = [sys.executable, "-c", _PAGES, model, str(side), str(repeats)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    return map(float, done.stdout.split())


def _row(what: str, predicted: float, by: str, achieved: float) -> tuple[str, ...]:
    return what, f"{predicted:.2f}", by, f"{achieved:.2f}"
