"""The first hour on a GPU: what was predicted for it, beside what it does.

Without a GPU everything runs too, at small sizes: predictions stay predictions for a GPU, and times are the CPU's.
"""

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from degflow import images
from degflow.benchmarking.inference import decibels, expected
from degflow.benchmarking.measure import Table, alternate
from degflow.benchmarking.predict import GPU, REST, SHARES, Kernel, kernels, total
from degflow.capture.optics import Optics
from degflow.degrader import Degrader
from degflow.models import (
    AutoencoderConfig,
    ResidualAutoencoder,
    ResidualConfig,
    ResidualFlow,
    ResidualNetwork,
    Spread,
)
from degflow.models import precision as policy
from degflow.models.precision import PRECISIONS
from degflow.synthesis.window import is_out_of_memory, usual_memory

SCALE = 3.0
ON_CPU = 1024  # largest side of an image that is measured there
PRODUCTS = {torch.conv2d, torch.nn.functional.conv2d, torch.nn.functional.linear, torch.matmul, torch.einsum}


def full_size() -> Degrader:
    """The size of realsr_rae and realsr_residual, with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        autoencoder = ResidualAutoencoder(AutoencoderConfig(latent_channels=32, gate_init=0.5))
        network = ResidualNetwork(ResidualConfig(latent_channels=32, width=256, blocks=12))
    levels = {"1": 1.0, "2": 2.1, "4": 3.75}
    spread = Spread(32, (0.0, 1.0))
    return Degrader(autoencoder, ResidualFlow(Optics(tuple(levels.values())), spread, network, 8), levels)


def counted(degrader: Degrader, side: int) -> list[Kernel]:
    """The kernels of one LR image of this side, in one piece."""
    shadow = copy.deepcopy(degrader).to("meta")
    autoencoder, network = shadow.autoencoder, shadow.flow.network
    parts = {
        "encoder": [(autoencoder.encoder, "forward")],
        "flow's network": [(network, "forward")],
        "decoder": [(autoencoder.decoder, "merged"), (autoencoder.decoder, "forward")],
    }
    hr = torch.empty(1, 3, side, side, device="meta")
    return kernels(lambda: shadow(hr, _scale(degrader), memory=float("inf")), parts)


def predicted(degrader: Degrader, side: int, gpu: GPU, precision: str, name: str) -> Table:
    """What each part of one LR image should take on a GPU, and what limits it."""
    found, rows = counted(degrader, side), []
    for part in [*dict.fromkeys(kernel.part for kernel in found if kernel.part != REST), REST, "all"]:
        own = [kernel for kernel in found if part in ("all", kernel.part)]
        flop, seconds = sum(kernel.flop for kernel in own), total(own, gpu, precision)
        fused = total(own, gpu, precision, fused=True)
        ideal = flop / (1e12 * gpu.tflops * SHARES[precision])
        moved = sum(kernel.read + kernel.written for kernel in own)
        texts = (
            f"{flop / 1e9:.4g}",
            f"{moved / 1e9:.3g}",
            str(len(own)),
            *(f"{1e3 * x:.3g}" for x in (seconds, fused)),
        )
        rows.append((part, *texts, f"{ideal / seconds:.0%}", f"{ideal / fused:.0%}" if fused else "–"))
    about = (
        f"**Predicted, not measured**: {side} x {side} pixels in {precision}, for a GPU with {gpu.tflops:g} TFLOP/s in "
        f"bfloat16 and {gpu.terabytes:g} TB/s. Each kernel takes the longest of computing, memory and launch. GB are "
        "those of float32. If fused: all kernels but products cost nothing. Shares are of the GPU's FLOP/s."
    )
    header = ("part", "GFLOP", "GB", "kernels", "ms", "ms if fused", "share", "share if fused")
    return Table(f"Predicted for a GPU, {name}", about, header, rows)


def by_size(
    models: Mapping[str, Degrader],
    measured: Sequence[str],
    sides: Sequence[int],
    gpu: GPU,
    precision: str,
    repeats: int,
    device: str,
) -> Table:
    """One LR image of each size by each model: predicted, and measured where the name is in `measured`.

    On a CPU, images larger than `ON_CPU` are not measured: they take minutes. An image that does not fit the device's
    memory, even in tiles, is named as such, and the others go on.
    """
    rows, memory = [], usual_memory(torch.device(device))
    for name, degrader in models.items():
        for side in sides:
            found = counted(degrader, side)
            work = f"{sum(kernel.flop for kernel in found) / 1e12:.3g}"
            expected = (total(found, gpu, precision, fused) for fused in (False, True))
            row = (name, f"{side} x {side}", work, str(len(found)), *(f"{seconds:.3g}" for seconds in expected))
            if name in measured and (device != "cpu" or side <= ON_CPU):
                rows.append((*row, *_timed(degrader, side, memory, precision, repeats, device)))
            else:
                rows.append((*row, "–", "–", "–"))
    about = (
        f"One LR image at x{SCALE:g}, or at the model's largest scale, in {precision}, with {memory:.0f} GB for a "
        f"forward pass on {device}, medians of {repeats} repeats. s predicted: for the GPU of {gpu.tflops:g} TFLOP/s, "
        "without tiles."
    )
    header = ("model", "image", "TFLOP", "kernels", "s predicted", "s if fused", "s measured", "images/s", "peak GB")
    return Table("Images by size, predicted and measured", about, header, rows)


def _timed(
    degrader: Degrader, side: int, memory: float, precision: str, repeats: int, device: str
) -> tuple[str, str, str]:
    hr = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    try:
        degrader.plan(side, side, memory)
    except ValueError as error:
        print(f"{side} x {side}: {error}", flush=True)
        return "does not fit", "–", "–"
    try:
        degrader, hr = degrader.to(device), hr.to(device)
        degrader(hr, _scale(degrader), memory=memory, precision=precision)
        ways = {"LR": lambda _: degrader(hr, _scale(degrader), memory=memory, precision=precision)}
        timing = alternate(ways, repeats, device)["LR"]
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"{side} x {side}: {error}", flush=True)
        return "does not fit", "–", "–"
    return f"{timing.median:.3g}", f"{1 / timing.median:.3g}", f"{timing.peak / 1e9:.2f}"


def precisions(degrader: Degrader, hr: Tensor, repeats: int, gpu: GPU) -> Table:
    """Time and error of each precision; on a CPU, which has no TF32, its rounding is emulated, and its time is not.

    Args:
        degrader: the model, on the device that is measured.
        hr: "1 3 H W".
        repeats: of each precision, in turn.
        gpu: that the prediction is for.
    """
    device, scale = hr.device.type, _scale(degrader).tolist()
    ways: dict[str, Callable[[int], Tensor]] = {
        precision: lambda _, precision=precision: degrader(hr, _scale(degrader), precision=precision)
        for precision in PRECISIONS
    }
    if device == "cpu":
        exact = ways["tf32"]

        def emulated(repeat: int) -> Tensor:
            with _RoundedToTF32():
                return exact(repeat)

        ways["tf32"] = emulated
    for way in ways.values():
        way(0)
    timings, rows = alternate(ways, repeats, device), []
    reference = timings["float32"].result
    for precision, timing in timings.items():
        changed = float((images.to_pixels(timing.result) != images.to_pixels(reference)).mean())
        known = not (device == "cpu" and precision == "tf32")
        speed = (f"{timing.median:.3f}", f"{timing.faster_than(timings['float32']):.2f}") if known else ("–", "–")
        same = precision == "float32"
        error = "–" if same else f"{decibels(timing.result, reference)[0]:.1f}"
        seconds = f"{expected(degrader, hr, scale, gpu, precision):.3g}"
        rows.append((precision + ("" if known else ", emulated"), *speed, error, f"{changed:.2%}", seconds))
    about = (
        f"{hr.shape[-1]} x {hr.shape[-2]} pixels at x{float(_scale(degrader)):g} on {device}, medians of {repeats} "
        "alternating repeats. PSNR against float32, and the share of 8-bit values that differ from float32's. s "
        f"predicted: for a GPU with {gpu.tflops:g} TFLOP/s in bfloat16 and {gpu.terabytes:g} TB/s."
    )
    header = ("", "s", "times as fast as float32", "PSNR dB", "values changed", "s predicted for a GPU")
    return Table("Precision", about, header, rows)


class _RoundedToTF32(TorchFunctionMode):
    """Rounds the factors of products to TF32's 10 bits of mantissa, where the policy of precision allows TF32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS and policy._TF32.on():
            args = tuple(_rounded(value) for value in args)
            kwargs = {name: _rounded(value) for name, value in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


def _rounded(value: Any) -> Any:
    """A float32 tensor of at least two axes, with 10 bits of mantissa, to the nearest; anything else unchanged."""
    if not isinstance(value, Tensor) or value.dtype != torch.float32 or value.ndim < 2:
        return value
    return ((value.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def device_tests(device: str, some: str = "") -> Iterator[Table]:
    """Run the tests of numerics on this device; `some`: only those with this word in their names.

    Raises:
        RuntimeError: after the table, if a test failed, or none could run.
    """
    file = Path(__file__).parents[2] / "tests/test_numerics.py"
    if not file.exists():
        raise RuntimeError(f"no {file.name}: the package is installed without its tests; run from a clone")
    command = [sys.executable, "-m", "pytest", "-q", f"--device={device}", "-k", some, str(file)]
    done = subprocess.run(command, cwd=file.parents[1], capture_output=True, text=True)
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    about = "The tests that compare a device's numbers with float64 on the CPU."
    rows = [(file.name, text) for text in (*failed, lines[-1])]
    yield Table("Tests on this device", about, ("tests", "result"), rows)
    if done.returncode:
        raise RuntimeError(f"{file.name}: {lines[-1]}")


def _scale(degrader: Degrader) -> Tensor:
    return torch.tensor([min(SCALE, degrader.high)], dtype=torch.float64)
