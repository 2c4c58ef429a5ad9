"""The measures of draws, on images whose answer is known."""

import math

import numpy as np
import pytest
import torch

from degflow import images
from degflow.dataset.scales import noise_seed_of
from degflow.evaluation.draws import (
    BRIGHTNESS,
    DrawScore,
    comb,
    distribution,
    energy_score,
    flat_noise,
    gray_chroma,
    rank_error,
    ranks,
)
from degflow.evaluation.fidelity import measure
from degflow.evaluation.metrics import luma, psnr
from degflow.evaluation.tables import draws_table
from tests.captures import scenes_of, small_degrader

LEVEL = 2 / 219  # of Y, for equal R, G and B in [-1, 1]


def gray(y):
    """Gray images "B 3 H W" in [-1, 1] of the brightness "B H W", black 0 to white 1."""
    return (2 * y - 1)[:, None].expand(-1, 3, -1, -1).float()


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_noise_is_told_apart_by_brightness():
    brightness = torch.full((1, 120, 240), 0.2)
    brightness[..., 80:160], brightness[..., 160:] = 0.5, 0.8
    strength = torch.full((1, 120, 240), 1.0)
    strength[..., 80:160], strength[..., 160:] = 2.0, 4.0
    hr = gray(brightness)
    found = flat_noise(gray(brightness + strength * noise(1, 120, 240) / 219), hr)
    assert list(found) == list(BRIGHTNESS) == ["dark", "middle", "bright"]
    assert [part.level for part in found.values()] == pytest.approx([1, 2, 4], rel=0.15)
    assert all(abs(part.correlation) < 0.15 for part in found.values())
    none = flat_noise(hr, gray(torch.full((1, 120, 240), 0.2)))["bright"]
    assert math.isnan(none.level)
    assert math.isnan(none.correlation)


def test_a_comb_stands_above_its_neighbours_at_its_own_period_alone():
    plain = 0.5 + 0.02 * noise(2, 264, 264)
    weave = 0.03 * torch.sin(2 * math.pi * torch.arange(264) / 8)
    assert comb(gray(plain), 8).abs().max() < 1
    woven = gray(plain + weave)
    assert (comb(woven, 8) > 2).all()
    assert comb(woven, 4).abs().max() < 1.5
    torch.testing.assert_close(comb(woven, 8), comb(woven.transpose(2, 3), 8))
    assert comb(woven[..., :71], 8).isnan().all()
    assert not comb(woven[..., :72, :72], 8).isnan().any()


def test_the_colour_of_gray_is_that_of_its_pixels():
    hr = gray(torch.full((1, 64, 64), 0.5)).clone()
    bluish = hr.clone()
    bluish[:, 2] += 10 / 127.5
    offset, spread = gray_chroma(bluish, hr)
    assert offset == pytest.approx(math.hypot(0.5 * 10, 0.0813 * 10), rel=1e-4)
    assert spread == pytest.approx(0, abs=1e-4)
    hr[:, 0] += 0.2  # nothing is gray
    assert all(math.isnan(value) for value in gray_chroma(bluish, hr))


def test_the_energy_score_is_its_formula():
    draws, captured = (gray(0.5 + 0.05 * noise(n, 24, 24, seed=n)) for n in (3, 1))
    y = [luma(image).double().numpy()[:, 4:-4, 4:-4] for image in (draws, captured)]
    made, real = (
        np.stack([plane[:, i : i + 8, j : j + 8].reshape(len(plane), -1) for i in (0, 8) for j in (0, 8)], 1)
        for plane in y
    )
    to_real = np.linalg.norm(made - real, axis=2).mean()
    between = np.mean([np.linalg.norm(made[a] - made[b], axis=1) for a, b in ((0, 1), (0, 2), (1, 2))])
    assert energy_score(draws, captured) == pytest.approx((to_real - between / 2) / 8, rel=1e-5)


def test_calibrated_draws_have_the_lowest_energy_score_and_even_ranks():
    def spread(strength, count=16):
        return gray(0.5 + strength * 0.02 * noise(count, 136, 136, seed=1))

    captured = gray(0.5 + 0.02 * noise(1, 136, 136, seed=2))
    scores = {strength: energy_score(spread(strength), captured) for strength in (0.0, 0.5, 1.0, 2.0)}
    assert min(scores, key=lambda strength: scores[strength]) == 1.0
    errors = {s: [rank_error(shares) for shares in ranks(spread(s), captured)] for s in (0.5, 1.0, 2.0)}
    assert errors[1.0][0] < 0.03  # in the finest band; the coarse ones have few independent pixels
    assert min(errors[0.5][0], errors[2.0][0]) > 0.2
    timid = ranks(spread(0.5), captured)[0]
    assert timid[0] + timid[-1] > 4 / 17  # captured pixels lie beyond all draws
    assert all(float(shares.sum()) == pytest.approx(1) for shares in ranks(spread(1.0), captured))


