"""What people see first of a dataset: README.md (the dataset card) and preview.png (a contact sheet)."""

import contextlib
import io
import math
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

from degflow import images
from degflow.dataset.layout import Record
from degflow.dataset.references import read_reference
from degflow.storage import Place

CROP, IMAGES, DRAWS = 192, 6, 6
_GAP, _CAPTION = 6, 20

_CARD = """\
---
license: other
task_categories:
- image-to-image
tags:
- super-resolution
- image-restoration
size_categories:
- {size_category}
configs:
- config_name: default
  data_files: data/*.parquet
---

# {rows:,} LR images of {files:,} photographs, at sampled degradation scales

Low-resolution images made from high-resolution photographs with
`degflow synthesize`, {method}. A scale is the strength of the degradation, not a resize{resize}

![HR crops beside their LR images](preview.png)

`preview.html` shows the same crops with histograms of scale and PSNR.

| | |
|---|---|
| LR images | {rows:,} |
| HR images used / rejected | {used:,} / {rejects:,} |
| scales | {scales} |
| mean PSNR of LR against HR | {psnr} |
| parts, bytes | {parts:,}, {bytes:,} |
| seed | {seed} |
| model sha256 | `{model_sha256}` |

## Reading it

```python
from datasets import load_dataset
rows = load_dataset("parquet", data_files="data/*.parquet", split="train")
rows[0]["lr"], rows[0]["hr"], rows[0]["scale"]
```

`manifest.parquet` lists the parts with rows, bytes, and the sha256 of what comes before their footers. `_SUCCESS` shows
that all parts are there. `rejects/` lists the files without rows, each with stage and reason. `config.yaml` makes the
same dataset again.

| column | type | meaning |
|---|---|---|
| key | string | path of the HR image in the input |
| draw | int32 | number of the LR image among those of its HR image |
| scale | float64 | degradation scale |
| time | float64 | the scale's place in the trained range, 0 at the smallest trained scale and 1 at the largest |
| lr | struct(bytes, path) | {codec}, 8-bit sRGB |
| hr | struct(bytes, path) | {hr} |
| height, width | int32 | of the LR image |
| hr_sha256 | string | of the source file |
| seed | int64 | of the run; it decides the scale and the noise seed, together with key and draw |
| noise_seed | int64 | of the LR image; it decides what was drawn |
| model_sha256 | string | of the degrader file |

## Licence

The images are derived from the photographs in the input, whose licences apply. Name those licences here.
"""


class Totals(NamedTuple):
    """Of a dataset: LR images, photographs that have some, mean PSNR of LR against HR in dB, bytes of the parts."""

    rows: int
    used: int
    psnr: float
    size: int


