import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from degflow import Degrader, evaluation, images
from degflow.evaluation import METHODS, Measurement
from degflow.models import AutoencoderConfig, ResidualAutoencoder, VelocityConfig, VelocityNetwork
from degflow.scenes import Scene

LEVELS = {"1": 1.0, "2": 2.1, "4": 3.361}  # 3.361 in float32 lies above 3.361
SIZES = [(15, 15), (16, 40), (33, 47), (64, 64), (101, 75)]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def degrader():
    torch.manual_seed(0)
    autoencoder = ResidualAutoencoder(AutoencoderConfig(base_width=4, multipliers=(1, 1), blocks=1, gate_init=0.5))
    velocity = VelocityNetwork(VelocityConfig(width=8, blocks=1, multipliers=(1, 1)))
    velocity.head.weight.data *= 10  # so that neighbouring scales look different
    return Degrader(autoencoder, velocity, LEVELS)


@pytest.fixture(scope="module")
def scenes():
    """Two scenes of odd and different sizes, blurred more at every level."""
    data = pytest.importorskip("skimage.data")
    pixels = []
    for photo in (data.astronaut()[20:83, 190:263], data.coffee()[100:151, 200:247]):
        height, width = photo.shape[:2]
        lower = [images.resize(images.resize(photo, height // s, width // s), height, width) for s in (2, 3)]
        pixels.append(np.stack([photo, *lower]))
    named = [Scene("a_001", ()), Scene("b_002", ())]
    return SimpleNamespace(scenes=named, pixels=pixels, __len__=lambda: 2)


class Scenes:
    def __init__(self, scenes):
        self.scenes, self.pixels = scenes.scenes, scenes.pixels

    def __len__(self):
        return len(self.scenes)


def pair(height, width, seed=0):
    random = torch.Generator().manual_seed(seed)
    image = torch.rand(2, 3, height, width, generator=random) * 2 - 1
    return image, (image + 0.2 * torch.randn(image.shape, generator=random)).clamp(-1, 1)


def luma_of(image):
    """ITU-R BT.601 in 16..235 as the standard's own matrix row, in numpy."""
    rgb = (image.double().numpy() + 1) / 2
    return 16 + 219 * (0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2])


def shaved(image):
    return luma_of(image)[4:-4, 4:-4]


# Measures


def test_luma_runs_from_16_to_235():
    black, white = torch.full((1, 3, 2, 2), -1.0), torch.full((1, 3, 2, 2), 1.0)
    assert evaluation.luma(black).unique().tolist() == [16]
    assert evaluation.luma(white).unique().tolist() == pytest.approx([235], abs=1e-9)
    red = torch.tensor([1.0, -1, -1])[None, :, None, None]
    assert float(evaluation.luma(red)) == pytest.approx(16 + 65.481)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_psnr_and_ssim_are_scikit_images_on_shaved_luma(height, width):
    metrics = pytest.importorskip("skimage.metrics")
    image, reference = pair(height, width)
    psnr, ssim = evaluation.psnr(image, reference), evaluation.ssim(image, reference)
    assert psnr.dtype == ssim.dtype == torch.float64
    for n in range(2):
        a, b = shaved(image[n]), shaved(reference[n])
        assert float(psnr[n]) == pytest.approx(metrics.peak_signal_noise_ratio(b, a, data_range=255), abs=1e-4)
        assert float(ssim[n]) == pytest.approx(metrics.structural_similarity(b, a, data_range=255), abs=1e-6)


def test_measures_of_a_photograph_are_scikit_images():
    data, metrics = pytest.importorskip("skimage.data"), pytest.importorskip("skimage.metrics")
    photo = data.astronaut()
    image, reference = (
        images.to_tensor(images.resize(images.resize(photo, 200, 200), 512, 512)),
        images.to_tensor(photo),
    )
    expected = metrics.structural_similarity(shaved(reference), shaved(image), data_range=255)
    assert float(evaluation.ssim(image[None], reference[None])) == pytest.approx(expected, abs=1e-6)
    expected = metrics.peak_signal_noise_ratio(shaved(reference), shaved(image), data_range=255)
    assert float(evaluation.psnr(image[None], reference[None])) == pytest.approx(expected, abs=1e-4)


def test_borders_do_not_count_and_equal_images_are_perfect():
    image, _ = pair(20, 24)
    framed = image.clone()
    framed[..., :4, :] = framed[..., -4:, :] = framed[..., :4] = framed[..., -4:] = 0
    assert evaluation.psnr(image, framed).tolist() == [math.inf, math.inf]
    assert evaluation.ssim(image, framed).tolist() == pytest.approx([1, 1], abs=1e-12)


def test_an_offset_has_the_psnr_of_its_size():
    dark, light = torch.zeros(1, 3, 16, 16), torch.full((1, 3, 16, 16), 20 / 219)
    assert float(evaluation.psnr(dark, light)) == pytest.approx(20 * math.log10(255 / 10), abs=1e-5)


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"image \(2, 3, 20, 20\) and reference \(2, 3, 20, 21\): must have one shape"):
        evaluation.psnr(pair(20, 20)[0], pair(20, 21)[0])
    with pytest.raises(ValueError, match=r"image \(2, 3, 8, 20\): sides must be at least 9"):
        evaluation.psnr(*pair(8, 20))
    with pytest.raises(ValueError, match=r"image \(2, 3, 20, 14\): sides must be at least 15"):
        evaluation.ssim(*pair(20, 14))


# Baselines


@pytest.mark.parametrize(("height", "width"), [(16, 40), (33, 47), (64, 61)])
@pytest.mark.parametrize("scale", [1.0, 1.532, 2.0, 3.361, 4.0])
def test_bicubic_is_pillows(height, width, scale):
    hr = images.to_tensor(images.to_pixels(pair(height, width)[0]))
    result = evaluation.bicubic(hr, scale)
    for n in range(2):
        picture = Image.fromarray(images.to_pixels(hr)[n])
        small = picture.resize((round(width / scale), round(height / scale)), Image.Resampling.BICUBIC)
        back = small.resize((width, height), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(images.to_pixels(result)[n], np.asarray(back))
    if scale == 1:
        assert torch.equal(result, hr)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (33, 47), (64, 61)])
