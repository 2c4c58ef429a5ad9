"""What a data part says of itself: its record and its rejects, in the key-value metadata of its parquet footer.

A parquet file ends in its footer, the footer's length (4 bytes, little-endian) and "PAR1". So the end of a part is
enough to know whether its shard is done.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from degflow.dataset.layout import Record, Reject
from degflow.storage import Place

_RECORD, _REJECTS = "degflow.record", "degflow.rejects"
_KNOWN = ("part", "bytes")  # fields of a record that the object itself tells
_END = 64 << 10  # bytes read from the end; footers are longer only if they have many rejects
_TAIL = 8  # the footer's length and "PAR1"
_CHUNK = 8 << 20


class Footer(NamedTuple):
    """The record and the rejects of a finished shard."""

    record: Record
    rejects: list[Reject]


def footer_of(record: Record, rejects: Sequence[Reject]) -> dict[str, str]:
    """The key-value metadata of a part."""
    known = {name: value for name, value in asdict(record).items() if name not in _KNOWN}
    return {_RECORD: json.dumps(known), _REJECTS: json.dumps([reject._asdict() for reject in rejects])}


def read_footer(output: Place, part: str, size: int) -> Footer | None:
    """What a part of this size says of itself; None if it is damaged, or no part of this job.

    Raises:
        OSError: the part cannot be read, or does not exist (FileNotFoundError).
    """
    if size <= _TAIL:
        return None
    end = output.read(part, max(0, size - _END), size)
    length = _length(end[-_TAIL:])
    if length > size or not length:
        return None
    if length > len(end):
        end = output.read(part, size - length, size)
    return _parsed(end, part, size)


def _parsed(end: bytes, part: str, size: int) -> Footer | None:
    try:
        metadata = pq.read_metadata(pa.BufferReader(end))
        values = metadata.metadata or {}
        record = Record(part=part, bytes=size, **json.loads(values[_RECORD.encode()]))
        rejects = [Reject(**reject) for reject in json.loads(values[_REJECTS.encode()])]
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):  # Arrow reports some damage as an OSError
        return None
    whole = (record.rows, record.rejects) == (metadata.num_rows, len(rejects))
    return Footer(record, rejects) if whole else None


def body_sha256(file: BinaryIO) -> str:
    """Sha256 of a part's bytes before its footer, as in a record. It leaves out the footer, which holds the record.

    Args:
        file: the part, which is read in pieces.

    Raises:
        ValueError: no parquet file.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _TAIL))
    left = size - _length(file.read(_TAIL))
    if not 0 <= left < size:
        raise ValueError("no parquet file: its end is damaged")
    file.seek(0)
    digest = hashlib.sha256()
    while left:
        chunk = file.read(min(left, _CHUNK))
        digest.update(chunk)
        left -= len(chunk)
    return digest.hexdigest()


def _length(tail: bytes) -> int:
    """Bytes of the footer with its length and "PAR1"; 0 if a file that ends in `tail` is no parquet file."""
    whole = len(tail) == _TAIL and tail.endswith(b"PAR1")
    return int.from_bytes(tail[:4], "little") + _TAIL if whole else 0
