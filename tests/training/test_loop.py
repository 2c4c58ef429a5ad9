"""fit() on a toy and on a small autoencoder. Run as a script, this file is the toy's training job (see `toy_job`)."""

import json
import math
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from torch import nn

from degflow.benchmarking.predict import kernels
from degflow.models import AutoencoderConfig, ResidualAutoencoder
from degflow.models.counter import sample_keys
from degflow.models.dropout import Bits, SampleDropout
from degflow.objectives import Losses, RAEObjective
from degflow.storage import Place
from degflow.training import loop
from degflow.training.average import Average
from degflow.training.checkpoints import _differences
from degflow.training.loop import RankSampler, Validation, _Run, fit, learning_rate
from degflow.training.processes import Hosts, join
from degflow.training.settings import FitConfig
from degflow.training.stopping import EXIT_CODE
from tests import ROOT
from tests.traps import Trap

BASE = FitConfig(steps=12, batch=8, learning_rate=3e-3, workers=0, log_every=1, save_every=4, ema=0.9)


@dataclass(frozen=True)
class ToyConfig:
    width: int = 16
    dropout: float = 0.0


class Toy(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.first, self.second = nn.Linear(6, config.width), nn.Linear(config.width, 1)
        self.dropout = SampleDropout(config.dropout)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x, key=None):
        if self.training:
            self.seen += len(x)
        bits = None if key is None else Bits.of(key, 1, self.config.width, 1, 1)
        return self.second(self.dropout(self.first(x).relu()[..., None, None], bits)[..., 0, 0])[:, 0]


class ToyObjective(nn.Module):
    def __init__(self, dropout=0.0, width=16, frozen=1.0, seed=0):
        super().__init__()
        self.seed = seed
        torch.manual_seed(0)
        self.network = Toy(ToyConfig(width, dropout))
        self.frozen = nn.Parameter(torch.tensor(frozen), requires_grad=False)

    def forward(self, x, y, number):
        loss = nn.functional.mse_loss(self.network(x, sample_keys(self.seed, number)).float(), self.frozen * y)
        return Losses(loss, {"loss": loss.detach()})


class ToySamples(torch.utils.data.Dataset):
    """Sample n is a function of n; number `bad` raises or is not finite, and each may take its time."""

    def __init__(self, bad=-1, how=None, delay=0.0):
        self.bad, self.how, self.delay = bad, how, delay

    def __getitem__(self, index):
        time.sleep(self.delay)
        if index == self.bad and self.how:
            raise self.how
        x = np.random.default_rng((7, index)).standard_normal(6).astype(np.float32)
        y = np.float32(math.nan if index == self.bad else x.sum() / 2)
        return {"x": torch.from_numpy(x), "y": torch.tensor(y), "number": torch.tensor(index)}


class Crops(torch.utils.data.Dataset):
    def __init__(self, bad=-1, how=None):
        self.bad, self.how = bad, how

    def __getitem__(self, index):
        if index == self.bad:
            raise self.how
        random = np.random.default_rng((7, index))
        target, guide = random.integers(0, 256, (2, 3, 16, 16), np.uint8)
        return {"target": torch.from_numpy(target), "guide": torch.from_numpy(guide)}


def rae_objective():
    torch.manual_seed(0)
    return RAEObjective(ResidualAutoencoder(AutoencoderConfig(4, (1, 2), 1, 2, gate_init=0.5)))


PROBLEMS = {"toy": (lambda: ToyObjective(dropout=0.3), ToySamples), "rae": (rae_objective, Crops)}


pytestmark = pytest.mark.usefixtures("one_thread")


def train(folder, config=BASE, objective=None, samples=None, validate=None, finish=None, **extra):
    objective, settings = objective or ToyObjective(), {"fit": asdict(config), **extra}
    return fit(objective, samples or ToySamples(), config, str(folder), settings, validate, finish)


def checkpoint(output, step):
    return torch.load(Path(output) / f"checkpoints/step-{step:08d}.pt", weights_only=True)


