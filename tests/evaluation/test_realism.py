"""Realism measures on images whose spectrum, noise and residuals are known."""

import math

import numpy as np
import pytest
import torch

from degflow import images
from degflow.capture.filters import blur
from degflow.evaluation import flat_blocks, noise, radial_spectrum, residual_divergence, spectrum_distance
from degflow.evaluation.realism import ROUNDING

SIDE = 264  # 16 x 16 whole blocks inside the border


def gray(levels):
    """Levels of Y, 16..235, "*B H W" -> "B 3 H W" in [-1, 1]."""
    y = torch.as_tensor(levels, dtype=torch.float64)
    return ((y.reshape(-1, 1, *y.shape[-2:]) - 16) / 219 * 2 - 1).expand(-1, 3, -1, -1).contiguous()


def white(sigma, seed=0, count=1, mean=120.0):
    return gray(mean + sigma * np.random.default_rng(seed).standard_normal((count, SIDE, SIDE)))


# Spectrum


def test_white_noise_has_its_variance_at_every_frequency():
    spectrum = radial_spectrum(white(5.0, count=20))
    assert spectrum.shape == (20, 32)
    assert spectrum.mean(0)[4:].tolist() == pytest.approx([25] * 28, rel=0.1)
    assert float(spectrum.mean()) == pytest.approx(25, rel=0.05)


def test_a_wave_stands_in_the_ring_of_its_frequency_and_the_mean_in_none():
    row, column = np.mgrid[:SIDE, :SIDE]
    for fx, fy in ((0.1, 0.0), (0.0, 0.3), (0.3, 0.2)):
        spectrum = radial_spectrum(gray(120 + 10 * np.cos(2 * math.pi * (fx * column + fy * row))))[0]
        assert int(spectrum.argmax()) == int(math.hypot(fx, fy) * 64)
    assert float(radial_spectrum(gray(np.full((SIDE, SIDE), 200.0))).max()) < 1e-12
    corner = radial_spectrum(gray(120 + 10 * np.cos(2 * math.pi * 0.45 * (row + column))))[0]
    assert float(corner.sum()) < 0.1  # 0.64 cycles per pixel is beyond the last ring


def test_the_spectrum_is_numpys_on_an_image_of_unequal_sides():
    y = np.random.default_rng(1).uniform(16, 235, (70, 51))
    inner = y[4:-4, 4:-4]
    window = np.outer(np.hanning(62), np.hanning(43))
    power = np.abs(np.fft.fft2((inner - (inner * window).sum() / window.sum()) * window)) ** 2 / (window**2).sum()
    radius = np.hypot(np.fft.fftfreq(62)[:, None], np.fft.fftfreq(43))
    expected = [power[(radius >= n / 42) & (radius < (n + 1) / 42)].mean() for n in range(21)]
    np.testing.assert_allclose(radial_spectrum(gray(y))[0], expected, rtol=1e-9)


def test_the_distance_is_the_ratio_of_powers_in_decibels():
    quiet = white(3.0, seed=1)
    loud = gray(120 + 2 * (219 / 2 * (quiet[0, 0].numpy() + 1) + 16 - 120))  # the same noise, twice as strong
    assert spectrum_distance(quiet, quiet).tolist() == [0]
    both = spectrum_distance(torch.cat([quiet, loud]), quiet)
    assert both.tolist() == pytest.approx([0, 20 * math.log10(2)], abs=0.02)
    assert float(spectrum_distance(quiet, loud)) == pytest.approx(float(both[1]), abs=1e-9)


def test_a_blur_is_as_far_as_its_transfer_function():
    image, sigma = white(20.0, seed=2), 0.6
    taps = np.exp(-0.5 * (np.arange(-3, 4) / sigma) ** 2)
    frequency = np.fft.fftfreq(256)
    transfer = (taps / taps.sum() * np.cos(2 * math.pi * frequency[:, None] * np.arange(-3, 4))).sum(1)
    radius, squared = np.hypot(frequency[:, None], frequency), np.outer(transfer, transfer) ** 2
    power = np.array([400 * squared[(radius * 64).astype(int) == n].mean() for n in range(32)])
    expected = np.mean(np.abs(10 * np.log10((power + ROUNDING) / (400 + ROUNDING))))
    assert float(spectrum_distance(blur(image, sigma), image)) == pytest.approx(expected, rel=0.03)


def test_differences_below_the_rounding_to_8_bits_hardly_count():
    flat = gray(np.full((SIDE, SIDE), 120.0))
    tiny = flat + 1e-4 * torch.randn(flat.shape, generator=torch.Generator().manual_seed(0), dtype=flat.dtype)
    assert float(spectrum_distance(tiny, flat)) < 0.05


# Noise


@pytest.mark.parametrize("sigma", [0.5, 2.0, 6.0])
def test_white_noise_is_recovered(sigma):
    blocks = flat_blocks(white(3.0, seed=9))
    level, correlation = noise(white(sigma, count=8), blocks)
    assert level.tolist() == pytest.approx([sigma] * 8, rel=0.06)
    assert float(level.mean()) == pytest.approx(sigma, rel=0.02)
    assert float(correlation.mean()) == pytest.approx(-0.01, abs=0.02)


