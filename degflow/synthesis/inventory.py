"""The input of a run: a folder, a prefix, a glob or an inventory -> the keys, sizes and version tags of its images.

- A folder or prefix: every file below it.
- One image file: its key is its name.
- A glob, e.g. `s3://bucket/photos/**/*.jpg`: the keys start below the last folder before the first wildcard. An
  existing folder with `*`, `?` or `[` in its name is read as that folder, not as a glob.
- An inventory: a .parquet or .csv file with a column `key`, and optional columns `size` and `etag`. Nothing is listed,
  so a bucket of many millions of objects costs one read.
"""

import io
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet as pq

from degflow import images
from degflow.dataset.layout import CONFIG, EXPORT, SOURCE, SUCCESS
from degflow.dataset.plan import Plan
from degflow.dataset.references import INVENTORY
from degflow.storage import Place, Source, split_glob, split_uri

_DESCRIBED = (CONFIG, EXPORT)  # one of these describes what a folder with _SUCCESS is
pc: Any = pyarrow.compute  # its functions are made at import, where type checkers do not see them


class Input:
    """The images of a run.

    Args:
        uri: a folder, a prefix, a glob, an image file or an inventory.
        root: the folder or prefix of an inventory's keys; empty: the folder of the inventory.
        without: a place whose files are left out, such as an output inside the input.
        limit: use the first so many images only; 0: all.

    Raises:
        ValueError: a root for an input that is not an inventory.
    """

    def __init__(self, uri: str, root: str = "", *, without: Place | None = None, limit: int = 0):
        self.uri, self.without, self.limit, self.file = uri, without, limit, ""
        self.is_inventory = uri.lower().endswith(INVENTORY) and not _is_folder(uri)
        if root and not self.is_inventory:
            raise ValueError(f"root={root}: only an inventory (.parquet, .csv) has a root, and input={uri} is none")
        if self.is_inventory:
            self.root, self.pattern = Place(root) if root else split_uri(uri)[0], ""
        elif uri.lower().endswith(images.SUFFIXES) and Place(uri).is_file():
            (self.root, self.file), self.pattern = split_uri(uri), ""
        else:
            folder, pattern = split_glob(uri)
            is_pattern = bool(pattern) and not Place(uri).exists()
            self.root, self.pattern = (Place(folder), pattern) if is_pattern else (Place(uri), "")

    def images(self) -> pa.Table:
        """All images, as a table of SOURCE, sorted by key. Prints which other files are left out.

        Raises:
            ValueError: no images, or an inventory that breaks a rule.
            OSError: the input cannot be read.
        """
        found, others = self._list()
        if not len(found):
            raise ValueError(f"input={self.uri}: {self._why_empty(others)}")
        return found

    def _why_empty(self, others: int) -> str:
        suffixes = f"no file ending in {', '.join(images.SUFFIXES)}"
        if others:
            return f"{_count(others, 'other file')} there, but {suffixes}"
        if self.is_inventory:
            return "an inventory without rows"
        if self.pattern:
            return f"no file below {self.root.uri} matches {self.pattern}"
        if self.root.is_file():
            return "a file, but neither an image (its name must end in {}) nor an inventory ({})".format(
                *map(", ".join, (images.SUFFIXES, INVENTORY))
            )
        if self.root.exists():
            return f"nothing that could be a photograph: {suffixes}"
        return "no such file" + (" or folder" if self.root.local else ", folder or prefix")

    def new_images(self, plan: Plan) -> pa.Table:
        """The images that are not in the plan, as a table of SOURCE, as many as the limit still allows."""
        found, _ = self._list()
        new = found.filter(pc.invert(pc.is_in(found["key"], plan.table["key"])))
        return new.slice(0, max(0, self.limit - plan.files) if self.limit else None)

    def as_now(self, planned: Sequence[Source]) -> pa.Table:
        """These files, as a table of SOURCE, with the sizes and tags that they have now."""
        with ThreadPoolExecutor(16) as pool:
            return _table_of(list(pool.map(self._as_now, planned)))

    def _as_now(self, source: Source) -> Source:
        try:
            found = self.root.source(source.key)
        except OSError:
            return source  # the shard will report what is wrong with it
        return Source(source.key, found.size if source.size >= 0 else -1, found.etag if source.etag else "")

    def _list(self) -> tuple[pa.Table, int]:
        """The first `limit` images, sorted by key, and the number of files without an image's suffix."""
        # Of many millions of files each copy of the table takes a GB: none is made that is not needed.
        files = self._files().combine_chunks()
        suffixes = "|".join(re.escape(suffix) for suffix in images.SUFFIXES)
        wanted = pc.match_substring_regex(files["key"], f"(?i)(?:{suffixes})$")
        others = len(files) - pc.sum(wanted).as_py() if len(files) else 0
        if others:
            files = files.filter(wanted)
        if others and len(files):
            print(f"{_count(others, 'file')} in {self.uri} without an image's suffix: left out")
        if not _is_sorted(files["key"]):
            files = files.sort_by("key")
        self._check_unique(files["key"])
        return files.slice(0, self.limit or None).combine_chunks(), others

    def _check_unique(self, keys: pa.ChunkedArray) -> None:
        """Raise a ValueError if sorted keys repeat; only those of an inventory can."""
        again = _neighbours(pc.equal, keys)
        if pc.any(again).as_py():
            repeated = pc.unique(keys.slice(1).filter(again)).slice(0, 3).to_pylist()
            rule = f"keys must be unique; these appear more than once: {', '.join(repeated)}"
            raise ValueError(f"input={self.uri}: {rule}")

    def _files(self) -> pa.Table:
        """All files whose names are UTF-8, as a table of SOURCE."""
        try:
            if self.is_inventory:
                return _inventory(self.uri)
            if self.file:
                return _table_of([self.root.source(self.file)])
            pages = [self.root.match(self.pattern)] if self.pattern else self.root.pages()
            files = self._named(pages)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"input={self.uri}: not there ({error})") from error
        except OSError as error:
            raise OSError(f"input={self.uri}: cannot be read ({type(error).__name__}: {error})") from error
        files = self._without_datasets(self._without_resource_forks(files))
        if self.without and self.root.contains(self.without):
            files = _without(files, f"{self.without.root}/".removeprefix(f"{self.root.root}/"))
        return files

    def _named(self, pages: Iterable[Sequence[Source]]) -> pa.Table:
        """The files whose names are UTF-8. Each page becomes a table, which takes a tenth of a list's memory."""
        unnamed, tables = list[str](), [_table_of([])]
        for page in pages:
            wrong = [source.key for source in page if not _is_text(source.key)]
            unnamed += wrong
            tables.append(_table_of([source for source in page if _is_text(source.key)] if wrong else page))
        if unnamed:
            print(f"{_count(len(unnamed), 'name')} in {self.uri} not in UTF-8: left out, e.g. {unnamed[0]!a}")
        return pa.concat_tables(tables)

    def _without_resource_forks(self, files: pa.Table) -> pa.Table:
        """Leave out what macOS adds to an archive beside each file, under the same name after "._"."""
        forks = pc.match_substring_regex(files["key"], r"(?s)(^|/)\._[^/]*$")
        if not pc.any(forks).as_py():
            return files
        print(f"{_count(pc.sum(forks).as_py(), 'name')} in {self.uri} beginning with ._: left out")
        return files.filter(pc.invert(forks))

    def _without_datasets(self, files: pa.Table) -> pa.Table:
        """Leave out folders below the root that hold a finished dataset or an export: they are no photographs."""
        keys = files["key"]
        marks = [key.removesuffix(SUCCESS) for key in keys.filter(pc.ends_with(keys, f"/{SUCCESS}")).to_pylist()]
        names = pa.array([mark + name for mark in marks for name in _DESCRIBED], pa.string())
        described = keys.filter(pc.is_in(keys, names)).to_pylist() if marks else []
        for folder in sorted({f"{key.rpartition('/')[0]}/" for key in described}):
            print(f"{folder} in {self.uri} is a dataset of degflow's, or an export: left out")
            files = _without(files, folder)
        return files


