import dataclasses
import errno
import hashlib
import io
import os
import pickle
import re
import socket
import threading
import weakref
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from degflow import images, storage
from degflow.capture.optics import Optics
from degflow.config import Unfinished, dump, load, plain
from degflow.dataset.card import preview, samples
from degflow.dataset.footer import read_footer
from degflow.dataset.layout import CONFIG, SOURCE, Reject
from degflow.dataset.manifest import data_files, judge
from degflow.dataset.manifest import rejects_of as rejects_of_shards
from degflow.dataset.plan import Plan, plan_files, read_plan, write_part
from degflow.dataset.scales import ScaleConfig, noise_seed_of, scales_of, uniform_of
from degflow.dataset.writer import ShardWriter
from degflow.degrader import Degrader
from degflow.models import (
    AutoencoderConfig,
    ResidualAutoencoder,
    ResidualConfig,
    ResidualFlow,
    ResidualNetwork,
    Spread,
)
from degflow.storage import Place, Source
from degflow.synthesis import buffers as memory
from degflow.synthesis import shard
from degflow.synthesis.buffers import Arrival, Buffers
from degflow.synthesis.codec import Codec, Loaded, Threads
from degflow.synthesis.inventory import Input
from degflow.synthesis.run import Run
from degflow.synthesis.settings import SynthesizeConfig
from degflow.synthesis.shard import Progress, Turn, Withheld
from degflow.synthesis.sizes import next_part
from degflow.synthesis.window import Item, WindowDegrader, usual_memory
from tests.faults import proxying
from tests.finished import synthesize_here
from tests.s3 import forget_clients
from tests.sources import keys_of, png, rejects_of, rows_of, save_model, save_spoiled

COLUMNS = [
    *("key", "draw", "scale", "time", "lr", "hr", "height", "width", "hr_sha256", "seed", "noise_seed", "model_sha256")
]


pytestmark = pytest.mark.usefixtures("one_thread")


def plan_of(photos, output, *words):
    """A plan of all images of an input, as a run makes it."""
    config = load(SynthesizeConfig, [f"input={photos}", f"output={output}", *words])
    images = Input(config.input, without=Place(config.output), limit=config.limit).images()
    return Plan.empty().plus(Plan.empty().next_part(images, config.shard.images))


def open_run(photos, output, model, *words):
    """A run whose configuration is in the output."""
    config = load(SynthesizeConfig, [f"input={photos}", f"output={output}", f"model={model}", *words])
    run = Run(dataclasses.replace(config, overwrite=True), Degrader.load(model))
    run._save_config()
    return run


def finished_in(run, plan):
    return judge(run.output, data_files(run.output), plan, run.recipe.digest).done


def rejects_in(output):
    """The rejects of all shards: key -> reject."""
    place = Place(str(output))
    footers = [read_footer(place, file.key, file.size) for file in data_files(place)]
    return {reject.key: reject for footer in footers for reject in footer.rejects}


def make_all(run, plan):
    """Make every shard of a plan in this process, in an output with this run's configuration."""
    run._save_config()
    maker = run.maker()
    for number in range(len(plan)):
        *reports, last = maker.make(number, plan[number], Threads(2), Turn())
        assert sum(report.images for report in reports) == len(plan[number])
        assert sum(report.rejects for report in reports) == last.record.rejects


def make(photos, output, model, *words, plan=None):
    make_all(open_run(photos, output, model, *words), plan or plan_of(photos, output, *words))
    return Path(output)


@pytest.fixture(scope="module")
def made(photos, model, tmp_path_factory):
    return make(photos, tmp_path_factory.mktemp("out"), model, "shard.images=3")


def test_every_photograph_becomes_a_row(photos, model, made):
    rows = rows_of(made)
    assert sorted(rows) == [(key, 0) for key in keys_of(photos)]
    assert len(rows) == 9
    degrader = Degrader.load(model)
    for (key, _), row in rows.items():
        assert list(row) == COLUMNS
        source = (photos / key).read_bytes()
        hr, lr = png(row["hr"]["bytes"]), png(row["lr"]["bytes"])
        assert np.array_equal(hr, images.decode(source))
        assert lr.shape == hr.shape == (row["height"], row["width"], 3)
        assert row["hr_sha256"] == hashlib.sha256(source).hexdigest()
        assert row["seed"] == 0
        assert row["model_sha256"] == hashlib.sha256(Path(model).read_bytes()).hexdigest()
        assert 1 <= row["scale"] <= 4
        assert row["time"] == pytest.approx((row["scale"] - 1) / 3, abs=1e-12)
        scale = torch.tensor([[row["scale"]]], dtype=torch.float64)
        expected = images.to_pixels(degrader(images.to_tensor(hr)[None], scale))[0, 0]
        assert np.abs(lr.astype(int) - expected).max() <= 1


def test_a_row_is_the_draw_of_its_noise_seed(photos, tmp_path):
    model = save_model(tmp_path / "draws.safetensors", draws=True)
    words = ["scale.per_image=2", "limit=4", "seed=3"]
    made = {
        name: rows_of(make(photos, tmp_path / name, model, *words, *more))
        for name, more in (("drawn", []), ("one by one", ["batch=1", "shard.images=1"]), ("mean", ["spread=0"]))
    }
    degrader, drawn = Degrader.load(model), made["drawn"]
    assert len({row["noise_seed"] for row in drawn.values()}) == len(drawn) == 8
    for (key, draw), row in drawn.items():
        assert row["noise_seed"] == noise_seed_of(3, key, draw)
        hr, scale = images.to_tensor(png(row["hr"]["bytes"]))[None], torch.tensor([row["scale"]], dtype=torch.float64)
        other = made["one by one"][key, draw]
        assert (other["noise_seed"], other["scale"]) == (row["noise_seed"], row["scale"])
        for found in (row, other):
            expected = images.to_pixels(degrader(hr, scale, seed=torch.tensor([row["noise_seed"]])))[0]
            assert np.abs(png(found["lr"]["bytes"]).astype(int) - expected).max() <= 1
        mean = images.to_pixels(degrader(hr, scale, spread=0.0))[0]
        assert np.abs(png(made["mean"][key, draw]["lr"]["bytes"]).astype(int) - mean).max() <= 1
        assert np.abs(png(row["lr"]["bytes"]).astype(int) - mean).max() > 1