def steps_kept(output):
    return sorted(int(file.stem[5:]) for file in Path(output, "checkpoints").iterdir())


def curve(output, name="train/loss"):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(Path(output) / "logs")).Reload().Scalars(name)
    return [event.step for event in events], np.array([event.value for event in events])


def assert_same(a, b):
    """Bit-equal, through nested dicts and lists."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert_same(left, right)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def toy_job(output, **changes):
    """The toy's training as its own process, from the environment's launcher; `delay` slows the samples down."""
    delay = float(changes.pop("delay", 0))
    dropout, fails = float(changes.pop("dropout", 0)), bool(changes.pop("fails", False))
    config = replace(BASE, **{name: type(getattr(BASE, name))(value) for name, value in changes.items()})
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        try:
            train(f"{output}-refused", replace(config, batch=6, accumulate=2))
        except ValueError as error:
            print(f"refused: {error}", flush=True)
    train(output, config, ToyObjective(dropout), ToySamples(delay=delay), finish=failing if fails else None)
    print(f"ended well: {os.environ.get('RANK')}", flush=True)


def failing(result):
    time.sleep(3)
    raise OSError(f"no room for the result of step {result.step}")


def start_toy(output, *launcher, stderr=None, **changes):
    words = [f"{name}={value}" for name, value in changes.items()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *launcher, __file__, str(output), *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=stderr, text=True, start_new_session=True)


def wait_for(path, process, seconds=60):
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.01)


# Interruption and resume


def test_a_warned_and_killed_training_goes_on_bit_for_bit(tmp_path):
    changes = {"dropout": 0.3, "steps": 60, "save_every": 10, "keep": 9, "timeout": 60}
    slow = {**changes, "delay": 0.02, "workers": 2, "save_every": 1000}
    for number in (signal.SIGTERM, signal.SIGUSR1):
        before = steps_kept(tmp_path / "killed")[-1] if (tmp_path / "killed/checkpoints").exists() else 0
        process = start_toy(tmp_path / "killed", stderr=subprocess.STDOUT, **slow)
        said = [process.stdout.readline()]
        while not said[-1].startswith(f"step {before + 3} of 60"):
            said.append(process.stdout.readline())
            assert said[-1], said
        os.killpg(process.pid, number)  # to the loader's workers too
        rest, _ = process.communicate(timeout=300)
        step = steps_kept(tmp_path / "killed")[-1]
        assert (
            rest.splitlines()[-1] == f"{number.name}: stopped and saved after step {step}; the same command continues"
        )
        assert process.returncode == EXIT_CODE == 75
        assert before + 3 <= step < before + 20

    process = start_toy(tmp_path / "killed", **changes, delay=0.02)
    wait_for(tmp_path / "killed/checkpoints/step-00000040.pt", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert steps_kept(tmp_path / "killed")[-1] < 60

    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 150))
    process = start_toy(tmp_path / "killed", stderr=theirs, **changes)
    os.close(theirs)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    assert re.search(r"resuming after step (40|50)", said)
    shown = read_terminal(ours)
    assert re.search(r"60/60 .*loss [0-9.e-]+, [0-9.]+ images/s", shown), shown

    toy_job(tmp_path / "straight", **changes)
    assert_same(checkpoint(tmp_path / "killed", 60), checkpoint(tmp_path / "straight", 60))
    for name in ("loss", "learning_rate"):
        steps, values = curve(tmp_path / "killed", f"train/{name}")
        assert steps == list(range(1, 61))
        np.testing.assert_array_equal(values, curve(tmp_path / "straight", f"train/{name}")[1])


def read_terminal(descriptor):
    shown = b""
    try:
        while part := os.read(descriptor, 65536):
            shown += part
    except OSError:  # Linux's way to say that the other end is closed
        pass
    os.close(descriptor)
    return shown.decode()


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("how", [RuntimeError("the power fails"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_a_cut_training_goes_on_bit_for_bit(tmp_path, problem, how):
    objective, samples = PROBLEMS[problem]
    with pytest.raises(type(how)):
        train(tmp_path / "cut", objective=objective(), samples=samples(bad=8 * 10 + 3, how=how))
    assert steps_kept(tmp_path / "cut") == [4, 8]
    time.sleep(1.1)  # TensorBoard orders its files by their names, which tell whole seconds
    cut = train(tmp_path / "cut", objective=objective(), samples=samples())
    straight = train(tmp_path / "straight", objective=objective(), samples=samples())
    assert cut.step == straight.step == 12
    assert_same(dict(cut.network.state_dict()), dict(straight.network.state_dict()))
    assert_same(checkpoint(tmp_path / "cut", 12), checkpoint(tmp_path / "straight", 12))
    name = {"toy": "train/loss", "rae": "train/l1"}[problem]
    logged, expected = curve(tmp_path / "cut", name), curve(tmp_path / "straight", name)
    assert logged[0] == list(range(1, 13))  # steps 9 and 10 were logged twice, and count once
    np.testing.assert_array_equal(logged[1], expected[1])


def test_workers_and_a_finished_training_change_nothing(tmp_path):
    first = train(tmp_path / "a", replace(BASE, workers=2))
    again = train(tmp_path / "a")
    other = train(tmp_path / "b")
    assert_same(dict(first.network.state_dict()), dict(again.network.state_dict()))
    assert_same(dict(first.network.state_dict()), dict(other.network.state_dict()))


def test_dropout_follows_the_seed_and_the_step(tmp_path):
    losses = {}
    for seed in (0, 1, 10**9):
        train(
            tmp_path / str(seed), replace(BASE, seed=seed, learning_rate=1e-12, batch=1), ToyObjective(0.5, seed=seed)
        )
        losses[seed] = curve(tmp_path / str(seed))[1]
    assert len({tuple(values) for values in losses.values()}) == 3


def test_another_configuration_is_refused_by_key_and_values(tmp_path):
    train(tmp_path, levels={"1": 1.0, "2": 2.0})
    said = r"step-00000012.pt: was made with another fit.learning_rate \(0.003 then, 0.001 now\); .*fit.resume=never"
    with pytest.raises(ValueError, match=said):
        train(tmp_path, replace(BASE, learning_rate=1e-3), levels={"1": 1.0, "2": 2.0})
    with pytest.raises(ValueError, match=r"another levels.2 \(2.0 then, 2.1 now\)"):
        train(tmp_path, levels={"1": 1.0, "2": 2.1})
    free = replace(BASE, log_every=5, validate_every=3, save_every=6, keep=7, accumulate=2, workers=1)
    train(tmp_path, free, levels={"1": 1.0, "2": 2.0}, output="elsewhere")


def test_other_frozen_weights_are_refused(tmp_path):
    train(tmp_path, objective=ToyObjective(frozen=1.0))
    with pytest.raises(ValueError, match=r"step-00000012.pt: was made with other frozen weights"):
        train(tmp_path, objective=ToyObjective(frozen=1.5))


def test_resume_never_starts_over(tmp_path):
    train(tmp_path, replace(BASE, keep=3))
    assert steps_kept(tmp_path) == [4, 8, 12]
    other = replace(BASE, seed=1, resume="never", learning_rate=1e-3)
    with pytest.raises(InterruptedError):
        train(tmp_path, other, ToyObjective(0.3), ToySamples(bad=8 * 6, how=InterruptedError()))
    assert steps_kept(tmp_path) == [4]
    resumed = train(tmp_path, replace(other, resume="auto"), ToyObjective(0.3))
    straight = train(tmp_path / "straight", other, ToyObjective(0.3))
    assert_same(dict(resumed.network.state_dict()), dict(straight.network.state_dict()))
    with pytest.raises(InterruptedError):
        train(tmp_path, other, ToyObjective(0.3), ToySamples(bad=0, how=InterruptedError()))
    assert steps_kept(tmp_path) == []


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_the_newest_checkpoints_are_kept(tmp_path, keep):
    train(tmp_path, replace(BASE, save_every=5, keep=keep))
    assert steps_kept(tmp_path) == [5, 10, 12][-keep:]


# Checkpoint files


@pytest.mark.parametrize("legacy", [False, True])
def test_a_checkpoint_that_would_run_code_is_refused_and_nothing_runs(tmp_path, legacy):
    file = tmp_path / "run/checkpoints/step-00000099.pt"
    file.parent.mkdir(parents=True)
    torch.save({"step": Trap(os.system, f"touch {tmp_path}/ran")}, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"step-00000099.pt: not a readable training checkpoint"):
        train(tmp_path / "run")
    with pytest.raises(ValueError, match=r"step-00000099.pt: not a readable training checkpoint"):
        train(tmp_path / "other", replace(BASE, start_from=str(file)))
    assert not (tmp_path / "ran").exists()
    with pytest.raises(TypeError):  # the trap is real
        torch.load(file, weights_only=False)["step"] + None
    assert (tmp_path / "ran").exists()


def test_no_half_written_checkpoint_is_ever_seen(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/.step-00000077.pt.0123").write_bytes(b"PK half of one")
    seen, done = [], threading.Event()

    def watch():
        while not done.is_set():
            for file in sorted((tmp_path / "checkpoints").glob("step-*.pt")):
                try:
                    seen.append(torch.load(file, weights_only=True)["step"])
                except FileNotFoundError:
                    continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = train(tmp_path, replace(BASE, steps=20, save_every=1), ToyObjective(width=20_000))
    finally:
        done.set()
        watcher.join()
    assert result.step == 20
    assert len(set(seen)) > 5


# What a step is


@pytest.mark.parametrize("problem", PROBLEMS)
def test_accumulation_gives_the_curve_of_the_large_batch(tmp_path, problem):
    name = {"toy": "train/loss", "rae": "train/l1"}[problem]
    results = []
    for accumulate in (1, 2, 8):
        objective, samples = PROBLEMS[problem]
        train(tmp_path / str(accumulate), replace(BASE, accumulate=accumulate), objective(), samples())
        results.append((curve(tmp_path / str(accumulate), name)[1], checkpoint(tmp_path / str(accumulate), 12)))
    for values, state in results[1:]:
        np.testing.assert_allclose(values, results[0][0], rtol=2e-5)
        torch.testing.assert_close(state["network"], results[0][1]["network"], rtol=1e-3, atol=2e-5)


def test_a_profile_of_some_steps_is_written_and_changes_nothing(tmp_path, capsys):
    train(tmp_path / "plain")
    train(tmp_path / "timed", replace(BASE, profile=2))
    assert f"profile: {tmp_path}/timed/profile.json" in capsys.readouterr().out
    events = json.loads((tmp_path / "timed/profile.json").read_text())["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert [name for name in names if name.startswith("ProfilerStep#")] == ["ProfilerStep#10", "ProfilerStep#11"]
    assert any(name.startswith("Optimizer.step") for name in names)
    plain, timed = (checkpoint(tmp_path / name, 12)["network"] for name in ("plain", "timed"))
    assert all(torch.equal(plain[name], timed[name]) for name in plain)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A training of two processes whose last step is saved, but whose end fails; its output, exit code and words."""
    output = tmp_path_factory.mktemp("two") / "two"
    launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
    process = start_toy(output, *launcher, stderr=subprocess.STDOUT, accumulate=2, dropout=0.3, fails=True)
    said, _ = process.communicate(timeout=300)
    return output, process.returncode, said


