import math
from itertools import pairwise

import numpy as np
import pytest
import scipy.interpolate
import scipy.ndimage
import torch

from degflow import evaluation, images
from degflow.capture.filters import blur
from degflow.evaluation import Baselines, random_pipeline
from degflow.evaluation.crops import central
from tests.captures import scenes_of, small_degrader

LEVELS = {"1": 1.0, "2": 2.0, "4": 4.0}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def degrader():
    return small_degrader(LEVELS)


@pytest.fixture(scope="module")
def photos():
    data = pytest.importorskip("skimage.data")
    return [data.astronaut()[:150, 150:310], data.coffee()[100:230, 200:320]]


# Gaussian


def test_the_fit_recovers_the_sigma_of_each_level(photos):
    sigmas, pixels = {"2": 0.72, "4": 1.93}, []
    for photo in photos:
        hr = images.to_tensor(photo)[None]
        made = torch.cat([hr, *(blur(hr, sigma) for sigma in sigmas.values())])
        pixels.append(images.to_pixels(made))
    found = evaluation.fit_sigmas(scenes_of(a=pixels[0], b=pixels[1]), LEVELS)
    assert found == pytest.approx(sigmas, abs=0.01)


def test_the_fit_has_the_highest_mean_psnr(photos):
    pixels = []
    for photo in photos:
        hr = images.to_tensor(photo)[None]
        pixels.append(images.to_pixels(torch.cat([hr, evaluation.bicubic(hr, 2.0), evaluation.bicubic(hr, 4.0)])))
    found = evaluation.fit_sigmas(scenes_of(a=pixels[0], b=pixels[1]), LEVELS, crop=100)

    def score(level, sigma):
        crops = [images.to_tensor(central(one, 100)) for one in pixels]
        return np.mean([float(evaluation.psnr(blur(one[:1], sigma), one[level][None])) for one in crops])

    for level, label in ((1, "2"), (2, "4")):
        near = [score(level, found[label] * factor) for factor in (0.9, 0.98, 1.0, 1.02, 1.1)]
        assert near[0] < near[1] < near[2] > near[3] > near[4]


def test_levels_that_are_hr_itself_or_beyond_the_bound_end_at_the_bounds(photos):
    hr = images.to_tensor(photos[0])[None]
    pixels = images.to_pixels(torch.cat([hr, hr, blur(hr, 25.0)]))
    found = evaluation.fit_sigmas(scenes_of(a=pixels), LEVELS)
    assert found["2"] < 0.25  # as good as no blur
    assert found["4"] == pytest.approx(16, abs=0.01)


def test_a_lens_that_is_less_sharp_than_its_scale_is_found(photos):
    hr = images.to_tensor(photos[0])[None]
    pixels = images.to_pixels(torch.cat([hr, blur(hr, 3.1), blur(hr, 7.0)]))
    assert evaluation.fit_sigmas(scenes_of(a=pixels), LEVELS) == pytest.approx({"2": 3.1, "4": 7.0}, rel=0.03)


# Random pipeline


@pytest.fixture
def steps(monkeypatch):
    """What the pipeline did, in order: (step, size it left)."""
    done = []

    def watch(name):
        step = getattr(random_pipeline, f"_{name}")

        def watched(*arguments):
            pixels = step(*arguments)
            done.append((name, pixels.shape[:2]))
            return pixels

        monkeypatch.setattr(random_pipeline, f"_{name}", watched)

    for name in ("blurred", "resized", "noisy", "compressed"):
        watch(name)
    return done


@pytest.mark.parametrize("scale", [1.0, 1.532, 4.0])
def test_two_orders_within_the_scale(photos, steps, scale):
    hr, seen = photos[0], set()
    last = images.shrunk_size(*hr.shape[:2], scale)
    for seed in range(60):
        steps.clear()
        made = evaluation.random_degradation(hr, scale, np.random.default_rng(seed))
        assert (made.shape, made.dtype) == (hr.shape, np.uint8)
        seen.add(" ".join(name for name, _ in steps))
        sizes = [size for _, size in steps]
        assert sizes[0] == hr.shape[:2]
        assert sizes[-1] == last
        for before, after in pairwise(sizes):
            assert before[0] >= after[0]
            assert before[1] >= after[1]
    first = "blurred resized noisy compressed"
    assert seen == {
        f"{first} {second} {end}"
        for second in ("blurred resized noisy", "resized noisy")
        for end in ("resized compressed", "compressed resized")
    }


