"""The cutoff: its filters at every time, and how they are fitted to what draws have too much."""

import numpy as np
import pytest
import scipy.ndimage
import torch

from degflow.models.cutoff import BEGIN, END, SIDE, Cutoff, Excess
from degflow.models.precision import computing

TIMES = (0.0, 0.25, 1.0)


def cutoff():
    made = Cutoff(TIMES)
    made.filters[1:] = torch.randn(2, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) / SIDE
    return made


@pytest.mark.parametrize(("height", "width"), [(24, 31), (3, 2)])
def test_a_filter_is_scipys_between_its_times_and_repeats_the_border(height, width):
    made, times = cutoff(), torch.tensor([0.25, 1.0, 0.1, 0.625])
    image = torch.rand(4, 3, height, width, generator=torch.Generator().manual_seed(1))
    found = made(image, times)
    one, low, high = made.filters.double().numpy()
    for n, taps in enumerate((low, high, 0.6 * one + 0.4 * low, 0.5 * low + 0.5 * high)):
        for channel in range(3):
            wanted = scipy.ndimage.correlate(image[n, channel].double().numpy(), taps, mode="nearest")
            np.testing.assert_allclose(found[n, channel].numpy(), wanted, atol=1e-5)


def test_nothing_changes_at_time_0_nor_before_a_fit():
    image = torch.rand(2, 3, 20, 20)
    assert torch.equal(cutoff()(image, torch.zeros(2)), image)
    assert torch.equal(Cutoff(TIMES)(image, torch.tensor([0.4, 1.0])), image)


def test_it_computes_in_float32_whatever_the_networks_do():
    image, time = torch.rand(1, 3, 20, 20), torch.ones(1)
    with computing("bfloat16", "cpu"):
        rounded = cutoff()(image, time)
    assert torch.equal(rounded, cutoff()(image, time))
    assert cutoff()(image.bfloat16(), time).dtype == torch.float32


def blurred(sigma, seed, count=6, side=128, strength=0.05):
    """Noise of a Gaussian spectrum on a scene of strong low frequencies, "count 3 side side" in [-1, 1]."""
    random = np.random.default_rng(seed)
    scene = scipy.ndimage.gaussian_filter(random.standard_normal((count, 3, side, side)), (0, 0, 8, 8), mode="wrap")
    noise = scipy.ndimage.gaussian_filter(random.standard_normal(scene.shape), (0, 0, sigma, sigma), mode="wrap")
    return torch.from_numpy(3 * scene + strength * noise)


def response(taps, at):
    """Of the filter "side side" at frequencies "N 2" in cycles per pixel."""
    place = np.arange(SIDE) - SIDE // 2
    wave = np.exp(-2j * np.pi * (at[:, 0, None, None] * place[:, None] + at[:, 1, None, None] * place))
    return (wave * taps.numpy()).sum((1, 2))


def test_the_filter_takes_what_draws_have_beyond_captures_and_lets_low_frequencies_pass():
    excess = Excess(4.0, 32)
    for seed in range(4):
        rounding = np.random.default_rng(seed).uniform(-0.5, 0.5, (6, 3, 128, 128)) / 127.5
        excess.add(blurred(1.0, seed) + torch.from_numpy(rounding), blurred(0.6, 100 + seed))
    taps = excess.filter(4.0)
    assert float(taps.sum()) == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(taps, taps.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(taps, taps.flip(0), rtol=0, atol=1e-12)
    along = np.stack((np.linspace(0, 0.5, 41), np.zeros(41)), 1)
    found, frequency = response(taps, along), along[:, 0]
    assert np.abs(found.imag).max() < 1e-9
    # The ratio of the noises' deviations: exp(-2 pi^2 f^2 (1 - 0.36)).
    wanted, passed = np.exp(-2 * np.pi**2 * frequency**2 * 0.64), frequency < 0.8 * BEGIN / 4
    assert np.abs(found.real[passed] - 1).max() < 0.03
    cut = frequency > 1.3 * END / 4
    assert np.abs(found.real - wanted)[cut].max() < 0.1
    assert found.real[cut].max() < 0.6


def test_draws_that_have_less_are_left_alone():
    excess = Excess(4.0, 32)
    for seed in range(2):
        excess.add(blurred(0.6, seed), blurred(1.0, 100 + seed))
    taps = excess.filter(4.0)
    assert float(taps[SIDE // 2, SIDE // 2]) == pytest.approx(1, abs=0.02)
    assert float(taps.abs().sum()) < 1.1


def test_another_scale_has_the_response_of_the_next_larger_one_at_its_own_frequencies():
    two, four = Excess(2.0, 32), Excess(4.0, 32)
    for seed in range(2):
        two.add(blurred(0.6, seed), blurred(0.6, seed))
        four.add(blurred(1.0, seed), blurred(0.6, 100 + seed))
    own, scaled = four.target(4.0), four.target(3.0)
    for n in range(1, 5):  # the frequency 4n of scale 3 is 3n of scale 4, both of a window of 32
        assert float(scaled[4 * n, 0]) == pytest.approx(float(own[3 * n, 0]))
        assert float(scaled[-4 * n, 4]) == pytest.approx(float(own[3 * n, 3]))
    assert float(scaled[2, 0]) == pytest.approx(float(own[1, 0] + own[2, 0]) / 2)
    made = Cutoff((0.0, 0.2, 0.4, 0.7, 1.0))
    made.fit([1.5, 2.0, 3.0, 4.0], [two, four])
    for number, taps in enumerate((two.filter(1.5), two.filter(2.0), four.filter(3.0), four.filter(4.0)), 1):
        torch.testing.assert_close(made.filters[number], taps.float())
    assert float((made.filters[4] - made.filters[2]).abs().max()) > 0.01