def test_two_processes_give_the_curve_of_one(two, tmp_path):
    output, _, said = two
    assert "refused: fit.batch=6: must be a multiple of processes x fit.accumulate = 2 x 2" in said
    assert said.count("step 12 of 12") == 1
    train(tmp_path / "one", objective=ToyObjective(0.3))
    shared, alone = checkpoint(output, 12), checkpoint(tmp_path / "one", 12)
    assert int(shared["network"].pop("seen")) * 2 == int(alone["network"].pop("seen"))
    torch.testing.assert_close(shared["network"], alone["network"], rtol=1e-3, atol=2e-5)
    np.testing.assert_allclose(curve(output)[1], curve(tmp_path / "one")[1], rtol=2e-5)


def test_no_process_ends_well_before_the_main_one_has_written_its_files(two):
    """Else Kubernetes counts its machine as done, and does not start it again for the next attempt."""
    _, code, said = two
    assert code == 1
    assert "OSError: no room for the result of step 12" in said
    assert "ended well" not in said


def test_the_ranks_share_every_step_between_them():
    config = replace(BASE, steps=5, batch=6)
    alone = list(RankSampler(config, 2, 0, 1))
    assert alone == list(range(12, 30))
    shares = [list(RankSampler(config, 2, rank, 3)) for rank in range(3)]
    assert [n for step in range(3) for share in shares for n in share[2 * step : 2 * step + 2]] == alone