def test_the_pipeline_keeps_the_brightness_and_takes_what_the_scale_takes(photos):
    hr = photos[0]
    for seed in range(6):
        made = evaluation.random_degradation(hr, 4.0, np.random.default_rng(seed))
        assert abs(made.mean() - hr.mean()) < 4
        fine = evaluation.radial_spectrum(images.to_tensor(np.stack([hr, made])))[
            :, 20:
        ]  # beyond 0.31 cycles per pixel
        assert float(fine[1].mean()) < float(fine[0].mean()) / 30


def test_noise_lies_within_its_range(photos):
    flat = np.full((80, 80, 3), 120, np.uint8)
    made = np.stack([random_pipeline._noisy(flat, 0, np.random.default_rng(seed)) for seed in range(200)])
    spread = made.reshape(200, -1, 3).std(1)
    assert 0.4 < spread.min() < 2
    assert 25 < spread.max() < 1.05 * 3 * math.sqrt(120)
    gray = (made == made[..., :1]).all((1, 2, 3)).mean()
    assert 0.3 < gray < 0.5


# Latent paths


@pytest.mark.parametrize(("height", "width"), [(24, 24), (33, 41)])
def test_latent_paths_pass_through_the_captured_levels_and_between_them(degrader, height, width):
    captured = torch.rand(3, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1
    for path in ("spline", "linear"):
        for n, scale in enumerate((1.0, 2.0, 4.0)):
            expected = evaluation.reconstruct(degrader.autoencoder, captured[:1], captured[n : n + 1])
            made = evaluation.interpolate(degrader, captured, scale, path)
            torch.testing.assert_close(made, expected, rtol=0, atol=1e-4)
    high, wide = (-(-side // 2) * 2 for side in (height, width))
    padded = np.pad(captured.numpy(), ((0, 0), (0, 0), (0, high - height), (0, wide - width)), mode="reflect")
    with torch.no_grad():
        latents, _ = degrader.autoencoder.encode(torch.from_numpy(padded))
        _, skips = degrader.autoencoder.encode(torch.from_numpy(padded[:1]))
        spline = scipy.interpolate.CubicSpline([1, 2, 4], latents.double().numpy(), bc_type="natural")
        for path, latent in (
            ("spline", torch.from_numpy(spline(2.7)[None]).float()),
            ("linear", 0.65 * latents[1:2] + 0.35 * latents[2:]),
        ):
            expected = degrader.autoencoder.decode(latent, skips)[..., :height, :width].clamp(-1, 1)
            made = evaluation.interpolate(degrader, captured, 2.7, path)
            torch.testing.assert_close(made, expected, rtol=0, atol=1e-4)
    assert not torch.allclose(*(evaluation.interpolate(degrader, captured, 3.0, path) for path in ("spline", "linear")))


# All of them


def test_latent_paths_are_measured_where_they_are_not_the_autoencoders_limit(degrader):
    levels = {"1": 1.0, "2": 2.0, "3": 3.0, "4": 3.9}
    baselines = Baselines(degrader, levels, dict.fromkeys("234", 1.0))
    assert baselines.at("2") == ["gaussian", "random"]
    assert baselines.at("3") == baselines.at("4") == ["gaussian", "random", "spline", "linear"]
    captured = torch.rand(4, 3, 24, 24, generator=torch.Generator().manual_seed(2)) * 2 - 1
    made = baselines.images("scene", captured, "3")
    assert list(made) == ["gaussian", "random", "spline", "linear"]
    expected = evaluation.interpolate(degrader, captured[[0, 1, 3]], 3.0, "linear")
    assert torch.equal(made["linear"], expected)
    assert torch.equal(made["gaussian"], blur(captured[:1], 1.0))


def test_latent_paths_need_every_trained_level(degrader):
    baselines = Baselines(degrader, {"1": 1.0, "2": 2.0, "3": 3.0}, {"2": 1.0, "3": 1.0}, ("linear", "gaussian"))
    assert baselines.lacking == ["4"]
    assert baselines.at("3") == ["gaussian"]


def test_the_random_pipeline_follows_from_scene_and_level(degrader, photos):
    captured = images.to_tensor(np.stack([photos[0]] * 3))

    def made(scene="a", label="2"):
        levels = {"1": 1.0, label: 2.0, "4": 4.0}
        return Baselines(degrader, levels, {}, ("random",)).images(scene, captured, label)["random"]

    assert torch.equal(made(), made())
    for other in ({"scene": "b"}, {"label": "two"}):
        assert not torch.equal(made(), made(**other))
