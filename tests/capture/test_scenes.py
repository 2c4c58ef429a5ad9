import os
import pickle
import uuid
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest

from degflow import images
from degflow.capture.scenes import (
    LevelCrops,
    PathCrops,
    ResidualCrops,
    SceneConfig,
    SceneImages,
    check_levels,
    find_scenes,
    in_turn,
)
from degflow.config import load
from degflow.storage import Place
from tests.captures import is_mapped

LEVELS = {"1": 1.0, "2": 2.0, "4": 4.0}
HEIGHT, WIDTH = 24, 40


def coordinates(level, scene=0, height=HEIGHT, width=WIDTH):
    """Pixels that say where they are: (row, column, level and scene)."""
    row, column = np.indices((height, width))
    return np.stack([row, column, np.full_like(row, 10 * scene + level)], -1).astype(np.uint8)


def add(place, folder, name, pixels):
    place.write(f"{folder}/{name}", images.encode_png(pixels))


def scene(place, name, number=0, height=HEIGHT, width=WIDTH, labels=("2", "4")):
    for level, label in enumerate(labels, 1):
        add(place, label, f"{name}_HR.png", coordinates(0, number, height, width))
        add(place, label, f"{name}_LR{label}.png", coordinates(level, number, height, width))


@pytest.fixture
def tree(tmp_path):
    place = Place(str(tmp_path / "Canon [1]/Train"))
    for number, name in enumerate(("Canon_001", "Canon_002", "Canon_010")):
        scene(place, name, number)
    return place


def config(place, **changes):
    return SceneConfig(**({"data": place.uri, "levels": LEVELS, "crop": 16} | changes))


def opened(place, **changes):
    return SceneImages(config(place, **changes), quiet=True)


def test_a_scene_is_its_hr_image_and_one_image_per_level(tree):
    add(tree, "2", "Canon_001_HR.png", coordinates(7))  # HR comes from the lowest level's folder alone
    scenes, missing = find_scenes(tree.uri, ["1", "2", "4"])
    assert [found.name for found in scenes] == ["Canon_001", "Canon_002", "Canon_010"]
    assert scenes[0].files == ("2/Canon_001_HR.png", "2/Canon_001_LR2.png", "4/Canon_001_LR4.png")
    assert missing == {}
    pixels = opened(tree).pixels[0]
    assert pixels.shape == (3, HEIGHT, WIDTH, 3)
    assert pixels.dtype == np.uint8
    assert pixels[:, 0, 0, 2].tolist() == [7, 1, 2]


def test_levels_choose_the_folders_and_their_order(tree):
    scenes, _ = find_scenes(tree.uri, ["1", "4"])
    assert scenes[0].files == ("4/Canon_001_HR.png", "4/Canon_001_LR4.png")


def test_labels_may_be_fractions(tree):
    scene(tree, "Canon_001", labels=("1.532", "3.361"))
    add(tree, "1.532", "Canon_002_LR1x532.png", coordinates(0))  # the dot is no wildcard
    scenes, missing = find_scenes(tree.uri, ["1", "1.532", "3.361"])
    assert [found.files[1] for found in scenes] == ["1.532/Canon_001_LR1.532.png"]
    assert missing == {}


def test_other_files_are_not_scenes(tree):
    for name in ("2/notes.txt", "2/Canon_003_LR4.png", "2/Canon_004.png", "scenes.csv", "2/deeper/Canon_005_LR2.png"):
        tree.write(name, b"")
    scenes, missing = find_scenes(tree.uri, ["1", "2", "4"])
    assert len(scenes) == 3
    assert missing == {}


def test_files_of_any_accepted_suffix_count(tree):
    for label in ("2", "4"):
        tree.write(f"{label}/Canon_050_HR.PNG", images.encode_png(coordinates(0)))
        tree.write(f"{label}/Canon_050_LR{label}.tiff", images.encode_png(coordinates(1)))
    assert [found.name for found in find_scenes(tree.uri, ["1", "2", "4"])[0]][-1] == "Canon_050"
    assert len(opened(tree)) == 4


