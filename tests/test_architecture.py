"""docs/architecture.md as a test: which room may import which, and what `import degflow` does not load."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter

import pytest

from degflow.__main__ import COMMANDS
from tests import ROOT
from tests.conftest import GROUPS, group_of

FLOORS = (  # from the top down; a room may import the rooms on lower floors only
    {"jobs"},
    {"__main__"},
    {"protocol", "benchmarking"},
    {"restoration"},
    {"training"},
    {"synthesis", "evaluation"},
    {"degrader", "objectives", "dataset"},
    {"models", "capture"},
    {"storage", "tiling", "flow", "perceptual"},
    {"trajectory", "images", "config"},
)
FENCES = {  # package -> the rooms that may import it
    "ray": {"synthesis"},
    "accelerate": {"training"},
    "omegaconf": {"config"},
    "yaml": {"config"},
    "fsspec": {"storage"},
    "s3fs": set(),
    "pyarrow": {"benchmarking", "evaluation", "dataset", "synthesis"},
    "lpips": {"perceptual"},
    "spandrel": {"restoration"},
    "scipy": {"benchmarking"},
    "huggingface_hub": {"models"},
    "cv2": {"benchmarking"},
    "http": {"evaluation"},
}
APART = {"training", "restoration"}, "synthesis"  # they share checkpoint files, not code
TORCH_ONLY = {"trajectory", "flow", "tiling"}
SLOW = ("ray", "accelerate", "lpips", "torchvision", "pyarrow", "tensorboard", "datasets", "s3fs", "skimage", "scipy")
SLOW += ("spandrel", "huggingface_hub")
MOST_MODULES, MOST_FOLDERS = 10, 9  # directly in degflow/, beside __main__, which is a door as jobs/ is


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
    """Full names that a module's text imports, inside functions too."""
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
    assert found, f"{room}: this room stands on none of the FLOORS"
    return found[0]


def offences(room, source):
    """A sentence for each import that a module of this room must not have."""
    for name in imports_of(source):
        package, *rest = name.split(".")
        if room not in FENCES.get(package, {room}):
            yield f"{room} imports {name}: only {sorted(FENCES[package])} may"
        if room in TORCH_ONLY and package not in {"torch", "degflow"} | sys.stdlib_module_names:
            yield f"{room} imports {name}: it may import torch only"
        if package != "degflow" or room == "__init__" or name == "degflow.__version__":
            continue
        other = rest[0] if rest else "__init__"
        if other == room:
            continue
        if room in TORCH_ONLY and other not in TORCH_ONLY and name != "degflow.config.option":
            yield f"{room} imports {name}: it may import torch, {sorted(TORCH_ONLY)} and degflow.config.option only"
        if room in APART[0] and other == APART[1]:
            yield f"{room} imports {name}: they share checkpoint files, not code"
        if other == "__init__" or other not in set().union(*FLOORS) or floor_of(other) <= floor_of(room):
            yield f"{room} imports {name}: it is not on a floor below"


MODULES = sorted([*ROOT.glob("degflow/**/*.py"), *ROOT.glob("jobs/*.py")])


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_its_floor_allows(path):
    room = room_of(path)
    if room != "__init__":
        floor_of(room)  # it stands on one
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
        ("protocol", "from degflow.__main__ import COMMANDS"),
        ("__main__", "def train():\n    import accelerate"),
        ("flow", "import numpy as np"),
        ("trajectory", "from degflow import images"),
        ("storage", "from degflow.models.files import load_checkpoint"),
        ("synthesis", "from http.server import ThreadingHTTPServer"),
    ],
)
def test_each_kind_of_forbidden_import_is_seen(room, line):
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
        ("__main__", "from degflow import config\nfrom degflow.protocol.run import run_protocol"),
        ("dataset", "import pyarrow\nfrom degflow.storage import Place"),
        ("evaluation", "import http.server\nfrom degflow.capture.filters import blur"),
    ],
)
def test_allowed_imports_pass(room, line):
    assert list(offences(room, line)) == []


def module_graph(sources):
    """Module -> the modules among `sources` (module -> text) that it imports."""
    graph = {}
    for module, source in sources.items():
        names = set(imports_of(source))
        # `from degflow.flow import SOLVERS` names a module and a thing in it
        graph[module] = {name if name in sources else name.rpartition(".")[0] for name in names} & sources.keys()
        graph[module].discard(module)
    return graph


