"""The layout of a synthesized dataset: names of its objects, their schemas, and what makes a shard done.

    OUTPUT/config.yaml  plan/part-000000.parquet ...  data/part-000000.parquet ...  rejects/part-000000.parquet ...
           manifest.parquet  README.md  preview.png  _SUCCESS

A shard is planned before any work starts and never changes. It ends in two objects of its own number, each put whole:
first `rejects/`, whose schema metadata is the shard's `Record` (rows, bytes and sha256 of the data part, statistics),
then `data/`, whose bytes depend on the images alone. A shard is done when both are there and the data part has the
size that the record says; so a restart needs no state but these objects, and two drivers on one output do no harm.
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from itertools import islice
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from degflow.storage import Place, Source

CONFIG, PLAN, DATA, REJECTS = "config.yaml", "plan", "data", "rejects"
MANIFEST, CARD, PREVIEW, SUCCESS = "manifest.parquet", "README.md", "preview.png", "_SUCCESS"
ROW_GROUP_ROWS, ROW_GROUP_BYTES = 100, 64 << 20
_TOP = (CONFIG, MANIFEST, CARD, PREVIEW, SUCCESS)
_PART = re.compile(r"(plan|data|rejects)/part-\d{6,}\.parquet")
_LEFTOVER = re.compile(r"((?:plan/|data/|rejects/)?)\.(.+)\.[0-9a-f]{32}")

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
    "model_sha256": pa.string(),
}
_FEATURES = {
    name: {"_type": "Image"} if kind == _IMAGE else {"_type": "Value", "dtype": str(kind).replace("double", "float64")}
    for name, kind in _ROW_FIELDS.items()
}
ROW = pa.schema(list(_ROW_FIELDS.items()), {"huggingface": json.dumps({"info": {"features": _FEATURES}})})
REJECT = pa.schema([("key", pa.string()), ("stage", pa.string()), ("error", pa.string()), ("attempts", pa.int32())])
_PLAN_ROW = pa.schema([("shard", pa.int32()), ("key", pa.string()), ("size", pa.int64()), ("etag", pa.string())])


class Reject(NamedTuple):
    """A file that gave no rows: where it stopped (read, decode, degrade or encode), why, and after how many tries."""

    key: str
    stage: str
    error: str
    attempts: int = 1


@dataclass(frozen=True)
class Record:
    """A finished shard, one row of the manifest.

    `seconds` is the time from its first read to its last write. `psnr` (HR against LR, in dB, at most 99), `clipped`
    (share of LR values at 0 or 255) and `colour_shift` (distance of the mean colours, in levels of 255) are means over
    its rows, before any resize, and null without rows.
    """

    part: str
    rows: int
    rejects: int
    bytes: int
    sha256: str
    seconds: float
    psnr: float | None
    clipped: float | None
    colour_shift: float | None


_MANIFEST_ROW = pa.schema(
    [
        (field.name, {str: pa.string(), int: pa.int64()}.get(field.type, pa.float64()))  # pyright: ignore[reportArgumentType, reportCallIssue]
        for field in fields(Record)
    ]
)


def part_name(folder: str, number: int) -> str:
    """Name of a plan part or of a shard's data or rejects, e.g. "data/part-000012.parquet"."""
    return f"{folder}/part-{number:06d}.parquet"


def layout(output: Place) -> list[str]:
    """Every object of this layout that is there, in the order to delete them; leftovers of killed writes included."""
    names = [file.key for file in output.files() if _is_ours(file.key) or is_leftover(file.key)]
    return sorted(names, key=lambda name: (name != SUCCESS, name == CONFIG, name))


def is_leftover(name: str) -> bool:
    """Whether this is the hidden file of a local write that was killed before it was renamed into place."""
    match = _LEFTOVER.fullmatch(name)
    return bool(match) and _is_ours("".join(match.groups()))


def _is_ours(name: str) -> bool:
    return name in _TOP or bool(_PART.fullmatch(name))


def write_plan(output: Place, shards: Sequence[Sequence[Source]], *, part: int = 0, first: int = 0) -> None:
    """Write one part of the plan: its shards are numbered from `first`."""
    rows = [(number, *source) for number, shard in enumerate(shards, first) for source in shard]
    columns = [pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), _PLAN_ROW, strict=True)]
    output.write(part_name(PLAN, part), _serialise(pa.Table.from_arrays(columns, schema=_PLAN_ROW)))


def read_plan(output: Place) -> dict[int, list[Source]]:
    """Shard number -> its sources in order, over all parts; empty when nothing is planned yet."""
    shards: dict[int, list[Source]] = {}
    for file in output.files(PLAN):
        if _PART.fullmatch(file.key):
            table = _read(output, file.key)
            for shard, *source in zip(*(column.to_pylist() for column in table.columns), strict=True):
                shards.setdefault(shard, []).append(Source(*source))
    return shards


