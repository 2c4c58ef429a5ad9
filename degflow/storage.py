"""Places: folders and buckets behind any fsspec URI.

degflow opens every filesystem here. Objects are written as a whole: a reader sees all of an object or nothing. Failures
that may pass are retried with growing pauses for `PATIENCE` seconds: those of an object store (throttling, 5xx, resets,
timeouts, truncated bodies, a restart), and those of a shared file system (a stale handle, an input/output error).
Refusals (no such file or bucket, wrong credentials) are errors at once.
"""

import contextlib
import errno
import itertools
import logging
import math
import os
import random
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

import fsspec
import fsspec.asyn
import fsspec.config
from fsspec.implementations.local import LocalFileSystem

T = TypeVar("T")
PATIENCE = float(os.environ.get("DEGFLOW_PATIENCE", "60"))  # seconds
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 8.0  # seconds
# A retry does not help with these. botocore's errors are not OSErrors, so they are recognised by their names.
_FINAL = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)
# Of a local path, which may be a shared file system whose server starts again.
_PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.ENFILE, errno.EMFILE}
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_REFUSED = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"}
_WRONG = {
    "ParamValidationError",
    "InvalidConfigError",
    "ValueError",
    "TypeError",
    "ImportError",
    "NotImplementedError",
}
_DAMAGED = {"Damaged", "ArrowInvalid", "TooLarge"}  # what a file itself is
_PAGE = 1000  # keys, the most that S3 lists at once
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"}  # schemes; their keys are no paths
_PIECE = 5 << 20  # bytes: the smallest that S3 takes in an upload of several
_S3 = {"connect_timeout": 10, "read_timeout": 60, "retries": {"mode": "standard", "max_attempts": 2}}
_log = logging.getLogger(__name__)


class StorageError(OSError):
    """An operation that a store failed to do, after some attempts.

    Args:
        message: names the file and the cause.
        attempts: how many.
        host: the machine, if it may be another one.
        throttled: the store answers, and asks for fewer requests.
    """

    def __init__(self, message: str, attempts: int, host: str = "", throttled: bool = False):
        super().__init__(message)
        self.message, self.attempts, self.host, self.throttled = message, attempts, host, throttled

    def __reduce__(self):
        return type(self), (self.message, self.attempts, self.host, self.throttled)


class Damaged(ValueError):
    """A file whose contents are damaged, so that no other try helps."""


class TooLarge(ValueError):
    """A file of more bytes than were asked for."""


class Source(NamedTuple):
    """A file in a place: its key (the path below the root, "/"-separated, as stored), size in bytes and version tag.

    Size -1 and tag "" mean unknown, as in an inventory without them.
    """

    key: str
    size: int
    etag: str


