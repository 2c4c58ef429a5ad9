import math

import numpy as np
import pytest
import torch

from degflow import evaluation, images
from degflow.evaluation import SweepPoint, best_times, mean_curve
from degflow.trajectory import Timeline
from tests.captures import scenes_of, small_degrader

LEVELS = {"1": 1.0, "2": 2.0, "3": 3.05, "4": 4.0}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def degrader():
    return small_degrader({"1": 1.0, "2": 2.0, "4": 4.0})


@pytest.fixture(scope="module")
def scenes(degrader):
    """Captures that the degrader would make itself, at other scales than the labels say."""
    data, pixels = pytest.importorskip("skimage.data"), []
    for photo in (data.astronaut()[20:83, 190:263], data.coffee()[100:151, 200:247]):
        hr = images.to_tensor(photo)[None]
        made = degrader(hr, torch.tensor([[2.37, 3.05, 1.66]], dtype=torch.float64))[0]
        pixels.append(np.concatenate([photo[None], images.to_pixels(made)]))
    return scenes_of(a_001=pixels[0], b_002=pixels[1])


def test_the_sweep_scores_every_scale_against_every_level(degrader, scenes):
    parts = list(evaluation.sweep(degrader, scenes, LEVELS, 7, crop=40, steps=1, solver="heun"))
    assert [{point.scene for point in part} for part in parts] == [{"a_001"}, {"b_002"}]
    points = [point for part in parts for point in part]
    scales = [1.0, 1.5, 2.0, 2.5, 3.0, 3.05, 3.5, 4.0]  # the grid, and 3.05 that it lacks
    for scene, pixels in zip(("a_001", "b_002"), scenes.pixels, strict=True):
        top, left = (pixels.shape[1] - 40) // 2, (pixels.shape[2] - 40) // 2
        real = images.to_tensor(pixels[:, top : top + 40, left : left + 40])
        made = degrader(real[:1], torch.tensor([scales], dtype=torch.float64), steps=1, solver="heun")[0]
        for n, level in enumerate(LEVELS):
            found = [point for point in points if (point.scene, point.level) == (scene, level)]
            assert [point.scale for point in found] == pytest.approx(scales)
            assert [point.time for point in found] == pytest.approx([(scale - 1) / 3 for scale in scales])
            expected = evaluation.psnr(made, real[n].expand_as(made))
            assert [point.psnr for point in found] == pytest.approx(expected.tolist(), abs=1e-3)
    curve = mean_curve(points)
    assert list(curve) == pytest.approx(scales)
    single = [point.psnr for point in points if point.level == "1" and point.scale == 2.5]
    assert curve[2.5] == pytest.approx(np.mean(single))


def test_the_sweep_of_a_degrader_that_draws_is_that_of_its_mean():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    levels = {"1": 1.0, "4": 4.0}
    drawing, scenes = small_degrader(levels, draws=True), scenes_of(a=pixels)
    points = [point for part in evaluation.sweep(drawing, scenes, levels, 3, spread=1.0) for point in part]
    hr, lr = images.to_tensor(pixels).split(1)
    made = drawing(hr, torch.tensor([[1.0, 2.5, 4.0]], dtype=torch.float64), spread=0.0)[0]
    expected = evaluation.psnr(made, lr.expand_as(made)).tolist()
    assert [point.psnr for point in points if point.level == "4"] == pytest.approx(expected, abs=1e-3)


def test_best_times_are_those_of_the_scales_that_the_captures_were_made_at(degrader, scenes):
    points = [point for part in evaluation.sweep(degrader, scenes, LEVELS, 31) for point in part]
    best = best_times(points, LEVELS, Timeline((1.0, 4.0)))
    assert [(row.scene, row.level) for row in best] == [(s, level) for s in ("a_001", "b_002") for level in "234"]
    for row in best:
        planted = {"2": 2.37, "3": 3.05, "4": 1.66}[row.level]
        assert row.scale == pytest.approx(planted, abs=0.02)
        assert row.time == pytest.approx((row.scale - 1) / 3)
        assert row.own_time == pytest.approx((LEVELS[row.level] - 1) / 3)
        assert not row.at_end
        assert row.psnr >= row.own_psnr
        assert (row.psnr > row.own_psnr) == (row.level != "3")


def points_of(errors, times, level="2"):
    return [
        SweepPoint("a", 1 + 3 * time, time, level, math.inf if error == 0 else -10 * math.log10(error))
        for time, error in zip(times, errors, strict=True)
    ]


@pytest.mark.parametrize("planted", [0.03, 0.11, 0.2, 0.3333, 0.5049, 0.777])
@pytest.mark.parametrize("floor", [0.0, 1e-3])
def test_a_parabola_of_errors_gives_its_lowest_time_whatever_the_grid(planted, floor):
    times = [0.0, 0.1, 0.2, 0.27, 0.3, 0.5, 0.51, 0.7, 0.9, 1.0]
    points = points_of([floor + 0.5 * (time - planted) ** 2 for time in times], times)
    (best,) = best_times(points[::-1], {"1": 1.0, "2": 2.0}, Timeline((1.0, 4.0)))
    if planted == 0.03:  # nearest to the first of the grid
        assert (best.time, best.at_end) == (0.0, True)
    else:
        assert best.time == pytest.approx(planted, abs=1e-9)
        assert best.scale == pytest.approx(1 + 3 * planted)
        assert best.at_end is False


def test_errors_that_are_all_equal_or_fall_to_the_end_have_a_best_time_too():
    times = [0.0, 0.25, 0.5, 0.75, 1.0]
    (best,) = best_times(points_of([0.9, 0.8, 0.7, 0.6, 0.5], times, "4"), {"1": 1.0, "4": 4.0}, Timeline((1.0, 4.0)))
    assert (best.time, best.scale, best.at_end) == (1.0, 4.0, True)
    assert best.own_time == 1.0
    (best,) = best_times(points_of([0.9, 0.5, 0.5, 0.5, 0.9], times), {"1": 1.0, "2": 2.0}, Timeline((1.0, 4.0)))
    assert 0.25 <= best.time <= 0.5
