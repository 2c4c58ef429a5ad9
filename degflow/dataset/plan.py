"""The plan: which photographs each shard has. It is written before any work starts; later it may only grow."""

import functools
from collections.abc import Container, Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute

from degflow.dataset.layout import PART, PLAN, PLAN_ROW, SOURCE, part_name, read_table, serialise
from degflow.storage import Place, Source

pc: Any = pyarrow.compute  # its functions are made at import, where type checkers do not see them
Part: TypeAlias = pa.Table  # of PLAN_ROW


class Plan:
    """The files of each shard. Shards are numbered from 0; a shard's files are sorted by key.

    Args:
        table: of PLAN_ROW, sorted by shard.
        parts: number of objects in `plan/`.
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

    def task(self, number: int, **more: bool) -> pa.Table:
        """A table of one row: the shard's number, its files as a list, the keys in `elsewhere`, and what is more."""
        first, end = self.offsets[number], self.offsets[number + 1]
        rows = self.table.select(SOURCE.names).slice(first, end - first).to_struct_array()
        whole = pa.concat_arrays(rows.chunks)
        files = pa.ListArray.from_arrays([0, len(whole)], whole)
        keys = pa.array([self.elsewhere(number)], pa.list_(pa.string()))
        return pa.table(
            {"shard": [number], "sources": files, "elsewhere": keys} | {name: [value] for name, value in more.items()}
        )

    def elsewhere(self, number: int) -> list[str]:
        """The shard's keys that a newer shard has: a shard that is made again leaves them to that one."""
        if not self._newest:
            return []
        return [source.key for source in self[number] if self._newest.get(source.key, number) != number]

    @functools.cached_property
    def _newest(self) -> dict[str, int]:
        return self.newest()

    @property
    def files(self) -> int:
        """Number of different files."""
        return pc.count_distinct(self.table["key"]).as_py() if self.parts > 1 else len(self.table)

    @property
    def bytes(self) -> int:
        """Sum of the known sizes."""
        return pc.sum(pc.max_element_wise(self.table["size"], 0)).as_py() or 0

    def images(self, numbers: Iterable[int]) -> int:
        """Number of files in these shards."""
        return sum(int(self.offsets[n + 1] - self.offsets[n]) for n in numbers)

    def newest(self, among: Container[int] | None = None) -> dict[str, int]:
        """The newest shard (of those in `among`, unless None) of every key that is planned more than once.

        A part names each file once, so of a plan of one part there is none. Counting keys takes a GB for 10 million.
        """
        if self.parts <= 1:
            return {}
        counts = pc.value_counts(self.table["key"])
        repeated = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
        again = self.table.filter(pc.is_in(self.table["key"], repeated))
        pairs = zip(again["key"].to_pylist(), again["shard"].to_pylist(), strict=True)
        return {key: shard for key, shard in pairs if among is None or shard in among}

    def sources(self, keys: Iterable[str]) -> list[Source]:
        """These files as they were planned last, sorted by key."""
        wanted = sorted(set(keys))
        rows = self.table.select(SOURCE.names).filter(pc.is_in(self.table["key"], pa.array(wanted, pa.string())))
        planned = {row["key"]: Source(*row.values()) for row in rows.to_pylist()}
        return [planned[key] for key in wanted]

    def sample(self, count: int) -> list[Source]:
        """At most `count` files, at even distances in the plan."""
        places = np.unique(np.linspace(0, len(self.table) - 1, count).round().astype(int)) if len(self.table) else []
        rows = self.table.select(SOURCE.names).take(pa.array(places, pa.int64()))
        return [Source(*row.values()) for row in rows.to_pylist()]

    def largest(self, numbers: Sequence[int]) -> Source | None:
        """The file of most bytes in these shards, if there is any whose size is known."""
        rows = self.table.filter(pc.is_in(self.table["shard"], pa.array(numbers, pa.int32())))
        most = pc.max(rows["size"]).as_py()
        if most is None or most < 0:
            return None
        row = rows.select(SOURCE.names).slice(pc.index(rows["size"], most).as_py(), 1).to_pylist()[0]
        return Source(*row.values())

    def next_part(self, sources: pa.Table, images: int, sizes: np.ndarray | None = None, most: int = 0) -> Part:
        """A part with these files, in new shards.

        Args:
            sources: a table of SOURCE.
            images: a shard has at most so many files.
            sizes: int64 "N", what each file counts; None: shards are cut by the number of files alone.
            most: a shard's files count at most so much together, if it has more than one file.
        """
        shards = _cut(images, sizes, most) if sizes is not None else np.arange(len(sources), dtype=np.int32) // images
        column = pa.array(shards + np.int32(len(self)), pa.int32())
        return sources.add_column(0, PLAN_ROW.field("shard"), column).cast(PLAN_ROW)

    def plus(self, part: Part) -> "Plan":
        """The plan with one more part."""
        return Plan(pa.concat_tables([self.table, part]) if len(self.table) else part, self.parts + 1)

    @classmethod
    def empty(cls) -> "Plan":
        """A plan without files."""
        return cls(PLAN_ROW.empty_table(), 0)


def _cut(images: int, sizes: np.ndarray, most: int) -> np.ndarray:
    """The number of each file's shard, int32 "N", from 0; see `Plan.next_part`."""
    ends, before, first, counts = sizes.cumsum(), 0, 0, []
    while first < len(sizes):  # once for each shard, not for each file
        fitting = ends[first : first + images].searchsorted(before + most, "right")
        counts.append(max(1, int(fitting)))
        first += counts[-1]
        before = int(ends[first - 1])
    return np.repeat(np.arange(len(counts), dtype=np.int32), counts)


def joined(first: Part | None, second: Part) -> Part:
    """One part of two, the second numbered after the first."""
    return second if first is None else pa.concat_tables([first, second])


def write_part(output: Place, number: int, part: Part) -> bool:
    """Write a part of the plan; False, with nothing written, if a part of this number exists."""
    return output.write(part_name(PLAN, number), serialise(part), new=True)


def plan_files(output: Place) -> list[Source]:
    """The parts of the plan."""
    return [file for file in output.files(PLAN) if PART.fullmatch(file.key)]


def read_plan(output: Place, files: Sequence[Source], shards: Sequence[int] | None = None) -> Plan:
    """The plan in these files (see `plan_files`), of all shards or of some; without files nothing is planned."""
    tables = [read_table(output, file.key).cast(PLAN_ROW) for file in files]
    if shards is not None:
        tables = [table.filter(pc.is_in(table["shard"], pa.array(shards, pa.int32()))) for table in tables]
    return Plan(pa.concat_tables(tables), len(tables)) if tables else Plan.empty()
