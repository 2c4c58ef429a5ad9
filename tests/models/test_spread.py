"""Gaussian noise with a spectrum: fitted to spectra, measured again, and a function of seed and place."""

import numpy as np
import pytest
import scipy.signal
import torch

from degflow.models import Spread
from degflow.models.counter import gaussian
from degflow.models.spread import cross_spectra, cut_filter, filtered_noise, hermitian_root
from tests.models.test_residual import TIMES, covariances, factors, fitted

SEEDS = torch.tensor([5, 2**40])


def smooth_filters(channels=3, side=5):
    """Random filters that mix channels, strongest in the middle, and of no symmetry; "1 C C side side"."""
    random = torch.randn(1, channels, channels, side, side, generator=torch.Generator().manual_seed(2))
    near = torch.exp(-((torch.arange(side) - side // 2) ** 2) / 2.0)
    return random * near[:, None] * near


def test_a_fit_to_white_noise_recovers_its_covariance_at_every_time_but_the_first():
    factor, deviation = factors(fitted(), torch.tensor(TIMES))
    root = deviation[..., 0] * factor
    torch.testing.assert_close((root @ root.mT)[1:].double(), covariances(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(factor[1:].square().sum(2), torch.ones(2, 4))  # unit variance
    wanted = covariances().diagonal(dim1=1, dim2=2).sqrt()
    torch.testing.assert_close(deviation[1:, :, 0, 0].double(), wanted, rtol=1e-4, atol=0)
    assert float(root[0].abs().max()) == 0
    assert float(deviation[0].max()) < 1e-9


def test_between_two_times_the_filters_are_linear():
    spread = fitted()
    begin, low, high = spread.filters
    wanted = {0.0: begin, 0.1: 0.4 * low, 0.25: low, 0.4: 0.8 * low + 0.2 * high, 1.0: high}
    filters, deviation = spread.at(torch.tensor(list(wanted)))  # each sample at a time of its own
    torch.testing.assert_close(deviation[..., None] * filters, torch.stack(list(wanted.values())))
    exact, _ = spread.at(torch.tensor([0.4], dtype=torch.float64))
    torch.testing.assert_close(exact[0], filters[3])


@pytest.mark.parametrize("times", [(0.0,), (0.1, 1.0), (0.0, 0.5, 0.5), (0.0, 1.0, 0.5), (), (0.0, float("nan"))])
def test_bad_times_are_named(times):
    with pytest.raises(ValueError, match=r"times=\[.*\]: at least two, the first 0, increasing"):
        Spread(4, times)


def test_spectra_are_scipys_welch():
    signal = filtered_noise(SEEDS[:1], smooth_filters(), 48, 80)
    found = cross_spectra(signal, 16)
    window = np.outer(*[scipy.signal.get_window("hann", 16)] * 2)
    total, count = np.zeros((16, 16, 3, 3), complex), 0
    for top in range(0, 33, 8):
        for left in range(0, 65, 8):
            waves = np.fft.fft2(signal[0, :, top : top + 16, left : left + 16].double().numpy() * window)
            total += np.einsum("iuv,juv->uvij", waves, waves.conj())
            count += 1
    np.testing.assert_allclose(found.numpy(), total / count / (window**2).sum(), rtol=1e-6, atol=1e-9)


def test_noise_is_the_correlation_of_each_channels_white_noise_with_its_filters():
    filters = smooth_filters()
    found, white = filtered_noise(SEEDS[:1], filters, 20, 30), gaussian(SEEDS[:1], 3, 24, 34)
    for channel in range(3):
        wanted = sum(scipy.signal.correlate2d(white[0, n], filters[0, channel, n], "valid") for n in range(3))
        np.testing.assert_allclose(found[0, channel], wanted, rtol=0, atol=1e-5)


def test_what_is_drawn_has_the_spectrum_that_was_fitted_between_channels_too():
    captured = cross_spectra(filtered_noise(SEEDS[:1], smooth_filters(), 600, 600), 16)
    spread = Spread(3, (0.0, 1.0), side=9)
    spread.fit(captured[None])
    time = torch.ones(1)
    drawn = spread.at(time)[1] * spread.sample(SEEDS[1:], time, 600, 600)
    found = cross_spectra(drawn, 16)
    power = float(captured.abs().square().sum())
    assert float((found - captured).abs().square().sum()) < 0.06**2 * power
    assert float((found.mT - captured).abs().square().sum()) > 0.2**2 * power  # the order of channels matters
    torch.testing.assert_close(
        drawn.var((2, 3))[0].double(), captured.diagonal(dim1=2, dim2=3).real.mean((0, 1)), rtol=0.03, atol=0
    )


def test_channels_keep_their_variance_when_filters_are_cut():
    sharp = torch.zeros(1, 16, 16, 1, 1)
    sharp[0, 0, 0] = 16.0**2  # one frequency alone: an endless wave
    spread = Spread(1, (0.0, 1.0), side=3)
    spread.fit(sharp)
    assert float(spread.at(torch.ones(1))[1]) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("share", [0.5, 2.0])
def test_what_an_estimate_has_below_zero_is_left_out(share):
    spectra = torch.ones(1, 16, 16, 1, 1)
    spectra[:, 4:12] *= -share
    spread = Spread(1, (0.0, 1.0), side=15)
    spread.fit(spectra)
    variance = float(spread.at(torch.ones(1))[1]) ** 2
    assert variance == pytest.approx(max(0, (1 - share) / 2), abs=1e-5)
    rows = torch.fft.fft2(spread.filters[1, 0, 0], s=(16, 16)).abs().square().mean(1)
    assert float(rows[4:12].mean()) < 0.1 * float(rows[[*range(4), *range(12, 16)]].mean()) + 1e-9
    assert bool(spread.filters.isfinite().all())


def test_a_root_is_one():
    spectra = cross_spectra(filtered_noise(SEEDS[:1], smooth_filters(), 64, 64), 8)
    root = hermitian_root(spectra)
    torch.testing.assert_close(root @ root.mH, spectra)
    assert cut_filter(root, 5).shape == (3, 3, 5, 5)


def test_a_number_depends_on_its_seed_and_place_alone():
    spread, time = fitted(), torch.tensor([0.3, 0.9])
    whole = spread.sample(SEEDS, time, 40, 44)
    part = spread.sample(SEEDS, time, 9, 12, torch.tensor([[7, 20], [31, 0]]))
    torch.testing.assert_close(part[0], whole[0, :, 7:16, 20:32])
    torch.testing.assert_close(part[1], whole[1, :, 31:40, :12])
    torch.testing.assert_close(spread.sample(SEEDS[1:], time[1:], 40, 44), whole[1:])
    assert float((spread.sample(SEEDS + 1, time, 40, 44) - whole).abs().mean()) > 0.5


def test_two_fields_of_one_seed_have_white_noise_of_their_own():
    one, other = (gaussian(SEEDS[:1], 2, 100, 100, first=first) for first in (0, 2**16))
    assert torch.equal(gaussian(SEEDS[:1], 4, 100, 100)[:, 2:], gaussian(SEEDS[:1], 2, 100, 100, first=2))
    assert abs(float((one * other).mean())) < 0.04
