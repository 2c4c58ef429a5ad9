"""What a training on captured distributions cuts its crops from: scenes, reduced, beside their images after the optics.

A scene whose levels are all reduced by r (antialiased) holds captures at scale / r on a coarser grid: levels {1, 2, 4}
with r = 4/3 give {1, 1.5, 3}. The LR side is exact while the sensor's pitch, scale / r, stays above one pixel: noise,
mosaic, demosaicing and JPEG live at that pitch. The HR side is sharper and cleaner than a captured one; the optics
account for it (`Optics`, `reduction`).
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from degflow import images
from degflow.capture.optics import Optics
from degflow.capture.scenes import SceneImages, in_turn, kept


class Stack(NamedTuple):
    """A scene at one reduction."""

    pixels: np.ndarray  # uint8 "2K-1 H W 3": HR, the LR levels, and HR after the optics of each LR level
    scales: tuple[float, ...]  # of the LR levels, "K-1", divided by the reduction


def reduced(pixels: np.ndarray, factor: float) -> np.ndarray:
    """All levels of a scene, "K H W 3" uint8, reduced by a factor with antialiased bicubic."""
    if factor == 1:
        return pixels
    size = (round(side / factor) for side in pixels.shape[1:3])
    height, width = size
    return np.stack([images.resize(level, height, width) for level in pixels])


def stacks_of(
    scenes: SceneImages,
    optics: Optics,
    factors: Sequence[float],
    quiet: bool = False,
    share: tuple[int, int] = (0, 1),
) -> list[Stack]:
    """Every scene at every reduction at which it is no smaller than the crop.

    With a cache (`scenes.config.cache`) the arrays are memory-mapped files that all processes of a machine share, and
    make together: see `in_turn` for `share`.

    Raises:
        ValueError: a factor that leaves no scene, or that brings a level to HR's scale or below.
    """
    levels = list(scenes.config.levels.values())
    usable = []
    for factor in factors:
        chosen = [n for n, pixels in enumerate(scenes.pixels) if min(pixels.shape[1:3]) / factor >= scenes.config.crop]
        if not chosen or levels[1] / factor <= levels[0]:
            raise ValueError(
                f"scenes.reductions={list(factors)}: reduced by {factor}, no scene is left that is at least "
                f"scenes.crop={scenes.config.crop} pixels and has all levels above scale {levels[0]:g}"
            )
        usable.append((factor, chosen))
    stacks = []
    for factor, chosen in usable:
        scales = tuple(scale / factor for scale in levels[1:])
        turns = tqdm(in_turn(len(chosen), share), f"optics of scenes reduced by {factor:.3g}", disable=quiet)
        made = {place: _stack(scenes, chosen[place], optics, factor, scales) for place in turns}
        stacks += [Stack(made[place], scales) for place in range(len(chosen))]
    return stacks


def _stack(scenes: SceneImages, n: int, optics: Optics, factor: float, scales: tuple[float, ...]) -> np.ndarray:
    if not scenes.config.cache:
        return _made(scenes.pixels[n], optics, factor, scales)
    digest = hashlib.sha256(np.ascontiguousarray(scenes.pixels[n]).data)
    for name, tensor in optics.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    path = Path(scenes.config.cache) / f"{digest.hexdigest()[:24]}-{factor:.6f}.npy"
    return kept(path, lambda: _made(scenes.pixels[n], optics, factor, scales))


def _made(pixels: np.ndarray, optics: Optics, factor: float, scales: tuple[float, ...]) -> np.ndarray:
    pixels = reduced(pixels, factor)
    hr = images.to_tensor(pixels[:1])
    with torch.inference_mode():
        after = [
            images.to_pixels(optics(hr, torch.tensor([scale], dtype=torch.float64), factor))[0] for scale in scales
        ]
    return np.concatenate((pixels, np.stack(after)))
