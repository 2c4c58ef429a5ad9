"""What a GPU should take is counted right, and a benchmark goes on after a stop and past what does not fit."""

import copy
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from degflow import Degrader, images
from degflow.benchmarking import gpu, run
from degflow.benchmarking.measure import Table, flop, run_process
from degflow.benchmarking.predict import GPU, LAUNCH, REST, Kernel, kernels, total
from degflow.benchmarking.run import BenchmarkConfig, benchmark
from degflow.benchmarking.steps import trainings
from degflow.config import Unfinished, load
from degflow.models.precision import PRECISIONS, computing, exactly
from degflow.synthesis.window import is_out_of_memory
from tests import ROOT
from tests.benchmarking.test_benchmark import cells, drawing, of, published

FAST = GPU(100.0, 1.0)


def meta(*shape):
    return torch.empty(*shape, device="meta")


def test_a_kernels_bytes_and_work_are_those_of_its_tensors():
    found = kernels(lambda: F.conv2d(meta(1, 8, 100, 100), meta(16, 8, 3, 3), padding=1) + 1, {})
    image, weights, out = 8 * 100 * 100 * 4, 16 * 8 * 9 * 4, 16 * 100 * 100 * 4
    assert found == [
        Kernel(REST, 2 * 16 * 8 * 9 * 100 * 100, image + weights, out),
        Kernel(REST, 0, out, out),
    ]


def test_a_view_and_an_empty_tensor_start_no_kernel_and_an_expanded_one_is_read_once():
    def way():
        wide = meta(1, 1000).expand(500, 1000).T[:10].unsqueeze(0)
        torch.empty_like(wide)
        return wide.mul(2)

    assert kernels(way, {}) == [Kernel(REST, 0, 4 * 1000, 4 * 10 * 500)]


def test_a_kernel_takes_the_longest_of_computing_memory_and_launch():
    product, sum_ = Kernel("a", 10**13, 10**9, 10**9), Kernel("a", 0, 4 * 10**9, 10**9)
    assert product.seconds(FAST, "bfloat16") == pytest.approx(0.1)  # 1e13 at 1e14 a second
    assert product.seconds(FAST, "tf32") == pytest.approx(0.2)
    assert sum_.seconds(FAST, "bfloat16") == pytest.approx(5e-3)
    assert Kernel("a", 0, 4, 4).seconds(FAST, "float32") == LAUNCH
    # Half precision: 4 bytes read, 2 written, 2 read; 2 written of 4.
    assert Kernel("a", 1, 4 * 10**9, 2 * 10**9).seconds(FAST, "float16") == pytest.approx(9e-3)
    assert total([product, sum_], FAST, "bfloat16") == pytest.approx(0.105)
    assert total([product, sum_], FAST, "bfloat16", fused=True) == pytest.approx(0.1)


def test_what_stays_in_float32_is_counted_so_at_any_precision():
    def way():
        with computing("bfloat16", "meta"):
            narrow = meta(64, 64) @ meta(64, 64)
            with exactly("meta"):
                return narrow @ meta(64, 64)

    narrow, exact = kernels(way, {})
    assert (narrow.exact, exact.exact) == (False, True)
    assert narrow == exact._replace(exact=False)
    work = Kernel("a", 10**13, 4 * 10**9, 4 * 10**9, exact=True)
    for precision in PRECISIONS:
        assert work.seconds(FAST, precision) == work.fused(FAST, precision) == pytest.approx(1.5)  # 15 times 0.1 s


@pytest.mark.parametrize("flow", [published, drawing])
def test_a_degraders_parts_are_all_of_its_work(flow):
    degrader = of(flow)
    found = gpu.counted(degrader, 64)
    shadow = copy.deepcopy(degrader).to("meta")
    assert sum(kernel.flop for kernel in found) == flop(lambda _: shadow(meta(1, 3, 64, 64), torch.tensor([3.0])))
    assert {kernel.part for kernel in found} == {"encoder", "flow's network", "decoder", REST}
    table = cells(gpu.predicted(degrader, 64, FAST, "bfloat16", "tiny"))
    assert sum(int(row["kernels"]) for name, row in table.items() if name != "all") == int(table["all"]["kernels"])


def test_a_convolution_of_four_times_the_pixels_is_four_times_the_work():
    degrader = of(drawing)
    work = [sum(k.flop for k in gpu.counted(degrader, side) if k.part == "encoder") for side in (64, 128)]
    assert work[1] == 4 * work[0] > 0


