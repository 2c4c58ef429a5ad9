import hashlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from degflow.config import load
from degflow.dataset.layout import REJECT
from degflow.synthesis.run import synthesize
from degflow.synthesis.settings import SynthesizeConfig
from tests import ROOT
from tests.finished import synthesize_here
from tests.sources import content, keys_of, png, rejects_of, rows_of, save_model, save_spoiled

JOB = ROOT / "jobs" / "synthesize.py"
THREE = ("shard.images=3", "actors.threads=1")


@pytest.fixture(scope="module")
def finished(one_thread, photos, model, tmp_path_factory):
    """The run that others are compared with, without Ray: nine photographs, one draw each, three shards."""
    output = tmp_path_factory.mktemp("out") / "set"
    synthesize_here(photos, output, model, *THREE, "actors.max=1")
    return output


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of it that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def run(photos, output, model, *words):
    synthesize(load(SynthesizeConfig, [f"input={photos}", f"output={output}", f"model={model}", *words]))
    return Path(output)


def test_the_finished_layout_and_manifest(photos, finished):
    assert sorted(rows_of(finished)) == [(key, 0) for key in keys_of(photos)]
    parts = [f"part-{n:06d}.parquet" for n in range(3)]
    names = sorted(str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file())
    data = [f"data/{part}" for part in parts]
    top = ["README.md", "_SUCCESS", "config.yaml", "croissant.json", "manifest.parquet", "preview.html", "preview.png"]
    assert names == sorted([*data, *top, "plan/part-000000.parquet", "rejects/part-000000.parquet"])
    rejects = pq.read_table(finished / "rejects/part-000000.parquet")
    assert (rejects.schema, len(rejects)) == (REJECT, 0)
    for record in pq.read_table(finished / "manifest.parquet").to_pylist():
        data = (finished / record["part"]).read_bytes()
        rows = pq.read_table(io.BytesIO(data)).to_pylist()
        footer = int.from_bytes(data[-8:-4], "little") + 8
        assert (record["bytes"], record["sha256"]) == (len(data), hashlib.sha256(data[:-footer]).hexdigest())
        assert (record["rows"], record["rejects"]) == (len(rows), 0) == (3, 0)
        assert record["seconds"] > 0
        pairs = [(png(row["hr"]["bytes"]).astype(float), png(row["lr"]["bytes"])) for row in rows]
        psnr = [10 * np.log10(255**2 / ((hr - lr) ** 2).mean()) for hr, lr in pairs]
        assert record["psnr"] == pytest.approx(np.mean(psnr), abs=1e-3)
        assert record["clipped"] == pytest.approx(np.mean([np.isin(lr, (0, 255)).mean() for _, lr in pairs]))
        shift = [np.linalg.norm((hr - lr).mean((0, 1))) for hr, lr in pairs]
        assert record["colour_shift"] == pytest.approx(np.mean(shift), rel=1e-4)


