"""RealSR-like scene folders -> random aligned crops at every level.

1. `find_scenes` lists a tree `ROOT/2/ID_HR.png, ROOT/2/ID_LR2.png, ROOT/4/...` and keeps the ids that every level has.
2. `SceneImages` decodes each image once, checks that the images of a scene have one size, and keeps the pixels, in
   memory or in memory-mapped files that all processes of a machine share. Random crops of them are cheap.
3. `Crops` cuts the same crop, with the same flips, from every level, and draws what else is random in a sample. Sample
   n depends on (seed, n) alone, so a training sees the same samples with any number of workers and processes, and after
   an interruption.
"""

import functools
import hashlib
import json
import math
import os
import re
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from degflow import images
from degflow.config import option, required
from degflow.storage import Place, Source

HR_LABEL = "1"


@dataclass(frozen=True)
class SceneConfig:
    """Where the scenes are and what is cut from them."""

    data: str = required("folder or URI of one split of a RealSR-like tree, e.g. RealSR/Canon/Train")
    levels: dict[str, float] = option(
        {"1": 1.0, "2": 2.0, "4": 4.0},
        "folder label -> scale (nominal or optical); label 1 is the HR image",
        common=True,
    )
    resize_lr: bool = option(False, "enlarge LR images smaller than HR (RealSR V3) to HR's size by bicubic")
    crop: int = option(256, "side of the random crops, in pixels", common=True)
    cache: str = option(
        "", "local folder for decoded and encoded images, shared by all processes; empty: memory of each process"
    )
    reductions: tuple[float, ...] = option(
        (1.0,),
        "factors by which all images of a scene are shrunk for training: shrunk by f, a capture at scale s is one at "
        "s / f",
    )

    def __post_init__(self):
        check_levels(self.levels)
        if self.crop < 8:
            raise ValueError(f"scenes.crop={self.crop}: must be at least 8")
        if not self.reductions or not all(1 <= factor < math.inf for factor in self.reductions):
            raise ValueError(
                f"scenes.reductions={list(self.reductions)}: at least one factor, each at least 1 and finite"
            )


class Scene(NamedTuple):
    """One scene: its id and the file of each level, HR first, as keys below the tree's root."""

    name: str
    files: tuple[str, ...]


def check_levels(levels: dict[str, float]) -> None:
    """Raise ValueError unless levels are HR (label 1) and at least one more, with scales above 0 that increase."""
    scales = list(levels.values())
    if next(iter(levels), None) != HR_LABEL or len(levels) < 2:
        raise ValueError(f"levels={levels}: must begin with label {HR_LABEL} (HR) and name at least one more")
    if not all(a < b for a, b in pairwise([0.0, *scales])):
        raise ValueError(f"levels={levels}: scales must be above 0 and increase")


