"""jobs/train_sr.py on a small tree and a small dataset."""

import csv
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from degflow import config, evaluation, images, restoration
from degflow.restoration import NetworkConfig
from degflow.restoration.settings import TrainSRConfig
from tests import ROOT
from tests.captures import save_scenes
from tests.finished import finish
from tests.jobs import run_job
from tests.sources import save_model

pytestmark = pytest.mark.usefixtures("one_thread")

KEYS = {
    "network.name": "rcan",
    "network.residual": "true",
    "network.rcan.width": 8,
    "network.rcan.groups": 1,
    "network.rcan.blocks": 1,
    "network.rcan.squeeze": 4,
    "crop": 32,
    "test_lpips": "none",
    "fit.steps": 6,
    "fit.batch": 2,
    "fit.workers": 0,
    "fit.log_every": 2,
    "fit.validate_every": 6,
    "fit.save_every": 3,
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Two photographs captured at x2, x3 and x4; 66 x 70 pixels, so that sides are no multiples of 4."""
    data = pytest.importorskip("skimage.data")
    photos = data.astronaut()[20:86, 180:250], data.coffee()[100:166, 200:270]
    return save_scenes(tmp_path_factory.mktemp("scenes") / "Canon/Train", photos, ("2", "3", "4"))


@pytest.fixture(scope="module")
def dataset(tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("generated")
    model = save_model(folder / "model.safetensors")
    return finish(f"{tree}/2/*_HR.png", folder / "out", model, "scale.low=2", "scale.high=4", "scale.per_image=2")


@pytest.fixture(scope="module")
def trained(tree, dataset, tmp_path_factory):
    """An uninterrupted training on both sources."""
    output = tmp_path_factory.mktemp("sr")
    keys = KEYS | {
        "train": f"{{real: '{tree}', generated: '{dataset}'}}",
        "weights": "{real: 1, generated: 3}",
        "test": f"{{a: '{tree}', b: '{tree}'}}",
        "output": output,
    }
    code, said = run_job("train_sr", **keys)
    assert code == 0, said
    return output, said, keys


def test_it_trains_on_all_sources_and_tests_under_the_protocol(trained, tree):
    output, said, _ = trained
    assert re.search(r"^train on real: 4 pairs of scale 2 to 4$", said, re.M)
    assert re.search(r"^\d scenes at levels 1, 2, 4 ", said, re.M)
    assert re.search(r"^test on a: \d scenes at levels 1, 3 ", said, re.M)
    assert re.search(r"^train on generated: 4 pairs of scale [23]\.\d+ to [23]\.\d+$", said, re.M)
    assert re.search(r"^step 6: a [0-9.]+, b [0-9.]+$", said, re.M)
    rows = list(csv.DictReader((output / "measurements.csv").open()))
    assert [(row["tree"], row["scene"], row["image"]) for row in rows] == [
        (name, f"Canon_{n:03d}", image) for name in "ab" for n in (1, 2) for image in ("restored", "LR")
    ]
    network = restoration.load(str(output / "network.safetensors"))
    for row in rows[:4]:
        hr, lr = (
            images.to_tensor(images.decode((tree / f"3/{row['scene']}_{kind}.png").read_bytes())[None, :64, :68])
            for kind in ("HR", "LR3")
        )  # cut to multiples of 4
        image = network.restore(lr, 3.0) if row["image"] == "restored" else lr
        assert float(row["psnr"]) == pytest.approx(float(evaluation.psnr(image, hr)), abs=1e-9)
        assert float(row["ssim"]) == pytest.approx(float(evaluation.ssim(image, hr)), abs=1e-9)
    table = (output / "table.md").read_text()
    mean = np.mean([float(row["psnr"]) for row in rows if row["image"] == "restored"])
    assert f"| mean | | {mean:.2f} / " in table
    assert table in said
    for name in ("test-a.png", "test-b.png", "previews/step-00000006.png"):
        assert np.ptp(images.decode((output / name).read_bytes())) == 255


def test_a_training_that_was_stopped_ends_in_the_same_weights_and_scores(trained, tmp_path):
    output, _, keys = trained
    shutil.copytree(output, tmp_path / "run")
    for gone in ("checkpoints/step-00000006.pt", "network.safetensors", "measurements.csv"):
        (tmp_path / "run" / gone).unlink()
    code, said = run_job("train_sr", **keys | {"output": tmp_path / "run", "test_crop": 0, "memory": 5})  # may change
    assert code == 0, said
    assert "resuming after step 3" in said
    before, after = (load_file(folder / "network.safetensors") for folder in (output, tmp_path / "run"))
    assert all(torch.equal(before[name], after[name]) for name in before | after)
    assert (tmp_path / "run/measurements.csv").read_bytes() == (output / "measurements.csv").read_bytes()


def test_pairs_may_have_moved_but_not_changed(trained, tree, tmp_path):
    output, _, keys = trained
    moved = shutil.copytree(tree, tmp_path / "tree")
    keys = keys | {"train": keys["train"].replace(str(tree), str(moved)), "output": tmp_path / "run"}
    assert keys["train"] != trained[2]["train"]
    for change in (False, True):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(output, tmp_path / "run")
        if change:
            shutil.copy(moved / "2/Canon_001_LR2.png", moved / "2/Canon_002_LR2.png")
        code, said = run_job("train_sr", **keys)
        assert code == (2 if change else 0), said
    assert re.search(r"step-00000006.pt: was made with other scenes or pairs", said.splitlines()[-1])
    assert (tmp_path / "run/network.safetensors").read_bytes() == (output / "network.safetensors").read_bytes()


def test_liif_trains_and_is_told_the_test_scale(tree, dataset, tmp_path):
    liif = {"network.liif.width": 8, "network.liif.blocks": 1, "network.liif.hidden": "[16]"}
    keys = KEYS | liif | {"network.name": "liif", "network.liif.queries": 64, "output": tmp_path}
    assert run_job("train_sr", **keys, train=f"{{g: '{dataset}'}}", test=f"{{a: '{tree}'}}", test_crop=40)[0] == 0
    row = next(csv.DictReader((tmp_path / "measurements.csv").open()))
    hr, lr = (
        images.to_tensor(images.decode((tree / f"3/Canon_001_{kind}.png").read_bytes())[None, 13:53, 15:55])
        for kind in ("HR", "LR3")
    )
    network = restoration.load(str(tmp_path / "network.safetensors"))
    assert float(row["psnr"]) == pytest.approx(float(evaluation.psnr(network.restore(lr, 3.0), hr)), abs=1e-9)


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        ({"output": ""}, 2, "output: must be given"),
        ({"train": "{}"}, 2, "train: must be given"),
        ({"weights": "{other: 1}"}, 2, r"weights=.*: must give each of train=\['real'\] a share above 0"),
        ({"noise": "{other: 1}"}, 2, r"noise=.*: names must be of train=\['real'\], values not below 0"),
        ({"noise": "{real: -1}"}, 2, r"noise=.*: names must be of train=\['real'\], values not below 0"),
        ({"crop": 30}, 2, "crop=30: must be a multiple of 4"),
        ({"levels": "{1: 1.0, 2: 2.0}"}, 2, "levels=.*: must be LR levels only"),
        ({"test_level": "tele"}, 2, "test_level=tele: must be a number"),
        ({"network.name": "edsr"}, 2, "network.name: .*edsr"),
        ({"levels": "{2: 2.0, 5: 5.0}"}, 2, r"no scene has every level of \['1', '2', '5'\]"),
        ({"crop": 68}, 2, r"2/Canon_001_HR.png: 70 x 66 pixels, smaller than crop=68"),
        ({"fit.start_from": "other.safetensors", "train": "{real: none}"}, 2, "other.safetensors: no such file"),
        ({"test": "{a: TMP/none}"}, 2, "data=.*none: no scene has every level"),
    ],
)
def test_what_does_not_fit_is_named_before_it_starts(changes, code, said, tree, tmp_path):
    keys = KEYS | {"train": f"{{real: '{tree}'}}", "test": f"{{a: '{tree}'}}", "output": tmp_path / "none"} | changes
    keys = {name: str(value).replace("TMP", str(tmp_path)) for name, value in keys.items()}
    returned, words = run_job("train_sr", **keys)
    assert re.search(said, words.splitlines()[-1])
    assert returned == code
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("file", sorted(path.name for path in (ROOT / "configs").glob("*_sr*.yaml")))
def test_every_configuration_that_ships_is_one_of_the_job(file):
    loaded = config.load(TrainSRConfig, [f"config={ROOT}/configs/{file}", "train={a: x}", "output=y"])
    assert loaded.fit.schedule == "halve"
    if file.startswith("paper"):
        assert loaded.network == NetworkConfig(name="liif" if "liif" in file else "swinir")
        assert (loaded.fit.batch, loaded.fit.learning_rate) == (16, 1e-4)
