"""A model of one node: which stage of the job binds, and at how many photographs per second."""

import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from degflow import images
from degflow.benchmarking.measure import Table
from degflow.benchmarking.pipeline import run_stand_in, saved
from degflow.storage import Source
from degflow.synthesis.codec import Codec, Draw, Encoded, Loaded

GPUS, CORES, DRAWS = 8, 64, 4
_NOISE = 2.0  # levels, of the sensor: enlarged photographs have none, and would be too easy to encode
_ONE_GPU = (f"scale.per_image={DRAWS}", "actors.gpus=1", "actors.threads=1", "batch=1")  # keys of the job
_WARM = 4  # first photographs of an actor, which are not counted: it loads, and takes memory for LR images


class Cost(NamedTuple):
    """What one photograph costs outside the networks.

    CPU seconds of its decoding, its encoding (of HR and LR images, with their comparison), of the actor's own thread,
    and of its second one, which hands out and writes; bytes of its pixels, of the PNGs of HR, and of those of all LR
    images.
    """

    decode: float
    encode: float
    actor: float
    second: float
    pixels: int
    hr: int
    lr: int

    @property
    def stored(self) -> int:
        """Bytes that pass through Ray's object store: decoded pixels, LR pixels, and the rows."""
        return self.pixels * (1 + DRAWS) + self.hr + self.lr


def node(photograph: np.ndarray, device_seconds: float, repeats: int, photographs: int) -> list[Table]:
    """Three tables: what a photograph costs, as measured here, the rates of a node that follow, and `busy`.

    Args:
        photograph: uint8 "H W 3", of the size that the node makes.
        device_seconds: that a GPU takes for a photograph with its draws; given, not measured here.
        repeats: of the codec.
        photographs: that the actor makes.
    """
    noise = np.random.default_rng(0).normal(0, _NOISE, photograph.shape)
    pixels = (photograph + noise).round().clip(0, 255).astype(np.uint8)
    cost = measured(pixels, device_seconds, repeats, photographs)
    size = _size(pixels)
    return [_costs(cost, size), rates(cost, device_seconds, size), busy(pixels[::2, ::2], photographs)]


def measured(pixels: np.ndarray, device_seconds: float, repeats: int, photographs: int) -> Cost:
    """The costs of a photograph: the codec's in this process, the actor's in a job whose degrader sleeps."""
    with tempfile.TemporaryDirectory() as folder:
        data = saved(pixels, "JPEG", quality=95)
        for n in range(photographs):
            Path(folder, f"{n:03d}.jpg").write_bytes(data)
        codec = _codec(folder)
        runs = [_coded(codec, Source("000.jpg", len(data), ""), pixels) for _ in range(repeats)]
        decode, encode = statistics.median(run[0] for run in runs), statistics.median(run[1] for run in runs)
        rows = runs[0][2].rows
        hr, lr = len(rows[0]["hr"]["bytes"]), sum(len(row["lr"]["bytes"]) for row in rows)
        return Cost(decode, encode, *_actor_seconds(folder, device_seconds), pixels.nbytes, hr, lr)


def _codec(folder: str) -> Codec:
    rule: dict[str, Any] = {"embed": True, "codec": "png", "scaled": False, "keep_gray": False}
    return Codec(folder, images.MAX_PIXELS, **rule, seed=0, model_sha256="")


def _coded(codec: Codec, source: Source, pixels: np.ndarray) -> tuple[float, float, Encoded]:
    """CPU seconds of loading a photograph, and of encoding it with these pixels as each LR image; its rows."""
    begun = time.process_time()
    loaded = codec.load(source)
    half = time.process_time()
    assert isinstance(loaded, Loaded), loaded
    encoded = codec.encode(loaded, [Draw(2.0, 0.5, n) for n in range(DRAWS)], np.stack([pixels] * DRAWS))
    assert isinstance(encoded, Encoded), encoded
    return half - begun, time.process_time() - half, encoded


def _actor_seconds(folder: str, device_seconds: float) -> tuple[float, float]:
    """CPU seconds of both threads of an actor with a GPU, for each photograph of a folder after the first ones."""
    with tempfile.TemporaryDirectory() as output:
        words = [f"input={folder}", f"output={output}", *_ONE_GPU]
        notes = run_stand_in(words, {"CPU": 2, "GPU": 1}, device_seconds)
    return _mean_spent(notes, "image"), _mean_spent(notes, "rows")


def _mean_spent(notes: Sequence[dict[str, Any]], who: str) -> float:
    """The mean CPU seconds between two notes of one thread.

    A new thread may have the number of an ended one; its clock starts at 0.
    """
    clocks: dict[int, float] = {}
    spent = []
    for note in notes:
        if note["who"] == who:
            before = clocks.get(note["thread"], float("inf"))
            if note["cpu"] >= before:
                spent.append(note["cpu"] - before)
            clocks[note["thread"]] = note["cpu"]
    return statistics.mean(spent[_WARM:] or spent)


