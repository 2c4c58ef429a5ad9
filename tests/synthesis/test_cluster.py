"""What a run says of its cluster: no Ray at the address, no node for an actor, none that starts, no compiler."""

import http.server
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray

from degflow.synthesis import cluster, pool
from degflow.synthesis.actor import ShardActor
from degflow.synthesis.cluster import NoCompiler, check_address, check_compiler
from tests import ROOT
from tests.sources import rows_of
from tests.synthesis.clusters import own_ray, until
from tests.synthesis.test_pool import run


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
    with pytest.raises(
        OSError, match=rf"^no Ray answers at .*:1 \(.*refused\), which the file {elsewhere} names.*local"
    ):
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


class Toolless(ShardActor):
    """An actor on a machine without compilers."""

    def load(self):
        os.environ["PATH"] = "/nowhere"
        return super().load()


@ray.remote(num_cpus=2)
class Other:
    """All CPUs of the shared Ray, in another's hands."""

    def answer(self):
        return 1


def test_a_run_says_again_and_again_what_it_waits_for_until_it_comes(shared_ray, photos, model, tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(cluster, "FIRST_WORD", 0.5)
    monkeypatch.setattr(cluster, "NEXT_WORD", 0.5)
    monkeypatch.setattr(pool.tqdm, "write", lambda bar, line: said.append(line))
    until(lambda: "no actor runs, though a node has room for one" in cluster.unstarted(0, 1))
    other = Other.remote()
    assert ray.get(other.answer.remote()) == 1
    with ThreadPoolExecutor(1) as thread:
        made = thread.submit(run, photos, tmp_path / "out", model, "limit=3")
        try:
            until(lambda: sum("other jobs hold the CPUs" in line for line in said) >= 2)
        finally:
            ray.kill(other)
        until(lambda: not cluster.unstarted(0, 1))  # an actor runs
        made.result()
    assert len(rows_of(tmp_path / "out")) == 3


@ray.remote(num_cpus=0, num_gpus=1)
class MapWorkerLike:
    """An actor with a GPU, named as Ray Data names its own."""

    def answer(self):
        return 1


@pytest.mark.own_ray
def test_a_run_says_that_other_jobs_hold_the_cpus_for_its_codecs():
    """An actor with a GPU holds no CPU: decoding and encoding do."""
    with own_ray(num_cpus=2, num_gpus=1):
        other = Other.remote()
        assert ray.get(other.answer.remote()) == 1
        until(lambda: "other jobs hold the CPUs of the cluster" in cluster.unstarted(1, 1))
        actor = MapWorkerLike.remote()
        assert ray.get(actor.answer.remote()) == 1
        assert cluster.unstarted(1, 1) == ""
        assert "no node has a free CPU for decoding and encoding" in cluster.unstarted(1, 1, stuck=True)
        ray.kill(other)
        until(lambda: cluster.unstarted(1, 1, stuck=True) == "")


def test_a_watch_tells_whether_an_image_was_made_since_its_last_question(monkeypatch):
    monkeypatch.setattr(cluster, "FIRST_WORD", 0.05)
    monkeypatch.setattr(cluster, "NEXT_WORD", 0.05)
    made, asked = iter([0, 0, 0, 3, 3, *[9] * 1000]), []
    with cluster.Watch(lambda stuck: asked.append(stuck) or "", lambda: next(made), print):
        until(lambda: len(asked) >= 6)
    assert asked[:6] == [False, True, True, False, True, False]


def test_what_no_node_has_is_named_with_what_to_do(shared_ray):
    assert cluster.lack(0, 2) == ""
    assert re.match(r"actors\.threads=3: no node .* so many CPUs\. Waiting for one.*at most 2$", cluster.lack(0, 3))
    assert re.match(r"actors\.gpus=1: no node .* a GPU\. Waiting for one.*actors\.gpus=0$", cluster.unstarted(1, 1))


def test_a_node_without_a_compiler_ends_the_run(shared_ray, photos, model, tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "ShardActor", Toolless)
    with pytest.raises(OSError, match=r"NoCompiler: actors\.compile=true: .* has no compiler \(g\+\+\)"):
        run(photos, tmp_path / "out", model, "limit=3", "actors.compile=true")


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
