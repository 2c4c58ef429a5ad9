"""What a run says of its cluster: no Ray at the address, no node for an actor, none that starts, no compiler."""

import http.server
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray

from degflow.config import load
from degflow.synthesis import cluster, pool
from degflow.synthesis.cluster import NoCompiler, check_address, check_compiler
from degflow.synthesis.run import synthesize
from degflow.synthesis.settings import SynthesizeConfig
from tests import ROOT
from tests.sources import rows_of
from tests.synthesis.clusters import own_cluster
from tests.synthesis.test_pool import OnCpu, hooked


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """A Ray folder of this test's own, and no address."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster, "ANSWERS_WITHIN", 0)
    (tmp_path / "ray").mkdir()
    return tmp_path / "ray/ray_current_cluster"


@pytest.fixture
def other_program():
    """The port of a server that is no Ray."""
    server = http.server.HTTPServer(("0.0.0.0", 0), http.server.SimpleHTTPRequestHandler)  # Ray takes a node's address
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def test_a_ray_that_answers_is_joined(shared_ray, elsewhere, monkeypatch):
    check_address()  # no address: Ray starts one
    address = ray.get_runtime_context().gcs_address
    elsewhere.write_text(address)
    check_address()
    monkeypatch.setenv("RAY_ADDRESS", address)
    check_address()
    monkeypatch.setenv("RAY_ADDRESS", "local")
    check_address()


def test_an_address_of_a_dead_ray_is_named_with_what_to_do(elsewhere, monkeypatch, other_program):
    elsewhere.write_text("127.0.0.1:1")
    with pytest.raises(OSError, match=rf"^no Ray answers at .*:1 \(.*refused\), which the file {elsewhere} names.*local"):
        check_address()
    for address in (f"127.0.0.1:{other_program}", f"ray://127.0.0.1:{other_program}"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(OSError, match=rf"\(what answers there is another program\), which RAY_ADDRESS={address}"):
            check_address()


def test_a_job_ends_soon_if_its_ray_is_dead(model, photos, tmp_path):
    words = [f"input={photos}", f"output={tmp_path}/out", f"model={model}"]
    process = subprocess.run(
        [sys.executable, ROOT / "jobs/synthesize.py", *words],
        env=os.environ | {"RAY_ADDRESS": "127.0.0.1:1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1].startswith("error: no Ray answers at ")
    assert "rpc_client" not in process.stderr


def test_a_run_says_what_it_waits_for_until_it_comes(photos, model, tmp_path, monkeypatch, capsys):
    gate, said, lines = tmp_path / "gate", [], {}
    monkeypatch.setattr(pool, "_ShardActor", OnCpu)
    monkeypatch.setattr(cluster, "FIRST_WORD", 0.5)
    monkeypatch.setattr(cluster, "NEXT_WORD", 0.5)
    monkeypatch.setattr(pool.tqdm, "write", lambda bar, line: said.append(line))
    words = [f"input={photos}", f"output={tmp_path}/out", f"model={model}", "actors.gpus=1", "actors.threads=1"]

    def wait_for(name, text):
        deadline = time.monotonic() + 120
        while sum(text in line for line in list(said)) < 2:
            assert time.monotonic() < deadline, said
            time.sleep(0.1)
        lines[name] = next(line for line in said if text in line)

    def open_the_gates(ray_cluster):
        wait_for("GPU", "no node of the cluster has a GPU")
        ray_cluster.add_node(num_cpus=1, num_gpus=1)
        wait_for("start", "no actor runs, though a node has room for one")
        gate.touch()

    (tmp_path / "bash").symlink_to("/bin/bash")  # all that Ray itself needs
    environment = hooked("wait_at_gate", DEGFLOW_GATE=str(gate), PATH=str(tmp_path))
    with own_cluster({"num_cpus": 1}, runtime_env=environment) as (ray_cluster, _), ThreadPoolExecutor(1) as thread:
        opened = thread.submit(open_the_gates, ray_cluster)
        synthesize(load(SynthesizeConfig, [*words, "limit=3"]))
        opened.result()
        with pytest.raises(OSError, match=r"actors\.compile=true: .* has no compiler \(g\+\+\)"):
            synthesize(load(SynthesizeConfig, [*words, "extend=true", "actors.compile=true"]))
    assert len(rows_of(tmp_path / "out")) == 3
    assert "actors.gpus=0" in lines["GPU"]
    assert "worker-*.err" in lines["start"]
    assert "actors.gpus=1: no node of the cluster has a GPU. Waiting for one" in capsys.readouterr().out  # at once


def test_threads_that_no_node_has_are_named(shared_ray):
    assert cluster.lack(0, 2) == ""
    assert cluster.lack(0, 3).startswith("actors.threads=3: no node of the cluster has so many CPUs. Waiting for one")


def test_work_of_others_is_named(shared_ray):
    @ray.remote(num_cpus=2)
    class Other:
        def answer(self):
            return 1

    other = Other.remote()
    assert ray.get(other.answer.remote()) == 1
    deadline = time.monotonic() + 30
    while "other jobs hold the CPUs" not in cluster.unstarted(0, 1):
        assert time.monotonic() < deadline, cluster.unstarted(0, 1)
        time.sleep(0.1)
    ray.kill(other)


def test_a_compiler_is_one_on_the_path_or_one_that_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    for device, name in (("cpu", "CXX"), ("cuda", "CC")):
        with pytest.raises(NoCompiler, match=name):
            check_compiler(device)
        monkeypatch.setenv(name, sys.executable)
        check_compiler(device)
        monkeypatch.setenv(name, str(Path(sys.executable).parent / "none"))
        with pytest.raises(NoCompiler, match="none"):
            check_compiler(device)