def find_scenes(uri: str, labels: Sequence[str]) -> tuple[list[Scene], dict[str, list[str]]]:
    """List the scenes of a tree.

    Args:
        uri: folder that holds one folder per level label.
        labels: level labels, HR's ("1") first; HR files are taken from the first other label's folder.

    Returns:
        The scenes present at every level, sorted by id; and for each level the ids missing from it.

    Raises:
        ValueError: no scene is present at every level.
    """
    place, wanted = Place(uri), [label for label in labels if label != HR_LABEL]
    listing: dict[str, dict[str, str]] = {label: {} for label in labels}
    others: list[str] = []
    trees: set[str] = set()  # below or above this folder
    for source in place.files():
        folder, _, name = source.key.rpartition("/")
        if match := re.fullmatch(rf"(?:(.+)/)?({_any(wanted)})/.+_LR\2\.\w+", source.key):
            trees |= {place.uri_of(match[1])} if match[1] else set()
        elif not folder and re.fullmatch(rf".+_LR({_any(wanted)})\.\w+", name):
            trees.add(place.uri.rpartition("/")[0] or ".")
        if folder not in wanted or not name.lower().endswith(images.SUFFIXES):
            continue
        stem = name.rpartition(".")[0]
        if folder == wanted[0] and stem.endswith("_HR"):
            listing[HR_LABEL][stem.removesuffix("_HR")] = source.key
        if match := re.fullmatch(rf"(.+)_LR{re.escape(folder)}", stem):
            listing[folder][match[1]] = source.key
        elif not stem.endswith("_HR"):
            others.append(source.key)
    everything = set().union(*listing.values())
    missing = {label: sorted(everything - set(files)) for label, files in listing.items()}
    complete = sorted(everything.intersection(*listing.values()))
    if not complete:
        expected = f"{wanted[0]}/ID_HR.png and {wanted[0]}/ID_LR{wanted[0]}.png"
        counts = ", ".join(f"{label}: {len(files)}" for label, files in listing.items())
        offence = _offence(listing, sorted(everything), sorted(others), wanted)
        if trees and not everything:
            offence = f"; there are scenes in {', '.join(sorted(trees)[:4])}: give one of these folders"
        raise ValueError(
            f"data={uri}: no scene has every level of {list(labels)} (found {counts}); expected {expected}{offence}"
        )
    scenes = [Scene(name, tuple(listing[label][name] for label in labels)) for name in complete]
    return scenes, {label: names for label, names in missing.items() if names}


def _any(labels: Sequence[str]) -> str:
    return "|".join(map(re.escape, labels))


def _offence(
    listing: dict[str, dict[str, str]], names: Sequence[str], others: Sequence[str], wanted: Sequence[str]
) -> str:
    """The first missing file, and the first image whose name does not fit."""
    said = ""
    if names:
        label = next(label for label in listing if names[0] not in listing[label])
        missing = f"{wanted[0]}/{names[0]}_HR" if label == HR_LABEL else f"{label}/{names[0]}_LR{label}"
        said += f"; the first that is missing is {missing}.png"
    if others:
        said += f"; {others[0]} is not named so"
    return said