def test_learning_rate_warms_up_and_falls_by_a_cosine_to_its_final_value(tmp_path):
    config = replace(BASE, steps=11, learning_rate=2e-3, final_learning_rate=2e-5)
    assert learning_rate(0, config) == 2e-3
    assert learning_rate(5, config) == pytest.approx((2e-3 + 2e-5) / 2, rel=1e-12)
    assert learning_rate(10, config) == pytest.approx(2e-5, rel=1e-12)
    warm = replace(config, warmup=4)
    assert [learning_rate(step, warm) for step in range(5)] == pytest.approx([5e-4, 1e-3, 1.5e-3, 2e-3, 2e-3])
    assert learning_rate(10, warm) == pytest.approx(2e-5, rel=1e-12)
    assert learning_rate(0, replace(config, steps=1)) == 2e-3
    train(tmp_path, warm)
    np.testing.assert_allclose(curve(tmp_path, "train/learning_rate")[1], [learning_rate(n, warm) for n in range(11)])
    (group,) = checkpoint(tmp_path, 11)["optimizer"]["param_groups"]
    assert group["lr"] == learning_rate(10, warm)


def test_the_first_step_is_adam_of_the_clipped_gradient(tmp_path):
    config = replace(BASE, steps=1, clip=1e-3, betas=(0.9, 0.9))
    objective = ToyObjective()
    before = {name: parameter.clone() for name, parameter in objective.network.named_parameters()}
    samples = [ToySamples()[n] for n in range(8)]
    objective(
        **{key: torch.stack([sample[key] for sample in samples]) for key in ("x", "y", "number")}
    ).total.backward()
    grads = [parameter.grad for parameter in objective.network.parameters()]
    norm = torch.cat([grad.flatten() for grad in grads]).norm()
    assert norm > 10 * config.clip
    train(tmp_path, config)
    state = checkpoint(tmp_path, 1)
    moments = [part["exp_avg"] for part in state["optimizer"]["state"].values()]
    torch.testing.assert_close(moments, [0.1 * grad * config.clip / norm for grad in grads], rtol=1e-4, atol=1e-10)
    for name, value in before.items():
        grad = dict(objective.network.named_parameters())[name].grad
        step = value - config.learning_rate * torch.where(grad.abs() > 1e-3 * norm, grad.sign(), 0)
        moved = grad.abs() > 1e-3 * norm
        torch.testing.assert_close(state["network"][name][moved], step[moved], rtol=0, atol=0.02 * config.learning_rate)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.999])
