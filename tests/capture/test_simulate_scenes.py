import csv
import dataclasses
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import skimage

from degflow import images
from degflow.capture import simulate
from degflow.capture.camera import SimulatedCamera
from degflow.capture.scenes import PathCrops, SceneConfig, SceneImages
from degflow.config import load, read
from tests.jobs import run_job

PHOTOGRAPHS = {  # under names that a list separated by commas, or a glob, would trip over
    "astronaut.png": "nature/astronaut, 1.png",
    "coffee.png": "coffee#[2].png",
    "chelsea.png": "chelsea.png",
    "rocket.jpg": "Rocket.JPG",
    "hubble_deep_field.jpg": "deep/er/hubble.jpg",
    "retina.jpg": "retina 100%.jpg",
}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    for name, key in PHOTOGRAPHS.items():
        target = folder / key
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(skimage.data_dir) / name, target)
    (folder / "notes.txt").write_text("no photograph")
    return folder


@pytest.fixture(scope="module")
def tree(photographs, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "scenes"
    words = ("longest_side=64", "scales={1.532: 1.532, 2: 2.1}", "test_fraction=0.34", "test=[chelsea.png]")
    code, said = run_job("simulate_scenes", *words, input=photographs, output=output)
    assert code == 0, said
    assert "6 scenes at 1.532, 2 in " in said
    return output


def scenes_of(tree):
    with open(tree / "scenes.csv", newline="") as file:
        return {row["scene"]: row["photograph"] for row in csv.DictReader(file)}


def test_the_tree_is_as_documented(tree):
    splits = {}
    for file in tree.rglob("*.png"):
        found = re.fullmatch(
            r"(Canon|Nikon)/(Train|Test)/([\d.]+)/((?:Canon|Nikon)_\d{3})_(HR|LR(.+))\.png", str(file.relative_to(tree))
        )
        assert found, file
        camera, split, label, name, kind, lr_label = found.groups()
        assert name.startswith(camera)
        assert lr_label in (None, label)
        splits.setdefault((name, split), set()).add((label, kind))
    whole = {("1.532", "HR"), ("1.532", "LR1.532"), ("2", "HR"), ("2", "LR2")}
    assert all(files == whole for files in splits.values())
    assert sorted(name for name, _ in splits) == [f"{camera}_00{n}" for camera in ("Canon", "Nikon") for n in (1, 2, 3)]
    assert {path.name for path in tree.iterdir()} == {"Canon", "Nikon", "config.yaml", "scenes.csv"}


def test_each_photograph_is_in_one_scene_of_one_camera(tree):
    assert sorted(scenes_of(tree).values()) == sorted(PHOTOGRAPHS.values())
    assert set(scenes_of(tree)) == {path.name.removesuffix("_HR.png") for path in tree.rglob("*_HR.png")}


def test_train_and_test_share_no_scene_and_named_photographs_are_tested(tree):
    names = {
        split: {path.name.split("_HR")[0] for path in tree.glob(f"*/{split}/2/*_HR.png")} for split in ("Train", "Test")
    }
    assert not names["Train"] & names["Test"]
    tested = {scenes_of(tree)[name] for name in names["Test"]}
    assert "chelsea.png" in tested
    assert len(names["Test"]) == 3  # chelsea, a third of the other two beside it, and a third of three


def test_images_are_the_cameras_captures_of_the_shrunk_photograph(tree, photographs):
    for name, key in scenes_of(tree).items():
        photo = images.decode((photographs / key).read_bytes())
        size = images.shrunk_size(*photo.shape[:2], max(photo.shape[:2]) / 64)
        assert max(size) == 64
        camera = SimulatedCamera.named(name[:5].lower())
        files = {path.name: images.decode(path.read_bytes()) for path in tree.rglob(f"2/{name}_*.png")}
        seed = int(name[6:])
        shrunk = images.resize(photo, *size)
        np.testing.assert_array_equal(files[f"{name}_HR.png"], camera.capture(shrunk, 1.0, seed=seed))
        np.testing.assert_array_equal(files[f"{name}_LR2.png"], camera.capture(shrunk, 2.1, seed=seed))


def test_the_configuration_is_kept(tree):
    kept = read((tree / "config.yaml").read_text())
    assert kept["scales"] == {"1.532": 1.532, "2": 2.1}
    assert kept["test"] == ["chelsea.png"]
    assert load(simulate.SimulateConfig, [f"config={tree}/config.yaml"]).longest_side == 64


def test_the_scene_reader_takes_the_tree(tree):
    levels = {"1": 1.0, "1.532": 1.532, "2": 2.1}
    for camera in ("Canon", "Nikon"):
        scenes = SceneImages(SceneConfig(f"{tree}/{camera}/Train", levels, crop=32), quiet=True)
        assert scenes.missing == {}
        assert all(pixels.shape[0] == 3 for pixels in scenes.pixels)
        assert PathCrops(scenes.pixels, 32, seed=0)[0]["images"].shape == (3, 3, 32, 32)


def test_an_output_that_holds_something_is_refused_and_left_alone(tree, photographs):
    before = sorted(tree.rglob("*"))
    with pytest.raises(ValueError, match="is not empty"):
        simulate.simulate_scenes(simulate.SimulateConfig(str(photographs), str(tree)))
    assert sorted(tree.rglob("*")) == before


def test_a_stopped_run_is_made_again_with_the_same_configuration_alone(photographs, tmp_path):
    keys = {"cameras": ("canon",), "scales": {"2": 2.0}, "longest_side": 64}
    config = simulate.SimulateConfig(str(photographs), str(tmp_path), **keys)
    simulate.simulate_scenes(config)
    whole = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name in ("scenes.csv", "Canon/Train/2/Canon_005_LR2.png"):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="is not empty"):
        simulate.simulate_scenes(dataclasses.replace(config, seed=1))
    simulate.simulate_scenes(config)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == whole