class SceneImages:
    """The decoded images of every scene, each "K H W 3" uint8, HR first.

    Args:
        config: tree, levels and cache.
        quiet: no progress bar.
        share: see `in_turn`.

    Raises:
        ValueError: a scene's files differ in size, or one is smaller than the crop; the message names the file.
    """

    def __init__(self, config: SceneConfig, quiet: bool = False, share: tuple[int, int] = (0, 1)):
        self.config = config
        self.place = Place(config.data)
        self.scenes, self.missing = find_scenes(config.data, list(config.levels))
        turns = in_turn(len(self.scenes), share)
        loaded = {n: self._load(self.scenes[n]) for n in tqdm(turns, "decoding scenes", disable=quiet)}
        self.pixels = [loaded[n] for n in range(len(self.scenes))]

    def __len__(self) -> int:
        return len(self.scenes)

    def identity(self) -> str:
        """A digest of the scenes' names, sizes and some of their pixels, the same wherever the tree lies."""
        digest = hashlib.sha256()
        for scene, pixels in zip(self.scenes, self.pixels, strict=True):
            digest.update(json.dumps([scene.name, *pixels.shape]).encode())
            digest.update(pixels[:, ::8, ::8].tobytes())
        return digest.hexdigest()

    def describe(self) -> str:
        """One line: number of scenes and sizes, and how many ids each level lacks, with the first names."""
        sizes = Counter(f"{array.shape[2]} x {array.shape[1]}" for array in self.pixels).most_common()
        shown = ", ".join([size for size, _ in sizes[:3]] + ["..."] * (len(sizes) > 3))
        line = f"{len(self)} scene{'s' * (len(self) != 1)} at levels {', '.join(self.config.levels)} ({shown})"
        for label, names in self.missing.items():
            line += f"; {len(names)} without level {label}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        return line

    def _load(self, scene: Scene) -> np.ndarray:
        pixels = self._cached(scene) if self.config.cache else self._decode(scene)
        height, width = pixels.shape[1:3]
        if min(height, width) < self.config.crop:
            file = self.place.uri_of(scene.files[0])
            raise ValueError(f"{file}: {width} x {height} pixels, smaller than crop={self.config.crop}")
        return pixels

    def _cached(self, scene: Scene) -> np.ndarray:
        identity = "\n".join((self.place.everywhere, str(self.config.resize_lr), *map(self._version, scene.files)))
        path = Path(self.config.cache) / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.npy"
        return kept(path, lambda: self._decode(scene))

    @functools.cached_property
    def _listed(self) -> dict[str, Source]:
        return {source.key: source for source in self.place.files()}

    def _version(self, key: str) -> str:
        source = self._listed.get(key) or self.place.source(key)
        return f"{key} {source.size} {source.etag}"

    def _decode(self, scene: Scene) -> np.ndarray:
        levels = []
        for key in scene.files:
            try:
                pixels = images.decode(self.place.read(key))
            except images.ImageError as error:
                raise ValueError(f"{self.place.uri_of(key)}: {error}") from None
            levels.append(self._fit(pixels, levels[0].shape if levels else pixels.shape, key))
        return np.stack(levels)

    def _fit(self, pixels: np.ndarray, hr_shape: tuple[int, ...], key: str) -> np.ndarray:
        height, width = hr_shape[:2]
        if pixels.shape == hr_shape:
            return pixels
        size = f"{pixels.shape[1]} x {pixels.shape[0]} pixels, its HR image {width} x {height}"
        if not self.config.resize_lr:
            raise ValueError(
                f"{self.place.uri_of(key)}: {size}; a scene must have one size (RealSR V2), or set resize_lr=true (V3)"
            )
        if pixels.shape[0] > height or pixels.shape[1] > width:
            raise ValueError(f"{self.place.uri_of(key)}: {size}; resize_lr=true takes smaller LR images only")
        sides = [(height, pixels.shape[0]), (width, pixels.shape[1])]
        if max(hr / (lr + 1) for hr, lr in sides) > min(hr / (lr - 1) for hr, lr in sides):  # a pixel for rounding
            raise ValueError(f"{self.place.uri_of(key)}: {size}; both sides must be HR's divided by the same factor")
        return images.resize(pixels, height, width)


def in_turn(count: int, share: tuple[int, int]) -> list[int]:
    """The order in which one of several processes makes the `count` files of a cache.

    Args:
        count: files.
        share: (n, N): this is process n of N. It begins with every N-th file, from file n on. When it comes to the
            others, their processes have made most of them.
    """
    n, processes = share
    return sorted(range(count), key=lambda file: (file - n) % processes)


