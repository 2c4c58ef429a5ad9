"""jobs/train_sr.py as a user runs it, on a small tree and a small dataset."""

import csv
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from degflow import config, evaluation, images, restoration
from degflow.capture.camera import SimulatedCamera
from degflow.restoration import NetworkConfig
from degflow.restoration.training import TrainSRConfig, train_sr
from tests import ROOT
from tests.finished import finish
from tests.sources import save_model
from tests.training.test_jobs import run

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
    """Three photographs captured at x2, x3 and x4; 66 x 70 pixels, so that sides are no multiples of 4."""
    data = pytest.importorskip("skimage.data")
    folder, camera = tmp_path_factory.mktemp("scenes") / "Canon/Train", SimulatedCamera.named("canon")
    for n, photo in enumerate((data.astronaut()[20:86, 180:250], data.coffee()[100:166, 200:270]), 1):
        for label in ("2", "3", "4"):
            (folder / label).mkdir(parents=True, exist_ok=True)
            for name, at in (("HR", 1.0), (f"LR{label}", float(label))):
                Image.fromarray(camera.capture(photo, at, seed=n)).save(folder / f"{label}/Canon_{n:03d}_{name}.png")
    return folder


@pytest.fixture(scope="module")
def dataset(tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("generated")
    model = save_model(folder / "model.safetensors")
    return finish(f"{tree}/2/*_HR.png", folder / "out", model, "scale.low=2", "scale.high=4", "scale.per_image=2")


@pytest.fixture(scope="module")
def trained(tree, dataset, tmp_path_factory):
    """An uninterrupted training on both sources, by a process of its own."""
    output = tmp_path_factory.mktemp("sr")
    keys = KEYS | {
        "train": f"{{real: '{tree}', generated: '{dataset}'}}",
        "weights": "{real: 1, generated: 3}",
        "test": f"{{a: '{tree}', b: '{tree}'}}",
        "output": output,
    }
    code, out, err = run("train_sr", **keys)
    assert code == 0, err
    return output, out, keys


def again(**keys):
    """The job in this process, for most of a short process's time is imports; on one thread, as the process had."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        config.run(train_sr, TrainSRConfig, "", [f"{key}={value}" for key, value in keys.items()])
    finally:
        torch.set_num_threads(threads)


def test_it_trains_on_all_sources_and_tests_under_the_protocol(trained, tree):
    output, said, _ = trained
    assert re.search(r"^train on real: 4 pairs of scale 2 to 4$", said, re.M)
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


def test_a_training_that_was_stopped_ends_in_the_same_weights_and_scores(trained, tmp_path, capsys):
    output, _, keys = trained
    shutil.copytree(output, tmp_path / "run")
    for gone in ("checkpoints/step-00000006.pt", "network.safetensors", "measurements.csv"):
        (tmp_path / "run" / gone).unlink()
    again(**keys | {"output": tmp_path / "run", "test_crop": 0, "memory": 5})  # these may change
    assert "resuming after step 3" in capsys.readouterr().out
    before, after = (load_file(folder / "network.safetensors") for folder in (output, tmp_path / "run"))
    assert all(torch.equal(before[name], after[name]) for name in before | after)
    assert (tmp_path / "run/measurements.csv").read_bytes() == (output / "measurements.csv").read_bytes()


def test_liif_trains_and_is_told_the_test_scale(tree, dataset, tmp_path):
    liif = {"network.liif.width": 8, "network.liif.blocks": 1, "network.liif.hidden": "[16]"}
    keys = KEYS | liif | {"network.name": "liif", "network.liif.queries": 64, "output": tmp_path}
    again(**keys, train=f"{{g: '{dataset}'}}", test=f"{{a: '{tree}'}}", test_scale=2.9, test_crop=40)
    row = next(csv.DictReader((tmp_path / "measurements.csv").open()))
    hr, lr = (
        images.to_tensor(images.decode((tree / f"3/Canon_001_{kind}.png").read_bytes())[None, 13:53, 15:55])
        for kind in ("HR", "LR3")
    )
    network = restoration.load(str(tmp_path / "network.safetensors"))
    assert float(row["psnr"]) == pytest.approx(float(evaluation.psnr(network.restore(lr, 2.9), hr)), abs=1e-9)


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        ({"output": ""}, 2, "output: must be given"),
        ({"train": "{}"}, 1, "train: must be given"),
        ({"weights": "{other: 1}"}, 2, r"weights=.*: must give each of train=\['real'\] a share above 0"),
        ({"noise": "{other: 1}"}, 2, r"noise=.*: names of train=\['real'\], none below 0"),
        ({"noise": "{real: -1}"}, 2, r"noise=.*: names of train=\['real'\], none below 0"),
        ({"crop": 30}, 2, "crop=30: must be a multiple of 4"),
        ({"levels": "{1: 1.0, 2: 2.0}"}, 2, "levels=.*: LR levels alone"),
        ({"test_level": "tele"}, 2, "test_level=tele: no number, so test_scale must be given"),
        ({"network.name": "edsr"}, 2, "network.name: .*edsr"),
        ({"levels": "{2: 2.0, 5: 5.0}"}, 1, r"no scene has every level of \['1', '2', '5'\]"),
        ({"crop": 68}, 1, r"2/Canon_001_HR.png: 70 x 66 pixels, smaller than crop=68"),
        ({"test": "{a: TMP/none}"}, 1, "data=.*none: no scene has every level"),
    ],
)
def test_what_does_not_fit_is_named_before_it_starts(changes, code, said, tree, tmp_path, capsys):
    keys = KEYS | {"train": f"{{real: '{tree}'}}", "test": f"{{a: '{tree}'}}", "output": tmp_path / "none"} | changes
    with pytest.raises(SystemExit) as end:
        again(**{name: str(value).replace("TMP", str(tmp_path)) for name, value in keys.items()})
    assert re.search(said, capsys.readouterr().err.splitlines()[-1])
    assert end.value.code == code
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("file", sorted(path.name for path in (ROOT / "configs").glob("*_sr*.yaml")))
def test_every_configuration_that_ships_is_one_of_the_job(file):
    loaded = config.load(TrainSRConfig, [f"config={ROOT}/configs/{file}", "train={a: x}", "output=y"])
    assert loaded.fit.schedule == "halve"
    if file.startswith("paper"):
        assert loaded.network == NetworkConfig(name="liif" if "liif" in file else "swinir")
        assert (loaded.fit.batch, loaded.fit.learning_rate) == (16, 1e-4)