def test_datasets_reads_it_as_images(finished, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows_here = rows_of(finished)
    for arguments, files in ((["parquet"], {"data_files": f"{finished}/data/*.parquet"}), ([str(finished)], {})):
        rows = datasets.load_dataset(*arguments, split="train", cache_dir=str(tmp_path), **files)
        assert rows.num_rows == 9
        assert rows.column_names == list(next(iter(rows_here.values())))
        for column in ("lr", "hr"):
            assert isinstance(rows.features[column], datasets.Image)
            assert np.array_equal(np.asarray(rows[4][column]), png(rows_here[rows[4]["key"], 0][column]["bytes"]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_mlcroissant_reads_it_by_its_description(finished, caplog):
    croissant = pytest.importorskip("mlcroissant")
    described, rows_here = croissant.Dataset(jsonld=finished / "croissant.json"), rows_of(finished)
    assert not described.metadata.ctx.issues.errors
    assert not [record for record in caplog.records if "@context" in record.message]
    rows = list(described.records("rows"))
    assert len(rows) == 9
    for row in rows:
        here = rows_here[row["rows/key"].decode(), row["rows/draw"]]
        assert [name.removeprefix("rows/") for name in row] == list(here)
        for column in ("lr", "hr"):
            assert np.array_equal(np.asarray(row[f"rows/{column}"]), png(here[column]["bytes"]))
        for column in ("scale", "height", "noise_seed"):
            assert row[f"rows/{column}"] == here[column]
        assert row["rows/hr_sha256"].decode() == here["hr_sha256"]


def test_card_and_preview(finished):
    card = (finished / "README.md").read_text()
    assert card.startswith("---\n")
    assert "data_files: data/*.parquet" in card.split("---")[1]
    assert "9 LR images of 9 photographs" in card
    with Image.open(finished / "preview.png") as sheet:
        assert sheet.width > 2 * 192
        assert sheet.height > 6 * 192


def test_the_saved_configuration_makes_the_same_bytes_with_two_actors(shared_ray, finished, tmp_path):
    synthesize(
        load(SynthesizeConfig, [f"config={finished}/config.yaml", f"output={tmp_path}", "actors.min=2", "actors.max=2"])
    )
    assert content(tmp_path) == content(finished)


def test_a_failing_write_stops_the_job_and_a_restart_makes_what_is_missing(
    shared_ray, photos, model, finished, copy, capsys
):
    for name in ("_SUCCESS", "data/part-000001.parquet", "rejects/part-000000.parquet", "manifest.parquet"):
        (copy / name).unlink()
    blocked = copy / "data" / "part-000001.parquet"
    blocked.mkdir()
    with pytest.raises(OSError, match=r"^on .+: shard 1: IsADirectoryError: \[Errno 21\] .*part-000001.parquet'$"):
        run(photos, copy, model, *THREE)
    assert not (copy / "_SUCCESS").exists()
    blocked.rmdir()
    blocked.write_bytes(b"no part")
    (copy / "data" / f".part-000001.parquet.{'0' * 32}").write_bytes(b"left by a killed driver")
    untouched = (copy / "data" / "part-000000.parquet").stat().st_mtime_ns
    run(photos, copy, model, *THREE)
    said = capsys.readouterr().out
    assert "data/part-000001.parquet: damaged, or no part of this run: deleted" in said
    assert re.search("3 shards, 2 of them done", said)
    assert content(copy) == content(finished)
    assert (copy / "data" / "part-000000.parquet").stat().st_mtime_ns == untouched
    assert (copy / "_SUCCESS").exists()


def test_a_killed_driver_is_continued_by_the_same_command(shared_ray, photos, model, finished, tmp_path, capfd):
    output = tmp_path / "out"
    words = [f"input={photos}", f"output={output}", f"model={model}", "shard.images=1", "actors.threads=1"]
    environment = os.environ | {"RAY_ADDRESS": "local"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(JOB.parents[1]), environment.get("PYTHONPATH")]))
    driver = subprocess.Popen([sys.executable, JOB, *words, "actors.max=1"], env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while len(list(output.glob("data/part-*"))) < 2 and time.monotonic() < deadline and driver.poll() is None:
        time.sleep(0.005)
    driver.send_signal(signal.SIGKILL)
    assert driver.wait() == -signal.SIGKILL
    time.sleep(2)
    done = {path.name: path.read_bytes() for path in output.glob("data/part-*")}
    assert 2 <= len(done) < 9
    assert not (output / "_SUCCESS").exists()
    capfd.readouterr()
    synthesize(load(SynthesizeConfig, words))
    out, errors = capfd.readouterr()
    said = out.splitlines()
    found = re.search(r"^9 images .* in 9 shards, (\d) of them done; 1 LR each, ", said[0])
    assert found
    assert len(done) <= int(found[1]) < 9  # the orphaned actor may have put one more
    assert said[1].startswith("running on this machine: actors ")
    assert said[-1] == f"preview: {output}/preview.html"
    assert "Traceback" not in errors
    assert {path.name: path.read_bytes() for path in output.glob("data/part-*")}.items() >= done.items()
    rows, reference = rows_of(output), rows_of(finished)
    assert rows.keys() == reference.keys()
    assert all(rows[key]["scale"] == reference[key]["scale"] for key in rows)
    assert [path.name for path in output.rglob(".*")] == []


def test_too_many_rejects_fail_the_job_and_a_larger_rate_accepts_them(photos, model, tmp_path, capsys):
    spoiled, output = save_spoiled(tmp_path / "spoiled", photos), tmp_path / "out"
    words = ["max_pixels=80000", "shard.images=4"]
    reason = r"9 of 11 files were rejected.*max_reject_rate=0.5: .*empty.png \(decode: empty"
    with pytest.raises(ValueError, match=reason):
        synthesize_here(spoiled, output, model, *words, "max_reject_rate=0.5")
    before = content(output)
    assert not (output / "_SUCCESS").exists()
    synthesize_here(spoiled, output, model, *words, "max_reject_rate=0.9")
    assert "2 photographs in 3 shards, 9 rejects" in capsys.readouterr().out
    assert (output / "_SUCCESS").exists()
    assert content(output) == before
    assert len(rejects_of(output)) == sum(pq.read_table(output / "manifest.parquet")["rejects"].to_pylist()) == 9


def test_a_finished_run_is_left_alone_unless_overwritten(photos, model, copy, capsys):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    synthesize_here(photos, copy, model, "shard.images=3", "max_reject_rate=0")
    assert "finished already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before
    (copy / "mine.txt").write_text("keep me")
    synthesize_here(photos, copy, model, "limit=2", "seed=5", "overwrite=true")
    assert {row["seed"] for row in rows_of(copy).values()} == {5}
    assert len(rows_of(copy)) == 2
    assert (copy / "mine.txt").read_text() == "keep me"
    assert list(copy.glob("*/part-000001.parquet")) == []
    assert load(SynthesizeConfig, [f"config={copy}/config.yaml"]).overwrite is False


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["seed=1"], "seed was 0, now 1"),
        (["scale.low=1.5"], "scale.low was 1.0, now 1.5"),
        (["shard.bytes=1000"], "shard.bytes was 512000000, now 1000"),
        (["size=scaled", "shard.images=4"], "size was same, now scaled; shard.images was 3, now 4"),
        (["model=OTHER"], "model_sha256 was "),
        (["input=OTHER"], "input was "),
    ],
)
def test_another_configuration_is_refused(photos, model, finished, tmp_path, words, named):
    other = save_model(tmp_path / "other.safetensors", seed=1)
    before = content(finished)
    words = [
        word.replace("model=OTHER", f"model={other}").replace("input=OTHER", f"input={tmp_path}") for word in words
    ]
    with pytest.raises(ValueError, match=re.escape(named)):
        synthesize_here(photos, finished, model, "shard.images=3", *words)
    assert content(finished) == before


