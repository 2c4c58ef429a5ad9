"""benchmark: the parts one after the other, into one file of tables."""

import copy
import gc
import importlib.util
import json
import math
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from degflow import __version__, images
from degflow.benchmarking import gpu, inference, node, pipeline, scale
from degflow.benchmarking.measure import Table, machine
from degflow.benchmarking.optimisations import optimisations
from degflow.benchmarking.predict import GPU
from degflow.benchmarking.steps import optimised, training, trainings
from degflow.config import Unfinished, option, plain
from degflow.degrader import Degrader
from degflow.flow import PathFlow
from degflow.models import AutoencoderConfig, ResidualAutoencoder, VelocityNetwork
from degflow.models.precision import PRECISIONS, device_of
from degflow.perceptual import Perceptual
from degflow.restoration.networks import NetworkConfig, SwinIRConfig
from degflow.storage import Place
from degflow.synthesis.cluster import NoCompiler, check_compiler, cpus
from degflow.synthesis.window import is_out_of_memory

FULL_WIDTH = ", published networks at full width, RANDOM weights (no trained ones are here)"
SWEEP = 30  # scales
FILE = "benchmark.md"
_TABLES = 2  # which tables and columns there are: parts that were saved with others are made again
# Of each part on a GPU, assumed: none has run on one.
MINUTES = {"tests": 5, "precisions": 2, "images": 6, "training": 8, "comparison": 8, "roofline": 2, "optimisations": 4}
MINUTES |= {"job": 5, "actors": 4, "codecs": 2, "node": 5, "accuracy": 6, "scale": 3, "large": 8, "margins": 2}
PARTS = (
    *("accuracy", "comparison", "roofline", "optimisations", "large", "margins", "training", "job", "actors"),
    *("codecs", "node", "scale", "precisions", "images", "tests"),
)


@dataclass(frozen=True)
class BenchmarkConfig:
    """Keys of benchmark."""

    output: str = option("runs/benchmark", "folder or URI for benchmark.md", common=True)
    input: str = option("examples/photographs", "folder or URI with photographs to cut the test images from")
    model: str = option("shipped", "degrader file; shipped: the one that comes with degflow", common=True)
    parts: tuple[str, ...] = option(PARTS, "which tables to make", common=True)
    sizes: tuple[int, ...] = option((256,), "sides of the square images of the comparison (full width: 64)")
    sides: tuple[int, ...] = option((256, 1000), "sides of the square images of part images")
    repeats: int = option(3, "alternating repeats of everything timed", common=True)
    precision: str = option("float32", f"of comparison, roofline, training, images: {', '.join(PRECISIONS)}")
    compile: bool = option(True, "measure with torch.compile as well")
    full_width: bool = option(
        True, "accuracy and comparison also of the published networks at full width, with random weights"
    )
    device_seconds: float = option(
        0.17, "seconds that a GPU takes for a photograph of 12 megapixels with 4 draws, for the model of a node"
    )
    tflops: float = option(798.0, "of the GPU that predictions are for: 1e12 FLOP/s of large products in bfloat16")
    terabytes: float = option(3.0, "of the GPU that predictions are for: 1e12 bytes/s of its memory")
    threads: int = option(0, "CPU threads; 0: all cores", common=True)
    device: str = option("auto", "cpu, cuda, or auto: cuda where there is one")
    minutes: float = option(
        0.0, "skip a part that should take longer than what is left of these minutes, by an assumption; 0: no limit"
    )
    quick: bool = option(False, "tiny sizes and one repeat, to see that everything runs", common=True)

    def __post_init__(self):
        rules = (
            ("parts", set(self.parts) <= set(PARTS) and self.parts, f"must be some of {', '.join(PARTS)}"),
            ("sizes", self.sizes and min(self.sizes) >= 8, "must be at least one side, each at least 8"),
            ("sides", self.sides and min(self.sides) >= 8, "must be at least one side, each at least 8"),
            ("repeats", self.repeats >= 1, "must be at least 1"),
            ("precision", self.precision in PRECISIONS, f"must be one of {', '.join(PRECISIONS)}"),
            ("device_seconds", self.device_seconds > 0, "must be above 0"),
            ("tflops", self.tflops > 0, "must be above 0"),
            ("terabytes", self.terabytes > 0, "must be above 0"),
            ("minutes", self.minutes >= 0, "must not be negative"),
            ("threads", self.threads >= 0, "must not be negative"),
            ("device", self.device in ("auto", "cpu", "cuda"), "must be auto, cpu or cuda"),
        )
        for name, kept, rule in rules:
            if not kept:
                raise ValueError(f"{name}={getattr(self, name)}: {rule}")