def test_clipped_pixels_count_evenly_at_all_ranks():
    """As in a white sky, where every draw is equal to the captured image."""
    level = torch.linspace(0.5, 1.5, 136).expand(17, 1, 136, 136)  # half of the image is at or above white
    images = (level + 0.02 * noise(17, 1, 136, 136)).clamp(0, 1).expand(-1, 3, -1, -1) * 2 - 1
    shares = ranks(images[:16], images[16:])
    assert rank_error(shares[0]) < 0.03
    white = torch.ones(9, 3, 64, 64)
    for share in ranks(white[:8], white[8:]):
        np.testing.assert_allclose(share, np.full(9, 1 / 9), rtol=1e-12)
    black = ranks(white[:8], -white[8:])[-1]  # the band of the mean
    np.testing.assert_array_equal(black, [1] + [0] * 8)


@pytest.mark.usefixtures("one_thread")
def test_captured_and_drawn_images_are_measured_by_the_same_rule():
    levels = {"1": 1.0, "2": 2.0, "4": 4.0}
    random = np.random.default_rng(0)
    steps = np.repeat([40, 120, 200], 64)[None, None, :, None] + np.zeros((1, 96, 1, 3))  # dark, middle, bright
    pixels = [np.rint(steps + random.normal(0, s, (3, 96, 192, 3))).astype(np.uint8) for s in (1, 3)]
    degrader, scenes = small_degrader(levels, draws=True), scenes_of(a=pixels[0], b=pixels[1])
    scores = list(distribution(degrader, scenes, levels, 3))
    assert [(score.scene, score.label) for score in scores] == [(s.name, k) for s in scenes.scenes for k in ("2", "4")]
    for score in scores:
        strength = {"a": 1, "b": 3}[score.scene] * (
            0.257**2 + 0.504**2 + 0.098**2
        ) ** 0.5  # of Y, for independent R, G, B
        assert (score.dark, score.middle, score.bright) == pytest.approx((strength,) * 3, rel=0.2)
        assert len({score.dark, score.middle, score.bright}) == 3
        assert len({score.dark_drawn, score.middle_drawn, score.bright_drawn}) == 3
        assert score.psnr < score.mean_psnr


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("options", [{"steps": 1, "solver": "euler"}, {"spread": 0.5}])
def test_draws_are_made_as_the_options_say(options):
    levels = {"1": 1.0, "4": 4.0}
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    degrader = small_degrader(levels, draws=True)
    found = [next(distribution(degrader, scenes_of(a=pixels), levels, 2, **with_)) for with_ in ({}, options)]
    hr, lr = images.to_tensor(pixels).split(1)
    seeds = torch.tensor([[noise_seed_of(0, "4 a", draw) for draw in range(2)]])
    made = degrader(hr, torch.full((1, 2), 4.0, dtype=torch.float64), seed=seeds, **options)[0]
    rounded = images.to_tensor(images.to_pixels(made))
    assert found[1].psnr == pytest.approx(float(psnr(rounded, lr.expand(2, -1, -1, -1)).mean()), abs=1e-9)
    errors = [rank_error(shares) for shares in ranks(rounded, lr)]
    assert (found[1].fine_rank_error, found[1].rank_error) == pytest.approx((errors[0], np.mean(errors)))
    assert abs(found[1].psnr - found[0].psnr) > 1e-3
    assert found[1].energy != found[0].energy


@pytest.mark.usefixtures("one_thread")
def test_the_noise_of_a_scene_is_its_own():
    levels = {"1": 1.0, "4": 4.0}
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    degrader = small_degrader(levels, draws=True)
    both = list(distribution(degrader, scenes_of(a=pixels, b=pixels), levels, 2))
    assert both[0].psnr != both[1].psnr
    rows = [row for row in measure(degrader, scenes_of(a=pixels, b=pixels), levels, None) if row.method == "generated"]
    assert rows[0].psnr != rows[1].psnr
    for scores, row in zip(both, rows, strict=True):
        assert scores.mean_psnr == both[0].mean_psnr  # the picture is the same
        assert row.scene == scores.scene


def test_the_table_of_draws_holds_medians_of_noise_and_of_its_ratios_and_means_of_the_rest():
    def score(scene, value, dark):
        return DrawScore(scene, "2", *[value] * 3, dark, dark + 1, *[value] * (len(DrawScore._fields) - 7))

    table = draws_table(
        [
            *(score("a", 1.0, 0.5), score("b", 2.0, 0.75), score("c", 6.0, 9.0), score("d", math.nan, math.nan)),
            score("e", math.nan, 0.0),  # a captured image without noise has no ratio
        ]
    )
    cells = [cell.strip() for cell in table.splitlines()[2].split("|")[1:-1]]
    assert cells[:6] == ["x2", "3.00", "3.00", "3.00", "0.62; 2.33", "2.00; 1.00"]
    assert cells[-1] == "3.000, 3.000"
