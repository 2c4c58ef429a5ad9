"""Pairs of LR and HR images -> random aligned crops for SR networks.

1. `find_pairs` reads a source: one split of a RealSR-like tree at chosen levels, or a finished synthesized dataset, row
   by row from its shards. It keeps the decoded pixels, in memory or in memory-mapped files.
2. `PairCrops` draws from one or several sources in given shares, and cuts the same crop from both images. Sample n
   depends on (seed, n) alone, so a training sees the same samples with any number of workers and processes, and after
   an interruption.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from degflow import images
from degflow.capture.scenes import HR_LABEL, SceneConfig, SceneImages, kept
from degflow.dataset.layout import SUCCESS
from degflow.dataset.reader import FinishedDataset
from degflow.restoration.liif import pixel_centres
from degflow.storage import Place

SHRINK = 4  # the side of LIIF's LR crops is the crop's, divided by this


class Pair(NamedTuple):
    """A degraded image and its HR image, both uint8 "H W 3"."""

    name: str
    scale: float
    lr: np.ndarray
    hr: np.ndarray


def find_pairs(
    uri: str,
    levels: Mapping[str, float],
    crop: int,
    *,
    resize_lr: bool = False,
    cache: str = "",
    memory: float = 8.0,
    quiet: bool = False,
    share: tuple[int, int] = (0, 1),
) -> list[Pair]:
    """Read a source.

    Args:
        uri: one split of a RealSR-like tree, or a synthesized dataset, which has a `_SUCCESS`.
        levels: of a tree, folder label -> scale of the LR images to take.
        crop: smallest side that an image may have.
        resize_lr: enlarge LR images smaller than HR to HR's size by bicubic.
        cache: local folder for decoded images, shared by all processes; empty: memory of each process.
        memory: most GB (1e9 bytes) of a synthesized dataset's decoded images in memory, when there is no cache.
        quiet: no progress bar.
        share: as for `SceneImages`.

    Raises:
        ValueError: the source is empty, or an image is unsuitable; the message names it.
    """
    if Place(uri).exists(SUCCESS):
        return _from_shards(FinishedDataset(uri), crop, resize_lr, _PixelStore(uri, cache, memory), quiet)
    if HR_LABEL in levels or not levels:
        raise ValueError(
            f"levels={dict(levels)}: must name at least one level of LR images, and not {HR_LABEL}, which is HR"
        )
    config = SceneConfig(uri, {HR_LABEL: 1.0, **levels}, resize_lr, crop, cache)
    scenes, scales = SceneImages(config, quiet, share), list(levels.values())
    if not quiet:
        print(scenes.describe())
    return [
        Pair(f"{scene.name} x{label}", scale, pixels[1 + n], pixels[0])
        for scene, pixels in zip(scenes.scenes, scenes.pixels, strict=True)
        for n, (label, scale) in enumerate(zip(levels, scales, strict=True))
    ]


def _from_shards(source: FinishedDataset, crop: int, resize_lr: bool, store: "_PixelStore", quiet: bool) -> list[Pair]:
    pairs, rows = [], sum(part.rows for part in source.parts)
    with tqdm(total=rows, desc="decoding pairs", disable=quiet) as bar:
        for part in source.parts:
            for _, row in source.rows(part):
                name = f"{source.uri}: {row['key']}, draw {row['draw']}"
                hr, lr = source.hr_of(row), source.lr_of(row)
                size = f"{lr.shape[1]} x {lr.shape[0]} pixels, its HR image {hr.shape[1]} x {hr.shape[0]}"
                if lr.shape != hr.shape:
                    if not resize_lr:
                        raise ValueError(f"{name}: {size}; datasets of size=scaled need resize_lr=true")
                    lr = images.resize(lr, *hr.shape[:2])
                if min(hr.shape[:2]) < crop:
                    raise ValueError(f"{name}: {hr.shape[1]} x {hr.shape[0]} pixels, smaller than crop={crop}")
                pairs.append(Pair(name, row["scale"], store.put(lr), store.put(hr)))
                bar.update()
    if not pairs:
        raise ValueError(f"{source.uri}: no rows in this dataset")
    return pairs


class _PixelStore:
    """Stores each decoded image once, in memory up to a limit or in memory-mapped files."""

    def __init__(self, uri: str, cache: str, memory: float):
        self.uri, self.cache, self.memory = uri, cache, memory
        self.stored: dict[bytes, np.ndarray] = {}
        self.bytes = 0

    def put(self, pixels: np.ndarray) -> np.ndarray:
        """Returns the stored copy of these pixels; several draws of a photograph share one HR image."""
        shape = np.array(pixels.shape).tobytes()
        digest = hashlib.blake2b(shape + np.ascontiguousarray(pixels).tobytes(), digest_size=16)
        if digest.digest() not in self.stored:
            file = Path(self.cache) / f"{digest.hexdigest()}.npy"
            self.stored[digest.digest()] = kept(file, lambda: pixels) if self.cache else self._counted(pixels)
        return self.stored[digest.digest()]

    def _counted(self, pixels: np.ndarray) -> np.ndarray:
        self.bytes += pixels.nbytes
        if self.bytes > self.memory * 1e9:
            raise ValueError(
                f"memory={self.memory:g}: the decoded images of {self.uri} need more GB; "
                "raise it, or set cache=FOLDER to keep them on a disk"
            )
        return pixels


class PairCrops(Dataset[dict[str, Tensor]]):
    """Sample n -> a random crop of a random pair, in one of the eight orientations.

    Args:
        sources: pairs of each source.
        weights: shares of the samples, one for each source.
        crop: side in pixels.
        seed: with n, decides source, pair, place and orientation.
        queries: 0, or for LIIF the number of HR pixels in a sample. Its LR crop has crop / 4 pixels a side; it is a
            crop of crop / 4 * scale pixels, shrunk by antialiased bicubic.
        noise: standard deviation, in 8-bit levels, of the noise added to each source's LR images; empty: none. It is
            white on the sensor grid of the pair's scale, then enlarged to HR's grid by bicubic.

    Raises:
        ValueError: an image is smaller than a crop of it; the message names it.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[Pair]],
        weights: Sequence[float],
        crop: int,
        seed: int,
        queries: int = 0,
        noise: Sequence[float] = (),
    ):
        self.sources, self.crop, self.seed, self.queries = sources, crop, seed, queries
        self.noise = list(noise) or [0.0] * len(sources)
        self.bounds = np.cumsum(weights) / np.sum(weights)
        for pair in (pair for source in sources for pair in source):
            if min(pair.hr.shape[:2]) < (side := self._side(pair)):
                size = f"{pair.hr.shape[1]} x {pair.hr.shape[0]} pixels"
                raise ValueError(f"{pair.name}: {size}, smaller than the {side} that crop={crop} takes of it")

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Sample `index` of an endless sequence.

        Returns:
            lr, hr: uint8 "3 crop crop". For LIIF lr is "3 h h", hr "3 Q" the colours at `coordinates` float32 "Q 2",
            and `cell` float32 "2" the size of HR's pixels.
        """
        random = np.random.default_rng((self.seed, 2, index))
        number = int(np.searchsorted(self.bounds, random.random(), side="right").clip(0, len(self.sources) - 1))
        source, noise = self.sources[number], self.noise[number]
        pair = source[int(random.integers(len(source)))]
        small, side = self.crop // SHRINK, self._side(pair)
        lr, hr = _same_place(pair, side, random)
        if noise:
            lr = _noisy(lr, noise, pair.scale, random)
        if not self.queries:
            return {"lr": _tensor(lr), "hr": _tensor(hr)}
        count = min(self.queries, side * side)
        chosen = torch.from_numpy(random.choice(side * side, self.queries, replace=count < self.queries))
        return {
            "lr": _tensor(images.resize(np.ascontiguousarray(lr), small, small)),
            "hr": _tensor(hr).flatten(1)[:, chosen],
            "coordinates": pixel_centres(side, side)[chosen],
            "cell": torch.full((2,), 2 / side),
        }

    def identity(self) -> str:
        """A digest of the pairs' scales, sizes and some of their pixels, the same wherever they lie."""
        digest = hashlib.sha256()
        for source in self.sources:
            for pair in source:
                digest.update(json.dumps([pair.scale, *pair.hr.shape]).encode())
                digest.update(pair.lr[::8, ::8].tobytes() + pair.hr[::8, ::8].tobytes())
            digest.update(b"next source")
        return digest.hexdigest()

    def _side(self, pair: Pair) -> int:
        """Of the crop of a pair, in pixels of HR."""
        return round(self.crop // SHRINK * pair.scale) if self.queries else self.crop


def _same_place(pair: Pair, side: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    height, width = pair.hr.shape[:2]
    top, left = int(random.integers(height - side + 1)), int(random.integers(width - side + 1))
    turned, mirrored = int(random.integers(4)), bool(random.integers(2))

    def cut(pixels: np.ndarray) -> np.ndarray:
        pixels = np.rot90(pixels[top : top + side, left : left + side], turned)
        return pixels[:, ::-1] if mirrored else pixels

    return cut(pair.lr), cut(pair.hr)


def _noisy(lr: np.ndarray, sigma: float, scale: float, random: np.random.Generator) -> np.ndarray:
    height, width = (max(1, round(side / scale)) for side in lr.shape[:2])
    noise = torch.from_numpy(random.normal(0, sigma, (1, 3, height, width)))
    noise = F.interpolate(noise, lr.shape[:2], mode="bicubic")[0].permute(1, 2, 0).numpy()
    return np.clip(np.rint(lr + noise), 0, 255).astype(np.uint8)


def _tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