def test_reconstruct_decodes_the_lr_latent_with_hr_skips_and_crops_back(degrader, height, width):
    hr, lr = pair(height, width)
    autoencoder = degrader.autoencoder
    result = evaluation.reconstruct(autoencoder, hr, lr)
    assert result.shape == hr.shape
    assert float(result.abs().max()) <= 1
    high, wide = -(-height // 2) * 2, -(-width // 2) * 2
    padded = [
        torch.from_numpy(np.pad(x.numpy(), ((0, 0), (0, 0), (0, high - height), (0, wide - width)), mode="reflect"))
        for x in (hr, lr)
    ]
    with torch.no_grad():
        _, skips = autoencoder.encode(padded[0])
        latent, _ = autoencoder.encode(padded[1])
        expected = autoencoder.decode(latent, skips)[..., :height, :width].clamp(-1, 1)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(result, evaluation.reconstruct(autoencoder, lr, lr))
    assert not torch.allclose(result, evaluation.reconstruct(autoencoder, hr, hr))


# Tables


@pytest.mark.parametrize("crop", [0, 32, 70])
def test_measure_scores_every_method_at_every_level(degrader, scenes, crop):
    def brightness(image, reference):
        return (image - reference).abs().mean((1, 2, 3))

    rows = list(evaluation.measure(degrader, Scenes(scenes), LEVELS, brightness, crop, steps=1, solver="heun"))
    assert [(row.scene, row.label, row.scale, row.method) for row in rows] == [
        (scene, label, LEVELS[label], method)
        for scene in ("a_001", "b_002")
        for label in ("2", "4")
        for method in METHODS
    ]
    found = {(row.scene, row.label, row.method): row for row in rows}
    for name, pixels in zip(("a_001", "b_002"), scenes.pixels, strict=True):
        high, wide = (min(crop or side, side) for side in pixels.shape[1:3])
        top, left = (pixels.shape[1] - high) // 2, (pixels.shape[2] - wide) // 2
        pixels = pixels[:, top : top + high, left : left + wide]
        real = images.to_tensor(pixels)
        for n, label in ((1, "2"), (2, "4")):
            scale = torch.tensor([[LEVELS[label]]], dtype=torch.float64)
            made = {
                "generated": degrader(real[:1], scale, steps=1, solver="heun")[:, 0],
                "hr": real[:1],
                "bicubic": evaluation.bicubic(real[:1], LEVELS[label]),
                "autoencoder": evaluation.reconstruct(degrader.autoencoder, real[:1], real[n : n + 1]),
            }
            for method, image in made.items():
                image = images.to_tensor(images.to_pixels(image))
                row, lr = found[name, label, method], real[n : n + 1]
                if method != "generated":  # its levels share one decoding there, which may round otherwise
                    assert row.psnr == float(evaluation.psnr(image, lr))
                    assert row.ssim == float(evaluation.ssim(image, lr))
                    assert row.psnr_to_hr == float(evaluation.psnr(image, real[:1]))
                assert row.psnr == pytest.approx(float(evaluation.psnr(image, lr)), abs=0.01)
                assert row.lpips == pytest.approx(float((image - lr).abs().mean()), rel=0.05)


def test_measure_without_lpips_leaves_it_out(degrader, scenes):
    rows = list(evaluation.measure(degrader, Scenes(scenes), LEVELS, None))
    assert all(math.isnan(row.lpips) for row in rows)
    assert "/ nan |" in evaluation.fidelity_table(rows)


def test_the_table_holds_the_means_of_its_rows():
    def rows(scene, label, offset):
        for n, method in enumerate(METHODS):
            to_hr = math.inf if method == "hr" else 40.0 + offset
            scores = (30.0 + n + offset, 0.9 + 0.01 * n, 0.1 * (n + 1) + offset / 100, to_hr)
            yield Measurement(scene, label, float(label), method, *scores)

    measurements = [
        row for scene, offset in (("a", 0), ("b", 1)) for label in ("2", "3.361") for row in rows(scene, label, offset)
    ]
    assert evaluation.fidelity_table(measurements).splitlines() == [
        "| scale | generated | HR unchanged | bicubic | autoencoder's limit | captured LR to HR | generated to HR |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| x{label} | 30.50 / 0.9000 / 0.1050 | 31.50 / 0.9100 / 0.2050 | 32.50 / 0.9200 / 0.3050 "
            "| 33.50 / 0.9300 / 0.4050 | 31.50 | 40.50 |"
            for label in ("2", "3.361")
        ),
    ]


