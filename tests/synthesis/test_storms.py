"""Synthesis over a real S3 server: killed drivers, stores and nodes, a failing network, two drivers; one dataset."""

import io
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from degflow import images, storage
from degflow.config import load
from degflow.dataset.footer import body_sha256
from degflow.storage import Place
from degflow.synthesis.run import synthesize
from degflow.synthesis.settings import SynthesizeConfig
from tests import ROOT
from tests.faults import proxying
from tests.finished import synthesize_here
from tests.synthesis.clusters import own_cluster

JOB = ROOT / "jobs" / "synthesize.py"
PHOTOS, SHARD = 40, 8
WORDS = (f"shard.images={SHARD}", "actors.threads=1", "batch=2")
LAYOUT = r"(config\.yaml|manifest\.parquet|README\.md|croissant\.json|preview\.(png|html)|_SUCCESS"
LAYOUT += r"|(plan|data)/part-\d{6}\.parquet|rejects/part-000000\.parquet)"


@pytest.fixture(scope="module")
def photos(s3):
    return save_small_photos(s3.uri("photos"))


@pytest.fixture(scope="module")
def reference(one_thread, s3, photos, model):
    """The rows of an uninterrupted run, without Ray."""
    output = s3.uri("reference")
    synthesize_here(photos, output, model, *WORDS)
    return rows_of(output)


def save_small_photos(uri):
    """Forty small photographs, and a text file."""
    place, random = Place(uri), np.random.default_rng(0)
    for number in range(PHOTOS):
        pixels = random.integers(0, 256, (24 + number % 3 * 8, 32, 3), np.uint8)
        place.write(f"a b/{number % 4}#%20/{number:03d}.png", images.encode_png(pixels))
    place.write("notes.txt", b"no image")
    return uri


def run(photos, output, model, *words):
    synthesize(load(SynthesizeConfig, [f"input={photos}", f"output={output}", f"model={model}", *words]))


def driver(photos, output, model, *words, environment=None):
    """The job as a user starts it; it starts a Ray of its own unless the environment says otherwise."""
    command = [sys.executable, JOB, f"input={photos}", f"output={output}", f"model={model}", *WORDS, *words]
    variables = os.environ | {"RAY_ADDRESS": "local"} | (environment or {})
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(JOB.parents[1]), variables.get("PYTHONPATH")]))
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, f"{out}\n{err}"
    return out


def scale_and_bytes(row):
    return row["scale"], row["lr"]["bytes"], row["hr"]["bytes"]


def rows_of(output, told=scale_and_bytes):
    """(key, draw) -> what is `told` of a row; fails if one comes twice, or if any file is not of the layout."""
    place, rows = Place(output), {}
    names = [file.key for file in place.files()]
    assert [name for name in names if not re.fullmatch(LAYOUT, name)] == []
    assert "_SUCCESS" in names
    manifest = pq.read_table(io.BytesIO(place.read("manifest.parquet"))).to_pylist()
    assert [record["part"] for record in manifest] == [name for name in names if name.startswith("data/")]
    for record in manifest:
        part = io.BytesIO(place.read(record["part"]))
        assert (len(part.getvalue()), body_sha256(part)) == (record["bytes"], record["sha256"])
        found = pq.read_table(part).to_pylist()
        assert len(found) == record["rows"]
        for row in found:
            assert (row["key"], row["draw"]) not in rows
            rows[row["key"], row["draw"]] = told(row)
    return rows


def shards_in(output):
    return len(Place(output).files("data"))