def test_every_image_is_predicted_and_one_that_does_not_fit_is_named(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "usual_memory", lambda device: 0.2)  # enough for 64 x 64
    monkeypatch.setattr(gpu, "ON_CPU", 4096)

    def full(ways, repeats, device):
        raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")

    with monkeypatch.context() as patch:
        patch.setattr(gpu, "alternate", full)
        assert gpu._timed(of(drawing), 64, 0.2, "float32", 1, "cpu")[0] == "does not fit"
    models = {"tiny": of(drawing), "larger": of(drawing)}
    table = gpu.by_size(models, ["tiny"], (64, 4096), FAST, "float32", 1, "cpu")
    measured = {(row[0], row[1]): row[6] for row in table.rows}
    assert float(measured.pop(("tiny", "64 x 64"))) > 0
    assert measured == {
        ("tiny", "4096 x 4096"): "does not fit",
        ("larger", "64 x 64"): "–",
        ("larger", "4096 x 4096"): "–",
    }
    assert "4096 x 4096: memory=0.2" in capsys.readouterr().out
    assert all(float(row[4]) > float(row[5]) > 0 for row in table.rows)


def test_the_trainings_for_realsr_are_predicted():
    slow, fast = (trainings(of(drawing), GPU(tflops, 1e9)) for tflops in (1e-3, 2e-3))
    assert list(cells(slow)) == ["stage 1: realsr_rae", "stage 2: realsr_residual"]
    for name, row in cells(slow).items():
        assert float(row["ms/step"]) == pytest.approx(2 * float(cells(fast)[name]["ms/step"]), rel=0.05)
        steps = int(row["steps"].split(" ")[0])
        assert float(row["hours"]) == pytest.approx(float(row["ms/step"]) * steps / 3.6e6, rel=0.1)


def test_tf32_is_emulated_where_the_policy_allows_it():
    degrader, hr = of(drawing), torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    scale = torch.tensor([3.0])
    with gpu._RoundedToTF32():
        same, rounded = (degrader(hr, scale, precision=kind) for kind in ("float32", "tf32"))
    assert torch.equal(same, degrader(hr, scale))
    assert not torch.equal(rounded, same)
    rows = cells(gpu.precisions(degrader, hr, 1, FAST))
    loss = {name: row["PSNR dB"] for name, row in rows.items()}
    assert loss.pop("float32") == "–"
    assert float(loss["bfloat16"]) + 6 < float(loss["tf32, emulated"]) < 110
    assert abs(float(loss["float16"]) - float(loss["tf32, emulated"])) < 12  # both have 10 bits
    assert rows["tf32, emulated"]["s"] == "–"
    seconds = {name: float(row["s predicted for a GPU"]) for name, row in rows.items()}
    assert seconds["tf32, emulated"] <= seconds["float32"]


def test_rounding_to_tf32_keeps_ten_bits_and_is_to_the_nearest():
    values = torch.tensor([[1.0, 1 + 2**-10, 1 + 2**-11 + 2**-20, 1 + 2**-12, -3.0000002, 0.0]])
    wanted = torch.tensor([[1.0, 1 + 2**-10, 1 + 2**-10, 1.0, -3.0, 0.0]])
    assert torch.equal(gpu._rounded(values), wanted)
    random = torch.randn(4, 1000)
    mantissa, exponent = np.frexp(random.numpy())
    nearest = np.floor(np.abs(mantissa) * 2**11 + 0.5) / 2**11  # ties away from zero
    independent = np.ldexp(np.copysign(nearest, mantissa), exponent)
    np.testing.assert_array_equal(gpu._rounded(random).numpy(), independent)
    assert torch.equal(gpu._rounded(values[0]), values[0])  # biases stay


def test_the_tests_of_numerics_run_and_say_their_result():
    assert " passed" in next(gpu.device_tests("cpu", "same_numbers")).rows[0][1]
    nothing = gpu.device_tests("cpu", "no_such_test")
    assert "deselected" in next(nothing).rows[0][1]
    with pytest.raises(RuntimeError, match=r"^test_numerics.py: .*deselected"):
        next(nothing)


@pytest.fixture
def small(tmp_path):
    of(drawing).save(str(tmp_path / "tiny.safetensors"), {})
    pixels = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").write_bytes(images.encode_png(pixels))
    words = ["quick=true", "device=cpu", f"output={tmp_path}/out", f"input={tmp_path}/photos"]
    return lambda *more: load(BenchmarkConfig, [f"model={tmp_path}/tiny.safetensors", *words, *more])