def test_a_run_of_another_version_is_refused_and_nothing_of_it_deleted(photos, model, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    config = tmp_path / "out/config.yaml"
    config.write_text("".join(line for line in config.read_text().splitlines(True) if not line.startswith("gray:")))
    before = content(tmp_path / "out")
    with pytest.raises(ValueError, match=r"its config\.yaml has no gray, so another version of degflow has begun it"):
        synthesize_here(photos, tmp_path / "out", model, "shard.images=3")
    assert content(tmp_path / "out") == before


def test_dry_run_writes_nothing(photos, model, tmp_path, capsys):
    synthesize_here(photos, tmp_path / "out", model, "dry_run=true", "shard.images=4", "scale.per_image=2", "limit=7")
    said = capsys.readouterr().out
    assert re.search(r"7 images \(.*\) in 2 shards; 2 LR each, scales uniform in \[1, 4\]", said)
    assert "1 file in " in said
    assert "some 0 megapixels of LR to make, a dataset of some 0.0 GB: of 7 sampled files 7 are readable" in said
    assert "with 0.01 megapixels on average" in said
    assert re.search(r"planned with \d+ MB of memory at most; dry_run=true: nothing was started", said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["scale.low=0.5"], r"scale.low=0.5: .* trained on scales in \[1.0, 4.0\]"),
        (["scale.high=4.5"], r"scale.high=4.5: .* trained on scales in \[1.0, 4.0\]"),
        (["scale.distribution=list", "scale.values=[2,7]"], r"scale.values=7.0: .* trained on scales in \[1.0, 4.0\]"),
        (["model=MISSING"], "missing.safetensors: no such file"),
        (["model=TEXT"], "notes.txt: not a degflow checkpoint"),
        (["input=EMPTY"], r"input=.*/empty: no such file or folder"),
        (["input=TEXTS"], r"input=.*: 1 other file there, but no file ending in"),
        (["output=TEXTS"], r"output=.*: is not empty and holds no dataset of this job"),
        (["output=TEXTS", "overwrite=true"], r"output=.*: is not empty and holds no dataset of this job"),
        (["output=FOREIGN"], r"output=.*: is not empty and holds no dataset .*config.yaml"),
        (["output=GARBLED"], r"output=.*: is not empty and holds no dataset .*config.yaml"),
        (["output=LOOP"], r"output=.*: cannot be read \(OSError: .*Too many levels"),
        (["output=TEXT"], r"output=.*: is a file"),
        (["output=BELOW"], r"output=.*: is a file, or lies in one"),
        (["output=READONLY"], r"output=/proc/sys/degflow: cannot be written"),
        (["model_sha256=abc"], "model_sha256=abc: .* has [0-9a-f]{64}"),
        (["actors.gpus=1"], "actors.gpus=1: Ray finds no GPU"),
        (["actors.threads=64"], "actors.threads=64: Ray finds 2 CPUs"),
    ],
)
def test_what_a_run_refuses(shared_ray, photos, model, tmp_path, words, message):
    places = {
        "MISSING": "missing.safetensors",
        "TEXTS": "texts",
        "TEXT": "texts/notes.txt",
        "BELOW": "texts/notes.txt/out",
    }
    places |= {
        "EMPTY": "empty",
        "FOREIGN": "foreign",
        "GARBLED": "garbled",
        "LOOP": "loop",
        "READONLY": "/proc/sys/degflow",
    }
    for name, text in {
        "texts/notes.txt": "text",
        "foreign/config.yaml": "fit: 1",
        "garbled/config.yaml": "{[:",
    }.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    words = [re.sub(r"[A-Z]{4,}$", lambda match: str(tmp_path / places[match[0]]), word) for word in words]
    with pytest.raises((ValueError, OSError), match=message):
        run(photos, tmp_path / "out", model, *words)
    assert not (tmp_path / "out" / "data").exists()
    assert sorted(path.name for path in (tmp_path / "texts").iterdir()) == ["notes.txt"]


