"""fit-optics: a degrader with the optics of other scenes, and nothing else of them."""

import re

import pytest
import torch
from safetensors.torch import load_file

from degflow import Degrader
from degflow.capture.optics import Optics
from degflow.capture.scenes import SceneConfig, SceneImages
from tests.captures import save_scenes, small_degrader
from tests.jobs import run_job

LEVELS = {"1": 1.0, "2": 2.0, "4": 4.0}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    data = pytest.importorskip("skimage.data")
    photos = (data.astronaut()[20:180, 180:340],)
    return save_scenes(tmp_path_factory.mktemp("scenes") / "Canon/Train", photos, ("2", "3", "4"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    file = tmp_path_factory.mktemp("model") / "degrader.safetensors"
    small_degrader(LEVELS, draws=True).save(str(file), {"config": {"origin": "random"}})
    return file


@pytest.mark.parametrize("levels", [LEVELS, {"1": 1.0, "2": 2.1, "4": 4.3}])
def test_the_degrader_has_the_optics_of_the_scenes_and_keeps_all_else(tree, model, tmp_path, levels):
    file = tmp_path / "new.safetensors"
    words = "{" + ", ".join(f"{label}: {scale}" for label, scale in levels.items()) + "}"
    code, said = run_job("fit_optics", data=tree, model=model, output=file, levels=words)
    assert code == 0, said
    assert f"degrader: {file}" in said
    assert re.search(r"^1 scene at levels 1, 2, 4 \(", said, re.M)
    fitted = Optics.fit(SceneImages(SceneConfig(str(tree), levels, crop=32), quiet=True))
    before, after, degrader = load_file(model), load_file(file), Degrader.load(str(file))
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"flow.optics.log_transfer"}
    assert torch.equal(degrader.flow.optics.log_transfer, fitted.log_transfer)
    assert degrader.flow.optics.scales == tuple(levels.values())
    assert degrader.levels == LEVELS
    assert degrader.provenance["scenes"] == ["Canon_001"]
    assert degrader.provenance["began_with"] == {"config": {"origin": "random"}}
    hr = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    means = [each(hr, torch.tensor([4.0]), spread=0) for each in (degrader, Degrader.load(str(model)))]
    assert not torch.equal(*means)


def test_the_new_optics_come_closer_to_captured_lr(tree, model, tmp_path):
    code, said = run_job("fit_optics", data=tree, model=model, output=tmp_path / "new.safetensors")
    assert code == 0, said
    before, now = ([float(n) for n in re.findall(r"x[24] ([0-9.]+) dB", line)] for line in said.splitlines()[-3:-1])
    assert len(before) == len(now) == 2
    assert all(new > old + 1 for new, old in zip(now, before, strict=True))


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        ({"levels": "{1: 1.0, 2: 2.0, 3: 3.0}"}, 2, r"levels=.*: must reach from 1 to 4, as the degrader's do"),
        ({"levels": "{1: 2.0, 2: 3.0, 4: 4.0}"}, 2, r"levels=.*: must reach from 1 to 4, as the degrader's do"),
        ({"levels": "{1: 1.0}"}, 2, r"levels="),
        ({"data": "nowhere"}, 2, r"nowhere"),
        ({"model": "PUBLISHED"}, 2, r"published.safetensors: has no optics; the published method does without"),
    ],
)
def test_what_does_not_fit_is_named(tree, model, tmp_path, changes, code, said):
    published = tmp_path / "published.safetensors"
    small_degrader(LEVELS).save(str(published), {})
    keys = {"data": tree, "model": model, "output": tmp_path / "none.safetensors", **changes}
    keys = {name: published if value == "PUBLISHED" else value for name, value in keys.items()}
    found, words = run_job("fit_optics", **keys)
    assert found == code, words
    assert re.search(said, words), words
    assert not (tmp_path / "none.safetensors").exists()
