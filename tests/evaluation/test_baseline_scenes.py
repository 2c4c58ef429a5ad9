"""baseline-scenes: the tree that SR networks are trained on."""

import hashlib

import numpy as np
import pytest
import torch

from degflow import evaluation, images
from degflow.capture.scenes import SceneConfig, SceneImages
from degflow.config import load
from degflow.degrader import Degrader
from degflow.evaluation import random_degradation
from degflow.evaluation.baseline_scenes import BaselineScenesConfig, baseline_scenes
from degflow.restoration.crops import find_pairs
from tests.captures import save_scenes, small_degrader

LEVELS = {"1": 1.0, "2": 2.0, "4": 4.0}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Files of a degrader that draws and of one that does not."""
    folder = tmp_path_factory.mktemp("models")
    for draws in (True, False):
        small_degrader(LEVELS, draws=draws).save(str(folder / f"{draws}.safetensors"), {})
    return {draws: str(folder / f"{draws}.safetensors") for draws in (True, False)}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    data, folder = pytest.importorskip("skimage.data"), tmp_path_factory.mktemp("scenes")
    save_scenes(folder, [data.astronaut()[:96, 150:250], data.coffee()[100:170, 200:280]], ["2", "4"])
    return str(folder)


def made(scenes, output, model, *words):
    keys = (f"data={scenes}", f"output={output}", f"model={model}", "levels={2.5: 2.5, 4: 4.0}", *words)
    baseline_scenes(load(BaselineScenesConfig, keys))
    return output


@pytest.mark.parametrize("name", ["optics", "mean", "random", "spline", "linear"])
def test_sr_networks_can_be_trained_on_every_baseline(scenes, models, tmp_path, name):
    made(scenes, tmp_path / "out", models[True], f"baseline={name}")
    pairs = find_pairs(str(tmp_path / "out"), {"2.5": 2.5, "4": 4.0}, 32, quiet=True)
    assert sorted({pair.scale for pair in pairs}) == [2.5, 4.0]
    assert len(pairs) == 4
    source = SceneImages(SceneConfig(scenes, LEVELS, crop=24))
    for scene, pixels in zip(source.scenes, source.pixels, strict=True):
        for label in ("2.5", "4"):
            hr, lr = (read(tmp_path / f"out/{label}/{scene.name}_{end}.png") for end in ("HR", f"LR{label}"))
            assert np.array_equal(hr, pixels[0])
            assert lr.shape == hr.shape
            assert np.array_equal(lr, expected(name, models[True], pixels, label, scene.name))


def expected(name, model, pixels, label, scene):
    """The LR image by the parts that the baselines name."""
    degrader, captured = Degrader.load(model), images.to_tensor(pixels)
    scale = torch.tensor([float(label)], dtype=torch.float64)
    if name == "random":
        seed = hashlib.sha256(f"0 {label} {scene}".encode()).digest()[:8]
        return random_degradation(pixels[0], float(label), np.random.default_rng(int.from_bytes(seed, "big")))
    if name == "optics":
        image = degrader.flow.guide(captured[:1], scale)
    elif name == "mean":
        image = degrader(captured[:1], scale, spread=0.0)
    else:
        image = evaluation.interpolate(degrader, captured, float(label), name)
    return images.to_pixels(image)[0]


def read(path):
    return images.decode(path.read_bytes())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["baseline=optics"], "baseline=optics: must be random, spline or linear for a degrader without draws"),
        (["baseline=random", "levels={9: 9.0}"], r"scale=9.0: must lie in the trained range \[1.0, 4.0\]"),
    ],
)
def test_what_cannot_be_made_is_said_before_anything_is_written(scenes, models, tmp_path, words, said):
    with pytest.raises(ValueError, match=said):
        made(scenes, tmp_path / "out", models[False], *words)
    assert not (tmp_path / "out").exists()


def test_levels_that_are_no_folders_and_an_output_in_use_are_refused(scenes, models, tmp_path):
    for label in ("1", "a/b"):
        with pytest.raises(ValueError, match=f"levels=.*'{label}' cannot be a folder of LR images"):
            load(BaselineScenesConfig, [f"data={scenes}", "output=o", f"levels={{{label}: 2.0}}"])
    with pytest.raises(ValueError, match=r"levels=\{\}: at least one"):
        load(BaselineScenesConfig, [f"data={scenes}", "output=o", "levels={}"])
    half = made(scenes, tmp_path / "half", models[True])
    (half / "4/Canon_001_LR4.png").unlink()  # as a stop leaves it
    assert (made(scenes, half, models[True]) / "4/Canon_001_LR4.png").exists()
    with pytest.raises(ValueError, match="is not empty, nor of the same configuration"):
        made(scenes, half, models[True], "baseline=spline")
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(ValueError, match="is not empty"):
        made(scenes, tmp_path, models[True])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["half", "mine.txt"]
