"""Stacks, from which a training cuts its crops: a scene's images at one reduction, and HR after each level's optics.

A scene whose levels are all reduced by r (antialiased) holds captures at scale / r on a coarser grid: levels {1, 2, 4}
with r = 4/3 give {1, 1.5, 3}. The LR side is exact while the sensor's pitch, scale / r, stays above one pixel: noise,
mosaic, demosaicing and JPEG live at that pitch. The HR side is sharper and cleaner than a captured one; the optics
account for it (`Optics`, `reduction`).

A stack may be followed by a retouched copy, whose HR image has other noise (`capture.retouch`).
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from degflow import images
from degflow.capture.optics import Optics
from degflow.capture.retouch import retouched
from degflow.capture.scenes import SceneImages, in_turn, kept


class Stack(NamedTuple):
    """A scene at one reduction."""

    pixels: np.ndarray  # uint8 "2K-1 H W 3": HR, the LR levels, and HR after the optics of each LR level
    scales: tuple[float, ...]  # of the LR levels, "K-1", divided by the reduction
    retouched: bool = False


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
    retouch: bool = False,
) -> list[Stack]:
    """Every scene at every reduction at which it is no smaller than the crop; with `retouch` also a copy of each.

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
        made = {place: _made(scenes, chosen[place], optics, factor, scales, retouch) for place in turns}
        stacks += [stack for place in range(len(chosen)) for stack in made[place]]
    return stacks


def _made(
    scenes: SceneImages, n: int, optics: Optics, factor: float, scales: tuple[float, ...], retouch: bool
) -> list[Stack]:
    """A scene's stack at one reduction, and its retouched copy if asked for."""
    name = ""
    if scenes.config.cache:
        digest = hashlib.sha256(np.ascontiguousarray(scenes.pixels[n]).data)
        for key, tensor in optics.state_dict().items():
            digest.update(key.encode() + tensor.numpy().tobytes())
        name = f"{digest.hexdigest()[:24]}-{factor:.6f}"

    def array(suffix: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        return kept(Path(scenes.config.cache) / f"{name}{suffix}.npy", make) if name else make()

    stacks = [Stack(array("", lambda: _captured(scenes.pixels[n], optics, factor, scales)), scales)]
    if retouch:
        random = np.random.default_rng((n, round(1e6 * factor)))
        pixels = array(f"-retouched-{n}", lambda: _retouched(stacks[0], optics, factor, random))
        stacks.append(Stack(pixels, scales, True))
    return stacks


def _captured(pixels: np.ndarray, optics: Optics, factor: float, scales: tuple[float, ...]) -> np.ndarray:
    pixels = reduced(pixels, factor)
    after = _after(images.to_tensor(pixels[:1]), optics, factor, scales)
    return np.concatenate((pixels, *map(images.to_pixels, after)))


def _retouched(stack: Stack, optics: Optics, factor: float, random: np.random.Generator) -> np.ndarray:
    """The stack's images with a retouched HR; what that changes behind the optics, changes in each LR image."""
    hr, count = images.to_tensor(stack.pixels[:1]), len(stack.scales)
    changed = retouched(hr, random)
    before, after = (_after(image, optics, factor, stack.scales) for image in (hr, changed))
    lr = [images.to_tensor(stack.pixels[1 + k : 2 + k]) + after[k] - before[k] for k in range(count)]
    return np.concatenate([images.to_pixels(image) for image in (changed, *lr, *after)])


@torch.inference_mode()
def _after(hr: Tensor, optics: Optics, factor: float, scales: tuple[float, ...]) -> list[Tensor]:
    """HR "1 3 H W" after the optics of each scale."""
    return [optics(hr, torch.tensor([scale], dtype=torch.float64), factor) for scale in scales]