class ShardWriter:
    """Collects a shard's rows in a temporary local file, and puts its two objects at the end.

    Memory holds one row group at a time. Use it as a context manager: the temporary file goes with it.
    """

    def __init__(self, output: Place, number: int):
        self.output, self.number = output, number
        self._spool = tempfile.TemporaryFile()  # noqa: SIM115 (without a name: nothing to leave behind)
        # PNG does not compress any further; the other columns are a few bytes each.
        self._parquet = pq.ParquetWriter(self._spool, ROW, compression="none")
        self._buffer: list[dict[str, Any]] = []
        self._rejects: list[Reject] = []
        self._buffered = self._rows = 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._parquet.close()
        self._spool.close()

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append the rows of one image, keys as in `ROW`."""
        self._buffer += rows
        self._rows += len(rows)
        self._buffered += sum(len(row[name]["bytes"] or b"") for row in rows for name in ("lr", "hr"))
        if len(self._buffer) >= ROW_GROUP_ROWS or self._buffered >= ROW_GROUP_BYTES:
            self._flush()

    def reject(self, reject: Reject) -> None:
        """Note that an image gives no rows."""
        self._rejects.append(reject)

    def _flush(self) -> None:
        if self._buffer:
            self._parquet.write_table(pa.Table.from_pylist(self._buffer, schema=ROW))
        self._buffer, self._buffered = [], 0

    def finish(self, seconds: float, psnr: float | None, clipped: float | None, colour_shift: float | None) -> Record:
        """Put the rejects with the record, then the data: from then on the shard is done."""
        self._flush()
        self._parquet.close()
        size = self._spool.tell()
        self._spool.seek(0)
        digest = hashlib.file_digest(self._spool, "sha256").hexdigest()
        record = Record(
            part=part_name(DATA, self.number),
            rows=self._rows,
            rejects=len(self._rejects),
            bytes=size,
            sha256=digest,
            seconds=seconds,
            psnr=psnr,
            clipped=clipped,
            colour_shift=colour_shift,
        )
        schema = REJECT.with_metadata({"degflow": json.dumps(asdict(record))})
        rejects = pa.Table.from_pylist([reject._asdict() for reject in self._rejects], schema=schema)
        self.output.write(part_name(REJECTS, self.number), _serialise(rejects))
        self.output.upload(f"/dev/fd/{self._spool.fileno()}", record.part)
        return record


def finished(output: Place, shards: Iterable[int]) -> dict[int, Record]:
    """The records of the shards that are done."""
    data = {file.key: file.size for file in output.files(DATA)}
    rejects = {file.key for file in output.files(REJECTS)}
    there = [n for n in shards if part_name(DATA, n) in data and part_name(REJECTS, n) in rejects]
    with ThreadPoolExecutor(16) as pool:
        records = list(pool.map(lambda number: _record(output, number), there))
    return {n: record for n, record in zip(there, records, strict=True) if record and record.bytes == data[record.part]}


def _record(output: Place, number: int) -> Record | None:
    try:
        table = _read(output, part_name(REJECTS, number))
        return Record(**json.loads((table.schema.metadata or {})[b"degflow"]))
    except (FileNotFoundError, pa.ArrowInvalid, KeyError, TypeError, ValueError):
        return None


def rejects_of(output: Place, records: Mapping[int, Record]) -> Iterator[Reject]:
    """All rejects of finished shards, in the plan's order."""
    for number in sorted(records):
        if records[number].rejects:
            yield from (Reject(**row) for row in _read(output, part_name(REJECTS, number)).to_pylist())


def write_manifest(output: Place, records: Mapping[int, Record]) -> None:
    """Write one row per shard: what consumers read through."""
    rows = [asdict(records[number]) for number in sorted(records)]
    output.write(MANIFEST, _serialise(pa.Table.from_pylist(rows, schema=_MANIFEST_ROW)))


def read_rows(
    output: Place, part: str, columns: Sequence[str], keys: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Some columns of a data part, of all rows or of the images with these keys, reading no other row groups."""
    with output.open(part) as file:
        parquet = pq.ParquetFile(file)
        rows: list[dict[str, Any]] = []
        for group in range(parquet.num_row_groups):
            wanted = parquet.read_row_group(group, ["key"]).column("key").to_pylist()
            picked = [n for n, key in enumerate(wanted) if keys is None or key in keys]
            if picked:
                rows += parquet.read_row_group(group, list(columns)).take(picked).to_pylist()
    return rows


def sample_keys(output: Place, records: Mapping[int, Record], count: int) -> list[tuple[str, str]]:
    """Up to `count` images (part, key) of the first shards, spread evenly over the scales."""
    found: list[tuple[float, str, str]] = []
    for record in islice((records[n] for n in sorted(records) if records[n].rows), 4):
        rows = read_rows(output, record.part, ("key", "draw", "scale"))
        found += [(row["scale"], record.part, row["key"]) for row in rows if row["draw"] == 0]
    found.sort()
    spread = range(count) if len(found) > count else range(len(found))
    picked = [found[round(n * (len(found) - 1) / max(1, len(spread) - 1))] for n in spread]
    return [(part, key) for _, part, key in picked]


def _serialise(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def _read(place: Place, name: str) -> pa.Table:
    return pq.read_table(pa.BufferReader(place.read(name)))