class Place:
    """A folder or an object-store prefix, e.g. `photos`, `/data/photos`, `s3://bucket/photos`.

    Endpoint and credentials of object stores come from the environment or the usual profile files.

    Args:
        uri: any fsspec URI; one without a scheme is a local path.
        patience: seconds for which failures are retried; None: `PATIENCE`.

    Attributes:
        local: a folder of this machine, also of a shared file system.
        is_object_store: S3, Google's or Azure's, where ".." in a key is a name like any other.
    """

    def __init__(self, uri: str, *, patience: float | None = None):
        if not uri:
            raise ValueError("an empty URI names no place")
        if re.match(r"[a-z0-9+.]+://[^/@]*:[^/@]*@|s3a?://(?!arn:)[^/@:]*:[^@]*@", uri, re.IGNORECASE):
            raise ValueError(
                "a URI must not hold a password (configurations and datasets keep URIs); use the environment"
            )
        bare = uri.rstrip("/")
        self.uri = uri if bare.endswith(":") and "://" in uri else bare or "/"
        self.fs, root = fsspec.core.url_to_fs(self.uri, **_options(self.uri))
        self.root = root.rstrip("/")
        self.local = isinstance(self.fs, LocalFileSystem)
        self.is_object_store = self.uri.partition("://")[0] in _OBJECT_STORES
        self.patience = patience

    def is_same(self, other: "Place") -> bool:
        """Whether both are the same place, even if their URIs differ."""
        return self.contains(other) and other.contains(self)

    def contains(self, other: "Place") -> bool:
        """Whether the other place is this one or lies inside it."""
        return type(self.fs) is type(other.fs) and f"{other.root}/".startswith(f"{self.root}/")

    def path(self, name: str) -> str:
        """The filesystem's path of a file in this place."""
        return f"{self.root}/{name}" if name else self.root

    def uri_of(self, name: str) -> str:
        """The URI of a file in this place."""
        if not name:
            return self.uri
        return f"{self.uri}{name}" if self.uri.endswith("/") else f"{self.uri}/{name}"

    @property
    def everywhere(self) -> str:
        """The URI, for processes in other folders: that of a local place begins at the root."""
        return self.root or "/" if self.local else self.uri

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """All bytes of a file, or, with `end`, those in [start, end).

        Raises:
            OSError: the file cannot be read, or does not exist (FileNotFoundError); the message names it.
        """
        part = {} if end is None else {"start": start, "end": end}
        return self._try(name, lambda: self._bytes_of(self.path(name), **part))

    def read_tagged(self, name: str, most: int | None = None) -> tuple[bytes, str]:
        """All bytes of a file, and the tag that `files` gives; on S3 both come with one request.

        Raises:
            OSError: the file cannot be read, or does not exist (FileNotFoundError).
            TooLarge: it has more than `most` bytes; they are not read.
        """
        path = self.path(name)

        def ask() -> tuple[bytes, str]:
            if _is_s3(self.fs):
                fs = self._asking_once
                return cast("tuple[bytes, str]", fsspec.asyn.sync(fs.loop, _get, fs, path, most))
            self.fs.invalidate_cache(path.rpartition("/")[0])
            info = self.fs.info(path)
            _check_size(int(info.get("size") or 0), most)
            return self._bytes_of(path), etag_of(info)

        return self._try(name, ask)

    @property
    def _asking_once(self) -> Any:
        """An S3 filesystem without s3fs's own five tries, which take ten seconds, whatever our patience.

        For requests that stand alone, which `_try` repeats. In an upload of many requests it would begin again with the
        first one.
        """
        options = _options(self.uri)
        options["config_kwargs"] |= {"user_agent_extra": "degflow"}  # makes it another instance
        fs = fsspec.core.url_to_fs(self.uri, **options)[0]
        fs.retries = 1
        return fs

    def source(self, name: str) -> Source:
        """A file's key, size and tag, the same as `files` gives."""
        path = self.path(name)

        def ask() -> Source:
            self.fs.invalidate_cache(path.rpartition("/")[0])
            info = self.fs.info(path)
            return Source(name, int(info.get("size") or 0), etag_of(info))

        return self._try(name, ask)

    def using(self, name: str, operation: Callable[[BinaryIO], T]) -> T:
        """What an operation returns that reads parts of a file; after a failure that may pass, it begins again.

        Args:
            name: the file.
            operation: gets the open file. A ValueError or `Damaged` that it raises is not tried again.
        """

        def attempt() -> T:
            # Without the readahead of s3fs, 50 MB, which would read half of a part twice.
            with self.fs.open(self.path(name), "rb", **({} if self.local else {"cache_type": "none"})) as file:
                return operation(cast(BinaryIO, file))

        return self._try(name, attempt)

    def write(self, name: str, data: bytes, *, new: bool = False) -> bool:
        """Write a file as a whole: a local file is written under a hidden name and renamed; an object is put at once.

        Args:
            name: of the file in this place.
            data: its bytes.
            new: do not replace an existing file.

        Returns:
            Whether it was written. With `new`, False if the file existed; a failed attempt of this call may have
            written it.
        """
        path = self.path(name)
        if self.local:
            return self._try(name, lambda: _place(path, new, lambda file: file.write(data)))
        return self._put(name, new, lambda **mode: self.fs.pipe_file(path, data, **mode))

    def upload(self, file: str, name: str, *, new: bool = False) -> bool:
        """Write a copy of a local file, like `write`, without reading all of it into memory."""
        path = self.path(name)
        if self.local:
            with open(file, "rb") as source:
                copy = lambda target: (source.seek(0), shutil.copyfileobj(source, target, 1 << 20))  # noqa: E731
                return self._try(name, lambda: _place(path, new, copy))
        return self._put(name, new, lambda **mode: self.fs.put_file(file, path, **mode))

    def _put(self, name: str, new: bool, put: Callable[..., Any]) -> bool:
        def attempt() -> bool:
            try:
                put(**({"mode": "create"} if new else {}))
            except FileExistsError:
                return False
            except FileNotFoundError as error:
                if _code(error) != "NoSuchUpload":
                    raise
                raise ConnectionError("the store has ended the upload") from error  # a kind of error that is retried
            except OSError as error:
                if new and error.errno == errno.ENOSYS:  # a store without conditional writes
                    put()
                elif new and _code(error) in ("PreconditionFailed", "412"):
                    return False
                else:
                    raise
            return True

        return self._try(name, attempt)

    def keeps_first(self, name: str) -> bool:
        """Whether `new` holds between writers at the same moment; tried on a hidden file that is named after `name`.

        Some S3 servers do not know If-None-Match, or not in uploads of pieces, and put an object over another.
        """
        if self.local:
            return True
        hidden = f".{name}.{uuid.uuid4().hex}"
        self.write(hidden, b"")
        try:
            kept = not self.write(hidden, b"", new=True)
            if kept and _is_s3(self.fs):
                # A refusal is right; any other failure proves nothing. Not all are OSErrors.
                with contextlib.suppress(Exception):
                    self.fs.pipe_file(self.path(hidden), bytes(2 * _PIECE), chunksize=_PIECE, mode="create")
                    kept = False
        finally:
            self.delete(hidden)
        return kept

    def exists(self, name: str = "") -> bool:
        """Whether a file (or, for "", the place itself) exists."""

        def ask() -> bool:
            self.fs.invalidate_cache()
            return self.fs.exists(self.path(name))

        return self._try(name, ask)

    def is_file(self, name: str = "") -> bool:
        """Whether it exists and is a file (for "", whether the place itself is one)."""

        def ask() -> bool:
            self.fs.invalidate_cache()
            return self.fs.isfile(self.path(name))

        return self._try(name, ask)

    def answers(self) -> bool:
        """Whether the store answers and accepts our credentials; an answer such as "no such file" is enough.

        A local place must be there and hold something: where a shared file system is not mounted, it does not.
        """
        if self.local:
            with contextlib.suppress(OSError):
                return self._try("", lambda: any(True for _ in os.scandir(self.root or "/")))
            return False
        try:
            self._try("", lambda: self.fs.info(self.path(f".{uuid.uuid4().hex}")))
        except (StorageError, PermissionError):
            return False
        except OSError:
            pass
        return True

    def delete(self, name: str) -> None:
        """Delete a file, or a folder with all its files, if it exists."""
        path = self.path(name)
        if not self.exists(name):
            return
        if self.local:
            while self.fs.exists(path):
                with contextlib.suppress(FileNotFoundError):  # another driver deletes the same
                    self.fs.rm(path, recursive=True)
            return
        if not self._try(name, lambda: self.fs.isfile(path)):
            found = [file.removeprefix(f"{self.root}/") for file in self._try(name, lambda: self.fs.find(path))]
            if _is_s3(self.fs):
                self.delete_all(found)
                return
        else:
            found = [name]
        for file in found:
            self._delete_file(file)

    def _delete_file(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # another driver did, or an attempt whose answer was lost
            self._try(name, lambda: self.fs.rm_file(self.path(name)))  # rm would read [ ] * ? as a pattern

    def delete_all(self, names: Sequence[str]) -> None:
        """Delete files, if they exist: on S3 a thousand with each request, one request after the other."""
        if not _is_s3(self.fs):
            for name in names:
                self.delete(name)
            return
        for first in range(0, len(names), _PAGE):
            keys = {self.fs.split_path(self.path(name))[1]: name for name in names[first : first + _PAGE]}
            asked = {"Bucket": self.fs.split_path(self.root)[0], "Delete": {"Objects": [{"Key": key} for key in keys]}}
            try:
                left = [error["Key"] for error in self.fs.call_s3("delete_objects", **asked).get("Errors", [])]
            except Exception:  # of many kinds: the store knows no such request, or fails for now
                left = list(keys)
            for key in left:
                self._delete_file(keys[key])  # tries again, or says what is wrong

    def files(self, name: str = "") -> list[Source]:
        """All files in a folder of this place and its subfolders, sorted by key; empty if there is no such folder.

        Raises:
            FileNotFoundError: no such bucket.
        """
        return sorted(itertools.chain.from_iterable(self.pages(name)))

    def pages(self, name: str = "") -> Iterator[list[Source]]:
        """The same, in lists of at most a thousand on S3, where a listing of millions would take a kB for each key.

        Raises:
            FileNotFoundError: no such bucket.
        """
        if _is_s3(self.fs):
            yield from self._s3_pages(name)
            return

        def ask() -> dict[str, dict[str, Any]]:
            self.fs.invalidate_cache()
            return self.fs.find(self.path(name), withdirs=False, detail=True)

        found = self._followed(self._try(name, ask))
        yield self._sources(self._try(name, lambda: self._entered(found, [os.path.realpath(self.root)])))

    def _s3_pages(self, name: str) -> Iterator[list[Source]]:
        bucket, key, _ = self.fs.split_path(self.path(name))
        if not bucket:
            raise ValueError(f"{self.uri}: names no bucket")
        asked: dict[str, Any] = {"Bucket": bucket, "Prefix": key and f"{key}/", "MaxKeys": _PAGE}
        while True:
            page = self._try(name, lambda: self.fs.call_s3("list_objects_v2", **asked))
            infos = {f"{bucket}/{info['Key']}": info | {"size": info["Size"]} for info in page.get("Contents", [])}
            yield self._sources(infos)
            if not page.get("IsTruncated"):
                return
            asked["ContinuationToken"] = page["NextContinuationToken"]

    def match(self, pattern: str) -> list[Source]:
        """The files of this place whose keys match a pattern with `*`, `**`, `?` or `[...]`, sorted by key."""
        # fsspec would also expand wildcards in the root; brackets make them literal.
        literal = re.sub(r"([*?[])", r"[\1]", self.root)

        def ask() -> dict[str, dict[str, Any]]:
            self.fs.invalidate_cache()
            return self.fs.glob(f"{literal}/{pattern}", detail=True)

        found = self._followed(self._try(pattern, ask))
        return self._sources({path: info for path, info in found.items() if info["type"] == "file"})

    def _followed(self, found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Replace the size and tag of local links by those of their targets, as `source` gives them."""
        for path, info in found.items():
            if self.local and info.get("islink"):
                with contextlib.suppress(OSError):  # a broken link
                    found[path] = self.fs.info(path)
        return found

    def _entered(self, found: dict[str, dict[str, Any]], seen: list[str]) -> dict[str, dict[str, Any]]:
        """Replace local links to folders by the files there.

        A link to a folder that is listed anyway, or that holds a listed one, stays as it is. `seen` has those folders.
        """
        entered = dict(found)
        for path in (path for path in found if self.local and os.path.islink(path) and os.path.isdir(path)):
            target = os.path.realpath(path)
            if not any(f"{a}/".startswith(f"{b}/") for each in seen for a, b in ((each, target), (target, each))):
                seen.append(target)
                del entered[path]
                inside = self._followed(self.fs.find(f"{path}/", withdirs=False, detail=True))
                entered |= self._entered(inside, seen)
        return entered

    def _sources(self, found: dict[str, dict[str, Any]]) -> list[Source]:
        prefix = self.root + "/"
        return sorted(
            Source(path.removeprefix(prefix), int(info.get("size") or 0), etag_of(info))
            for path, info in found.items()
            if path.startswith(prefix) and not path.endswith("/")  # some stores list folders as empty objects
        )

    def _bytes_of(self, path: str, **part: int) -> bytes:
        if self.local and os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
            raise OSError(f"{path}: a pipe, socket or device, not a file")  # reading one may never end
        return self.fs.cat_file(path, **part)

    def _try(self, name: str, operation: Callable[[], T]) -> T:
        """The operation's result; failures that may pass are retried."""
        deadline, pause, attempt = math.inf, _FIRST_PAUSE, 0
        while True:
            attempt += 1
            try:
                return operation()
            except Exception as error:
                if self.local and not (isinstance(error, OSError) and error.errno in _PASSING):
                    raise
                if isinstance(error, _FINAL) and self.root in str(error):
                    raise
                kind = type(error).__name__
                if isinstance(error, _FINAL):
                    raise type(error)(f"{self.uri_of(name)}: {_line(error)}") from error
                if kind in _WRONG | _DAMAGED:
                    raise
                message = f"{self.uri_of(name)}: {kind}: {_line(error)}"
                if kind in _REFUSED:
                    raise PermissionError(message) from None
                patience = PATIENCE if self.patience is None else self.patience
                deadline = min(deadline, time.monotonic() + patience)  # counted from the first failure
                if time.monotonic() + pause > deadline:
                    throttled = getattr(error, "errno", None) == errno.EBUSY  # so s3fs calls "slow down"
                    raise StorageError(f"{message} (attempts: {attempt})", attempt, throttled=throttled) from None
                _log.info("%s; retrying", message)
            time.sleep(pause * random.uniform(0.5, 1.5))  # others may wait for the same store
            pause = min(2 * pause, _LONGEST_PAUSE)


def _options(uri: str) -> dict[str, Any]:
    """Timeouts and retries of an S3 client; the user's fsspec configuration overrides them."""
    if not re.match("s3a?://", uri):
        return {}
    return {"config_kwargs": _S3 | fsspec.config.conf.get("s3", {}).get("config_kwargs", {})}


def _is_s3(fs: fsspec.AbstractFileSystem) -> bool:
    return "s3" in fs.protocol


async def _get(fs: Any, path: str, most: int | None) -> tuple[bytes, str]:
    """An object's bytes and tag. s3fs's own reading asks for the tag, or the size, with a request of its own."""
    bucket, key, _ = fs.split_path(path)
    answer = await fs._call_s3("get_object", Bucket=bucket, Key=key)
    async with answer["Body"] as body:
        _check_size(int(answer.get("ContentLength") or 0), most)
        return await body.read(), etag_of(answer)


def _check_size(size: int, most: int | None) -> None:
    if most is not None and size > most:
        raise TooLarge(f"{size} bytes")


def _code(error: BaseException) -> str:
    """The error code in an object store's answer, from an error of s3fs."""
    response = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


def etag_of(info: dict[str, Any]) -> str:
    """A tag that changes with a file's content: the object store's ETag, or the local modification time."""
    for field in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "created"):
        if value := info.get(field):
            return str(value.timestamp() if isinstance(value, datetime) else value).strip('"')
    return ""


def split_uri(uri: str | os.PathLike[str]) -> tuple[Place, str]:
    """The folder of a file as a place, and the file's name in it."""
    uri = os.fspath(uri)
    folder, _, name = uri.rpartition("/")
    if folder.endswith(":/"):  # a file in a filesystem's root, e.g. memory://name
        folder += "/"
    return Place(folder or ("/" if uri.startswith("/") else ".")), name


def split_glob(uri: str) -> tuple[str, str]:
    """The URI of the folder before the first wildcard, and the pattern below it, which is empty without a wildcard."""
    scheme, mark, path = uri.rpartition("://")
    folders = path.split("/")
    first = next((n for n, name in enumerate(folders) if re.search(r"[*?[]", name)), None)
    if first is None:
        return uri, ""
    folder = "/".join(folders[:first]) or ("/" if path.startswith("/") else "." if not scheme else "")
    return f"{scheme}{mark}{folder}", "/".join(folders[first:])


def _place(path: str, new: bool, fill: Callable[[BinaryIO], Any]) -> bool:
    """Write a local file under a hidden name, and then rename it; see `Place.write`."""
    try:
        return _place_once(path, new, fill)
    except FileNotFoundError:  # another driver deleted the hidden file, as a leftover
        return _place_once(path, new, fill)


def _place_once(path: str, new: bool, fill: Callable[[BinaryIO], Any]) -> bool:
    folder, base = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    short = base.encode()[:200].decode(errors="ignore")
    temporary = f"{folder}/.{short}.{uuid.uuid4().hex}"
    try:
        with open(temporary, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        if new:
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                reason = "this file system has no hard links, which keep a part from being stored twice"
                reason += " (SMB, exFAT and buckets that are mounted as folders have none)"
                raise OSError(error.errno, f"{folder}: {reason}") from error
            return True
        os.replace(temporary, path)
        return True
    finally:
        Path(temporary).unlink(missing_ok=True)