def busy(pixels: np.ndarray, photographs: int) -> Table:
    """The share of the time in which one device works, across the ends of shards, where codecs do not bind.

    Args:
        pixels: of the photographs, uint8 "H W 3".
        photographs: of each of two shards.
    """
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as output:
        data = saved(pixels, "JPEG", quality=95)
        for n in range(2 * photographs):
            Path(folder, f"{n:03d}.jpg").write_bytes(data)
        decode, encode, _ = _coded(_codec(folder), Source("000.jpg", len(data), ""), pixels)
        seconds = max(1.5 * (decode + encode), 0.1)
        words = [f"input={folder}", f"output={output}", f"shard.images={photographs}", "actors.max=1"]
        notes = run_stand_in([*words, *_ONE_GPU], {"CPU": 2, "GPU": 1}, seconds)
    begun = [note["at"] for note in notes if note["who"] == "image"]
    idle = [after - before - seconds for before, after in pairwise(begun)]
    between = idle.pop(photographs - 1)
    rows = [
        ("busy", f"{100 * seconds * (len(begun) - 1) / (begun[-1] - begun[0]):.0f}%"),
        ("idle between two photographs of a shard, s, median", f"{statistics.median(idle):.2f}"),
        ("idle between two shards, s", f"{between:.2f}"),
    ]
    about = (
        f"One actor, two shards of {photographs} photographs of {_size(pixels)} pixels with {DRAWS} draws. Its "
        f"degrader is A STAND-IN that sleeps {seconds:.1f} s each: 1.5 times what the codec needs on a core, or 0.1."
    )
    return Table("How busy a device stays (stand-in)", about, ("", "measured"), rows)


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]} x {pixels.shape[0]}"


def _costs(cost: Cost, size: str) -> Table:
    rows = [
        ("decoding a JPEG, CPU s", f"{cost.decode:.2f}", f"{cost.pixels / cost.decode / 1e6:.0f} MB/s of pixels"),
        (
            f"encoding HR and {DRAWS} LR as PNG, comparing, CPU s",
            f"{cost.encode:.2f}",
            f"{(1 + DRAWS) * cost.pixels / cost.encode / 1e6:.0f} MB/s of pixels",
        ),
        ("the actor's own thread, CPU s", f"{cost.actor:.3f}", "copies of pixels"),
        ("its second thread, CPU s", f"{cost.second:.3f}", "copies to and from the object store; the shard's file"),
        ("through the object store, MB", f"{cost.stored / 1e6:.0f}", "computed: pixels, LR pixels, rows"),
        (
            "in the shard's file, MB",
            f"{(cost.hr + cost.lr) / 1e6:.0f}",
            f"{cost.hr / (cost.pixels / 3):.2f} bytes/pixel",
        ),
    ]
    about = (
        f"One photograph of {size} pixels with {DRAWS} draws: an enlarged one with the noise of a sensor ({_NOISE:g} "
        "levels), on one core. The actor's degrader is A STAND-IN that sleeps."
    )
    return Table("What a photograph costs outside the networks", about, ("", "per photograph", ""), rows)


def rates(cost: Cost, device_seconds: float, size: str) -> Table:
    """Photographs per second of each stage of a node, and which one binds."""
    busy = (cost.actor + cost.second) / max(cost.actor + device_seconds, cost.second)
    threads = GPUS * busy  # cores that the actors' threads hold
    stages = {
        "networks": (GPUS / device_seconds, f"{GPUS} GPUs at {device_seconds:g} s per photograph (given)"),
        "actors' own threads": (GPUS / cost.actor, f"{GPUS} at {cost.actor:.3f} CPU s"),
        "actors' second threads": (GPUS / cost.second, f"{GPUS} at {cost.second:.3f} CPU s"),
        "networks and own threads in turn": (
            GPUS / (device_seconds + cost.actor),
            "while its own thread copies, an actor's GPU has nothing to do",
        ),
        "codecs": (
            (CORES - threads) / (cost.decode + cost.encode),
            f"{CORES - threads:.0f} cores at {cost.decode + cost.encode:.2f} CPU s",
        ),
    }
    binding = min(stages, key=lambda name: stages[name][0])
    rows = [
        (f"**{name}**" if name == binding else name, f"{rate:.1f}", "binds" if name == binding else "", how)
        for name, (rate, how) in stages.items()
    ]
    rate = stages[binding][0]
    cores = (cost.decode + cost.encode) * stages["networks"][0]
    about = (
        f"A MODEL of a node of {GPUS} H100s and {CORES} cores, from the costs above: photographs of {size} pixels with "
        f"{DRAWS} draws per second, if each stage were alone. {binding[0].upper()}{binding[1:]} bind at {rate:.1f}/s. "
        f"Then {cost.stored * rate / 1e9:.1f} GB/s pass through the object store, and "
        f"{(cost.hr + cost.lr) * rate / 1e9:.1f} GB/s go into storage. Codecs for all that the networks could make "
        f"need {cores:.0f} cores; other nodes may lend theirs."
    )
    return Table("One node (model)", about, ("stage", "photographs/s", "", "by"), rows)
