"""Latents that are encoded once: those of whole images in four flips, and samples that train as crops of images do."""

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from degflow import images
from degflow.capture.scenes import ResidualCrops
from degflow.capture.skeletons import Stack
from degflow.models import AutoencoderConfig, ResidualAutoencoder
from degflow.models.residual import lost_detail
from degflow.objectives import LatentObjective, ResidualObjective
from degflow.training import latents
from degflow.training.latents import FLIPS, LatentCrops, latents_of
from tests.captures import is_mapped, residual_flow

pytestmark = pytest.mark.usefixtures("one_thread")
TIMES = (1 / 3, 1.0)


def network(seed=0):
    torch.manual_seed(seed)
    return ResidualAutoencoder(AutoencoderConfig(base_width=4, multipliers=(1, 2, 2), blocks=1, gate_init=0.5)).eval()


def stack(height=22, width=35, seed=0):
    """Of HR, two LR levels, and HR after the optics of each."""
    pixels = np.random.default_rng(seed).integers(0, 256, (5, height, width, 3), dtype=np.uint8)
    return Stack(pixels, (2.0, 4.0))


def flipped(pixels, upside_down, mirrored):
    return np.ascontiguousarray(np.flip(pixels, [axis for axis, flip in ((1, upside_down), (2, mirrored)) if flip]))


@pytest.mark.parametrize(("window", "tiles"), [(latents.WINDOW, 1), (420, 24)], ids=["whole", "in tiles"])
def test_every_image_is_encoded_whole_in_four_flips(window, tiles, monkeypatch):
    monkeypatch.setattr(latents, "WINDOW", window)
    encoder, scene = network(), stack(4 * 40 + 2, 4 * 70 + 3)
    windows = []
    handle = encoder.encoder.register_forward_hook(lambda _, given, made: windows.append(made[0].shape[2:].numel()))
    (found,) = latents_of(encoder, [scene], quiet=True)
    handle.remove()
    assert max(windows) <= window
    assert len(windows) == tiles * 4 * 5
    assert found.shape == (4 * 5, 40, 70, 5)
    assert found.dtype == np.float32
    for quarter, flip in zip(np.split(found, 4), FLIPS, strict=True):
        image = images.to_tensor(flipped(scene.pixels, *flip)[:, :160, :280])
        with torch.no_grad():
            expected = torch.stack([encoder.encode(each[None])[0][0] for each in image])
        made = torch.from_numpy(quarter).permute(0, 3, 1, 2)
        torch.testing.assert_close(made[:, :-1], expected, rtol=1e-4, atol=1e-4)
        gain = lost_detail(image[:1].expand(2, -1, -1, -1), image[3:], 4)
        torch.testing.assert_close(made[3:, -1:], gain)
        assert not made[:3, -1].any()


def test_a_crop_of_a_whole_scene_trains_as_its_pixels_do():
    scene, encoder = stack(32, 32), network()
    pixels = ResidualCrops([scene.pixels], [TIMES], 32, seed=3)
    cached = LatentCrops(latents_of(encoder, [scene], quiet=True), [TIMES], 8, seed=3)
    flow = residual_flow({"1": 1.0, "2": 2.0, "4": 4.0}, 4)
    objectives = ResidualObjective(encoder, flow, seed=1), LatentObjective(encoder, flow, seed=1)
    seen = set()
    for n in range(6):
        batches = [default_collate([samples[4 * n + k] for k in range(4)]) for samples in (pixels, cached)]
        assert all(torch.equal(batches[0][name], batches[1][name]) for name in ("time", "tau", "number"))
        losses = [objective(**batch).total for objective, batch in zip(objectives, batches, strict=True)]
        torch.testing.assert_close(*losses, rtol=1e-4, atol=0)
        seen.add(float(losses[0].detach()))
    assert len(seen) == 6


def marked(scene, height=10, width=12):
    """Latents that say their row, their column, and which image of which flip and scene they are."""
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    marks = [np.full((height, width), 100 * scene + n) for n in range(4 * 5)]
    return np.stack([np.stack((rows, columns, mark), -1) for mark in marks]).astype(np.float32)


def test_a_sample_is_cut_at_one_place_of_one_flip_and_every_place_and_flip_is_reached():
    crops = LatentCrops([marked(scene) for scene in range(2)], [TIMES, TIMES], 8, seed=0)
    places, flips, levels = set(), set(), set()
    for n in range(400):
        sample = crops[n]
        assert sample.keys() == {"hr", "lr", "skeleton", "time", "tau", "number"}
        hr, lr, skeleton = (sample[name] for name in ("hr", "lr", "skeleton"))
        assert hr.shape == (3, 8, 8)
        assert torch.equal(hr[:2], lr[:2])
        assert torch.equal(hr[:2], skeleton[:2])
        top, left = hr[:2, 0, 0].int().tolist()
        assert torch.equal(hr[0, :, 0], torch.arange(top, top + 8.0))
        assert torch.equal(hr[1, 0], torch.arange(left, left + 8.0))
        scene, image = divmod(int(hr[2, 0, 0]), 100)
        level = int(lr[2, 0, 0]) - int(hr[2, 0, 0])
        assert image % 5 == 0
        assert int(skeleton[2, 0, 0]) == int(lr[2, 0, 0]) + 2
        assert float(sample["time"]) == TIMES[level - 1]
        places.add((top, left))
        flips.add((scene, image // 5))
        levels.add(level)
    assert places == {(top, left) for top in range(3) for left in range(5)}
    assert flips == {(scene, flip) for scene in range(2) for flip in range(4)}
    assert levels == {1, 2}


def test_a_cache_is_filled_once_by_all_processes_and_belongs_to_one_encoder(tmp_path):
    scenes = [stack(seed=seed) for seed in range(3)]
    plain = latents_of(network(), scenes, quiet=True)
    cached = latents_of(network(), scenes, str(tmp_path), quiet=True, share=(1, 2))
    assert all(is_mapped(each) for each in cached)
    assert all(np.array_equal(*pair) for pair in zip(plain, cached, strict=True))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(before) == 3
    latents_of(network(), scenes, str(tmp_path), quiet=True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    latents_of(network(seed=1), scenes[:1], str(tmp_path), quiet=True)
    assert len(list(tmp_path.iterdir())) == 4
