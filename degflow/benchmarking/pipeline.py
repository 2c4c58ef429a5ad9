"""Around the networks: image codecs, and the Ray job beside a bare loop."""

import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from degflow import images
from degflow.benchmarking import stand_in
from degflow.benchmarking.measure import Table, alternate, run_process
from degflow.dataset.layout import MANIFEST
from degflow.degrader import Degrader
from degflow.synthesis.reports import REPORTS


def codecs(lrs: Sequence[np.ndarray], repeats: int) -> Table:
    """Megabytes of pixels per second and core, and bytes per pixel, of lossless encoders and of decoding.

    Args:
        lrs: LR images, uint8 "H W 3": they have less noise than photographs, and so fewer bytes.
        repeats: of each way, in turn.
    """
    files = {
        "JPEG": [saved(lr, "JPEG", quality=95) for lr in lrs],
        "PNG": [images.encode_png(lr) for lr in lrs],
        "WebP": [images.encode(lr, "webp")[0] for lr in lrs],
    }
    ways: dict[str, Callable[[int], list[Any]]] = {}
    for level in (1, 3, 6, 9):
        ways[f"PNG, Pillow level {level}"] = lambda _, level=level: [images.encode_png(lr, level) for lr in lrs]
    if cv2 := _opencv():
        cv2.setNumThreads(1)
        for level in (1, 3, 6):
            flags = [cv2.IMWRITE_PNG_COMPRESSION, level]
            ways[f"PNG, OpenCV level {level}"] = lambda _, flags=flags: [
                cv2.imencode(".png", lr[..., ::-1], flags)[1] for lr in lrs
            ]
    for quality, method in ((0, 0), (0, 1), (25, 1), (50, 2)):
        options = {"lossless": True, "quality": quality, "method": method}
        ways[f"WebP, quality {quality}, method {method}"] = lambda _, options=options: [
            saved(lr, "WebP", **options) for lr in lrs
        ]
    for kind, data in files.items():
        ways[f"read {kind}"] = lambda _, data=data: [images.decode(one) for one in data]
    timings = alternate(ways, repeats)
    size = sum(lr.nbytes for lr in lrs)
    rows = []
    for name, timing in timings.items():
        data = files[name.removeprefix("read ")] if name.startswith("read ") else timing.result
        written = sum(map(len, data))
        rows.append((name, f"{size / timing.median / 1e6:.0f}", f"{written / (size / 3):.2f}"))
    missing = "" if cv2 else " OpenCV is not installed here, and left out."
    about = f"{len(lrs)} LR images, {size / 3e6:.1f} MP, one core, medians of {repeats} repeats.{missing}"
    return Table("Codecs", about, ("", "MB/s of pixels", "bytes per pixel"), rows)


def saved(pixels: np.ndarray, kind: str, **options: Any) -> bytes:
    """The bytes of an image file of a kind that Pillow knows."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def _opencv() -> Any:
    try:
        import cv2  # pyright: ignore[reportMissingImports] # optional
    except ImportError:
        return None
    return cv2


def job(degrader: Degrader, model: str, photographs: Sequence[np.ndarray], repeats: int, threads: int) -> Table:
    """LR images per second of the Ray job's shards beside a loop that only calls the degrader.

    Args:
        degrader: the model. model: its file.
        photographs: uint8 "H W 3", of one size.
        repeats: bare loop, job, bare loop, job, ...
        threads: CPUs of the actor and of the loop.
    """
    device = next(degrader.parameters()).device
    tensors = [images.to_tensor(p, device)[None] for p in photographs]
    scale = torch.tensor([[(degrader.low + degrader.high) / 2]], dtype=torch.float64)
    at, bare, shards = f"scale.values=[{float(scale)}]", [], []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "photographs")
        source.mkdir()
        for n, pixels in enumerate(photographs):
            (source / f"{n:03d}.jpg").write_bytes(saved(pixels, "JPEG", quality=95))
        for repeat in range(repeats):
            degrader(tensors[0], scale)
            begun = time.perf_counter()
            for hr in tensors:
                images.to_pixels(degrader(hr, scale)[0])
            bare.append(len(tensors) / (time.perf_counter() - begun))
            output = f"{folder}/out{repeat}"
            words = [f"input={source}", f"output={output}", f"model={model}", "scale.distribution=list", at, "batch=1"]
            words += [f"actors.threads={threads}", "actors.max=1", f"actors.gpus={int(device.type == 'cuda')}"]
            words += [f"shard.images={len(photographs)}"]
            run_process([sys.executable, "-m", "degflow", "synthesize", *words])
            shards.append(_rate(Path(output, MANIFEST)))
    share = statistics.median(b / a for a, b in zip(bare, shards, strict=True))
    cost = _cpu_seconds(photographs)
    height, width, _ = photographs[0].shape
    row = (f"{width} x {height}", *(f"{statistics.median(rates):.2f}" for rates in (bare, shards)), f"{share:.0%}")
    about = (
        f"LR images per second of a loop over tensors on the device, and of a shard of the job (read, decode, degrade, "
        f"compare, encode HR and LR), {len(photographs)} photographs, {threads} CPUs for each, medians of {repeats} "
        "alternating repeats. On CPUs the job's other stages compete with the networks. They take CPU s seconds per "
        "image, so a device that makes N images/s keeps N times as many cores busy."
    )
    header = ("image", "bare loop", "Ray job", "share", "CPU s")
    return Table("Bare loop and Ray job", about, header, [(*row, f"{cost:.3f}")])


def _cpu_seconds(photographs: Sequence[np.ndarray]) -> float:
    """CPU seconds of reading a JPEG and writing HR and LR as PNG, per photograph."""
    files = [saved(pixels, "JPEG", quality=95) for pixels in photographs]
    begun = time.process_time()
    for data in files:
        pixels = images.decode(data)
        for _ in range(2):
            images.encode_png(pixels)
    return (time.process_time() - begun) / len(files)


def _rate(manifest: Path) -> float:
    """Rows per second of a dataset's shards."""
    from pyarrow import parquet

    columns = parquet.read_table(manifest, columns=["rows", "seconds"]).to_pydict()
    return sum(columns["rows"]) / sum(columns["seconds"])


