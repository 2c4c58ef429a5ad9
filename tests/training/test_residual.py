"""Stage 1 with skips=optics, then train_residual, as jobs on a small simulated tree; and the fit of the spread."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy.ndimage import gaussian_filter
from torch import nn

from degflow import Degrader, images
from degflow.capture.optics import Optics
from degflow.capture.scenes import SceneConfig, SceneImages
from degflow.capture.skeletons import Stack, stacks_of
from degflow.models import ResidualConfig, ResidualFlow, ResidualNetwork, Spread
from degflow.models.cutoff import Cutoff
from degflow.models.files import load_checkpoint
from degflow.models.grain import SHARE
from degflow.models.residual import lost_detail
from degflow.training.rae import load_stage1
from degflow.training.residual import TrainResidualConfig, fit_finish, fit_spread, train_residual
from degflow.trajectory import Timeline
from tests import ROOT
from tests.captures import save_scenes
from tests.training.test_jobs import LFM, RAE, begins_as_another_process, fails, start, succeed

pytestmark = pytest.mark.usefixtures("one_thread")
LEVELS = {"1": 1.0, "2": 2.0, "4": 4.0}
OPTICS_RAE = {**RAE, "skips": "optics", "scenes.crop": 32, "scenes.reductions": "[1.0,1.6]", "fit.steps": 8}
OPTICS_RAE |= {"fit.validate_every": 4}
RESIDUAL = {
    "scenes.crop": 32,
    "scenes.reductions": "[1.0,1.6]",
    "residual.width": 16,
    "residual.blocks": 1,
    "fit.steps": 12,
    "fit.batch": 2,
    "fit.learning_rate": 1e-3,
    "fit.validate_every": 6,
    "fit.save_every": 1,
    "fit.log_every": 1,
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Two photographs large enough for the optics, captured at two scales into a RealSR-like tree."""
    data = pytest.importorskip("skimage.data")
    photos = data.astronaut()[20:116, 180:300], data.coffee()[100:204, 200:296]
    return save_scenes(tmp_path_factory.mktemp("scenes") / "Canon/Train", photos, ("2", "4"))


@pytest.fixture(scope="module")
def rae(tree, tmp_path_factory):
    output = tmp_path_factory.mktemp("rae")
    return output, succeed("train_rae", **OPTICS_RAE, **{"scenes.data": tree, "output": output})


def keys_of(tree, rae, output, **changes):
    return {**RESIDUAL, "scenes.data": tree, "rae": rae[0] / "rae.safetensors", "output": output, **changes}


def test_only_the_main_process_decodes_the_validation(tree, rae, tmp_path, monkeypatch):
    keys = keys_of(tree, rae, tmp_path / "out")
    assert begins_as_another_process(train_residual, TrainResidualConfig, monkeypatch, **keys)


@pytest.fixture(scope="module")
def residual(tree, rae, tmp_path_factory):
    """An uninterrupted training."""
    output = tmp_path_factory.mktemp("residual")
    return output, succeed("train_residual", **keys_of(tree, rae, output))


def test_stage_1_leaves_the_optics_beside_the_autoencoder(tree, rae):
    output, said = rae
    assert f"autoencoder: {output}/rae.safetensors" in said
    tensors, description, _ = load_checkpoint(str(output / "rae.safetensors"), "autoencoder")
    assert description["optics"] == {"scales": [1.0, 2.0, 4.0], "rings": 64}
    autoencoder, optics = load_stage1(str(output / "rae.safetensors"), LEVELS)
    scenes = SceneImages(SceneConfig(str(tree), LEVELS, crop=32), quiet=True)
    assert torch.equal(optics.log_transfer, Optics.fit(scenes).log_transfer)
    assert set(tensors) == {"optics.log_transfer", *autoencoder.state_dict()}
    previews = sorted(file.name for file in (output / "previews").iterdir())
    assert previews == ["step-00000004.png", "step-00000008.png"]