def test_a_benchmark_goes_on_where_it_was_stopped(small, tmp_path, monkeypatch, capsys):
    def stopped(self):
        raise SystemExit
        yield

    with monkeypatch.context() as patch:
        patch.setattr(run._Bench, "codecs", stopped)
        with pytest.raises(SystemExit):
            benchmark(small("parts=[margins,codecs]"))
    first = json.loads((tmp_path / "out/parts/margins.json").read_text())["tables"]
    assert first[0] in (tmp_path / "out/benchmark.md").read_text()
    monkeypatch.setattr(run._Bench, "margins", stopped)  # it must not be measured again
    benchmark(small("parts=[margins,codecs]"))
    assert "margins: measured before; to measure again, delete" in capsys.readouterr().out
    text = (tmp_path / "out/benchmark.md").read_text()
    assert text.index(first[0]) < text.index("## Codecs")
    with pytest.raises(SystemExit):
        benchmark(small("parts=[margins]", "repeats=2", "quick=false"))  # other settings
    of(drawing).save(str(tmp_path / "tiny.safetensors"), {"another": "training"})
    with pytest.raises(SystemExit):
        benchmark(small("parts=[margins]"))


def test_a_part_that_does_not_fit_is_named_and_the_others_are_made(small, tmp_path, monkeypatch):
    def full(self):
        yield Table("Half of it", "", ("a",), [("1",)])
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB\nmore lines")

    monkeypatch.setattr(run._Bench, "margins", full)
    benchmark(small("parts=[margins,codecs]"))
    text = (tmp_path / "out/benchmark.md").read_text()
    assert "## Half of it" in text
    assert "## margins: does not fit\n\nOutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB" in text
    assert text.index("does not fit") < text.index("## Codecs")
    assert not (tmp_path / "out/parts/margins.json").exists()  # another time it may fit


def test_a_part_that_no_minutes_are_left_for_is_named_and_the_next_run_makes_it(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "MINUTES", {"margins": 3, "codecs": 2})
    benchmark(small("parts=[margins,codecs]", "minutes=2.5"))
    text = (tmp_path / "out/benchmark.md").read_text()
    said = "it should take 3 minutes, and 2 of minutes=2.5 are left"
    assert f"## margins: skipped\n\nNo time: {said}. It needs minutes=3, or 0.\n" in text
    assert f"margins: skipped: {said}" in capsys.readouterr().out
    assert "## Codecs" in text
    benchmark(small("parts=[margins,codecs]", "minutes=0.001"))  # what was measured is there without any time
    assert "codecs: measured before" in capsys.readouterr().out
    benchmark(small("parts=[margins,codecs]", "minutes=3.5"))
    text = (tmp_path / "out/benchmark.md").read_text()
    assert "skipped" not in text
    monkeypatch.setattr(run, "MINUTES", {"margins": 3, "codecs": 0})
    benchmark(small("parts=[codecs,margins]", "minutes=3", "input=examples/photographs"))  # the earlier table stays
    later = (tmp_path / "out/benchmark.md").read_text()
    assert text[text.index("## What a crop's margin") :].partition("\n## ")[0].strip() in later
    assert "The same command makes it. The tables above it are of an earlier run with other keys." in later


def test_a_part_that_fails_is_named_at_the_end_and_tried_again(small, tmp_path, monkeypatch, capfd):
    def broken(self):
        yield Table("The first half", "", ("a",), [("1",)])
        raise RuntimeError("CUDA error: an illegal memory access")

    with monkeypatch.context() as patch:
        patch.setattr(run._Bench, "margins", broken)
        with pytest.raises(Unfinished, match=r"^parts that failed: margins; all others are in .*/out/benchmark.md$"):
            benchmark(small("parts=[margins,codecs]"))
    text = (tmp_path / "out/benchmark.md").read_text()
    assert "## The first half" in text
    assert "## margins: failed\n\nRuntimeError: CUDA error" in text
    capfd.readouterr()
    benchmark(small("parts=[margins,codecs]"))
    said = capfd.readouterr().out
    assert "codecs: measured before" in said
    assert "margins: measured before" not in said
    assert "failed" not in (tmp_path / "out/benchmark.md").read_text()


