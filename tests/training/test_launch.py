"""Stage 2 under the real `accelerate launch`: killed, warned, over processes and machines, on S3, out of luck."""

import contextlib
import io
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from degflow import config, images, storage
from degflow.models import AutoencoderConfig, ResidualAutoencoder
from degflow.models.files import save_checkpoint
from tests import ROOT

JOB = ROOT / "jobs/train_lfm.py"
# The job without a launcher; it says at its end what it imported of what a local training does not need.
ALONE = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print("foreign:", sorted({"ray", "s3fs", "aiobotocore", "boto3"} & sys.modules.keys()))
"""
STEPS = 56
LEVELS = {"1": 1.0, "2": 2.0, "4": 4.0}
KEYS = {
    "scenes.crop": 16,
    "velocity.width": 8,
    "velocity.blocks": 1,
    "velocity.multipliers": "[1,2]",
    "velocity.dropout": 0.3,
    "lpips_weight": 0,
    "fit.steps": STEPS,
    "fit.batch": 4,
    "fit.learning_rate": 1e-2,
    "fit.workers": 1,
    "fit.log_every": 2,
    "fit.validate_every": 32,
    "fit.save_every": 4,
    "fit.keep": 3,
}


def put_inputs(uri):
    """Three scenes of noise and an untrained autoencoder at a place."""
    place, random = storage.Place(uri), np.random.default_rng(0)
    for scene in range(3):
        for name in ("2/{}_HR", "2/{}_LR2", "4/{}_HR", "4/{}_LR4"):
            pixels = random.integers(0, 256, (24, 20, 3), np.uint8)
            place.write(f"scenes/{name.format(scene)}.png", images.encode_png(pixels))
    torch.manual_seed(0)
    sizes = AutoencoderConfig(4, (1, 2), 1, 2, gate_init=0.5)
    description = {"kind": "autoencoder", "autoencoder": config.plain(sizes), "levels": LEVELS}
    save_checkpoint(f"{uri}/rae.safetensors", ResidualAutoencoder(sizes).state_dict(), description)
    return {"scenes.data": f"{uri}/scenes", "rae": f"{uri}/rae.safetensors"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return put_inputs(str(tmp_path_factory.mktemp("inputs")))


def start(output, inputs, *flags, launcher=True, script=False, limit=None, **changes):
    """The command under `accelerate launch`, or the script; two processes on the CPU; flags replace the launcher's."""
    flags = flags or ("--num_processes", "2", "--main_process_port", "0")
    keys = {**KEYS, **inputs, "output": output, **{name.replace("__", "."): value for name, value in changes.items()}}
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGUSR1",
    }
    job = [str(JOB)] if script or not launcher else ["-m", "degflow", "train-lfm"]
    before = ["-m", "accelerate.commands.launch", "--multi_gpu", *map(str, flags)] if launcher else ["-c", ALONE]
    return subprocess.Popen(
        [sys.executable, *before, *job, *(f"{name}={value}" for name, value in keys.items())],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit else None,
    )


def end(process, seconds=300):
    """What it said, when it has ended by itself, in time."""
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        kill(process)
        pytest.fail(f"still there after {seconds} s:\n{process.communicate()[0]}")


def ranks(process):
    """The launcher's training processes."""
    return sorted(psutil.Process(process.pid).children(), key=lambda rank: int(rank.environ()["RANK"]))


def kill(process):
    """The launcher and all below it, at once."""
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()


def kept(output):
    """Steps of the checkpoints, oldest first."""
    names = [source.key for source in storage.Place(str(output)).files("checkpoints")]
    return [int(name[-11:-3]) for name in names if name.endswith(".pt")]


def wait_for(output, step, process):
    """Wait for a checkpoint of this step or a later one; returns the newest step."""
    limit = time.monotonic() + 120
    while max(kept(output), default=-1) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < limit
        time.sleep(0.01)
    newest = kept(output)[-1]
    assert newest < STEPS - 8, "the training was faster than this test"
    return newest


def state(output):
    """What the last checkpoint holds of the training."""
    assert kept(output)[-1] == STEPS
    data = storage.Place(str(output)).read(f"checkpoints/step-{STEPS:08d}.pt")
    return torch.load(io.BytesIO(data), weights_only=True)


def assert_same_training(one, other):
    """Bit-equal weights, average and optimiser state."""
    one, other = state(one), state(other)
    for part in ("network", "ema"):
        assert one[part].keys() == other[part].keys()
        for name, tensor in one[part].items():
            assert torch.equal(tensor, other[part][name]), (part, name)
    assert one["step"] == other["step"] == STEPS
    torch.testing.assert_close(one["optimizer"], other["optimizer"], rtol=0, atol=0)


