"""The linters of shell scripts and of the Dockerfile, and what the Dockerfile takes from this repository."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests import ROOT

SCRIPTS = [ROOT / ".ci/run", *sorted(ROOT.rglob("*.sh")), *sorted(ROOT.rglob("*.sbatch"))]
SCRIPTS = [path for path in SCRIPTS if not {".venv", "runs", "node_modules"} & set(path.relative_to(ROOT).parts)]
DOCKERFILE = ROOT / "cluster/Dockerfile"


def lint(tool, *words, text=None):
    program = shutil.which(tool, path=Path(sys.executable).parent)
    assert program, f"{tool} is not installed"
    done = subprocess.run([program, *words], input=text, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_the_scripts_are_all_there():
    names = {str(path.relative_to(ROOT)) for path in SCRIPTS}
    wanted = {".ci/run", "tests/run.sh", "examples/run.sh", "cluster/train.sh"}
    assert wanted | {f"cluster/slurm/{name}.sbatch" for name in ("synthesize", "train")} <= names


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_script_passes_shellcheck(path):
    assert lint("shellcheck", path) == (0, "")


def test_shellcheck_sees_an_unquoted_variable():
    code, said = lint("shellcheck", "-", text="#!/bin/bash\nrm -rf $1\n")
    assert code == 1
    assert "SC2086" in said


@pytest.mark.parametrize("file", [DOCKERFILE, ROOT / "cluster/ray/Dockerfile"], ids=("cluster", "ray"))
def test_a_dockerfile_passes_hadolint(file):
    assert lint("hadolint", file) == (0, "")


def test_hadolint_sees_an_unpinned_base_and_package():
    code, said = lint("hadolint", "-", text="FROM python\nRUN apt-get install wget\n")
    assert code == 1
    assert {"DL3006", "DL3008"} <= set(re.findall(r"DL\d+", said))


def test_the_image_is_pinned_and_not_root_s():
    text = DOCKERFILE.read_text()
    bases = re.findall(r"^FROM (\S+)", text, re.M)
    assert len(bases) == 2
    assert all(re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+(@sha256:[0-9a-f]{64})?", base) for base in bases)
    assert re.findall(r"^USER (\d+)", text, re.M) == ["1000"]
    assert text.index("\nUSER") > text.rindex("\nCOPY")


def test_what_the_image_copies_is_in_its_context():
    ignore = (ROOT / "cluster/Dockerfile.dockerignore").read_text().split()
    assert ignore[0] == "*"
    allowed = {line[1:] for line in ignore if line.startswith("!")}
    copied = [line.split()[1:-1] for line in DOCKERFILE.read_text().splitlines() if re.match("COPY (?!--from)", line)]
    assert {source for sources in copied for source in sources} == allowed
    assert all((ROOT / source).exists() for source in allowed)


def test_the_image_s_packages_are_exact_and_satisfy_pyproject():
    lines = (ROOT / "cluster/requirements.txt").read_text().splitlines()
    pins = dict(re.fullmatch(r"([a-z0-9_-]+)==(\S+)", line).groups() for line in lines if not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dependencies"]
    for requirement in map(Requirement, project["dependencies"]):
        assert requirement.specifier.contains(pins[requirement.name], prereleases=True), requirement
    assert {"setuptools", "triton", "nvidia-nccl-cu13"} <= pins.keys()
