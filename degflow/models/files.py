"""Checkpoint files that describe themselves: one safetensors file, with a JSON description in its metadata."""

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from degflow.storage import split_uri

SHIPPED = str(Path(__file__).parent / "weights" / "canon-simulated.safetensors")
SHIPPED_SHA256 = "7e572d91b5ad1f4a554bdb9560b8598f52cc738c8b46febfc738a6b6f9e2c154"


def save_checkpoint(uri: str, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    """Write tensors and a JSON description of what they are as one safetensors file."""
    place, name = split_uri(uri)
    place.write(name, checkpoint(tensors, description))


def checkpoint(tensors: dict[str, Tensor], description: dict[str, Any]) -> bytes:
    """The bytes of a file of `save_checkpoint`."""
    contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    return safetensors.torch.save(contiguous, {"degflow": json.dumps(description)})


def load_checkpoint(uri: str, *kinds: str) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Read a file of `save_checkpoint`.

    Args:
        uri: the file; "shipped": the degrader that comes with degflow ("./shipped": a file of that name).
        kinds: what its description may call itself, e.g. "degrader"; none: anything.

    Returns:
        The tensors, the description, and the file's sha256.

    Raises:
        ValueError: no such file, not safetensors, of another kind, or the shipped one is cut off or changed; the
            message names the file.
    """
    if not uri:
        raise ValueError('no checkpoint is named; "shipped" is the degrader that comes with degflow')
    uri, sha256 = (SHIPPED, SHIPPED_SHA256) if uri == "shipped" else (uri, "")
    place, name = split_uri(uri)
    try:
        data = place.read(name)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise ValueError(f"{uri}: no such file") from None
    digest = hashlib.sha256(data).hexdigest()
    if data.startswith(b"version https://git-lfs"):
        raise ValueError(f"{uri}: a pointer of Git LFS in place of the file: `git lfs pull` fetches it")
    if sha256 and digest != sha256:
        raise ValueError(f"{uri}: {len(data)} bytes with sha256 {digest}, must be {sha256}: cut off or changed")
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        description = json.loads(header["__metadata__"]["degflow"])
        found = description["kind"]
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{uri}: not a degflow checkpoint ({type(error).__name__}: {error})") from None
    if kinds and found not in kinds:
        raise ValueError(f"{uri}: of kind {found!r}, where {' or '.join(map(repr, kinds))} is needed")
    return tensors, description, digest
