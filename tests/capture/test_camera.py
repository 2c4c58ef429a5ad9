import dataclasses

import numpy as np
import pytest

from degflow.capture.camera import CAMERAS, SimulatedCamera

SCALES = (1.0, 1.3, 1.532, 2.0, 2.7, 3.361, 4.0)
names = pytest.mark.parametrize("name", sorted(CAMERAS))


LINEAR = ((np.arange(256) / 255 + 0.055) / 1.055) ** 2.4


def noiseless(name, **changes):
    changes = {"white_electrons": 1e12, "read_noise": 0.0, "jpeg_quality": 100} | changes
    return dataclasses.replace(SimulatedCamera.named(name), **changes)


class Unfinished(SimulatedCamera):
    def _compress(self, rgb):
        return rgb


def flat(value, height=96, width=131):
    return np.full((height, width, 3), value, np.uint8)


def blob(centre, height=161, width=203, sigma=9.0):
    row, column = np.ogrid[:height, :width]
    value = 40 + 170 * np.exp(-((row - centre[0]) ** 2 + (column - centre[1]) ** 2) / (2 * sigma**2))
    return np.repeat(np.rint(value).astype(np.uint8)[..., None], 3, axis=-1)


def centroid(plane):
    weight = np.maximum(plane.astype(float) - np.median(plane) - 4, 0)
    row, column = np.indices(plane.shape)
    return np.array([(weight * row).sum(), (weight * column).sum()]) / weight.sum()


def shift(image, reference):
    """The displacement in pixels that best explains image - reference to first order.

    In linear light, where a lens blurs evenly to all sides: in sRGB, bright areas grow at the cost of dark ones.
    """
    image, reference = LINEAR[image], LINEAR[reference]
    gradients = np.stack([g[8:-8, 8:-8].ravel() for g in np.gradient(image)], axis=1)
    return -np.linalg.lstsq(gradients, (image - reference)[8:-8, 8:-8].ravel(), rcond=None)[0]


def psnr(image, reference):
    error = (image.astype(float) - reference)[4:-4, 4:-4]
    return 10 * np.log10(255**2 / (error**2).mean())


@pytest.fixture(scope="module")
def photo():
    return pytest.importorskip("skimage.data").astronaut()[:251, 90:350]


@names
@pytest.mark.parametrize("shape", [(8, 8), (8, 61), (64, 64), (97, 131)])
@pytest.mark.parametrize("scale", [1, 1.532, 3, 8.0])
def test_a_capture_has_the_size_and_type_of_the_photograph(name, shape, scale):
    photo = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    capture = SimulatedCamera.named(name).capture(photo, scale)
    assert capture.shape == photo.shape
    assert capture.dtype == np.uint8


@names
@pytest.mark.parametrize("scale", SCALES)
def test_green_stays_in_place_at_every_scale(name, scale):
    for centre in [(80, 101), (66.3, 94.8), (50.6, 140.1)]:
        photo = blob(centre)
        capture = noiseless(name).capture(photo, scale)
        nearest = 0.06 if name == "soft" else 0.05  # of a wide blur, 8 bits round more away
        np.testing.assert_allclose(centroid(capture[..., 1]), centroid(photo[..., 1]), atol=nearest)


@names
@pytest.mark.parametrize("scale", SCALES[1:])
def test_captures_of_a_photograph_are_registered(name, scale, photo):
    """What the content feigns changes its sign with a mirror; a misplaced grid does not."""
    camera = SimulatedCamera.named(name)
    mirrored = (photo[::row, ::column] for row in (1, -1) for column in (1, -1))
    offsets = [shift(*(camera.capture(p, s)[..., 1] for s in (scale, 1.0))) for p in mirrored]
    np.testing.assert_allclose(np.mean(offsets, axis=0), 0, atol=0.05)


@names
@pytest.mark.parametrize("scale", [1.0, 2.0, 3.361])
def test_red_and_blue_are_displaced_from_the_centre_in_proportion(name, scale):
    camera = noiseless(name, red_shift=1.0, blue_shift=-0.8, jpeg_subsampling="4:4:4")
    capture = camera.capture(blob((40, 150)), scale)
    outwards = (np.array([40, 150]) - [80, 101]) / np.hypot(161 / 2, 203 / 2)
    for channel, corner in ((0, camera.red_shift), (2, camera.blue_shift)):
        displaced = centroid(capture[..., channel]) - centroid(capture[..., 1])
        np.testing.assert_allclose(displaced, corner * scale * outwards, atol=0.03 + 0.03 * scale)


@names
def test_fidelity_falls_monotonically_with_scale(name, photo):
    camera = SimulatedCamera.named(name)
    hr = camera.capture(photo, 1.0)
    fidelity = [psnr(camera.capture(photo, scale), hr) for scale in [*np.linspace(1.125, 4, 24), 5, 6, 7, 8]]
    assert np.all(np.diff(fidelity) < 0)


@pytest.mark.parametrize("name", ["canon", "nikon"])
def test_fidelity_is_that_of_realsr(name, photo):
    camera = SimulatedCamera.named(name)
    hr = camera.capture(photo, 1.0)
    assert psnr(hr, photo) > 29
    for scale, low, high in [(1.5, 29, 34), (2, 27, 31), (3, 24, 28), (4, 22, 27)]:
        assert low < psnr(camera.capture(photo, scale), hr) < high