def test_a_first_try_with_a_limit_is_extended_to_all(photos, model, tmp_path, capsys):
    synthesize_here(photos, tmp_path / "out", model, "limit=4", "shard.images=2")
    first = rows_of(tmp_path / "out")
    assert len(first) == 4
    synthesize_here(photos, tmp_path / "out", model, "limit=7", "shard.images=2")
    assert "3 new in" in capsys.readouterr().out
    assert rows_of(tmp_path / "out") == first
    synthesize_here(photos, tmp_path / "out", model, "limit=7", "shard.images=2", "extend=true")
    assert len(rows_of(tmp_path / "out")) == 7
    synthesize_here(photos, tmp_path / "out", model, "shard.images=2", "extend=true")
    rows, whole = rows_of(tmp_path / "out"), tmp_path / "whole"
    assert {key: rows[key] for key in first} == first
    synthesize_here(photos, whole, model, "shard.images=2")
    assert {key: row["lr"] for key, row in rows.items()} == {key: row["lr"] for key, row in rows_of(whole).items()}


@pytest.mark.parametrize("memory", [0.16, 1.0])
def test_an_image_that_does_not_fit_is_named_before_any_is_made(model, tmp_path, capsys, memory):
    folder = tmp_path / "in"
    folder.mkdir()
    for name, side in (("large.jpg", 800), ("small.png", 32)):
        pixels = np.random.default_rng(0).integers(0, 256, (side, side + 8, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    synthesize_here(folder, tmp_path / "out", model, f"memory={memory}", "max_reject_rate=1")
    said = capsys.readouterr().out
    line = "^large.jpg and images as large will be rejects: memory=0.16: needs at least 0... GB for 808 x 800 pixels$"
    assert bool(re.search(line, said, re.M)) == ("large.jpg" in rejects_of(tmp_path / "out")) == (memory == 0.16)


@pytest.mark.parametrize("word", ["solver.steps=2", "solver.solver=euler"])
def test_a_solver_is_refused_for_a_model_that_has_none(photos, tmp_path, word):
    model = save_model(tmp_path / "gaussian.safetensors", draws=True, blocks=0)
    with pytest.raises(ValueError, match=rf"^{word}: .*gaussian.safetensors has no solver; leave it out"):
        synthesize_here(photos, tmp_path / "out", model, word)
    assert not (tmp_path / "out").exists()
