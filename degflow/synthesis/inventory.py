"""What an input holds: a folder, a prefix, a glob, or an inventory -> a table of keys, sizes and version tags.

- A folder or prefix: every file below it.
- A glob, as `s3://bucket/photos/**/*.jpg`: its keys are below the part before the first wildcard's folder. A folder
  whose own name holds `*`, `?` or `[` is taken as that folder where it is there.
- An inventory, a .parquet or .csv file with a column `key`, and `size` and `etag` where they are known: nothing is
  listed, so that a bucket of many millions of objects costs one read.
"""

import io
import re
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet as pq

from degflow import images
from degflow.storage import Place, split_uri

pc: Any = pyarrow.compute  # its functions are made at import, unseen by type checkers

SOURCE = pa.schema([("key", pa.string()), ("size", pa.int64()), ("etag", pa.string())])
_INVENTORY = (".parquet", ".csv")


class Listing(NamedTuple):
    """The images of an input, sorted by key, and what was left out."""

    sources: pa.Table  # of SOURCE
    others: int  # files without an image's suffix
    unnamed: list[str]  # names that are no UTF-8


def root_of(uri: str, root: str = "") -> Place:
    """The place that the keys of an input are below.

    Args:
        uri: the input.
        root: what an inventory's keys are below; empty: the folder that holds it.

    Raises:
        ValueError: a root for what is no inventory.
    """
    if uri.lower().endswith(_INVENTORY) and not _is_folder(uri):
        return Place(root) if root else split_uri(uri)[0]
    if root:
        raise ValueError(f"root={root}: has a meaning for an inventory (.parquet, .csv) only, and input={uri} is none")
    return Place(_split_glob(uri)[0])


def list_input(uri: str, root: str = "", without: Place | None = None) -> Listing:
    """List an input.

    Args:
        uri: the input.
        root: what an inventory's keys are below; empty: the folder that holds it.
        without: a place whose files do not count, such as an output inside the input.

    Raises:
        ValueError: an inventory that breaks the rule.
        OSError: the input cannot be read.
    """
    place = root_of(uri, root)
    try:
        if uri.lower().endswith(_INVENTORY) and not _is_folder(uri):
            return _images_of(_inventory(uri), [])
        pattern = _split_glob(uri)[1]
        files = place.match(pattern) if pattern else place.files()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"input={uri}: not there ({error})") from error
    except OSError as error:
        raise OSError(f"input={uri}: cannot be read ({type(error).__name__}: {error})") from error
    if without and place.contains(without):
        below = f"{without.root}/"
        files = [file for file in files if not place.path(file.key).startswith(below)]
    unnamed = [file.key for file in files if not _is_text(file.key)]
    if unnamed:
        files = [file for file in files if _is_text(file.key)]
    columns = list(zip(*files, strict=True)) or [[], [], []]
    return _images_of(pa.table([pa.array(c, f.type) for c, f in zip(columns, SOURCE, strict=True)], SOURCE), unnamed)


def _images_of(files: pa.Table, unnamed: list[str]) -> Listing:
    suffixes = "|".join(re.escape(suffix) for suffix in images.SUFFIXES)
    wanted = files.filter(pc.match_substring_regex(files["key"], f"(?i)(?:{suffixes})$"))
    return Listing(wanted.sort_by("key").combine_chunks(), len(files) - len(wanted), unnamed)


def _is_folder(uri: str) -> bool:
    place = Place(uri)
    return place.local and place.fs.isdir(place.root)


def _split_glob(uri: str) -> tuple[str, str]:
    """The folder before the first wildcard, and the pattern below it; no pattern for a literal folder."""
    scheme, mark, path = uri.rpartition("://")
    folders = path.split("/")
    first = next((n for n, name in enumerate(folders) if re.search(r"[*?[]", name)), None)
    if first is None or Place(uri).exists():
        return uri, ""
    folder = "/".join(folders[:first]) or ("/" if path.startswith("/") else "." if not scheme else "")
    return f"{scheme}{mark}{folder}", "/".join(folders[first:])


def _inventory(uri: str) -> pa.Table:
    place, name = split_uri(uri)
    data = place.read(name)
    try:
        table = _read(uri, data)
    except pa.ArrowException as error:
        raise ValueError(f"input={uri}: not a readable inventory ({' '.join(str(error).split())})") from None
    if "key" not in table.column_names:
        raise ValueError(f"input={uri}: an inventory has a column named key; this one has {table.column_names}")
    try:
        columns = [
            table["key"].cast(pa.string()),
            _column(table, "size", pa.int64(), -1),
            pc.utf8_trim(_column(table, "etag", pa.string(), ""), '"'),  # as S3's answers quote them
        ]
    except (KeyError, pa.ArrowException) as error:
        raise ValueError(f"input={uri}: key, size or etag is there twice, or of another type ({error})") from None
    table = pa.table(columns, SOURCE)
    if table["key"].null_count:
        raise ValueError(f"input={uri}: {table['key'].null_count} rows without a key")
    counts = pc.value_counts(table["key"])
    if repeated := counts.filter(pc.greater(counts.field("counts"), 1)).field("values").slice(0, 3).to_pylist():
        raise ValueError(f"input={uri}: keys must be unique; named more than once: {', '.join(sorted(repeated))}")
    return table


def _read(uri: str, data: bytes) -> pa.Table:
    wanted = list(SOURCE.names)
    if uri.lower().endswith(".parquet"):
        file = pq.ParquetFile(io.BytesIO(data))
        return file.read([name for name in wanted if name in file.schema_arrow.names])
    options = pyarrow.csv.ConvertOptions(column_types={"key": pa.string(), "etag": pa.string(), "size": pa.int64()})
    table = pyarrow.csv.read_csv(io.BytesIO(data), convert_options=options)
    return table.select([name for name in table.column_names if name in wanted])


def _column(table: pa.Table, name: str, kind: pa.DataType, unknown: object) -> pa.ChunkedArray:
    if name not in table.column_names:
        return pa.chunked_array([pa.repeat(pa.scalar(unknown, kind), len(table))])
    return pc.fill_null(table[name].cast(kind), unknown)


def _is_text(key: str) -> bool:
    try:
        key.encode()
    except UnicodeEncodeError:
        return False
    return True
