"""What of a scene is compared or shown: a part of its pixels, and draws that no other scene has."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from degflow.capture.scenes import SceneImages
from degflow.dataset.scales import noise_seed_of
from degflow.evaluation.metrics import luma


def central(pixels: np.ndarray, crop: int) -> np.ndarray:
    """The central `crop` x `crop` of "K H W 3", or less if the scene is smaller; 0 returns it whole."""
    if not crop:
        return pixels
    top, left = (max(0, side - crop) // 2 for side in pixels.shape[1:3])
    return pixels[:, top : top + crop, left : left + crop]


def seeds_of(scene: str, labels: Sequence[str], count: int = 1) -> Tensor:
    """The noise seeds of a scene's draws, `count` for each level, "1 K*count" int64.

    Each image has seeds of its own: the noise of one seed is nearly the same in all images, and so would its errors be.
    """
    return torch.tensor([[noise_seed_of(0, f"{label} {scene}", n) for label in labels for n in range(count)]])


def validation_crops(scenes: SceneImages, count: int = 6, side: int = 192) -> Tensor:
    """Central crops of evenly spaced scenes, uint8 "N K 3 side side"; side is at most that of the smallest."""
    chosen = np.unique(np.linspace(0, len(scenes) - 1, count).astype(int))
    side = min(side, *(min(scenes.pixels[n].shape[1:3]) for n in chosen))
    crops = np.stack([central(scenes.pixels[n], side) for n in chosen])
    return torch.from_numpy(np.ascontiguousarray(crops.transpose(0, 1, 4, 2, 3)))


def most_detailed(image: Tensor, side: int) -> tuple[int, int]:
    """Top and left of the `side` x `side` window of "1 3 H W" whose Y changes most from pixel to pixel."""
    y = luma(image)
    change = y.diff(dim=1)[:, :, :-1].abs() + y.diff(dim=2)[:, :-1].abs()
    mean = F.avg_pool2d(change[None], side - 1, 1)[0, 0]
    return divmod(int(mean.argmax()), mean.shape[1])


def flattest(image: Tensor, side: int, low: float, high: float) -> tuple[int, int]:
    """Top and left of the `side` x `side` window of "1 3 H W" that varies least in Y.

    Among windows whose mean brightness lies between `low` and `high` (black 0, white 1), if there are any.
    """
    y = (luma(image) - 16) / 219
    mean, square = (F.avg_pool2d(map[None], side, 1)[0, 0] for map in (y, y.square()))
    variance = square - mean.square()
    outside = (mean < low) | (mean > high)
    return divmod(int((variance + outside * 2 * variance.max()).argmin()), mean.shape[1])