def benchmark(config: BenchmarkConfig) -> None:
    """Make the tables, print each as it is done, and save them all.

    A part that is finished is saved in `parts/`, and a later run takes it from there, if the keys that this part reads
    are the same. If a part fails or runs out of memory, its error follows its tables. The others are still made, and
    the next run makes one that failed last. A part that `minutes` leave no time for is named too, and left to the next
    run. `benchmark.md` has every part that is saved, also those that earlier runs made of the same model on the same
    machine.

    Raises:
        ValueError: no image in the input, no such device, or parts that the model has no solver for.
        Unfinished: at the end, parts that failed.
    """
    if config.quick:
        config = replace(config, sizes=(64,), sides=(64,), repeats=1, compile=False, full_width=False)
    if config.threads:
        torch.set_num_threads(config.threads)
    device = device_of(config.device)
    if config.compile:
        try:
            check_compiler(device)
        except NoCompiler:
            print("torch.compile is left out: it needs a C++ compiler (cpu: CXX or g++; cuda: CC, gcc or clang)")
            config = replace(config, compile=False)
    degrader = Degrader.load(config.model, device)
    if not degrader.has_solver and (wrong := {"accuracy", "comparison", "optimisations"} & set(config.parts)):
        raise ValueError(f"parts: {', '.join(sorted(wrong))} compare solvers, and model={config.model} has none")
    saved, begun = _Saved(Place(config.output), degrader, device), time.monotonic()
    failed, title = list[str](), f"# Speed\n\n{machine(device)}"
    bench = _Bench(config, degrader, photographs(config.input), device)
    print(title)
    for part in sorted(config.parts, key=saved.failed):
        left = config.minutes - (time.monotonic() - begun) / 60
        if config.minutes and not saved.holds(part, config) and left < MINUTES[part]:
            _skip(part, left, config.minutes, saved)
        elif not _make(bench, part, saved):
            failed.append(part)
        saved.write(title)
        _free(device)
    if failed:
        raise Unfinished(f"parts that failed: {', '.join(failed)}; all others are in {saved.place.uri_of(FILE)}")


def _make(bench: "_Bench", part: str, saved: "_Saved") -> bool:
    """Measure a part, unless it is saved; returns whether it did not fail."""
    if saved.holds(part, bench.config):
        where = saved.place.uri_of(saved.name(part))
        print(f"\n{part}: measured before; to measure again, delete {where}", flush=True)
        return True
    bench.keys.clear()
    bench.whole = True
    texts, fits = [], True
    try:
        for table in getattr(bench, part)():
            texts.append(table.markdown())
            print(f"\n{texts[-1]}", flush=True)
    except Exception as error:  # the other parts are still measured
        fits = not is_out_of_memory(error)
        texts.append(f"## {part}: {'failed' if fits else 'does not fit'}\n\n{type(error).__name__}: {error}")
        print(f"\n{texts[-1]}", flush=True)
        saved.now[part] = texts
        if fits:
            traceback.print_exc()
            saved.fail(part)
        return not fits
    if bench.whole:
        saved.keep(part, texts, {key: plain(bench.config)[key] for key in sorted(bench.keys)})
    else:
        saved.now[part] = texts
    return True


def _skip(part: str, left: float, minutes: float, saved: "_Saved") -> None:
    """Say that no time is left for a part; what an earlier run measured of it stays in the file."""
    text = f"it should take {MINUTES[part]} minutes, and {max(0.0, left):.0f} of minutes={minutes:g} are left"
    how = "The same command makes it" if MINUTES[part] <= minutes else f"It needs minutes={MINUTES[part]}, or 0"
    print(f"\n{part}: skipped: {text}. {how}", flush=True)
    earlier = saved.parts.get(part, {}).get("tables", [])
    but = " The tables above it are of an earlier run with other keys." if earlier else ""
    saved.now[part] = [*earlier, f"## {part}: skipped\n\nNo time: {text}. {how}.{but}"]