def test_the_average_is_exponential_and_soon_forgets_the_start(tmp_path, decay):
    result = train(tmp_path, replace(BASE, ema=decay, save_every=1, keep=99))
    average = {key: value.double() for key, value in ToyObjective().network.state_dict().items()}
    for step in range(1, 13):
        state = checkpoint(tmp_path, step)
        rate = min(decay, step / (step + 10))
        for name, tensor in state["network"].items():
            if name == "seen":
                assert torch.equal(state["ema"][name], tensor)
                continue
            average[name] = rate * average[name] + (1 - rate) * tensor.double()
            torch.testing.assert_close(state["ema"][name].double(), average[name], rtol=1e-5, atol=1e-6)
    assert_same(dict(result.network.state_dict()), dict(state["ema"]))


def test_the_averaged_network_shares_nothing_with_the_one_in_training(tmp_path):
    networks = []

    def vandalise(network):
        assert not network.training
        networks.append(network)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.zero_()
        torch.manual_seed(123)
        return Validation({"score": 1.0}, np.zeros((2, 3, 3), np.uint8))

    config = replace(BASE, validate_every=5)
    disturbed = train(tmp_path / "a", config, ToyObjective(0.3), validate=vandalise)
    straight = train(tmp_path / "b", config, ToyObjective(0.3))
    assert len(networks) == 3
    assert_same(checkpoint(tmp_path / "a", 12), checkpoint(tmp_path / "b", 12))
    assert_same(dict(disturbed.network.state_dict()), dict(straight.network.state_dict()))
    previews = sorted(file.name for file in (tmp_path / "a/previews").iterdir())
    assert previews == ["step-00000005.png", "step-00000010.png", "step-00000012.png"]
    assert curve(tmp_path / "a", "validation/score")[0] == [5, 10, 12]


