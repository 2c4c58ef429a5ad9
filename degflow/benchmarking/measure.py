"""Times, peaks of memory, and tables."""

import ctypes
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode


class Table(NamedTuple):
    """A Markdown table with a title, and a text that says what was measured."""

    title: str
    about: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def markdown(self) -> str:
        """The title, the text and the table."""
        lines = [f"## {self.title}", "", self.about, "", _row(self.header), "|---" * len(self.header) + "|"]
        return "\n".join(lines + [_row(row) for row in self.rows])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


class Timing(NamedTuple):
    """The seconds of each repeat, the largest peak of memory in bytes (NaN: unknown), and the last result."""

    seconds: list[float]
    peak: float
    result: Any

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)

    def faster_than(self, other: "Timing") -> float:
        """The other's time divided by this one's, median over the repeats."""
        return statistics.median(b / a for a, b in zip(self.seconds, other.seconds, strict=True))


def alternate(ways: Mapping[str, Callable[[int], Any]], repeats: int, device: str = "cpu") -> dict[str, Timing]:
    """Time each way `repeats` times, in turn; a way is called with the number of the repeat."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    peaks, results = dict.fromkeys(ways, 0.0), dict[str, Any]()
    for repeat in range(repeats):
        for name, way in ways.items():
            before = forget_peak(device)
            begun = time.perf_counter()
            results[name] = way(repeat)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - begun)
            peaks[name] = max(peaks[name], peak(device) - before)
    return {name: Timing(seconds[name], peaks[name], results[name]) for name in ways}


def run_process(command: Sequence[str], **environment: str) -> str:
    """What another process prints; it joins no Ray, not even one that `ray start` left an address of on this machine.

    Raises:
        RuntimeError: it failed; the message ends with what it said last.
    """
    alone = os.environ | {"RAY_ADDRESS": "local"} | environment
    done = subprocess.run(command, env=alone, capture_output=True, text=True)
    if done.returncode:
        what = " ".join(command[1:]).partition("\n")[0][:80]
        raise RuntimeError(f"{what} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def flop(way: Callable[[int], object]) -> int:
    """Floating-point operations of the products and convolutions of one call, its backward passes included."""
    with FlopCounterMode(display=False) as counter:
        way(0)
    return counter.get_total_flops()


def forget_peak(device: str) -> float:
    """Return free memory to the system, reset the peak, and return the bytes in use (NaN: unknown)."""
    if device == "cuda":
        torch.cuda.synchronize()  # what still runs would count as the next way's
        torch.cuda.reset_peak_memory_stats()
        return float(torch.cuda.memory_allocated())
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):  # not Linux, not glibc, or not allowed
        return float("nan")
    return peak(device)


def peak(device: str) -> float:
    """The largest number of bytes in use since `forget_peak`."""
    if device == "cuda":
        return float(torch.cuda.max_memory_allocated())
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return 1024.0 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def machine(device: str) -> str:
    """One line: the processor, its cores and threads used, the accelerator, versions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    gpu = f", {_gpu()}" if device == "cuda" else ", no GPU"
    load = f"load {os.getloadavg()[0]:.1f} at the start"
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads{gpu}; torch {torch.__version__}; {load}"


def _gpu() -> str:
    """The GPU, its driver, and the libraries that PyTorch was built with."""
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    libraries = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    return f"{torch.cuda.get_device_name()} (driver {driver}, {libraries})"
