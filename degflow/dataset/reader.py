"""The rows of a dataset: of a finished one through its manifest, or of the parts that are there."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from degflow import config, images
from degflow.dataset.footer import body_sha256
from degflow.dataset.layout import CONFIG, EXPORT, MANIFEST, SUCCESS, number_of
from degflow.dataset.manifest import data_files, judge
from degflow.dataset.plan import plan_files, read_plan
from degflow.dataset.recipe import Recipe
from degflow.dataset.references import read_reference
from degflow.storage import Damaged, Place

T = TypeVar("T")


class Part(NamedTuple):
    """A data part, as its record says (`layout.Record`)."""

    name: str
    rows: int
    bytes: int
    sha256: str


def parts_there(uri: str, names: Sequence[str] | None = None) -> list[Part]:
    """The parts of a dataset that are there, in the order of their numbers, whether it is finished or not.

    A finished dataset says it in its manifest. Of another one, a part belongs to it if the plan has its number, and its
    footer says that it was made by this configuration. Parts that a run with `overwrite` has not deleted yet, or that a
    late writer of the run before has put, do not belong to it.

    Args:
        uri: the dataset's folder or URI.
        names: of the parts, e.g. "data/part-000000.parquet"; None: all.

    Raises:
        ValueError: no dataset at the URI, or parts that are not there or damaged; the message names the first one.
    """
    place, wanted = Place(uri), None if names is None else set(names)
    if place.exists(SUCCESS):
        found = _listed(place)
    elif place.exists(CONFIG):
        files = [file for file in data_files(place) if wanted is None or file.key in wanted]  # before the plan
        try:
            plan = read_plan(place, plan_files(place), [number_of(file.key) for file in files])
        except FileNotFoundError:
            raise ValueError(f"{uri}: is being overwritten (overwrite=true)") from None
        recipe = Recipe.stored_in(place)
        done = judge(place, files, plan, recipe.digest, processes=False).done
        records = [done[number] for number in sorted(done)]
        found = [Part(record.part, record.rows, record.bytes, record.sha256) for record in records]
    else:
        raise ValueError(f"{uri}: no dataset ({CONFIG} is missing)")
    if missing := sorted((wanted or set()) - {part.name for part in found}):
        raise ValueError(f"{uri}: parts={missing[0]}: no such part, or a damaged one")
    return [part for part in found if wanted is None or part.name in wanted]


def _listed(place: Place) -> list[Part]:
    try:
        data = place.read(MANIFEST)
    except FileNotFoundError:
        kind = "is an export, which is no dataset" if place.exists(EXPORT) else "no dataset"
        raise ValueError(f"{place.uri}: {kind} ({MANIFEST} is missing)") from None
    table = pq.read_table(pa.BufferReader(data), columns=["part", *Part._fields[1:]])
    return [Part(row.pop("part"), **row) for row in table.to_pylist()]


class StoredDataset:
    """Data parts, and the rows in them.

    It keeps no connection open, so it can be pickled, and used in forked and in spawned processes.

    Args:
        uri: the dataset's folder or URI.
        parts: which parts, see `parts_there`; those without rows are left out.
        verify: compare each part with its sha256 before its first use in a process; reads parts twice.

    Attributes:
        parts: the parts with rows.
        recipe: the run's configuration.
        sha256: a digest of the parts' names, sizes and digests.
    """

    said_by = "the list of parts"

    def __init__(self, uri: str, parts: Sequence[Part], verify: bool = False):
        self.uri, self.verify = uri, verify
        self.parts = [part for part in parts if part.rows]
        self.sha256 = hashlib.sha256(json.dumps(self.parts).encode()).hexdigest()
        self.recipe: dict[str, Any] = config.read(Place(uri).read(CONFIG).decode())
        self._verified: set[str] = set()

    def rows(self, part: Part, wanted: np.ndarray | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows of a part with their numbers, in stored order.

        The file is open only while a row group is read. In between, memory holds the rest of that row group's rows,
        and a photograph's HR once.

        Args:
            part: one of `parts`.
            wanted: bool "rows": which rows; row groups without such rows are not read.

        Raises:
            ValueError: the part is missing, or differs from what `parts` says.
            OSError: the part cannot be read, or is damaged.
        """
        metadata = self._using(part, None, lambda parquet: parquet.metadata)
        first = 0
        for group in range(metadata.num_row_groups):
            count = metadata.row_group(group).num_rows
            chosen = np.arange(count) if wanted is None else np.flatnonzero(wanted[first : first + count])
            if len(chosen):
                table = self._using(part, metadata, lambda parquet, group=group: parquet.read_row_group(group))
                rows = [(first + n, row) for n, row in zip(chosen.tolist(), _dicts(table, chosen), strict=True)]
                del table
                rows.reverse()
                while rows:
                    yield rows.pop()
            first += count

    def _using(self, part: Part, metadata: pq.FileMetaData | None, operation: Callable[[pq.ParquetFile], T]) -> T:
        """What an operation returns on an open part; after a failure of the storage that may pass, it begins again."""
        place = Place(self.uri)
        where = place.uri_of(part.name)

        def attempt(file: BinaryIO) -> T:
            try:
                self._check(file, where, part)
                parquet = pq.ParquetFile(file, metadata=metadata, pre_buffer=True)
                if (rows := parquet.metadata.num_rows) != part.rows:
                    raise ValueError(f"{where}: {rows} rows, but {self.said_by} says {part.rows}")
                return operation(parquet)
            except (pa.ArrowException, OSError) as error:  # Arrow tells some damage as an OSError without a number
                if isinstance(error, pa.ArrowException) or (type(error) is OSError and error.errno is None):
                    raise Damaged(f"{type(error).__name__}: {error}") from error
                raise

        try:
            return place.using(part.name, attempt)
        except FileNotFoundError:
            raise ValueError(f"{where}: no such part, but {self.said_by} has it") from None
        except Damaged as error:
            raise OSError(f"{where}: cannot be read ({error})") from error
        except OSError as error:
            raise OSError(f"{where}: cannot be read ({type(error).__name__}: {error})") from error

    def _check(self, file: BinaryIO, where: str, part: Part) -> None:
        if (size := file.seek(0, os.SEEK_END)) != part.bytes:
            raise ValueError(f"{where}: {size} bytes, but {self.said_by} says {part.bytes}")
        if self.verify and part.name not in self._verified:
            if (digest := body_sha256(file)) != part.sha256:
                raise ValueError(f"{where}: sha256 {digest}, but {self.said_by} says {part.sha256}")
            self._verified.add(part.name)
        file.seek(0)

    def lr_of(self, row: dict[str, Any]) -> np.ndarray:
        """The LR image of a row, uint8 "H W 3"."""
        return _pixels(row, "lr")

    def hr_of(self, row: dict[str, Any]) -> np.ndarray:
        """The HR image of a row, uint8 "H W 3": exactly the pixels that were degraded.

        Raises:
            ValueError: with `hr=reference`, the source is gone, has changed, or is not below the run's input.
        """
        if row["hr"]["bytes"] is not None:
            return _pixels(row, "hr")
        return images.decode(read_reference(row, self.recipe), max_pixels=self.recipe["max_pixels"])