def test_a_folder_above_or_below_the_tree_names_the_tree(tmp_path):
    for tree in ("Canon/Train", "Canon/Test", "Nikon/Train"):
        for label in ("2", "4"):
            for name in ("a_HR.png", f"a_LR{label}.png"):
                Place(f"{tmp_path}/{tree}").write(f"{label}/{name}", b"")
    canon, given = [f"{tmp_path}/Canon/{split}" for split in ("Test", "Train")], "give one of these folders"
    for folder, trees in ((tmp_path, [*canon, f"{tmp_path}/Nikon/Train"]), (tmp_path / "Canon", canon)):
        with pytest.raises(ValueError, match=f"there are scenes in {', '.join(trees)}: {given}$"):
            find_scenes(str(folder), ["1", "2", "4"])
    with pytest.raises(ValueError, match=f"there are scenes in {canon[1]}: {given}$"):
        find_scenes(f"{canon[1]}/2", ["1", "2", "4"])
    assert len(find_scenes(canon[1], ["1", "2", "4"])[0]) == 1


def test_incomplete_scenes_are_counted_and_named(tree):
    tree.delete("4/Canon_002_LR4.png")
    add(tree, "2", "Canon_077_LR2.png", coordinates(1))
    scenes, missing = find_scenes(tree.uri, ["1", "2", "4"])
    assert [found.name for found in scenes] == ["Canon_001", "Canon_010"]
    assert missing == {"1": ["Canon_077"], "4": ["Canon_002", "Canon_077"]}
    found = opened(tree)
    assert len(found) == 2
    assert found.missing == missing
    assert found.describe() == (
        "2 scenes at levels 1, 2, 4 (40 x 24); 1 without level 1: Canon_077; 2 without level 4: Canon_002, Canon_077"
    )


def test_describe_shortens_long_lists(tree):
    for number in range(20, 26):
        scene(tree, f"Canon_{number:03d}", height=16 + number, width=40)
        add(tree, "2", f"Canon_9{number}_LR2.png", coordinates(0))
    line = opened(tree).describe()
    assert line.startswith("9 scenes at levels 1, 2, 4 (40 x 24, 40 x 36, 40 x 37, ...)")
    assert "6 without level 4: Canon_920, Canon_921, Canon_922, ..." in line


def test_a_tree_without_a_whole_scene_says_what_was_found_and_expected(tree):
    with pytest.raises(
        ValueError, match=r"no scene has every level of \['1', '2', '3'\] \(found 1: 3, 2: 3, 3: 0\)"
    ) as error:
        opened(tree, levels={"1": 1.0, "2": 2.0, "3": 3.0})
    assert "expected 2/ID_HR.png and 2/ID_LR2.png" in str(error.value)
    assert tree.uri in str(error.value)
    with pytest.raises(ValueError, match="found 1: 0, 2: 0, 4: 0"):
        opened(Place(tree.uri + "/absent"))


@pytest.mark.parametrize("resize", [False, True])
def test_a_file_of_another_size_is_named_with_the_expected_size(tree, resize):
    add(tree, "4", "Canon_002_LR4.png", coordinates(2, height=HEIGHT + 2))
    with pytest.raises(ValueError, match=r"4/Canon_002_LR4\.png: 40 x 26 pixels, its HR image 40 x 24; ") as error:
        opened(tree, resize_lr=resize)
    assert tree.uri in str(error.value)
    assert ("takes smaller LR images only" if resize else "resize_lr=true") in str(error.value)


def test_the_first_offending_file_is_the_one_named(tree):
    for name in ("2/Canon_002_LR2.png", "4/Canon_001_LR4.png", "4/Canon_002_LR4.png"):
        tree.write(name, images.encode_png(coordinates(2, height=HEIGHT - 8)))
    with pytest.raises(ValueError, match=r"4/Canon_001_LR4\.png: 40 x 16 pixels"):
        opened(tree)


def test_smaller_lr_images_are_brought_to_hrs_grid_when_asked(tree):
    small = {"2": coordinates(0, height=12, width=20), "4": coordinates(0, height=8, width=14)}
    for label in ("2", "4"):
        add(tree, label, f"Canon_002_LR{label}.png", small[label])
    pixels = opened(tree, resize_lr=True, crop=8).pixels[1]
    for level, label in enumerate(("2", "4"), 1):
        np.testing.assert_array_equal(pixels[level], images.resize(small[label], HEIGHT, WIDTH))


def test_a_smaller_lr_image_of_another_shape_is_named(tree):
    add(tree, "4", "Canon_002_LR4.png", coordinates(2, height=8, width=17))  # 11 to 16 would do
    with pytest.raises(ValueError, match=r"4/Canon_002_LR4\.png: 17 x 8 pixels, its HR image 40 x 24; both sides must"):
        opened(tree, resize_lr=True, crop=8)


def test_a_damaged_file_is_named(tree):
    tree.write("4/Canon_002_LR4.png", b"<html>")
    with pytest.raises(ValueError, match=r"4/Canon_002_LR4\.png: not a JPEG, PNG, WebP or TIFF file"):
        opened(tree)