def test_webp_rows_hold_the_same_pixels_and_a_side_too_long_for_webp_is_png(photos, model, tmp_path, made, monkeypatch):
    monkeypatch.setattr(images, "_WEBP_SIDE", 95)
    rows, kinds = rows_of(make(photos, tmp_path, model, "shard.images=3", "codec=webp")), set()
    for (key, draw), row in rows_of(made).items():
        found = rows[key, draw]
        kind = "png" if max(row["height"], row["width"]) > 95 else "webp"
        kinds.add(kind)
        assert found["lr"]["path"] == f"{key}.0.{kind}"
        assert found["hr"]["path"] == row["hr"]["path"]
        for name in ("lr", "hr"):
            with Image.open(io.BytesIO(found[name]["bytes"])) as image:
                assert (image.format.lower(), image.mode) == (kind, "RGB")
                assert np.array_equal(np.asarray(image), png(row[name]["bytes"]))
    assert kinds == {"png", "webp"}


def test_what_webp_holds_is_exact_whatever_the_pixels():
    random = np.random.default_rng(0)
    for shape in ((1, 1), (1, 16383), (7, 3), (64, 50)):
        for pixels in (random.integers(0, 256, (*shape, 3), np.uint8), np.zeros((*shape, 3), np.uint8)):
            data, kind = images.encode(pixels, "webp")
            assert kind == "webp"
            assert np.array_equal(images.decode_encoded(data), pixels)
    assert images.encode(np.zeros((1, 16384, 3), np.uint8), "webp")[1] == "png"


@pytest.mark.parametrize("words", [["shard.images=2"], ["shard.images=100", "batch=1"], ["shard.images=7", "batch=8"]])
def test_rows_do_not_depend_on_shards_and_batches(photos, model, made, tmp_path, words):
    other = rows_of(make(photos, tmp_path, model, *words))
    reference = rows_of(made)
    assert other.keys() == reference.keys()
    for key, row in other.items():
        assert row["scale"] == reference[key]["scale"]
        assert row["hr"] == reference[key]["hr"]
        assert np.abs(png(row["lr"]["bytes"]).astype(int) - png(reference[key]["lr"]["bytes"])).max() <= 1


def test_more_draws_leave_the_pixels_of_the_first_alone(photos, model, made, tmp_path):
    words = ["scale.per_image=3", "shard.images=3", "hr=reference"]
    rows, reference = rows_of(make(photos, tmp_path, model, *words)), rows_of(made)
    assert len(rows) == 27
    assert len({row["scale"] for row in rows.values()}) == 27
    for key, row in reference.items():
        assert rows[key]["scale"] == row["scale"]
        assert rows[key]["lr"] == row["lr"]
    for (key, _), row in rows.items():
        assert row["hr"] == {"bytes": None, "path": str(photos / key)}


def test_hr_is_stored_once_for_all_draws_and_readers_see_it_in_every_row(photos, model, tmp_path):
    datasets = pytest.importorskip("datasets")
    part = make(photos, tmp_path, model, "scale.per_image=4") / "data/part-000000.parquet"
    rows = rows_of(tmp_path)
    once = {key: row["hr"]["bytes"] for (key, _), row in rows.items()}
    lr, hr = (sum(map(len, pngs)) for pngs in ([row["lr"]["bytes"] for row in rows.values()], once.values()))
    assert lr + hr < part.stat().st_size < lr + 1.5 * hr
    assert all(row["hr"] == {"bytes": once[key], "path": key} for (key, _), row in rows.items())
    assert all(np.array_equal(png(once[key]), images.decode((photos / key).read_bytes())) for key in once)
    seen = datasets.load_dataset("parquet", data_files=str(part), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(seen) == len(rows) == 36
    for row in seen.select((5, 6)):
        assert np.array_equal(np.asarray(row["hr"]), png(once[row["key"]]))


def test_a_dataset_that_cannot_travel_says_so(photos, model, tmp_path):
    said = open_run(photos, tmp_path / "out", model, "hr=reference").describe()
    assert f"NOTE: hr=reference and a local input: rows name HR as files in {photos}, so the dataset CANNOT" in said
    assert "\n" not in open_run(photos, tmp_path / "out", model, "scale.per_image=4").describe()


def test_scaled_lr_is_the_same_lr_shrunk(photos, model, made, tmp_path):
    rows = rows_of(make(photos, tmp_path, model, "size=scaled", "shard.images=3"))
    for key, row in rows_of(made).items():
        full, small = png(row["lr"]["bytes"]), png(rows[key]["lr"]["bytes"])
        size = images.shrunk_size(*full.shape[:2], row["scale"])
        assert small.shape[:2] == size == (rows[key]["height"], rows[key]["width"])
        assert np.array_equal(small, images.resize(full, *size))
        assert png(rows[key]["hr"]["bytes"]).shape == full.shape


def test_a_gray_photograph_stays_gray_on_request(photos, model, made, tmp_path):
    rows = rows_of(make(photos, tmp_path, model, "shard.images=3", "gray=keep"))
    for key, row in rows_of(made).items():
        camera, kept = png(row["lr"]["bytes"]), png(rows[key]["lr"]["bytes"])
        assert not images.is_gray(camera)
        stays = key[0] in ("deep/er/grey.tif", "smallest.png")
        assert np.array_equal(kept, images.to_gray(camera) if stays else camera)


def test_bad_files_are_rejects_with_stage_and_reason(photos, model, tmp_path):
    spoiled = save_spoiled(tmp_path / "spoiled", photos)
    words = ["max_pixels=80000", "shard.images=4"]
    plan, run = plan_of(spoiled, tmp_path / "out", *words), open_run(spoiled, tmp_path / "out", model, *words)
    other = open_run(spoiled, tmp_path / "out", model, "max_pixels=80001", "shard.images=4")
    make_all(run, plan)
    output = tmp_path / "out"
    rejects = rejects_in(output)
    reasons = {key: (reject.stage, reject.error) for key, reject in rejects.items()}
    assert {key for key, _ in rows_of(output)} == {"good1.png", "good2.jpg"}
    assert len(rejects) == 9
    assert all(reject.attempts == 1 for reject in rejects.values())
    assert reasons["empty.png"] == ("decode", "empty file")
    assert reasons["dangling.png"][0] == "read"
    for key, reason in {
        "text.jpg": "not a JPEG, PNG, WebP or TIFF",
        "page.png": "not a JPEG, PNG, WebP or TIFF",
        "truncated.png": "damaged image",
        "truncated.jpg": "damaged image",
        "thin.png": "at least 8",
        "large.png": "max_pixels=80000",
        "float.tif": "pixel mode F",
    }.items():
        assert reasons[key][0] == "decode"
        assert reason in reasons[key][1]
    records = finished_in(run, plan)
    assert [record.rejects for record in records.values()] == [3, 3, 3]
    assert [reject.key for reject in rejects_of_shards(run.output, records, {})] == sorted(rejects)
    assert finished_in(other, plan) == {}


def test_a_shard_of_rejects_alone_has_an_empty_part(photos, model, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "empty.png").write_bytes(b"")
    run, plan = open_run(tmp_path / "in", tmp_path / "out", model), plan_of(tmp_path / "in", tmp_path / "out")
    make_all(run, plan)
    assert rows_of(tmp_path / "out") == {}
    record = finished_in(run, plan)[0]
    assert (record.rows, record.rejects, record.psnr, record.clipped) == (0, 1, None, None)


class Starved(Degrader):
    """Has memory for one image of at most 7000 pixels at a time."""

    def forward(self, hr, scale, **solver):
        if len(hr) > 1 or hr.shape[-1] * hr.shape[-2] > 7000:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return super().forward(hr, scale, **solver)


def test_an_image_too_large_for_the_memory_is_a_reject_and_leaves_the_others(photos, model, made, tmp_path):
    loaded = Degrader.load(model)
    starved = Starved(loaded.autoencoder, loaded.flow, loaded.levels)
    run = Run(load(SynthesizeConfig, [f"input={photos}", f"output={tmp_path}", "batch=9"]), starved)
    make_all(run, plan_of(photos, tmp_path))
    rejects, rows = rejects_in(tmp_path), rows_of(tmp_path)
    assert len(rejects) == 6
    assert {reject.stage for reject in rejects.values()} == {"degrade"}
    assert any(reject.error.startswith("96 x 80 pixels: out of memory on cpu with") for reject in rejects.values())
    assert {(key, 0) for key in rejects} | set(rows) == set(rows_of(made))
    assert len(rows) == 3


FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("cuFFT error: CUFFT_INTERNAL_ERROR"),
    MemoryError(),
]


