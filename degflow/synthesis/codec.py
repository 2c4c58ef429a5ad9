"""The work on a photograph that needs CPUs only: a planned file -> pixels; pixels and LR images -> rows.

`Codec` does it, and `Workers` run it: threads of an actor, or Ray tasks on any node. Nodes without a degrader may run
it too, so this module does not import torch, which takes seconds and hundreds of megabytes.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from degflow import images
from degflow.dataset.layout import Reject
from degflow.dataset.references import reference_to
from degflow.storage import Place, Source, StorageError


class Loaded(NamedTuple):
    """A decoded HR image."""

    key: str
    pixels: np.ndarray  # uint8 "H W 3"
    sha256: str  # of the file


class Encoded(NamedTuple):
    """The rows of one image, with the columns of `layout.ROW`, and the sums of their psnr, clipped and colour_shift."""

    rows: list[dict[str, Any]]
    statistics: np.ndarray


class Draw(NamedTuple):
    """One LR image of an HR image: its scale, that as time in [0, 1], and the seed of what is drawn."""

    scale: float
    time: float
    noise_seed: int


@dataclass(frozen=True)
class Codec:
    """Reads a run's files and makes its rows; small, because it is sent with every task.

    Args:
        root: URI of the folder or prefix of the keys.
        max_pixels: images with more are rejected.
        embed: rows hold HR as PNG, or else as its URI.
        scaled: LR images are shrunk by their scales.
        keep_gray: LR images of a gray photograph are gray.
        seed: of the run.
        model_sha256: of the degrader file.
    """

    root: str
    max_pixels: int
    embed: bool
    scaled: bool
    keep_gray: bool
    seed: int
    model_sha256: str

    def load(self, source: Source) -> Loaded | Reject:
        """Read and decode a file; a bad file is a reject.

        Raises:
            StorageError: the store answers for no file at all, or refuses our credentials.
        """
        place = Place(self.root)
        try:
            images.check_bytes(source.size, self.max_pixels)
            data, etag = place.read_tagged(source.key)
        except FileNotFoundError:
            return Reject(source.key, "read", "no longer there")
        except images.ImageError as error:
            return Reject(source.key, "read", str(error))
        except (StorageError, PermissionError) as error:
            if not place.local and not place.answers():
                raise StorageError(str(error), getattr(error, "attempts", 1)) from None
            return Reject(source.key, "read", str(error), getattr(error, "attempts", 1))
        except Exception as error:  # object stores do not only raise OSErrors
            return Reject(source.key, "read", _reason(error))
        if source.size not in (-1, len(data)) or source.etag not in ("", etag):
            planned = f"size {source.size}, tag {source.etag}"
            return Reject(source.key, "read", f"changed since the plan: {planned}, now size {len(data)}, tag {etag}")
        try:
            pixels = images.decode(data, max_pixels=self.max_pixels)
        except (images.ImageError, MemoryError) as error:
            return Reject(source.key, "decode", _reason(error))
        return Loaded(source.key, pixels, hashlib.sha256(data).hexdigest())

    def encode(self, item: Loaded, draws: Sequence[Draw], lrs: np.ndarray) -> Encoded | Reject:
        """Make the rows of an image; `lrs` is uint8 "N H W 3", one LR image for each draw."""
        try:
            hr = self._hr_of(item)
            gray = self.keep_gray and images.is_gray(item.pixels)
            made = [images.to_gray(lr) if gray else lr for lr in lrs]
            rows = [self._row(item, n, draw, lr, hr) for n, (draw, lr) in enumerate(zip(draws, made, strict=True))]
            return Encoded(rows, np.stack([_compare(item.pixels, lr) for lr in made]).sum(0))
        except Exception as error:  # Pillow's encoders raise many kinds of errors
            return Reject(item.key, "encode", _reason(error))

    def _hr_of(self, item: Loaded) -> dict[str, Any]:
        if self.embed:
            return {"bytes": images.encode_png(item.pixels), "path": item.key}
        return {"bytes": None, "path": reference_to(Place(self.root), item.key)}

    def _row(self, item: Loaded, number: int, draw: Draw, lr: np.ndarray, hr: dict[str, Any]) -> dict[str, Any]:
        if self.scaled:
            lr = images.resize(lr, *images.shrunk_size(lr.shape[0], lr.shape[1], draw.scale))
        return {
            "key": item.key,
            "draw": number,
            "scale": draw.scale,
            "time": draw.time,
            "lr": {"bytes": images.encode_png(lr), "path": f"{item.key}.{number}.png"},
            "hr": hr,
            "height": lr.shape[0],
            "width": lr.shape[1],
            "hr_sha256": item.sha256,
            "seed": self.seed,
            "noise_seed": draw.noise_seed,
            "model_sha256": self.model_sha256,
        }


def _compare(hr: np.ndarray, lr: np.ndarray) -> np.ndarray:
    """psnr, clipped and colour_shift of one LR image, as `layout.Record` defines them."""
    difference = hr.astype(np.float32) - lr
    psnr = min(99.0, 10 * math.log10(255**2 / max(float(np.square(difference).mean(dtype=np.float64)), 1e-10)))
    clipped = float(((lr == 0) | (lr == 255)).mean())
    shift = np.linalg.norm(difference.mean((0, 1), dtype=np.float64))
    return np.array([psnr, clipped, shift])


def _reason(error: Exception) -> str:
    text = str(error)
    return text if isinstance(error, images.ImageError) and text else f"{type(error).__name__}: {text}".rstrip(": ")


class CodecDied(RuntimeError):
    """The process that ran a function of the codec died, at every attempt."""


class Handle(Protocol):
    """A call that was started."""

    def result(self) -> Any:
        """Wait for its result."""


class Workers(Protocol):
    """Run the functions of a codec."""

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Handle:
        """Start a call; an argument that is a handle is replaced by its result."""
        ...


class Threads:
    """Workers that are threads of this process: they start quickly, but a crash in one ends the process."""

    def __init__(self, count: int):
        self.pool = ThreadPoolExecutor(count)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future:
        """Start a call."""
        return self.pool.submit(lambda: function(*(a.result() if isinstance(a, Future) else a for a in arguments)))