def test_stage_2_leaves_one_degrader_file_that_degrades(tree, rae, residual):
    output, said = residual
    assert re.search(r"^2 scenes at levels 1, 2, 4 \(", said, re.M)
    assert re.search(r"^step 12 of 12: cfm [0-9.e-]+, [0-9.]+ images/s$", said, re.M)
    assert re.search(r"^step 12: .*x2 [0-9.-]+, x4 [0-9.-]+$", said, re.M)
    assert f"degrader: {output}/degrader.safetensors" in said
    degrader = Degrader.load(str(output / "degrader.safetensors"))
    assert isinstance(degrader.flow, ResidualFlow)
    assert degrader.levels == LEVELS
    assert degrader.provenance["scenes"] == ["Canon_001", "Canon_002"]
    assert degrader.provenance["config"]["residual"]["width"] == 16
    assert degrader.flow.spread.times.tolist() == pytest.approx([0, 0.25 / 3, 1 / 3, 0.5, 1], abs=1e-6)
    stage1 = load_file(rae[0] / "rae.safetensors")
    assert all(torch.equal(tensor, stage1[name]) for name, tensor in degrader.autoencoder.state_dict().items())
    assert torch.equal(degrader.flow.optics.log_transfer, stage1["optics.log_transfer"])
    averaged = torch.load(output / "checkpoints/step-00000012.pt", weights_only=True)["ema"]
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in degrader.flow.network.state_dict().items())
    photo = Image.open(tree / "2/Canon_001_HR.png")
    draws = [degrader.degrade(photo, 2.7, seed=seed) for seed in (0, 1)]
    assert all(draw.size == photo.size for draw in draws)
    assert draws[0].tobytes() != draws[1].tobytes()


def test_a_stopped_training_ends_in_the_same_bytes(tree, rae, residual, tmp_path):
    keys = keys_of(tree, rae, tmp_path)
    process = start("train_residual", **keys)
    end = time.monotonic() + 180
    while not list(tmp_path.glob("checkpoints/step-*.pt")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)  # test_loop kills the same loop
    process.communicate(timeout=120)
    assert process.returncode == 75
    assert not (tmp_path / "degrader.safetensors").exists()
    assert re.search(r"resuming after step \d+ ", succeed("train_residual", **keys))
    assert digest(tmp_path) == digest(residual[0])


def digest(output):
    """Of the degrader, but for the folder's name in its provenance."""
    tensors, description, _ = load_checkpoint(str(output / "degrader.safetensors"))
    description["provenance"]["config"].pop("output")
    found = hashlib.sha256(repr(sorted(description.items())).encode())
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].numpy().tobytes())
    return found.hexdigest()


def test_a_training_goes_on_from_a_degrader_file(tree, residual, tmp_path):
    file = residual[0] / "degrader.safetensors"
    still = {"fit.steps": 1, "fit.learning_rate": 1e-12, "fit.final_learning_rate": 1e-12, "fit.start_from": file}
    succeed("train_residual", **{**RESIDUAL, **still}, **{"scenes.data": tree, "rae": file, "output": tmp_path})
    before, after = load_file(file), load_file(tmp_path / "degrader.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-6)


def test_stage_1_goes_on_from_a_file_with_optics(tree, rae, residual, tmp_path):
    still = {"fit.steps": 1, "fit.learning_rate": 1e-12, "fit.final_learning_rate": 1e-12}
    before = load_file(rae[0] / "rae.safetensors")
    rescaled = ("encoder.head.weight", "encoder.head.bias", "decoder.stem.weight")  # the latent's unit is measured anew
    for file in (rae[0] / "rae.safetensors", residual[0] / "degrader.safetensors"):
        output = tmp_path / file.stem
        succeed("train_rae", **{**OPTICS_RAE, **still, "scenes.data": tree, "output": output, "fit.start_from": file})
        after = load_file(output / "rae.safetensors")
        assert before.keys() == after.keys()
        for name in before.keys() - rescaled:
            torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-6)


def test_without_blocks_the_gaussian_is_fitted_and_nothing_is_trained(tree, rae, residual, tmp_path):
    said = succeed("train_residual", **keys_of(tree, rae, tmp_path, **{"residual.blocks": 0}))
    assert "step 1" not in said
    degrader, trained = (Degrader.load(str(folder / "degrader.safetensors")) for folder in (tmp_path, residual[0]))
    assert degrader.flow.network.config.blocks == 0
    assert torch.equal(degrader.flow.spread.filters, trained.flow.spread.filters)
    hr = torch.rand(1, 3, 40, 40) * 2 - 1
    draws = [degrader(hr, torch.tensor([3.0]), seed=seed) for seed in (0, 1)]
    assert not torch.equal(*draws)


def test_scenes_may_be_encoded_once_into_a_cache_for_all_trainings(tree, rae, residual, tmp_path):
    cache = tmp_path / "cache"
    once = {"encode_once": "true", "scenes.cache": cache}
    written = []
    for name in "ab":
        said = succeed("train_residual", **keys_of(tree, rae, tmp_path / name, **once))
        assert re.search(r"^step 12 of 12: cfm [0-9.e-]+, ", said, re.M)
        written.append({path: path.stat().st_mtime_ns for path in cache.iterdir()})
    assert written[0] == written[1]  # the second one encoded nothing
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(residual[0])
    assert len(list(cache.glob("*-latents.npy"))) == 8  # two scenes at two reductions, and their copies
    trained, other = (load_file(folder / "degrader.safetensors") for folder in (tmp_path / "a", residual[0]))
    assert torch.equal(trained["flow.spread.filters"], other["flow.spread.filters"])
    assert not torch.equal(trained["flow.network.head.weight"], other["flow.network.head.weight"])