def test_after_a_failure_that_takes_the_gpu_along_the_same_command_makes_that_part_last(
    small, tmp_path, monkeypatch, capsys
):
    def broken(self):
        raise RuntimeError("CUDA error: an illegal memory access")

    def lost(device):
        raise Unfinished("after this failure the process cannot use its GPU")

    monkeypatch.setattr(run._Bench, "margins", broken)
    with monkeypatch.context() as patch:
        patch.setattr(run, "_free", lost)
        with pytest.raises(Unfinished, match="cannot use its GPU"):
            benchmark(small("parts=[margins,codecs]"))
    assert "## Codecs" not in capsys.readouterr().out
    with pytest.raises(Unfinished, match="parts that failed: margins"):
        benchmark(small("parts=[margins,codecs]"))
    monkeypatch.undo()
    benchmark(small("parts=[margins]"))
    monkeypatch.setattr(run._Bench, "margins", broken)
    with pytest.raises(Unfinished):
        benchmark(small("parts=[margins]", "input=examples/photographs"))
    assert (
        "## What a crop's margin leaves" in json.loads((tmp_path / "out/parts/margins.json").read_text())["tables"][0]
    )
    said = capsys.readouterr().out
    assert said.index("## Codecs") < said.index("## margins: failed")


def test_only_keys_that_a_part_reads_make_it_measured_again_and_other_parts_stay_in_the_file(small, tmp_path, capsys):
    benchmark(small("parts=[codecs]"))
    benchmark(small("parts=[margins]", "tflops=5"))
    text = (tmp_path / "out/benchmark.md").read_text()
    assert text.index("## What a crop's margin leaves") < text.index("## Codecs")
    keys = json.loads((tmp_path / "out/parts/codecs.json").read_text())["keys"]
    assert keys == {"input": f"{tmp_path}/photos", "quick": True, "repeats": 1}
    capsys.readouterr()
    benchmark(small("parts=[codecs,margins]", "tflops=6", "precision=bfloat16"))
    assert capsys.readouterr().out.count("measured before") == 2


def test_a_large_table_that_does_not_fit_leaves_the_others_of_its_part(small, tmp_path, monkeypatch):
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB\nmore lines")

    def some(self):
        yield Table("Small", "", ("a",), [("1",)])
        yield self._fitting("Large", full)

    monkeypatch.setattr(run._Bench, "margins", some)
    benchmark(small("parts=[margins]"))
    text = (tmp_path / "out/benchmark.md").read_text()
    assert text.index("## Small") < text.index(
        "## Large\n\nDoes not fit: CUDA out of memory. Tried to allocate 20.00 GiB"
    )
    assert not (tmp_path / "out/parts/margins.json").exists()  # another time it may fit
    monkeypatch.setattr(run._Bench, "margins", lambda self: iter([self._fitting("", lambda: 1 / 0)]))
    with pytest.raises(Unfinished):
        benchmark(small("parts=[margins]"))


def test_a_process_that_fails_says_why():
    with pytest.raises(RuntimeError, match=r"(?s)^-c import sys ended with 1: .*CUDA out of memory") as error:
        run_process([sys.executable, "-c", "import sys\nraise SystemExit('CUDA out of memory')"])
    assert is_out_of_memory(error.value)


def test_a_measured_process_joins_no_ray(monkeypatch):
    """Not one of the environment, nor the one whose address `ray start` left on this machine."""
    asked = [sys.executable, "-c", "import os; print(os.environ['RAY_ADDRESS'])"]
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert run_process(asked) == "local\n"
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert run_process(asked) == "local\n"
    assert run_process(asked, RAY_ADDRESS="a") == "a\n"


def test_a_model_whose_largest_scale_is_below_4_has_margins_and_images(small, tmp_path):
    model = of(drawing)
    low = Degrader(model.autoencoder, model.flow, {"1": 1.0, "4": 2.5})
    low.flow.optics.knots = torch.tensor([1.0, 2.5])
    assert float(gpu._scale(low)) == 2.5
    low.save(str(tmp_path / "tiny.safetensors"), {})
    benchmark(small("parts=[margins]"))
    assert "largest at x2.5" in (tmp_path / "out/benchmark.md").read_text()


def test_the_gpus_configuration_asks_for_parts_that_exist():
    config = load(BenchmarkConfig, [f"config={ROOT}/configs/benchmark_gpu.yaml"])
    assert (config.precision, config.parts[0], max(config.sides)) == ("bfloat16", "tests", 6708)
    assert set(config.parts) <= set(run.PARTS)
    assert set(run.MINUTES) == set(run.PARTS)
    assert sum(run.MINUTES[part] for part in config.parts) <= config.minutes == 60
