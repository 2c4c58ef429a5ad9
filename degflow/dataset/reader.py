"""A finished dataset, read through its manifest."""

import hashlib
import os
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from degflow import config, images
from degflow.dataset.footer import body_sha256
from degflow.dataset.layout import CONFIG, MANIFEST, SUCCESS
from degflow.dataset.references import read_reference
from degflow.storage import Place


class Part(NamedTuple):
    """A data part, as in the manifest."""

    name: str
    rows: int
    bytes: int
    sha256: str


class FinishedDataset:
    """A dataset with `_SUCCESS`.

    It keeps no connection open, so it can be pickled, and used in forked and in spawned processes.

    Args:
        uri: the dataset's folder or URI.
        verify: compare each part with the manifest's sha256 before its first use in a process; reads parts twice.

    Raises:
        ValueError: no finished dataset at the URI.
    """

    def __init__(self, uri: str, verify: bool = False):
        self.uri, self.verify = uri, verify
        place = Place(uri)
        if not place.exists(SUCCESS):
            raise ValueError(f"{uri}: no finished dataset ({SUCCESS} is missing); synthesize writes it last")
        manifest = place.read(MANIFEST)
        table = pq.read_table(pa.BufferReader(manifest), columns=["part", "rows", "bytes", "sha256"])
        records = [Part(*row) for row in zip(*(column.to_pylist() for column in table.columns), strict=True)]
        self.parts = [part for part in records if part.rows]
        self.sha256 = hashlib.sha256(manifest).hexdigest()
        self.recipe: dict[str, Any] = config.read(place.read(CONFIG).decode())
        self._verified: set[str] = set()

    def rows(self, part: Part, wanted: np.ndarray | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows of a part with their numbers, in stored order; memory holds one row group at a time.

        Args:
            part: one of `parts`.
            wanted: bool "rows": which rows; row groups without such rows are not read.

        Raises:
            ValueError: the part is missing, or differs from the manifest.
            OSError: the part cannot be read, or is damaged.
        """
        place = Place(self.uri)
        where = place.uri_of(part.name)
        try:
            with place.open(part.name) as file:
                self._check(file, where, part)
                parquet = pq.ParquetFile(file, pre_buffer=True)
                if parquet.metadata.num_rows != part.rows:
                    raise ValueError(f"{where}: {parquet.metadata.num_rows} rows, but the manifest says {part.rows}")
                first, last = 0, {}
                for group in range(parquet.num_row_groups):
                    count = parquet.metadata.row_group(group).num_rows
                    chosen = np.arange(count) if wanted is None else np.flatnonzero(wanted[first : first + count])
                    if len(chosen):
                        table = parquet.read_row_group(group)
                        for n in chosen.tolist():
                            row = table.slice(n, 1).to_pylist()[0]
                            if row["hr"] == last.get("hr"):  # of the same photograph: share its bytes
                                row["hr"] = last["hr"]
                            last = row
                            yield first + n, row
                        del table
                    first += count
        except FileNotFoundError:
            raise ValueError(f"{where}: no such part, but the manifest lists it") from None
        except (pa.ArrowException, OSError) as error:  # Arrow reports some damage as an OSError
            raise OSError(f"{where}: cannot be read ({type(error).__name__}: {error})") from error

    def _check(self, file: BinaryIO, where: str, part: Part) -> None:
        if (size := file.seek(0, os.SEEK_END)) != part.bytes:
            raise ValueError(f"{where}: {size} bytes, but the manifest says {part.bytes}")
        if self.verify and part.name not in self._verified:
            if (digest := body_sha256(file)) != part.sha256:
                raise ValueError(f"{where}: sha256 {digest}, but the manifest says {part.sha256}")
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


def _pixels(row: dict[str, Any], name: str) -> np.ndarray:
    try:
        return images.decode_encoded(row[name]["bytes"])  # `images.decode` refuses images as small as LR may be
    except Exception as error:  # Pillow's decoders raise many kinds of errors
        raise ValueError(f"{row['key']}, draw {row['draw']}: damaged {name} ({error})") from error
