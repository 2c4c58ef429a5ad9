import math

import numpy as np
import pytest
import torch
from scipy.ndimage import convolve1d

from degflow import images
from degflow.capture import optics
from degflow.capture.camera import CAMERAS
from degflow.capture.optics import CORNER, FLOOR, Optics, to_linear, to_srgb
from degflow.capture.scenes import SceneConfig, SceneImages

LEVELS = {"1": 1.0, "2": 2.0, "4": 4.0}
SIGMA = 0.6  # pixels of blur for each unit of sqrt(s^2 - 1)


def gaussian(variance, frequency):
    return torch.exp(-2 * math.pi**2 * variance * frequency**2)


def optics_of(log_transfer, rings=64):
    """Optics of levels 1, 2 and 4, float64: log_transfer(scale, f) gives "R", or "3 R"."""
    optics = Optics((1.0, 2.0, 4.0), rings).double()
    for level, scale in enumerate(optics.scales[1:], 1):
        frequency = torch.arange(rings, dtype=torch.float64) * CORNER / (rings - 1)
        optics.log_transfer[level] = log_transfer(scale, frequency)
    return optics


def gaussian_optics(rings=64, variance=SIGMA**2):
    """Optics of a lens whose blur has the variance `variance` (s^2 - 1) in pixels; a number or "3 1"."""
    return optics_of(lambda scale, f: -2 * math.pi**2 * variance * (scale**2 - 1) * f**2, rings)


def texture(height, width, seed):
    """Linear light "3 H W" float64, many darks and few highlights, whose spectrum falls as a photograph's does."""
    rng = np.random.default_rng(seed)
    f = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    shape = np.fft.rfft2(rng.standard_normal((3, height, width))) / np.maximum(f, 0.5 / height) ** 0.8
    plane = np.fft.irfft2(shape, s=(height, width))
    return torch.from_numpy(np.exp(plane / plane.std((1, 2), keepdims=True) - 2).clip(0.005, 0.85))


def captured(light, transfer=None, shift=(0.0, 0.0), gain=1.0, offset=0.0):
    """Blurred by `transfer`(f), moved down and right, brightened: "H W 3" uint8, sRGB."""
    height, width = light.shape[-2:]
    rows = torch.fft.fftfreq(height, dtype=torch.float64)[:, None]
    columns = torch.fft.rfftfreq(width, dtype=torch.float64)
    spectrum = torch.fft.rfft2(light)
    if transfer is not None:
        spectrum = spectrum * transfer(torch.hypot(*torch.broadcast_tensors(rows, columns)))
    spectrum = spectrum * torch.exp(-2j * math.pi * (rows * shift[0] + columns * shift[1]))
    light = torch.fft.irfft2(spectrum, s=(height, width)) * gain + offset
    return np.rint(to_srgb(light).movedim(0, -1).numpy() * 255).astype(np.uint8)


def tree(root, scenes, levels):
    """A RealSR tree: scene number -> images of all levels, HR first."""
    first = next(label for label in levels if label != "1")
    for number, pictures in enumerate(scenes):
        for label, picture in zip(levels, pictures, strict=True):
            name = f"{first}/S{number}_HR.png" if label == "1" else f"{label}/S{number}_LR{label}.png"
            path = root / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(images.encode_png(picture))
    return SceneImages(SceneConfig(data=str(root), levels=levels, crop=8), quiet=True)


def lens(scale):
    return lambda frequency: gaussian(SIGMA**2 * (scale**2 - 1), frequency)


def departure(optics, scale, reduction=1.0):
    """Largest error of H where H is above 0.02, of all channels, with the truth's own exponent."""
    frequency = torch.linspace(0, 0.45, 200, dtype=torch.float64)
    truth = gaussian(SIGMA**2 * (scale**2 - 1 / reduction**2), frequency)
    found = optics.transfer(frequency, torch.tensor([scale], dtype=torch.float64), reduction)[0]
    return float((found - truth).abs()[:, truth > 0.02].max())


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    scenes = [[captured(texture(300, 400, n), lens(s) if s > 1 else None) for s in LEVELS.values()] for n in range(3)]
    return Optics.fit(tree(tmp_path_factory.mktemp("scenes"), scenes, LEVELS))


