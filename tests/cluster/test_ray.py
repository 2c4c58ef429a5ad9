"""cluster/ray: docs/clusters.md's submission command on a real Ray with its dashboard, and the launcher's YAML."""

import contextlib
import copy
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import jsonschema
import numpy as np
import psutil
import pytest
import yaml
from PIL import Image
from ray.autoscaler._private.util import prepare_config, validate_config

from tests import ROOT
from tests.finished import synthesize_here
from tests.ports import free_ports
from tests.sources import content, rows_of, save_model

SHARDS = 16
KEYS = {"shard.images": 1, "scale.per_image": 4, "actors.threads": 1, "actors.max": 1, "actors.gpus": 0}
RAY = str(Path(sys.executable).parent / "ray")


class Cluster:
    """`ray start --head` with its own ports and folder, and the CLI that talks to its dashboard."""

    def __init__(self, folder):
        names = (
            "port",
            "ray-client-server-port",
            "dashboard-agent-listen-port",
            "metrics-export-port",
            "dashboard-port",
        )
        ports = free_ports(len(names))
        self.port = ports[-1]
        options = [f"--{name}={port}" for name, port in zip(names, ports, strict=True)]
        # Another Ray on this machine must not be found, nor its setting of tokens (RAY_AUTH_MODE) be used.
        hidden = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "PYTHONPATH")
        self.environment = {name: value for name, value in os.environ.items() if name not in hidden}
        self.environment |= {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
        self.environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        fixed = [
            "--dashboard-host=127.0.0.1",
            "--num-cpus=2",
            f"--temp-dir={folder}",
            "--disable-usage-stats",
            "--block",
        ]
        self.log = (Path(folder) / "head.log").open("wb")
        self.head = subprocess.Popen(
            [RAY, "start", "--head", *options, *fixed],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )

    def started(self, seconds=300):
        """Whether Ray started; on a busy machine it may exceed its own limit of 30 s and exit."""
        deadline = time.monotonic() + seconds
        while self.head.poll() is None and time.monotonic() < deadline:
            if "Ray runtime started" in Path(self.log.name).read_text():
                with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/version"):
                    return True
            time.sleep(0.5)
        return False

    def stop(self):
        # Killed: a Ray that is told to stop waits up to 30 s for what it ran.
        for process in psutil.Process(self.head.pid).children(recursive=True) if self.head.poll() is None else []:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.head.kill()
        self.head.wait()
        self.log.close()

    def job(self, verb, *words):
        """`ray job VERB` from the clone's root: exit status and what it said."""
        command = [RAY, "job", verb, f"--address=http://127.0.0.1:{self.port}", *words]
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=900, check=False
        )
        return done.returncode, done.stdout + done.stderr

    def submit(self, name, *words, options=()):
        fixed = ["--runtime-env", "cluster/ray/runtime_env.yaml", "--submission-id", name]
        return self.job("submit", *fixed, *options, "--", "python", "jobs/synthesize.py", *words)

    def info(self, name):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/jobs/{name}") as answer:
            return json.load(answer)

    def logs(self, name):
        """What `ray job logs` prints."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/jobs/{name}/logs") as answer:
            return json.load(answer)["logs"]

    def stop_job(self, name):
        """Send what `ray job stop` sends; starting the CLI would take longer than the rest of the job."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/api/jobs/{name}/stop", method="POST")
        with urllib.request.urlopen(request) as answer:
            assert json.load(answer)["stopped"] is True
        deadline = time.monotonic() + 120
        while self.info(name)["status"] == "RUNNING" and time.monotonic() < deadline:
            time.sleep(0.2)


@pytest.fixture(scope="module")
def cluster():
    for _ in range(4):
        folder = tempfile.mkdtemp(prefix="degflow-ray-test-", dir="/tmp")  # short: Ray's sockets lie below it
        cluster = Cluster(folder)
        try:
            if cluster.started():
                yield cluster
                return
            said = Path(cluster.log.name).read_text()
        finally:
            cluster.stop()
            shutil.rmtree(folder, ignore_errors=True)
    pytest.fail(f"Ray did not start:\n{said}")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("submitted")
    (folder / "photos").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (192, 192, 3), np.uint8)
    for number in range(SHARDS):
        Image.fromarray(np.roll(noise, number)).save(folder / f"photos/{number:02d}.png")
    model = save_model(folder / "tiny.safetensors")
    return [f"input={folder}/photos", f"model={model}", *(f"{name}={value}" for name, value in KEYS.items())]