def test_a_slope_is_no_noise():
    row, column = np.mgrid[:SIDE, :SIDE]
    slope = gray(60 + 0.4 * row + 0.2 * column)
    level, correlation = noise(slope, torch.arange(256))
    assert float(level) < 1e-9
    assert math.isnan(float(correlation))
    level, _ = noise(slope + white(2.0) - gray(np.full((SIDE, SIDE), 120.0)), torch.arange(256))
    assert float(level) == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("sigma", [0.5, 0.7, 1.0, 1.5])
def test_blurred_noise_has_the_correlation_of_its_blur_less_the_planes_share(sigma):
    taps = np.exp(-0.5 * (np.arange(-9, 10) / sigma) ** 2)
    lags = np.correlate(taps, taps, "full")[18:] / taps.sum() ** 2
    line = lags[np.minimum(np.abs(np.subtract.outer(range(16), range(16))), 18)]
    row, column = (axis.ravel() - 7.5 for axis in np.mgrid[:16, :16])
    basis, _ = np.linalg.qr(np.stack([np.ones(256), row, column], 1))
    left = np.eye(256) - basis @ basis.T
    covariance = left @ np.kron(line, line) @ left
    energy = np.trace(covariance) / 256
    right = np.mean([covariance[n, n + 1] for n in range(256) if n % 16 < 15])
    level, correlation = noise(blur(white(8.0, seed=3, count=4), sigma), torch.arange(256))
    assert correlation.tolist() == pytest.approx([right / energy] * 4, abs=0.02)
    assert level.tolist() == pytest.approx([8 * math.sqrt(energy * 256 / 253)] * 4, rel=0.05)


def test_flat_blocks_lie_in_the_flat_part_and_not_where_noise_is_clipped():
    textured = np.random.default_rng(4).uniform(40, 200, (SIDE, SIDE))
    textured[4 : 4 + 64, 4 : 4 + 128] = 120 + np.random.default_rng(5).standard_normal((64, 128))  # blocks 0..3 x 0..7
    textured[-100:] = 235  # perfectly flat, but white
    chosen = flat_blocks(gray(textured))
    assert len(chosen) == 13  # of 256
    assert all(int(n) // 16 < 4 and int(n) % 16 < 8 for n in chosen)
    assert len(flat_blocks(gray(textured[:24, :24]))) == 1
    assert len(flat_blocks(gray(np.full((SIDE, SIDE), 235.0)))) == 13


def test_texture_outside_the_flat_blocks_is_no_noise():
    scene = np.full((SIDE, SIDE), 120.0)
    scene[:, 100:] += 60 * np.sign(np.sin(np.arange(SIDE - 100)))
    lr = gray(scene + 1.5 * np.random.default_rng(6).standard_normal(scene.shape))
    level, _ = noise(lr, flat_blocks(gray(scene)))
    assert float(level) == pytest.approx(1.5, rel=0.1)


# Residuals


def test_the_divergence_of_two_gaussians_is_the_closed_form():
    hr, captured, image = gray(np.full((SIDE, SIDE), 120.0)), white(4.0, seed=7), white(5.0, seed=8)
    forward = math.log(5 / 4) + 16 / 50 - 0.5
    backward = math.log(4 / 5) + 25 / 32 - 0.5
    assert backward > 1.3 * forward
    assert float(residual_divergence(image, captured, hr)) == pytest.approx(forward, rel=0.07)
    assert float(residual_divergence(captured, image, hr)) == pytest.approx(backward, rel=0.07)


def test_the_divergence_counts_what_was_planted():
    hr = np.full((40, 40), 100.0)  # 32 x 32 inside the border

    def with_ones(rows):
        y = hr.copy()
        y[4 : 4 + rows] += 10
        return gray(y)

    p, q = (np.array([1024 - 32 * rows + 1, 32 * rows + 1] + [1] * 127) / (1024 + 129) for rows in (8, 24))
    result = residual_divergence(torch.cat([with_ones(24), with_ones(8)]), with_ones(8), gray(hr))
    assert result.tolist() == pytest.approx([float((p * np.log(p / q)).sum()), 0], abs=1e-9)


def test_residuals_are_to_hr_and_beyond_the_reach_they_count_in_the_end_bins():
    hr = np.random.default_rng(2).uniform(90, 110, (40, 40))
    shift = [gray(hr + offset) for offset in (-70.0, -64.0, 70.0)]
    assert float(residual_divergence(shift[0], shift[1], gray(hr))) == 0
    assert float(residual_divergence(shift[0], shift[2], gray(hr))) > 3
    for sign in (-1, 1):  # within the reach they do not
        near, far = gray(hr + 40.0 * sign), gray(hr + 63.0 * sign)
        assert float(residual_divergence(near, far, gray(hr))) > 3
    other = gray(hr[::-1].copy())
    assert float(residual_divergence(other, gray(hr), gray(hr))) > 1  # the same histogram of levels, not of residuals


def test_sizes_too_small_are_named():
    small = gray(np.full((23, 40), 120.0))
    for function in (radial_spectrum, flat_blocks):
        with pytest.raises(ValueError, match=r"image \(1, 3, 23, 40\): sides must be at least 24"):
            function(small)


def test_a_photograph_is_nearer_to_itself_blurred_by_less():
    data = pytest.importorskip("skimage.data")
    photo = images.to_tensor(data.astronaut()[:256, :256])[None]
    made = torch.cat([blur(photo, sigma) for sigma in (0.5, 1.0, 2.0)])
    for measure in (spectrum_distance(made, photo), residual_divergence(made, photo, photo)):
        assert 0 < measure[0] < measure[1] < measure[2]