def wait_for(condition, process=None, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not come"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.02)


def test_the_uninterrupted_run_has_every_photograph_once(photos, reference):
    keys = [file.key for file in Place(photos).files() if file.key.endswith(".png")]
    assert sorted(reference) == [(key, 0) for key in keys]
    assert len(reference) == PHOTOS


def test_a_killed_driver_and_a_restarted_store_change_nothing(s3, shared_ray, photos, model, reference, capfd):
    output = s3.uri("killed")
    process = driver(photos, output, model, "actors.max=1")
    wait_for(lambda: shards_in(output) >= 2, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert 2 <= shards_in(output) < PHOTOS // SHARD
    assert not Place(output).exists("_SUCCESS")
    with ThreadPoolExecutor(1) as thread:

        def restart():
            wait_for(lambda: shards_in(output) >= 3)
            assert not Place(output).exists("_SUCCESS")  # it runs still
            s3.kill()
            time.sleep(1)
            s3.start()

        restarted = thread.submit(restart)
        run(photos, output, model, *WORDS)
        restarted.result()
    said, errors = capfd.readouterr()
    assert re.search(r"40 images .* in 5 shards, [2-4] of them done", said)
    assert said.splitlines()[-1] == f"preview: {output}/preview.html"
    assert "Traceback" not in errors
    assert rows_of(output) == reference


def test_a_network_that_fails_changes_nothing(s3, photos, model, reference):
    output = s3.uri("faults")
    with proxying(s3.endpoint, rate=0.08, seed=1) as (proxy, endpoint):
        finish(driver(photos, output, model, environment={"AWS_ENDPOINT_URL": endpoint}))
    assert rows_of(output) == reference
    assert {"throttle", "reset", "delay", "truncate", "lost answer"} <= proxy.met.keys()


def test_photographs_that_are_throttled_for_longer_than_a_shard_waits_come_later(s3, photos, model, reference):
    output = s3.uri("throttled")
    with proxying(s3.endpoint) as (proxy, endpoint):
        variables = {"AWS_ENDPOINT_URL": endpoint, "DEGFLOW_PATIENCE": "0.5", "PYTHONUNBUFFERED": ""}
        process = driver(photos, output, model, "actors.max=1", "shard.images=2", environment=variables)
        wait_for(lambda: shards_in(output) >= 1, process)
        proxy.throttled = f"{photos.removeprefix('s3:/')}/"  # all photographs
        later = next((line for line in process.stdout if "comes again later" in line), "")
        proxy.throttled = None
        finish(process)
    assert re.search(r"^shard \d comes again later: the store does not give a b/.*\.png", later)
    found = rows_of(output)  # their windows are others, so LR may be rounded otherwise
    assert {key: (scale, hr) for key, (scale, _, hr) in found.items()} == {
        key: (scale, hr) for key, (scale, _, hr) in reference.items()
    }


def test_two_drivers_on_one_output_are_harmless(s3, shared_ray, photos, model, reference):
    output = s3.uri("two")
    joined = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    pair = [driver(photos, output, model, "actors.max=1", environment=joined) for _ in range(2)]
    for process in pair:
        finish(process)
    assert rows_of(output) == reference


def test_new_files_are_named_and_taken_when_asked(s3, photos, model, capsys):
    place, output = Place(s3.uri("growing")), s3.uri("grown")
    first = Place(photos).files()[1]
    for name in ("a.png", "b.png", "c.png"):
        place.write(name, Place(photos).read(first.key))
    words = ("shard.images=2", "actors.threads=1")
    synthesize_here(place.uri, output, model, *words)
    before = {file.key: file.etag for file in Place(output).files() if file.key.startswith(("data/", "plan/"))}
    place.write("0.png", Place(photos).read(first.key))
    place.write("d.png", b"broken")
    synthesize_here(place.uri, output, model, *words)
    assert "2 new in" in capsys.readouterr().out
    synthesize_here(place.uri, output, model, *words, "extend=true", "dry_run=true")
    assert "5 images (" in capsys.readouterr().out
    assert len(rows_of(output)) == 3
    with pytest.raises(ValueError, match=r"1 of 5 files were rejected.*d\.png \(decode"):
        synthesize_here(place.uri, output, model, *words, "extend=true")
    assert not Place(output).exists("_SUCCESS")
    synthesize_here(place.uri, output, model, *words, "extend=true", "max_reject_rate=0.5")
    assert sorted(key for key, _ in rows_of(output)) == ["0.png", "a.png", "b.png", "c.png"]
    place.write("d.png", Place(photos).read(first.key))
    synthesize_here(place.uri, output, model, *words, "retry_rejects=true")
    said = capsys.readouterr().out
    assert "5 LR images of 5 photographs in 4 shards, 0 rejects" in said
    assert sorted(key for key, _ in rows_of(output)) == ["0.png", "a.png", "b.png", "c.png", "d.png"]
    manifest = pq.read_table(io.BytesIO(Place(output).read("manifest.parquet"))).to_pylist()
    assert [(row["rows"], row["rejects"], row["retried"]) for row in manifest] == [
        (2, 0, 0),
        (1, 0, 0),
        (1, 1, 1),
        (1, 0, 0),
    ]
    after = {file.key: file.etag for file in Place(output).files()}
    assert before.items() <= after.items()
    assert "1 rejected" not in Place(output).read("README.md").decode()


def test_globs_and_inventories_are_inputs(s3, photos, model, reference):
    wanted = [key for key, _ in reference if "/1#%20/" in key]
    output = s3.uri("glob")
    synthesize_here(f"{photos}/a b/1*/*.png", output, model, *WORDS)
    found = rows_of(output)
    assert sorted(f"a b/1#%20/{Path(key).name}" for key, _ in found) == sorted(wanted)  # a key starts at the wildcard
    table = pa.table({"key": wanted[::-1], "other": list(range(len(wanted)))})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    inventory = Place(s3.uri("inventory"))
    inventory.write("photos.parquet", buffer.getvalue())
    output = s3.uri("listed")
    synthesize_here(inventory.uri_of("photos.parquet"), output, model, *WORDS, f"root={photos}")
    assert rows_of(output) == {key: value for key, value in reference.items() if key[0] in wanted}


def test_refused_credentials_end_the_job_in_seconds(s3, photos, model):
    variables = {"AWS_SECRET_ACCESS_KEY": "hunter2", "DEGFLOW_PATIENCE": "600"}  # the time that a retry would take
    process = driver(photos, s3.uri("refused"), model, environment=variables)
    started = time.monotonic()
    out, err = process.communicate(timeout=200)
    assert process.returncode == 1
    assert re.search(r"error: output=s3://demo/.*: cannot be read \(PermissionError: ", err.splitlines()[-1])
    assert time.monotonic() - started < 100  # nearly all of it importing, on a busy machine
    for secret in ("hunter2", s3.secret_key):
        assert secret not in out + err


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ({"input": "s3://no-such-bucket/photos"}, r"^input=s3://no-such-bucket/photos: not there \(.*bucket"),
        ({"output": "s3://no-such-bucket/out"}, r"^output=s3://no-such-bucket/out: cannot be written"),
    ],
    ids=["input", "output"],
)
def test_a_bucket_that_is_not_there_ends_the_run_in_seconds(s3, photos, model, places, said, monkeypatch):
    monkeypatch.setattr(storage, "PATIENCE", 600.0)  # the time that a retry would take
    places = {"input": photos, "output": s3.uri("refused")} | places
    started = time.monotonic()
    with pytest.raises(OSError, match=said):
        synthesize_here(places["input"], places["output"], model, *WORDS)
    assert time.monotonic() - started < 60


@pytest.mark.own_ray
def test_a_busy_node_that_is_removed_changes_nothing(s3, photos, model, reference):
    output = s3.uri("node")
    with own_cluster({"num_cpus": 1}, {"num_cpus": 1}) as (cluster, nodes), ThreadPoolExecutor(1) as thread:

        def remove():
            wait_for(lambda: shards_in(output) >= 1)
            assert not Place(output).exists("_SUCCESS")  # it runs still
            cluster.remove_node(nodes[0], allow_graceful=False)

        removal = thread.submit(remove)
        run(photos, output, model, *WORDS, "actors.min=2", "actors.max=2")
        removal.result()
    assert rows_of(output) == reference