@pytest.mark.parametrize("scale", [1.532, 2.0, 3.0, 3.361, 4.0])
def test_a_blur_in_linear_light_is_found_at_levels_and_between(fitted, scale):
    assert departure(fitted, scale) < 0.01


@pytest.mark.parametrize("scale", [1.0, 1.5, 2.0, 3.0])
def test_reduced_hr_is_blurred_from_its_own_scale(fitted, scale):
    assert departure(fitted, scale, reduction=4 / 3) < 0.01


def test_each_channel_has_its_own_transfer_function(tmp_path):
    variances = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)[:, None, None]
    scenes = [[captured(light := texture(256, 256, 1)), captured(light, lambda f: gaussian(variances, f))]]
    optics = Optics.fit(tree(tmp_path, scenes, {"1": 1.0, "2": 2.0}))
    frequency = torch.tensor([0.1, 0.2], dtype=torch.float64)
    found = optics.transfer(frequency, torch.tensor([2.0]))[0]
    assert (found - gaussian(variances[..., 0], frequency)).abs().max() < 0.01


def seen_by_canon(photos, scales=(1.0, 2.0, 4.0)):
    """What the simulated canon captures of photographs "H W 3" uint8."""
    return [[CAMERAS["canon"].capture(photo, scale) for scale in scales] for photo in photos]


def test_blue_under_a_warm_light_has_the_optics_of_any_light(tmp_path):
    """Its detail in LR is green's, from demosaicing; where there is no blue at all, nothing tells its blur."""
    lights = [texture(300, 400, n) * torch.tensor([1.0, 0.9, 0.8], dtype=torch.float64)[:, None, None] for n in (1, 2)]
    lights = [0.5 * light + 0.5 * light.mean(0) for light in lights]  # colours of a photograph: near to gray
    found = []
    for name, blue in (("white", 1.0), ("warm", 0.1), ("none", 0.0)):
        warm = torch.tensor([1.0, 0.6 if blue < 1 else 1.0, blue], dtype=torch.float64)[:, None, None]
        (tmp_path / name).mkdir()
        scenes = seen_by_canon([captured(light * warm) for light in lights])
        if not blue:
            for scene in scenes:
                for picture in scene:
                    picture[..., 2] = 0
        optics = Optics.fit(tree(tmp_path / name, scenes, LEVELS))
        frequency = torch.tensor([0.02, 0.05, 0.1], dtype=torch.float64)
        found.append(torch.stack([optics.transfer(frequency, torch.tensor([s]))[0] for s in (2.0, 4.0)]))
    white, warm, none = found
    assert (warm - white)[:, :2].abs().max() < 0.1  # red and green
    assert (warm - white)[:, 2].abs().max() < 0.15
    assert (none - white)[:, 2].abs().max() < 0.15


def test_windows_lie_in_all_of_a_scene():
    """A scene has as many rows of windows as windows are taken: evenly spaced ones would all lie in the last column."""
    pixels = np.zeros((2, 1536, 2048, 3), np.uint8)
    pixels[:, 64::128, :, 0] = np.arange(2048) // 8  # a column's level says where it is
    levels = optics._spectra(pixels, 24).abs().sum((1, 2, 3, 4))
    assert len(levels.unique()) > 12


def test_scenes_that_are_shifted_and_brighter_or_darker_give_the_same(tmp_path):
    shifts, gains = [(0.4, -0.7), (-1.2, 0.3), (0.9, 1.5)], [1.1, 0.85, 1.0]
    scenes = [
        [captured(light := texture(300, 400, n))]
        + [captured(light, lens(s), shift, gain, offset=0.02) for s in (2.0, 4.0)]
        for n, (shift, gain) in enumerate(zip(shifts, gains, strict=True))
    ]
    with pytest.warns(UserWarning, match=r"level [24]: LR lies 1\.2 pixels beside HR \(median\)") as warned:
        optics = Optics.fit(tree(tmp_path, scenes, LEVELS))
    assert len(warned) == 2
    assert max(departure(optics, scale) for scale in (1.532, 2.0, 3.0, 4.0)) < 0.02


