"""Numbers of a device (`--device`, by default the CPU) against float64 on the CPU; on a GPU also what it waits for."""

import contextlib
import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from degflow import Degrader, images
from degflow.config import load
from degflow.models.counter import gaussian
from degflow.models.precision import computing, differentiating
from degflow.synthesis.codec import Loaded
from degflow.synthesis.run import synthesize
from degflow.synthesis.settings import SynthesizeConfig
from degflow.synthesis.window import Item, WindowDegrader
from tests.finished import synthesize_here
from tests.sources import png, rows_of, save_model, save_photos
from tests.synthesis.clusters import own_ray
from tests.test_degrader import degrader_of, pictures
from tests.test_objectives import KINDS, batch_of, objective_of
from tests.training.test_loop import BASE, PROBLEMS, train

SCALES = torch.tensor([[2.0, 3.75]])


def only_on_gpu(device):
    if device.type == "cpu":
        pytest.skip("of a GPU: --device cuda")


@contextlib.contextmanager
def no_waiting(device):
    """A block in which waiting for all work of the GPU is an error."""
    if device.type == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def decibels(found, wanted):
    error = (found.cpu().double() - wanted.double()).square().mean()
    return float(10 * (4 / error).log10())


@pytest.mark.parametrize("kind", ["path", "residual"])
@pytest.mark.parametrize("memory", [4.0, 0.17], ids=["whole", "in tiles"])
def test_a_degraders_float32_is_float32(device, kind, memory):
    degrader, hr = degrader_of(kind), pictures(1, 256, 200)
    exact = copy.deepcopy(degrader).double()(hr.double(), SCALES, seed=5)
    found = degrader.to(device)(hr.to(device), SCALES, seed=5, memory=memory)
    assert decibels(found, exact) > 110  # with convolutions in TF32 it is below 90


@pytest.mark.parametrize(("precision", "least"), [("tf32", 50), ("bfloat16", 40), ("float16", 50)])
def test_narrower_precisions_are_near_and_narrower(device, precision, least):
    only_on_gpu(device)
    degrader, hr = degrader_of("residual").to(device), pictures(1, 256, 200).to(device)
    exact, found = (degrader(hr, SCALES, precision=kind) for kind in ("float32", precision))
    assert least < decibels(found, exact.cpu()) < 110


def test_noise_has_the_same_numbers_everywhere(device):
    seeds = torch.tensor([0, 7, 2**40])
    found = gaussian(seeds.to(device), 4, 33, 20).cpu()
    torch.testing.assert_close(found, gaussian(seeds, 4, 33, 20), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_objectives_loss_and_gradient_are_the_cpus(device, kind):
    only_on_gpu(device)
    results = []
    for where in (torch.device("cpu"), device):
        objective = objective_of(kind).train().to(where)
        with computing("float32", where.type):
            losses = objective(**{name: value.to(where) for name, value in batch_of(kind).items()})
        with differentiating("float32"):
            losses.total.backward()
        gradient = torch.cat([parameter.grad.flatten().cpu() for parameter in objective.network.parameters()])
        results.append((losses.total.detach().cpu(), gradient / gradient.norm()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["path", "residual"])
@pytest.mark.parametrize("memory", [4.0, 0.17], ids=["whole", "in tiles"])
def test_a_degrader_does_not_wait_for_the_gpu(device, kind, memory):
    only_on_gpu(device)
    degrader, hr = degrader_of(kind).to(device), pictures(1, 256, 200).to(device)
    degrader(hr, SCALES, memory=memory)  # the libraries wait when they are first used
    with no_waiting(device):
        degrader(hr, SCALES, memory=memory)


def test_lr_images_come_from_the_gpu_while_it_works_on_the_next_ones(device, tmp_path):
    degrader = Degrader.load(save_model(tmp_path / "draws.safetensors", draws=True), device)
    random = np.random.default_rng(0)
    photos = [random.integers(0, 256, (height, 80, 3), dtype=np.uint8) for height in (64, 64, 72, 96, 64)]
    items = [Item(None, Loaded(str(n), photo, ""), [2.0, 3.5]) for n, photo in enumerate(photos)]
    window = WindowDegrader(degrader, 1.0, "float32", 0, "", 0, 1.0)
    window.degrade(items)  # the libraries wait when they are first used
    with no_waiting(device):  # for one event of each pass alone, which is no waiting for the whole GPU
        found = window.degrade(items)
    for item, lrs in zip(items, found, strict=True):
        scales, seeds = torch.tensor([item.scales]), torch.tensor([[draw.noise_seed for draw in window.draws(item)]])
        wanted = degrader.cpu()(images.to_tensor(item.loaded.pixels)[None], scales, seed=seeds)[0]
        assert np.abs(lrs.astype(int) - images.to_pixels(wanted)).max() <= 1


def test_a_training_on_the_gpu_goes_on_where_it_was_stopped(device, tmp_path):
    only_on_gpu(device)
    config = replace(BASE, save_every=3, precision="bfloat16")
    make, samples = PROBLEMS["rae"]
    whole = train(tmp_path / "whole", config, make(), samples())
    with pytest.raises(InterruptedError):
        train(tmp_path / "cut", config, make(), samples(8 * 7, InterruptedError()))
    resumed = train(tmp_path / "cut", config, make(), samples())
    begun = make().network.state_dict()
    for name, value in whole.network.state_dict().items():
        learned = (value - begun[name].to(value.device)).norm()
        assert (resumed.network.state_dict()[name] - value).norm() <= 0.2 * learned + 1e-6  # Adam enlarges rounding


def test_actors_on_the_gpu_make_the_rows_of_the_cpu(device, tmp_path):
    only_on_gpu(device)
    photos, model = save_photos(tmp_path / "photos"), save_model(tmp_path / "draws.safetensors", draws=True)
    synthesize_here(photos, tmp_path / "here", model)
    words = [f"input={photos}", f"output={tmp_path / 'out'}", f"model={model}"]
    gpus = int(device.type == "cuda")
    with own_ray():
        synthesize(load(SynthesizeConfig, [*words, f"actors.gpus={gpus}", "actors.max=1"]))
    found, wanted = rows_of(tmp_path / "out"), rows_of(tmp_path / "here")
    assert found.keys() == wanted.keys()
    for key, row in found.items():
        assert (row["scale"], row["noise_seed"]) == (wanted[key]["scale"], wanted[key]["noise_seed"])
        lr, other = (png(made["lr"]["bytes"]).astype(int) for made in (row, wanted[key]))
        assert np.abs(lr - other).max() <= 1
