"""cluster/slurm/*.sbatch on a real Slurm of two nodes: jobs requeued in mid-run repeat nothing and lose nothing.

They need root and Debian's Slurm: `bash .ci/run` runs them, `bash tests/run.sh` does not.
"""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from tests import ROOT
from tests.slurm import NODES, Slurm
from tests.sources import save_model
from tests.training.test_jobs import LFM, RAE, tree  # noqa: F401 (a fixture)

pytestmark = pytest.mark.root

SHARDS = 24
KEYS = {"shard.images": 1, "actors.threads": 1, "actors.max": 2, "scale.per_image": 4}
STAGE = {"fit.steps": 160, "fit.save_every": 10, "fit.validate_every": 160, "fit.log_every": 50, "fit.workers": 1}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        with Slurm(tmp_path_factory.mktemp("slurm")) as slurm:
            if not slurm.namespaces:
                # Both nodes share this host's ports and address, so Ray can run on one of them only.
                print("namespaces are refused here: synthesize.sbatch is tested on one node, train.sbatch on two")
                slurm.environment["HEAD_ADDRESS"] = "127.0.0.1"
            yield slurm


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    data = pytest.importorskip("skimage.data")
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    for number in range(SHARDS):
        Image.fromarray(data.astronaut()[number : number + 160, 150:310]).save(folder / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "tiny.safetensors")


def words_of(*groups, **more):
    return [f"{name}={value}" for group in (*groups, more) for name, value in group.items()]


def submit(slurm, script, log, *words, nodes=2, options=("--cpus-per-task=1",)):
    options = [f"--nodes={nodes}", f"--output={log}", *options]
    return slurm.submit(*options, ROOT / "cluster/slurm" / script, *words, cwd=ROOT)


def content(output):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((output / "data").iterdir())}


def cut(slurm, verb):
    """Add (verb=add) or delete (del) a hole in the network between the two nodes; both still see the controller."""
    if slurm.namespaces:
        subprocess.run([*slurm.hosts["n2"], "ip", "route", verb, "blackhole", NODES["n1"]], check=True)


def test_a_dataset_goes_on_without_bad_nodes_and_requeued_before_its_time_limit(slurm, photos, model, tmp_path):
    output, log, nodes = tmp_path / "out", tmp_path / "log", 2 if slurm.namespaces else 1
    words = words_of(KEYS, input=photos, output=output, model=model, overwrite="true")  # for the first start only
    # Ray takes a silent node for dead after (1 + 5) x 4 s here, and not after its usual (3 + 10) x 5.
    quick = "RAY_health_check_period_ms=1000,RAY_health_check_timeout_ms=5000,RAY_health_check_failure_threshold=4"
    options = ["--cpus-per-task=2", f"--export=ALL,JOIN_SECONDS=20,{quick}"]
    cut(slurm, "add")
    job = submit(slurm, "synthesize.sbatch", log, *words, nodes=nodes, options=options)
    slurm.until(lambda: len(list(output.glob("data/part-*"))) >= 3, "three shards")
    cut(slurm, "del")
    slurm.run("scancel", "--batch", "--signal=USR1", job)  # as --signal=B:USR1@120 does before the time limit
    slurm.until(lambda: slurm.show(job)["Restarts"] == "1", "the requeue", 120)
    done = content(output)
    assert 3 <= len([name for name in done if name.startswith("part-")]) < SHARDS
    assert not (output / "_SUCCESS").exists()
    said = log.read_text()
    assert ("degflow: without n2: no Ray from there within 20 s" in said) == slurm.namespaces
    assert len(re.findall(r"^degflow: Ray at \S+ with 1 nodes", said, re.M)) == 1
    slurm.until(lambda: len(re.findall("degflow: Ray at", log.read_text())) == 2, "the second Ray")
    cut(slurm, "add")  # a node that dies while the job runs
    slurm.until(lambda: (output / "_SUCCESS").exists() or slurm.show(job)["JobState"] != "RUNNING", "the dataset")
    cut(slurm, "del")
    fields = slurm.wait(job)
    said = log.read_text()
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), said
    assert not Path(f"/tmp/degflow-ray-{job}").exists()  # its Ray has ended, and left nothing
    assert "is requeued; it goes on where it was" in said
    assert len(re.findall(rf"^degflow: Ray at \S+ with {nodes} nodes", said, re.M)) == 3 - nodes
    found = re.findall(rf"^{SHARDS} images .* in {SHARDS} shards, (\d+) of them done;", said, re.M)
    assert len(found) == 1
    assert 3 <= int(found[0]) < SHARDS
    parts = content(output)
    assert len(parts) == SHARDS
    assert parts.items() >= {name: digest for name, digest in done.items() if name in parts}.items()
    rows = [row for path in (output / "data").iterdir() for row in pq.read_table(path).to_pylist()]
    assert len(rows) == SHARDS * 4
    assert {(row["key"], row["draw"]) for row in rows} == {
        (f"{n:02d}.png", draw) for n in range(SHARDS) for draw in range(4)
    }
    assert (output / "_SUCCESS").exists()


