"""Places (any fsspec URI), and checkpoints that describe themselves.

Every filesystem of degflow is opened here. Objects are written whole: a reader sees all of one or none of it.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import fsspec
import safetensors.torch
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError
from torch import Tensor


class Source(NamedTuple):
    """A file below a place: its key (the path below the root, "/"-separated, as stored), bytes and version tag."""

    key: str
    size: int
    etag: str


class Place:
    """A folder or an object-store prefix, e.g. `photos`, `/data/photos`, `s3://bucket/photos`.

    Endpoint and credentials of object stores come from the environment or the usual profile files.

    Args:
        uri: any fsspec URI; one without a scheme is a local path.
    """

    def __init__(self, uri: str):
        if not uri:
            raise ValueError("an empty URI names no place")
        if re.match(r"[a-z0-9+.]+://[^/@]*:[^/@]*@", uri, re.IGNORECASE):
            raise ValueError(
                "a URI must not hold a password (configurations and datasets keep URIs); use the environment"
            )
        bare = uri.rstrip("/")
        self.uri = uri if bare.endswith(":") and "://" in uri else bare or "/"
        self.fs, root = fsspec.core.url_to_fs(self.uri)
        self.root = root.rstrip("/")
        self.local = isinstance(self.fs, LocalFileSystem)

    def path(self, name: str) -> str:
        """The filesystem's own path of a file below this place."""
        return f"{self.root}/{name}" if name else self.root

    def uri_of(self, name: str) -> str:
        """The URI of a file below this place."""
        return f"{self.uri}{name}" if self.uri.endswith("/") else f"{self.uri}/{name}"

    def read(self, name: str) -> bytes:
        """All bytes of a file; FileNotFoundError or another OSError names it."""
        return self.fs.cat_file(self.path(name))

    def write(self, name: str, data: bytes) -> None:
        """Put a file, whole: locally a hidden sibling is renamed into place, object stores put it in one request."""
        path = self.path(name)
        if not self.local:
            self.fs.pipe_file(path, data)
            return
        with _replacing(path) as file:
            file.write(data)

    def exists(self, name: str = "") -> bool:
        """Whether a file (or, for "", the place itself) is there."""
        self.fs.invalidate_cache()
        return self.fs.exists(self.path(name))

    def delete(self, name: str) -> None:
        """Delete a file, or a folder with all below it, if it is there."""
        path = self.path(name)
        if not self.exists(name):
            return
        if self.local:
            self.fs.rm(path, recursive=True)
            return
        for found in [path] if self.fs.isfile(path) else self.fs.find(path):  # rm would take [ ] * ? for a pattern
            self.fs.rm_file(found)

    def files(self, name: str = "") -> list[Source]:
        """All files below a folder of this place, sorted by key; empty when there is no such folder."""
        self.fs.invalidate_cache()
        found = self.fs.find(self.path(name), withdirs=False, detail=True)
        prefix = self.root + "/"
        sources = [
            Source(path.removeprefix(prefix), int(info.get("size") or 0), etag_of(info))
            for path, info in found.items()
            if path.startswith(prefix)
        ]
        return sorted(sources)


def etag_of(info: dict[str, Any]) -> str:
    """A tag that changes with a file's content: the object store's ETag, or the local modification time."""
    for field in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "created"):
        if info.get(field):
            return str(info[field]).strip('"')
    return ""


def split_uri(uri: str) -> tuple[Place, str]:
    """The place that holds a file, and the file's name in it."""
    folder, _, name = uri.rpartition("/")
    if folder.endswith(":/"):  # directly below a filesystem's root, e.g. memory://name
        folder += "/"
    return Place(folder or ("/" if uri.startswith("/") else ".")), name


def save_checkpoint(uri: str, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    """Write tensors and a JSON description of what they are as one safetensors file."""
    place, name = split_uri(uri)
    contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    place.write(name, safetensors.torch.save(contiguous, {"degflow": json.dumps(description)}))


def load_checkpoint(uri: str, *kinds: str) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Read a file of `save_checkpoint`.

    Args:
        uri: the file.
        kinds: what its description may call itself, e.g. "degrader"; none: anything.

    Returns:
        The tensors, the description, and the file's sha256.

    Raises:
        ValueError: no such file, not safetensors, or of another kind; the message names the file.
    """
    place, name = split_uri(uri)
    try:
        data = place.read(name)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise ValueError(f"{uri}: no such file") from None
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        description = json.loads(header["__metadata__"]["degflow"])
        found = description["kind"]
    except (SafetensorError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{uri}: not a degflow checkpoint ({type(error).__name__}: {error})") from None
    if kinds and found not in kinds:
        raise ValueError(f"{uri}: of kind {found!r}, where {' or '.join(map(repr, kinds))} is needed")
    return tensors, description, hashlib.sha256(data).hexdigest()


def upload(place: Place, file: str, name: str) -> None:
    """Put a local file at a place, whole as with `Place.write`, without holding it in memory."""
    path = place.path(name)
    if not place.local:
        place.fs.put_file(file, path)
        return
    with open(file, "rb") as source, _replacing(path) as target:
        shutil.copyfileobj(source, target, 1 << 20)


@contextlib.contextmanager
def _replacing(path: str) -> Iterator[BinaryIO]:
    """A local file to write, which gets its name when all is written; until then it is a hidden sibling."""
    folder, base = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    short = base.encode()[:200].decode(errors="ignore")
    temporary = f"{folder}/.{short}.{uuid.uuid4().hex}"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
