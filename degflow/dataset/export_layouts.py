"""The layouts of an export: the files that the rows of a photograph become, and their names.

A layout gets the rows of one photograph at a time, and keeps none of them. `exports` writes its files. All images are
PNG, because the readers of these layouts look for names that end in .png; a dataset's WebP is encoded anew.
"""

import hashlib
import json
import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from degflow import images
from degflow.config import parse
from degflow.dataset.reader import FinishedDataset
from degflow.dataset.scales import ScaleConfig, scales_of

# Short, lower-case, one suffix, no double hyphens or slashes: so two hyphens can stand for a slash.
_PLAIN_KEY = re.compile(rf"(?=.{{1,48}}$)[a-z0-9_]+([-/][a-z0-9_]+)*({'|'.join(map(re.escape, images.SUFFIXES))})")
_EQUAL = 1e-9  # scales that differ by less are the same


class Pair(NamedTuple):
    """An exported row: its entry in the index, and its files."""

    info: dict[str, Any]
    files: dict[str, bytes]


class Layout(Protocol):
    """How the rows of a photograph become files."""

    def pairs(self, rows: Sequence[dict[str, Any]]) -> list[Pair]:
        """The pairs of one photograph's rows, without the rows that do not fit the layout."""
        ...


def scales_in(recipe: Mapping[str, Any]) -> list[float]:
    """The scales that the draws of a dataset can have, in increasing order; empty if they are continuous."""
    scale = parse(ScaleConfig, recipe["scale"])
    if scale.distribution == "list":
        return sorted(set(scale.values))
    return sorted(set(scales_of(scale, 0, ""))) if scale.distribution == "grid" or scale.low == scale.high else []


def _scales_in_words(recipe: Mapping[str, Any]) -> str:
    few = ", ".join(f"{value:g}" for value in scales_in(recipe))
    return few or parse(ScaleConfig, recipe["scale"]).in_words()