class Tight(Degrader):
    """Runs out of memory, in one of six ways, until it gets a single image and at most 1 GB; keeps count."""

    error: Exception
    seen: list[tuple[int, float]]
    earlier: list[weakref.ref[torch.Tensor]]

    def forward(self, hr, scale, *, memory, **options):
        self.seen.append((len(hr), memory))
        assert all(reference() is None for reference in self.earlier)  # the pass before has been freed
        self.earlier.append(weakref.ref(hr))
        if len(hr) > 1 or memory > 1:
            raise type(self.error)(*self.error.args)  # a new one: a traceback would keep this frame alive
        return super().forward(hr, scale, memory=memory, **options)


@pytest.mark.parametrize("error", FULL, ids=str)
def test_a_pass_that_runs_out_of_memory_is_freed_and_repeated_with_less(photos, model, made, tmp_path, error):
    loaded = Degrader.load(model)
    tight = Tight(loaded.autoencoder, loaded.flow, loaded.levels)
    tight.error, tight.seen, tight.earlier = error, [], []
    run = Run(load(SynthesizeConfig, [f"input={photos}", f"output={tmp_path}", "batch=9"]), tight)
    make_all(run, plan_of(photos, tmp_path))
    assert rejects_in(tmp_path) == {}
    assert sorted(set(tight.seen)) == [(1, 1.0), (1, 2.0), (1, 4.0), (6, 4.0)]
    assert [memory for count, memory in tight.seen if count == 1] == 9 * [4.0, 2.0, 1.0]
    for key, row in rows_of(tmp_path).items():
        assert np.abs(png(row["lr"]["bytes"]).astype(int) - png(rows_of(made)[key]["lr"]["bytes"])).max() <= 1


