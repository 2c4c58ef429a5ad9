"""The layout of a synthesized dataset: names of its objects and their schemas.

    OUTPUT/config.yaml  plan/part-000000.parquet ...  data/part-000000.parquet ...  rejects/part-000000.parquet ...
           manifest.parquet  README.md  preview.png  preview.html  _SUCCESS

A shard is planned before any work starts, and its plan never changes. A finished shard has two objects with its
number, each written as a whole. The first is in `rejects/`: its schema metadata is the shard's `Record` (rows, bytes
and sha256 of the data part, statistics). The second is in `data/`: its bytes depend on the images alone. A shard is
done when both exist, the data part has the size in the record, and the record's recipe (configuration and files) is
that of the run. So a restart needs no other state than these objects. A data part never replaces one of the same
recipe: if two drivers work on one output, the second one finds the first one's shard, equal to the byte, and keeps it.

`extend` and `retry_rejects` add a part to the plan, with shards of new numbers. A key is planned again only if a shard
has rejected it. The newest shard of a key counts.
"""

import json
import re
from dataclasses import dataclass, fields
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from degflow.storage import Place

CONFIG, PLAN, DATA, REJECTS = "config.yaml", "plan", "data", "rejects"
MANIFEST, CARD, SUCCESS = "manifest.parquet", "README.md", "_SUCCESS"
PREVIEW, GALLERY = "preview.png", "preview.html"
_TOP = (CONFIG, MANIFEST, CARD, PREVIEW, GALLERY, SUCCESS)
PART = re.compile(r"(plan|data|rejects)/part-\d{6,}\.parquet")
_LEFTOVER = re.compile(r"((?:plan/|data/|rejects/)?)\.(.+)\.[0-9a-f]{32}")

SOURCE = pa.schema([("key", pa.string()), ("size", pa.int64()), ("etag", pa.string())])
PLAN_ROW = pa.schema([("shard", pa.int32()), *SOURCE])
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_ROW_FIELDS = {
    "key": pa.string(),
    "draw": pa.int32(),
    "scale": pa.float64(),
    "time": pa.float64(),
    "lr": _IMAGE,
    "hr": _IMAGE,
    "height": pa.int32(),
    "width": pa.int32(),
    "hr_sha256": pa.string(),
    "seed": pa.int64(),
    "noise_seed": pa.int64(),
    "model_sha256": pa.string(),
}
_FEATURES = {
    name: {"_type": "Image"} if kind == _IMAGE else {"_type": "Value", "dtype": str(kind).replace("double", "float64")}
    for name, kind in _ROW_FIELDS.items()
}
ROW = pa.schema(list(_ROW_FIELDS.items()), {"huggingface": json.dumps({"info": {"features": _FEATURES}})})
REJECT = pa.schema([("key", pa.string()), ("stage", pa.string()), ("error", pa.string()), ("attempts", pa.int32())])


class Reject(NamedTuple):
    """A file without rows: the stage that failed (read, decode, degrade or encode), the reason, and the attempts."""

    key: str
    stage: str
    error: str
    attempts: int = 1


@dataclass(frozen=True)
class Record:
    """A finished shard; one row of the manifest.

    `recipe` is the digest of its configuration and planned files. `seconds` is the time from its first read to its last
    write. Three statistics are means over its rows, before any resize, and null without rows: `psnr` (LR against HR, in
    dB, at most 99), `clipped` (share of LR values at 0 or 255) and `colour_shift` (distance of the mean colours, in
    levels of 255).
    """

    part: str
    rows: int
    rejects: int
    bytes: int
    sha256: str
    recipe: str
    seconds: float
    psnr: float | None
    clipped: float | None
    colour_shift: float | None


MANIFEST_ROW = pa.schema(
    [
        *[
            (field.name, {str: pa.string(), int: pa.int64()}.get(field.type, pa.float64()))  # pyright: ignore[reportArgumentType, reportCallIssue]
            for field in fields(Record)
        ],
        ("retried", pa.int64()),  # the rejects that a newer shard has tried again
    ]
)


def part_name(folder: str, number: int) -> str:
    """Name of a part in `plan/`, `data/` or `rejects/`, e.g. "data/part-000012.parquet"."""
    return f"{folder}/part-{number:06d}.parquet"


def find_objects(output: Place) -> list[str]:
    """The objects of this layout and the leftovers of killed writes, in the order to delete them.

    _SUCCESS comes first, newer parts before older ones, and the configuration last. So if deleting is interrupted, the
    rest is still known as an unfinished dataset.
    """
    names = [file.key for file in output.files() if _is_ours(file.key) or is_leftover(file.key)]
    names.sort(reverse=True)
    return sorted(names, key=lambda name: (name != SUCCESS, name == CONFIG))


def is_leftover(name: str) -> bool:
    """Whether this is the hidden file of a local write that was killed before it was renamed into place."""
    match = _LEFTOVER.fullmatch(name)
    return bool(match) and _is_ours("".join(match.groups()))


def _is_ours(name: str) -> bool:
    return name in _TOP or bool(PART.fullmatch(name))


def serialise(table: pa.Table) -> bytes:
    """A table as the bytes of a parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def read_table(place: Place, name: str) -> pa.Table:
    """Read a small parquet file whole."""
    return pq.read_table(pa.BufferReader(place.read(name)))