@pytest.mark.parametrize(("key", "said"), [("scale.high", "scale.high=9.0"), ("scale.hihg", "scale.hihg")])
def test_a_failing_dataset_job_fails_in_slurm_and_ends_its_ray(slurm, photos, model, tmp_path, key, said):
    log = tmp_path / "log"
    words = words_of(input=photos, output=tmp_path / "out", model=model, **{key: 9})
    job = submit(slurm, "synthesize.sbatch", log, *words, nodes=1)
    fields = slurm.wait(job)
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", "2:0", "0")
    assert said in log.read_text()
    assert ("degflow: Ray at" in log.read_text()) == (key == "scale.high")  # what --check finds starts no Ray


def stage(slurm, tmp_path, name, job, keys, **more):
    """Submit a training; returns its number, log and output."""
    output, log = tmp_path / name, tmp_path / f"{name}.log"
    words = words_of(keys, STAGE, output=output, **more)
    return submit(slurm, "train.sbatch", log, f"jobs/train_{job}.py", *words), log, output


def has_checkpoints(output, count=2):
    return lambda: len(list(output.glob("checkpoints/step-*"))) >= count


def same_weights(file, other):
    a, b = load_file(file), load_file(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_both_stages_train_over_two_nodes_and_go_on_when_stopped(slurm, tree, tmp_path):  # noqa: F811
    straight, other, reference = stage(slurm, tmp_path, "straight", "rae", RAE, **{"scenes.data": tree})
    job, log, output = stage(slurm, tmp_path, "preempted", "rae", RAE, **{"scenes.data": tree})
    slurm.until(has_checkpoints(output), "checkpoints")
    # Each node has two CPUs, one for each training: the urgent job takes the place of one of them.
    urgent = ["--partition=urgent", "--nodes=2", "--cpus-per-task=1", "--output=/dev/null", "--wrap=true"]
    slurm.submit(*urgent, cwd=ROOT)
    ends = {number: slurm.wait(number) for number in (straight, job)}
    assert {fields["JobState"] for fields in ends.values()} == {"COMPLETED"}, log.read_text()
    assert sorted(fields["Restarts"] for fields in ends.values()) == ["0", "1"]
    log = log if ends[job]["Restarts"] == "1" else other
    assert re.search(r"^resuming after step \d+ ", log.read_text(), re.M)
    assert same_weights(output / "rae.safetensors", reference / "rae.safetensors")

    keys = {"scenes.data": tree, "rae": output / "rae.safetensors"}
    job, log, output = stage(slurm, tmp_path, "lfm", "lfm", LFM, **keys)
    slurm.until(has_checkpoints(output), "checkpoints")
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    assert slurm.wait(job)["JobState"] == "COMPLETED", log.read_text()
    assert slurm.show(job)["Restarts"] == "1"
    said = log.read_text()
    assert "is requeued; it goes on from its checkpoint" in said
    assert re.search(r"^resuming after step \d+ ", said, re.M)
    assert re.findall(r"^step 160 of 160: ", said, re.M) == ["step 160 of 160: "]
    assert (output / "degrader.safetensors").exists()