@pytest.fixture(scope="module")
def stopped_and_finished(cluster, words, tmp_path_factory):
    """A job that is stopped amid its shards, then a second one that completes its output.

    Returns the output, the parts that the first one left, and the second one's exit status and text.
    """
    output = tmp_path_factory.mktemp("submitted") / "set"
    assert cluster.submit("stopped", *words, f"output={output}", options=["--no-wait"])[0] == 0
    deadline = time.monotonic() + 600
    while len(list(output.glob("data/part-*"))) < 2:
        assert time.monotonic() < deadline, cluster.logs("stopped")
        assert cluster.info("stopped")["status"] in ("PENDING", "RUNNING"), cluster.logs("stopped")
        time.sleep(0.1)
    cluster.stop_job("stopped")
    assert cluster.info("stopped")["status"] == "STOPPED"
    time.sleep(2)
    assert not (output / "_SUCCESS").exists()
    left = {name: digest for name, digest in content(output).items() if name.startswith("part-")}
    return output, left, *cluster.submit("finished", *words, f"output={output}")


def test_a_submitted_job_succeeds(cluster, stopped_and_finished):
    output, _, code, said = stopped_and_finished
    assert code == 0, said
    assert f"{SHARDS * 4} LR images of {SHARDS} photographs in {SHARDS} shards, 0 rejects" in said
    assert f"dataset: {output}" in said
    assert "running on a Ray cluster (nodes with CPUs: 1): actors on CPUs" in said
    info = cluster.info("finished")
    assert (info["status"], info["driver_exit_code"]) == ("SUCCEEDED", 0)
    assert (output / "_SUCCESS").exists()


@pytest.mark.parametrize(
    ("name", "word", "reason", "driver"),
    [
        ("refused", "scale.high=9", "was trained on scales in [1.0, 4.0]", 2),
    ],
)
def test_a_failing_job_has_its_status_and_says_why(cluster, words, tmp_path, name, word, reason, driver):
    code, said = cluster.submit(name, *words, f"output={tmp_path}/set", word)
    assert code == 1
    assert reason in said
    info = cluster.info(name)
    assert (info["status"], info["driver_exit_code"]) == ("FAILED", driver)
    assert reason in cluster.logs(name)
    assert not (tmp_path / "set").exists()


def test_a_stopped_job_is_completed_by_a_second_submission(words, stopped_and_finished, tmp_path):
    output, left, _, said = stopped_and_finished
    assert 2 <= len(left) < SHARDS
    found = re.search(rf"^{SHARDS} images .* in {SHARDS} shards, (\d+) of them done", said, re.M)
    assert found
    assert len(left) <= int(found[1]) < SHARDS
    assert content(output).items() >= left.items()
    rows = rows_of(output)
    synthesize_here(*(word.partition("=")[2] for word in (words[0], f"output={tmp_path}/here", words[1])), *words[2:])
    told = ("scale", "time", "noise_seed", "hr_sha256", "height", "width")
    expected = {place: [row[name] for name in told] for place, row in rows_of(tmp_path / "here").items()}
    assert {place: [row[name] for name in told] for place, row in rows.items()} == expected
    assert sorted(rows) == [(f"{number:02d}.png", draw) for number in range(SHARDS) for draw in range(4)]


def test_only_sources_are_sent(cluster, stopped_and_finished):
    """The folder that the job ran in has no file that the runtime environment excludes."""
    assert stopped_and_finished[2] == 0
    folders = [Path(path).parent for path in Path(cluster.log.name).parent.glob("**/working_dir_files/*/jobs")]
    assert folders
    for folder in folders:
        names = {path.name for path in folder.iterdir()}
        assert {"degflow", "jobs", "configs", "cluster"} <= names
        assert not names & {".git", ".venv", "tests", "examples", "runs"}
        assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 50e6


LAUNCHER = yaml.safe_load((ROOT / "cluster/ray/cluster.yaml").read_text())


def test_the_launcher_s_file_is_valid():
    config = prepare_config(copy.deepcopy(LAUNCHER))
    validate_config(config)
    types = config["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    assert (types["gpu"]["min_workers"], types["cpu"]["min_workers"]) == (0, 0)
    assert "--dashboard-host=127.0.0.1" in " ".join(config["head_start_ray_commands"])
    assert not config["setup_commands"]
    assert "worker_image" not in str(LAUNCHER)  # one image for all


def test_the_launcher_s_image_has_the_pinned_ray_and_packages():
    pins = dict(re.findall(r"^([a-z0-9-]+)==(\S+)$", (ROOT / "cluster/requirements.txt").read_text(), re.M))
    text = (ROOT / "cluster/ray/Dockerfile").read_text()
    assert f"\nFROM rayproject/ray:{pins['ray']}-py311\n" in text
    assert f" boto3=={pins['botocore']} " in text  # each boto3 belongs to the botocore of its number
    assert "--requirement /tmp/requirements.txt" in text


@pytest.mark.parametrize(
    "path", [("idle_timeout_minutes",), ("docker", "run_options"), ("available_node_types", "gpu", "min_workers")]
)
def test_a_misspelt_field_of_the_launcher_s_file_is_refused(path):
    config = copy.deepcopy(LAUNCHER)
    parent = config
    for step in path[:-1]:
        parent = parent[step]
    parent[path[-1] + "x"] = parent.pop(path[-1])
    with pytest.raises((jsonschema.ValidationError, ValueError, AssertionError), match=f"{path[-1]}x"):
        validate_config(prepare_config(config))
