"""Crops that are degraded in loader workers: they are parts of the degraded photograph."""

import copy
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, DistributedSampler

from degflow import DegradedCrops, Degrader, RandomDegradation, images
from tests import ROOT
from tests.captures import small_degrader

pytestmark = pytest.mark.usefixtures("one_thread")

LEVELS = {"1": 1.0, "2": 2.0, "4": 4.0}
PHOTOGRAPHS = ROOT / "examples/photographs"


@pytest.fixture(scope="module")
def degrader():
    return small_degrader(LEVELS, draws=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three photographs, of 150 x 201, 90 x 64 and 20 x 30 pixels."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "deep").mkdir()
    china = Image.open(PHOTOGRAPHS / "china.jpg")
    china.crop((100, 100, 301, 250)).save(folder / "a#b.png")
    china.crop((200, 200, 264, 290)).save(folder / "deep/b.PNG")
    china.crop((200, 200, 230, 220)).save(folder / "small.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def read(file):
    return images.to_tensor(np.asarray(Image.open(file)))[None]


def test_an_element_is_a_part_of_the_degraded_photograph(degrader, folder):
    crops = DegradedCrops(folder, 24, model=degrader, per_photograph=6, margin=48)
    assert len(crops) == 18
    places = set()
    for sample in [crops[n] for n in range(12)]:
        hr = read(folder / sample["key"])
        scale, seed = torch.tensor([sample["scale"]], dtype=torch.float64), torch.tensor([sample["seed"]])
        top, left = sample["place"].tolist()
        at = (..., slice(top, top + 24), slice(left, left + 24))
        torch.testing.assert_close(sample["hr"], hr[at][0], rtol=0, atol=1e-6)
        wanted = images.to_pixels(degrader(hr, scale, seed=seed)[at][0]).astype(int)
        assert np.abs(images.to_pixels(sample["lr"]) - wanted).max() <= 1
        assert (images.to_pixels(sample["lr"]) != wanted).mean() < 5e-3  # a value at the edge between two levels
        places.add((sample["key"], top, left, sample["scale"]))
    assert len(places) == 12
    assert {key for key, *_ in places} == {"a#b.png", "deep/b.PNG"}


def part(degrader, hr, margin, top, left, crop=32):
    """A crop of an image degraded with a margin; and the same part of the whole degraded image."""
    scale, seed = torch.tensor([3.0]), torch.tensor([9])
    first = [(start - margin) // degrader.multiple * degrader.multiple for start in (top, left)]
    window = hr[..., first[0] : top + crop + margin, first[1] : left + crop + margin]
    lr = degrader(window, scale, seed=seed, place=torch.tensor([first]))
    down, right = top - first[0], left - first[1]
    whole = degrader(hr, scale, seed=seed)
    return lr[..., down : down + crop, right : right + crop], whole[..., top : top + crop, left : left + crop]


def test_a_margin_of_the_receptive_field_leaves_rounding_alone(degrader):
    hr = read(PHOTOGRAPHS / "china.jpg")[..., 100:300, 100:300]
    for margin, least, most in ((48, 0.0, 1e-5), (2, 1e-2, 2.0)):
        lr, wanted = part(degrader, hr, margin, 83, 74)
        assert least <= float((lr - wanted).abs().max()) <= most


def test_the_margin_of_the_degrader_that_ships_leaves_less_than_eight_bits_show():
    hr, degrader = read(PHOTOGRAPHS / "china.jpg")[..., 100:320, 100:320], Degrader.load()
    for margin, most, mean in ((32, 2.0, 0.15), (0, 255, 255)):
        lr, wanted = part(degrader, hr, margin, 96, 88, 64)
        levels = (lr - wanted).abs() * 127.5
        assert float(levels.max()) < most
        assert float(levels.square().mean().sqrt()) < mean
    assert float(levels.max()) > 10  # without a margin


def test_a_training_loop_s_crops_with_a_margin_are_parts_of_the_photograph_s_mean(degrader):
    hr = read(PHOTOGRAPHS / "china.jpg")[..., 100:300, 100:300]
    degrade = RandomDegradation(degrader, spread=0.0, margin=48, rounded=False)
    lr, scale = degrade(hr[..., 20:148, 40:168])  # 20 and 40 are multiples of the latent's pixel
    wanted = degrader(hr, scale, spread=0.0)[..., 68:100, 88:120]
    torch.testing.assert_close(lr, wanted, rtol=0, atol=1e-5)


def test_crops_at_a_photograph_s_edge_and_small_photographs_are_whole(degrader, folder):
    crops = DegradedCrops([folder / "small.png"], 40, model=degrader)
    sample = crops[0]
    hr, seed = read(folder / "small.png"), torch.tensor([sample["seed"]])
    whole = images.to_pixels(degrader(hr, torch.tensor([sample["scale"]], dtype=torch.float64), seed=seed)[0])
    wanted = np.pad(whole, ((0, 20), (0, 10), (0, 0)), mode="symmetric")
    assert np.array_equal(images.to_pixels(sample["lr"]), wanted)
    assert sample["hr"].shape == (3, 40, 40)
    assert sample["key"] == str(folder / "small.png")


def test_images_in_0_1_are_the_same_images(degrader, folder):
    wide, unit = (DegradedCrops(folder, 16, model=degrader, value_range=kind)[0] for kind in ((-1, 1), (0, 1)))
    for name in ("lr", "hr"):
        torch.testing.assert_close(unit[name], (wide[name] + 1) / 2, rtol=0, atol=1e-6)
        assert float(unit[name].min()) >= 0


def test_lr_and_hr_are_mirrored_and_turned_alike(degrader, folder):
    plain = DegradedCrops(folder, 16, model=degrader, per_photograph=24)
    moved = DegradedCrops(folder, 16, model=degrader, per_photograph=24, flips=True, rotations=True)
    seen = set()
    for n in range(24):
        before, after = plain[n], moved[n]
        ways = [
            (turns, flip)
            for turns in range(4)
            for flip in (False, True)
            if all(torch.equal(oriented(before[name], turns, flip), after[name]) for name in ("lr", "hr"))
        ]
        assert len(ways) == 1
        seen.update(ways)
    assert len(seen) == 8


def oriented(image, turns, flip):
    turned = torch.rot90(image, turns, (1, 2))
    return turned.flip(2) if flip else turned


def samples_of(batches):
    """(key, scale) -> LR of all elements."""
    return {
        (key, float(scale)): lr
        for batch in batches
        for key, scale, lr in zip(batch["key"], batch["scale"], batch["lr"], strict=True)
    }


def test_workers_give_different_crops_and_the_same_in_every_run(degrader, folder):
    def run(workers, context=None):
        crops = DegradedCrops(folder, 16, model=degrader, per_photograph=4)
        return samples_of(DataLoader(crops, 2, num_workers=workers, multiprocessing_context=context))

    alone, once, again = run(0), run(2, "fork"), run(2, "fork")
    assert len(alone) == 12
    assert len({lr.numpy().tobytes() for lr in alone.values()}) == 12
    assert alone.keys() == once.keys() == again.keys()
    assert all(torch.equal(alone[name], once[name]) and torch.equal(once[name], again[name]) for name in alone)


@pytest.mark.parametrize("way", [lambda crops: crops, copy.deepcopy, lambda crops: pickle.loads(pickle.dumps(crops))])
def test_an_epoch_reaches_running_workers(degrader, folder, way):
    crops = way(DegradedCrops(folder, 16, model=degrader, per_photograph=2))
    loader = DataLoader(crops, 3, num_workers=1, persistent_workers=True, multiprocessing_context="fork")
    first = samples_of(loader)
    crops.set_epoch(1)
    second = samples_of(loader)
    crops.set_epoch(0)
    assert not first.keys() & second.keys()
    assert samples_of(loader).keys() == first.keys()


def test_ranks_share_an_epoch(degrader, folder):
    crops = DegradedCrops(folder, 16, model=degrader, per_photograph=4)
    found = [samples_of(DataLoader(crops, 2, sampler=DistributedSampler(crops, 2, rank))) for rank in (0, 1)]
    assert [len(part) for part in found] == [6, 6]
    assert not found[0].keys() & found[1].keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"photographs": []}, r"photographs=\[\]: no file ending in .png"),
        ({"crop": 7}, r"crop=7: must be at least 8"),
        ({"per_photograph": 0}, r"per_photograph=0: must be at least 1"),
        ({"margin": -1}, r"margin=-1: must not be negative"),
        ({"scale": [9.0]}, r"scale=9.0: must lie in the trained range"),
    ],
)
def test_arguments_that_break_a_rule_are_named(degrader, folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        DegradedCrops(**{"photographs": folder, "model": degrader, **arguments})


def test_a_result_that_is_not_finite_is_no_crop(degrader, folder):
    broken = copy.deepcopy(degrader)
    with torch.no_grad():
        broken.autoencoder.decoder.head.bias[0] = torch.nan
    with pytest.raises(ValueError, match="the LR image is not finite"):
        DegradedCrops(folder, 32, model=broken)[0]


def test_bad_files_and_indices_are_named(degrader, folder, tmp_path):
    with pytest.raises(ValueError, match=r"no file ending in \.png"):
        DegradedCrops(tmp_path, model=degrader)
    (tmp_path / "page.png").write_text("<html>")
    crops = DegradedCrops(tmp_path, model=degrader)
    with pytest.raises(ValueError, match=r"page.png: not a JPEG, PNG"):
        crops[0]
    with pytest.raises(IndexError):
        crops[1]
    with pytest.raises(FileNotFoundError, match=r"gone.png"):
        DegradedCrops([tmp_path / "gone.png"], model=degrader)[0]
