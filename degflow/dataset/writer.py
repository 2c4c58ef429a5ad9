"""A shard's rows -> its object in the output."""

import errno
import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from degflow.config import Unfinished
from degflow.dataset.footer import footer_of, read_footer
from degflow.dataset.layout import DATA, ROW, Record, Reject, part_name
from degflow.storage import Place

ROW_GROUP_ROWS, ROW_GROUP_BYTES = 100, 64 << 20
# Of images in a row group, with HR counted in every row, as it is in memory. Arrow reads no row group with 2 GiB of HR.
MOST_BYTES = 1 << 30
# Equal values of these columns are stored once in a row group, e.g. HR of a photograph's draws. LR images all differ.
_ONCE: dict[str, Any] = {
    "use_dictionary": ["key", "hr.bytes", "hr.path", "hr_sha256", "model_sha256"],
    "dictionary_pagesize_limit": 1 << 30,  # bytes; with Arrow's usual 1 MiB it may give up
}


class ShardWriter:
    """Collects the rows of a shard in a temporary local file, and puts it into the output at the end.

    Memory holds one row group at a time: some 64 MiB of images, or all rows of one photograph up to `MOST_BYTES`.
    Use it as a context manager, which deletes the temporary file.

    Args:
        output: the dataset.
        number: of the shard.
        recipe: digest of the configuration and of the planned files.
    """

    def __init__(self, output: Place, number: int, recipe: str):
        self.output, self.part, self.recipe = output, part_name(DATA, number), recipe
        self._spool = _Spool()
        # PNG and WebP do not compress further, and the other columns are a few bytes each.
        self._parquet = pq.ParquetWriter(self._spool, ROW, compression="none", **_ONCE)
        self._buffer: list[dict[str, Any]] = []
        self._rejects: list[Reject] = []
        self._buffered = self._rows = 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._parquet.close()
        self._spool.file.close()

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append the rows of one photograph, with the columns of `ROW`.

        They share a row group, which stores their HR once, unless they have more than `MOST_BYTES`.
        """
        for row in rows:
            size = sum(len(row[name]["bytes"] or b"") for name in ("lr", "hr"))
            if self._buffered + size > MOST_BYTES:
                self._flush()
            self._buffer.append(row)
            self._buffered += size
        self._rows += len(rows)
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
        """Put the part, if there is none of this number; then the shard is done.

        Returns:
            The record of the part that is there: if another driver has put this shard by the same recipe, of that part.

        Raises:
            Unfinished: the name is taken by a part of another recipe, or by a damaged one.
        """
        if found := record_there(self.output, self.part, self.recipe):
            return found
        self._flush()
        record = Record(
            part=self.part,
            rows=self._rows,
            rejects=len(self._rejects),
            bytes=0,
            sha256=self._spool.sha256.hexdigest(),
            recipe=self.recipe,
            seconds=seconds,
            psnr=psnr,
            clipped=clipped,
            colour_shift=colour_shift,
        )
        self._parquet.add_key_value_metadata(footer_of(record, self._rejects))
        self._parquet.close()
        self._spool.file.flush()
        while not self.output.upload(f"/dev/fd/{self._spool.file.fileno()}", self.part, new=True):
            if found := record_there(self.output, self.part, self.recipe):
                return found
        return replace(record, bytes=self._spool.file.tell())


def record_there(output: Place, part: str, recipe: str) -> Record | None:
    """The record of a part that is in the output; None if there is none.

    Raises:
        Unfinished: it is of another recipe, or damaged.
    """
    try:
        footer = read_footer(output, part, output.source(part).size)
    except FileNotFoundError:
        return None
    if footer and footer.record.recipe == recipe:
        return footer.record
    raise Unfinished(
        f"{output.uri_of(part)}: another run writes into this output, for this part "
        f"{'has another recipe' if footer else 'is damaged'}; end that run, and start this one again: "
        "it deletes the part and makes it anew"
    )


class _Spool:
    """A temporary file, and the sha256 of what was written to it."""

    closed = False  # pyarrow asks

    def __init__(self):
        try:
            self.file = tempfile.TemporaryFile()  # noqa: SIM115 (a file without a name leaves nothing behind)
        except FileNotFoundError as error:  # so it says that no folder has room
            raise OSError(errno.ENOSPC, f"no room for a temporary file ({error})") from error
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()
