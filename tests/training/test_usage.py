"""How much of a GPU a training uses: counted on CPU and on the device meta."""

import json
from dataclasses import replace

import pytest
import torch

from degflow.benchmarking.measure import flop
from degflow.restoration.networks import NetworkConfig, RestorationObjective, build
from degflow.training import loop
from degflow.training.usage import memory_of, on_meta, rate_of, work_of
from tests.test_objectives import KINDS, batch_of, objective_of
from tests.training.test_loop import BASE, ToyObjective, train


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_work_of_a_step_is_counted_without_doing_it(kind, precision):
    objective, batch = objective_of(kind).train(), batch_of(kind)
    before = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    found = work_of(on_meta(objective).train(), batch, precision)
    assert all(torch.equal(tensor, before[name]) for name, tensor in objective.state_dict().items())
    wanted = flop(lambda _: objective(**batch).total.backward())
    assert found == pytest.approx(wanted, rel=1e-3)  # attention is other operations there
    assert wanted > 0


def test_the_work_of_an_sr_network_is_counted_or_unknown():
    pixels = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    batch, found = {"lr": pixels, "hr": pixels}, []
    for name in ("rcan", "mambair"):
        objective = RestorationObjective(build(NetworkConfig(name=name)))
        found.append(work_of(on_meta(objective).train(), batch, "float32"))
    rcan, mambair = found
    assert rcan > 1e9
    assert mambair == 0  # its scan knows no device meta


def test_mfu_is_the_work_of_a_process_over_what_its_gpu_could_do(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "rate_of", lambda device, precision: 2e-6)  # 1e12 FLOP/s
    train(tmp_path, replace(BASE, log_every=4, accumulate=2))
    lines = [json.loads(line) for line in (tmp_path / "logs/steps-00000001.jsonl").read_text().splitlines()]
    # Of an image: 6 x 16 and 16 x 1 products, forward; both weights' and the second layer's input, backward.
    work = 2 * (96 + 16) + 2 * (96 + 16 + 16)
    assert [line["step"] for line in lines] == [4, 8, 12]
    for line in lines:
        assert line["images_per_s"] > 0
        assert line["mfu"] == pytest.approx(line["images_per_s"] * work / 2e6, rel=1e-6)


def test_a_training_on_a_cpu_has_no_mfu(tmp_path):
    train(tmp_path, objective=ToyObjective())
    assert "mfu" not in (tmp_path / "logs/steps-00000001.jsonl").read_text()
    assert (rate_of(torch.device("cpu"), "bfloat16"), memory_of(torch.device("cpu"))) == (0.0, {})


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA L40S", 362),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA RTX A1000", 0),
    ],
)
def test_a_gpus_rate_and_memory_come_from_its_driver(monkeypatch, name, rate):
    reset = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3e9)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    device = torch.device("cuda", 1)
    found = [rate_of(device, precision) for precision in ("bfloat16", "float16", "tf32", "float32")]
    assert found == [rate, rate, rate / 2, 0]
    assert memory_of(device) == {"memory_gb": 3.0}
    assert reset == [device]