def totals(records: Mapping[int, Record], recipe: Mapping[str, Any]) -> Totals:
    """The sums over all shards; see `card`."""
    rows = sum(record.rows for record in records.values())
    psnr = sum((record.psnr or 0) * record.rows for record in records.values()) / max(1, rows)
    return Totals(rows, rows // recipe["scale"]["per_image"], psnr, sum(record.bytes for record in records.values()))


def _method(draws: bool, spread: float) -> str:
    """How a model made LR images, in words that follow "made"."""
    if not draws:
        return "by the latent flow of [DegFlow](https://arxiv.org/abs/2602.04193)"
    return "each drawn with the noise of a camera" if spread else "each the mean of what a camera may capture"


def card(records: Mapping[int, Record], rejects: int, recipe: Mapping[str, Any], scales: str, draws: bool) -> str:
    """README.md of a finished dataset.

    Args:
        records: of all shards.
        rejects: number of files without rows.
        recipe: the resolved configuration.
        scales: how they were drawn; see `ScaleConfig.in_words`.
        draws: as `Degrader.draws` of its model.
    """
    rows, used, psnr, size = totals(records, recipe)
    embedded, codec = recipe["hr"] == "embed", {"png": "PNG", "webp": "lossless WebP"}[recipe["codec"]]
    return _CARD.format(
        size_category=_size_category(rows),
        rows=rows,
        files=used,
        used=used,
        rejects=rejects,
        scales=scales,
        method=_method(draws, recipe["spread"]),
        psnr=f"{psnr:.2f} dB" if rows else "no images",
        parts=len(records),
        bytes=size,
        seed=recipe["seed"],
        model_sha256=recipe["model_sha256"],
        resize=": LR images have HR's size."
        if recipe["size"] == "same"
        else "; here each LR image was then also shrunk by it.",
        codec=codec,
        hr=f"{codec} of exactly the pixels that were degraded"
        if embedded
        else "without bytes; path is the URI of the source file",
    )


def _size_category(rows: int) -> str:
    bounds = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
    place = max(0, len(str(rows)) - 3)
    if place >= len(bounds):
        return f"n>{bounds[-1]}"
    return f"{bounds[place - 1]}<n<{bounds[place]}" if place else f"n<{bounds[0]}"


class Tile(NamedTuple):
    """A crop of an LR image; psnr: of the whole image against HR, in dB, null if its size is another."""

    scale: float
    psnr: float | None
    pixels: np.ndarray


class Sample(NamedTuple):
    """What a preview shows of a photograph: HR's most detailed crop, and the same crop of LR images by their scales."""

    key: str
    hr: np.ndarray
    tiles: list[Tile]


def samples(output: Place, records: Mapping[int, Record], recipe: Mapping[str, Any]) -> list[Sample]:
    """Some photographs of the first shards, spread over the scales; none whose HR image is gone or has changed.

    Args:
        output: the dataset.
        records: of its finished shards.
        recipe: the resolved configuration; for HR images that are read from their sources.
    """
    found = []
    for part, key in sample_keys(output, records, IMAGES):
        rows = read_rows(output, part, ("key", "draw", "scale", "lr", "hr", "hr_sha256"), [key])
        rows.sort(key=lambda row: (row["scale"], row["draw"]))
        if len(rows) > DRAWS:
            rows = [rows[round(n * (len(rows) - 1) / (DRAWS - 1))] for n in range(DRAWS)]
        with contextlib.suppress(Exception):  # a missing preview must not fail a finished dataset
            found.append(_sample(rows, recipe))
    return found


def _sample(rows: Sequence[dict[str, Any]], recipe: Mapping[str, Any]) -> Sample:
    data = rows[0]["hr"]["bytes"] or read_reference(rows[0], recipe)
    hr = images.decode(data, max_pixels=recipe["max_pixels"])
    size = min(CROP, *hr.shape[:2])
    top, left = most_detail(hr, size)
    tiles = []
    for row in rows:
        lr, psnr = images.decode_encoded(row["lr"]["bytes"]), None
        if lr.shape == hr.shape:
            psnr = min(99.0, 10 * math.log10(255**2 / max(_squared_error(lr, hr), 1e-10)))  # as in the manifest
        else:
            lr = np.asarray(Image.fromarray(lr).resize((hr.shape[1], hr.shape[0]), Image.Resampling.NEAREST))
        tiles.append(Tile(row["scale"], psnr, lr[top : top + size, left : left + size].copy()))
    # Copies: a view would keep the whole image in memory.
    return Sample(rows[0]["key"], hr[top : top + size, left : left + size].copy(), tiles)


def _squared_error(lr: np.ndarray, hr: np.ndarray, rows: int = 256) -> float:
    """Mean of the squared differences, some rows at a time: photographs may be large."""
    total = 0.0
    for n in range(0, len(lr), rows):
        total += float(np.square(lr[n : n + rows].astype(np.float32) - hr[n : n + rows]).sum(dtype=np.float64))
    return total / lr.size


def preview(shown: Sequence[Sample]) -> bytes | None:
    """A PNG with a row for each photograph: HR's crop, then LR's; None if there is none to show."""
    if not shown:
        return None
    lines = [[("HR", item.hr), *((f"x{tile.scale:.2f}", tile.pixels) for tile in item.tiles)] for item in shown]
    step = CROP + _GAP
    sheet = Image.new("RGB", (_GAP + step * max(map(len, lines)), _GAP + (step + _CAPTION) * len(lines)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for y, line in enumerate(lines):
        for x, (caption, tile) in enumerate(line):
            left, top = _GAP + x * step, _GAP + y * (step + _CAPTION)
            sheet.paste(Image.fromarray(tile), (left, top))
            draw.text((left + 2, top + CROP + 2), caption, fill="black", font=font)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def most_detail(pixels: np.ndarray, size: int) -> tuple[int, int]:
    """Top and left of the size x size window of uint8 "H W 3" with the largest sum of absolute gradients.

    Of an image with more than 2048 pixels a side, one pixel of a few is looked at.
    """
    height, width, _ = pixels.shape
    if (step := max(height, width) // 2048 + 1) > 1:
        top, left = most_detail(np.ascontiguousarray(pixels[::step, ::step]), max(1, size // step))
        return min(top * step, height - size), min(left * step, width - size)
    grey = pixels.mean(2, dtype=np.float32)
    energy = np.zeros((grey.shape[0] + 1, grey.shape[1] + 1))
    energy[1:-1, 1:] += np.abs(np.diff(grey, axis=0))
    energy[1:, 1:-1] += np.abs(np.diff(grey, axis=1))
    total = energy.cumsum(0).cumsum(1)
    stride = max(1, size // 8)
    tops, lefts = (np.arange(0, side - size + 1, stride) for side in grey.shape)
    sums = total[tops + size][:, lefts + size] - total[tops][:, lefts + size]
    sums += total[tops][:, lefts] - total[tops + size][:, lefts]
    best = np.unravel_index(int(sums.argmax()), sums.shape)
    return int(tops[best[0]]), int(lefts[best[1]])


def read_rows(
    output: Place, part: str, columns: Sequence[str], keys: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Columns of the rows of a data part, or of those with these keys; reads no other row groups."""

    def read(file: BinaryIO) -> list[dict[str, Any]]:
        parquet = pq.ParquetFile(file)
        rows: list[dict[str, Any]] = []
        for group in range(parquet.num_row_groups):
            wanted = parquet.read_row_group(group, ["key"]).column("key").to_pylist()
            picked = [n for n, key in enumerate(wanted) if keys is None or key in keys]
            if picked:
                rows += parquet.read_row_group(group, list(columns)).take(picked).to_pylist()
        return rows

    return output.using(part, read)


def sample_keys(output: Place, records: Mapping[int, Record], count: int) -> list[tuple[str, str]]:
    """At most `count` photographs (part, key) of the first shards, spread evenly over the scales."""
    found: list[tuple[float, str, str]] = []
    for record in islice((records[n] for n in sorted(records) if records[n].rows), 4):
        rows = read_rows(output, record.part, ("key", "draw", "scale"))
        found += [(row["scale"], record.part, row["key"]) for row in rows if row["draw"] == 0]
    found.sort()
    spread = range(count) if len(found) > count else range(len(found))
    picked = [found[round(n * (len(found) - 1) / max(1, len(spread) - 1))] for n in spread]
    return [(part, key) for _, part, key in picked]