def actors(pools: Sequence[tuple[int, int]], seconds: float, images_per_shard: int) -> Table:
    """Throughput of a pool of logical actors whose degrader only sleeps: what the pipeline loses with more actors.

    Args:
        pools: actors, and how many the cluster has room for.
        seconds: that the stand-in sleeps per image.
        images_per_shard: each actor gets four shards.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for count, room in pools:
            source, output = Path(folder, f"in{count}-{room}"), Path(folder, f"out{count}-{room}")
            source.mkdir()
            data = saved(np.full((16, 16, 3), 128, np.uint8), "JPEG")
            for n in range(4 * count * images_per_shard):
                (source / f"{n:05d}.jpg").write_bytes(data)
            words = [f"input={source}", f"output={output}", "actors.threads=1", "actors.gpus=0", f"actors.max={count}"]
            words += [f"actors.min={count}", f"shard.images={images_per_shard}", "batch=1"]
            notes = run_stand_in(words, {"CPU": room}, seconds)
            ends = sorted(file.stat().st_mtime for file in (output / "data").iterdir())
            rate = (len(ends) - count) * images_per_shard / (ends[-1] - ends[count - 1])
            shares = f"{rate:.1f}", f"{count / seconds:.1f}", f"{rate * seconds / count:.0%}"
            rows.append((str(count), str(room), *shares, *_driver(notes, count)))
    about = (
        f"A STAND-IN: the degrader sleeps {seconds:g} s per image and returns it, and Ray is told of as many CPUs as "
        f"it has room for actors ({os.cpu_count()} are real). Images per second after each actor's first shard. An "
        f"actor reports at the end of a shard, and once a second, or less often: all actors that there is room for "
        f"send {REPORTS} reports a second at most. The driver's CPU time is that of a shard's reports and of Ray Data."
    )
    header = (
        "actors",
        "room for",
        "images/s",
        "if nothing were lost",
        "share",
        "reports/s of an actor",
        "driver CPU ms/report",
        "driver CPU ms/s of an actor",
    )
    return Table("Scaling with actors (stand-in)", about, header, rows)


def _driver(notes: Sequence[dict[str, Any]], actors: int) -> tuple[str, str, str]:
    """Reports a second of an actor, CPU milliseconds of the driver for each, and for each actor and second."""
    reports = [note for note in notes if note["who"] == "report"]
    first, last = reports[0], reports[-1]
    cpu, seconds, count = 1e3 * (last["cpu"] - first["cpu"]), last["at"] - first["at"], len(reports) - 1
    return f"{count / seconds / actors:.2f}", f"{cpu / count:.1f}", f"{cpu / seconds / actors:.1f}"


def run_stand_in(words: Sequence[str], resources: dict[str, int], seconds: float) -> list[dict[str, Any]]:
    """Run the job of `stand_in` to its end, on a Ray that is told of these resources; returns its trace."""
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace")
        environment = {stand_in.SECONDS: str(seconds), stand_in.TRACE: str(trace)}
        environment["RAY_OVERRIDE_RESOURCES"] = json.dumps(resources)
        run_process([sys.executable, "-m", "degflow.benchmarking.stand_in", *words], **environment)
        return [json.loads(line) for line in trace.read_text().splitlines()]
