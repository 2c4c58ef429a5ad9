"""The records of finished shards: which shards are done, which files are rejected, and manifest.parquet."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pyarrow as pa

from degflow.dataset.layout import (
    DATA,
    MANIFEST,
    MANIFEST_ROW,
    REJECTS,
    Record,
    Reject,
    part_name,
    read_table,
    serialise,
)
from degflow.dataset.plan import Plan
from degflow.storage import Place, Source


def finished_shards(output: Place, plan: Plan, recipe: Callable[[Sequence[Source]], str]) -> dict[int, Record]:
    """The records of the shards that are done; `recipe` gives the digest of a shard with these files."""
    data = {file.key: file.size for file in output.files(DATA)}
    rejects = {file.key for file in output.files(REJECTS)}
    there = [n for n in range(len(plan)) if part_name(DATA, n) in data and part_name(REJECTS, n) in rejects]
    with ThreadPoolExecutor(16) as pool:
        records = zip(there, pool.map(lambda number: read_record(output, number), there), strict=True)
        return {
            number: record
            for number, record in records
            if record and record.bytes == data[record.part] and record.recipe == recipe(plan[number])
        }


def read_record(output: Place, number: int) -> Record | None:
    """The record of a shard; None if it is missing or damaged."""
    try:
        table = read_table(output, part_name(REJECTS, number))
        return Record(**json.loads((table.schema.metadata or {})[b"degflow"]))
    except (FileNotFoundError, pa.ArrowInvalid, KeyError, TypeError, ValueError):
        return None


def rejects_of(output: Place, plan: Plan, records: Mapping[int, Record]) -> Iterator[Reject]:
    """The rejects that no newer shard has tried again, in the order of the plan."""
    newest = plan.newest()
    for number, reject in _all_rejects(output, records):
        if newest.get(reject.key, number) == number:
            yield reject


def _all_rejects(output: Place, records: Mapping[int, Record]) -> Iterator[tuple[int, Reject]]:
    for number in sorted(records):
        if records[number].rejects:
            rows = read_table(output, part_name(REJECTS, number)).to_pylist()
            yield from ((number, Reject(**row)) for row in rows)


def write_manifest(output: Place, plan: Plan, records: Mapping[int, Record]) -> None:
    """Write manifest.parquet, which has a row for each shard; consumers read the dataset through it."""
    newest, retried = plan.newest(), dict.fromkeys(records, 0)
    if newest:
        for number, reject in _all_rejects(output, records):
            retried[number] += newest.get(reject.key, number) != number
    rows = [asdict(records[number]) | {"retried": retried[number]} for number in sorted(records)]
    output.write(MANIFEST, serialise(pa.Table.from_pylist(rows, schema=MANIFEST_ROW)))


def parts_in_manifest(output: Place) -> int:
    """Number of shards in the manifest; 0 without a manifest."""
    try:
        return len(read_table(output, MANIFEST))
    except FileNotFoundError:
        return 0