def in_two_processes(keys):
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    words = [*launcher, "-m", "degflow", "train-residual", *(f"{name}={value}" for name, value in keys.items())]
    more = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, *words], env={**os.environ, **more}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_processes_share_the_encoding_and_train_as_one_does(tree, rae, tmp_path):
    once = {"encode_once": "true", "scenes.cache": tmp_path / "cache"}
    in_two_processes(keys_of(tree, rae, tmp_path / "two", **once))
    assert len(list((tmp_path / "cache").glob("*-latents.npy"))) == 8
    succeed("train_residual", **keys_of(tree, rae, tmp_path / "one"), encode_once="true")
    two, one = (load_file(tmp_path / name / "degrader.safetensors") for name in ("two", "one"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4)


def test_two_processes_without_a_network_to_train_leave_the_degrader_of_one(tree, rae, tmp_path):
    gaussian = {"residual.blocks": 0}
    said = in_two_processes(keys_of(tree, rae, tmp_path / "two", **gaussian))
    assert said.count("degrader: ") == 1
    succeed("train_residual", **keys_of(tree, rae, tmp_path / "one", **gaussian))
    two, one = (load_file(tmp_path / name / "degrader.safetensors") for name in ("two", "one"))
    assert all(torch.equal(two[name], one[name]) for name in one)


def test_half_precision_is_stored_on_request(tree, rae, tmp_path):
    succeed("train_residual", **keys_of(tree, rae, tmp_path, half="true", **{"fit.steps": 1}))
    stored = load_file(tmp_path / "degrader.safetensors")
    assert stored["flow.network.stem.weight"].dtype == torch.float16
    assert stored["flow.spread.filters"].dtype == torch.float32


def test_each_stage_2_takes_its_own_kind_of_stage_1_alone(tree, rae, residual, tmp_path):
    plain = {**RAE, "fit.steps": 1, "scenes.data": tree, "output": tmp_path / "rae"}
    succeed("train_rae", **plain)
    file = tmp_path / "rae/rae.safetensors"
    code, words = fails("train_residual", **{**keys_of(tree, rae, tmp_path / "none"), "rae": file})
    assert code == 2
    assert f"error: rae={file}: holds no optics; train-rae makes them with skips=optics" in words
    for file in (rae[0] / "rae.safetensors", residual[0] / "degrader.safetensors"):
        code, words = fails("train_lfm", **LFM, **{"scenes.data": tree, "rae": file, "output": tmp_path / "none"})
        assert code == 2
        assert f"error: rae={file}: trained with skips=optics, which the published flow does not use" in words
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        ({"rae": "none.safetensors"}, 2, r"none.safetensors: no such file"),
        ({"scenes.levels": "{1: 1.0, 2: 2.1, 4: 3.75}"}, 2, r"scenes.levels=.*2.1.*: .* was trained on .*'2': 2.0"),
        ({"scenes.crop": 33}, 2, r"scenes.crop=33: must be a multiple of the autoencoder's r = 2"),
        ({"scenes.crop": 98}, 2, r"Canon_001_HR.png: 120 x 96 pixels, smaller than crop=98"),
        ({"scenes.crop": 64}, 2, r"scenes.reductions=\[1.0, 1.6\]: reduced by 1.6, no scene is left .*scenes.crop=64"),
        ({"scenes.reductions": "[2.0]"}, 2, r"scenes.reductions=\[2.0\]: .*has all levels above scale 1"),
        # before the scenes are read:
        ({"fit.start_from": "other.safetensors", "scenes.data": "none"}, 2, r"other.safetensors: no such file"),
        ({"residual.width": 9}, 2, r"residual.width=9: must be even"),
    ],
)
def test_what_does_not_fit_is_named_before_it_starts(changes, code, said, tree, rae, tmp_path):
    found, words = fails("train_residual", **{**keys_of(tree, rae, tmp_path / "none"), **changes})
    assert re.search(said, words), words
    assert found == code
    assert not (tmp_path / "none").exists()


# The fit of the spread


