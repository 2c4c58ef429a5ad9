"""The Frechet distance of LR patches, against SciPy and sets whose distance is known."""

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F

from degflow import evaluation, images
from degflow.evaluation.frechet import CAPTURED, Distance, Frechet, Moments, frechet_distance
from degflow.perceptual import Perceptual
from tests.captures import scenes_of, small_degrader


def moments(features, parts=1):
    found = Moments()
    for part in np.array_split(features, parts):
        found.add(torch.from_numpy(part))
    return found


def test_the_distance_is_scipys_whatever_parts_the_features_came_in():
    random = np.random.default_rng(0)
    a = random.normal(1, 1, (300, 7)) @ random.normal(size=(7, 7))
    b = random.normal(0, 2, (200, 7)) @ random.normal(size=(7, 7))
    covariances = [np.cov(x, rowvar=False, bias=True) for x in (a, b)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet_distance(moments(a, 5), moments(b, 3)) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(moments(a), moments(a, 4)) == pytest.approx(0, abs=1e-9)


@pytest.fixture(scope="module")
def perceptual():
    return Perceptual("alex")


@pytest.fixture(scope="module")
def photo():
    pixels = pytest.importorskip("skimage.data").astronaut()
    return images.to_tensor(pixels[:160, 150:310])[None]


def test_noise_moves_patches_away_from_captured_ones_the_more_the_stronger_it_is(perceptual, photo):
    found, noise = Frechet(perceptual), torch.randn(photo.shape, generator=torch.Generator().manual_seed(0)) / 127.5
    methods = {CAPTURED: photo, "same": photo, "little": photo + 2 * noise, "much": photo + 6 * noise}
    for method, image in methods.items():
        for half in image.split(80, dim=2):
            found.add("2", method, half.clamp(-1, 1))
    same, little, much = found.distances()
    assert (same.method, same.label) == ("same", "2")
    assert same.distance == pytest.approx(0, abs=1e-3)  # fewer patches than features: square roots of rounding
    assert 0.01 < little.distance < 0.5 * much.distance


def test_patches_are_windows_of_32_pixels_that_overlap_by_half(perceptual, photo):
    found = Frechet(perceptual)
    found.add("2", "hr", photo)
    features = perceptual.features(photo)[2]
    side = round(32 * features.shape[-1] / 160)
    windows = F.unfold(features, side, stride=side // 2).reshape(features.shape[1], side**2, -1).mean(1)
    assert found.moments["2", "hr"].count == windows.shape[1] >= 49
    assert found.moments["2", "hr"].mean.numpy() == pytest.approx(windows.double().mean(1).numpy(), abs=1e-5)
    found.add("2", "hr", photo[..., :32, :])  # as few rows of features as there can be
    assert found.moments["2", "hr"].count > windows.shape[1]
    found.add("3", "hr", photo[..., :31])
    assert ("3", "hr") not in found.moments


def test_measure_compares_every_method_with_the_captured_images(perceptual, photo):
    levels, pixels = {"1": 1.0, "2": 2.0}, images.to_pixels(photo)[0]
    blurred = images.to_pixels(evaluation.bicubic(photo, 2.0))[0]
    found = Frechet(perceptual)
    rows = list(
        evaluation.measure(
            small_degrader(levels), scenes_of(a=np.stack([pixels, blurred])), levels, None, 0, None, found
        )
    )
    apart = {row.method: row.distance for row in found.distances()}
    assert list(apart) == [row.method for row in rows]
    assert apart["bicubic"] == pytest.approx(0, abs=1e-3)  # the captured image here
    assert apart["hr"] > 0.01
    table = evaluation.realism_table(rows, [Distance("2", "hr", 1.234, 9)]).splitlines()
    assert next(line for line in table if "HR unchanged" in line).endswith("| 1.23 |")
    assert next(line for line in table if "bicubic" in line).endswith("| — |")