class _Saved:
    """The parts that were measured, one JSON file each: the tables, and the keys that they were made with."""

    def __init__(self, place: Place, degrader: Degrader, device: str):
        self.place = place
        about = {"machine": machine(device).rpartition("; load")[0], "version": __version__, "tables": _TABLES}
        self.about = about | {"model_sha256": degrader.sha256}
        found = {part: json.loads(place.read(self.name(part))) for part in PARTS if place.exists(self.name(part))}
        self.parts = {part: one for part, one in found.items() if one.get("about") == self.about}
        self.now: dict[str, list[str]] = {}  # of parts that fail or do not fit, for benchmark.md alone

    def name(self, part: str) -> str:
        """Of the part's file."""
        return f"parts/{part}.json"

    def failed(self, part: str) -> bool:
        """Whether the last run that made it failed."""
        return self.place.exists(f"parts/{part}.failed")

    def holds(self, part: str, config: BenchmarkConfig) -> bool:
        """Whether it was measured with these keys."""
        keys = self.parts.get(part, {}).get("keys")
        return keys is not None and keys == json.loads(json.dumps({key: plain(config)[key] for key in keys}))

    def fail(self, part: str) -> None:
        """Note that a part failed; what an earlier run measured stays."""
        self.place.write(f"parts/{part}.failed", b"")

    def keep(self, part: str, tables: list[str], keys: dict[str, Any]) -> None:
        """Save a part that was measured with these keys."""
        self.place.delete(f"parts/{part}.failed")
        self.parts[part] = {"about": self.about, "keys": keys, "tables": tables}
        self.place.write(self.name(part), json.dumps(self.parts[part], indent=1).encode())

    def write(self, title: str) -> None:
        """Write benchmark.md."""
        tables = [table for part in PARTS for table in self.now.get(part) or self.parts.get(part, {}).get("tables", [])]
        self.place.write(FILE, ("\n\n".join([title, *tables]) + "\n").encode())


def _free(device: str) -> None:
    """Give a GPU's memory back, which the next part may need in another process.

    Raises:
        Unfinished: the last part failed in a way after which this process cannot use its GPU any more.
    """
    if device != "cuda":
        return
    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        text = "after this failure the process cannot use its GPU; the same command goes on, with this part last"
        raise Unfinished(text) from None


def photographs(uri: str) -> list[np.ndarray]:
    """Decoded images of a folder, uint8 "H W 3", by name."""
    place = Place(uri)
    keys = sorted(file.key for file in place.files() if file.key.lower().endswith(images.SUFFIXES))
    if not keys:
        raise ValueError(f"input={uri}: no images there")
    return [images.decode(place.read(key)) for key in keys]


