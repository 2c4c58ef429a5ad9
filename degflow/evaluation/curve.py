"""Generated LR images over a fine grid of scales: their distance to HR, and the scales closest to captured levels."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from degflow import images
from degflow.capture.scenes import HR_LABEL, SceneImages
from degflow.degrader import Degrader
from degflow.evaluation.crops import central
from degflow.evaluation.metrics import psnr
from degflow.trajectory import Timeline

BATCH = 8  # scales decoded at once


class SweepPoint(NamedTuple):
    """PSNR-Y in dB of one scene, generated at one scale, against its captured image at one level (1 is HR)."""

    scene: str
    scale: float
    time: float
    level: str
    psnr: float


class BestTime(NamedTuple):
    """The time at which a scene's generated LR image is closest to its captured one.

    Attributes:
        scene, level: of the captured image.
        time, scale: with the highest PSNR-Y.
        at_end: this is an end of the trained range, and the true best may lie outside.
        psnr: the highest on the grid. own_time, own_psnr: at the level's own scale.
    """

    scene: str
    level: str
    time: float
    scale: float
    at_end: bool
    psnr: float
    own_time: float
    own_psnr: float


def sweep(
    degrader: Degrader,
    scenes: SceneImages,
    levels: Mapping[str, float],
    count: int,
    crop: int = 0,
    **options: int | float | str,
) -> Iterator[list[SweepPoint]]:
    """Score generated LR images of every scene at many scales: the means of draws, which differ by their scale alone.

    Args:
        degrader: the model.
        scenes: captured scenes with the levels' images.
        levels: label -> scale, in the scenes' order, HR first.
        count: scales of an even grid over the trained range, >= 2; the levels' own scales are added.
        crop: side of the central crop; 0 takes whole images.
        options: `steps`, `solver` of the degrader.

    Yields:
        The points of one scene.
    """
    even = torch.linspace(degrader.low, degrader.high, count, dtype=torch.float64)
    own = [scale for scale in levels.values() if not bool(torch.isclose(even, _one(scale)).any())]
    scales = torch.cat([even, torch.tensor(own, dtype=torch.float64)]).sort().values
    times = degrader.timeline.time(scales)
    device = next(degrader.parameters()).device
    for scene, pixels in zip(scenes.scenes, scenes.pixels, strict=True):
        real = images.to_tensor(central(pixels, crop), device)
        points = []
        for part in torch.arange(len(scales)).split(BATCH):
            made = degrader(real[:1], scales[None, part], **{**options, "spread": 0.0})[0]  # type: ignore[arg-type]
            for level, image in zip(levels, real, strict=True):
                scores = psnr(made, image.expand_as(made)).tolist()
                points += [
                    SweepPoint(scene.name, float(scales[n]), float(times[n]), level, score)
                    for n, score in zip(part, scores, strict=True)
                ]
        yield points


def _one(scale: float) -> torch.Tensor:
    return torch.tensor(scale, dtype=torch.float64)


def mean_curve(points: Sequence[SweepPoint], level: str = HR_LABEL) -> dict[float, float]:
    """Scale -> mean PSNR in dB over the scenes against their images at `level`, by rising scale."""
    found: dict[float, list[float]] = {}
    for point in points:
        if point.level == level:
            found.setdefault(point.scale, []).append(point.psnr)
    return {scale: float(np.mean(found[scale])) for scale in sorted(found)}


def best_times(points: Sequence[SweepPoint], levels: Mapping[str, float], timeline: Timeline) -> list[BestTime]:
    """For every scene and level but HR's, the time of the highest PSNR-Y.

    A parabola is fitted to the mean squared error at the best time of the grid and its two neighbours. This is exact
    where the image changes linearly in time.

    Args:
        points: of `sweep`.
        levels: as given to it.
        timeline: the degrader's.
    """
    curves: dict[tuple[str, str], list[SweepPoint]] = {}
    for point in sorted(points, key=lambda point: point.time):
        if point.level != HR_LABEL:
            curves.setdefault((point.scene, point.level), []).append(point)
    return [_best(curve, levels[level], timeline) for (_, level), curve in curves.items()]


def _best(curve: Sequence[SweepPoint], scale: float, timeline: Timeline) -> BestTime:
    best = max(range(len(curve)), key=lambda n: curve[n].psnr)
    own = min(curve, key=lambda point: abs(point.scale - scale))
    at_end = best in (0, len(curve) - 1)
    time = curve[best].time if at_end else _vertex(curve[best - 1 : best + 2])
    place = timeline.scale(time)
    scene, level = curve[best].scene, curve[best].level
    return BestTime(scene, level, time, place, at_end, curve[best].psnr, own.time, own.psnr)


def _vertex(three: Sequence[SweepPoint]) -> float:
    """Time of the lowest point of the parabola through three points, of which the middle one is the lowest."""
    (t0, e0), (t1, e1), (t2, e2) = ((point.time, 10 ** (-point.psnr / 10)) for point in three)
    left, right = (t1 - t0) * (e1 - e2), (t1 - t2) * (e1 - e0)
    if left == right:  # all equal
        return t1
    return t1 - ((t1 - t0) * left - (t1 - t2) * right) / (2 * (left - right))