class Identity:
    """An encoder whose latents are the image, so that images of given latents are known."""

    config = SimpleNamespace(latent_channels=3, compression=1)

    def encode(self, image):
        return image, ()


def known_stack(root, random, side=128):
    """A scene whose captured latents are the optics' and gain times Gaussian noise of the covariance root root^T."""
    hr, skeleton = random.integers(100, 156, (2, side, side, 3), dtype=np.uint8)
    image = images.to_tensor(np.stack((hr, skeleton)))
    noise = torch.from_numpy(random.standard_normal((3, side, side))).float()
    lr = image[1:] + lost_detail(image[:1], image[1:], 1) * torch.einsum("ij,jhw->ihw", root, noise)
    return Stack(np.stack((hr, images.to_pixels(lr)[0], skeleton)), (2.0,))


def test_the_spread_is_fitted_to_the_captured_covariance_at_every_time():
    early = torch.tensor([[0.10, 0.04, 0.0], [0.04, 0.05, -0.02], [0.0, -0.02, 0.03]], dtype=torch.float64)
    late = early.flip(0, 1)
    random, stacks = np.random.default_rng(0), []
    for covariance in (early, late):
        stacks += [known_stack(torch.linalg.cholesky(covariance).float(), random) for _ in range(4)]
    spread = fit_spread(Identity(), stacks, [(0.4,)] * 4 + [(1.0,)] * 4, crop=64, quiet=True)
    roots = spread.filters[..., 0, 0].double()
    assert spread.times.tolist() == pytest.approx([0, 0.4, 1])
    torch.testing.assert_close(roots @ roots.mT, torch.stack((0 * early, early, late)), rtol=0.05, atol=1e-3)


def test_the_spread_is_that_of_the_scenes_without_their_retouched_copies():
    root, random = torch.diag(torch.tensor([0.3, 0.2, 0.1])), np.random.default_rng(0)
    plain, copy = known_stack(root, random), known_stack(3 * root, random)._replace(retouched=True)
    alone, both = (
        fit_spread(Identity(), stacks, [(1.0,)] * len(stacks), crop=64, quiet=True)
        for stacks in ([plain], [plain, copy])
    )
    torch.testing.assert_close(both.filters, alone.filters, rtol=0.05, atol=1e-3)


class Blind(nn.Module):
    """An autoencoder whose latent is nothing of the image; decoding adds it to the skips in squares of 8 pixels."""

    config = SimpleNamespace(latent_channels=3, compression=8)

    def encode(self, image):
        return torch.zeros_like(image[..., ::8, ::8]), ()

    def skips(self, image):
        return (image,)

    def decode(self, latent, skips):
        return skips[0] + upsampled(latent)


def upsampled(latent):
    return latent.repeat_interleave(8, 2).repeat_interleave(8, 3)


def finished(stacks, deviation):
    """A flow with grain and cutoff, fitted where the Gaussian alone draws, with this deviation; levels 1, 1.5, 2."""
    times = [tuple(scale - 1 for scale in stack.scales) for stack in stacks]
    found = sorted({time for each in times for time in each})
    spread = Spread(3, (0.0, *found))
    spread.filters[1:, :, :, 0, 0] = deviation * torch.eye(3)
    network = ResidualNetwork(ResidualConfig(latent_channels=3, width=8, blocks=0))
    flow = ResidualFlow(Optics((1.0, 2.0)), spread, network, 8)
    levels = {"1": 1.0, "1.5": 1.5, "2": 2.0}
    parts = {"autoencoder": Blind(), "flow": flow, "levels": levels, "timeline": Timeline((1.0, 2.0))}
    degrader = SimpleNamespace(**parts, parameters=network.parameters)
    fit_finish(cast(Degrader, degrader), stacks, times, quiet=True)
    return flow


