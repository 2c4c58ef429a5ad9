"""Finished datasets for the tests of their readers, made by the real job, but in this process and without Ray."""

from contextlib import contextmanager
from unittest import mock

import numpy as np
from PIL import Image

from degflow import images
from degflow.config import dump, load
from degflow.dataset.layout import CONFIG, SUCCESS
from degflow.dataset.manifest import write_manifest, write_rejects
from degflow.dataset.plan import Plan
from degflow.dataset.scales import ScaleConfig
from degflow.dataset.writer import ShardWriter
from degflow.storage import Place
from degflow.synthesis import run
from degflow.synthesis.codec import Threads
from degflow.synthesis.settings import SynthesizeConfig
from degflow.synthesis.shard import Turn


class Here:
    """A pool of one maker in this process."""

    gpus, threads = 0, 1

    def make(self, maker, plan, pending, price):
        for number in pending:
            list(maker.make(number, plan[number], Threads(1), Turn(), elsewhere=plan.elsewhere(number)))


@contextmanager
def pool_here(actors):
    yield Here()


def synthesize_here(photos, output, model, *words):
    """`synthesize` without Ray."""
    config = load(SynthesizeConfig, [f"input={photos}", f"output={output}", f"model={model}", *words])
    with mock.patch.object(run, "pool_of", pool_here):
        run.synthesize(config)


def finish(photos, output, model, *words, retry=False):
    """Make a dataset, however many files are rejected; returns its URI.

    An existing dataset is extended, or with `retry` its rejected files are tried again.
    """
    more = "retry_rejects=true" if retry else "extend=true"
    synthesize_here(photos, output, model, "max_reject_rate=1", more, *words)
    return str(output)


def save_coordinates(folder, count, height=24, width=32):
    """Photographs whose pixels are (2 row, 2 column, number of the photograph)."""
    folder.mkdir(parents=True, exist_ok=True)
    row, column = np.indices((height, width))
    for number in range(count):
        pixels = np.stack([2 * row, 2 * column, np.full_like(row, number)], -1).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    return folder


def finish_rows(output, keys, draws=1):
    """A dataset of one part with rows of any keys, each with its own images; it needs no photographs."""
    place = Place(str(output))
    place.write(CONFIG, dump(SynthesizeConfig("none", str(output), scale=ScaleConfig(low=2.0, high=2.0))).encode())
    random = np.random.default_rng(0)
    with ShardWriter(place, 0, "") as writer:
        for key in keys:
            hr = {"bytes": images.encode_png(random.integers(256, size=(8, 8, 3), dtype=np.uint8)), "path": key}
            about = {
                "key": key,
                "scale": 2.0,
                "time": 0.5,
                "height": 8,
                "width": 8,
                "seed": 0,
                "noise_seed": 0,
                "hr_sha256": "",
            }
            for draw in range(draws):
                lr = images.encode_png(random.integers(256, size=(8, 8, 3), dtype=np.uint8))
                row = {"draw": draw, "lr": {"bytes": lr, "path": key}, "hr": hr, "model_sha256": ""}
                writer.add([about | row])
        record = writer.finish(0.0, None, None, None)
    write_rejects(place, Plan.empty(), {0: record})
    write_manifest(place, Plan.empty(), {0: record})
    place.write(SUCCESS, b"")
    return str(output)