def test_sweep_is_the_mean_psnr_to_hr_over_an_even_grid(degrader, scenes):
    curve = evaluation.sweep(degrader, Scenes(scenes), 11, crop=32, steps=1)
    np.testing.assert_allclose(list(curve), np.linspace(1.0, 3.361, 11))
    scale = torch.tensor([[list(curve)[7]]], dtype=torch.float64)
    single = []
    for pixels in scenes.pixels:
        top, left = (pixels.shape[1] - 32) // 2, (pixels.shape[2] - 32) // 2
        hr = images.to_tensor(pixels[:1, top : top + 32, left : left + 32])
        single.append(float(evaluation.psnr(degrader(hr, scale, steps=1)[:, 0], hr)))
    assert list(curve.values())[7] == pytest.approx(np.mean(single), abs=1e-4)


# Pictures


def test_validation_crops_are_central_and_fit_the_smallest_scene(scenes):
    crops = evaluation.validation_crops(Scenes(scenes), count=6, side=32)
    assert crops.shape == (2, 3, 3, 32, 32)
    assert crops.dtype == torch.uint8
    first = scenes.pixels[0]
    top, left = (first.shape[1] - 32) // 2, (first.shape[2] - 32) // 2
    np.testing.assert_array_equal(crops[0].numpy().transpose(0, 2, 3, 1), first[:, top : top + 32, left : left + 32])
    assert evaluation.validation_crops(Scenes(scenes)).shape == (2, 3, 3, 47, 47)
    assert evaluation.validation_crops(Scenes(scenes), count=1).shape[0] == 1


def test_the_contact_sheet_puts_every_image_in_its_place():
    columns = [(f"column {n}", pair(10, 14, seed=n)[0]) for n in range(3)]
    sheet = evaluation.contact_sheet(columns, margin=4, title=16)
    assert sheet.shape == (16 + 2 * 14 + 4, 3 * 18 + 4, 3)
    rest = sheet.copy()
    for column, (_, batch) in enumerate(columns):
        for row in range(2):
            place = np.s_[20 + row * 14 : 30 + row * 14, 4 + column * 18 : 18 + column * 18]
            np.testing.assert_array_equal(sheet[place], images.to_pixels(batch)[row])
            rest[place] = 255
    assert (rest[16:] == 255).all()
    assert (rest[:16] < 128).any()


def test_reconstruction_scores_and_shows_every_level(degrader, scenes):
    crops = evaluation.validation_crops(Scenes(scenes), side=32)
    scalars, picture = evaluation.reconstruction(degrader.autoencoder, crops, list(LEVELS))
    assert list(scalars) == ["x1", "x2", "x4"]
    image = crops.float() / 127.5 - 1
    decoded = evaluation.reconstruct(degrader.autoencoder, image[:, 0], image[:, 2])
    assert scalars["x4"] == pytest.approx(float(evaluation.psnr(decoded, image[:, 2]).mean()), abs=1e-9)
    assert picture.shape == (16 + 2 * 36 + 4, 6 * 36 + 4, 3)
    np.testing.assert_array_equal(picture[20:52, 4 + 4 * 36 : 36 + 4 * 36], crops[0, 2].permute(1, 2, 0).numpy())
    np.testing.assert_array_equal(picture[20:52, 4 + 5 * 36 : 36 + 5 * 36], images.to_pixels(decoded)[0])


def test_generation_scores_the_levels_and_shows_the_scales_between(degrader, scenes):
    crops = evaluation.validation_crops(Scenes(scenes), side=32)
    scalars, picture = evaluation.generation(degrader, crops, list(LEVELS))
    assert list(scalars) == ["x2", "x4"]
    image = crops.float() / 127.5 - 1
    scales = torch.tensor([[2.1, 3.361, (1 + 2.1) / 2, (2.1 + 3.361) / 2]], dtype=torch.float64)
    low, made, *between = degrader(image[:, 0], scales.expand(2, -1)).unbind(1)
    assert scalars["x4"] == pytest.approx(float(evaluation.psnr(made, image[:, 2]).mean()), abs=1e-4)
    assert picture.shape == (16 + 2 * 36 + 4, 7 * 36 + 4, 3)
    columns = [image[:, 0], image[:, 1], low, image[:, 2], made, *between]
    for n, expected in enumerate(columns):
        shown = picture[20:52, 4 + n * 36 : 36 + n * 36].astype(int)
        assert np.abs(shown - images.to_pixels(expected)[0]).max() <= 1
        assert n == 0 or np.abs(shown - images.to_pixels(columns[n - 1])[0]).max() > 1