def test_training_learns_and_says_how_it_goes(tmp_path, capsys):
    train(tmp_path, replace(BASE, steps=150, log_every=50, learning_rate=1e-2))
    lines = re.findall(r"^step (\d+) of 150: loss ([0-9.e-]+), ([0-9.]+) images/s$", capsys.readouterr().out, re.M)
    assert [int(step) for step, _, _ in lines] == [50, 100, 150]
    assert float(lines[-1][1]) < 0.1
    assert float(lines[-1][2]) > 10


def test_bfloat16_keeps_float32_weights_and_its_backward_pass_is_outside_of_autocast(tmp_path):
    objective, seen = ToyObjective(), []
    objective.network.first.weight.register_hook(
        lambda grad: seen.append((grad.dtype, torch.is_autocast_enabled("cpu")))
    )
    objective.network.register_forward_hook(
        lambda *found: seen.append((found[-1].dtype, torch.is_autocast_enabled("cpu")))
    )
    train(tmp_path / "narrow", replace(BASE, precision="bfloat16"), objective)
    assert set(seen) == {(torch.bfloat16, True), (torch.float32, False)}
    train(tmp_path / "exact")
    assert all(tensor.dtype != torch.bfloat16 for tensor in checkpoint(tmp_path / "narrow", 12)["network"].values())
    half, full = curve(tmp_path / "narrow")[1], curve(tmp_path / "exact")[1]
    assert 0 < np.abs(half - full).max() < 0.05


@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_products_of_the_backward_pass_are_as_exact_as_those_of_the_forward_one(tmp_path, precision):
    objective, seen = ToyObjective(), set()

    def note(*_):
        seen.add((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))

    objective.network.first.weight.register_hook(note)
    objective.network.register_forward_hook(note)
    train(tmp_path, replace(BASE, precision=precision), objective)
    assert seen == {(precision == "tf32",) * 2}


def test_a_training_step_never_waits_for_its_device(tmp_path):
    # Tensors without numbers: what reads one raises, and so does what mixes them with the CPU's.
    config = replace(BASE, log_every=50, precision="float32", accumulate=2)
    accelerator = join(config.precision, config.timeout)
    accelerator.state.device = PartialState().device = torch.device("meta")
    try:
        run = _Run(accelerator, ToyObjective(0.3), config, Place(str(tmp_path)), {}, "")
        batches = run.loader(ToySamples())
        assert [run.train_step(batches) for _ in range(3)] == [{}] * 3
    finally:
        accelerator.state.device = PartialState().device = torch.device("cpu")
    assert {tensor.device.type for tensor in run.average.state.values()} == {"meta"}
    assert len(run.means.waiting) == 3