@pytest.mark.parametrize("cached", [False, True])
def test_an_image_smaller_than_the_crop_is_named(tree, tmp_path, cached):
    cache = str(tmp_path / "cache") if cached else ""
    assert len(opened(tree, crop=24, cache=cache)) == 3
    with pytest.raises(ValueError, match=r"2/Canon_001_HR\.png: 40 x 24 pixels, smaller than crop=25"):
        opened(tree, crop=25, cache=cache)


def stacks(scenes=3, height=HEIGHT, width=WIDTH):
    """Of each scene HR (0), two LR levels (1, 2) and HR after their optics (3, 4); the marks say which is which."""
    return [np.stack([coordinates(n, scene, height, width) for n in range(5)]) for scene in range(scenes)]


TIMES = ((0.25, 1.0), (0.1, 0.7), (0.0, 0.5))  # of the LR levels of each scene
SAMPLERS = {
    "levels": lambda stacks, crop, seed: LevelCrops(stacks, 3, crop, seed),
    "path": lambda stacks, crop, seed: PathCrops([stack[:3] for stack in stacks], crop, seed),
    "residual": lambda stacks, crop, seed: ResidualCrops(stacks, TIMES, crop, seed),
}
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)


def planes(sample):
    """Row, column and mark planes of all images of a sample, "K crop crop" each."""
    images = [value.view(-1, *value.shape[-3:]) for value in sample.values() if value.dtype == torch.uint8]
    return torch.cat(images).unbind(1)


def mark(image):
    """Which image of its scene it is, and which scene."""
    return int(image[2, 0, 0]) % 10, int(image[2, 0, 0]) // 10


