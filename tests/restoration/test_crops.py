"""Where training pairs come from, and what is cut from them."""

import numpy as np
import pytest
import torch
from PIL import Image

from degflow import images
from degflow.dataset.reader import FinishedDataset
from degflow.restoration import Pair, PairCrops, find_pairs
from tests.captures import is_mapped
from tests.finished import finish, save_coordinates
from tests.sources import save_model

LEVELS = {"2": 2.0, "4": 4.0}


def coordinates(height, width, mark):
    """Pixels that say where they are, four times finer than the eye needs."""
    row, column = np.indices((height, width))
    return np.stack([row, column, np.full_like(row, mark)], -1).astype(np.uint8)


def pair(mark, scale=2.0, size=(60, 70)):
    return Pair(f"p{mark}", scale, coordinates(*size, 100 + mark), coordinates(*size, mark))


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tree")
    for label in LEVELS:
        (folder / label).mkdir()
        for n in range(3):
            Image.fromarray(coordinates(40, 48, n)).save(folder / f"{label}/Canon_{n:03d}_HR.png")
            lr = coordinates(40, 48, 10 * int(label) + n)
            Image.fromarray(lr).save(folder / f"{label}/Canon_{n:03d}_LR{label}.png")
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Two photographs, three draws each."""
    folder = tmp_path_factory.mktemp("generated")
    words = ("scale.low=2", "scale.high=4", "scale.per_image=3")
    return finish(save_coordinates(folder / "photos", 2), folder / "out", save_model(folder / "m"), *words)


def test_a_tree_gives_its_levels(tree):
    pairs = find_pairs(str(tree), LEVELS, 32, quiet=True)
    assert [(p.name, p.scale) for p in pairs] == [(f"Canon_{n:03d} x{x}", float(x)) for n in range(3) for x in LEVELS]
    for n, p in enumerate(pairs):
        assert p.hr[5, 7].tolist() == [5, 7, n // 2]
        assert p.lr[5, 7].tolist() == [5, 7, 10 * int(p.scale) + n // 2]
    assert [p.scale for p in find_pairs(str(tree), {"4": 3.75}, 32, quiet=True)] == [3.75] * 3


def test_a_dataset_gives_every_row_and_holds_each_hr_image_once(dataset):
    source, pairs = FinishedDataset(dataset), find_pairs(dataset, LEVELS, 16, quiet=True)
    rows = [row for part in source.parts for _, row in source.rows(part)]
    assert len(pairs) == 6
    for row, p in zip(rows, pairs, strict=True):
        assert p.scale == row["scale"]
        assert 2 <= p.scale <= 4
        np.testing.assert_array_equal(p.lr, source.lr_of(row))
        np.testing.assert_array_equal(p.hr, source.hr_of(row))
    assert len({id(p.hr) for p in pairs}) == 2


def test_a_cache_holds_the_same_pixels_in_files(dataset, tmp_path):
    plain = find_pairs(dataset, LEVELS, 16, quiet=True)
    for _ in range(2):
        cached = find_pairs(dataset, LEVELS, 16, quiet=True, cache=str(tmp_path / "cache"), memory=1e-9)
        assert all(is_mapped(p.lr) for p in cached)
        for a, b in zip(plain, cached, strict=True):
            np.testing.assert_array_equal(a.lr, b.lr)
            np.testing.assert_array_equal(a.hr, b.hr)
    images_of = {pixels.tobytes() for p in plain for pixels in (p.lr, p.hr)}
    assert len(list((tmp_path / "cache").iterdir())) == len(images_of) > 2


def test_what_does_not_suit_is_named(tree, dataset, tmp_path):
    with pytest.raises(ValueError, match=r"memory=1e-05: the decoded images of .*out need more GB"):
        find_pairs(dataset, LEVELS, 16, quiet=True, memory=1e-5)
    with pytest.raises(ValueError, match=r"out: 000.png, draw 0: 32 x 24 pixels, smaller than crop=32"):
        find_pairs(dataset, LEVELS, 32, quiet=True)
    with pytest.raises(ValueError, match=r"2/Canon_000_HR.png: 48 x 40 pixels, smaller than crop=64"):
        find_pairs(str(tree), LEVELS, 64, quiet=True)
    with pytest.raises(ValueError, match=r"no scene has every level of \['1', '2', '3'\].*expected 2/ID_HR.png"):
        find_pairs(str(tree), {"2": 2.0, "3": 3.0}, 32, quiet=True)
    with pytest.raises(
        ValueError, match=r"levels=.*: must name at least one level of LR images, and not 1, which is HR"
    ):
        find_pairs(str(tree), {"1": 1.0, "2": 2.0}, 32, quiet=True)
    photos, model = save_coordinates(tmp_path / "photos", 1), save_model(tmp_path / "m")
    scaled = finish(photos, tmp_path / "scaled", model, "size=scaled", "scale.low=2", "scale.high=2")
    with pytest.raises(ValueError, match=r"000.png, draw 0: 16 x 12 pixels, its HR image 32 x 24.*resize_lr=true"):
        find_pairs(scaled, LEVELS, 16, quiet=True)
    (resized,) = find_pairs(scaled, LEVELS, 16, quiet=True, resize_lr=True)
    source = FinishedDataset(scaled)
    small = next(source.lr_of(row) for _, row in source.rows(source.parts[0]))
    np.testing.assert_array_equal(resized.lr, images.resize(small, 24, 32))


def test_smaller_lr_images_of_a_tree_are_brought_to_hrs_grid_only_when_asked(tree, tmp_path):
    for file in tree.glob("4/*_HR.png"):
        (tmp_path / "4").mkdir(exist_ok=True)
        Image.open(file).save(tmp_path / "4" / file.name)
        Image.open(file).resize((12, 10)).save(tmp_path / "4" / file.name.replace("HR", "LR4"))
    with pytest.raises(ValueError, match=r"4/Canon_000_LR4.png: 12 x 10 pixels, its HR image 48 x 40.*resize_lr=true"):
        find_pairs(str(tmp_path), {"4": 4.0}, 32, quiet=True)
    assert find_pairs(str(tmp_path), {"4": 4.0}, 32, quiet=True, resize_lr=True)[0].lr.shape == (40, 48, 3)


def test_a_sample_is_one_place_of_both_images_in_any_orientation():
    samples = PairCrops([[pair(1), pair(2)]], [1.0], 16, seed=3)
    first, orientations = set(), set()
    for n in range(60):
        sample = samples[n]
        lr, hr = sample["lr"].int(), sample["hr"].int()
        assert lr.shape == hr.shape == (3, 16, 16)
        assert torch.equal(lr[:2], hr[:2])
        assert torch.equal(lr[2], hr[2] + 100)
        first.add(tuple(hr[:, 0, 0].tolist()))
        steps = hr[:2, 1, 0] - hr[:2, 0, 0], hr[:2, 0, 1] - hr[:2, 0, 0]  # one down, one to the right
        orientations.add(tuple(int(value) for step in steps for value in step))
    assert len(first) > 50
    assert len(orientations) == 8
    assert {mark for _, _, mark in first} == {1, 2}


def test_a_sample_is_a_function_of_seed_and_number():
    sources = [[pair(1)], [pair(2)]]
    samples, again = (PairCrops(sources, [1.0, 2.0], 16, seed=5) for _ in range(2))
    backwards = {n: again[n]["lr"] for n in (7, 3, 0)}
    assert all(torch.equal(samples[n]["lr"], lr) for n, lr in backwards.items())
    assert not torch.equal(samples[0]["lr"], PairCrops(sources, [1.0, 2.0], 16, seed=6)[0]["lr"])


def test_sources_get_their_shares():
    samples = PairCrops([[pair(1)], [pair(2)], [pair(3)]], [1.0, 2.0, 1.0], 16, seed=0)
    marks = [int(samples[n]["hr"][2, 0, 0]) for n in range(800)]
    assert [marks.count(mark) / 800 for mark in (1, 2, 3)] == pytest.approx([0.25, 0.5, 0.25], abs=0.05)


def test_noise_is_white_at_the_cameras_sampling_and_of_its_own_source_alone():
    flat = Pair("flat", 4.0, np.full((64, 64, 3), 128, np.uint8), np.full((64, 64, 3), 128, np.uint8))
    samples = PairCrops([[flat], [pair(1)]], [1.0, 1.0], 64 - 4, seed=0, noise=[5.0, 0.0])
    noisy = [samples[n] for n in range(60) if int(samples[n]["hr"][2, 0, 0]) == 128]
    assert 20 < len(noisy) < 40
    noise = torch.stack([sample["lr"].double() - 128 for sample in noisy])
    assert all(torch.equal(sample["hr"], torch.full_like(sample["hr"], 128)) for sample in noisy)
    # Interpolated from a grid four times coarser: smooth over one pixel, new after eight, and as strong at its points.
    assert float(noise.mean()) == pytest.approx(0, abs=0.3)
    assert 3 < float(noise.std()) < 5
    correlation = [float((noise[..., d:] * noise[..., : 60 - d]).mean() / noise.var()) for d in (1, 8)]
    assert correlation[0] > 0.85
    assert abs(correlation[1]) < 0.1
    clean = [samples[n] for n in range(60) if int(samples[n]["hr"][2, 0, 0]) != 128]
    assert all(torch.equal(sample["lr"][:2], sample["hr"][:2]) for sample in clean)


def test_a_pair_smaller_than_its_crop_is_named_at_once():
    PairCrops([[pair(1, 8.0, (128, 128))]], [1.0], 64, seed=1, queries=100)
    with pytest.raises(ValueError, match=r"127 x 128 pixels, smaller than the 128 that crop=64 takes of it"):
        PairCrops([[pair(1), pair(1, 8.0, (128, 127))]], [1.0], 64, seed=1, queries=100)


def test_liif_samples_hold_the_colours_at_their_coordinates():
    samples = PairCrops([[pair(1, 2.6, (80, 90))]], [1.0], 64, seed=1, queries=100)
    for n in range(20):
        sample = samples[n]
        side = round(16 * 2.6)
        assert sample["lr"].shape == (3, 16, 16)
        assert sample["hr"].shape == (3, 100)
        torch.testing.assert_close(sample["cell"], torch.full((2,), 2 / side))
        place = (sample["coordinates"] + 1) / 2 * side - 0.5  # pixels of the crop
        assert torch.equal(place.round(), place.round().clamp(0, side - 1))
        # Colours are linear in the place, whatever the orientation: fit them, and the fit is exact.
        design = torch.cat((place, torch.ones(100, 1)), 1).double()
        colours = sample["hr"][:2].T.double()
        solution = torch.linalg.lstsq(design, colours).solution
        torch.testing.assert_close(design @ solution, colours, rtol=0, atol=1e-3)
        assert sorted(solution[:2].abs().flatten().round().int().tolist()) == [0, 0, 1, 1]
        # The LR crop covers the same place: its middle has the crop's middle colour.
        middle = torch.tensor([[side / 2 - 0.5, side / 2 - 0.5, 1.0]], dtype=torch.float64) @ solution
        torch.testing.assert_close(sample["lr"][:2, 7:9, 7:9].double().mean((1, 2)), middle[0], rtol=0, atol=1.0)