def _without(files: pa.Table, folder: str) -> pa.Table:
    """The files that are not in a folder, whose name ends with "/"."""
    return files.filter(pc.invert(pc.starts_with(files["key"], folder)))


def _table_of(files: Sequence[Source]) -> pa.Table:
    columns = list(zip(*files, strict=True)) or [[], [], []]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, SOURCE, strict=True)], SOURCE)


def _neighbours(compare: Any, keys: pa.ChunkedArray) -> pa.ChunkedArray:
    """How each key but the last compares with the next one."""
    return compare(keys.slice(0, max(0, len(keys) - 1)), keys.slice(1))


def _is_sorted(keys: pa.ChunkedArray) -> bool:
    return pc.all(_neighbours(pc.less_equal, keys)).as_py() is not False


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _is_folder(uri: str) -> bool:
    place = Place(uri)
    return place.local and place.fs.isdir(place.root)


def _inventory(uri: str) -> pa.Table:
    place, name = split_uri(uri)
    try:
        table = _read(uri, place.read(name))
    except pa.ArrowException as error:
        raise ValueError(f"input={uri}: not a readable inventory ({' '.join(str(error).split())})") from None
    try:
        columns = [
            table["key"].cast(pa.string()),
            _column(table, "size", pa.int64(), -1),
            pc.utf8_trim(_column(table, "etag", pa.string(), ""), '"'),  # S3 puts quotes around its ETags
        ]
    except (KeyError, pa.ArrowException) as error:
        raise ValueError(f"input={uri}: key, size or etag appears twice or has another type ({error})") from None
    table = pa.table(columns, SOURCE)
    if table["key"].null_count:
        raise ValueError(f"input={uri}: {table['key'].null_count} rows without a key")
    return table


def _read(uri: str, data: bytes) -> pa.Table:
    if uri.lower().endswith(".parquet"):
        file = pq.ParquetFile(io.BytesIO(data))
        return file.read(_wanted(uri, file.schema_arrow.names))
    options = pyarrow.csv.ConvertOptions(column_types={"key": pa.string(), "etag": pa.string(), "size": pa.int64()})
    table = pyarrow.csv.read_csv(io.BytesIO(data), convert_options=options)
    return table.select(_wanted(uri, table.column_names))


def _wanted(uri: str, columns: Sequence[str]) -> list[str]:
    if "key" not in columns:
        there = ", ".join(columns) or "none"
        raise ValueError(f"input={uri}: an inventory needs a column named key; its columns are: {there}")
    return [name for name in columns if name in SOURCE.names]


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