@every_sampler
def test_a_sample_is_one_crop_with_the_same_flips_of_all_its_images(sampler):
    crops, flips, scenes_seen = sampler(stacks(), 16, seed=0), set(), set()
    for n in range(60):
        rows, columns, marks = planes(crops[n])
        assert rows.shape[1:] == (16, 16)
        assert torch.equal(rows, rows[:1].expand_as(rows))
        assert torch.equal(columns, columns[:1].expand_as(columns))
        assert (marks // 10).unique().numel() == 1
        row, column = rows[0, :, 0].int(), columns[0, 0].int()
        assert rows[0].eq(row[:, None]).all()
        assert columns[0].eq(column).all()
        down, right = row[1] - row[0], column[1] - column[0]
        assert row.diff().eq(down).all()
        assert column.diff().eq(right).all()
        flips.add((int(down), int(right)))
        scenes_seen.add(int(marks[0, 0, 0]) // 10)
    assert flips == {(1, 1), (1, -1), (-1, 1), (-1, -1)}
    assert scenes_seen == {0, 1, 2}


@every_sampler
def test_every_position_is_reached_and_none_beyond(sampler):
    crops, places = sampler(stacks(), 22, seed=3), set()
    for n in range(800):
        rows, columns, _ = planes(crops[n])
        places.add((int(rows.min()), int(columns.min())))
    assert places == {(top, left) for top in range(3) for left in range(19)}


@every_sampler
def test_a_crop_of_the_whole_image_works(sampler):
    rows, _, _ = planes(sampler(stacks(height=16, width=16), 16, seed=0)[5])
    assert sorted(rows[0, :, 0].tolist()) == list(range(16))


def test_an_epoch_holds_every_scene_once_and_the_next_is_in_another_order():
    crops = PathCrops(stacks(23), 16, seed=0)
    drawn = [[mark(crops[epoch * 23 + n]["images"][0])[1] for n in range(23)] for epoch in range(2)]
    assert sorted(drawn[0]) == sorted(drawn[1]) == list(range(23))
    assert drawn[0] != drawn[1]


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@every_sampler
def test_sample_n_depends_on_seed_and_n_alone(sampler):
    first = sampler(stacks(), 16, seed=5)
    samples = [first[n] for n in range(12)]
    again = sampler(stacks(), 16, seed=5)
    assert all(same(again[n], samples[n]) for n in reversed(range(12)))
    np.random.seed(0)
    torch.manual_seed(0)
    assert same(again[7], samples[7])
    assert not any(same(sampler(stacks(), 16, seed=6)[n], samples[n]) for n in range(12))
    assert [int(sample["number"]) for sample in samples] == list(range(12))
    assert samples[3]["number"].dtype == torch.int64
    far = sampler(stacks(), 16, seed=5)[10**12]  # as far as a training can come
    assert int(far["number"]) == 10**12


@every_sampler
def test_workers_do_not_change_the_samples(sampler):
    crops = sampler(stacks(), 16, seed=0)
    loader = torch.utils.data.DataLoader(crops, batch_size=None, sampler=range(6), num_workers=2)
    assert all(same(sample, crops[n]) for n, sample in enumerate(loader))


def assert_uniform(values, bins):
    """Chi-squared of whole numbers below `bins`, at the 0.1% level."""
    counts = np.bincount(values, minlength=bins)
    assert len(counts) == bins
    assert chisquare(counts).pvalue > 0.001, counts


def test_stage_1_draws_every_level_equally_often_and_the_guide_is_hr_after_that_levels_optics():
    crops, levels = LevelCrops(stacks(), 3, 8, seed=0), []
    for n in range(900):
        sample = crops[n]
        assert sample.keys() == {"target", "guide", "number"}
        (level, scene), guide = mark(sample["target"]), mark(sample["guide"])
        assert guide == ({0: 0, 1: 3, 2: 4}[level], scene)
        levels.append(level)
    assert_uniform(levels, 3)


def test_stage_1_without_optics_is_guided_by_hr():
    crops = LevelCrops([stack[:3] for stack in stacks()], 3, 8, seed=0)
    drawn = [(mark(sample["target"])[0], mark(sample["guide"])[0]) for sample in map(crops.__getitem__, range(60))]
    assert set(drawn) == {(0, 0), (1, 0), (2, 0)}


def test_the_published_stage_2_has_all_levels_in_order_and_uniform_times():
    crops, times = PathCrops([stack[:3] for stack in stacks()], 8, seed=0), []
    for n in range(1000):
        sample = crops[n]
        assert sample.keys() == {"images", "time", "number"}
        assert [mark(image)[0] for image in sample["images"]] == [0, 1, 2]
        times.append(sample["time"])
    times = torch.cat(times)
    assert times.dtype == torch.float64
    assert times.min() >= 0
    assert times.max() < 1
    assert kstest(times, "uniform").pvalue > 0.001
    assert abs(np.corrcoef(times[:-1], times[1:])[0, 1]) < 0.1


def test_more_points_change_nothing_else_of_a_sample_and_are_independent_and_uniform():
    only_levels = [stack[:3] for stack in stacks()]
    few, many, points = PathCrops(only_levels, 8, 0), PathCrops(only_levels, 8, 0, points=4), []
    for n in range(500):
        one, four = few[n], many[n]
        assert four["time"].shape == (4,)
        assert torch.equal(four["time"][:1], one["time"])
        assert all(torch.equal(four[name], one[name]) for name in one if name != "time")
        points.append(four["time"])
    points = torch.stack(points)
    assert all(kstest(column, "uniform").pvalue > 0.001 for column in points.T)
    assert np.abs(np.corrcoef(points.T) - np.eye(4)).max() < 0.15


def test_stage_2_for_draws_has_the_optics_and_the_time_of_its_level_and_uniform_taus():
    crops, places, taus = ResidualCrops(stacks(), TIMES, 8, seed=0), [], []
    for n in range(1800):
        sample = crops[n]
        assert sample.keys() == {"hr", "lr", "skeleton", "time", "tau", "number"}
        (level, scene), (hr, _), (skeleton, _) = (mark(sample[name]) for name in ("lr", "hr", "skeleton"))
        assert (hr, skeleton) == (0, level + 2)
        assert sample["time"].dtype == sample["tau"].dtype == torch.float64
        assert float(sample["time"]) == TIMES[scene][level - 1]
        places.append(2 * scene + level - 1)
        taus.append(float(sample["tau"]))
    assert_uniform(places, 6)
    assert_uniform([6 * int(5 * tau) + place for tau, place in zip(taus, places, strict=True)], 30)  # independent
    assert kstest(taus, "uniform").pvalue > 0.001


def test_a_cache_gives_the_same_samples_and_is_reused(tree, tmp_path):
    cache = tmp_path / "cache/decoded"
    plain, cached = opened(tree), opened(tree, cache=str(cache))
    assert all(same(PathCrops(plain.pixels, 16, 1)[n], PathCrops(cached.pixels, 16, 1)[n]) for n in range(8))
    assert all(is_mapped(pixels) for pixels in cached.pixels)
    before = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(before) == 3
    again = opened(tree, cache=str(cache), crop=8)
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == before
    np.testing.assert_array_equal(again.pixels[2], plain.pixels[2])


def test_processes_that_share_a_cache_begin_with_a_part_each(tree, tmp_path, monkeypatch):
    order, decode = [], SceneImages._decode
    monkeypatch.setattr(SceneImages, "_decode", lambda self, scene: order.append(scene.name) or decode(self, scene))
    names = ["Canon_001", "Canon_002", "Canon_010"]
    for share in ((0, 3), (1, 3), (2, 3), (1, 2)):
        order.clear()
        settings = SceneConfig(data=tree.uri, levels=LEVELS, crop=16, cache=str(tmp_path / f"{share}"))
        shared = SceneImages(settings, quiet=True, share=share)
        assert order == [names[n] for n in in_turn(3, share)]
        assert [int(pixels[0, 0, 0, 2]) for pixels in shared.pixels] == [0, 10, 20]


def test_a_cache_notices_changed_files_and_settings(tree, tmp_path):
    cache = str(tmp_path / "cache")
    opened(tree, cache=cache)
    add(tree, "4", "Canon_002_LR4.png", coordinates(9))
    os.utime(tree.path("4/Canon_002_LR4.png"), (1, 1))
    assert opened(tree, cache=cache).pixels[1][2, 0, 0, 2] == 9
    assert opened(tree, cache=cache, levels={"1": 1.0, "4": 4.0}).pixels[1].shape[0] == 2
    other = Place(str(tmp_path / "other"))
    scene(other, "Canon_001", 5)
    assert opened(other, cache=cache).pixels[0][0, 0, 0, 2] == 50


def test_a_cache_file_is_never_half_written_under_its_final_name(tree, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    save = np.save

    def full(path, pixels):
        with open(path, "wb") as file:
            save(file, pixels)
            file.truncate(200)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(OSError, match="No space"):
            opened(tree, cache=str(cache))
    assert list(cache.iterdir()) == []
    assert len(opened(tree, cache=str(cache))) == 3


def test_scenes_are_read_from_any_filesystem(tmp_path):
    place = Place(f"memory://{uuid.uuid4().hex}")
    scene(place, "A_1", 3)
    for cache in ("", str(tmp_path)):
        found = opened(place, cache=cache)
        assert found.pixels[0][:, 0, 0, 2].tolist() == [30, 31, 32]
    place.delete("")


def test_scenes_survive_pickling_for_spawned_workers(tree):
    crops = PathCrops(opened(tree).pixels, 16, seed=0)
    assert same(pickle.loads(pickle.dumps(crops))[4], crops[4])


def test_levels_come_from_words_with_numbers_as_labels():
    loaded = load(SceneConfig, ["data=x", "levels={1: 1.0, 2: 2.1}"])
    assert loaded.levels == {"1": 1.0, "2": 2.1}
    assert load(SceneConfig, ["data=x"]).levels == LEVELS


@pytest.mark.parametrize(
    ("levels", "rule"),
    [
        ({}, "must begin with label 1"),
        ({"1": 1.0}, "name at least one more"),
        ({"2": 2.0, "4": 4.0}, "must begin with label 1"),
        ({"2": 2.0, "1": 1.0}, "must begin with label 1"),
        ({"1": 1.0, "4": 4.0, "2": 2.0}, "must be above 0 and increase"),
        ({"1": 1.0, "2": 1.0}, "must be above 0 and increase"),
        ({"1": 0.0, "2": 2.0}, "must be above 0 and increase"),
        ({"1": 1.0, "2": float("nan")}, "must be above 0 and increase"),
    ],
)
def test_bad_levels_are_named_with_their_rule(levels, rule):
    with pytest.raises(ValueError, match=rule) as error:
        check_levels(levels)
    assert str(levels) in str(error.value)
    with pytest.raises(ValueError, match=rule):
        SceneConfig(data="x", levels=levels)


def test_a_crop_below_8_is_refused(tree):
    with pytest.raises(ValueError, match=r"scenes\.crop=7: must be at least 8"):
        replace(config(tree), crop=7)


@pytest.mark.parametrize("reductions", [(), (0.99,), (1.0, 0.5), (float("nan"),), (1.0, float("inf"))])
def test_reductions_below_1_are_refused(tree, reductions):
    with pytest.raises(ValueError, match=r"scenes\.reductions=\[.*\]: at least one factor, each at least 1 and finite"):
        replace(config(tree), reductions=reductions)


def test_each_process_begins_with_its_own_files_of_a_cache_large_and_small():
    orders = [in_turn(10, (n, 4)) for n in range(4)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert [order[:2] for order in orders] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert orders[1] == [1, 5, 9, 2, 6, 3, 7, 0, 4, 8]