def test_failures_end_the_job_with_a_line_and_a_code(tmp_path):
    code, said = run_job("simulate_scenes", input=tmp_path, output=f"{tmp_path}/out")
    assert code == 2
    assert said.startswith(f"error: input={tmp_path}: no photograph there (files ending in .png")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_photograph_is_named_before_anything_is_written(photographs, tmp_path):
    (tmp_path / "in").mkdir()
    shutil.copy(photographs / "chelsea.png", tmp_path / "in/a.png")
    (tmp_path / "in/b.jpg").write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"in/b\.jpg: not a JPEG"):
        simulate.simulate_scenes(simulate.SimulateConfig(str(tmp_path / "in"), str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_photograph_too_narrow_once_shrunk_is_named(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/long.png").write_bytes(images.encode_png(np.zeros((16, 400, 3), np.uint8)))
    config = simulate.SimulateConfig(str(tmp_path / "in"), str(tmp_path / "out"), cameras=("canon",), longest_side=100)
    with pytest.raises(ValueError, match=r"long\.png: 100 x 4 pixels"):
        simulate.simulate_scenes(config)


def assigned(keys, **changes):
    return simulate.assign(simulate.SimulateConfig("in", "out", **changes), keys)


def test_photographs_are_assigned_evenly_and_by_seed():
    keys = [f"{n:03d}.jpg" for n in range(41)]
    scenes = assigned(keys, test_fraction=0.25)
    assert sorted(key for *_, key in scenes) == keys
    by_camera = {camera: [scene for scene in scenes if scene[0] == camera] for camera in ("canon", "nikon")}
    assert [len(share) for share in by_camera.values()] == [21, 20]
    for share in by_camera.values():
        assert [number for _, _, number, _ in share] == list(range(1, len(share) + 1))
        assert sum(split == "Test" for _, split, _, _ in share) == 5
    assert assigned(keys, test_fraction=0.25) == scenes
    assert assigned(keys, test_fraction=0.25, seed=1) != scenes


@pytest.mark.parametrize("fraction", [0, 1])
def test_the_fraction_reaches_its_ends(fraction):
    splits = {split for _, split, _, _ in assigned([f"{n}.jpg" for n in range(7)], test_fraction=fraction)}
    assert splits == {"Test" if fraction else "Train"}


def test_of_few_photographs_one_is_kept_for_the_test():
    for count, tests in ((1, 0), (2, 1), (3, 1), (8, 2)):
        scenes = assigned([f"{n}.jpg" for n in range(2 * count)])
        for camera in ("canon", "nikon"):
            assert sum(split == "Test" for name, split, _, _ in scenes if name == camera) == tests


def test_photographs_that_cannot_be_assigned_are_refused():
    with pytest.raises(ValueError, match=r"test=d\.jpg: no such photograph"):
        assigned(["a.jpg", "b.jpg"], test=("d.jpg",))
    with pytest.raises(ValueError, match="1 photographs are too few for cameras="):
        assigned(["a.jpg"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cameras=[leica]"], "camera='leica': must be one of 'canon', 'nikon', 'soft'"),
        (["cameras=[]"], "cameras=[]: at least one"),
        (["cameras=[canon,canon]"], "each once"),
        (["scales={}"], "scales={}: at least one"),
        (["scales={2: 1.0}"], "each above 1"),
        (["scales={2: 9}"], "at most 8"),
        (["scales={2: nan}"], "must be a finite number"),
        (["scales={1: 2.0}"], "'1' cannot be a folder of LR images"),
        (["scales={a/b: 2.0}"], "'a/b' cannot be a folder of LR images"),
        (["test_fraction=1.5"], "test_fraction=1.5: must lie in [0, 1]"),
        (["longest_side=-1"], "longest_side=-1: must be 0 or at least 8"),
        (["seed=-1"], "seed=-1: must not be negative"),
    ],
)
def test_bad_configuration_is_told_before_anything_is_read(words, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load(simulate.SimulateConfig, ["input=in", "output=out", *words])
