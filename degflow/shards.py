"""One planned shard of HR images -> its rows, in four stages: read, decode, degrade at sampled scales, encode.

Images are taken in windows of `batch` places in the plan. While the flow runs on one window, threads read and decode
the next and encode the one before, so memory holds at most three windows of decoded images, one row group of PNGs,
and the networks' activations for one forward pass. Images of equal size in a window share a forward pass of at most
`FORWARD_PIXELS` pixels (or one image): batches follow from the plan and the images alone, whoever computes them.
"""

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch

from degflow import images
from degflow.dataset import Record, Reject, ShardWriter
from degflow.degrader import Degrader
from degflow.planning import ScaleConfig, SynthesizeConfig
from degflow.storage import Place, Source, etag_of
from degflow.trajectory import time_of_scale

FORWARD_PIXELS = 1 << 20
READ_ATTEMPTS, READ_PAUSE = 4, 0.5  # seconds before the second attempt, doubled before each further one


def uniform_of(seed: int, key: str, draw: int) -> float:
    """A number in [0, 1), with 53 random bits, that depends on these three alone: the same on every machine."""
    digest = hashlib.blake2b(f"{seed}/{draw}/{key}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def scales_of(scale: ScaleConfig, seed: int, key: str) -> list[float]:
    """The scales of an image's draws; `low` and `high` must be numbers unless they are drawn from a list."""
    draws = [uniform_of(seed, key, draw) for draw in range(scale.per_image)]
    if scale.distribution == "list":
        return [scale.values[int(u * len(scale.values))] for u in draws]
    low, high = scale.low, scale.high
    if low is None or high is None:
        raise ValueError(f"scale.low={low}, scale.high={high}: must be numbers here")
    if scale.distribution == "grid":
        draws = [n / (scale.per_image - 1) for n in range(scale.per_image)] if scale.per_image > 1 else [0.5]
    if scale.distribution == "loguniform":
        return [min(high, max(low, low * math.exp(u * math.log(high / low)))) for u in draws]
    return [min(high, low + u * (high - low)) for u in draws]


class Progress(NamedTuple):
    """Images finished since the last report, those of them rejected, and at the end the shard's record."""

    images: int
    rejects: int
    record: Record | None = None


class _Loaded(NamedTuple):
    key: str
    pixels: np.ndarray  # uint8 "H W 3"
    sha256: str
    scales: list[float]


class _Encoded(NamedTuple):
    rows: list[dict[str, Any]]
    statistics: np.ndarray  # sums of psnr, clipped, colour_shift over the rows


class ShardMaker:
    """Makes shards, one after the other.

    Args:
        degrader: on the device that computes.
        config: with `scale.low`, `scale.high` and `hr` resolved.
        threads: for reading, decoding and encoding.
    """

    def __init__(self, degrader: Degrader, config: SynthesizeConfig, threads: int = 2):
        self.degrader, self.config, self.threads = degrader, config, threads
        self.device = next(degrader.parameters()).device
        self.input, self.output = Place(config.input), Place(config.output)

    def make(self, number: int, sources: Sequence[Source]) -> Iterator[Progress]:
        """Make one shard and put it, reporting as images are finished.

        A file that cannot be used becomes a reject. Anything else, such as a failing output, is raised.
        """
        started, sums, rows, waiting = time.monotonic(), np.zeros(3), 0, []
        with ShardWriter(self.output, number) as writer, ThreadPoolExecutor(self.threads) as pool:
            for window in chain(self._windows(pool, sources), [[]]):
                waiting, done = [pool.submit(self._encode, *pair) for pair in self._degrade(window)], waiting
                results = [future.result() for future in done]
                for result in results:
                    if isinstance(result, Reject):
                        writer.reject(result)
                    else:
                        writer.add(result.rows)
                        sums, rows = sums + result.statistics, rows + len(result.rows)
                yield Progress(len(results), sum(isinstance(result, Reject) for result in results))
            means = tuple((sums / rows).tolist()) if rows else (None, None, None)
            yield Progress(0, 0, writer.finish(time.monotonic() - started, *means))

    def _windows(self, pool: ThreadPoolExecutor, sources: Sequence[Source]) -> Iterator[list[_Loaded | Reject]]:
        def submit(start: int) -> list[Future]:
            return [pool.submit(self._load, source) for source in sources[start : start + self.config.batch]]

        ahead = submit(0)
        for start in range(0, len(sources), self.config.batch):
            window, ahead = ahead, submit(start + self.config.batch)
            yield [future.result() for future in window]

    def _read(self, source: Source) -> tuple[bytes, str] | Reject:
        """Bytes and version tag of a file; storage that fails is asked again, with pauses."""
        for attempt in range(1, READ_ATTEMPTS):
            try:
                return self.input.read(source.key), self._etag(source)
            except FileNotFoundError:
                return Reject(source.key, "read", "no longer there", attempt)
            except Exception:  # object stores raise more than OSError
                time.sleep(READ_PAUSE * 2 ** (attempt - 1))
        try:
            return self.input.read(source.key), self._etag(source)
        except Exception as error:
            return Reject(source.key, "read", _reason(error), READ_ATTEMPTS)

    def _etag(self, source: Source) -> str:
        return etag_of(self.input.fs.info(self.input.path(source.key)))

    def _load(self, source: Source) -> _Loaded | Reject:
        found = self._read(source)
        if isinstance(found, Reject):
            return found
        data, etag = found
        if (len(data), etag) != (source.size, source.etag):
            planned = f"size {source.size}, tag {source.etag}"
            return Reject(source.key, "read", f"changed since the plan: {planned}, now size {len(data)}, tag {etag}")
        try:
            pixels = images.decode(data, max_pixels=self.config.max_pixels)
        except (images.ImageError, MemoryError) as error:
            return Reject(source.key, "decode", _reason(error))
        scales = scales_of(self.config.scale, self.config.seed, source.key)
        return _Loaded(source.key, pixels, hashlib.sha256(data).hexdigest(), scales)

    def _degrade(self, window: Sequence[_Loaded | Reject]) -> list[tuple[_Loaded | Reject, np.ndarray | Reject | None]]:
        """Each place of the window with its LR images, uint8 "N H W 3", or with the reject that it became."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for place, item in enumerate(window):
            if isinstance(item, _Loaded):
                groups.setdefault(item.pixels.shape, []).append(place)
        results: list[np.ndarray | Reject | None] = [None] * len(window)
        for (height, width, _), places in groups.items():
            together = max(1, FORWARD_PIXELS // (height * width))
            for first in range(0, len(places), together):
                chosen = places[first : first + together]
                lrs = self._flow([item for item in map(window.__getitem__, chosen) if isinstance(item, _Loaded)])
                for place, lr in zip(chosen, lrs, strict=True):
                    results[place] = lr
        return list(zip(window, results, strict=True))

    def _flow(self, batch: Sequence[_Loaded]) -> list[np.ndarray | Reject]:
        try:
            hr = images.to_tensor(np.stack([item.pixels for item in batch])).to(self.device)
            scale = torch.tensor([item.scales for item in batch], dtype=torch.float64)
            lr = self.degrader(hr, scale, steps=self.config.solver.steps, solver=self.config.solver.solver)
            finite = lr.isfinite().flatten(1).all(1).tolist()
            pixels = images.to_pixels(lr)
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            if len(batch) > 1:
                return [result for item in batch for result in self._flow([item])]
            height, width, _ = batch[0].pixels.shape
            return [Reject(batch[0].key, "degrade", f"{width} x {height} pixels: out of memory on {self.device}")]
        return [
            image if good else Reject(item.key, "degrade", "the result is not finite")
            for item, image, good in zip(batch, pixels, finite, strict=True)
        ]

    def _encode(self, item: _Loaded | Reject, lr: np.ndarray | Reject | None) -> _Encoded | Reject:
        if isinstance(item, Reject):
            return item
        if not isinstance(lr, np.ndarray):
            return lr or Reject(item.key, "degrade", "no result")
        try:
            hr = self._hr_of(item)
            rows = [self._row(item, draw, image, hr) for draw, image in enumerate(lr)]
            return _Encoded(rows, np.stack([_compare(item.pixels, image) for image in lr]).sum(0))
        except Exception as error:  # Pillow's encoders raise many kinds
            return Reject(item.key, "encode", _reason(error))

    def _hr_of(self, item: _Loaded) -> dict[str, Any]:
        if self.config.hr == "embed":
            return {"bytes": images.encode_png(item.pixels, self.config.png_level), "path": item.key}
        local = self.input.local  # their URI may be relative to a folder that no reader knows
        return {"bytes": None, "path": self.input.path(item.key) if local else self.input.uri_of(item.key)}

    def _row(self, item: _Loaded, draw: int, lr: np.ndarray, hr: dict[str, Any]) -> dict[str, Any]:
        scale = item.scales[draw]
        if self.config.size == "scaled":
            height, width, _ = lr.shape
            lr = images.resize(lr, *images.shrunk_size(height, width, scale))
        at = time_of_scale(torch.tensor(scale, dtype=torch.float64), self.degrader.low, self.degrader.high)
        return {
            "key": item.key,
            "draw": draw,
            "scale": scale,
            "time": float(at),
            "lr": {"bytes": images.encode_png(lr, self.config.png_level), "path": f"{item.key}.{draw}.png"},
            "hr": hr,
            "height": lr.shape[0],
            "width": lr.shape[1],
            "hr_sha256": item.sha256,
            "seed": self.config.seed,
            "model_sha256": self.degrader.sha256,
        }


def _compare(hr: np.ndarray, lr: np.ndarray) -> np.ndarray:
    """psnr, clipped and colour_shift of one LR image, as `Record` defines them."""
    difference = hr.astype(np.float32) - lr
    psnr = min(99.0, 10 * math.log10(255**2 / max(float(np.square(difference).mean(dtype=np.float64)), 1e-10)))
    clipped = float(((lr == 0) | (lr == 255)).mean())
    shift = np.linalg.norm(difference.mean((0, 1), dtype=np.float64))
    return np.array([psnr, clipped, shift])


def _out_of_memory(error: Exception) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(words in str(error) for words in ("DefaultCPUAllocator", "not enough memory"))


def _reason(error: Exception) -> str:
    text = str(error)
    return text if isinstance(error, images.ImageError) and text else f"{type(error).__name__}: {text}".rstrip(": ")
