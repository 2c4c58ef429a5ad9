"""Inputs of the synthesis tests: photographs of many kinds, bad files, and a degrader with random weights.

The fixtures are for the conftest.py of each room that uses them.
"""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from degflow.dataset.footer import body_sha256
from degflow.degrader import Degrader
from degflow.flow import PathFlow
from degflow.models import AutoencoderConfig, ResidualAutoencoder, VelocityConfig, VelocityNetwork
from tests.captures import residual_flow

LEVELS = {"1": 1.0, "2": 2.0, "4": 4.0}


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A small degrader with random weights."""
    return save_model(tmp_path_factory.mktemp("model") / "tiny.safetensors")


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """The photographs of `save_photos`."""
    return save_photos(tmp_path_factory.mktemp("photos"))


def save_model(path, seed=0, draws=False, blocks=1, levels=LEVELS, **autoencoder):
    """A degrader's file: of the published kind, or of the kind that draws, with a residual network of `blocks`."""
    torch.manual_seed(seed)
    network = ResidualAutoencoder(AutoencoderConfig(base_width=8, gate_init=0.5, **autoencoder))
    if draws:
        flow = residual_flow(levels, network.config.compression, blocks=blocks)
    else:
        flow = PathFlow(VelocityNetwork(VelocityConfig(width=16, blocks=1, multipliers=(1, 2))))
    Degrader(network, flow, levels).save(str(path), provenance={})
    return str(path)


def save_photos(folder):
    """Nine photographs of several sizes, modes and formats, four of them 96 x 80; and a text file."""
    data = pytest.importorskip("skimage.data")
    (folder / "deep" / "er").mkdir(parents=True)
    astronaut, cat = Image.fromarray(data.astronaut()), Image.fromarray(data.chelsea())
    turned = Image.Exif()
    turned[0x0112] = 6
    astronaut.crop((150, 0, 246, 80)).save(folder / "a b#c%20.png")
    astronaut.crop((160, 20, 256, 100)).save(folder / "astronaut.PNG")
    astronaut.crop((0, 0, 61, 47)).convert("RGBA").rotate(20).save(folder / "deep" / "alpha.webp", lossless=True)
    cat.crop((100, 50, 180, 146)).save(folder / "cat.jpeg", exif=turned)
    cat.crop((100, 50, 165, 130)).convert("L").save(folder / "deep" / "er" / "grey.tif")
    cat.crop((120, 50, 216, 130)).convert("P").save(folder / "deep" / "palette.png")
    Image.fromarray(data.coffee()[:80, :96]).save(folder / "coffee.jpg", quality=92)
    Image.fromarray(data.camera()[:8, :9].astype(np.uint16) * 257).save(folder / "smallest.png")
    Image.fromarray(data.rocket()[100:180, 200:296]).save(folder / "ünïcode 照.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def save_spoiled(folder, photos):
    """Two good photographs among eleven files."""
    good = (photos / "astronaut.PNG").read_bytes()
    files = {
        "good1.png": good,
        "good2.jpg": (photos / "coffee.jpg").read_bytes(),
        "empty.png": b"",
        "text.jpg": b"this is text, not an image",
        "page.png": b"<!DOCTYPE html><html>403</html>",
        "truncated.png": good[: len(good) // 2],
        "truncated.jpg": (photos / "coffee.jpg").read_bytes()[:900],
    }
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    Image.new("RGB", (7, 30)).save(folder / "thin.png")
    Image.new("RGB", (300, 300)).save(folder / "large.png")
    Image.fromarray(np.zeros((20, 20), np.float32)).save(folder / "float.tif")
    (folder / "dangling.png").symlink_to(folder / "nowhere")
    return folder


def keys_of(photos):
    return sorted(str(path.relative_to(photos)) for path in photos.rglob("*") if path.suffix not in ("", ".txt"))


def rows_of(output):
    rows = [row for part in sorted((output / "data").iterdir()) for row in pq.read_table(part).to_pylist()]
    found = {(row["key"], row["draw"]): row for row in rows}
    assert len(found) == len(rows)
    return found


def content(output):
    """Name -> digest of the rows of each part; the footers have other times."""
    return {path.name: body_of(path) for path in sorted((output / "data").iterdir())}


def body_of(path):
    with path.open("rb") as file:
        return body_sha256(file)


def rejects_of(output):
    """The rejects of a run that has ended: key -> row."""
    rows = pq.read_table(output / "rejects/part-000000.parquet").to_pylist()
    return {row["key"]: row for row in rows}


def png(data):
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "PNG"
        return np.asarray(image)