def test_processes_tell_each_other_of_signals_after_every_fourth_step_and_at_the_end(tmp_path, monkeypatch):
    asked = []

    class Several(Hosts):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.alone = False

        def largest(self, number):
            asked.append(number)
            return number

    monkeypatch.setattr(loop, "Hosts", Several)
    train(tmp_path, replace(BASE, steps=10))
    assert asked == [0, 0, 0]


def test_on_a_gpu_adam_is_one_operation(tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, **options: found.append(options["fused"]) or exit())
    accelerator = join(BASE.precision, BASE.timeout)
    for device in ("cpu", "cuda"):
        accelerator.state.device = PartialState().device = torch.device(device)
        try:
            with pytest.raises(SystemExit):
                _Run(accelerator, ToyObjective(), BASE, Place(str(tmp_path)), {}, "")
        finally:
            accelerator.state.device = PartialState().device = torch.device("cpu")
    assert found == [None, True]


def test_an_average_takes_one_operation_for_all_weights():
    networks = (nn.Linear(2, 2), nn.Sequential(*(nn.Linear(2, 2) for _ in range(9))))
    averages = [Average(network.to("meta"), 0.9) for network in networks]
    one, nine = (len(kernels(lambda average=average: average.update(1), {})) for average in averages)
    assert one == nine


def test_the_gradients_norm_is_logged_without_clipping_too(tmp_path):
    for name, clip in (("clipped", 1e9), ("not", 0.0)):
        train(tmp_path / name, replace(BASE, clip=clip))
    norms = [curve(tmp_path / name, "train/gradient_norm")[1] for name in ("clipped", "not")]
    np.testing.assert_array_equal(*norms)
    assert min(norms[0]) > 0
    assert_same(checkpoint(tmp_path / "clipped", 12)["network"], checkpoint(tmp_path / "not", 12)["network"])


def test_a_log_line_has_the_means_since_the_last_one_also_of_what_was_interrupted(tmp_path):
    config = replace(BASE, save_every=100)
    train(tmp_path / "each", config)
    train(tmp_path / "means", replace(config, log_every=5))
    with pytest.raises(InterruptedError):
        train(
            tmp_path / "cut", replace(config, log_every=5, save_every=3), samples=ToySamples(8 * 7, InterruptedError())
        )
    time.sleep(1.1)  # TensorBoard orders its files by their names, which tell whole seconds
    train(tmp_path / "cut", replace(config, log_every=5))
    for name in ("loss", "gradient_norm"):
        each = curve(tmp_path / "each", f"train/{name}")[1].astype(np.float64)
        steps, means = curve(tmp_path / "means", f"train/{name}")
        assert steps == [5, 10, 12]
        np.testing.assert_allclose(means, [each[:5].mean(), each[5:10].mean(), each[10:].mean()], rtol=1e-6)
        np.testing.assert_array_equal(curve(tmp_path / "cut", f"train/{name}")[1], means)


def test_compile_keeps_the_names_and_the_curve(tmp_path):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    train(tmp_path / "compiled", replace(BASE, compile=True), ToyObjective(0.3))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    train(tmp_path / "eager", objective=ToyObjective(0.3))
    compiled, eager = checkpoint(tmp_path / "compiled", 12), checkpoint(tmp_path / "eager", 12)
    assert compiled["network"].keys() == eager["network"].keys()
    np.testing.assert_allclose(curve(tmp_path / "compiled")[1], curve(tmp_path / "eager")[1], rtol=1e-4)
    assert train(tmp_path / "compiled").step == 12


def test_another_order_of_what_trains_is_another_configuration():
    assert list(_differences({"train": {"a": "x", "b": "y"}}, {"train": {"b": "y", "a": "x"}})) == [
        "order of train (a, b then, b, a now)"
    ]
    assert list(_differences({"train": {"a": "x"}}, {"train": {"b": "x"}})) == ["names of train (a then, b now)"]
    assert not list(_differences({"train": {"a": "x"}}, {"train": {"a": "moved"}}))  # what it holds is compared
    old, new = {"rae": "p", "test": {"a": 1, "b": 2}}, {"rae": "q", "test": {"b": 2, "a": 1}}
    assert not list(_differences(old, new))
    assert not list(
        _differences({}, {"validation_lpips": "alex", "validation_lpips_weights": "a.pth"})
    )  # they only watch