class Paired:
    """gt/ and lq/ with equal names; if LR images are shrunk, in a tree for each scale, with HR `scale` times LR."""

    def __init__(self, source: FinishedDataset):
        self.source, self.scaled = source, source.recipe["size"] == "scaled"
        scales = scales_in(source.recipe)
        if self.scaled and (not scales or any(scale != int(scale) for scale in scales)):
            raise ValueError(
                f"layout=paired: {source.uri} has size=scaled and scales {_scales_in_words(source.recipe)}; trainers "
                "of paired folders need HR to be a whole multiple of LR (scale.distribution=list scale.values=[2,4]); "
                "layout=webdataset and layout=realsr take any scale"
            )

    def pairs(self, rows: Sequence[dict[str, Any]]) -> list[Pair]:
        """One pair for each row."""
        hr, pairs = _hr_png(self.source, rows[0]), []
        for row in rows:
            name, gt, lq, off = file_name(row["key"], row["draw"]), hr, _lr_png(self.source, row), 0
            if self.scaled:
                gt, lq, off = self._multiple(row, hr, lq)
            folder = f"x{row['scale']:.0f}/" if self.scaled else ""
            height, width = _size_of(gt)
            info = _info(row, name) | {"folder": folder, "height": height, "width": width, "off": off}
            pairs.append(Pair(info, {f"{folder}gt/{name}.png": gt, f"{folder}lq/{name}.png": lq}))
        return pairs

    def _multiple(self, row: dict[str, Any], hr: bytes, lr: bytes) -> tuple[bytes, bytes, int]:
        """HR and LR as PNG, cut to a whole multiple, and their misalignment at the far edge, in HR pixels."""
        scale, sizes = round(row["scale"]), list(zip(_size_of(hr), (row["height"], row["width"]), strict=True))
        off = max(abs(large - scale * small) for large, small in sizes)
        if not off:
            return hr, lr, 0
        height, width = (min(large // scale, small) for large, small in sizes)
        gt = self.source.hr_of(row | {"hr": {"bytes": hr}})[: scale * height, : scale * width]
        return images.encode_png(gt), images.encode_png(self.source.lr_of(row)[:height, :width]), off

    def listings(self, pair: dict[str, Any]) -> dict[str, str]:
        """BasicSR's two forms: lines `NAME (height,width,3)` of gt, and lines `gt/NAME, lq/NAME`."""
        file, folder = f"{pair['name']}.png", pair["folder"]
        return {
            f"{folder}meta_info.txt": f"{file} ({pair['height']},{pair['width']},3)\n",
            f"{folder}meta_info_pair.txt": f"gt/{file}, lq/{file}\n",
        }


class RealSR:
    """A folder for each label, as `capture.scenes` reads it.

    Each draw goes to the label with the nearest scale. Scene n of a photograph has the n-th nearest draw of each label.
    So a scene has several labels, and no draw is lost.
    """

    def __init__(self, source: FinishedDataset, labels: dict[str, float], tolerance: float | None):
        self.source, self.labels, self.tolerance = source, labels, tolerance
        if self.labels:
            return
        self.labels = {f"{scale:g}": scale for scale in scales_in(source.recipe) if scale != 1}
        if self.tolerance is None:
            self.tolerance = _EQUAL  # leaves out draws at scale 1, which has no label
        if not self.labels:
            raise ValueError(
                f"labels={{}}: {source.uri} has scales {_scales_in_words(source.recipe)}; give each label its "
                "scale, as labels='{2: 2.0, 3: 3.0, 4: 4.0}'"
            )

    def pairs(self, rows: Sequence[dict[str, Any]]) -> list[Pair]:
        """One pair for each row within the tolerance and not too small for `capture.scenes`."""
        found: dict[str, list[tuple[float, int]]] = {}
        for place, row in enumerate(rows):
            away, label = min((abs(row["scale"] - scale), label) for label, scale in self.labels.items())
            readable = min(row["height"], row["width"]) >= images.SMALLEST_SIDE
            if readable and (self.tolerance is None or away <= self.tolerance):
                found.setdefault(label, []).append((away, place))
        hr = _hr_png(self.source, rows[0]) if found else b""
        pairs = []
        for label, draws in found.items():
            for number, (_, place) in enumerate(sorted(draws)):
                row, name = rows[place], file_name(rows[place]["key"], number)
                files = {f"{label}/{name}_HR.png": hr, f"{label}/{name}_LR{label}.png": _lr_png(self.source, row)}
                pairs.append(Pair(_info(row, name) | {"label": label}, files))
        return pairs


class WebDataset:
    """Members of a tar, NAME.hr.png, NAME.lr.png and NAME.json."""

    def __init__(self, source: FinishedDataset):
        self.source = source

    def pairs(self, rows: Sequence[dict[str, Any]]) -> list[Pair]:
        """One pair for each row."""
        hr, pairs = _hr_png(self.source, rows[0]), []
        for row in rows:
            name = file_name(row["key"], row["draw"])
            about = {key: value for key, value in row.items() if key not in ("lr", "hr")}
            files = {"hr.png": hr, "lr.png": _lr_png(self.source, row), "json": json.dumps(about).encode()}
            pairs.append(Pair(_info(row, name), {f"{name}.{suffix}": data for suffix, data in files.items()}))
        return pairs


def file_name(key: str, number: int) -> str:
    """The name, without suffix, of a pair's files: at most 84 characters of A-Z a-z 0-9 _ -.

    A short lower-case key stays readable: "2024/img-1.png" becomes "2024--img-1_png_0". Any other key (long, or with
    capitals, spaces, dots, ...) becomes some of its characters and 128 bits of its digest. Different rows have
    different names, even if a file system ignores case: before the number, names of the first kind end in an image's
    suffix, and names of the second kind in 32 hexadecimal digits.

    Args:
        key: any text.
        number: of the draw or scene, from 0.
    """
    if _PLAIN_KEY.fullmatch(key):
        stem, _, suffix = key.rpartition(".")
        return f"{stem.replace('/', '--')}_{suffix}_{number}"
    shown = re.sub(r"[^A-Za-z0-9]+", "_", key.rpartition("/")[2]).strip("_")[:32]
    return f"{shown or 'image'}-{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}_{number}"


def _info(row: dict[str, Any], name: str) -> dict[str, Any]:
    return {"name": name} | {field: row[field] for field in ("key", "draw", "scale", "time")}


def _hr_png(source: FinishedDataset, row: dict[str, Any]) -> bytes:
    data = row["hr"]["bytes"]
    return data if data and images.is_png(data) else images.encode_png(source.hr_of(row))


def _lr_png(source: FinishedDataset, row: dict[str, Any]) -> bytes:
    data = row["lr"]["bytes"]
    return data if images.is_png(data) else images.encode_png(source.lr_of(row))


def _size_of(png: bytes) -> tuple[int, int]:
    """Height and width."""
    width, height = struct.unpack(">II", png[16:24])
    return height, width
