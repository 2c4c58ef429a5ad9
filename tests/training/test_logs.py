import json
import math

import pytest
import torch
from accelerate import Accelerator

from degflow.objectives import _by_time
from degflow.storage import Place
from degflow.training import logs as module
from degflow.training.logs import Logs, Means, quarters


def test_the_flow_s_errors_are_means_of_the_samples_in_each_quarter_of_the_time():
    generator = torch.Generator().manual_seed(0)
    velocity, wanted = (torch.randn(60, 2, 3, 3, generator=generator) for _ in range(2))
    time = torch.rand(60, generator=generator) * 0.75
    time[0] = 1.0  # the end belongs to the last quarter, which no other sample is in
    means = Means(Accelerator(cpu=True))
    for part in torch.arange(60).split(20):
        means.add({"cfm": torch.ones(()), **quarters(_by_time(velocity[part], wanted[part], time[part]))})
    found, error = means.take(), (velocity - wanted).square().mean((1, 2, 3))
    assert found.pop("cfm") == 1
    for n, (low, high) in enumerate(((0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.1)), 1):
        inside = error[(time >= low) & (time < high)]
        assert abs(found.pop(f"error_quarter_{n}") - float(inside.mean())) < 1e-5
    assert found == {}
    means.add(quarters(_by_time(velocity[1:], wanted[1:], time[1:])))
    assert sorted(means.take()) == ["error_quarter_1", "error_quarter_2", "error_quarter_3"]


@pytest.mark.parametrize("store", ["local", "s3"])
def test_json_lines_have_each_step_and_a_large_file_is_left_alone(s3, tmp_path, monkeypatch, store):
    monkeypatch.setattr(module, "PART", 400)
    place = Place(s3.uri("lines") if store == "s3" else str(tmp_path))
    logs = Logs(place, 10)
    for step in range(11, 41):
        logs.add("train", {"loss": step / 2}, step)
        if store == "local":  # as somebody who looks on sees it
            newest = max(file.key for file in place.files("logs") if "jsonl" in file.key)
            assert f'"step": {step},' in place.read(newest).decode()
    logs.add("validation", {"psnr": 40.5, "lpips": math.nan}, 40)
    logs.close()
    keys = [source.key for source in place.files("logs") if source.key.endswith(".jsonl")]
    assert keys[0] == "logs/steps-00000011.jsonl"
    assert len(keys) >= 3
    lines = [json.loads(line) for key in keys for line in place.read(key).decode().splitlines()]
    assert lines[:-1] == [{"step": step, "group": "train", "loss": step / 2} for step in range(11, 41)]
    assert lines[-1] == {"step": 40, "group": "validation", "psnr": 40.5, "lpips": None}
    files = {key: place.read(key) for key in keys}
    logs = Logs(place, 20)  # continued from a checkpoint: files that begin after it would be taken for later ones
    logs.add("train", {"loss": 0.0}, 21)
    logs.close()
    left = [source.key for source in place.files("logs") if source.key.endswith(".jsonl")]
    assert left == [key for key in keys if key <= "logs/steps-00000020"] + ["logs/steps-00000021.jsonl"]
    assert all(place.read(key) == files[key] for key in left[:-1])


def test_in_an_object_store_a_large_event_file_is_left_alone_and_another_is_begun(s3, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(module, "PART", 2000)
    place, uploaded = Place(s3.uri("event-files")), []
    upload = Place.upload
    monkeypatch.setattr(Place, "upload", lambda self, file, key: uploaded.append(key) or upload(self, file, key))
    logs = Logs(place, 0)
    for step in range(1, 201):
        logs.add("train", {"loss": float(step)}, step)
        if step % 20 == 0:
            logs.flush()
    logs.close()
    keys = [source.key for source in place.files("logs") if "jsonl" not in source.key]
    assert len(keys) >= 4
    assert all(uploaded.count(key) <= 4 for key in keys)  # each was left when it had 2000 bytes, of some 50 a step
    begun = [key for key in dict.fromkeys(uploaded) if "jsonl" not in key]
    assert sorted(begun) == sorted(keys)
    for number, key in enumerate(begun):
        # TensorBoard reads a folder's files in the order of their names, which end with a second and a number that
        # begins at 0 in each process. Files of one second may be out of order ("9", "10"), but only in a test.
        (tmp_path / f"{number:02d}.tfevents").write_bytes(place.read(key))
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")
    assert [event.step for event in events] == list(range(1, 201))
    assert [event.value for event in events] == list(range(1, 201))
