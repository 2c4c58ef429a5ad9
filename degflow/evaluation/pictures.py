"""Pictures: sheets of titled images, and generated images at even steps of t with the captured ones (Fig. 2)."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from degflow import images
from degflow.capture.scenes import HR_LABEL, SceneImages
from degflow.degrader import Degrader
from degflow.evaluation.crops import central, flattest, most_detailed


def contact_sheet(columns: Sequence[tuple[str, Tensor]], margin: int = 4, title: int = 16) -> np.ndarray:
    """Columns of titled images ("N 3 H W" each) -> one picture, uint8 "H W 3"."""
    count, _, height, width = columns[0][1].shape
    size = (len(columns) * (width + margin) + margin, title + count * (height + margin) + margin)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, (name, batch) in enumerate(columns):
        left = margin + column * (width + margin)
        draw.text((left, 2), name, fill="black")
        for row, pixels in enumerate(images.to_pixels(batch)):
            sheet.paste(Image.fromarray(pixels), (left, title + margin + row * (height + margin)))
    return np.asarray(sheet)


def continuum(
    degrader: Degrader,
    scenes: SceneImages,
    levels: Mapping[str, float],
    crop: int = 0,
    *,
    count: int = 3,
    side: int = 48,
    zoom: int = 4,
    **options: int | float | str,
) -> np.ndarray:
    """A patch of a few scenes: above, captured at every level; below, generated at even steps of t from 0 to 1.

    Args:
        degrader: the model.
        scenes: captured scenes with the levels' images.
        levels: label -> scale, in the scenes' order, HR first.
        crop: side of the central crop that is degraded; 0 takes whole images.
        count: scenes, evenly spaced.
        side: of the patch, the most detailed one of the crop; less if a scene is smaller.
        zoom: each pixel is repeated so many times.
        options: `steps`, `solver`, `spread` of the degrader.

    Returns:
        uint8 "H W 3"; in each half a row per scene; below, one step of t more than there are levels.
    """
    device = next(degrader.parameters()).device
    chosen = np.unique(np.linspace(0, len(scenes) - 1, count).astype(int))
    side = min(side, *(min(central(scenes.pixels[n], crop).shape[1:3]) for n in chosen))
    times = torch.linspace(0, 1, len(levels) + 1, dtype=torch.float64)
    scales = degrader.timeline.scale(times)
    captured, generated = [], []
    for n in chosen:
        real = images.to_tensor(central(scenes.pixels[n], crop))
        made = degrader(real[:1].to(device), scales[None], **options)[0].cpu()  # type: ignore[arg-type]
        top, left = most_detailed(real[:1], side)
        for rows, batch in ((captured, real), (generated, made)):
            patch = batch[..., top : top + side, left : left + side]
            rows.append(patch.repeat_interleave(zoom, -1).repeat_interleave(zoom, -2))
    names = ["HR" if label == HR_LABEL else f"captured x{label}" for label in levels]
    steps = [f"generated t {time:.2f} (x{scale:.2f})" for time, scale in zip(times, scales, strict=True)]
    halves = [
        contact_sheet(list(zip(titles, torch.stack(rows, 1), strict=True)))
        for titles, rows in ((names, captured), (steps, generated))
    ]
    width = max(half.shape[1] for half in halves)
    return np.concatenate(
        [np.pad(half, ((0, 0), (0, width - half.shape[1]), (0, 0)), constant_values=255) for half in halves]
    )


def closeups(
    degrader: Degrader,
    scenes: SceneImages,
    levels: Mapping[str, float],
    label: str,
    crop: int = 0,
    *,
    count: int = 3,
    side: int = 64,
    zoom: int = 3,
    **options: int | float | str,
) -> np.ndarray:
    """Patches of a few scenes side by side: HR, the captured LR, a draw, and the mean of draws.

    Args:
        degrader: a model that draws.
        scenes: captured scenes with the levels' images.
        levels: label -> scale, in the scenes' order, HR first.
        label: the level that is shown.
        crop: side of the central crop that is degraded; 0 takes whole images.
        count: scenes, evenly spaced.
        side: of a patch, less if a scene is smaller.
        zoom: each pixel is repeated so many times.
        options: `steps`, `solver`, `spread` of the degrader.

    Returns:
        uint8 "H W 3"; three rows per scene: its most detailed patch, its flattest dark and its flattest bright one.
    """
    device = next(degrader.parameters()).device
    chosen = np.unique(np.linspace(0, len(scenes) - 1, count).astype(int))
    side = min(side, *(min(central(scenes.pixels[n], crop).shape[1:3]) for n in chosen))
    at, level = torch.tensor([levels[label]], dtype=torch.float64), list(levels).index(label)
    rows = []
    for n in chosen:
        real = images.to_tensor(central(scenes.pixels[n], crop))
        hr = real[:1].to(device)
        kinds = ({"spread": 1.0, **options}, {**options, "spread": 0.0})
        whole = torch.cat((real[[0, level]], *(degrader(hr, at, **kind).cpu() for kind in kinds)))  # type: ignore[arg-type]
        for top, left in (most_detailed(real[:1], side), *(flattest(real[:1], side, *b) for b in ((0, 0.4), (0.6, 1)))):
            patch = whole[..., top : top + side, left : left + side]
            rows.append(patch.repeat_interleave(zoom, -1).repeat_interleave(zoom, -2))
    titles = ("HR", f"captured x{label}", "drawn", "mean of draws")
    return contact_sheet(list(zip(titles, torch.stack(rows, 1), strict=True)))