def test_the_scales_are_the_levels_own(tmp_path):
    levels = {"1": 1.0, "2": 2.1, "4": 3.75}
    scenes = [[captured(texture(256, 256, 0), lens(s) if s > 1 else None) for s in levels.values()]]
    optics = Optics.fit(tree(tmp_path, scenes, levels))
    assert optics.scales == (1.0, 2.1, 3.75)
    assert departure(optics, 3.0) < 0.01


def test_a_window_that_shows_another_picture_does_not_count(tmp_path):
    def scene(lr_seed):
        lights = [texture(200, 200, 3), texture(200, 200, lr_seed)]
        return [captured(lights[0]), captured(lights[1], lens(2.0))]

    levels = {"1": 1.0, "2": 2.0}
    (tmp_path / "both").mkdir()
    with pytest.warns(UserWarning, match="level 2: 50% of the windows count for the optics"):
        mixed = Optics.fit(tree(tmp_path / "both", [scene(3), scene(4)], levels))
    assert departure(mixed, 2.0) < 0.01
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="level=2: no window shows HR's picture"):
        Optics.fit(tree(tmp_path / "other", [scene(4)], levels))


def test_scenes_smaller_than_a_window_serve_and_too_small_ones_are_named(tmp_path):
    (tmp_path / "small").mkdir()
    (tmp_path / "tiny").mkdir()
    levels = {"1": 1.0, "2": 2.0}
    pair = [captured(texture(90, 101, 0)), captured(texture(90, 101, 0), lens(2.0))]
    assert departure(Optics.fit(tree(tmp_path / "small", [pair], levels)), 2.0) < 0.03
    pair = [picture[:31] for picture in pair]
    with pytest.raises(ValueError, match="scene=S0: 101 x 31 pixels; sides must be at least 32"):
        Optics.fit(tree(tmp_path / "tiny", [pair], levels))


def test_noise_beyond_the_lens_leaves_a_small_positive_transfer(tmp_path):
    rng = np.random.default_rng(0)
    hr, lr = captured(texture(256, 256, 0)), captured(texture(256, 256, 0), lambda f: gaussian(30.0, f))
    lr = np.clip(lr + np.rint(rng.standard_normal(lr.shape)), 0, 255).astype(np.uint8)
    table = Optics.fit(tree(tmp_path, [[hr, lr]], {"1": 1.0, "2": 2.0})).log_transfer[1]
    assert table.min() >= math.log(FLOOR) - 1e-6
    assert table[:, 32:].max() < math.log(0.05)


def test_between_lr_levels_what_happens_at_the_sensors_pixel_is_the_same():
    def log_transfer(scale, frequency):  # anything of s f, and HR's own Gaussian taken away
        pitch = scale * frequency
        return -2 * pitch**2 - 8 * pitch**4 + 1.5 * frequency**2

    frequency = torch.linspace(0, 0.3, 100, dtype=torch.float64)
    found = optics_of(log_transfer, rings=1000).transfer(frequency, torch.tensor([3.0], dtype=torch.float64))
    assert (found - torch.exp(log_transfer(3.0, frequency))).abs().max() < 1e-4