# Errors


@pytest.mark.parametrize(
    ("log_every", "said"),
    [(1, r"step 5: the loss is \{'loss': nan\}; lower fit"), (50, "step 6: the weights are not finite; lower fit")],
)
def test_a_loss_that_is_no_number_stops_the_training_and_spares_the_checkpoints(tmp_path, log_every, said):
    config = replace(BASE, steps=40, save_every=2, log_every=log_every)
    with pytest.raises(ValueError, match=said):
        train(tmp_path, config, samples=ToySamples(bad=8 * 4))
    kept = steps_kept(tmp_path)
    assert kept == [2, 4]
    assert all(bool(tensor.isfinite().all()) for tensor in checkpoint(tmp_path, 4)["network"].values())


def test_start_from_takes_the_averaged_weights_of_another_run(tmp_path):
    first = train(tmp_path / "first")
    file = tmp_path / "first/checkpoints/step-00000012.pt"
    found = []
    second = replace(BASE, start_from=str(file), learning_rate=1e-12, final_learning_rate=1e-12, steps=1)
    train(tmp_path / "second", second, validate=lambda network: found.append(network) or Validation({}))
    ours, theirs = (dict(network.named_parameters()) for network in (found[0], first.network))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_a_wrong_start_is_named(tmp_path):
    train(tmp_path / "first", objective=ToyObjective(width=8))
    file = tmp_path / "first/checkpoints/step-00000012.pt"
    with pytest.raises(ValueError, match=r"start_from=.*step-00000012.pt: holds another network \(size mismatch for"):
        train(tmp_path / "second", replace(BASE, start_from=str(file)))
    with pytest.raises(ValueError, match=r"none.pt: no such file"):
        train(tmp_path / "second", replace(BASE, start_from=str(tmp_path / "none.pt")))
    (tmp_path / "text.pt").write_text("weights, honestly")
    with pytest.raises(ValueError, match=r"text.pt: not a readable training checkpoint"):
        train(tmp_path / "second", replace(BASE, start_from=str(tmp_path / "text.pt")))
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(
        ValueError, match=r"other.pt: not a training checkpoint \(those are called checkpoints/step-N.pt"
    ):
        train(tmp_path / "second", replace(BASE, start_from=str(tmp_path / "other.pt")))
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"step-00000012.pt: not a readable training checkpoint"):
        train(tmp_path / "first", objective=ToyObjective(width=8))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 0}, "fit.steps=0: must be at least 1"),
        ({"keep": 0}, "fit.keep=0: must be at least 1"),
        ({"steps": 12, "profile": 3}, "fit.profile=3: must be at most fit.steps - 10 = 2"),
        ({"learning_rate": 0.0}, "fit.learning_rate=0.0: must be above 0"),
        ({"ema": 1.0}, r"fit.ema=1.0: must lie in \[0, 1\)"),
        ({"betas": (0.9, 1.0)}, r"fit.betas=\[0.9, 1.0\]: must lie in \[0, 1\)"),
        ({"seed": -1}, "fit.seed=-1: must not be negative"),
        ({"clip": -1.0}, "fit.clip=-1.0: must not be negative"),
        ({"batch": 9, "accumulate": 2}, "fit.batch=9: must be a multiple of fit.accumulate=2"),
    ],
)
def test_a_bad_setting_is_named(changes, said):
    with pytest.raises(ValueError, match=said):
        FitConfig(**changes)


def test_accumulation_by_the_launcher_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ValueError, match=r"--gradient_accumulation_steps=4: leave it at 1 and set fit.accumulate"):
        train(tmp_path)


if __name__ == "__main__":
    toy_job(sys.argv[1], **dict(word.split("=") for word in sys.argv[2:]))
