"""HR images with other noise than their camera's."""

import numpy as np
import pytest
import torch

from degflow import images
from degflow.capture.retouch import CONTRAST, LEVEL, NOISE, noise, retouched, smoothed


def gray(level=128, height=400, width=500):
    return images.to_tensor(np.full((1, height, width, 3), level, np.uint8))


def levels(image):
    """ "1 3 H W" in [-1, 1] -> 8-bit levels, "H W 3"."""
    return ((image + 1) * 127.5)[0].permute(1, 2, 0).double().numpy()


def test_a_seed_decides_and_the_result_is_an_8_bit_image_in_range():
    hr = gray(3)
    one, again, other = (retouched(hr, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert one.shape == hr.shape
    np.testing.assert_allclose(levels(one), levels(one).round(), atol=1e-4)
    assert levels(one).min() == 0
    assert float(one.amax()) <= 1


def test_places_have_noise_of_many_strengths_or_none():
    """Of a photograph with its camera's noise, blocks end with nearly none, with its own and with much more."""
    random = np.random.default_rng(0)
    hr = images.to_tensor(
        np.clip(np.round(128 + 0.7 * random.standard_normal((1, 1200, 1200, 3))), 0, 255).astype("u1")
    )
    changed = levels(retouched(hr, random))[..., 1]
    blocks = changed.reshape(50, 24, 50, 24).std((1, 3))
    clean, own, noisy = (blocks < 0.4).mean(), ((blocks > 0.5) & (blocks < 1)).mean(), (blocks > 1.5).mean()
    assert clean > 0.15
    assert own > 0.1
    assert noisy > 0.15
    assert 4 < blocks.max() < 1.3 * NOISE[1]


@pytest.mark.parametrize("colour", [0.0, 0.3, 1.0])
def test_noise_has_variance_1_and_its_colour(colour):
    made = noise(torch.full((1, 1, 300, 300), colour), np.random.default_rng(0))[0].double().flatten(1)
    correlation = torch.corrcoef(made)[0, 1]
    assert made.var(1).tolist() == pytest.approx([1] * 3, rel=0.05)
    assert float(correlation) == pytest.approx(1 - colour, abs=0.03)


def test_noise_is_white_or_smooth():
    def neighbours(colour):
        made = noise(torch.full((1, 1, 300, 300), colour), np.random.default_rng(0))[0, 0].double()
        return float((made[:, 1:] * made[:, :-1]).mean())

    assert abs(neighbours(0.75)) < 0.02  # all white there
    taps = np.exp(-0.5 * (np.arange(-3, 4) / 0.6) ** 2)  # of a Gaussian blur of 0.6 pixels
    assert neighbours(0.25) == pytest.approx((taps[1:] @ taps[:-1]) / (taps @ taps), abs=0.02)


def test_smoothing_takes_weak_detail_and_leaves_strong_edges():
    random = np.random.default_rng(0)
    edge = np.where(np.arange(200) < 100, 60, 200)[None, None, :, None].repeat(200, 1).repeat(3, 3)
    hr = torch.from_numpy(edge + random.standard_normal(edge.shape)).permute(0, 3, 1, 2).float() / 127.5 - 1
    smooth = levels(smoothed(hr, CONTRAST[1] * LEVEL))[..., 0]
    assert smooth[20:180, 20:80].std() < 0.25
    assert smooth[20:180, 99:101].mean(0) == pytest.approx([60, 200], abs=3 * CONTRAST[1] + 1)  # of 140
    assert torch.equal(smoothed(hr, 0.0), hr)
    half = torch.zeros(1, 1, 200, 200)
    half[..., 100:, :] = CONTRAST[1] * LEVEL
    assert torch.equal(smoothed(hr, half)[:, :, :60], hr[:, :, :60])