def kept(path: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The array of a cache's file, memory-mapped; made first where there is none, and never seen half written.

    It holds no file open: NumPy's maps do, and RealSR has more arrays than the 1024 files that a process may open. But
    where Linux counts all that is promised (vm.overcommit_memory=2), the arrays count as memory of every process.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{uuid.uuid4().hex}.npy")
        try:
            np.save(temporary, np.ascontiguousarray(make()))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    head = np.load(path, mmap_mode="r", allow_pickle=False)
    whole = torch.from_file(str(path), shared=False, size=head.offset + head.nbytes, dtype=torch.uint8).numpy()
    array = whole[head.offset :].view(head.dtype).reshape(head.shape)
    array.flags.writeable = False
    return array


class Crops(Dataset[dict[str, Tensor]]):
    """Sample n -> the same random crop, with the same flips, of several images of one scene.

    Whatever else is random in a sample is drawn here too, by `draw` of a subclass, from the sample's own generator.

    Args:
        stacks: the images of each scene, uint8 "K H W 3"; or latents, see `training.latents`.
        crop: side in pixels.
        seed: with n, decides everything.
    """

    def __init__(self, stacks: Sequence[np.ndarray], crop: int, seed: int):
        self.stacks, self.crop, self.seed = stacks, crop, seed

    def draw(self, random: np.random.Generator, scene: int) -> tuple[dict[str, int], dict[str, Tensor]]:
        """Name -> number of the image in the stack, and name -> tensor, of a sample of this scene."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Sample `index` of an endless sequence: uint8 "3 crop crop" images, what `draw` adds, and int64 `number`."""
        epoch, place = divmod(index, len(self.stacks))
        scene = int(_order(len(self.stacks), self.seed, epoch)[place])
        stack, random = self.stacks[scene], np.random.default_rng((self.seed, 1, index))
        top, left = (int(random.integers(side - self.crop + 1)) for side in stack.shape[1:3])
        crop = stack[:, top : top + self.crop, left : left + self.crop]
        crop = self.flip(crop, *(random.random() < 0.5 for _ in range(2)))
        chosen, drawn = self.draw(random, scene)
        images = {name: _tensor(crop[number]) for name, number in chosen.items()}
        return images | drawn | {"number": torch.tensor(index)}

    def flip(self, crop: np.ndarray, upside_down: bool, mirrored: bool) -> np.ndarray:
        """A crop "K crop crop 3" -> the same, flipped as asked."""
        crop = crop[:, ::-1] if upside_down else crop
        return crop[:, :, ::-1] if mirrored else crop


class LevelCrops(Crops):
    """Stage 1: `target`, the HR image or a level at random, and `guide`, the image that gives the skips.

    Args:
        stacks: HR and the LR levels, "K H W 3"; or behind them their images after the optics, "2K-1 H W 3".
        levels: K.
        crop, seed: see `Crops`.
    """

    def __init__(self, stacks: Sequence[np.ndarray], levels: int, crop: int, seed: int):
        super().__init__(stacks, crop, seed)
        self.levels = levels

    def draw(self, random: np.random.Generator, scene: int) -> tuple[dict[str, int], dict[str, Tensor]]:
        """See `Crops`."""
        level = int(random.random() * self.levels)
        after_optics = len(self.stacks[scene]) > self.levels and level > 0
        return {"target": level, "guide": self.levels - 1 + level if after_optics else 0}, {}


class PathCrops(Crops):
    """The published stage 2: `images`, all levels "K 3 crop crop", and float64 `time` "points", uniform in [0, 1).

    Args:
        stacks, crop, seed: see `Crops`.
        points: of the path that a sample has, each with its time.
    """

    def __init__(self, stacks: Sequence[np.ndarray], crop: int, seed: int, points: int = 1):
        super().__init__(stacks, crop, seed)
        self.points = points

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """See `Crops`."""
        sample = super().__getitem__(index)
        levels = torch.stack([sample.pop(str(level)) for level in range(len(self.stacks[0]))])
        return {"images": levels} | sample

    def draw(self, random: np.random.Generator, scene: int) -> tuple[dict[str, int], dict[str, Tensor]]:
        """See `Crops`."""
        levels = {str(level): level for level in range(len(self.stacks[scene]))}
        return levels, {"time": torch.from_numpy(random.random(self.points))}


class ResidualCrops(Crops):
    """Stage 2 for draws: `hr`, `lr` at a random level, `skeleton` (HR after the optics), `time`, and `tau`.

    `time`, of the level, and `tau`, uniform in [0, 1), are float64.

    Args:
        stacks: HR, the LR levels and their images after the optics, "2K-1 H W 3".
        times: for each stack the times of its LR levels, "K-1".
        crop, seed: see `Crops`.
    """

    def __init__(self, stacks: Sequence[np.ndarray], times: Sequence[Sequence[float]], crop: int, seed: int):
        super().__init__(stacks, crop, seed)
        self.times = times

    def draw(self, random: np.random.Generator, scene: int) -> tuple[dict[str, int], dict[str, Tensor]]:
        """See `Crops`."""
        times = self.times[scene]
        level = int(random.random() * len(times))
        images = {"hr": 0, "lr": 1 + level, "skeleton": 1 + len(times) + level}
        time, tau = (torch.tensor(number, dtype=torch.float64) for number in (times[level], random.random()))
        return images, {"time": time, "tau": tau}


def _tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


@lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, 0, epoch)).permutation(count)
