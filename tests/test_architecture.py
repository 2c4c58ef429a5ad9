"""DESIGN's picture as a test: who may import whom, and what stays out of `import degflow`."""

import ast
import subprocess
import sys

import pytest

from tests import ROOT

FLOORS = (  # a room may import those on the floors below its own, and none beside it
    {"jobs"},
    {"protocol", "benchmarking"},
    {"restoration"},
    {"training"},
    {"synthesis", "evaluation"},
    {"degrader", "objectives", "dataset"},
    {"models", "capture"},
    {"storage", "tiling", "flow", "perceptual"},
    {"trajectory", "images", "config"},
)
FENCES = {  # a package, and the rooms that may import it
    "ray": {"synthesis"},
    "accelerate": {"training"},
    "omegaconf": {"config"},
    "fsspec": {"storage"},
    "s3fs": set(),
    "pyarrow": {"benchmarking", "evaluation", "dataset", "synthesis"},
    "lpips": {"perceptual"},
    "spandrel": {"restoration"},
    "scipy": {"benchmarking"},
    "cv2": {"benchmarking"},
}
APART = {"training", "restoration"}, "synthesis"  # they meet in a checkpoint
TORCH_ONLY = {"trajectory", "flow", "tiling"}
SLOW = ("ray", "accelerate", "lpips", "torchvision", "pyarrow", "tensorboard", "datasets", "s3fs", "skimage", "scipy")
SLOW += ("spandrel",)


def room_of(path):
    relative = path.relative_to(ROOT)
    if relative.parts[0] == "jobs":
        return "jobs"
    return (
        "__init__"
        if relative.name == "__init__.py" and len(relative.parts) == 2
        else relative.parts[1].removesuffix(".py")
    )


def imports_of(source):
    """Full names that a module's text imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield ast.literal_eval(node.args[0])


def floor_of(room):
    found = [number for number, rooms in enumerate(FLOORS) if room in rooms]
    assert found, f"{room}: a room that FLOORS does not know"
    return found[0]


def offences(room, source):
    """What a module of this room imports against DESIGN."""
    for name in imports_of(source):
        package, *rest = name.split(".")
        if room not in FENCES.get(package, {room}):
            yield f"{room} imports {name}: only {sorted(FENCES[package])} may"
        if room in TORCH_ONLY and package not in {"torch", "degflow"} | sys.stdlib_module_names:
            yield f"{room} imports {name}: it is for torch alone"
        if package != "degflow" or room == "__init__":
            continue
        other = rest[0] if rest else "__init__"
        if other == room:
            continue
        if room in TORCH_ONLY and other not in TORCH_ONLY and name != "degflow.config.option":
            yield f"{room} imports {name}: it is for torch, rooms of torch alone and degflow.config.option"
        if room in APART[0] and other == APART[1]:
            yield f"{room} imports {name}: they meet in a checkpoint"
        if other == "__init__" or other not in set().union(*FLOORS) or floor_of(other) <= floor_of(room):
            yield f"{room} imports {name}: it is not on a floor below"


MODULES = sorted([*ROOT.glob("degflow/**/*.py"), *ROOT.glob("jobs/*.py")])


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_design_allows(path):
    room = room_of(path)
    assert room == "__init__" or floor_of(room) >= 0
    assert list(offences(room, path.read_text())) == []


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("dataset", "import ray"),
        ("degrader", "def f():\n    from ray.data import Dataset"),
        ("jobs", "from accelerate import Accelerator"),
        ("images", "from omegaconf import OmegaConf"),
        ("capture", "import fsspec"),
        ("capture", "import pyarrow.parquet as pq"),
        ("objectives", "import lpips"),
        ("jobs", "import importlib\nimportlib.import_module('ray')"),
        ("training", "from degflow.synthesis import synthesize"),
        ("evaluation", "from degflow.synthesis import synthesize"),
        ("dataset", "from degflow.synthesis.inventory import list_input"),
        ("synthesis", "from degflow import training"),
        ("degrader", "from degflow.evaluation import psnr"),
        ("storage", "from degflow.capture.scenes import Scene"),
        ("images", "from degflow.storage import Place"),
        ("config", "from degflow import degrader"),
        ("degrader", "from degflow import Degrader"),
        ("capture", "import jobs.simulate_scenes\nimport degflow"),
        ("flow", "import numpy as np"),
        ("trajectory", "from degflow import images"),
        ("storage", "from degflow.models.files import load_checkpoint"),
    ],
)
def test_the_walk_sees_each_kind_of_offence(room, line):
    assert list(offences(room, line))


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("synthesis", "import ray.data"),
        ("training", "from degflow import config, images\nfrom degflow.storage import Place"),
        (
            "models",
            "from degflow.config import option\nfrom degflow.models.velocity import VelocityConfig\nimport math",
        ),
        ("jobs", "from degflow.training.loop import fit\nfrom degflow import evaluation"),
        ("evaluation", "from degflow.degrader import Degrader"),
        ("dataset", "import pyarrow\nfrom degflow.storage import Place"),
    ],
)
def test_the_walk_allows_what_design_draws(room, line):
    assert list(offences(room, line)) == []


def test_no_room_is_a_drawer():
    names = {part.removesuffix(".py") for path in MODULES for part in path.relative_to(ROOT).parts}
    assert not names & {"utils", "util", "misc", "helpers", "helper", "common", "tools"}


def test_jobs_are_scripts_that_no_room_imports():
    assert not (ROOT / "jobs/__init__.py").exists()
    for path in ROOT.glob("jobs/*.py"):
        assert '__name__ == "__main__"' in path.read_text(), path


def test_codec_processes_need_no_torch():
    script = (
        "import sys\nimport degflow.synthesis.codec\nprint([name for name in ('torch', 'ray') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_import_degflow_is_light():
    script = (
        "import sys, time\nstart = time.perf_counter()\nimport degflow\nseconds = time.perf_counter() - start\n"
        f"print([name for name in {SLOW} if name in sys.modules], seconds)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy, seconds = done.stdout.rsplit(maxsplit=1)
    assert heavy == "[]"
    assert float(seconds) < 30  # torch alone takes 1 to 8, more on a busy machine
