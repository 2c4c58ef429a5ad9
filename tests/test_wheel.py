"""The wheel, installed into an environment of its own and used from an empty folder, far from the clone."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from degflow import __version__, config
from degflow.models.files import SHIPPED
from tests import ROOT
from tests.captures import save_scenes
from tests.sources import png, rows_of

SOURCES = ("pyproject.toml", "README.md", "LICENSE", "degflow", "configs")
TINY = (
    "scenes.crop=16",
    "autoencoder.base_width=4",
    "scenes.reductions=[1.0]",
    "fit.batch=2",
    "fit.steps=2",
    "fit.workers=0",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the sources, because a build leaves a folder that later builds take files from."""
    clone, folder = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, clone / name)
    words = ["--quiet", "--no-deps", "--no-build-isolation", f"--wheel-dir={folder}"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *words, str(clone)], check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The scripts' folder of an environment that has degflow from the wheel, and all other packages from this one."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin/python"
    pip = [sys.executable, "-m", "pip", f"--python={python}", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, str(wheel)], check=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    # Python looks there after the environment's own, and reads no .pth files there, as that of an editable degflow.
    (packages / "others.pth").write_text("\n".join({sysconfig.get_path(kind) for kind in ("purelib", "platlib")}))
    where = run(python, "-c", "import degflow.config; print(degflow.config.__file__)", folder=folder)
    assert where.stdout.strip() == str(packages / "degflow/config.py")
    return folder / "bin"


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    return tmp_path_factory.mktemp("empty")


def run(*command, folder, code=0):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"RAY_ADDRESS": "local"}
    done = subprocess.run(
        [*map(str, command)], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_the_wheel_holds_the_degrader_the_configurations_and_the_licences_and_no_tests(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        assert file.read("degflow/models/weights/" + Path(SHIPPED).name) == Path(SHIPPED).read_bytes()
        for path in (ROOT / "configs").iterdir():
            assert file.read(f"degflow/configs/{path.name}") == path.read_bytes()
    about = f"degflow-{__version__}.dist-info/"
    assert {"degflow/py.typed", "degflow/models/weights/README.md", about + "licenses/LICENSE"} <= names
    python = {str(path.relative_to(ROOT)) for path in ROOT.glob("degflow/**/*.py")}
    assert {name for name in names if name.endswith(".py")} == python
    assert {name.partition("/")[0] + "/" for name in names} == {"degflow/", about}


def test_a_dataset_is_made_and_exported_from_an_empty_folder(installed, empty):
    (empty / "photos").mkdir()
    for number in range(2):
        Image.effect_noise((64, 48), 40 + number).convert("RGB").save(empty / f"photos/{number}.png")
    degflow = installed / "degflow"
    assert run(degflow, "--version", folder=empty).stdout == f"degflow {__version__}\n"
    words = ("input=photos", "output=runs/dataset", "actors.max=1", "actors.threads=1")
    said = run(degflow, "synthesize", *words, folder=empty).stdout
    assert said.splitlines()[-1] == "preview: runs/dataset/preview.html"
    rows = rows_of(empty / "runs/dataset")
    assert sorted(rows) == [("0.png", 0), ("1.png", 0)]
    assert png(rows["1.png", 0]["lr"]["bytes"]).shape == (48, 64, 3)
    run(installed / "python", "-m", "degflow", "export", "input=runs/dataset", "output=paired", folder=empty)
    for folder in ("gt", "lq"):
        with Image.open(next((empty / "paired" / folder).glob("1*.png"))) as image:
            assert image.size == (64, 48)


def test_a_training_takes_a_configuration_that_ships_by_its_name(installed, empty):
    photo = np.asarray(Image.effect_noise((64, 64), 50).convert("RGB"))
    save_scenes(empty / "scenes", [photo, photo[::-1].copy()], ("2", "4"))
    words = ("config=small_rae", "scenes.data=scenes", "output=rae", *TINY)
    said = run(installed / "degflow", "train-rae", *words, folder=empty).stdout
    assert re.search(r"^step 2 of 2: ", said, re.M)
    assert (empty / "rae/rae.safetensors").stat().st_size > 0
    used = config.read((empty / "rae/config.yaml").read_text())
    ships = config.read((ROOT / "configs/small_rae.yaml").read_text())
    assert (used["skips"], used["autoencoder"]["gate_init"]) == ("optics", ships["autoencoder"]["gate_init"])
    assert used["fit"]["learning_rate"] == ships["fit"]["learning_rate"]


def test_help_and_errors_of_an_installed_command(installed, empty):
    said = run(installed / "degflow", "evaluate", "--help", folder=empty).stdout
    assert said.startswith("Compare a degrader's LR images")
    words = ("train-lfm", "config=nonsense", "output=x")
    said = run(installed / "degflow", *words, folder=empty, code=2).stderr
    names = ", ".join(sorted(path.stem for path in (ROOT / "configs").iterdir()))
    assert said == f"error: config=nonsense: no such file, and none of those that ship: {names}\n"
