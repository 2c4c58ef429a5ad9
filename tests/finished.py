"""A finished dataset for the readers' tests, through the real shard maker and without Ray."""

import numpy as np
from PIL import Image

from degflow import dataset
from degflow.config import dump, load
from degflow.degrader import Degrader
from degflow.planning import SynthesizeConfig, make_plan, resolve
from degflow.shards import ShardMaker
from degflow.storage import Place


def finish(photos, output, model, *words):
    """Every shard in this process, then what `synthesize` writes beside them; returns the output's URI."""
    degrader = Degrader.load(model)
    words = [f"input={photos}", f"output={output}", f"model={model}", *words]
    config = resolve(load(SynthesizeConfig, words), degrader)
    place, plan, maker = Place(str(output)), make_plan(config), ShardMaker(degrader, config, threads=1)
    place.write(dataset.CONFIG, dump(config).encode())
    dataset.write_plan(place, list(plan.values()))
    records = {number: list(maker.make(number, sources))[-1].record for number, sources in plan.items()}
    dataset.write_manifest(place, records)
    place.write(dataset.SUCCESS, b"")
    return str(output)


def save_coordinates(folder, count, height=24, width=32):
    """Photographs whose pixels say where they are: (row, column, photograph), each twice as large as its numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    row, column = np.indices((height, width))
    for number in range(count):
        pixels = np.stack([2 * row, 2 * column, np.full_like(row, number)], -1).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    return folder
