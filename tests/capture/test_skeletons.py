"""Scenes at several reductions, beside HR after the optics of each level."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from degflow import images
from degflow.capture.skeletons import reduced, stacks_of
from tests.captures import gaussian_optics, is_mapped

LEVELS = {"1": 1.0, "2": 2.0, "4": 4.0}
FACTORS = (1.0, 8 / 7, 1.6)


def photo(height, width, seed=0):
    """Smooth at the scale of some pixels, so that optics change it and reductions do not alias."""
    noise = np.random.default_rng(seed).integers(0, 256, (3, height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return np.stack([images.resize(level, height, width) for level in noise])


def scenes(sizes=((64, 80), (49, 90)), levels=LEVELS, cache="", crop=32):
    """As SceneImages, of photographs that are at hand."""
    config = SimpleNamespace(levels=levels, cache=str(cache), crop=crop)
    return SimpleNamespace(config=config, pixels=[photo(*size, seed) for seed, size in enumerate(sizes)])


def stacks(found=None, optics=None, factors=FACTORS):
    return stacks_of(found or scenes(), optics or gaussian_optics((1.0, 2.0, 4.0)), factors, quiet=True)


def test_a_scene_is_reduced_with_all_its_levels_and_with_antialiasing():
    pixels = photo(64, 80)
    assert reduced(pixels, 1) is pixels
    smaller = reduced(pixels, 1.6)
    assert (smaller.shape, smaller.dtype) == ((3, 40, 50, 3), np.uint8)
    for level in range(3):
        np.testing.assert_array_equal(smaller[level], images.resize(pixels[level], 40, 50))
    stripes = np.zeros((1, 64, 64, 3), np.uint8)
    stripes[:, :, ::2] = 255  # finer than the coarse grid can show
    assert np.ptp(reduced(stripes, 2.0)[0, 8:-8, 8:-8].astype(int)) <= 8


def test_a_stack_has_the_scene_the_divided_scales_and_hr_after_the_optics_of_each_level():
    found, optics = scenes(), gaussian_optics((1.0, 2.0, 4.0))
    made = stacks(found, optics)
    assert [stack.pixels.shape[1:3] for stack in made] == [(64, 80), (49, 90), (56, 70), (43, 79), (40, 50)]
    assert [stack.scales for stack in made] == [(2 / f, 4 / f) for f in (1, 1, 8 / 7, 8 / 7, 1.6)]
    for stack, (n, factor) in zip(made, [(0, 1), (1, 1), (0, 8 / 7), (1, 8 / 7), (0, 1.6)], strict=True):
        assert stack.pixels.shape[0] == 5
        assert stack.pixels.dtype == np.uint8
        np.testing.assert_array_equal(stack.pixels[:3], reduced(found.pixels[n], factor))
        hr = images.to_tensor(stack.pixels[:1])
        for level, scale in enumerate(stack.scales):
            after = optics(hr, torch.tensor([scale], dtype=torch.float64), factor)
            np.testing.assert_array_equal(stack.pixels[3 + level], images.to_pixels(after)[0])


def test_reduced_hr_is_sharper_and_loses_more_to_the_same_scale():
    optics = gaussian_optics((1.0, 2.0, 4.0))
    plain, smaller = (stacks(scenes(((96, 96),)), optics, (factor,))[0] for factor in (1.0, 1.25))
    assert plain.scales[0] > smaller.scales[0] > 1
    hr = images.to_tensor(smaller.pixels[:1])
    as_captured = images.to_pixels(optics(hr, torch.tensor([1.6], dtype=torch.float64)))[0]
    losses = [
        float(np.square(after.astype(float) - smaller.pixels[0]).mean()) for after in (smaller.pixels[3], as_captured)
    ]
    assert losses[0] > 1.05 * losses[1]


def test_a_retouched_copy_changes_each_lr_image_by_what_its_optics_let_through(tmp_path):
    optics = gaussian_optics((1.0, 2.0, 4.0))
    made = stacks_of(scenes(), optics, FACTORS, quiet=True, retouch=True)
    assert [stack.retouched for stack in made] == [False, True] * 5
    for plain, whole in zip(stacks(), made[::2], strict=True):
        np.testing.assert_array_equal(plain.pixels, whole.pixels)
    for factor, (whole, copy) in zip([1, 1, 8 / 7, 8 / 7, 1.6], zip(made[::2], made[1::2], strict=True), strict=True):
        assert copy.scales == whole.scales
        assert np.abs(copy.pixels[0].astype(int) - whole.pixels[0]).std() > 0.5
        before, after = (images.to_tensor(stack.pixels[:1]) for stack in (whole, copy))
        for k, scale in enumerate(whole.scales):
            at = torch.tensor([scale], dtype=torch.float64)
            skeleton = optics(after, at, factor)
            np.testing.assert_array_equal(copy.pixels[3 + k], images.to_pixels(skeleton)[0])
            change = (skeleton - optics(before, at, factor))[0].permute(1, 2, 0).numpy() * 127.5
            wanted = np.clip(whole.pixels[1 + k] + change, 0, 255)
            assert np.abs(copy.pixels[1 + k] - wanted).max() < 0.501
    cached = [
        stacks_of(scenes(cache=tmp_path), optics, FACTORS, quiet=True, share=share, retouch=True)
        for share in ((0, 2), (1, 2))
    ]
    for one, *others in zip(made, *cached, strict=True):
        for other in others:
            assert is_mapped(other.pixels)
            np.testing.assert_array_equal(one.pixels, other.pixels)


def test_scenes_that_a_reduction_makes_smaller_than_the_crop_are_left_out():
    found = scenes(((64, 64), (33, 64)), crop=32)
    assert [len(stacks(found, factors=(factor,))) for factor in (1.0, 1.03, 1.04, 1.9)] == [2, 2, 1, 1]
    assert all(min(stack.pixels.shape[1:3]) >= 32 for stack in stacks(found, factors=(1.0, 1.03, 1.6, 1.9)))


@pytest.mark.parametrize(
    ("factor", "levels", "said"),
    [
        (2.01, LEVELS, r"reduced by 2.01, no scene is left that is at least scenes.crop=32 pixels"),
        (2.0, {"1": 1.0, "2": 2.0, "4": 4.0}, r"and has all levels above scale 1"),
        (1.8, {"1": 1.2, "2": 2.1, "4": 3.75}, r"and has all levels above scale 1.2"),
    ],
)
def test_a_factor_that_leaves_nothing_is_named(factor, levels, said):
    optics = gaussian_optics(tuple(levels.values()))
    with pytest.raises(ValueError, match=rf"scenes.reductions=\[1.0, {factor}\]: .*{said}"):
        stacks(scenes(((64, 64),), levels), optics, (1.0, factor))


def test_a_cache_gives_the_same_and_is_shared(tmp_path):
    plain, cached = stacks(), stacks(scenes(cache=tmp_path))
    assert all(is_mapped(stack.pixels) for stack in cached)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(before) == len(plain) == 5
    again = stacks_of(scenes(cache=tmp_path), gaussian_optics((1.0, 2.0, 4.0)), FACTORS, quiet=True, share=(1, 2))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    for stack, *others in zip(plain, cached, again, strict=True):
        for other in others:
            assert other.scales == stack.scales
            np.testing.assert_array_equal(other.pixels, stack.pixels)


def test_a_cache_tells_other_pixels_and_other_optics_apart(tmp_path):
    nominal, wider = (gaussian_optics((1.0, 2.0, 4.0), sigma) for sigma in (0.4, 0.6))
    others = scenes(((64, 80), (49, 91)), cache=tmp_path)
    calls = [
        (scenes(cache=tmp_path), nominal),
        (scenes(cache=tmp_path), wider),
        (others, nominal),
    ]
    for found, optics in calls:
        cached = stacks(found, optics)
        without = SimpleNamespace(config=SimpleNamespace(**{**vars(found.config), "cache": ""}), pixels=found.pixels)
        for one, other in zip(cached, stacks(without, optics), strict=True):
            np.testing.assert_array_equal(one.pixels, other.pixels)


def test_a_cache_file_is_never_half_written_under_its_final_name(tmp_path, monkeypatch):
    save = np.save

    def full(path, pixels):
        with open(path, "wb") as file:
            save(file, pixels)
            file.truncate(200)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(OSError, match="No space"):
            stacks(scenes(cache=tmp_path))
    assert list(tmp_path.iterdir()) == []
    assert len(stacks(scenes(cache=tmp_path))) == 5
