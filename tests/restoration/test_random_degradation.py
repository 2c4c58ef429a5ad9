"""Degradation inside a training loop: ranges, draws, resuming, and what a training sees of it."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from degflow import Degrader, RandomDegradation
from tests import ROOT
from tests.captures import small_degrader

pytestmark = pytest.mark.usefixtures("one_thread")

LEVELS = {"1": 1.0, "2": 2.0, "4": 4.0}


@pytest.fixture(scope="module")
def degrader():
    return small_degrader(LEVELS, draws=True)


@pytest.fixture(scope="module")
def saved(degrader, tmp_path_factory):
    file = str(tmp_path_factory.mktemp("model") / "small.safetensors")
    degrader.save(file, {})
    return file


def batch(count=3, height=24, width=32, seed=0):
    """Images of 256 levels in [-1, 1]."""
    levels = torch.randint(0, 256, (count, 3, height, width), generator=torch.Generator().manual_seed(seed))
    return levels / 127.5 - 1


# Images in and out


def test_bright_images_need_no_warning_and_the_degrader_of_the_caller_stays_as_it_was(degrader, recwarn):
    before = dict(vars(degrader))
    RandomDegradation(degrader)(batch().abs())
    assert not recwarn.list
    assert vars(degrader).keys() == before.keys()


def test_a_degrader_is_moved_where_its_weights_stay_trainable(degrader, monkeypatch):
    moves = []
    monkeypatch.setattr(type(degrader), "to", lambda self, device: moves.append(torch.is_inference_mode_enabled()))
    RandomDegradation(degrader, device="cpu:0")(batch())  # another name of the same device
    assert moves == [False]


def test_lr_is_what_the_degrader_makes_at_the_drawn_scales(degrader):
    hr, degrade = batch(), RandomDegradation(degrader, rounded=False, spread=0.0)
    lr, scale = degrade(hr)
    assert lr.shape == hr.shape
    assert (scale.shape, scale.dtype) == ((3,), torch.float64)
    assert torch.equal(lr, degrader(hr, scale, spread=0.0))


def test_images_in_0_1_give_the_same_as_those_in_minus_1_1(degrader):
    hr = batch()
    for rounded, tolerance in ((False, 1e-5), (True, 1.01 / 255)):
        wide, scale = RandomDegradation(degrader, seed=4, rounded=rounded)(hr)
        unit, again = RandomDegradation(degrader, seed=4, rounded=rounded, value_range=(0, 1))((hr + 1) / 2)
        assert torch.equal(scale, again)
        assert float(wide.min()) < 0 <= float(unit.min())
        torch.testing.assert_close(unit, (wide + 1) / 2, rtol=0, atol=tolerance)
    levels = 255 * unit
    assert torch.equal(levels.round() / 255, unit)
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)


def test_the_margin_is_cut_off_lr_and_hr_alike(degrader):
    hr = batch(2, 40, 48)
    whole, _ = RandomDegradation(degrader)(hr)
    degrade = RandomDegradation(degrader, margin=6)
    lr, _ = degrade(hr)
    assert lr.shape == (2, 3, 28, 36)
    assert torch.equal(lr, whole[..., 6:34, 6:42])
    assert torch.equal(degrade.without_margin(hr), hr[..., 6:34, 6:42])
    assert torch.equal(RandomDegradation(degrader).without_margin(hr), hr)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_lr_has_hrs_type(degrader, dtype):
    lr, _ = RandomDegradation(degrader)(batch().to(dtype))
    assert lr.dtype == dtype
    wanted, _ = RandomDegradation(degrader)(batch().to(dtype).float())
    assert torch.equal(lr, wanted.to(dtype))


@pytest.mark.parametrize(
    ("hr", "message"),
    [
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), r"hr: torch.uint8 \[2, 3, 16, 16\]: must be a floating-point"),
        (np.zeros((2, 3, 16, 16), np.float32), r"hr: ndarray: must be a floating-point tensor in \[-1, 1\]"),
        (
            torch.zeros(2, 16, 16, 3),
            r"hr: torch.float32 \[2, 16, 16, 3\]: must be \[B, 3, H, W\].*before rows",
        ),
        (torch.zeros(2, 1, 16, 16), r"hr: torch.float32 \[2, 1, 16, 16\]: must be \[B, 3, H, W\].*three channels"),
        (torch.zeros(3, 16, 16), r"hr: torch.float32 \[3, 16, 16\]: must be \[B, 3, H, W\]"),
        (torch.zeros(0, 3, 16, 16), r"hr: torch.float32 \[0, 3, 16, 16\]: must be \[B, 3, H, W\]"),
        (torch.zeros(2, 3, 15, 40), r"\[2, 3, 15, 40\]: H and W must be at least 16, 8 without the margins"),
        (torch.full((2, 3, 16, 16), 255.0), r"hr: values from 255 to 255: must lie in value_range=\(-1, 1\)"),
        (torch.full((2, 3, 16, 16), torch.nan), r"hr: values from nan to nan: must lie in value_range=\(-1, 1\)"),
    ],
)
def test_images_that_break_a_rule_are_named(degrader, hr, message):
    degrade = RandomDegradation(degrader, margin=4)
    with pytest.raises(ValueError, match=message):
        degrade(hr)
    assert degrade.calls == 0


def test_images_below_0_are_refused_where_they_should_lie_in_0_1(degrader):
    with pytest.raises(ValueError, match=r"values from -1 to 1: must lie in value_range=\(0, 1\)"):
        RandomDegradation(degrader, value_range=(0, 1))(batch())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": "grid"}, r"scale=grid: must be uniform, loguniform or a list of scales"),
        ({"scale": [2.0, 5.0]}, r"scale=5.0: must lie in the trained range \[1.0, 4.0\]"),
        ({"scale": []}, r"scale.values=\[\]: needs at least one scale"),
        ({"low": 0.5}, r"scale=0.5: must lie in the trained range \[1.0, 4.0\]"),
        ({"low": 3, "high": 2}, r"scale.low=3.0: must not be above scale.high=2.0"),
        ({"value_range": (0, 255)}, r"value_range=\(0, 255\): must be \(-1, 1\) or \(0, 1\)"),
        ({"seed": -1}, r"seed=-1: must not be negative"),
        ({"rank": -1}, r"rank=-1: must not be negative"),
        ({"margin": -8}, r"margin=-8: must not be negative"),
        ({"model": "nowhere.safetensors"}, r"nowhere.safetensors"),
    ],
)
def test_arguments_that_break_a_rule_are_named(degrader, arguments, message):
    with pytest.raises(ValueError, match=message):
        RandomDegradation(**{"model": degrader, **arguments})


# Draws


def test_scales_cover_what_was_asked_for(degrader):
    hr = batch(32, 8, 8)
    for arguments, low, high, mean in (
        ({}, 1.0, 4.0, 2.5),
        ({"low": 2, "high": 3}, 2.0, 3.0, 2.5),
        ({"scale": "loguniform"}, 1.0, 4.0, 3 / np.log(4)),
    ):
        degrade = RandomDegradation(degrader, spread=0.0, **arguments)
        scales = torch.cat([degrade(hr)[1] for _ in range(4)])
        assert low <= float(scales.min()) < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < float(scales.max()) <= high
        assert float(scales.mean()) == pytest.approx(mean, abs=0.15)
        assert len(scales.unique()) == 128
    _, scale = RandomDegradation(degrader, [1.5, 3.0], spread=0.0)(hr)
    assert scale.unique().tolist() == [1.5, 3.0]


def drawn(degrader, calls=1, count=3, **arguments):
    """LR and scales of some calls on the same images."""
    degrade, hr = RandomDegradation(degrader, **arguments), batch(4)[:count]
    return [degrade(hr) for _ in range(calls)]


def same(left, right):
    return torch.equal(left[0], right[0]) and torch.equal(left[1], right[1])


def test_draws_depend_on_seed_rank_call_and_place_alone(degrader):
    first, second = drawn(degrader, 2)
    assert not same(first, second)
    assert all(map(same, drawn(degrader, 2), (first, second)))
    for other in ({"seed": 1}, {"rank": 1}):
        lr, scale = drawn(degrader, **other)[0]
        assert bool((scale != first[1]).all())
        assert not torch.equal(lr, first[0])
    fixed, moved = (drawn(degrader, scale=[3.0], rank=rank)[0] for rank in (0, 1))
    assert torch.equal(fixed[1], moved[1])
    assert all(not torch.equal(*pair) for pair in zip(fixed[0], moved[0], strict=True))  # the noise differs as well


def test_images_of_a_batch_get_noise_of_their_own(degrader):
    lr, _ = RandomDegradation(degrader, [4.0])(batch(1).expand(3, -1, -1, -1))
    assert not torch.equal(lr[0], lr[1])
    assert not torch.equal(lr[1], lr[2])


def test_a_longer_batch_begins_with_the_draws_of_a_shorter_one(degrader):
    (lr, scale), (more, scales) = (drawn(degrader, rounded=False, count=count)[0] for count in (2, 4))
    assert torch.equal(scale, scales[:2])
    torch.testing.assert_close(lr, more[:2], rtol=0, atol=1e-5)


def test_the_rank_comes_from_the_environment(degrader, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE=2: one of several processes, but RANK and WORLD_SIZE do not say"):
        drawn(degrader)
    monkeypatch.setenv("RANK", "1")
    assert same(drawn(degrader)[0], drawn(degrader, rank=1)[0])


def test_a_resumed_training_draws_the_same(saved, tmp_path):
    whole = drawn(saved, 4)
    before = RandomDegradation(saved)
    for _ in range(2):
        before(batch(4)[:3])
    torch.save(before.state_dict(), tmp_path / "state.pt")
    after = RandomDegradation(saved)
    after.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert all(map(same, [after(batch(4)[:3]) for _ in range(2)], whole[2:]))


def test_a_state_of_other_arguments_or_another_model_is_refused(saved, degrader):
    state = RandomDegradation(saved).state_dict()
    with pytest.raises(ValueError, match=r"the state does not fit: seed was 0, now 1; spread was 1.0, now 0.5$"):
        RandomDegradation(saved, seed=1, spread=0.5).load_state_dict(state)
    with pytest.raises(ValueError, match=r"does not fit: scale was .*'high': 4.0.*now .*'high': 2.0"):
        RandomDegradation(saved, high=2).load_state_dict(state)
    with pytest.raises(ValueError, match=r"does not fit: model was \w{64}, now $"):
        RandomDegradation(degrader).load_state_dict(state)


# Inside a training


def test_a_training_can_use_the_images_and_owns_nothing_of_the_degrader(degrader):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, 3, 3, padding=1)
            self.degrade = RandomDegradation(degrader)

    model, hr = Model(), batch().requires_grad_()
    assert set(model.state_dict()) == {"layer.weight", "layer.bias"}
    lr, _ = model.degrade(hr)
    assert not lr.is_inference()
    assert not lr.requires_grad
    (model.layer(lr) - hr).square().mean().backward()
    assert model.layer.weight.grad is not None
    assert all(parameter.grad is None for parameter in degrader.parameters())
    lr.mul_(0.5)  # as augmentations do


def test_autocast_around_it_changes_nothing_and_precision_does(degrader):
    wanted = drawn(degrader, rounded=False)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert same(drawn(degrader, rounded=False)[0], wanted)
        half = drawn(degrader, rounded=False, precision="bfloat16")[0]
    assert same(half, drawn(degrader, rounded=False, precision="bfloat16")[0])
    assert not same(half, wanted)


def test_pytorchs_random_numbers_are_neither_used_nor_changed(saved):
    torch.manual_seed(1)
    wanted = torch.rand(4)
    torch.manual_seed(1)
    first = drawn(saved)[0]
    assert torch.equal(torch.rand(4), wanted)
    assert same(drawn(saved)[0], first)


def test_the_example_trains():
    command = [sys.executable, "examples/train_on_the_fly.py", "examples/photographs", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    loss, unchanged = map(
        float, re.fullmatch(r"step 2: loss (0\.\d+) \(of LR (0\.\d+)\)", done.stdout.strip()).groups()
    )
    assert 0 < unchanged < 0.2
    assert loss == pytest.approx(unchanged, rel=0.1)  # it starts at LR itself


def test_without_a_model_it_is_the_one_that_ships():
    degrade = RandomDegradation(margin=8, spread=0.0)
    lr, scale = degrade(batch(1, 32, 32))
    assert lr.shape == (1, 3, 16, 16)
    assert degrade.state_dict()["identity"]["model"] == Degrader.load().sha256
    assert 1 <= float(scale) <= 4