def cut(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle of a photograph, which is enlarged first if it is smaller."""
    factor = max(1.0, height / pixels.shape[0], width / pixels.shape[1])
    if factor > 1:
        pixels = images.resize(pixels, *(math.ceil(side * factor) for side in pixels.shape[:2]))
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return np.ascontiguousarray(pixels[top : top + height, left : left + width])


class _Bench:
    """One method per part; `quick` chooses each part's sizes."""

    def __init__(self, config: BenchmarkConfig, degrader: Degrader, photos: list[np.ndarray], device: str):
        self.config, self.degrader, self._photos, self.device = config, degrader, photos, device
        self.keys: set[str] = set()  # that were read
        self.whole = True  # no table was left out because it does not fit

    def __getattr__(self, name: str) -> Any:
        """A key's value, which is noted as read."""
        if name not in {field.name for field in fields(BenchmarkConfig)}:
            raise AttributeError(name)
        self.keys.add(name)
        return getattr(self.config, name)

    @property
    def photos(self) -> list[np.ndarray]:
        """Of the input."""
        self.keys.add("input")
        return self._photos

    def accuracy(self) -> Iterator[Table]:
        side, count = (64, 3) if self.quick else (96, 5)
        yield inference.accuracy(self.degrader, self._crops(side)[: 1 if self.quick else None], count)
        if self.full_width:
            yield inference.accuracy(self._full_width(), self._crops(64)[:1], 3, FULL_WIDTH)

    def comparison(self) -> Iterator[Table]:
        for side in self.sizes:
            yield self._compared(self.degrader, side, self.compile)
        if self.full_width:
            yield self._compared(self._full_width(), 64, False, FULL_WIDTH)

    def _compared(self, degrader: Degrader, side: int, compiled: bool, name: str = "") -> Table:
        count, hr = 3 if self.quick else SWEEP, self._crops(side)[0]
        how = (self.repeats, self._gpu, count, compiled, self.precision, name)
        return inference.comparison(degrader, hr, *how)

    def roofline(self) -> Iterator[Table]:
        hr, side = self._crops(max(self.sizes))[0], 256 if self.quick else 2048
        yield inference.roofline(self.degrader, hr, self.repeats, side, self.compile, self.precision)

    def optimisations(self) -> Iterator[Table]:
        hr, side = self._crops(max(self.sizes))[0], 128 if self.quick else 1024
        compiled, model = self.compile, self.model
        yield optimisations(self.degrader, hr, self.repeats, compiled=compiled, model=model, side=side)

    def large(self) -> Iterator[Table]:
        width, height, memory = (640, 480, 0.3) if self.quick else (4000, 3000, 2.0)
        yield inference.large(self.degrader, self.model, height, width, memory, torch.get_num_threads())

    def margins(self) -> Iterator[Table]:
        crop, widths = (32, (0, 16)) if self.quick else (128, (0, 8, 16, 32, 64, 96))
        widths = [-(-width // self.degrader.multiple) * self.degrader.multiple for width in widths]
        photos = [images.to_tensor(photo, self.device)[None] for photo in self.photos]
        scales = (2.0, min(4.0, self.degrader.high))
        yield inference.margins(self.degrader, photos, crop, widths, scales)

    def training(self) -> Iterator[Table]:
        try:
            perceptual = None if self.quick else Perceptual("vgg").to(self.device)
        except Exception as error:  # no weights here, and no network to fetch them: whatever the download raises
            print(f"\nLPIPS is left out of stage 2: {error}")
            perceptual = None
        crop, batch = (32, 2) if self.quick else (64, 8)
        network = None
        if importlib.util.find_spec("spandrel"):
            network = NetworkConfig(swinir=SwinIRConfig(12, (2,), 2) if self.quick else SwinIRConfig())
        else:
            print("\nSwinIR is left out: it needs spandrel: pip install 'degflow[sr]'")
        how = (network, self._gpu, self.precision, self.repeats)
        yield training(self.degrader, perceptual, *how, crop, batch)
        yield optimised(self.degrader, self.precision, self.repeats, self.compile, crop, batch)
        if not self.quick:
            yield trainings(gpu.full_size(), self._gpu)
        if self.full_width and self.device == "cuda":
            large = lambda: training(gpu.full_size().to(self.device), perceptual, *how, 256, 16)  # noqa: E731
            yield self._fitting("Training steps, full size", large)

    def _fitting(self, title: str, make: Callable[[], Table]) -> Table:
        """A table that is made, or one that says that it does not fit: the part's other tables are not lost."""
        try:
            return make()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self.whole = False
            return Table(title, f"Does not fit: {error}".partition("\n")[0], ("",), [])

    def precisions(self) -> Iterator[Table]:
        yield gpu.precisions(self.degrader, self._crops(max(self.sizes))[0], self.repeats, self._gpu)

    def images(self) -> Iterator[Table]:
        models, measured = {"ships": self.degrader, "full size": gpu.full_size()}, ["ships"]
        if self.full_width and self.device == "cuda":  # minutes for each image on a CPU
            measured.append("full size")
        side = 64 if self.quick else 1000
        for name, degrader in models.items():
            yield gpu.predicted(degrader, side, self._gpu, self.precision, name)
        sides, precision = self.sides, self.precision
        yield gpu.by_size(models, measured, sides, self._gpu, precision, self.repeats, self.device)

    def tests(self) -> Iterator[Table]:
        yield from gpu.device_tests(self.device, "noise" if self.quick else "")

    def job(self) -> Iterator[Table]:
        side = min(self.sizes)
        photos = [cut(photo, side, side) for photo in self.photos] * (1 if self.quick else 32)
        threads = min(torch.get_num_threads(), cpus())
        yield pipeline.job(self.degrader, self.model, photos, min(2, self.repeats), threads)

    def actors(self) -> Iterator[Table]:
        pools, seconds, count = [(2, 2)], 0.02, 2
        if not self.quick:
            pools, seconds, count = [(1, 1), (4, 4), (16, 16), (16, 2000)], 0.2, 100
        yield pipeline.actors(pools, seconds, count)

    def codecs(self) -> Iterator[Table]:
        scales, photos = ([2.0], self.photos[:1]) if self.quick else ([1.9, 3.4], self.photos)
        lrs = [np.asarray(lr) for photo in photos for lr in self.degrader.degrade(photo, scales)]
        yield pipeline.codecs(lrs, self.repeats)

    def node(self) -> Iterator[Table]:
        (height, width), count = ((120, 160), 3) if self.quick else ((3000, 4000), 10)
        photo = cut(self.photos[0], height, width)
        yield from node.node(photo, self.device_seconds, self.repeats, count)

    def scale(self) -> Iterator[Table]:
        keys, shards = (1000, 20) if self.quick else (1_000_000, 2000)
        yield scale.planning(keys)
        yield scale.recognising(copy.deepcopy(self.degrader).to("cpu"), self.output, shards)

    @property
    def _gpu(self) -> GPU:
        return GPU(self.tflops, self.terabytes)

    def _crops(self, side: int) -> list[torch.Tensor]:
        return [images.to_tensor(cut(photo, side, side), self.device)[None] for photo in self.photos]

    def _full_width(self) -> Degrader:
        torch.manual_seed(0)
        autoencoder = ResidualAutoencoder(AutoencoderConfig(gate_init=0.5))
        return Degrader(autoencoder, PathFlow(VelocityNetwork()), self.degrader.levels).to(self.device)