def flat_stack(seed, deviation, fine=0.0, side=200):
    """A scene that lost 1 level everywhere, with the noise of such draws, and white noise of a strength in levels."""
    random = np.random.default_rng(seed)
    skeleton = random.integers(90, 166, (side, side, 3), dtype=np.uint8)
    stack = np.stack((skeleton + 1, skeleton, skeleton))
    gain = lost_detail(*map(images.to_tensor, (stack[:1], stack[2:])), 8)
    noise = upsampled(gain * deviation * torch.from_numpy(random.standard_normal((1, 3, side // 8, side // 8))))
    lr = images.to_tensor(stack[2:]) + noise + fine / 127.5 * torch.from_numpy(random.standard_normal(noise.shape))
    stack[1] = images.to_pixels(lr)[0]
    return Stack(stack, (2.0,))


def variance(grain):
    """Squared levels in each channel, where 1 level was lost."""
    one = torch.full((1, 3, 16, 16), 1 / 127.5)
    gain = grain.gain(one, torch.zeros_like(one), torch.ones(1))[0, 0, 0, 0] * 127.5
    return gain.square() * grain.field.filters[1].square().sum((1, 2, 3))


def test_the_grain_is_what_draws_lack():
    grain = finished([flat_stack(seed, 0.05, fine=2.0) for seed in range(3)], 0.05).grain
    fine = 1 - 1.25**2 * torch.pi / 64  # the share of frequencies outside of the disc that a latent pixel can hold
    assert variance(grain).tolist() == pytest.approx([SHARE * 4 * fine] * 3, rel=0.15)


def two_levels(seed, side=200):
    """A scene that was not reduced, and whose captures lack what is above 0.3 cycles per pixel at x2."""
    hr, lr, skeleton = flat_stack(seed, 0.0, side=side).pixels
    blurred = gaussian_filter(lr.astype(float), (1, 1, 0)).round().astype(np.uint8)
    return Stack(np.stack((hr, lr, blurred, skeleton, skeleton)), (1.5, 2.0))


def test_the_cutoff_is_fitted_to_scenes_that_were_not_reduced():
    whole = [two_levels(seed) for seed in range(3)]
    reduced = [Stack(two_levels(seed).pixels, (1.125, 1.5)) for seed in range(3, 6)]  # blurred already at x1.5
    alone, cutoff = (finished(stacks, 0.05).cutoff for stacks in (whole, [*whole, *reduced]))
    assert cutoff.times.tolist() == [0, 0.125, 0.5, 1]
    assert torch.equal(cutoff.filters[2:], alone.filters[1:])
    low, full = (torch.fft.fft2(taps, s=(32, 32)).abs()[:17, 0] for taps in cutoff.filters[2:])
    assert float((full[:9] - 1).abs().max()) < 0.2  # up to a quarter of a cycle; the scene is white
    assert float(full[13:].max()) < 0.2
    assert float(low[:13].min()) > 0.8


def test_cutoff_and_grain_leave_retouched_copies_out():
    whole = [two_levels(seed) for seed in range(3)]
    copies = [Stack(flat_stack(seed, 0.0).pixels[[0, 1, 1, 2, 2]], (1.5, 2.0), True) for seed in range(3)]
    alone, both = (finished(stacks, 0.05) for stacks in (whole, [*whole, *copies]))
    assert torch.equal(both.cutoff.filters, alone.cutoff.filters)
    assert torch.equal(both.grain.curves, alone.grain.curves)
    assert torch.equal(both.grain.field.filters, alone.grain.field.filters)


def test_small_scenes_can_be_fitted_too_and_reduced_ones_alone_have_no_cutoff():
    small = finished([two_levels(seed, side=24) for seed in range(2)], 0.05)
    assert float(small.cutoff.filters[2, 5, 5]) < 0.9
    reduced = finished([Stack(two_levels(0).pixels, (1.125, 1.5))], 0.05)
    assert torch.equal(reduced.cutoff.filters, Cutoff((0.0, 0.125, 0.5)).filters)


def test_rounding_is_no_grain():
    """Draws have the captured noise before it was rounded to 8 bits, which adds 1/12 of a squared level."""
    grain = finished([flat_stack(seed, 0.05) for seed in range(3)], 0.05).grain
    assert variance(grain).tolist() == pytest.approx([0] * 3, abs=0.02)


def test_a_fit_of_the_spread_repeats_and_keeps_times_apart(tree, rae):
    autoencoder, optics = load_stage1(str(rae[0] / "rae.safetensors"), LEVELS)
    scenes = SceneImages(SceneConfig(str(tree), LEVELS, crop=32), quiet=True)
    stacks = stacks_of(scenes, optics, (1.0, 1.6), quiet=True)
    times = [tuple((scale - 1) / 3 for scale in stack.scales) for stack in stacks]
    one, again = (fit_spread(autoencoder, stacks, times, 32, batches=2, batch=4, quiet=True) for _ in range(2))
    assert torch.equal(one.filters, again.filters)
    assert one.times.tolist() == pytest.approx([0, 0.25 / 3, 1 / 3, 0.5, 1], abs=1e-6)
    plain = [(stack, at) for stack, at in zip(stacks, times, strict=True) if stack.scales == (2.0, 4.0)]
    alone = fit_spread(autoencoder, *map(list, zip(*plain, strict=True)), 32, batches=2, batch=4, quiet=True)
    torch.testing.assert_close(alone.filters[1:], one.filters[[2, 4]])