def curve(output, folder=None):
    """The logged loss by step, of a local output, or of any output through a local folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for source in storage.Place(str(output)).files("logs") if folder else []:
        (folder / Path(source.key).name).write_bytes(storage.Place(str(output)).read(source.key))
    events = EventAccumulator(str(folder or Path(output) / "logs")).Reload().Scalars("train/cfm")
    return {event.step: event.value for event in events}


@pytest.fixture(scope="module")
def straight(inputs, tmp_path_factory):
    """An uninterrupted run of two processes, and what it said."""
    output = tmp_path_factory.mktemp("straight")
    process = start(output, inputs, script=True)
    said = end(process)
    assert process.returncode == 0, said
    return output, said


def test_one_process_writes_and_speaks(straight):
    output, said = straight
    assert said.count("3 scenes at levels 1, 2, 4") == said.count(f"step {STEPS} of {STEPS}: cfm") == 1
    assert said.count("degrader: ") == 1
    assert len(list((output / "logs").glob("events*"))) == 1
    assert kept(output) == [STEPS - 8, STEPS - 4, STEPS]
    assert list(curve(output)) == list(range(2, STEPS + 1, 2))


def test_no_kind_of_end_changes_a_bit_on_s3(s3, straight, tmp_path):
    uri = s3.uri("training")
    inputs, output = put_inputs(uri), f"{uri}/output"

    process = start(output, inputs)  # everything is killed at once
    wait_for(output, 4, process)
    kill(process)
    process.communicate()

    process = start(output, inputs)  # a rank dies
    wait_for(output, kept(output)[-1] + 1, process)
    everything = psutil.Process(process.pid).children(recursive=True)
    assert len(everything) >= 4  # two ranks and their loader workers
    ranks(process)[1].kill()
    said = end(process)
    assert process.returncode != 0
    assert re.search(r"exitcode\s*: -9 \(pid: \d+\)", said), said
    assert not psutil.wait_procs(everything, timeout=20)[1]

    process = start(output, inputs)  # a rank is warned
    wait_for(output, kept(output)[-1] + 1, process)
    ranks(process)[1].send_signal(signal.SIGUSR1)
    said = end(process)
    assert process.returncode != 0
    assert said.count(f"SIGUSR1: stopped and saved after step {kept(output)[-1]}; the same command continues") == 1
    assert re.search(r"exitcode\s*: 75 ", said), said

    process = start(output, inputs)  # the launcher dies
    wait_for(output, kept(output)[-1] + 1, process)
    everything = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    said = end(process)
    assert not psutil.wait_procs(everything, timeout=20)[1]
    assert f"SIGTERM: stopped and saved after step {kept(output)[-1]}; " in said

    step, process = kept(output)[-1], start(output, inputs)
    said = end(process)
    assert process.returncode == 0, said
    assert f"resuming after step {step} ({output}/checkpoints" in said
    assert_same_training(output, straight[0])
    assert curve(output, tmp_path) == curve(straight[0])
    names = {source.key for source in storage.Place(output).files()}
    assert {name for name in names if not name.startswith("logs/")} == {
        "config.yaml",
        "degrader.safetensors",
        *(f"previews/step-{step:08d}.png" for step in (32, STEPS)),
        *(f"checkpoints/step-{step:08d}.pt" for step in (STEPS - 8, STEPS - 4, STEPS)),
    }


def test_one_process_gives_the_curve_of_two_and_imports_neither_ray_nor_s3fs(inputs, straight, tmp_path):
    process = start(tmp_path, inputs, launcher=False)
    said = end(process)
    assert process.returncode == 0, said
    assert said.splitlines()[-1] == "foreign: []"
    one, two = (np.array(list(curve(output).values())) for output in (tmp_path, straight[0]))
    np.testing.assert_allclose(one[:6], two[:6], rtol=1e-4)
    np.testing.assert_allclose(one[:20], two[:20], rtol=2e-2)


def machines(output, inputs, **changes):
    """Two launchers of one process each, as on two machines."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    where = ("--num_processes", 2, "--num_machines", 2, "--main_process_ip", "127.0.0.1", "--main_process_port", port)
    return [start(output, inputs, *where, "--machine_rank", rank, **changes) for rank in range(2)]


def test_a_machine_that_hangs_ends_the_training_in_time_and_one_that_is_called_off_saves_it(inputs, tmp_path):
    first, second = machines(tmp_path, inputs, fit__timeout=12)
    try:
        step = wait_for(tmp_path, 4, first)
        ranks(second)[0].suspend()
        said = end(first)
    finally:
        kill(second)
        second.communicate()
    assert first.returncode != 0
    assert "error: another process of this training ended, or did not answer within fit.timeout=12 s; " in said
    assert kept(tmp_path)[-1] in (step, step + 4)

    first, second = machines(tmp_path, inputs)
    wait_for(tmp_path, kept(tmp_path)[-1] + 1, first)
    second.terminate()
    said = end(first)
    end(second)
    assert f"SIGTERM: stopped and saved after step {kept(tmp_path)[-1]}; " in said
    assert 0 not in (first.returncode, second.returncode)


def test_a_wrong_master_address_is_named_in_time(inputs, tmp_path):
    where = ("--main_process_ip", "127.0.0.1", "--main_process_port", 1, "--rdzv_conf", "timeout=3")
    process = start(tmp_path / "out", inputs, "--num_processes", 2, "--num_machines", 2, "--machine_rank", 1, *where)
    said = end(process, 90)
    assert process.returncode != 0
    assert re.search(r"DistNetworkError: .* timed out .* trying to connect to \(127.0.0.1, 1\)", said.splitlines()[-1])
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_named_and_spares_the_checkpoints(inputs, straight, tmp_path):
    shutil.copytree(straight[0], tmp_path, dirs_exist_ok=True)
    for step in (STEPS - 4, STEPS):
        (tmp_path / f"checkpoints/step-{step:08d}.pt").unlink()
    before = sorted(tmp_path.rglob("*"))
    process = start(tmp_path, inputs, limit=100_000)
    said = end(process)
    assert process.returncode != 0
    full = rf"^error: .*step-{STEPS - 4:08d}.pt: cannot be written \(\d\.\d MiB\): .*File too large"
    assert re.search(full, said, re.M), said
    assert [path for path in sorted(tmp_path.rglob("*")) if path.parent.name != "logs"] == [
        path for path in before if path.parent.name != "logs"
    ]
