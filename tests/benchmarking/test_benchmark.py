"""The benchmark computes what its tables say; its times are nobody's test."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch

from degflow import Degrader, images
from degflow.benchmarking import measure
from degflow.benchmarking.inference import (
    accuracy,
    comparison,
    decibels,
    evaluations,
    expected,
    margins,
    ours,
    pixel_by_pixel,
    roofline,
)
from degflow.benchmarking.measure import Timing, alternate, flop
from degflow.benchmarking.node import Cost, _mean_spent, rates
from degflow.benchmarking.optimisations import optimisations
from degflow.benchmarking.pipeline import codecs
from degflow.benchmarking.plain import exact, plain_decode, released
from degflow.benchmarking.predict import GPU
from degflow.benchmarking.run import BenchmarkConfig, benchmark
from degflow.benchmarking.steps import _plain_update, _update, objectives, optimised, training
from degflow.capture.optics import Optics
from degflow.config import load
from degflow.flow import PathFlow
from degflow.models import (
    AutoencoderConfig,
    ResidualAutoencoder,
    ResidualConfig,
    ResidualFlow,
    ResidualNetwork,
    Spread,
    VelocityConfig,
    VelocityNetwork,
)
from degflow.restoration.networks import NetworkConfig, SwinIRConfig
from tests import ROOT


def published():
    network = VelocityNetwork(VelocityConfig(width=8, blocks=1, multipliers=(1, 1), dropout=0.0))
    network.embedding.first.weight.data[:, [0, 1, 4, 5]] = 0  # fast waves of the time, for which RK45 takes long
    return PathFlow(network)


def drawing(blocks=2):
    network = ResidualNetwork(ResidualConfig(width=16, blocks=blocks))
    torch.nn.init.normal_(network.head.weight, std=0.1)  # zeros at first
    optics, spread = Optics((1.0, 4.0)), Spread(4, (0.0, 1.0))
    optics.log_transfer[1] = -10 * torch.linspace(0, 1, optics.rings) ** 2
    spread.fit(0.2 * torch.eye(4)[None, None, None])
    return ResidualFlow(optics, spread, network, 4)


def of(flow):
    torch.manual_seed(0)
    autoencoder = ResidualAutoencoder(AutoencoderConfig(base_width=8, blocks=1, multipliers=(1, 1, 2), gate_init=0.5))
    return Degrader(autoencoder, flow(), {"1": 1.0, "4": 4.0})


@pytest.fixture(scope="module", params=[published, drawing])
def degrader(request):
    return of(request.param)


@pytest.fixture(scope="module")
def hr():
    return torch.rand(1, 3, 20, 28, generator=torch.Generator().manual_seed(1)) * 2 - 1


def cells(table):
    return {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}


def test_the_released_procedure_agrees_with_a_fine_integration(degrader, hr):
    scales = [1.0, 1.7, 4.0]
    reference = exact(degrader, hr, scales)
    assert min(decibels(ours(degrader, hr, scales, steps=32), reference.images)) > 80
    theirs = released(degrader, hr, scales)
    assert min(decibels(theirs.images, reference.images)) > 55  # the published path begins at t = 1e-3
    alone = released(degrader, hr, scales[1:2])
    assert alone.evaluations < theirs.evaluations < reference.evaluations
    assert decibels(alone.images, theirs.images[1:2])[0] > 60


def test_the_published_path_has_no_evaluation_at_its_start(hr):
    assert released(of(published), hr, [1.0]).evaluations == 0


def test_evaluations_are_those_of_the_network(degrader, hr):
    calls = []
    handle = degrader.flow.network.register_forward_hook(lambda *_: calls.append(1))
    counted = released(degrader, hr, [2.0, 4.0]).evaluations
    assert counted == len(calls) > 5
    for scales in ([1.0], [1.7], [4.0], [1.0, 2.0, 4.0]):
        calls.clear()
        ours(degrader, hr, scales)
        made = len(calls)
        assert evaluations(degrader, scales) == made
    handle.remove()


def test_decibels_is_the_psnr_over_all_channels():
    reference = torch.zeros(2, 3, 8, 8)
    assert decibels(torch.stack((reference[0] + 0.02, reference[1])), reference) == pytest.approx([40, 200], abs=1e-4)


def test_more_steps_follow_the_solution_more_closely(degrader, hr):
    rows = cells(accuracy(degrader, [hr], 2))
    least = {name: float(row["smallest"]) for name, row in rows.items()}
    assert least["heun x 1"] < least["heun x 4"] < least["heun x 16"]
    assert least["rk4 x 1"] < least["rk4 x 8"]
    shared = isinstance(degrader.flow, PathFlow)  # one integration for all scales, which needs the velocity at its end
    assert rows["heun x 32"]["evaluations"] == ("65" if shared else "64")
    own = "{} x {}".format(*degrader.flow.solver)
    assert least[own] > least[f"{own}, float16"] > least[f"{own}, bfloat16"] > 30


def test_the_comparison_has_every_way_and_its_agreement(degrader, hr):
    table = comparison(degrader, hr, 2, GPU(798, 3), count=3)
    rows, theirs = cells(table), released(degrader, hr, [2.5]).evaluations
    assert rows["released, one scale"]["evaluations"] == str(theirs)
    assert rows["released, one scale"]["x released, one scale"] == "1.0"
    kinds = ["one scale"]
    if isinstance(degrader.flow, PathFlow):
        kinds.append("sweep")
        assert rows["released, sweep"]["x released, sweep"] == "1.0"
        assert rows["released, sweep"]["x released, one scale"] == ""
        assert rows["degflow, sweep"]["evaluations"] == "19"
    assert list(rows) == [f"{way}, {kind}" for way in ("released", "degflow") for kind in kinds]
    assert min(float(row["agreement dB"]) for row in rows.values()) > 50
    assert {row["s predicted for a GPU"] for name, row in rows.items() if name.startswith("released")} == {"–"}
    memory = expected(degrader, hr, [2.5], GPU(1e9, 1e-9))  # a GPU that only waits for its memory
    assert expected(degrader, hr, [2.5], GPU(1e9, 5e-10)) == pytest.approx(2 * memory)
    assert rows["degflow, one scale"]["s predicted for a GPU"] == f"{expected(degrader, hr, [2.5], GPU(798, 3)):.3g}"
    for line in table.markdown().splitlines()[-2 * len(kinds) :]:
        assert line.count("|") == len(table.header) + 1


def test_ways_take_turns_and_ratios_are_within_a_repeat():
    seen = []
    timings = alternate({"a": lambda n: seen.append(("a", n)), "b": lambda n: seen.append(("b", n))}, 2)
    assert seen == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert len(timings["a"].seconds) == 2
    assert Timing([1.0, 2.0, 4.0], 0, None).faster_than(Timing([3.0, 2.0, 8.0], 0, None)) == 2


def test_the_other_tables_are_whole(degrader, hr):
    photographs = [images.to_pixels(hr)[0]]
    network = NetworkConfig(swinir=SwinIRConfig(12, (2,), 2))
    steps = training(degrader, None, network, GPU(798, 3), "float32", 1, crop=32, batch=2)
    codec = codecs(photographs, 1)
    rooflines = [roofline(degrader, hr, 1, side=64, precision=kind) for kind in ("float32", "bfloat16")]
    for table in (steps, codec, *rooflines):
        assert table.rows
        assert {len(row) for row in table.rows} == {len(table.header)}
    assert ("without LPIPS" in steps.about) == isinstance(degrader.flow, PathFlow)
    made = cells(steps)
    quicker = "points=4" if isinstance(degrader.flow, PathFlow) else "encode_once=true"
    assert list(made) == ["stage 1", "stage 2", f"stage 2, {quicker}", "SR: swinir"]
    # Products at 1 FLOP/ns (a fifteenth of it in float32), and all else for nothing: the FLOP's time, and launches'.
    slow = cells(training(degrader, None, network, GPU(1e-3, 1e9), "float32", 1, crop=32, batch=2))
    for row in slow.values():
        assert 0.5 < float(row["steps/s predicted for a GPU"]) * float(row["GFLOP"]) * 15 <= 1.3
    written = cells(codec)
    size = len(images.encode_png(photographs[0], 9)) / photographs[0][..., 0].size
    assert float(written["PNG, Pillow level 9"]["bytes per pixel"]) == pytest.approx(size, abs=0.01)


def test_what_an_optimisation_should_gain_is_counted(degrader, hr, tmp_path):
    degrader.save(str(tmp_path / "tiny.safetensors"), {})
    model = str(tmp_path / "tiny.safetensors")
    compiled = isinstance(degrader.flow, ResidualFlow)  # compiling the other takes minutes
    rows = cells(optimisations(degrader, hr, 1, count=3, compiled=compiled, model=model, side=256))
    few, theirs = evaluations(degrader, [2.5]), released(degrader, hr, [2.5]).evaluations
    assert list(rows) == [
        f"evaluations: {few} in place of RK45's {theirs} at 1e-5",
        "one call for 3 scales",
        "decoder's 1x1 convolutions multiplied out",
        "decoder's last convolution for 4 pixels at once",
        *["torch.compile"] * compiled,
        "pages of 2 MiB for large tensors (256 x 256, one thread)",
    ]
    *counts, pages = rows.values()
    assert all(float(row["predicted"]) > 1 for row in counts)
    assert " page faults of " in pages["by"]  # how many fewer is the kernel's settings' business


def test_a_plain_decoder_gives_the_same_image_for_more_work(degrader):
    latent, skips = degrader.autoencoder.encode(torch.rand(1, 3, 32, 32) * 2 - 1)
    decoder = degrader.autoencoder.decoder
    torch.testing.assert_close(
        plain_decode(decoder, latent, skips), degrader.autoencoder.decode(latent, skips), rtol=0, atol=1e-5
    )
    with pixel_by_pixel(decoder):
        work = flop(lambda _: plain_decode(decoder, latent, skips)), flop(lambda _: decoder(latent, skips))
    assert work[0] > work[1]
    assert flop(lambda _: decoder(latent, skips)) > work[1]  # zeros are multiplied, not counted


def test_a_margin_leaves_less_the_wider_it_is_and_nothing_if_it_is_the_whole_photograph():
    degrader = of(drawing)
    hr = torch.rand(1, 3, 128, 160, generator=torch.Generator().manual_seed(1)) * 2 - 1
    table = margins(degrader, [hr, hr.flip(3)], 32, (0, 16, 128), (1.0, 4.0))
    assert table.header == ("margin, pixels", "largest at x1", "rms at x1", "largest at x4", "rms at x4")
    none, some, all_of_it = ([float(cell) for cell in row[1:]] for row in table.rows)
    assert [row[0] for row in table.rows] == ["0", "16", "128"]
    assert none[0] > 1
    assert none[2] > 20 * some[2] > 0  # 6 times only, with the noise of another place
    assert none[3] > 20 * some[3]
    assert all_of_it == [0, 0, 0, 0]


def test_the_comparison_takes_a_precision(hr):
    kinds, model, gpu = ("float32", "bfloat16"), of(drawing), GPU(798, 3)
    exactly, half = (cells(comparison(model, hr, 1, gpu, 3, precision=kind)) for kind in kinds)
    assert float(half["degflow, one scale"]["agreement dB"]) < float(exactly["degflow, one scale"]["agreement dB"]) - 5
    assert half["released, one scale"]["agreement dB"] == exactly["released, one scale"]["agreement dB"]


def test_a_plain_training_step_stands_beside_the_optimised_one(degrader):
    table = optimised(degrader, "float32", 1, compiled=False, crop=32, batch=2)
    rows = cells(table)
    assert list(rows) == ["stage 1", "stage 2"]
    for row in rows.values():
        rate = float(row["optimised steps/s"]) / float(row["plain steps/s"])
        assert float(row["times as fast"]) == pytest.approx(rate, rel=0.02, abs=0.02)
    assert ("encode_once=true" in table.about) is not isinstance(degrader.flow, PathFlow)


def test_both_kinds_of_training_steps_change_the_weights_alike(degrader):
    changed = []
    for kind in (_plain_update, _update):
        objective, sample = objectives(copy.deepcopy(degrader), None, 32, 2)["stage 1"]
        objective(*sample).total.backward()
        kind(objective.network)()
        changed.append([parameter.detach() for parameter in objective.network.parameters()])
    torch.testing.assert_close(*changed, rtol=1e-4, atol=1e-6)


def test_the_job_saves_what_it_prints(tmp_path):
    of(drawing).save(str(tmp_path / "tiny.safetensors"), {})
    (tmp_path / "photos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    (tmp_path / "photos/a.png").write_bytes(images.encode_png(pixels))
    words = [f"model={tmp_path}/tiny.safetensors", f"input={tmp_path}/photos", f"output={tmp_path}/out", "quick=true"]
    done = subprocess.run(
        [sys.executable, ROOT / "jobs/benchmark.py", *words, "threads=1"],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    saved = (tmp_path / "out/benchmark.md").read_text()
    titles = [line[3:].split(",")[0] for line in saved.splitlines() if line.startswith("## ")]
    assert titles == [
        "Accuracy of the solvers",
        "Against the released procedure",
        "Roofline",
        "Optimisations",
        "A large image in bounded memory",
        "What a crop's margin leaves",
        "Training steps",
        "Training steps without and with the optimisations",
        "Bare loop and Ray job",
        "Scaling with actors (stand-in)",
        "Codecs",
        "What a photograph costs outside the networks",
        "One node (model)",
        "How busy a device stays (stand-in)",
        "Planning",
        "Finding finished shards",
        "Precision",
        "Predicted for a GPU",
        "Predicted for a GPU",
        "Images by size",
        "Tests on this device",
    ]
    assert all(table in done.stdout for table in saved.split("\n\n"))


@pytest.mark.parametrize(("encode", "binding"), [(7.0, "codecs"), (0.5, "networks and own threads in turn")])
def test_the_slowest_stage_of_a_node_binds(encode, binding):
    cost = Cost(decode=0.5, encode=encode, actor=0.05, second=0.1, pixels=36_000_000, hr=15_000_000, lr=50_000_000)
    table = rates(cost, 0.15, "4000 x 3000")
    found = {row[0].strip("*"): float(row[1]) for row in table.rows}
    assert found == {
        "networks": 53.3,
        "actors' own threads": 160.0,
        "actors' second threads": 80.0,
        "networks and own threads in turn": 40.0,
        "codecs": round((64 - 8 * 0.15 / 0.2) / (0.5 + encode), 1),
    }
    assert [row[0] for row in table.rows if row[2] == "binds"] == [f"**{binding}**"]
    passed = 0.245 * min(found.values())  # GB: pixels, those of 4 LR images, and their PNGs
    assert f"{passed:.1f} GB/s pass through the object store" in table.about


def test_what_a_photograph_costs_is_counted_in_each_thread_alone():
    clocks = [(7, 0.5 + n / 4) for n in range(6)]
    clocks += [(8, 0.5), (7, 2.25), (8, 1.25), (7, 0.5), (7, 1.0)]
    notes = [{"who": "rows", "thread": thread, "cpu": cpu} for thread, cpu in clocks]
    notes.insert(3, {"who": "image", "thread": 7, "cpu": 9.0})
    # The first four spans of 0.25 s do not count; then come 0.25, 0.5, 0.75, and a new thread's 0.5.
    assert _mean_spent(notes, "rows") == 0.5


def test_parts_that_compare_solvers_need_a_model_with_one(tmp_path):
    model = tmp_path / "gaussian.safetensors"
    of(lambda: drawing(blocks=0)).save(str(model), {})
    with pytest.raises(
        ValueError, match=r"parts: accuracy, comparison, optimisations compare solvers, and model=.* no"
    ):
        benchmark(BenchmarkConfig(model=str(model), input=str(tmp_path), output=str(tmp_path)))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("parts=[speed]", r"parts=\('speed',\): must be some of accuracy, comparison"),
        ("repeats=0", "repeats=0: must be at least 1"),
        ("precision=float8", "precision=float8: must be one of float32, tf32, bfloat16, float16"),
        ("device=tpu", "device=tpu: must be auto, cpu or cuda"),
    ],
)
def test_a_bad_key_is_named(word, message):
    with pytest.raises(ValueError, match=message):
        load(BenchmarkConfig, [word])


def test_a_report_names_the_gpu_its_driver_and_its_libraries(monkeypatch):
    there = True

    def run(command, **options):
        assert (command[0], options["check"]) == ("nvidia-smi", True)
        if not there:  # as in some containers
            raise FileNotFoundError
        return subprocess.CompletedProcess(command, 0, "580.65.06\n580.65.06\n", "")

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91300)
    monkeypatch.setattr(subprocess, "run", run)
    assert ", NVIDIA H100 80GB HBM3 (driver 580.65.06, CUDA 13.0, cuDNN 91300); torch" in measure.machine("cuda")
    there = False
    assert "(driver unknown, CUDA 13.0" in measure.machine("cuda")