@pytest.mark.parametrize("scale", [2.0, 3.0, 4.0])
def test_the_skeleton_of_a_reduced_image_is_the_reduced_skeleton(scale):
    def halved(image):  # without aliasing: the low half of the spectrum, in linear light
        spectrum = torch.fft.rfft2(to_linear((image + 1) / 2))
        low = torch.cat([spectrum[..., :64, :65], spectrum[..., -64:, :65]], dim=-2)
        return to_srgb(torch.fft.irfft2(low, s=(128, 128)) / 4) * 2 - 1

    optics = optics_of(lambda scale, f: -2 * (scale**2 - 1) * f**2 - (scale**4 - 1) * f**4)
    hr = (to_srgb(0.2 + 0.3 * texture(256, 256, 0)) * 2 - 1)[None]
    hr = torch.cat([hr, hr.flip(-1)], -1)
    hr = torch.cat([hr, hr.flip(-2)], -2)[..., 128:384, 128:384]  # its own mirror image: borders are no matter
    inner = (..., slice(32, 96), slice(32, 96))
    scales = torch.tensor([scale], dtype=torch.float64)
    expected = halved(optics(hr, scales))
    found = optics(halved(hr), scales / 2, reduction=2.0)
    assert (found - expected)[inner].abs().max() < 2e-3
    assert (halved(hr) - expected)[inner].abs().max() > 0.02


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_at_hrs_own_scale_nothing_happens(fitted, dtype, tolerance):
    hr = torch.rand(2, 3, 33, 70, dtype=dtype, generator=torch.Generator().manual_seed(0)) * 2 - 1
    hr[0, :, :4] = -1
    hr[0, :, 4:8] = 1
    lr = fitted(hr, torch.ones(2))
    assert lr.dtype == dtype
    assert (lr - hr).abs().max() < tolerance
    reduced = fitted(hr, torch.full((2,), 0.5), reduction=2.0)
    assert (reduced - hr).abs().max() < tolerance


@pytest.mark.parametrize("size", [(8, 8), (8, 300), (41, 17), (130, 97)])
def test_skeleton_is_a_convolution_in_linear_light_mirrored_at_the_borders(size):
    rng = np.random.default_rng(0)
    hr, scale = rng.uniform(-1, 1, (3, *size)), 3.0
    variances = torch.tensor([[0.4], [0.5], [0.6]], dtype=torch.float64)
    value = (hr + 1) / 2
    light = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    for channel, variance in enumerate(variances.flatten().tolist()):
        sigma = math.sqrt(variance * (scale**2 - 1))
        taps = np.exp(-0.5 * (np.arange(-22, 23) / sigma) ** 2)
        for axis in (0, 1):
            light[channel] = convolve1d(light[channel], taps / taps.sum(), axis=axis, mode="reflect")
    expected = np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055) * 2 - 1
    optics = gaussian_optics(variance=variances)
    lr = optics(torch.from_numpy(hr)[None], torch.tensor([scale], dtype=torch.float64))
    assert lr.shape == (1, 3, *size)
    assert np.abs(lr[0].numpy() - expected).max() < 1e-6  # the tails of the sampled Gaussian's spectrum


def test_skeleton_keeps_colour_and_range():
    hr = torch.full((1, 3, 40, 50), 0.0)
    hr[:, 0], hr[:, 2] = 0.3, -0.9
    lr = gaussian_optics()(hr, torch.tensor([4.0]))
    assert (lr - hr).abs().max() < 1e-5
    sharp = gaussian_optics(variance=-0.02)
    edge = torch.where(torch.arange(64) < 32, -1.0, 1.0).expand(1, 3, 64, 64)
    lr = sharp(edge, torch.tensor([4.0]))
    assert lr.min() >= -1
    assert lr.max() <= 1


def test_an_image_does_not_depend_on_its_batch():
    hr = torch.rand(4, 3, 64, 75, generator=torch.Generator().manual_seed(0)) * 2 - 1
    scales, reductions = torch.tensor([1.0, 1.7, 2.9, 3.0]), torch.tensor([1.0, 1.2, 1.0, 4 / 3])
    optics = gaussian_optics().float()
    together = optics(hr, scales, reductions)
    for n in range(4):
        assert torch.equal(together[n : n + 1], optics(hr[n : n + 1], scales[n : n + 1], float(reductions[n])))


def test_large_images_whose_channels_are_done_in_turn_come_out_the_same(monkeypatch):
    hr = torch.rand(1, 3, 40, 50, generator=torch.Generator().manual_seed(0)) * 2 - 1
    optics = gaussian_optics(variance=torch.tensor([[0.2], [0.4], [0.6]])).float()
    together = optics(hr, torch.tensor([3.0]))
    monkeypatch.setattr("degflow.capture.optics._TOGETHER", 0)
    assert (optics(hr, torch.tensor([3.0])) - together).abs().max() < 1e-5


def test_half_precision_is_computed_in_single():
    hr = (torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1).half()
    optics = gaussian_optics()
    lr = optics(hr, torch.tensor([3.0]))
    assert lr.dtype == torch.float16
    assert (lr.float() - optics(hr.float(), torch.tensor([3.0]))).abs().max() < 1e-3


