"""The layout of a synthesized dataset: names of its objects, their schemas, and what makes a shard done.

    OUTPUT/config.yaml  plan/part-000000.parquet ...  data/part-000000.parquet ...  rejects/part-000000.parquet ...
           manifest.parquet  README.md  preview.png  _SUCCESS

A shard is planned before any work starts and never changes. It ends in two objects of its own number, each put whole:
first `rejects/`, whose schema metadata is the shard's `Record` (rows, bytes and sha256 of the data part, statistics),
then `data/`, whose bytes depend on the images alone. A shard is done when both are there and the data part has the
size that the record says, for the recipe (configuration and files) that is wanted now; so a restart needs no state but
these objects. Data is put only where there is none yet: of two drivers on one output the second finds the first's
shard, the same to the byte, and leaves it.

The plan grows by parts: `extend` and `retry_rejects` append one, with shards of new numbers. A key is planned again
only after a shard rejected it, and the newest shard that names it decides.
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from itertools import islice
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from degflow.listing import SOURCE
from degflow.storage import Place, Source

pc: Any = pyarrow.compute  # its functions are made at import, unseen by type checkers

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
Part: TypeAlias = pa.Table  # of PLAN_ROW
PLAN_ROW = pa.schema([("shard", pa.int32()), ("key", pa.string()), ("size", pa.int64()), ("etag", pa.string())])


class Reject(NamedTuple):
    """A file that gave no rows: where it stopped (read, decode, degrade or encode), why, and after how many tries."""

    key: str
    stage: str
    error: str
    attempts: int = 1


@dataclass(frozen=True)
class Record:
    """A finished shard, one row of the manifest.

    `recipe` is the digest of the configuration and of the planned files that it was made from. `seconds` is the time
    from its first read to its last write. `psnr` (HR against LR, in dB, at most 99), `clipped` (share of LR values at 0
    or 255) and `colour_shift` (distance of the mean colours, in levels of 255) are means over its rows, before any
    resize, and null without rows.
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


_MANIFEST_ROW = pa.schema(
    [
        *[
            (field.name, {str: pa.string(), int: pa.int64()}.get(field.type, pa.float64()))  # pyright: ignore[reportArgumentType, reportCallIssue]
            for field in fields(Record)
        ],
        ("retried", pa.int64()),  # of the rejects, those that a newer shard takes again
    ]
)


class Plan:
    """Which files each shard takes: shards are numbered from 0, and a shard's files are in the order of their keys.

    Args:
        table: of PLAN_ROW, in the order of the shards.
        parts: how many objects hold it.
    """

    def __init__(self, table: pa.Table, parts: int):
        self.table, self.parts = table.combine_chunks(), parts
        shards = self.table["shard"].to_numpy()
        count = int(shards[-1]) + 1 if len(shards) else 0
        self.offsets = np.searchsorted(shards, np.arange(count + 1))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, number: int) -> list[Source]:
        first, end = self.offsets[number], self.offsets[number + 1]
        rows = self.table.select(SOURCE.names).slice(first, end - first)
        return [Source(*row) for row in zip(*(column.to_pylist() for column in rows.columns), strict=True)]

    def task(self, number: int) -> pa.Table:
        """One row: the shard's number and its files, as lists."""
        first, end = self.offsets[number], self.offsets[number + 1]
        rows = self.table.select(SOURCE.names).slice(first, end - first).to_struct_array()
        whole = pa.concat_arrays(rows.chunks)
        return pa.table({"shard": [number], "sources": pa.ListArray.from_arrays([0, len(whole)], whole)})

    @property
    def files(self) -> int:
        """Files named, however often."""
        return pc.count_distinct(self.table["key"]).as_py()

    @property
    def bytes(self) -> int:
        """Their sizes together, as far as these are known."""
        return pc.sum(pc.max_element_wise(self.table["size"], 0)).as_py() or 0

    def images(self, numbers: Iterable[int]) -> int:
        """How many files these shards name."""
        return sum(int(self.offsets[n + 1] - self.offsets[n]) for n in numbers)

    def newest(self) -> dict[str, int]:
        """The deciding shard of every key that is planned more than once."""
        counts = pc.value_counts(self.table["key"])
        repeated = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
        again = self.table.filter(pc.is_in(self.table["key"], repeated))
        return dict(zip(again["key"].to_pylist(), again["shard"].to_pylist(), strict=True))

    def sample(self, count: int) -> list[Source]:
        """Up to so many files, spread evenly over the plan."""
        places = np.unique(np.linspace(0, len(self.table) - 1, count).round().astype(int)) if len(self.table) else []
        rows = self.table.select(SOURCE.names).take(pa.array(places, pa.int64()))
        return [Source(*row.values()) for row in rows.to_pylist()]

    def next_part(self, sources: pa.Table, images: int) -> Part:
        """These files (a table of SOURCE) in new shards of at most so many images."""
        shards = np.arange(len(sources), dtype=np.int32) // images + len(self)
        return sources.add_column(0, PLAN_ROW.field("shard"), pa.array(shards, pa.int32())).cast(PLAN_ROW)

    def plus(self, part: Part) -> "Plan":
        """The plan with a part more."""
        return Plan(pa.concat_tables([self.table, part]), self.parts + 1)

    @classmethod
    def empty(cls) -> "Plan":
        """A plan of nothing."""
        return cls(PLAN_ROW.empty_table(), 0)


