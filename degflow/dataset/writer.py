"""A shard's rows -> its objects in the output."""

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from degflow.dataset.layout import DATA, REJECT, REJECTS, ROW, Record, Reject, part_name, serialise
from degflow.dataset.manifest import read_record
from degflow.storage import Place

ROW_GROUP_ROWS, ROW_GROUP_BYTES = 100, 64 << 20
# Equal values of these columns are stored once in a row group, e.g. HR of a photograph's draws. LR images all differ.
_ONCE: dict[str, Any] = {
    "use_dictionary": ["key", "hr.bytes", "hr.path", "hr_sha256", "model_sha256"],
    "dictionary_pagesize_limit": 1 << 30,  # bytes; with Arrow's usual 1 MiB it may give up
}


class ShardWriter:
    """Collects the rows of a shard in a temporary local file, and writes its two objects at the end.

    Memory holds one row group at a time. Use it as a context manager, which deletes the temporary file.

    Args:
        output: the dataset.
        number: of the shard.
        recipe: digest of the configuration and of the planned files.
    """

    def __init__(self, output: Place, number: int, recipe: str):
        self.output, self.number, self.recipe = output, number, recipe
        self._spool = tempfile.TemporaryFile()  # noqa: SIM115 (a file without a name leaves nothing behind)
        # PNGs do not compress further, and the other columns are a few bytes each.
        self._parquet = pq.ParquetWriter(self._spool, ROW, compression="none", **_ONCE)
        self._buffer: list[dict[str, Any]] = []
        self._rejects: list[Reject] = []
        self._buffered = self._rows = 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._parquet.close()
        self._spool.close()

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append the rows of one photograph, with the columns of `ROW`."""
        self._buffer += rows
        self._rows += len(rows)
        self._buffered += sum(len(row[name]["bytes"] or b"") for row in rows for name in ("lr", "hr"))
        if len(self._buffer) >= ROW_GROUP_ROWS or self._buffered >= ROW_GROUP_BYTES:
            self._flush()

    def reject(self, reject: Reject) -> None:
        """Note that a photograph has no rows."""
        self._rejects.append(reject)

    def _flush(self) -> None:
        if self._buffer:
            self._parquet.write_table(pa.Table.from_pylist(self._buffer, schema=ROW))
        self._buffer, self._buffered = [], 0

    def finish(self, seconds: float, psnr: float | None, clipped: float | None, colour_shift: float | None) -> Record:
        """Write the rejects with the record, then the data; then the shard is done.

        If another driver has already written this shard by the same recipe, it is kept, and its record is returned.
        """
        found = read_record(self.output, self.number)
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
        self.output.write(part_name(REJECTS, self.number), serialise(rejects))
        spool = f"/dev/fd/{self._spool.fileno()}"
        if not self.output.upload(spool, record.part, new=True) and self.output.sha256(record.part) != digest:
            self.output.upload(spool, record.part)  # the existing part has another recipe, or is cut off
        return record


def _size_there(output: Place, part: str) -> int:
    try:
        return output.source(part).size
    except FileNotFoundError:
        return -1
