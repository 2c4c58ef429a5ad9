"""The layout of a synthesized dataset: names of its objects and their schemas.

    OUTPUT/config.yaml  plan/part-000000.parquet ...  data/part-000000.parquet ...  rejects/part-000000.parquet
           manifest.parquet  README.md  croissant.json  preview.png  preview.html  _SUCCESS

A shard is planned before any work starts, and its plan never changes. A finished shard is one object with its number in
`data/`: its rows, and in its footer its rejects and its record (`footer`). The object is put once and whole, only where
there is none. So the first writer wins, nothing is ever overwritten, and the shard is done as soon as the object is
there. Its bytes may depend on the writer (its GPU, its threads, a read that failed), and nothing relies on them: all
else follows from the objects that are there.

- Resuming: the ends of the objects in `data/` say which shards are done. A restart needs no other state.
- Two drivers: both may make a shard. One of them puts it. The other finds an object of the same recipe (configuration
  and planned files), and its record counts.
- `rejects/`, `manifest.parquet`, the card and `_SUCCESS` are written by the driver, at the end, from the footers. Two
  drivers write the same manifest, and a writer that is late changes nothing that it describes.
- `overwrite=true` deletes `_SUCCESS` and the plan, stores the new configuration, and then deletes the rest. A writer of
  the overwritten run looks at the configuration before it puts, and so gives up. It can be late only if it looked
  before the new configuration and puts after the deletion. Then its object has another recipe, or a number that is not
  planned. If it takes a name of the new run, that run's writer fails, and the shard stays pending.
- Such a foreign object, or a damaged one, is deleted by the driver alone: when it claims the output, and before it
  finishes. It looks at the object once more just before, for another driver may have replaced it. While `_SUCCESS` is
  there nothing is deleted: the run stops, and names the object.
- `extend` and `retry_rejects` add a part to the plan, with shards of new numbers, and delete `_SUCCESS` before. Objects
  are listed before the plan is read, so an object of a shard that was just planned is never taken for a foreign one. A
  key is planned again only if a shard has rejected it. The newest shard of a key counts.
- A store without a conditional put keeps all this only for one driver at a time.
"""

import json
import re
from dataclasses import dataclass, fields
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from degflow.storage import Place

CONFIG, PLAN, DATA, REJECTS = "config.yaml", "plan", "data", "rejects"
MANIFEST, CARD, CROISSANT, SUCCESS = "manifest.parquet", "README.md", "croissant.json", "_SUCCESS"
EXPORT = "export.yaml"  # in the folder of an export, which has _SUCCESS too
PREVIEW, GALLERY = "preview.png", "preview.html"
_TOP = (CONFIG, MANIFEST, CARD, CROISSANT, PREVIEW, GALLERY, SUCCESS)
PART = re.compile(r"(plan|data|rejects)/part-(\d{6,})\.parquet")
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
    """A file without rows: the stage that failed (read, decode, degrade or encode), the reason, and the attempts.

    In a shard that was made again, stage "plan" means that a newer shard has the file; `rejects/` leaves it out.
    """

    key: str
    stage: str
    error: str
    attempts: int = 1


@dataclass(frozen=True)
class Record:
    """A finished shard; one row of the manifest.

    `bytes` is the size of its part, and `sha256` the digest of the part's bytes before its footer. `recipe` is the
    digest of its configuration and planned files. `seconds` is the actor's time until its last row; where the end
    of one shard and the beginning of the next overlap, it is counted once. Three statistics are means over its
    rows, before any resize, and null without rows: `psnr` (LR against HR, in dB, at most 99), `clipped` (share of
    LR values at 0 or 255) and `colour_shift` (distance of the mean colours, in levels of 255).
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


def number_of(name: str) -> int:
    """The number in the name of a part; -1 if it is no such name."""
    match = PART.fullmatch(name)
    return int(match[2]) if match and name == part_name(match[1], int(match[2])) else -1


def find_objects(output: Place) -> list[str]:
    """The objects of this layout and the leftovers of killed writes, in the order to delete them.

    _SUCCESS comes first, and newer parts before older ones.
    """
    names = [file.key for file in output.files() if _is_ours(file.key) or is_leftover(file.key)]
    return sorted(sorted(names, reverse=True), key=lambda name: name != SUCCESS)


def is_doomed_first(name: str) -> bool:
    """Whether overwriting deletes this object before it stores the new configuration: `_SUCCESS` and the plan."""
    return name == SUCCESS or name.startswith(f"{PLAN}/")


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