def part_name(folder: str, number: int) -> str:
    """Name of a plan part or of a shard's data or rejects, e.g. "data/part-000012.parquet"."""
    return f"{folder}/part-{number:06d}.parquet"


def layout(output: Place) -> list[str]:
    """Every object of this layout that is there, in the order to delete them; leftovers of killed writes included.

    So that what a kill leaves is still this job's: _SUCCESS goes first, the newest parts before older ones, and the
    configuration last.
    """
    names = [file.key for file in output.files() if _is_ours(file.key) or is_leftover(file.key)]
    names.sort(reverse=True)
    return sorted(names, key=lambda name: (name != SUCCESS, name == CONFIG))


def is_leftover(name: str) -> bool:
    """Whether this is the hidden file of a local write that was killed before it was renamed into place."""
    match = _LEFTOVER.fullmatch(name)
    return bool(match) and _is_ours("".join(match.groups()))


def _is_ours(name: str) -> bool:
    return name in _TOP or bool(_PART.fullmatch(name))


def joined(first: Part | None, second: Part) -> Part:
    """Two parts, numbered one after the other, as one."""
    return second if first is None else pa.concat_tables([first, second])


def write_part(output: Place, number: int, part: Part) -> bool:
    """Write a part of the plan; False, and nothing written, when there is one of its number already."""
    return output.write(part_name(PLAN, number), _serialise(part), new=True)


def read_plan(output: Place) -> Plan:
    """The plan; of nothing when nothing is planned yet."""
    tables = [_read(output, file.key).cast(PLAN_ROW) for file in output.files(PLAN) if _PART.fullmatch(file.key)]
    return Plan(pa.concat_tables(tables), len(tables)) if tables else Plan.empty()


def count_parts(output: Place) -> int:
    """How many parts the plan has."""
    return sum(bool(_PART.fullmatch(file.key)) for file in output.files(PLAN))


def parts_in_manifest(output: Place) -> int:
    """How many shards the manifest lists; 0 where there is none."""
    try:
        return len(_read(output, MANIFEST))
    except FileNotFoundError:
        return 0


class ShardWriter:
    """Collects a shard's rows in a temporary local file, and puts its two objects at the end.

    Memory holds one row group at a time. Use it as a context manager: the temporary file goes with it.
    """

    def __init__(self, output: Place, number: int, recipe: str):
        self.output, self.number, self.recipe = output, number, recipe
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
        """Put the rejects with the record, then the data: from then on the shard is done.

        One that another driver has put meanwhile, by the same recipe, stays as it is; its record is returned.
        """
        found = _record(self.output, self.number)
        if found and found.recipe == self.recipe and _size_there(self.output, found.part) == found.bytes:
            return found
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
            recipe=self.recipe,
            seconds=seconds,
            psnr=psnr,
            clipped=clipped,
            colour_shift=colour_shift,
        )
        schema = REJECT.with_metadata({"degflow": json.dumps(asdict(record))})
        rejects = pa.Table.from_pylist([reject._asdict() for reject in self._rejects], schema=schema)
        self.output.write(part_name(REJECTS, self.number), _serialise(rejects))
        spool = f"/dev/fd/{self._spool.fileno()}"
        if not self.output.upload(spool, record.part, new=True) and self.output.sha256(record.part) != digest:
            self.output.upload(spool, record.part)  # what is there is no shard of this recipe, or cut short
        return record


def _size_there(output: Place, part: str) -> int:
    try:
        return output.source(part).size
    except FileNotFoundError:
        return -1


def finished(output: Place, plan: Plan, recipe: Callable[[Sequence[Source]], str]) -> dict[int, Record]:
    """The records of the shards that are done; `recipe` gives what a shard of these files would be made from now."""
    data = {file.key: file.size for file in output.files(DATA)}
    rejects = {file.key for file in output.files(REJECTS)}
    there = [n for n in range(len(plan)) if part_name(DATA, n) in data and part_name(REJECTS, n) in rejects]
    with ThreadPoolExecutor(16) as pool:
        records = zip(there, pool.map(lambda number: _record(output, number), there), strict=True)
        return {
            number: record
            for number, record in records
            if record and record.bytes == data[record.part] and record.recipe == recipe(plan[number])
        }


def _record(output: Place, number: int) -> Record | None:
    try:
        table = _read(output, part_name(REJECTS, number))
        return Record(**json.loads((table.schema.metadata or {})[b"degflow"]))
    except (FileNotFoundError, pa.ArrowInvalid, KeyError, TypeError, ValueError):
        return None


def rejects_of(output: Place, plan: Plan, records: Mapping[int, Record]) -> Iterator[Reject]:
    """The rejects that stand, in the plan's order: those whose key no newer shard takes again."""
    newest = plan.newest()
    for number, reject in _all_rejects(output, records):
        if newest.get(reject.key, number) == number:
            yield reject


def _all_rejects(output: Place, records: Mapping[int, Record]) -> Iterator[tuple[int, Reject]]:
    for number in sorted(records):
        if records[number].rejects:
            rows = _read(output, part_name(REJECTS, number)).to_pylist()
            yield from ((number, Reject(**row)) for row in rows)


def write_manifest(output: Place, plan: Plan, records: Mapping[int, Record]) -> None:
    """Write one row per shard: what consumers read through."""
    newest, retried = plan.newest(), dict.fromkeys(records, 0)
    if newest:
        for number, reject in _all_rejects(output, records):
            retried[number] += newest.get(reject.key, number) != number
    rows = [asdict(records[number]) | {"retried": retried[number]} for number in sorted(records)]
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