def test_a_soft_lens_blurs_more(photo):
    soft, nikon = (noiseless(name) for name in ("soft", "nikon"))
    for scale in (1.0, 2.0, 4.0):
        sharpness = [
            np.abs(np.diff(camera.capture(photo, scale).astype(float), axis=1)).mean() for camera in (soft, nikon)
        ]
        assert sharpness[0] < 0.8 * sharpness[1]


@names
@pytest.mark.parametrize("scale", [1.3, 2.0, 3.361])
def test_degradation_is_smooth_in_scale(name, scale, photo):
    camera = noiseless(name)
    here, near, far = (camera.capture(photo, s).astype(float) for s in (scale, scale - 1e-6, scale + 0.1))
    assert np.abs(near - here).mean() < 0.1 < 1 < np.abs(far - here).mean()


@names
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("value", [0, 30, 128, 200, 255])
def test_a_flat_gray_stays_flat_and_gray_up_to_the_border(name, scale, value):
    capture = noiseless(name).capture(flat(value), scale)
    assert np.ptp(capture.astype(int)) <= 1
    assert abs(capture.mean() - value) < 6


@names
def test_black_white_and_mid_gray_are_fixed_points_of_the_tone_curve(name):
    for value in (0, 128, 255):
        assert np.abs(noiseless(name).capture(flat(value), 2.5).astype(int) - value).max() <= 1


@names
def test_a_capture_is_a_function_of_its_arguments(name, photo):
    camera = SimulatedCamera.named(name)
    capture = camera.capture(photo, 1.7, seed=3)
    np.testing.assert_array_equal(camera.capture(photo.copy(), np.float64(1.7), seed=3), capture)
    np.testing.assert_array_equal(camera.capture(np.asfortranarray(photo), 1.7, seed=3), capture)
    assert not np.array_equal(camera.capture(photo, 1.7, seed=4), capture)


@names
def test_every_exposure_has_its_own_noise(name):
    camera = SimulatedCamera.named(name)

    def noise(photo, scale=2.0, seed=0):
        capture = camera.capture(photo, scale, seed)[..., 1].astype(float)
        return capture.ravel() - capture.mean()

    first = noise(flat(128))
    for other in (noise(flat(128), seed=1), noise(flat(128), scale=2.0 + 1e-9), noise(flat(129))):
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.1


def test_the_bodies_differ_in_every_parameter_and_in_their_pictures(photo):
    canon, nikon = SimulatedCamera.named("canon"), SimulatedCamera.named("nikon")
    for field in dataclasses.fields(SimulatedCamera):
        assert getattr(canon, field.name) != getattr(nikon, field.name), field.name
    for scale in (1.0, 2.0, 4.0):
        assert np.abs(canon.capture(photo, scale).astype(float) - nikon.capture(photo, scale)).mean() > 1


@names
@pytest.mark.parametrize("value", [64, 128, 190])
def test_noise_is_that_of_the_photosites(name, value):
    """At s = 1 a photosite's own channel passes the linear demosaicing unchanged; finishing is switched off."""
    camera = Unfinished(**dataclasses.asdict(SimulatedCamera.named(name)) | {"contrast": 0.0, "sharpen_amount": 0.0})
    capture = camera.capture(flat(value, 256, 256), 1.0).astype(float)
    light = LINEAR[value]
    slope = 255 * 1.055 / 2.4 * light ** (1 / 2.4 - 1)
    for channel, row, column, gain in ((0, 0, 0, camera.red_gain), (1, 0, 1, 1.0), (2, 1, 1, camera.blue_gain)):
        signal = light / gain
        variance = signal / camera.white_electrons + (camera.read_noise / camera.white_electrons) ** 2
        site = capture[row::2, column::2, channel]
        assert site.std() == pytest.approx(np.sqrt((gain * slope) ** 2 * variance + 1 / 12), rel=0.03)
        assert site.mean() == pytest.approx(value, abs=0.1)
        assert 0.4 < site.std() < 1.5  # levels of 8 bits: base ISO


def test_an_unknown_camera_is_named():
    with pytest.raises(ValueError, match=r"camera='sony': must be one of 'canon', 'nikon', 'soft'"):
        SimulatedCamera.named("sony")


@pytest.mark.parametrize("scale", [0.999, 8.001, -1.0, float("nan"), float("inf")])
def test_a_scale_out_of_range_is_named(scale):
    with pytest.raises(ValueError, match=rf"scale={scale}: must be in \[1, 8\]"):
        SimulatedCamera.named("canon").capture(flat(9), scale)


@pytest.mark.parametrize(
    ("photo", "said"),
    [
        (np.zeros((32, 32, 3), np.float32), r"photo=float32 \(32, 32, 3\)"),
        (np.zeros((32, 32), np.uint8), r"photo=uint8 \(32, 32\)"),
        (np.zeros((32, 32, 4), np.uint8), r"photo=uint8 \(32, 32, 4\)"),
        (np.zeros((7, 32, 3), np.uint8), r"photo=uint8 \(7, 32, 3\)"),
    ],
)
def test_an_unfit_photograph_is_named(photo, said):
    with pytest.raises(ValueError, match=said + r": must be uint8 of shape \(H, W, 3\) with H and W at least 8"):
        SimulatedCamera.named("canon").capture(photo, 2.0)


def test_a_negative_seed_is_named():
    with pytest.raises(ValueError, match="seed=-1: must not be negative"):
        SimulatedCamera.named("canon").capture(flat(9), 2.0, seed=-1)