def test_memory_and_batch_may_change_and_then_large_images_are_tried_again(photos, model, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/large.png").write_bytes(images.encode_png(np.zeros((300, 400, 3), np.uint8)))
    synthesize_here(tmp_path / "in", tmp_path / "out", model, "memory=0.154", "max_reject_rate=1")
    assert rejects_of(tmp_path / "out").keys() == {"large.png"}
    synthesize_here(
        tmp_path / "in", tmp_path / "out", model, "memory=1", "batch=2", "retry_rejects=true", "max_reject_rate=1"
    )
    assert len(rows_of(tmp_path / "out")) == 1


def test_an_image_that_no_tile_of_fits_the_budget_is_a_reject(photos, model, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/large.png").write_bytes(images.encode_png(np.zeros((300, 400, 3), np.uint8)))
    (tmp_path / "in/small.png").write_bytes((photos / "smallest.png").read_bytes())
    output = make(tmp_path / "in", tmp_path / "out", model, "memory=0.154")
    assert [key for key, _ in rows_of(output)] == ["small.png"]
    rejects = rejects_in(output)
    assert rejects["large.png"].stage == "degrade"
    assert re.fullmatch(r"memory=0\.154: needs at least \d\.\d+ GB for 400 x 300 pixels", rejects["large.png"].error)


def test_an_unexpected_failure_is_not_a_reject(photos, model, tmp_path):
    maker = dataclasses.replace(open_run(photos, tmp_path, model).maker(), scales=lambda key: [5.0])
    with pytest.raises(ValueError, match="trained range"):
        list(maker.make(0, plan_of(photos, tmp_path)[0], Threads(1), Turn()))
    assert [path.name for path in tmp_path.iterdir()] == [CONFIG]


def test_a_machine_that_does_not_see_the_output_makes_nothing(photos, model, tmp_path):
    run, plan = open_run(photos, tmp_path / "out", model), plan_of(photos, tmp_path / "out")
    (tmp_path / "out/config.yaml").unlink()
    (tmp_path / "out").rmdir()
    with pytest.raises(OSError, match=r"^output=.*/out: this machine does not see it: there is no config.yaml$"):
        list(run.maker().make(0, plan[0], Threads(1), Turn()))
    assert not (tmp_path / "out").exists()


def test_a_machine_that_does_not_see_the_photographs_rejects_none(model, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(images.encode_png(np.full((16, 16, 3), 128, np.uint8)))
    run, plan = open_run(folder, tmp_path / "out", model), plan_of(folder, tmp_path / "out")
    (folder / "a.png").unlink()
    list(run.maker().make(0, plan[0], Threads(1), Turn()))
    assert rejects_in(tmp_path / "out")["a.png"].error == "no longer there"
    (folder / "b.png").unlink()  # as of a file system that is not mounted there
    for mounted in ("nothing", "no folder"):
        if mounted == "no folder":
            folder.rmdir()
        with pytest.raises(storage.StorageError, match=r"No such file.*/in/a.png") as error:
            list(run.maker().make(1, plan[0], Threads(1), Turn()))
        assert error.value.host == socket.gethostname()
        assert pickle.loads(pickle.dumps(error.value)).host == error.value.host


def test_folders_of_a_run_are_named_from_the_root_for_processes_elsewhere(photos, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    maker = open_run(os.path.relpath(photos), "out", model).maker()
    assert maker.output == f"{tmp_path}/out"
    assert os.path.isabs(maker.codec.root)
    assert os.path.samefile(maker.codec.root, photos)


def test_a_file_changed_since_the_plan_is_a_reject(photos, model, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("astronaut.PNG", "coffee.jpg", "cat.jpeg"):
        (folder / name).write_bytes((photos / name).read_bytes())
    plan = plan_of(folder, tmp_path / "out")
    (folder / "coffee.jpg").write_bytes((photos / "cat.jpeg").read_bytes())
    os.utime(folder / "cat.jpeg", (1, 1))
    output = make(folder, tmp_path / "out", model, plan=plan)
    assert [key for key, _ in rows_of(output)] == ["astronaut.PNG"]
    rejects = rejects_in(output)
    assert rejects.keys() == {"coffee.jpg", "cat.jpeg"}
    assert all(reject.stage == "read" and "changed since the plan" in reject.error for reject in rejects.values())


def test_scales_are_a_function_of_seed_key_and_draw():
    uniform = [uniform_of(seed, key, draw) for seed in (0, 1) for key in ("a", "b/ü.png") for draw in range(2)]
    assert uniform == [
        0.47792406043387514,
        0.5415467037953028,
        0.5602437806988854,
        0.9487810308360822,
        0.4402871139950407,
        0.2866032480964473,
        0.7506607755060084,
        0.43066102890284264,
    ]
    many = np.array([uniform_of(0, f"{n}.png", 0) for n in range(20000)])
    assert np.abs(np.histogram(many, 10, (0, 1))[0] - 2000).max() < 5 * 2000**0.5
    scale = ScaleConfig(low=1.5, high=3.0, per_image=3)
    assert scales_of(scale, 0, "a")[0] == 1.5 + uniform_of(0, "a", 0) * 1.5


def test_noise_seeds_are_a_function_of_seed_key_and_draw():
    found = [noise_seed_of(seed, key, draw) for seed in (0, 1) for key in ("a", "b/ü.png") for draw in range(2)]
    assert found == [
        8865857598420514004,
        7858282330445522789,
        7780640161585819902,
        2965359804543138783,
        8439925737502052425,
        8878143001068331800,
        8009695466953802223,
        6249594496982186554,
    ]
    many = np.array([noise_seed_of(0, f"{n}.png", 0) for n in range(20000)])
    assert many.dtype == np.int64
    assert many.min() >= 0
    assert np.abs(np.histogram(many / 2.0**63, 10, (0, 1))[0] - 2000).max() < 5 * 2000**0.5
    scales = [uniform_of(0, f"{n}.png", 0) for n in range(20000)]
    assert abs(np.corrcoef(many.astype(float), scales)[0, 1]) < 5 / 20000**0.5


def test_distributions():
    def draws(**values):
        return np.array([scales_of(ScaleConfig(**values), 0, str(n)) for n in range(4000)])

    log = draws(distribution="loguniform", low=1.0, high=4.0)
    assert log.min() >= 1
    assert log.max() <= 4
    assert np.median(log) == pytest.approx(2, abs=0.06)
    assert np.median(draws(low=1.0, high=4.0)) == pytest.approx(2.5, abs=0.08)
    chosen = draws(distribution="list", values=(2.0, 3.0, 3.5), per_image=2)
    assert np.allclose([(chosen == value).mean() for value in (2, 3, 3.5)], 1 / 3, atol=0.03)
    assert draws(distribution="grid", low=1.0, high=4.0, per_image=4)[7].tolist() == [1, 2, 3, 4]
    assert draws(distribution="grid", low=1.0, high=4.0)[3].tolist() == [2.5]
    assert draws(low=2.0, high=2.0)[5].tolist() == [2.0]


def test_output_inside_the_input_is_not_an_input(photos, tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("one.png", "out/preview.png", "outer.png"):
        (tmp_path / name).write_bytes((photos / "astronaut.PNG").read_bytes())
    plan = plan_of(tmp_path, tmp_path / "out")
    assert [source.key for source in plan[0]] == ["one.png", "outer.png"]


def test_the_plan_comes_back_as_it_was_written(photos, tmp_path):
    expected = [source for source in Place(str(photos)).files() if source.key != "notes.txt"]
    plan = plan_of(photos, tmp_path, "shard.images=4")
    place = Place(str(tmp_path))
    assert len(read_plan(place, plan_files(place))) == 0
    assert write_part(place, 0, plan.table)
    assert not write_part(place, 0, plan.table.slice(1))
    read = read_plan(place, plan_files(place))
    assert read.table.equals(plan.table)
    assert [source for number in range(3) for source in read[number]] == expected
    assert [len(read[number]) for number in range(3)] == [4, 4, 1]
    assert (read.files, read.bytes, read.parts) == (9, sum(source.size for source in expected), 1)
    assert [Source(*source.values()) for source in read.task(1)["sources"][0].as_py()] == expected[4:8]
    again = read.plus(read.next_part(read.table.select(["key", "size", "etag"]).slice(2, 3), 2))
    assert [len(again[number]) for number in range(len(again))] == [4, 4, 1, 2, 1]
    assert again.newest() == {expected[2].key: 3, expected[3].key: 3, expected[4].key: 4}
    assert again.files == 9


MILLION = 1_000_000
FILES = {"a.jpg": MILLION, "b.jpg": MILLION, "c.jpg": MILLION, "d.jpg": 3_333_333, "e.png": 1_500_000}
FILES |= {"f.jpg": -1, "g.TIF": 1_500_000, "h.JPEG": MILLION}  # 4 pixels a byte of JPEG, 2 in 3 bytes of the others


@pytest.mark.parametrize(
    ("words", "shards"),
    [
        ([], "ab c d efgh"),  # 12 MB of a, 40 MB of d, 3 MB of e
        (["shard.images=2"], "ab c d ef gh"),  # 12 MB of f, whose size is unknown
        (["hr=reference"], "abc defg h"),
        (["scale.per_image=2"], "a b c d efg h"),
        (["max_pixels=2000000"], "abcd efgh"),
        (["size=scaled", "scale.distribution=list", "scale.values=[2]"], "abc d efgh"),
        (["shard.bytes=0"], "abcdefgh"),
        (["shard.bytes=1"], "a b c d e f g h"),
        (["shard.bytes=10000000000", "shard.images=3"], "abc def gh"),
    ],
)
def test_a_shard_ends_before_its_bytes_or_with_its_images(words, shards):
    config = load(SynthesizeConfig, ["input=a", "output=b", "shard.bytes=24000000", *words])
    table = pa.table([list(FILES), list(FILES.values()), [""] * len(FILES)], SOURCE)
    plan = Plan.empty().plus(next_part(Plan.empty(), table, config))
    assert " ".join("".join(source.key[0] for source in plan[n]) for n in range(len(plan))) == shards
    again = plan.plus(next_part(plan, table, config))
    assert [again[n] for n in range(len(plan), len(again))] == [again[n] for n in range(len(plan))]
    assert again.images(range(len(plan))) == len(FILES)
    assert len(next_part(plan, table.slice(0, 0), config)) == 0


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("scale.distribution=normal", "scale.distribution=normal: must be one of uniform, loguniform, list, grid"),
        ("scale.per_image=0", "scale.per_image=0: must be at least 1"),
        ("scale.distribution=list", r"scale.values=\[\]: needs at least one scale"),
        ("scale.values=[2]", r"scale.values=\[2.0\]: is for scale.distribution=list only"),
        ("scale.distribution=list scale.values=[2] scale.low=1", "scale.low=1.0: is not for scale.distribution=list"),
        ("scale.low=3 scale.high=2", "scale.low=3.0: must not be above scale.high=2.0"),
        ("scale.high=-1", "scale.high=-1.0: must be a positive number"),
        ("precision=half", "precision=half: must be one of float32, tf32, bfloat16, float16"),
        ("solver.solver=dopri5", "solver.solver=dopri5: must be one of euler, midpoint, heun, rk4, rk5"),
        ("solver.steps=-1", "solver.steps=-1: must not be negative"),
        ("spread=1.5", r"spread=1.5: must lie in \[0, 1\]"),
        ("actors.min=0", "actors.min=0: must be at least 1"),
        ("actors.min=3 actors.max=2", "actors.max=2: must be 0 or at least actors.min=3"),
        ("actors.gpus=2", "actors.gpus=2: must be auto, 0 or 1"),
        ("actors.threads=-1", "actors.threads=-1: must not be negative"),
        ("shard.images=0", "shard.images=0: must be at least 1"),
        ("shard.bytes=-1", "shard.bytes=-1: must not be negative"),
        ("seed=-1", r"seed=-1: must lie in \[0, 2\^63\)"),
        ("size=small", "size=small: must be same or scaled"),
        ("hr=auto", "hr=auto: must be embed or reference"),
        ("codec=jpeg", "codec=jpeg: must be one of png, webp"),
        ("gray=none", "gray=none: must be one of camera, keep"),
        ("max_pixels=10", "max_pixels=10: must be at least 64"),
        ("batch=0", "batch=0: must be at least 1"),
        ("memory=-1", "memory=-1.0: must not be negative"),
        ("max_reject_rate=1.5", r"max_reject_rate=1.5: must lie in \[0, 1\]"),
        ("limit=-1", "limit=-1: must not be negative"),
        ("input=", "input: must be given"),
    ],
)
def test_broken_rules_name_key_value_and_rule(word, message):
    with pytest.raises(ValueError, match=message):
        load(SynthesizeConfig, ["input=a", "output=b", *word.split()])


CODEC = Codec("", max_pixels=10_000, embed=True, codec="png", scaled=False, keep_gray=False, seed=0, model_sha256="")


def test_a_prefix_that_is_throttled_as_a_whole_rejects_no_photograph(s3, model, photos, monkeypatch):
    place, output = Place(s3.uri("in")), Place(s3.uri("out"))
    for name in "ab":
        place.write(f"{name}.png", (photos / "astronaut.PNG").read_bytes())
    monkeypatch.setattr(storage, "PATIENCE", 1)
    run = open_run(place.uri, output.uri, model)
    plan = plan_of(place.uri, output.uri)
    with monkeypatch.context() as patch, proxying(s3.endpoint) as (proxy, endpoint):
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        forget_clients()
        proxy.throttled = f"{place.uri.removeprefix('s3:/')}/"
        with pytest.raises(storage.StorageError, match=r"a\.png: .*reduce your request rate"):
            list(run.maker().make(0, plan[0], Threads(2), Turn()))
    forget_clients()
    assert not output.exists("data")


def test_a_store_that_fails_is_no_reject_but_a_file_that_does_is(s3, monkeypatch):
    place = Place(s3.uri("in"))
    place.write("a.png", images.encode_png(np.full((16, 16, 3), 128, np.uint8)))
    source, load = place.files()[0], dataclasses.replace(CODEC, root=place.uri).load
    assert isinstance(load(source), Loaded)
    assert load(source._replace(size=-1, etag="")).pixels.shape == (16, 16, 3)
    assert load(source._replace(key="b.png")) == Reject("b.png", "read", "no longer there")
    monkeypatch.setattr(storage, "PATIENCE", 1)
    with monkeypatch.context() as patch, proxying(s3.endpoint, broken="a.png") as (_, endpoint):
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        forget_clients()
        found = load(source)
    forget_clients()
    assert (found.key, found.stage) == ("a.png", "read")
    assert found.attempts >= 1
    assert re.fullmatch(r"s3://demo/.*/a\.png: .*reduce your request rate\. \(attempts: \d\)", found.error)
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "no-scheme")  # on a machine that is set up wrongly
        forget_clients()
        with pytest.raises(ValueError, match="Invalid endpoint"):
            load(source)
    forget_clients()
    s3.kill()
    try:
        with pytest.raises(storage.StorageError, match="EndpointConnectionError"):
            load(source)
    finally:
        s3.start()


class Notes(Threads):
    """Threads that note which file is loaded when, and let a proxy give everything as the files that waited come."""

    def __init__(self, proxy=None):
        super().__init__(2)
        self.loads, self.loaded, self.proxy = [], threading.Event(), proxy

    def load(self, codec, source, patience=None):
        self.loads.append(source.key)
        self.loaded.set()
        if patience == storage.PATIENCE and self.proxy:
            self.proxy.broken = None
        return super().load(codec, source, patience)


@pytest.mark.parametrize("comes", [True, False], ids=["it comes at last", "it never comes"])
def test_a_file_that_the_store_withholds_comes_last_and_holds_no_other_up(s3, model, photos, monkeypatch, comes):
    place, output = Place(s3.uri("in")), Place(s3.uri("out"))
    for name in "abcdef":
        place.write(f"{name}.png", (photos / "astronaut.PNG").read_bytes())
    monkeypatch.setattr(shard, "FIRST_PATIENCE", 0.5)
    monkeypatch.setattr(storage, "PATIENCE", 30 if comes else 1)
    run = open_run(place.uri, output.uri, model, "batch=2")
    plan = plan_of(place.uri, output.uri)
    with monkeypatch.context() as patch, proxying(s3.endpoint, broken="b.png") as (proxy, endpoint):
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        forget_clients()
        if not comes:  # an attempt that is not the last one
            with pytest.raises(Withheld, match=r"^the store does not give b.png$"):
                list(run.maker().make(0, plan[0], Notes(), turn := Turn(), resigned=False))
            assert not output.exists("data")
            assert (turn.broken, turn._begun) == (False, [])
        notes = Notes(proxy if comes else None)
        reports = list(run.maker().make(0, plan[0], notes, Turn()))
    forget_clients()
    assert notes.loads == [f"{name}.png" for name in "abcdefb"]
    assert not comes or 2 <= proxy.met["throttle"] < 12  # s3fs's own retries, of ten seconds, would add some 20
    assert sum(report.images for report in reports) == 6
    found = pq.read_table(io.BytesIO(output.read("data/part-000000.parquet"))).to_pylist()
    assert [row["key"] for row in found] == [f"{name}.png" for name in ("acdefb" if comes else "acdef")]
    assert [scales_of(run.config.scale, 0, row["key"])[0] for row in found] == [row["scale"] for row in found]
    rejects = rejects_in(output.uri).values()
    assert [(reject.key, reject.stage) for reject in rejects] == ([] if comes else [("b.png", "read")])


def test_large_arrays_lie_in_memory_that_is_used_again_as_soon_as_nothing_refers_to_them(monkeypatch):
    monkeypatch.setattr(Buffers, "LEAST", 100)
    buffers, shape = Buffers(), (8, 10, 10)

    def place(array):
        return array.__array_interface__["data"][0]

    first, other = buffers.empty(shape), buffers.empty(shape)
    assert (first.shape, first.dtype, first.flags.c_contiguous) == (shape, np.uint8, True)
    places = [place(first), place(other)]
    part = torch.from_numpy(first[2:][1])  # a view of a view, as those of threads and PyTorch
    del first, other
    again = buffers.empty((6, 10, 10))
    assert place(again) == places[1]
    third = buffers.empty(shape)
    assert place(third) not in places
    assert part.shape == (10, 10)
    del part
    assert place(buffers.empty(shape)) == places[0]
    del again, third
    assert len(buffers._kept) == 3
    assert place(buffers.empty((9, 9))) not in places  # malloc's
    small = buffers.empty((5, 5, 5))  # much less than what is there, which is given back
    assert [len(memory) for memory, _ in buffers._kept] == [small.size]


@pytest.mark.parametrize("least", [100, 10_000], ids=["large", "small"])
def test_arrays_for_a_gpu_lie_in_pinned_memory(monkeypatch, least):
    asked, empty = [], torch.empty

    def noted(size, *, dtype, pin_memory=False):  # without CUDA nothing can be pinned
        asked.append((size, pin_memory))
        return empty(size, dtype=dtype)

    monkeypatch.setattr(Buffers, "LEAST", least)
    monkeypatch.setattr(memory.torch, "empty", noted)
    for pinned in (True, False):
        assert Buffers().empty((8, 10, 10), pinned=pinned).shape == (8, 10, 10)
    assert asked == [(1024, True), (800, False)]  # PyTorch pins powers of two


def test_where_nothing_more_can_be_pinned_usual_memory_is_taken(monkeypatch):
    empty = torch.empty

    def full(size, *, dtype, pin_memory=False):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return empty(size, dtype=dtype)

    monkeypatch.setattr(memory.torch, "empty", full)
    assert Buffers().empty((8, 10, 10), pinned=True).shape == (8, 10, 10)


def test_the_next_pass_begins_before_the_images_of_the_one_before_are_waited_for(model, monkeypatch):
    events = []

    class Slow(Arrival):
        def __init__(self, name, pixels):
            super().__init__(pixels, torch.tensor([name != "b"]))
            self.name = name

        def finite(self):
            events.append(f"{self.name} arrives")
            self.pixels[...] = ord(self.name)
            return super().finite()

    def begun(self, batch, memory):
        (item,) = batch
        events.append(f"{item.loaded.key} begins")
        return Slow(item.loaded.key, np.zeros((1, 1, *item.loaded.pixels.shape), np.uint8))

    monkeypatch.setattr(WindowDegrader, "_forward", begun)
    items = [Item(None, Loaded(key, np.zeros((8, 8 + n, 3), np.uint8), ""), [2.0]) for n, key in enumerate("abc")]
    degrader = WindowDegrader(Degrader.load(model), 1.0, "float32", 0, "", 0, 1.0)
    first, second, third, fourth = degrader.degrade([items[0], items[1], Reject("x", "read", "gone"), items[2]])
    assert events == ["a begins", "b begins", "a arrives", "c begins", "b arrives", "c arrives"]
    assert (np.unique(first).tolist(), first.shape) == ([ord("a")], (1, 8, 8, 3))
    assert second == Reject("b", "degrade", "the result is not finite")
    assert third == Reject("x", "read", "gone")
    assert (np.unique(fourth).tolist(), fourth.shape) == ([ord("c")], (1, 8, 10, 3))


def test_rows_are_written_while_the_degrader_works_on_later_photographs(photos, model, tmp_path, monkeypatch):
    run = open_run(photos, tmp_path, model, "batch=1")
    maker = run.maker()
    degrade, add = maker.degrader.degrade, ShardWriter.add
    begun, written = {n: threading.Event() for n in range(20)}, []

    def noted(window):
        begun[len([event for event in begun.values() if event.is_set()])].set()
        return degrade(window)

    def waiting(self, rows):
        later = min(len(written) + 2, 8)
        assert begun[later].wait(30), "photograph n + 2 is degraded while the rows of n are written"
        written.append(rows[0]["key"])
        add(self, rows)

    maker.degrader.degrade = noted
    monkeypatch.setattr(ShardWriter, "add", waiting)
    plan = plan_of(photos, tmp_path, "limit=9")
    list(maker.make(0, plan[0], Threads(2), Turn()))
    assert written == [source.key for source in plan[0]]


@pytest.fixture
def two_shards(photos, model, tmp_path):
    """Two shards of three windows by makers of one process: (makers, their plan, the keys that were degraded)."""
    run, degraded = open_run(photos, tmp_path, model, "batch=1", "shard.images=3"), []
    makers = [run.maker() for _ in range(2)]
    for maker in makers:
        degrade = maker.degrader.degrade
        maker.degrader.degrade = lambda window, degrade=degrade: (
            degraded.append(window[0].loaded.key) or degrade(window)
        )
    return makers, plan_of(photos, tmp_path, "shard.images=3", "limit=6"), degraded


def test_a_shard_is_degraded_and_put_while_the_one_before_it_is_still_being_stored(two_shards, tmp_path):
    makers, plan, degraded = two_shards
    turn, parts = Turn(), [tmp_path / "data" / f"part-{number:06d}.parquet" for number in range(2)]
    first, second = (makers[number].make(number, plan[number], Threads(1), turn) for number in range(2))
    for _ in range(4):  # three in the turn, and one after it
        next(first)
    assert list(second)[-1].record.rows == 3
    assert degraded == [source.key for number in range(2) for source in plan[number]]
    assert [part.exists() for part in parts] == [False, True]
    assert list(first)[-1].record.rows == 3
    assert [part.exists() for part in parts] == [True, True]


@pytest.mark.parametrize(
    ("ends", "seconds"),
    [
        ((13.0, 20.0), {"first": 13, "second": 7}),
        ((20.0, 13.0), {"second": 13, "first": 7}),  # the second one ends first, at 13
    ],
)
def test_the_seconds_of_a_process_are_counted_once(monkeypatch, ends, seconds):
    clock = iter([0.0, 10.0, *sorted(ends)])  # the first shard begins at 0, the second one at 10
    monkeypatch.setattr(shard, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    turn = Turn()
    begun = {name: turn.begin() for name in ("first", "second")}
    assert {name: turn.end(begun[name]) for name in seconds} == seconds


def test_a_shard_that_another_process_has_put_is_not_made_again(two_shards):
    makers, plan, degraded = two_shards
    record = list(makers[0].make(0, plan[0], Threads(1), Turn()))[-1].record
    degraded.clear()
    assert list(makers[1].make(0, plan[0], Threads(1), Turn())) == [Progress(3, 0, record)]
    assert degraded == []
    list(makers[1].make(1, plan[1], Threads(1), Turn()))
    assert degraded == [source.key for source in plan[1]]


class OfOneThread(defaultdict):
    """A tally that only the thread that made it may change: metrics read and clear it between two reports."""

    def __init__(self):
        super().__init__(float)
        self.thread = threading.get_ident()

    def __setitem__(self, name, value):
        assert threading.get_ident() == self.thread
        super().__setitem__(name, value)


def test_rejects_are_counted_by_the_thread_that_reads_their_number(model, tmp_path):
    folders = tmp_path / "in", tmp_path / "out"
    folders[0].mkdir()
    for number in range(5):
        (folders[0] / f"{number}.png").write_bytes(b"no image")
    plan = plan_of(*folders)
    maker = dataclasses.replace(open_run(*folders, model, "batch=1").maker(), tally=OfOneThread())
    assert sum(report.rejects for report in maker.make(0, plan[0], Threads(1), Turn())) == 5
    assert maker.tally["reject decode"] == 5


def test_a_shard_waits_for_its_turn_with_its_first_window_loaded(two_shards, tmp_path):
    makers, plan, degraded = two_shards
    turn, notes = Turn(), Notes()
    first = makers[0].make(0, plan[0], Threads(1), turn)
    next(first)
    assert degraded == [plan[0][0].key]
    second = threading.Thread(target=list, args=(makers[1].make(1, plan[1], notes, turn),))
    second.start()
    assert notes.loaded.wait(30)
    second.join(0.5)
    assert second.is_alive()
    assert notes.loads == [plan[1][0].key]
    assert degraded == [plan[0][0].key]
    list(first)
    second.join(30)
    assert degraded == [source.key for number in range(2) for source in plan[number]]
    assert len(list(tmp_path.glob("data/part-*"))) == 2


def test_a_failure_to_write_ends_the_shard_and_leaves_no_part(photos, model, tmp_path, monkeypatch):
    def full(self, rows):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardWriter, "add", full)
    run, plan, reports = open_run(photos, tmp_path, model, "batch=1"), plan_of(photos, tmp_path), []
    with pytest.raises(OSError, match="No space left"):
        reports.extend(run.maker().make(0, plan[0], Threads(2), Turn()))
    assert len(reports) < 9
    assert not list(tmp_path.glob("data/*"))


def test_the_preview_shows_no_source_that_changed_since(model, tmp_path):
    (tmp_path / "in").mkdir()
    file = tmp_path / "in/a.png"
    file.write_bytes(images.encode_png(np.full((32, 32, 3), 128, np.uint8)))
    run = open_run(tmp_path / "in", tmp_path / "out", model, "hr=reference")
    plan = plan_of(tmp_path / "in", tmp_path / "out")
    make_all(run, plan)
    records = finished_in(run, plan)
    assert preview(samples(run.output, records, plain(run.config))) is not None
    file.write_bytes(images.encode_png(np.full((32, 32, 3), 129, np.uint8)))
    assert preview(samples(run.output, records, plain(run.config))) is None


def test_45_megapixels_fit_a_gpu_of_80_gb_at_full_width(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80e9))
    assert usual_memory(torch.device("cpu")) == 4
    with torch.device("meta"):
        autoencoder = ResidualAutoencoder(AutoencoderConfig(latent_channels=32))
        network = ResidualNetwork(ResidualConfig(latent_channels=32, width=256, blocks=12))
    levels = {"1": 1.0, "2": 2.0, "4": 4.0}
    degrader = Degrader(autoencoder, ResidualFlow(Optics((1.0, 2.0, 4.0)), Spread(32, (0.0, 1.0)), network, 8), levels)
    assert degrader.plan(5464, 8192, usual_memory(torch.device("cuda"))).grid.rows > 1
    with pytest.raises(ValueError, match=r"^memory=4: needs at least 10\.\d+ GB for 8192 x 5464 pixels"):
        degrader.plan(5464, 8192, 4)


def test_a_machine_that_loses_most_photographs_of_a_shard_puts_it_only_at_the_last_attempt(photos, model, tmp_path):
    run, plan = open_run(photos, tmp_path, model), plan_of(photos, tmp_path)
    run._save_config()
    maker = run.maker()
    maker.degrader.degrader.register_forward_hook(lambda module, given, lr: lr * torch.nan)  # as a broken GPU would
    with pytest.raises(
        RuntimeError, match=r"^9 of 9 photographs were lost here.*\(degrade: the result is not finite\)"
    ):
        list(maker.make(0, plan[0], Threads(1), Turn(), last=False))
    assert not list((tmp_path / "data").glob("part-*"))
    *_, end = maker.make(0, plan[0], Threads(1), Turn(), last=True)
    assert (end.record.rows, end.record.rejects) == (0, 9)
    assert {(reject.stage, reject.error) for reject in rejects_in(tmp_path).values()} == {
        ("degrade", "the result is not finite")
    }


def test_a_memory_that_the_run_asks_for_raises_no_suspicion(photos, model, tmp_path):
    run, plan = open_run(photos, tmp_path, model, "memory=0.0001"), plan_of(photos, tmp_path)
    run._save_config()
    *_, end = run.maker().make(0, plan[0], Threads(1), Turn(), last=False)
    assert (end.record.rows, end.record.rejects) == (0, 9)
    assert all("memory=0.0001" in reject.error for reject in rejects_in(tmp_path).values())


def test_bad_files_raise_no_suspicion(photos, model, tmp_path):
    spoiled = save_spoiled(tmp_path / "spoiled", photos)
    run, plan = open_run(spoiled, tmp_path / "out", model), plan_of(spoiled, tmp_path / "out")
    run._save_config()
    *_, end = run.maker().make(0, plan[0], Threads(1), Turn(), last=False)
    assert end.record.rejects > (end.record.rows + end.record.rejects) / 2
    assert end.record.rows + end.record.rejects >= shard.SUSPICIOUS


def test_a_part_is_never_put_over_another(photos, model, tmp_path):
    first, second, other = (open_run(photos, tmp_path, model, f"seed={seed}") for seed in (0, 0, 3))
    plan, part = plan_of(photos, tmp_path, "limit=2"), tmp_path / "data/part-000000.parquet"
    first._save_config()
    beside = second.maker().make(0, plan[0], Threads(2), Turn())
    next(beside)  # it has begun, so it does not find the part that comes now
    make_all(first, plan)
    before, records = part.read_bytes(), finished_in(first, plan)
    assert list(beside)[-1].record == records[0]
    assert part.read_bytes() == before
    assert finished_in(second, plan) == records
    assert len(records) == 1
    with pytest.raises(Unfinished, match=r"part-000000\.parquet: another run writes into this output.*another recipe"):
        make_all(other, plan)
    assert part.read_bytes() == before
    part.write_bytes(before[:-10])
    with pytest.raises(Unfinished, match=r"part-000000\.parquet: another run writes into this output.*is damaged"):
        make_all(first, plan)
    assert finished_in(first, plan) == {}


def test_a_shard_of_a_run_whose_output_was_overwritten_is_not_put(photos, model, tmp_path):
    run, other = (open_run(photos, tmp_path, model, f"seed={seed}") for seed in (0, 9))
    (tmp_path / "config.yaml").write_text(dump(other.config))
    with pytest.raises(OSError, match="another run has overwritten it"):
        list(run.maker().make(0, plan_of(photos, tmp_path, "limit=2")[0], Threads(1), Turn()))
    assert not (tmp_path / "data").exists()
