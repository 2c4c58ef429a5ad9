"""The work on a photograph that needs CPUs only: a planned file -> pixels; pixels and LR images -> rows.

`Codec` does it, and `Workers` run it: threads of an actor, or Ray tasks on any node. Nodes without a degrader may run
it too, so this module does not import torch, which takes seconds and hundreds of megabytes.
"""

import hashlib
import math
import socket
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from degflow import images
from degflow.dataset.layout import Reject
from degflow.dataset.references import reference_to
from degflow.storage import Place, Source, StorageError, TooLarge

DIED = "its process died"  # in the error of a reject whose codec died
_USUAL_SIZE = 4 << 20  # bytes, of a file whose size is unknown


class Loaded(NamedTuple):
    """A decoded HR image."""

    key: str
    pixels: np.ndarray  # uint8 "H W 3"
    sha256: str  # of the file


class Postponed(NamedTuple):
    """The store answers, but does not give this file now."""

    key: str
    error: str
    attempts: int
    throttled: bool  # it asked for fewer requests; it did not fail


class NeedsMemory(NamedTuple):
    """`Codec.load` did not decode: by the file's header that takes so many bytes, more than its room."""

    bytes: int


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
        embed: rows hold HR's pixels, or else its URI.
        codec: of LR and embedded HR; one of `images.CODECS`.
        scaled: LR images are shrunk by their scales.
        keep_gray: LR images of a gray photograph are gray.
        seed: of the run.
        model_sha256: of the degrader file.
        patience: seconds for which a store's failures are retried, wherever the codec runs; None: `storage.PATIENCE`
            of each process.
    """

    root: str
    max_pixels: int
    embed: bool
    codec: str
    scaled: bool
    keep_gray: bool
    seed: int
    model_sha256: str
    patience: float | None = None

    def load(
        self, source: Source, patience: float | None = None, room: int | None = None
    ) -> Loaded | Reject | Postponed | NeedsMemory:
        """Read and decode a file; a bad file is a reject.

        Args:
            source: the planned file.
            patience: seconds after which a file that the store does not give is postponed; None: it is asked for with
                the usual patience, and then is a reject.
            room: bytes that decoding may take; None: any.

        Raises:
            StorageError: the store answers for no file at all, or refuses our credentials.
        """
        place = Place(self.root, patience=self.patience)
        asked = Place(self.root, patience=self.patience if patience is None else patience)
        try:
            images.check_bytes(source.size, self.max_pixels)
            data, etag = asked.read_tagged(source.key, images.most_bytes(self.max_pixels))
        except TooLarge as error:
            return Reject(source.key, "read", f"{error}: more than any image of max_pixels={self.max_pixels} has")
        except FileNotFoundError as error:
            if place.local and not place.answers():
                raise self._unseen(error) from None
            return Reject(source.key, "read", "no longer there")
        except images.ImageError as error:
            return Reject(source.key, "read", str(error))
        except (StorageError, PermissionError) as error:
            if not getattr(error, "throttled", False) and not place.answers():
                raise self._unseen(error) from None
            if patience is not None and isinstance(error, StorageError):
                return Postponed(source.key, str(error), error.attempts, error.throttled)
            return Reject(source.key, "read", str(error), getattr(error, "attempts", 1))
        except Exception as error:  # object stores do not only raise OSErrors
            if not place.answers():
                raise self._unseen(error) from None
            return Reject(source.key, "read", _reason(error))
        if source.size not in (-1, len(data)) or source.etag not in ("", etag):
            planned = f"size {source.size}, tag {source.etag}"
            return Reject(source.key, "read", f"changed since the plan: {planned}, now size {len(data)}, tag {etag}")
        if room is not None and (needed := images.decoding_memory(data, max_pixels=self.max_pixels)) > room:
            return NeedsMemory(needed)
        try:
            pixels = images.decode(data, max_pixels=self.max_pixels)
        except (images.ImageError, MemoryError) as error:
            return Reject(source.key, "decode", _reason(error))
        return Loaded(source.key, pixels, hashlib.sha256(data).hexdigest())

    def _unseen(self, error: Exception) -> StorageError:
        # A task may run on another machine than its actor.
        return StorageError(str(error), getattr(error, "attempts", 1), socket.gethostname())

    def memory_for(self, source: Source) -> int:
        """Bytes that loading a file takes, judged from its planned size: most have less than 4 pixels per byte."""
        size = source.size if source.size >= 0 else _USUAL_SIZE
        return images.bytes_to_decode(min(4 * size, self.max_pixels), size)

    def memory_to_encode(self, lrs: np.ndarray) -> int:
        """Bytes that `encode` takes at most."""
        count, height, width, _ = lrs.shape
        return height * width * (36 + 6 * count)  # measured on noise: 30 + 4 for each LR image

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
            return {"bytes": images.encode(item.pixels, self.codec)[0], "path": item.key}
        return {"bytes": None, "path": reference_to(Place(self.root), item.key)}

    def _row(self, item: Loaded, number: int, draw: Draw, lr: np.ndarray, hr: dict[str, Any]) -> dict[str, Any]:
        if self.scaled:
            lr = images.resize(lr, *images.shrunk_size(lr.shape[0], lr.shape[1], draw.scale))
        data, suffix = images.encode(lr, self.codec)
        return {
            "key": item.key,
            "draw": number,
            "scale": draw.scale,
            "time": draw.time,
            "lr": {"bytes": data, "path": f"{item.key}.{number}.{suffix}"},
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

    def load(self, codec: Codec, source: Source, patience: float | None = None) -> Any:
        """Start `Codec.load`; returns its handle."""
        ...

    def encode(self, codec: Codec, item: Any, draws: Sequence[Draw], lrs: np.ndarray) -> Any:
        """Start `Codec.encode` of what `item`, the handle of a `load`, gives; returns its handle."""
        ...


class Threads:
    """Workers that are threads of this process: they start quickly, but a crash in one ends the process."""

    def __init__(self, count: int):
        self.pool = ThreadPoolExecutor(count)

    def load(self, codec: Codec, source: Source, patience: float | None = None) -> Future:
        """Start `Codec.load`."""
        return self.pool.submit(codec.load, source, patience)

    def encode(self, codec: Codec, item: Future, draws: Sequence[Draw], lrs: np.ndarray) -> Future:
        """Start `Codec.encode`."""
        return self.pool.submit(lambda: codec.encode(item.result(), draws, lrs))
