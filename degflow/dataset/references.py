"""The photographs of rows without HR bytes (`hr=reference`). Only those below the run's own input are opened.

A row must not choose what its reader opens: a path in it could name any file of the reader's machine or network.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from degflow import images
from degflow.storage import Place, split_glob, split_uri

INVENTORY = (".parquet", ".csv")
_SAME_SCHEMES = ({"s3", "s3a"}, {"gs", "gcs"}, {"az", "abfs", "abfss"})


def reference_to(root: Place, key: str) -> str:
    """What a row says of its photograph: the URI, or the absolute path of a local file."""
    return root.path(key) if root.local else root.uri_of(key)


def read_reference(row: Mapping[str, Any], recipe: Mapping[str, Any]) -> bytes:
    """The file of a row's photograph.

    Args:
        row: with `key`, `draw`, `hr` and `hr_sha256`.
        recipe: the dataset's configuration.

    Raises:
        ValueError: the path in the row is not that of its key below the input, or the file is gone or has changed.
    """
    path, key = row["hr"]["path"], row["key"]
    root = next((root for root in _roots(recipe) if _is_reference(path, root, key)), None)
    if root is None or (".." in key.split("/") and not root.is_object_store):
        raise ValueError(f"{path}: is not opened, because it is not {key} below the run's input={recipe['input']}")
    try:
        data = root.read(key)
    except FileNotFoundError:
        raise ValueError(f"{path}: no longer there; draw {row['draw']} was made from it") from None
    if hashlib.sha256(data).hexdigest() != row["hr_sha256"]:
        raise ValueError(f"{path}: changed since it was degraded (its sha256 is not {row['hr_sha256']})")
    return data


def _is_reference(path: str, root: Place, key: str) -> bool:
    """Whether a row's path is that of its key; a run may have been continued with another name of the same scheme."""
    expected = reference_to(root, key)
    (scheme, _, rest), (wanted, _, own) = path.partition("://"), expected.partition("://")
    return path == expected or (rest == own != "" and any({scheme, wanted} <= names for names in _SAME_SCHEMES))


def _roots(recipe: Mapping[str, Any]) -> Iterator[Place]:
    """Folders that may hold the keys. Only the run knew whether `*` in a name was a wildcard, so both are tried."""
    uri = recipe["input"]
    if recipe["root"]:
        yield Place(recipe["root"])
        return
    yield Place(uri)
    yield Place(split_glob(uri)[0])
    if uri.lower().endswith((*INVENTORY, *images.SUFFIXES)):  # one file, which keys are beside
        yield split_uri(uri)[0]
