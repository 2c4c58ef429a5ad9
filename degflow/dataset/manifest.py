"""From the finished shards to what describes them: which are done, rejects/ and manifest.parquet."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from functools import partial
from itertools import chain
from typing import NamedTuple

import pyarrow as pa

from degflow.dataset.footer import read_footer
from degflow.dataset.layout import (
    DATA,
    MANIFEST,
    MANIFEST_ROW,
    PART,
    REJECT,
    REJECTS,
    Record,
    Reject,
    number_of,
    part_name,
    read_table,
    serialise,
)
from degflow.dataset.plan import Plan
from degflow.storage import Place, Source

GONE = Record("", 0, 0, 0, "", "", 0.0, None, None, None)  # of a part that was deleted since it was listed
_THREADS, _PROCESSES = 16, 4
_CHUNK = 1000  # parts that a process reads at a time
_REJECTS_PART = part_name(REJECTS, 0)


class Shards(NamedTuple):
    """The records of the shards that are done, and the data parts that are foreign: of another recipe, or damaged."""

    done: dict[int, Record]
    foreign: list[Source]


def data_files(output: Place) -> list[Source]:
    """The data parts that are there. List them before the plan is read; see `layout`."""
    return [file for file in output.files(DATA) if PART.fullmatch(file.key)]


def judge(
    output: Place,
    files: Sequence[Source],
    plan: Plan,
    recipe: Callable[[Sequence[Source]], str],
    known: Mapping[int, Record] | None = None,
    processes: bool = True,
) -> Shards:
    """Read the ends of data parts, to tell which shards are done.

    Args:
        output: the dataset.
        files: see `data_files`.
        plan: which shards there are.
        recipe: the digest of a shard with these planned files.
        known: records of shards that were done before; their parts are not read again.
        processes: many parts of a store are read by several processes, as each request takes some 2 ms of a CPU; they
            import the caller's script again, which a user's may not be made for.
    """
    known, shards, unread = known or {}, Shards({}, []), []
    for file in files:
        number = number_of(file.key)
        if number in known and known[number].bytes == file.size:
            shards.done[number] = known[number]
        elif 0 <= number < len(plan):
            unread.append(file)
        else:
            shards.foreign.append(file)
    records = _read_by_processes(output, unread) if processes else read_records(output.uri, unread)
    for file, record in zip(unread, records, strict=True):
        number = number_of(file.key)
        if record and record.recipe == recipe(plan[number]):
            shards.done[number] = record
        elif record != GONE:  # another driver has deleted it meanwhile
            shards.foreign.append(file)
    return shards


def read_records(uri: str, files: Sequence[Source]) -> list[Record | None]:
    """The record of each part of an output; None if it is damaged or of no job, `GONE` if it is not there any more."""
    output = Place(uri)

    def look(file: Source) -> Record | None:
        try:
            footer = read_footer(output, file.key, file.size)
        except FileNotFoundError:
            return GONE
        return footer.record if footer else None

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(look, files))


def _read_by_processes(output: Place, files: Sequence[Source]) -> list[Record | None]:
    """`read_records`; of many parts of a store by several processes."""
    chunks = [files[first : first + _CHUNK] for first in range(0, len(files), _CHUNK)]
    if len(chunks) > 1 and output.is_object_store:  # which processes reach by the environment alone
        count = min(len(chunks), len(os.sched_getaffinity(0)), _PROCESSES)
        try:
            with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
                return list(chain.from_iterable(pool.map(partial(read_records, output.uri), chunks)))
        except BrokenProcessPool:  # e.g. of a script that may not be imported; threads can do it too
            pass
    return read_records(output.uri, files)


def rejects_of(output: Place, records: Mapping[int, Record], newest: Mapping[str, int]) -> Iterator[Reject]:
    """The rejects of these shards, in the plan's order, without those of a key whose newest shard is another one."""
    for number, reject in _all_rejects(output, records):
        if newest.get(reject.key, number) == number:
            yield reject


def _all_rejects(output: Place, records: Mapping[int, Record]) -> Iterator[tuple[int, Reject]]:
    numbers = [number for number in sorted(records) if records[number].rejects]
    with ThreadPoolExecutor(_THREADS) as pool:
        footers = pool.map(lambda number: read_footer(output, records[number].part, records[number].bytes), numbers)
        for number, footer in zip(numbers, footers, strict=True):
            if footer is None:
                raise OSError(f"{output.uri_of(records[number].part)}: was replaced or damaged by another process")
            yield from ((number, reject) for reject in footer.rejects)


def write_rejects(output: Place, plan: Plan, records: Mapping[int, Record]) -> None:
    """Write the one file of `rejects/`: all rejects that no newer finished shard has tried again."""
    rows = [reject._asdict() for reject in rejects_of(output, records, plan.newest(records))]
    output.write(_REJECTS_PART, serialise(pa.Table.from_pylist(rows, schema=REJECT)))


def first_rejects(output: Place, count: int) -> list[Reject]:
    """The first rows of `rejects/`."""
    return [Reject(**row) for row in read_table(output, _REJECTS_PART).slice(0, count).to_pylist()]


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