def test_tables_travel_with_the_state():
    optics, loaded = gaussian_optics(rings=20).float(), Optics((1.0, 2.0, 4.0), rings=20)
    assert list(optics.state_dict()) == ["log_transfer"]
    loaded.load_state_dict(optics.state_dict())
    hr = torch.rand(1, 3, 30, 30) * 2 - 1
    assert torch.allclose(loaded(hr, torch.tensor([3.0])), optics(hr, torch.tensor([3.0])), atol=1e-6)


@pytest.mark.parametrize("rings", [20, 300])
def test_a_gaussian_is_exact_between_rings_and_levels(rings):
    frequency = torch.linspace(0, CORNER, 501, dtype=torch.float64)
    found = gaussian_optics(rings).transfer(frequency, torch.tensor([1.0, 1.5, 3.3], dtype=torch.float64))
    for n, scale in enumerate((1.0, 1.5, 3.3)):
        assert (found[n] - lens(scale)(frequency)).abs().max() < 1e-6


def test_srgbs_curve_is_the_standards():
    value = torch.linspace(0, 1, 1001, dtype=torch.float64)
    assert float(to_linear(torch.tensor(0.5, dtype=torch.float64))) == pytest.approx(0.21404114, abs=1e-8)
    assert (to_srgb(to_linear(value)) - value).abs().max() < 1e-6  # the standard's branches meet to 1e-7


IMAGE, SCALE = torch.zeros(2, 3, 16, 16), torch.tensor([2.0, 3.0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o: Optics((1.0,)), r"scales=\(1.0,\): must be at least two"),
        (lambda o: Optics((1.0, 4.0, 2.0)), r"scales=\(1.0, 4.0, 2.0\): .* increasing"),
        (lambda o: Optics((0.0, 2.0)), r"scales=\(0.0, 2.0\): .* above 0"),
        (lambda o: Optics((1.0, math.nan)), r"scales=\(1.0, nan\)"),
        (lambda o: Optics((1.0, math.inf)), r"scales=\(1.0, inf\)"),
        (lambda o: Optics((1.0, 2.0), rings=1), "rings=1: must be at least 2"),
        (lambda o: o(IMAGE[0], SCALE), r"hr=torch.float32 \(3, 16, 16\): must be floating-point of shape"),
        (lambda o: o(IMAGE[:, :1], SCALE), r"hr=torch.float32 \(2, 1, 16, 16\)"),
        (lambda o: o(IMAGE[..., :7], SCALE), r"hr=.* H and W at least 8"),
        (lambda o: o(IMAGE.byte(), SCALE), r"hr=torch.uint8"),
        (lambda o: o(IMAGE, SCALE[:1]), r"scale: shape \(1,\): must be \(2,\)"),
        (lambda o: o(IMAGE, SCALE, torch.ones(3)), r"reduction: shape \(3,\): must be one number or \(2,\)"),
        (lambda o: o(IMAGE, torch.tensor([2.0, 4.1])), r"scale=4.1: must lie in \[1, 4\]"),
        (lambda o: o(IMAGE, torch.tensor([0.9, 2.0])), r"scale=0.9: must lie in \[1, 4\]"),
        (lambda o: o(IMAGE, torch.tensor([math.nan, 2.0])), r"scale=nan"),
        (lambda o: o(IMAGE, torch.tensor([0.4, 2.0]), 2.0), r"scale=0.4: must lie in \[0.5, 2\]"),
        (lambda o: o(IMAGE, torch.tensor([0.6, 2.1]), 2.0), r"scale=2.1: must lie in \[0.5, 2\]"),
        (lambda o: o(IMAGE, SCALE, 0.9), r"reduction=0.9: must be finite and at least 1"),
        (lambda o: o(IMAGE, SCALE, torch.tensor([1.0, math.inf])), r"reduction=\[1.0, inf\]"),
    ],
)
def test_bad_arguments_are_told(call, message):
    with pytest.raises(ValueError, match=message):
        call(Optics((1.0, 2.0, 4.0)))