def circle(graph):
    """Modules that import each other in a circle; [] where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_circle_of_modules():
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in MODULES}
    sources = {name.removesuffix(".__init__"): path.read_text() for path, name in names.items()}
    graph = module_graph(sources)
    assert sum(map(len, graph.values())) > 100  # the imports were found
    assert circle(graph) == []


@pytest.mark.parametrize(
    "sources",
    [
        {"degflow.a.x": "from degflow.a.y import f", "degflow.a.y": "def g():\n    import degflow.a.x"},
        {"degflow.a.x": "from degflow.a import y", "degflow.a.y": "from degflow.a import x"},
        {"degflow.a": "from degflow.a.x import f", "degflow.a.x": "from degflow.a import f"},
        {
            "degflow.a.x": "import degflow.a.y",
            "degflow.a.y": "from degflow.a.z import f",
            "degflow.a.z": "from degflow.a import x",
        },
    ],
)
def test_a_circle_inside_a_room_is_seen(sources):
    assert set(circle(module_graph(sources))) == set(sources)


def rooms_in(folder):
    """The modules directly in a folder, and its folders that hold modules."""
    modules = sorted({*folder.glob("*.py")} - {folder / "__main__.py"})
    return modules, sorted({path.parent for path in folder.glob("*/*.py")})


def is_small(folder):
    modules, folders = rooms_in(folder)
    return len(modules) <= MOST_MODULES and len(folders) <= MOST_FOLDERS


def test_degflow_has_few_modules_and_folders_at_its_root():
    modules, folders = rooms_in(ROOT / "degflow")
    assert len(modules) > 5
    assert len(folders) > 5
    assert is_small(ROOT / "degflow"), [path.name for path in (*modules, *folders)]


@pytest.mark.parametrize(("modules", "folders", "small"), [(10, 9, True), (11, 9, False), (10, 10, False)])
def test_a_module_or_folder_too_many_is_seen(tmp_path, modules, folders, small):
    files = (
        ["__main__.py"]
        + [f"m{n}.py" for n in range(modules)]
        + [f"f{n}/__init__.py" for n in range(folders)]
        + ["data/weights"]
    )
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    assert is_small(tmp_path) == small


PAGE = (ROOT / "docs/architecture.md").read_text()


def test_the_page_s_floors_are_these():
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", PAGE, re.M)
    assert [int(number) for number, _ in rows] == list(range(len(FLOORS), 0, -1))
    assert tuple(set(re.findall(r"`(\w+)`", rooms)) for _, rooms in rows) == FLOORS


def reachable(graph):
    """Each room with all rooms that a chain of imports leads to, `config` left out."""
    found = {room: set(others) for room, others in graph.items()}
    for _ in FLOORS:
        found = {room: others.union(*(found.get(other, set()) for other in others)) for room, others in found.items()}
    return {room: others - {"config"} for room, others in found.items() if others - {"config"}}


def test_the_page_s_arrows_are_the_imports():
    arrows = re.findall(r"^  (\w+) --> (.+)$", PAGE, re.M)
    imports = {}
    for path in MODULES:
        names = {name.split(".")[1] for name in imports_of(path.read_text()) if name.startswith("degflow.")}
        imports.setdefault(room_of(path), set()).update(names - {room_of(path), "__version__"})
    del imports["__init__"]
    assert reachable({room: set(others.split(" & ")) for room, others in arrows}) == reachable(imports)


def test_the_page_s_ten_functions_exist_and_are_those_of_the_room_s_docstring():
    steps = re.findall(r"^\d+\. `(\w+)\.(\w+)` \(`(.*?)\.py`\)", PAGE, re.M)
    assert len(steps) == 10
    for name, method, file in steps:
        found = getattr(importlib.import_module("degflow." + file.replace("/", ".")), name)
        assert found.__module__ == "degflow." + file.replace("/", ".")
        assert method in vars(found)
    told = re.findall(r"^ ?\d+\. `([\w.]+)`", importlib.import_module("degflow.synthesis").__doc__ or "", re.M)
    assert told == [
        f"{file.removeprefix('synthesis/').replace('/', '.')}.{name}.{method}" for name, method, file in steps
    ]


def test_every_test_file_that_starts_ray_is_in_a_group_of_rays():
    files = {str(path.relative_to(ROOT)): path.read_text() for path in ROOT.glob("tests/**/test_*.py")}
    assert {file for group in GROUPS.values() for file in group} <= files.keys()
    starting = {file for file, text in files.items() if re.search(r"^\s*(import|from) ray\b", text, re.M)}
    assert len(starting) > 2
    assert starting <= {*GROUPS["pool"], *GROUPS["runs"], *GROUPS["jobs"]}


def test_a_file_is_a_group_unless_groups_has_it():
    files = ("tests/cluster/test_ray.py", "tests/synthesis/test_pool.py", "tests/test_flow.py", "tests/test_config.py")
    assert [group_of(f"{file}::test[a::b@c]") for file in files] == ["jobs", "pool", *files[2:]]


def test_a_wheel_holds_every_room():
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for path in MODULES} - {(ROOT / "jobs").relative_to(ROOT)}
    assert sorted(packages) == sorted([*(".".join(folder.parts) for folder in folders), "degflow.configs"])


def test_no_room_is_a_drawer():
    names = {part.removesuffix(".py") for path in MODULES for part in path.relative_to(ROOT).parts}
    assert not names & {"utils", "util", "misc", "helpers", "helper", "common", "tools"}


def test_jobs_are_scripts_that_start_the_command_of_their_name():
    jobs = {path.stem: path.read_text() for path in ROOT.glob("jobs/*.py")}
    assert sorted(jobs) == sorted(name.replace("-", "_") for name in COMMANDS)
    for name, text in jobs.items():
        assert f'if __name__ == "__main__":\n    start({name})\n' in text, name


def test_codec_processes_need_no_torch():
    script = (
        "import sys\nimport degflow.synthesis.codec\nprint([name for name in ('torch', 'ray') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("use", ["", "from degflow.__main__ import main\nmain(['--help'])\n"])
def test_import_degflow_and_the_list_of_commands_are_light(use):
    script = f"import sys\nimport degflow\n{use}print([name for name in {SLOW} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
