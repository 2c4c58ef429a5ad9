import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from degflow import Degrader, images
from degflow.camera import SimulatedCamera
from degflow.models import AutoencoderConfig, ResidualAutoencoder, VelocityConfig, VelocityNetwork

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A tree of two small simulated scenes, and a small random degrader."""
    skimage_data = pytest.importorskip("skimage.data")
    folder = tmp_path_factory.mktemp("evaluate")
    camera = SimulatedCamera.named("canon")
    for n, photo in enumerate((skimage_data.astronaut()[:96, :120], skimage_data.coffee()[:96, :120])):
        for label, scale in (("2", 2.0), ("3", 3.0)):
            level = folder / "tree" / label
            level.mkdir(parents=True, exist_ok=True)
            (level / f"Canon_{n:03d}_HR.png").write_bytes(images.encode_png(camera.capture(photo, 1.0)))
            (level / f"Canon_{n:03d}_LR{label}.png").write_bytes(images.encode_png(camera.capture(photo, scale)))
    torch.manual_seed(0)
    degrader = Degrader(
        ResidualAutoencoder(AutoencoderConfig(base_width=8, gate_init=0.5)),
        VelocityNetwork(VelocityConfig(width=16, blocks=1, multipliers=(1, 2))),
        {"1": 1.0, "2": 2.0, "4": 4.0},
    )
    degrader.save(str(folder / "model.safetensors"), {})
    return folder


def evaluate(folder, *words):
    command = [sys.executable, "jobs/evaluate.py", f"data={folder}/tree", f"output={folder}/out", *words]
    return subprocess.run(
        [*command, f"model={folder}/model.safetensors", "lpips=none"], cwd=ROOT, capture_output=True, text=True
    )


def test_the_tables_hold_every_scene_level_and_method(setting):
    done = evaluate(setting, "levels={1: 1.0, 2: 2.0, 3: 3.0}", "sweep=5")
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((setting / "out/measurements.csv").open()))
    assert {(row["scene"], row["label"], row["method"]) for row in rows} == {
        (scene, label, method)
        for scene in ("Canon_000", "Canon_001")
        for label in ("2", "3")
        for method in ("generated", "hr", "bicubic", "autoencoder")
    }
    unchanged = [row for row in rows if row["method"] == "hr"]
    assert all(row["psnr_to_hr"] == "inf" for row in unchanged)
    assert all(15 < float(row["psnr"]) < 45 for row in unchanged)
    sweep = list(csv.DictReader((setting / "out/sweep.csv").open()))
    assert [float(row["scale"]) for row in sweep] == [1.0, 1.75, 2.5, 3.25, 4.0]
    table = (setting / "out/table.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == ["x2", "x3"]
    mean = sum(float(row["psnr"]) for row in unchanged if row["label"] == "2") / 2
    assert f"{mean:.2f} / " in table[2].split("|")[3]


def test_a_level_beyond_the_trained_range_is_refused(setting):
    done = evaluate(setting, "levels={1: 1.0, 2: 2.0, 3: 4.5}")
    assert done.returncode == 1
    assert "scale=4.5: must lie in the trained range [1.0, 4.0]" in done.stderr


def test_a_level_that_is_not_there_is_named(setting):
    done = evaluate(setting, "levels={1: 1.0, 2: 2.0, 4: 4.0}")
    assert done.returncode == 1
    assert "no scene has every level of ['1', '2', '4']" in done.stderr
