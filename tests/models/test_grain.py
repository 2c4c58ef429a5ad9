"""The grain: its gain from a curve of lost detail, its field, and the measure of what draws lack."""

import numpy as np
import pytest
import torch
from scipy.ndimage import uniform_filter

from degflow.models.counter import gaussian
from degflow.models.grain import FIRST, KNOTS, SHARE, SIDE, Grain, Lack, lost_around
from degflow.models.spread import cross_spectra, filtered_noise

TIMES = (0.0, 0.25, 1.0)
SEEDS = torch.tensor([5, 2**40])


def images(count, height, width, strength=0.2, seed=1):
    """HR, and an image that differs from it by more and more from left to right; "count 3 height width"."""
    generator = torch.Generator().manual_seed(seed)
    hr, noise = torch.rand(2, count, 3, height, width, generator=generator) - 0.5
    return hr, hr + strength * torch.linspace(0, 1, width).square() * noise


def grain():
    made = Grain(TIMES)
    made.curves[1:] = torch.rand(2, len(KNOTS), generator=torch.Generator().manual_seed(0))
    made.field.filters[1:] = torch.randn(2, 3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) / SIDE
    return made


@pytest.mark.parametrize(("height", "width"), [(24, 31), (5, 3), (1, 12)])
def test_the_lost_detail_is_scipys_uniform_filter_over_the_pixels_inside_the_image(height, width):
    hr, skeleton = images(2, height, width)
    found = lost_around(hr, skeleton)
    assert found.shape == (2, 1, height, width)
    for n in range(2):
        square = ((hr[n] - skeleton[n]).double().numpy() ** 2).mean(0)
        inside = uniform_filter(np.ones_like(square), SIDE, mode="constant")
        around = uniform_filter(square, SIDE, mode="constant") / inside
        np.testing.assert_allclose(found[n, 0].numpy(), np.sqrt(around.clip(0)), rtol=1e-4, atol=1e-6)


def test_the_gain_is_the_root_of_the_curve_between_its_knots_and_its_times():
    hr, skeleton = images(4, 30, 60, strength=1.5)
    made, times = grain(), torch.tensor([0.25, 1.0, 0.1, 0.625])
    found, lost = made.gain(hr, skeleton, times), lost_around(hr, skeleton)
    assert float(lost.min()) < KNOTS[0] < KNOTS[-1] < float(lost.max())
    _, low, high = made.curves
    for n, curve in enumerate((low, high, 0.4 * low, 0.5 * low + 0.5 * high)):
        wanted = np.interp(lost[n].numpy(), (0, *KNOTS), (0, *curve.tolist()))
        np.testing.assert_allclose(found[n].square().numpy(), wanted, rtol=1e-3, atol=1e-6)


def test_nothing_is_added_at_time_0_nor_before_a_fit():
    hr, skeleton = images(2, 20, 20)
    assert not grain().gain(hr, skeleton, torch.zeros(2)).any()
    assert not Grain(TIMES).gain(hr, skeleton, torch.ones(2)).any()
    assert not Grain(TIMES).sample(SEEDS, torch.ones(2), 20, 20).any()


def test_the_field_has_the_strength_and_the_white_noise_of_its_own():
    time, made = torch.tensor([0.25, 1.0]), grain()
    found = made.sample(SEEDS, time, 12, 15, torch.tensor([[0, 0], [3, 7]]))
    for n, (top, left) in enumerate(((0, 0), (3, 7))):
        white = gaussian(SEEDS[n : n + 1], 3, 40, 40, first=FIRST)
        whole = torch.nn.functional.conv2d(white, made.field.filters[1 + n])
        torch.testing.assert_close(found[n], whole[0, :, top : top + 12, left : left + 15], rtol=1e-4, atol=1e-4)


def lack_of(noise, drawn, count=6, side=32, compression=8):
    """Of captures with noise of a variance of 0.5 * lost detail + 0.1 * its square, and of draws with a share of it."""
    lack, made = Lack(side, compression), []
    for n in range(count):
        hr, skeleton = images(1, 160, 240, strength=0.8, seed=n)
        lost = lost_around(hr, skeleton)
        gain = (1e-3 * (lost * 127.5 + 0.1 * (lost * 127.5) ** 2)).sqrt()
        one, other = (filtered_noise(torch.tensor([10 * n + k]), noise, 160, 240) for k in range(2))
        lack.add(hr, skeleton, skeleton + gain * one, skeleton, skeleton + drawn**0.5 * gain * other)
        made.append((lost, gain))
    return lack


def mosaic():
    """Filters of noise that varies from pixel to pixel; channels go together."""
    one = torch.tensor([[0.0, -1, 0], [-1, 4, -1], [0, -1, 0]]) / 20**0.5
    return one * torch.tensor([[1.0, 0.3, 0], [0.3, 0.8, 0], [0, 0, 1.2]])[None, :, :, None, None]


@pytest.mark.parametrize("drawn", [0.0, 0.6])
def test_a_fit_fills_up_a_share_of_what_draws_lack(drawn):
    lack, made, time = lack_of(mosaic(), drawn), Grain((0.0, 1.0)), torch.ones(1)
    made.fit([lack])
    hr, skeleton = images(1, 400, 400, strength=0.8, seed=50)
    lost = lost_around(hr, skeleton)
    wanted = (1e-3 * SHARE * (1 - drawn) * (lost * 127.5 + 0.1 * (lost * 127.5) ** 2)).sqrt()
    found = made.gain(hr, skeleton, time) * made.sample(SEEDS[:1], time, 400, 400)
    truth = wanted * filtered_noise(SEEDS[1:], mosaic(), 400, 400)
    spectra = cross_spectra(found, 32), cross_spectra(truth, 32)
    assert float((spectra[0] - spectra[1]).abs().sum()) < 0.25 * float(spectra[1].abs().sum())
    for left in (80, 200, 320):  # little, more and much lost detail
        there = (..., slice(left, left + 80))
        assert float(found[there].square().mean()) == pytest.approx(float(truth[there].square().mean()), rel=0.2)


def test_a_latent_pixel_can_hold_what_varies_slowly():
    slow = torch.zeros(1, 3, 3, 41, 41)
    slow[0, range(3), range(3)] = 1 / 41
    hr, skeleton = images(1, 200, 200, strength=0.8)
    time, powers = torch.ones(1), []
    for noise in (slow, mosaic()):
        made = Grain((0.0, 1.0))
        made.fit([lack_of(noise, 0.0)])
        grain = made.gain(hr, skeleton, time) * made.sample(SEEDS[:1], time, 200, 200)
        powers.append(float(grain.square().mean()))
    assert powers[0] < 0.1 * powers[1]


def test_draws_that_vary_too_much_get_no_grain():
    made = Grain((0.0, 1.0))
    made.fit([lack_of(mosaic(), 1.5)])
    assert not made.curves.any()
    assert bool(made.field.filters.isfinite().all())


def test_a_knot_that_no_image_reaches_follows_its_neighbours():
    lack = Lack(32, 8)
    hr, skeleton = images(1, 160, 160, strength=0.1)
    assert float(lost_around(hr, skeleton).max()) < KNOTS[4]
    gain = (1e-3 * lost_around(hr, skeleton) * 127.5).sqrt()
    lack.add(hr, skeleton, skeleton + gain * torch.randn(1, 3, 160, 160), skeleton, skeleton)
    curve = lack.curve() / torch.tensor(KNOTS)
    assert float(curve[-1]) == pytest.approx(float(curve[3]), rel=0.2)
    assert float(curve[-1]) == pytest.approx(0.1275, rel=0.2)
