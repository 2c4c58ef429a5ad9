"""Where the pool's work runs on a cluster, and what a decoder that crashes takes along."""

import os
import resource
import sys

import numpy as np
import pytest
import ray
import ray.data
import torch
from ray.cluster_utils import Cluster
from ray.data import ActorPoolStrategy

from degflow import Degrader, images
from degflow.config import load
from degflow.dataset.layout import Record
from degflow.dataset.plan import Plan
from degflow.synthesis.pool import _seldom, _ShardActor
from degflow.synthesis.resuming import first_part
from degflow.synthesis.run import synthesize
from degflow.synthesis.settings import SynthesizeConfig, resolve
from degflow.synthesis.shard import Progress
from tests import ROOT
from tests.hooks import DEADLY
from tests.sources import png, rejects_of, rows_of, save_model


class Watched(_ShardActor):
    """An actor of the pool that makes a shard, then allocates and frees as networks do, and tells what that took."""

    def __call__(self, batch):
        """Reports of the shard; page faults of 640 MiB, 2 MiB each, after some for a start."""
        reports = sum(1 for _ in super().__call__(batch))
        for _ in range(10):
            self.once()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(40):
            self.once()
        return {"faults": [resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before], "reports": [reports]}

    def once(self):
        """Eight tensors alive together."""
        return sum(tensor[0] for tensor in [torch.ones(2**19) for _ in range(8)])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "tiny.safetensors")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number in range(12):
        pixels = random.integers(0, 256, (24, 32, 3), np.uint8)
        (folder / f"{number:02d}.png").write_bytes(images.encode_png(pixels))
    return folder


def run(photos, output, model, *words):
    words = [f"input={photos}", f"output={output}", f"model={model}", "shard.images=3", "actors.threads=1", *words]
    synthesize(load(SynthesizeConfig, words))


def hooked(name, **variables):
    """A runtime environment whose processes call a function of tests.hooks as they start."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {"worker_process_setup_hook": f"tests.hooks.{name}", "env_vars": {"PYTHONPATH": path, **variables}}


@pytest.fixture
def cluster():
    """A head, a node with CPUs, and two nodes that advertise a GPU."""
    ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=8), *(cluster.add_node(num_cpus=1, num_gpus=1) for _ in range(2))]
    yield cluster, [node.node_id for node in nodes]
    ray.shutdown()
    cluster.shutdown()


def test_codecs_run_on_the_cpu_node_and_actors_on_the_gpu_nodes(photos, model, cluster, tmp_path):
    cluster, (cpu, *gpus) = cluster
    trace = tmp_path / "trace"
    ray.init(address=cluster.address, log_to_driver=False, runtime_env=hooked("trace", DEGFLOW_TRACE=str(trace)))
    run(photos, tmp_path / "out", model, "actors.min=2", "actors.device=cpu", "batch=1")
    assert len(rows_of(tmp_path / "out")) == 12
    nodes: dict[str, set[str]] = {}
    for line in trace.read_text().splitlines():
        function, node = line.split()
        nodes.setdefault(function, set()).add(node)
    assert nodes["load"] == nodes["encode"] == {cpu}
    assert nodes["actor"] <= set(gpus)


def test_a_pool_of_compiled_networks_makes_the_same_images(photos, tmp_path):
    model = save_model(tmp_path / "shallow.safetensors", multipliers=(1, 2), blocks=1)  # compiling takes long
    folder, cache = tmp_path / "in", tmp_path / "cache"
    folder.mkdir()
    for name in ("00.png", "01.png"):
        (folder / name).write_bytes((photos / name).read_bytes())
    ray.shutdown()
    ray.init(
        "local", num_cpus=1, log_to_driver=False, runtime_env={"env_vars": {"TORCHINDUCTOR_CACHE_DIR": str(cache)}}
    )
    rows = []
    for name, words in (("plain", ()), ("compiled", ("actors.compile=true",))):
        run(folder, tmp_path / name, model, *words)
        rows.append(rows_of(tmp_path / name))
        assert any(cache.rglob("*.cpp")) == bool(words)  # generated code: the networks were compiled
    assert rows[0].keys() == rows[1].keys()
    for place, row in rows[0].items():
        theirs, ours = (png(r["lr"]["bytes"]).astype(int) for r in (row, rows[1][place]))
        assert np.abs(theirs - ours).max() <= 1
    ray.shutdown()


def test_a_file_that_kills_its_decoder_is_a_reject_and_the_others_are_rows(photos, model, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for photo in photos.iterdir():
        (folder / photo.name).write_bytes(photo.read_bytes())
    for name in ("04b.png", "07b.png"):
        (folder / name).write_bytes(DEADLY)
    ray.shutdown()
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env=hooked("fragile_decoder"),
    )
    try:
        run(folder, tmp_path / "out", model, "actors.max=1", "max_reject_rate=0.5")
    finally:
        ray.shutdown()
    assert len(rows_of(tmp_path / "out")) == 12
    rejects = rejects_of(tmp_path / "out")
    assert {key: row["stage"] for key, row in rejects.items()} == {"04b.png": "decode", "07b.png": "decode"}
    assert all("its process died" in row["error"] for row in rejects.values())


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_an_actor_pages_nothing_in_again_and_reports_less_often_than_images(photos, model, tmp_path):
    words = [f"input={photos}", f"output={tmp_path}", f"model={model}", "batch=1"]
    degrader = Degrader.load(model)
    config = resolve(load(SynthesizeConfig, words), degrader)
    task = Plan.empty().plus(first_part(config)).task(0)  # twelve images, which are reported one by one
    ray.shutdown()
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        found = ray.data.from_arrow(task).map_batches(
            Watched,
            fn_constructor_args=(ray.put(degrader), config, 0, 1),
            compute=ActorPoolStrategy(size=1),
            batch_format="pyarrow",
            num_cpus=1,
        )
        found = found.take(1)[0]
        assert len(rows_of(tmp_path)) == 12
        assert 1 <= found["reports"] < 12
        assert found["faults"] < 640 * 256 / 2  # 256 pages in a MiB; some 5% here, and 75 to 100% without
    finally:
        ray.shutdown()


def test_reports_summed_up_lose_no_count():
    record = Record("data/part-000000.parquet", 3, 1, 1, "", "", 1.0, None, None, None)
    reports = [Progress(1, 0), Progress(1, 1), Progress(0, 0), Progress(2, 0), Progress(0, 0, record)]
    assert list(_seldom(reports, seconds=0)) == reports
    assert list(_seldom(reports, seconds=60)) == [Progress(4, 1, record)]