class FinishedDataset(StoredDataset):
    """A dataset with `_SUCCESS`, read through its manifest.

    Args:
        uri: the dataset's folder or URI.
        verify: see `StoredDataset`.

    Raises:
        ValueError: no finished dataset at the URI.
    """

    said_by = "the manifest"

    def __init__(self, uri: str, verify: bool = False):
        place = Place(uri)
        if not place.exists(SUCCESS):
            hint = "; SynthesizedPairs(..., unfinished=True) reads what is there" if place.exists(CONFIG) else ""
            raise ValueError(f"{uri}: no finished dataset ({SUCCESS} is missing); synthesize writes it last{hint}")
        super().__init__(uri, _listed(place), verify)


def _dicts(table: pa.Table, chosen: np.ndarray) -> Iterator[dict[str, Any]]:
    """These rows of a table; those of one photograph share its HR bytes."""
    last = {}
    for n in chosen.tolist():
        row = table.slice(n, 1).to_pylist()[0]
        if row["hr"] == last.get("hr"):
            row["hr"] = last["hr"]
        last = row
        yield row


def _pixels(row: dict[str, Any], name: str) -> np.ndarray:
    try:
        return images.decode_encoded(row[name]["bytes"])  # `images.decode` refuses images as small as LR may be
    except Exception as error:  # Pillow's decoders raise many kinds of errors
        raise ValueError(f"{row['key']}, draw {row['draw']}: damaged {name} ({error})") from error
