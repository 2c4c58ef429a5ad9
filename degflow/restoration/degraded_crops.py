"""HR photographs -> pairs of crops, degraded in the workers of a DataLoader.

A crop is degraded with a margin around it, at its place in the photograph: the noise is a function of the place, and
the margin holds what the networks see beyond the crop. So LR is the same part of the degraded photograph.
"""

import hashlib
import operator
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from degflow import images
from degflow.dataset.epoch import SharedEpoch
from degflow.dataset.pairs import cut, turned
from degflow.dataset.scales import noise_seed_of, scales_of
from degflow.degrader import Degrader
from degflow.models.inputs import levels_of
from degflow.restoration.random_degradation import (
    check_arguments,
    check_value_range,
    load,
    scale_config,
    to_range,
)
from degflow.storage import Place, split_uri

MARGIN = 32  # pixels


class DegradedCrops(Dataset[dict[str, Any]]):
    """Random crops of HR photographs, each with its LR crop, made when it is asked for.

    An element is a dict with
        lr, hr: float32 "3 crop crop" in `value_range`, of 256 levels.
        scale: float; float64 "B" in a batch.
        key: str, the photograph: its path below the folder, or its entry in the list.
        seed: int, of the noise. place: int64 "2", row and column of the crop in the photograph.

    Without flips and rotations LR is `degrader(photograph, scale, seed=seed)` at that place, to what `margin` leaves
    (docs/on_the_fly.md). An element is a pure function of (seed, epoch, index, photograph), so it does not matter which
    worker or rank makes it. `set_epoch` reaches workers that are already running.

    Every crop reads and decodes its whole photograph. A photograph smaller than a crop is extended by reflection.

    Args:
        photographs: a folder or prefix, read with its subfolders, or a list of files; paths or URIs.
        crop: side in pixels.
        per_photograph: crops of each photograph in an epoch.
        margin: pixels around a crop that are degraded with it and cut off.
        flips: mirror at random, left to right and upside down. rotations: turn by 0, 90, 180 or 270 degrees.
        model: see `RandomDegradation`; so are all others that are not here.
        seed: decides places, scales, noise, flips and rotations.

    Raises:
        ValueError: an argument that breaks its rule, no photographs, no degrader in the file; while reading, a file
            that is no image.
        OSError: a file or folder that cannot be read.
    """

    def __init__(
        self,
        photographs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        crop: int = 128,
        *,
        model: Degrader | str | os.PathLike[str] = "shipped",
        scale: str | Sequence[float] = "uniform",
        low: float | None = None,
        high: float | None = None,
        per_photograph: int = 1,
        margin: int = MARGIN,
        flips: bool = False,
        rotations: bool = False,
        seed: int = 0,
        value_range: tuple[float, float] = (-1, 1),
        spread: float = 1.0,
        steps: int = 0,
        solver: str = "",
        precision: str = "float32",
    ):
        check_arguments(margin=margin, seed=seed)
        for name, number, least in (("crop", crop, images.SMALLEST_SIDE), ("per_photograph", per_photograph, 1)):
            if number < least:
                raise ValueError(f"{name}={number}: must be at least {least}")
        self.low_value = check_value_range(value_range)
        if isinstance(photographs, str | os.PathLike):
            self.folder = os.fspath(photographs)
            self.keys = _listed(self.folder)
        else:
            self.folder, self.keys = None, [os.fspath(file) for file in photographs]
        if not self.keys:
            raise ValueError(f"photographs={photographs}: no file ending in {', '.join(images.SUFFIXES)}")
        self.crop, self.margin, self.flips, self.rotations = crop, margin, flips, rotations
        self.per_photograph, self.seed = per_photograph, seed
        self.degrader = load(model)
        self.scale = replace(scale_config(scale, low, high, self.degrader), per_image=per_photograph)
        self.options: dict[str, Any] = {"spread": spread, "steps": steps, "solver": solver, "precision": precision}
        self._epoch = SharedEpoch()

    def __len__(self) -> int:
        """Number of crops in an epoch."""
        return len(self.keys) * self.per_photograph

    def set_epoch(self, epoch: int) -> None:
        """Choose other places, scales and noise."""
        self._epoch.set(epoch)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Crop `index` of the epoch; the crops of a photograph follow each other."""
        index = range(len(self))[operator.index(index)]
        key, draw = self.keys[index // self.per_photograph], index % self.per_photograph
        name = f"{int(self._epoch)}/{key}"
        scale, noise = scales_of(self.scale, self.seed, name)[draw], noise_seed_of(self.seed, name, draw)
        digest = hashlib.blake2b(f"{self.seed}/{draw}/{name}".encode(), digest_size=16, person=b"crop").digest()
        random = np.random.default_rng(int.from_bytes(digest, "little"))
        photograph = self._read(key)
        height, width = photograph.shape[:2]
        top, left = (int(random.integers(max(0, side - self.crop) + 1)) for side in (height, width))
        lr, hr = self._degraded(photograph, top, left, scale, noise), cut(photograph, top, left, self.crop)
        lr, hr = turned(lr, hr, self.flips, self.rotations, random)
        made = {"lr": self._tensor(lr), "hr": self._tensor(hr), "scale": scale, "key": key}
        return made | {"seed": noise, "place": torch.tensor([top, left])}

    def _read(self, key: str) -> np.ndarray:
        place, name = split_uri(key) if self.folder is None else (Place(self.folder), key)
        try:
            return images.decode(place.read(name))
        except images.ImageError as error:
            raise ValueError(f"{place.uri_of(name)}: {error}") from error

    def _degraded(self, photograph: np.ndarray, top: int, left: int, scale: float, noise: int) -> np.ndarray:
        """LR of a crop, uint8 "crop crop 3"."""
        grid = self.degrader.multiple
        first = [max(0, start - self.margin) // grid * grid for start in (top, left)]
        last = [-(-(start + self.crop + self.margin) // grid) * grid for start in (top, left)]
        window = images.to_tensor(photograph[first[0] : last[0], first[1] : last[1]])[None]
        at = {"seed": torch.tensor([noise]), "place": torch.tensor([first]), "checks_range": False}
        lr = self.degrader(window, torch.tensor([scale], dtype=torch.float64), **at, **self.options)
        return cut(levels_of(lr)[0], top - first[0], left - first[1], self.crop)

    def _tensor(self, pixels: np.ndarray) -> Tensor:
        return to_range(images.to_tensor(pixels), self.low_value, rounded=True)


def _listed(folder: str) -> list[str]:
    return sorted(file.key for file in Place(folder).files() if file.key.lower().endswith(images.SUFFIXES))
