"""benchmark: the parts one after the other, into one file of tables."""

import copy
import gc
import importlib.util
import json
import math
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from degflow import __version__, images
from degflow.benchmarking import gpu, inference, node, pipeline, scale
from degflow.benchmarking.measure import Table, machine
from degflow.benchmarking.optimisations import optimisations
from degflow.benchmarking.predict import GPU
from degflow.benchmarking.steps import training, trainings
from degflow.config import Unfinished, option, plain
from degflow.degrader import Degrader
from degflow.flow import PathFlow
from degflow.models import AutoencoderConfig, ResidualAutoencoder, VelocityNetwork
from degflow.models.precision import PRECISIONS
from degflow.perceptual import Perceptual
from degflow.restoration.networks import NetworkConfig, SwinIRConfig
from degflow.storage import Place
from degflow.synthesis.window import is_out_of_memory

FULL_WIDTH = ", published networks at full width, RANDOM weights (no trained ones are here)"
SWEEP = 30  # scales
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
            ("threads", self.threads >= 0, "must not be negative"),
            ("device", self.device in ("auto", "cpu", "cuda"), "must be auto, cpu or cuda"),
        )
        for name, kept, rule in rules:
            if not kept:
                raise ValueError(f"{name}={getattr(self, name)}: {rule}")


def benchmark(config: BenchmarkConfig) -> None:
    """Make the tables, print each as it is done, and save them all.

    A part that is finished is saved in `parts/`, and a later run with the same settings takes it from there. A part
    that fails, or that the device has too little memory for, says so after its tables. The others are still made.

    Raises:
        ValueError: no image in the input, or parts that the model has no solver for.
        Unfinished: at the end, parts that failed.
    """
    if config.quick:
        config = replace(config, sizes=(64,), sides=(64,), repeats=1, compile=False, full_width=False)
    if config.threads:
        torch.set_num_threads(config.threads)
    device = config.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    degrader = Degrader.load(config.model, device)
    if not degrader.has_solver and (wrong := {"accuracy", "comparison", "optimisations"} & set(config.parts)):
        raise ValueError(f"parts: {', '.join(sorted(wrong))} compare solvers, and model={config.model} has none")
    bench = _Bench(config, degrader, photographs(config.input), device)
    texts, failed = [f"# Speed\n\n{machine(device)}"], []
    print(texts[0])
    place = Place(config.output)
    for part in config.parts:
        tables, fine = _part(bench, part, place)
        texts += tables
        failed += [] if fine else [part]
        place.write("benchmark.md", ("\n\n".join(texts) + "\n").encode())
        _free(device)
    if failed:
        raise Unfinished(f"parts that failed: {', '.join(failed)}; all others are in {place.uri_of('benchmark.md')}")


def _part(bench: "_Bench", part: str, place: Place) -> tuple[list[str], bool]:
    """A part's tables, measured now or by an earlier run with the same settings; and whether it did not fail."""
    settings = {name: value for name, value in plain(bench.config).items() if name not in ("output", "parts")}
    settings |= {"machine": machine(bench.device).rpartition("; load")[0]}
    settings |= {"model_sha256": bench.degrader.sha256, "version": __version__}
    settings, name = json.loads(json.dumps(settings)), f"parts/{part}.json"  # as they are read back
    if place.exists(name) and (found := json.loads(place.read(name)))["settings"] == settings:
        print(f"\n{part}: measured before; to measure again, delete {place.uri_of(name)}", flush=True)
        return found["tables"], True
    texts = []
    try:
        for table in getattr(bench, part)():
            texts.append(table.markdown())
            print(f"\n{texts[-1]}", flush=True)
    except Exception as error:  # the other parts are still measured
        fits = not is_out_of_memory(error)
        texts.append(f"## {part}: {'failed' if fits else 'does not fit'}\n\n{type(error).__name__}: {error}")
        print(f"\n{texts[-1]}", flush=True)
        if fits:
            traceback.print_exc()
        return texts, not fits
    place.write(name, json.dumps({"settings": settings, "tables": texts}, indent=1).encode())
    return texts, True


