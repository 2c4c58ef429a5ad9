"""A finished dataset for the readers' tests, through the real shard maker and without Ray."""

from functools import partial

import numpy as np
from PIL import Image

from degflow import images
from degflow.config import dump, load
from degflow.dataset.layout import CONFIG, SUCCESS
from degflow.dataset.manifest import finished_shards, write_manifest
from degflow.dataset.plan import Plan, read_plan, write_part
from degflow.dataset.scales import ScaleConfig
from degflow.dataset.writer import ShardWriter
from degflow.degrader import Degrader
from degflow.storage import Place
from degflow.synthesis.resuming import first_part, news, recipe_of, rejected
from degflow.synthesis.settings import SynthesizeConfig, resolve
from degflow.synthesis.shard import ShardMaker, Threads


def finish(photos, output, model, *words, retry=False):
    """Every shard in this process, then what `synthesize` writes beside them; returns the output's URI.

    Of a dataset that is there it makes what `extend` adds, or with `retry` what `retry_rejects` does.
    """
    degrader = Degrader.load(model)
    words = [f"input={photos}", f"output={output}", f"model={model}", *words]
    config = resolve(load(SynthesizeConfig, words), degrader)
    place, recipe = Place(str(output)), partial(recipe_of, config)
    plan, maker = read_plan(place), ShardMaker(degrader, config, Threads(1))
    if retry:
        part = rejected(config, plan, finished_shards(place, plan, recipe), place)
    else:
        part = news(config, plan) if len(plan) else first_part(config)
    grown = plan.plus(part)
    place.write(CONFIG, dump(config).encode())
    write_part(place, plan.parts, part)
    for number in range(len(plan), len(grown)):
        list(maker.make(number, grown[number]))
    write_manifest(place, grown, finished_shards(place, grown, recipe))
    place.write(SUCCESS, b"")
    return str(output)


def save_coordinates(folder, count, height=24, width=32):
    """Photographs whose pixels say where they are: (row, column, photograph), each twice as large as its numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    row, column = np.indices((height, width))
    for number in range(count):
        pixels = np.stack([2 * row, 2 * column, np.full_like(row, number)], -1).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    return folder


def finish_rows(output, keys, draws=1):
    """One part with rows of these keys, whatever they are, each with an image of its own; no photograph is needed."""
    place = Place(str(output))
    place.write(CONFIG, dump(SynthesizeConfig("none", str(output), scale=ScaleConfig(low=2.0, high=2.0))).encode())
    random = np.random.default_rng(0)
    with ShardWriter(place, 0, "") as writer:
        for key in keys:
            hr = {"bytes": images.encode_png(random.integers(256, size=(8, 8, 3), dtype=np.uint8)), "path": key}
            about = {"key": key, "scale": 2.0, "time": 0.5, "height": 8, "width": 8, "seed": 0, "hr_sha256": ""}
            for draw in range(draws):
                lr = images.encode_png(random.integers(256, size=(8, 8, 3), dtype=np.uint8))
                row = {"draw": draw, "lr": {"bytes": lr, "path": key}, "hr": hr, "model_sha256": ""}
                writer.add([about | row])
        record = writer.finish(0.0, None, None, None)
    write_manifest(place, Plan.empty(), {0: record})
    place.write(SUCCESS, b"")
    return str(output)