def _free(device: str) -> None:
    """Give a GPU's memory back, which the next part may need in another process.

    Raises:
        ValueError: the last part failed in a way after which this process cannot use its GPU any more.
    """
    if device != "cuda":
        return
    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        raise ValueError("after this failure the process cannot use its GPU; the same command goes on") from None


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
        self.config, self.degrader, self.photos, self.device = config, degrader, photos, device
        self.quick, self.repeats = config.quick, config.repeats

    def accuracy(self) -> Iterator[Table]:
        side, count = (64, 3) if self.quick else (96, 5)
        yield inference.accuracy(self.degrader, self._crops(side)[: 1 if self.quick else None], count)
        if self.config.full_width:
            yield inference.accuracy(self._full_width(), self._crops(64)[:1], 3, FULL_WIDTH)

    def comparison(self) -> Iterator[Table]:
        for side in self.config.sizes:
            yield self._compared(self.degrader, side, self.config.compile)
        if self.config.full_width:
            yield self._compared(self._full_width(), 64, False, FULL_WIDTH)

    def _compared(self, degrader: Degrader, side: int, compiled: bool, name: str = "") -> Table:
        count, precision = 3 if self.quick else SWEEP, self.config.precision
        return inference.comparison(degrader, self._crops(side)[0], self.repeats, count, compiled, precision, name)

    def roofline(self) -> Iterator[Table]:
        hr, side = self._crops(max(self.config.sizes))[0], 256 if self.quick else 2048
        yield inference.roofline(self.degrader, hr, self.repeats, side, self.config.compile, self.config.precision)

    def optimisations(self) -> Iterator[Table]:
        hr, side = self._crops(max(self.config.sizes))[0], 128 if self.quick else 1024
        compiled, model = self.config.compile, self.config.model
        yield optimisations(self.degrader, hr, self.repeats, compiled=compiled, model=model, side=side)

    def large(self) -> Iterator[Table]:
        width, height, memory = (640, 480, 0.3) if self.quick else (4000, 3000, 2.0)
        yield inference.large(self.degrader, self.config.model, height, width, memory, torch.get_num_threads())

    def margins(self) -> Iterator[Table]:
        crop, widths = (32, (0, 16)) if self.quick else (128, (0, 8, 16, 32, 64, 96))
        widths = [-(-width // self.degrader.multiple) * self.degrader.multiple for width in widths]
        photos = [images.to_tensor(photo, self.device)[None] for photo in self.photos]
        yield inference.margins(self.degrader, photos, crop, widths, (2.0, 4.0))

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
        how = (network, self._gpu, self.config.precision, self.repeats)
        yield training(self.degrader, perceptual, *how, crop, batch)
        if not self.quick:
            yield trainings(gpu.full_size(), self._gpu)
        if self.config.full_width and self.device == "cuda":
            yield training(gpu.full_size().to(self.device), perceptual, *how, 256, 16)

    def precisions(self) -> Iterator[Table]:
        yield gpu.precisions(self.degrader, self._crops(max(self.config.sizes))[0], self.repeats)

    def images(self) -> Iterator[Table]:
        models, measured = {"ships": self.degrader, "full size": gpu.full_size()}, ["ships"]
        if self.config.full_width and self.device == "cuda":  # minutes for each image on a CPU
            measured.append("full size")
        side = 64 if self.quick else 1000
        for name, degrader in models.items():
            yield gpu.predicted(degrader, side, self._gpu, self.config.precision, name)
        sides, precision = self.config.sides, self.config.precision
        yield gpu.by_size(models, measured, sides, self._gpu, precision, self.repeats, self.device)

    def tests(self) -> Iterator[Table]:
        yield from gpu.device_tests(self.device, "noise" if self.quick else "")

    def job(self) -> Iterator[Table]:
        side = min(self.config.sizes)
        photos = [cut(photo, side, side) for photo in self.photos] * (1 if self.quick else 32)
        yield pipeline.job(self.degrader, self.config.model, photos, min(2, self.repeats), torch.get_num_threads())

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
        yield from node.node(photo, self.config.device_seconds, self.repeats, count)

    def scale(self) -> Iterator[Table]:
        keys, shards = (1000, 20) if self.quick else (1_000_000, 2000)
        yield scale.planning(keys)
        yield scale.recognising(copy.deepcopy(self.degrader).to("cpu"), self.config.output, shards)

    @property
    def _gpu(self) -> GPU:
        return GPU(self.config.tflops, self.config.terabytes)

    def _crops(self, side: int) -> list[torch.Tensor]:
        return [images.to_tensor(cut(photo, side, side), self.device)[None] for photo in self.photos]

    def _full_width(self) -> Degrader:
        torch.manual_seed(0)
        autoencoder = ResidualAutoencoder(AutoencoderConfig(gate_init=0.5))
        return Degrader(autoencoder, PathFlow(VelocityNetwork()), self.degrader.levels).to(self.device)
