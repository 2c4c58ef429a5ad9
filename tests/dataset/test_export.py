import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from degflow import images
from degflow.capture.scenes import SceneConfig, SceneImages
from degflow.config import load
from degflow.dataset.export_layouts import file_name
from degflow.dataset.exports import ExportConfig, export
from degflow.dataset.pairs import SynthesizedPairs
from degflow.storage import Place
from tests import ROOT
from tests.finished import finish, finish_rows, save_coordinates
from tests.sources import keys_of, png, rows_of

HOSTILE = (
    *("../../escape.png", "/tmp/absolute.png", "a/../../b.png", "..", ".", "..\\..\\windows.png", "C:\\x.png"),
    *("nul\0byte.png", "line\nbreak.png", "tab\t.png", " ", "", "-rf.png", "~/x.png", "$HOME.png", "%2e%2e%2fx.png"),
    *("x" * 900 + ".png", "x" * 901 + ".png", "d/" * 300 + "x.png", "照" * 300 + ".png", "\U0001f600.png"),
    *("caf\u00e9.png", "cafe\u0301.png", "IMG_1.JPG", "img_1.jpg", "Img_1.jpg", "img_1.png", "img_1.jpeg"),
    *("a/b.png", "a--b.png", "a-b.png", "a_b.png", "a.b.png", "a b.png", "a//b.png", "a/-b.png", "a-/b.png"),
    *("a.png", "a_png.png", "a.png_0.png", "a_png_0.png", "con.png", "nul.png", ".hidden.png", "__meta__.png"),
    *("b.hr.png", "b.lr.png", "b.json", "gt/a.png", "index/part-000000.json", "_SUCCESS", "a, b (8,8,3).png"),
    file_name("IMG_1.JPG", 0).removesuffix("_0") + ".png",
    file_name("IMG_1.JPG", 0).lower() + ".png",
)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(photos, model, tmp_path_factory):
    """Nine photographs of several sizes, two draws each, in three parts, HR by reference."""
    words = ["shard.images=3", "scale.per_image=2", "hr=reference"]
    return finish(photos, tmp_path_factory.mktemp("out") / "set", model, *words)


@pytest.fixture(scope="module")
def twofold(photos, model, tmp_path_factory):
    """The same photographs with one draw each, LR shrunk by 2 or 3."""
    words = ["shard.images=3", "size=scaled", "scale.distribution=list", "scale.values=[2,3]"]
    return finish(photos, tmp_path_factory.mktemp("out") / "set", model, *words)


def run(source, output, *words):
    export(load(ExportConfig, [f"input={source}", f"output={output}", "workers=1", *words]))
    return Path(output)


def files_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def times_in(folder):
    return {str(path): path.stat().st_mtime_ns for path in Path(folder).rglob("*")}


def index_of(output):
    return [
        pair for path in sorted((Path(output) / "index").iterdir()) for pair in json.loads(path.read_text())["pairs"]
    ]


def hr_of(row, photos):
    return png(row["hr"]["bytes"]) if row["hr"]["bytes"] else images.decode((photos / row["key"]).read_bytes())


# The rules of the trainers, taken from their sources (BasicSR 2024-05, neosr 2024-09, traiNNer-redux 2026-06).


def basicsr_pairs(gt, lq, meta_info=None):
    """PairedImageDataset: the folders' own files, or the first word of each line; LQ has GT's base name."""
    if meta_info:
        found = [line.strip().split(" ")[0] for line in Path(meta_info).read_text(encoding="ascii").splitlines()]
    else:
        found = [entry.name for entry in os.scandir(gt) if entry.is_file() and not entry.name.startswith(".")]
        assert len(found) == len([entry for entry in os.scandir(lq) if entry.is_file()])
    pairs = {}
    for name in found:
        stem, suffix = os.path.splitext(os.path.basename(name))
        pairs[name] = Path(gt, name), Path(lq, stem + suffix)
    return pairs


def basicsr_accepts(gt, lq, scale):
    """paired_random_crop: GT is exactly `scale` times LQ."""
    with Image.open(gt) as high, Image.open(lq) as low:
        assert high.mode == low.mode == "RGB"
        return high.size == (low.width * scale, low.height * scale)


def realesrgan_pairs(root, meta_info):
    """RealESRGANPairedDataset: `GT, LQ` below the roots of each, here one and the same."""
    lines = Path(meta_info).read_text(encoding="ascii").splitlines()
    return [tuple(Path(root, name) for name in line.strip().split(", ")) for line in lines]


def neosr_pairs(gt, lq):
    """`paired`: all images below GT; LQ is the path with the folder replaced."""
    return [(path, Path(str(path).replace(str(gt), str(lq)))) for path in Path(gt).rglob("*.png")]


@pytest.mark.parametrize("layout", ["paired", "realsr", "webdataset"])
def test_exports_of_webp_are_png_of_the_same_pixels(photos, model, tmp_path, layout):
    words = ["limit=3", "scale.distribution=list", "scale.values=[2,3]"]
    sources = {codec: finish(photos, tmp_path / codec, model, *words, f"codec={codec}") for codec in ("png", "webp")}
    assert "| lr | struct(bytes, path) | lossless WebP, 8-bit sRGB |" in (tmp_path / "webp/README.md").read_text()
    assert (tmp_path / "webp/preview.html").is_file()
    found = {codec: files_in(run(uri, tmp_path / f"{codec} out", f"layout={layout}")) for codec, uri in sources.items()}
    for name in found["png"]:
        if name.endswith((".png", ".tar", ".txt")):
            assert found["webp"][name] == found["png"][name]
    assert found["webp"].keys() == found["png"].keys()
    ours, theirs = ({pair["key"]: pair for pair in SynthesizedPairs(uri)} for uri in sources.values())
    assert ours.keys() == theirs.keys()
    assert all((ours[key][name] == theirs[key][name]).all() for key in ours for name in ("lr", "hr"))


def test_paired_folders_hold_every_row_and_basicsr_accepts_them(made, photos, tmp_path, capsys):
    output = run(made, tmp_path / "out")
    assert "18 pairs in " in capsys.readouterr().out
    rows, index = rows_of(Path(made)), index_of(output)
    gt, lq = output / "gt", output / "lq"
    by_folder = basicsr_pairs(gt, lq)
    assert by_folder == basicsr_pairs(gt, lq, output / "meta_info.txt")
    assert sorted(by_folder.values()) == sorted(realesrgan_pairs(output, output / "meta_info_pair.txt"))
    assert sorted(by_folder.values()) == sorted(neosr_pairs(gt, lq))
    assert all(basicsr_accepts(*pair, 1) for pair in by_folder.values())
    assert sorted((pair["key"], pair["draw"]) for pair in index) == sorted(rows)
    for pair in index:
        row = rows[pair["key"], pair["draw"]]
        assert (pair["scale"], pair["time"]) == (row["scale"], row["time"])
        high, low = by_folder[f"{pair['name']}.png"]
        np.testing.assert_array_equal(png(high.read_bytes()), hr_of(row, photos))
        assert low.read_bytes() == row["lr"]["bytes"]
    lines = (output / "meta_info.txt").read_text().splitlines()
    assert "coffee_jpg_1.png (80,96,3)" in lines
    assert len(lines) == 18
    assert {path.name for path in output.iterdir()} == {
        *("gt", "lq", "index", "meta_info.txt", "meta_info_pair.txt", "export.yaml", "_SUCCESS")
    }


def test_shrunk_pairs_are_a_whole_multiple_below_a_folder_of_their_scale(twofold, photos, tmp_path, capsys):
    output, rows = run(twofold, tmp_path / "out"), rows_of(Path(twofold))
    cut = {}
    for scale in (2, 3):
        root = output / f"x{scale}"
        pairs = basicsr_pairs(root / "gt", root / "lq", root / "meta_info.txt")
        assert pairs == basicsr_pairs(root / "gt", root / "lq")
        assert pairs
        assert all(basicsr_accepts(*pair, scale) for pair in pairs.values())
        assert sorted(pairs.values()) == sorted(realesrgan_pairs(root, root / "meta_info_pair.txt"))
        for info in (pair for pair in index_of(output) if pair["folder"] == f"x{scale}/"):
            row = rows[info["key"], info["draw"]]
            assert row["scale"] == scale
            high, low = (png(path.read_bytes()) for path in pairs[f"{info['name']}.png"])
            hr, lr = hr_of(row, photos), png(row["lr"]["bytes"])
            np.testing.assert_array_equal(high, hr[: high.shape[0], : high.shape[1]])
            np.testing.assert_array_equal(low, lr[: low.shape[0], : low.shape[1]])
            assert max(lr.shape[n] - low.shape[n] for n in range(2)) <= 1
            off = max(abs(hr.shape[n] - scale * lr.shape[n]) for n in range(2))
            assert info["off"] == off <= scale / 2
            if off:
                cut[info["key"]] = off
    assert cut
    said = f"{len(cut)} pairs were cut, .* at the far edge they are misaligned by up to {max(cut.values())} HR pixels"
    assert re.search(said, capsys.readouterr().out)


def test_pairs_that_no_trainer_of_paired_folders_takes_are_refused(photos, model, tmp_path):
    source = finish(photos, tmp_path / "set", model, "size=scaled", "limit=1")
    with pytest.raises(
        ValueError, match=r"layout=paired: .*/set has size=scaled and scales uniform in \[1, 4\]; .*whole"
    ):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert len(index_of(run(source, tmp_path / "out", "layout=webdataset"))) == 1
    words = ["size=scaled", "limit=1", "scale.distribution=list", "scale.values=[2,2.5]"]
    with pytest.raises(ValueError, match=r"scales 2, 2\.5; "):
        run(finish(photos, tmp_path / "halves", model, *words), tmp_path / "folders")


@pytest.mark.parametrize("source", ["made", "twofold"])
def test_webdataset_reads_the_tars(source, photos, tmp_path, request):
    webdataset = pytest.importorskip("webdataset")
    source = request.getfixturevalue(source)
    output, rows = run(source, tmp_path / "out", "layout=webdataset"), rows_of(Path(source))
    tars = sorted(map(str, output.glob("*.tar")))
    assert [Path(tar).name for tar in tars] == [f"part-00000{n}.tar" for n in range(3)]
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8"))
    assert len(samples) == len(rows)
    assert {sample["__key__"] for sample in samples} == {pair["name"] for pair in index_of(output)}
    for sample in samples:
        row = rows.pop((sample["json"]["key"], sample["json"]["draw"]))
        assert sample["json"] == {name: value for name, value in row.items() if name not in ("lr", "hr")}
        np.testing.assert_array_equal(sample["hr.png"], hr_of(row, photos))
        np.testing.assert_array_equal(sample["lr.png"], png(row["lr"]["bytes"]))


def test_the_scene_reader_takes_the_tree_of_a_grid(photos, model, tmp_path, capsys):
    words = ["scale.distribution=grid", "scale.per_image=4", "shard.images=4", "hr=reference"]
    source = finish(photos, tmp_path / "set", model, *words)
    output = run(source, tmp_path / "out", "layout=realsr")
    assert "27 pairs in " in (said := capsys.readouterr().out)
    assert "9 of 36 rows left out" in said  # x1, for which RealSR has no label but HR's
    scenes = SceneImages(SceneConfig(str(output), {"1": 1.0, "2": 2.0, "3": 3.0, "4": 4.0}, crop=8), quiet=True)
    assert len(scenes) == 9
    assert scenes.missing == {}
    keys, rows = {pair["name"]: pair["key"] for pair in index_of(output)}, rows_of(Path(source))
    for scene, pixels in zip(scenes.scenes, scenes.pixels, strict=True):
        key = keys[scene.name]
        np.testing.assert_array_equal(pixels[0], hr_of(rows[key, 0], photos))
        for draw in (1, 2, 3):
            assert rows[key, draw]["scale"] == draw + 1
            np.testing.assert_array_equal(pixels[draw], png(rows[key, draw]["lr"]["bytes"]))


def test_continuous_scales_go_to_the_nearest_label_and_none_is_lost(photos, model, tmp_path, capsys):
    source = finish(photos, tmp_path / "set", model, "scale.per_image=5")
    with pytest.raises(ValueError, match=r"labels={}: .*/set has scales uniform in \[1, 4\]; give each label"):
        run(source, tmp_path / "none", "layout=realsr")
    labels = "labels={2: 2.0, 4: 3.75}"
    output, rows = run(source, tmp_path / "out", "layout=realsr", labels), rows_of(Path(source))
    index = index_of(output)
    assert sorted((pair["key"], pair["draw"]) for pair in index) == sorted(rows)
    for pair in index:
        assert pair["label"] == ("2" if pair["scale"] < 2.875 else "4")
        stem = f"{pair['label']}/{pair['name']}"
        row = rows[pair["key"], pair["draw"]]
        assert (output / f"{stem}_LR{pair['label']}.png").read_bytes() == row["lr"]["bytes"]
        np.testing.assert_array_equal(png((output / f"{stem}_HR.png").read_bytes()), hr_of(row, photos))
    drawn = {key: [rows[key, draw]["scale"] for draw in range(5)] for key, _ in rows}
    whole = [min(sum(s < 2.875 for s in scales), sum(s >= 2.875 for s in scales)) for scales in drawn.values()]
    scenes = SceneImages(SceneConfig(str(output), {"1": 1.0, "2": 2.0, "4": 3.75}, crop=8), quiet=True)
    assert len(scenes) == sum(whole) > 9
    best = [pair for pair in index if pair["key"] == "coffee.jpg" and pair["name"].endswith("_0")]
    assert {pair["label"] for pair in best} == {"2", "4"}
    for pair in best:
        level = {"2": 2.0, "4": 3.75}[pair["label"]]
        rivals = [scale for scale in drawn["coffee.jpg"] if (scale < 2.875) == (pair["label"] == "2")]
        assert abs(pair["scale"] - level) == min(abs(scale - level) for scale in rivals)
    capsys.readouterr()
    near = index_of(run(source, tmp_path / "near", "layout=realsr", labels, "tolerance=0.25"))
    assert sorted((pair["key"], pair["draw"]) for pair in near) == sorted(
        name for name, row in rows.items() if min(abs(row["scale"] - 2), abs(row["scale"] - 3.75)) <= 0.25
    )
    assert f"{45 - len(near)} of 45 rows left out" in capsys.readouterr().out


def test_the_scene_reader_takes_shrunk_lr_as_realsr_v3(twofold, photos, tmp_path, capsys):
    output = run(twofold, tmp_path / "out", "layout=realsr")
    count = 0
    for label, scale in (("2", 2.0), ("3", 3.0)):
        with pytest.raises(ValueError, match="resize_lr=true"):
            SceneImages(SceneConfig(str(output), {"1": 1.0, label: scale}, crop=8), quiet=True)
        levels = {"1": 1.0, label: scale}
        count += len(SceneImages(SceneConfig(str(output), levels, resize_lr=True, crop=8), quiet=True))
    assert count == 8
    assert {pair["key"] for pair in index_of(output)} == set(keys_of(photos)) - {"smallest.png"}
    assert "1 of 9 rows left out" in capsys.readouterr().out  # 9 x 8 pixels shrunk are no image that scenes would take


def test_names_are_safe_and_differ_wherever_they_are_written():
    found = {}
    for key in HOSTILE:
        for number in (0, 1, 10, 2**31 - 1):
            name = file_name(key, number)
            assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{2,83}", name), name
            assert found.setdefault(name.lower(), (key, number)) == (key, number)
    assert len(found) == 4 * len(set(HOSTILE))


def test_plain_keys_stay_readable_and_names_do_not_change():
    assert file_name("0001.png", 0) == "0001_png_0"
    assert file_name("2024/img-1.jpeg", 3) == "2024--img-1_jpeg_3"
    assert file_name("Canon/IMG 0001.JPG", 0) == "IMG_0001_JPG-8bc4424ec6ba15079cb3c3c1eb0ee75b_0"
    assert re.fullmatch(r"image-[0-9a-f]{32}_7", file_name("照/片", 7))


def test_random_keys_of_few_characters_have_as_many_names():
    choices = random.Random(0).choices
    keys = {"".join(choices("aA-_/.0", k=n % 8 + 1) + choices((".png", ".jpg", ""))) for n in range(20000)}
    assert len({file_name(key, 0).lower() for key in keys}) == len(keys) > 10000


@pytest.mark.parametrize("layout", ["paired", "realsr", "webdataset"])
def test_no_key_leads_out_of_the_folder_or_onto_another(layout, tmp_path):
    source = finish_rows(tmp_path / "set", HOSTILE, draws=2)
    before = files_in(tmp_path)
    output = run(source, tmp_path / "deep/er/out", f"layout={layout}", *["labels={2: 2.0}"] * (layout == "realsr"))
    after = files_in(tmp_path)
    assert {name: data for name, data in after.items() if not name.startswith("deep/er/out/")} == before
    rows, index = rows_of(Path(source)), index_of(output)
    assert sorted((pair["key"], pair["draw"]) for pair in index) == sorted(rows)
    if layout == "webdataset":
        webdataset = pytest.importorskip("webdataset")
        read = webdataset.WebDataset(str(output / "part-000000.tar"), shardshuffle=False)
        found = {sample["__key__"]: (sample["hr.png"], sample["lr.png"]) for sample in read}
    elif layout == "paired":
        pairs = basicsr_pairs(output / "gt", output / "lq", output / "meta_info.txt")
        found = {name.removesuffix(".png"): tuple(path.read_bytes() for path in pair) for name, pair in pairs.items()}
    else:
        ends = ("_HR", "_LR2")
        found = {p["name"]: tuple((output / f"2/{p['name']}{end}.png").read_bytes() for end in ends) for p in index}
    for pair in index:
        row = rows[pair["key"], pair["draw"]]
        assert found[pair["name"]] == (row["hr"]["bytes"], row["lr"]["bytes"])
    assert len(found) == len(rows)


def alive(group):
    """The processes of a process group, without those that nobody has waited for."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, of = stat.read_text().rpartition(")")[2].split()[:3]
            found += [stat.parent.name] if int(of) == group and state != "Z" else []
    return found


@pytest.mark.parametrize("layout", ["paired", "webdataset"])
def test_several_processes_leave_the_bytes_of_one(made, tmp_path, layout, capsys):
    one, several = run(made, tmp_path / "one", f"layout={layout}"), tmp_path / "several"
    capsys.readouterr()
    run(made, several, f"layout={layout}", "workers=2")
    assert files_in(several) == files_in(one)
    said = capsys.readouterr()
    assert "18 pairs in " in said.out
    assert "18/18" in said.err.splitlines()[-1]


def test_a_part_that_fails_in_a_process_is_named_and_the_others_are_kept(made, tmp_path):
    copy = Path(shutil.copytree(made, tmp_path / "copy"))
    part = copy / "data/part-000002.parquet"
    data = part.read_bytes()
    part.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=r"data/part-000002\.parquet: \d+ bytes, but the manifest says"):
        run(copy, tmp_path / "out", "workers=2")
    part.write_bytes(data)
    assert files_in(run(copy, tmp_path / "out")) == files_in(run(copy, tmp_path / "reference"))


def test_pairs_files_are_never_listed(made, tmp_path, monkeypatch):
    listed, files = [], Place.files

    def noted(self, name=""):
        found = files(self, name)
        listed.extend(file.key for file in found)
        return found

    monkeypatch.setattr(Place, "files", noted)
    output = run(made, tmp_path / "out")
    run(made, output)
    assert listed == []
    (output / "_SUCCESS").unlink()
    run(made, output)
    assert listed == [f"index/part-00000{n}.json" for n in range(3)]


def test_a_killed_export_is_continued_by_the_same_command(model, tmp_path):
    source = finish(save_coordinates(tmp_path / "in", 25), tmp_path / "set", model, "shard.images=1")
    reference = files_in(run(source, tmp_path / "reference"))
    output = tmp_path / "out"
    words = [f"input={source}", f"output={output}", "threads=1", "workers=2"]
    command = [sys.executable, ROOT / "jobs/export.py", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    job = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 600  # importing takes minutes on a busy machine
    while len(list(output.glob("index/part-*"))) < 3 and time.monotonic() < deadline and job.poll() is None:
        time.sleep(0.0005)
    job.send_signal(signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL
    while alive(job.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert alive(job.pid) == []  # its processes do not outlive it
    done = {path: time for path, time in times_in(output / "index").items() if "/part-" in path}
    assert 3 <= len(done) < 25
    assert not (output / "_SUCCESS").exists()
    (output / "gt" / f".000_png_0.png.{'0' * 32}").write_bytes(b"left by a killed write")
    run(source, output)
    assert times_in(output / "index").items() >= done.items()
    after = files_in(output)
    assert after.keys() == reference.keys()
    assert {name for name in after if after[name] != reference[name]} == set()


def test_a_finished_export_is_left_alone_unless_overwritten(made, twofold, tmp_path, capsys):
    output = run(made, tmp_path / "out")
    before = times_in(output)
    run(made, output)
    assert "finished already" in capsys.readouterr().out
    assert times_in(output) == before
    (output / "gt/mine.txt").write_text("keep me")
    with pytest.raises(ValueError, match=r"holds an export of another dataset .*overwrite=true"):
        run(twofold, output)
    with pytest.raises(ValueError, match=r"holds another export \(layout was paired, now webdataset"):
        run(made, output, "layout=webdataset")
    assert times_in(output).items() >= {k: v for k, v in before.items() if k != str(output / "gt")}.items()
    run(made, output, "layout=webdataset", "overwrite=true")
    parts = [
        f"{name}.{suffix}"
        for n in range(3)
        for name, suffix in ((f"part-00000{n}", "tar"), (f"index/part-00000{n}", "json"))
    ]
    assert sorted(files_in(output)) == sorted([*parts, "_SUCCESS", "export.yaml", "gt/mine.txt"])


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("layout", ["paired", "realsr"])
def test_an_overwrite_that_is_stopped_leaves_nothing_that_counts_as_done(made, tmp_path, layout, monkeypatch):
    words = [f"layout={layout}", *(["labels={2: 2.0, 3: 3.0}"] if layout == "realsr" else [])]
    reference = files_in(run(made, tmp_path / "out", *words))
    for count in (1, 2, 4, len(reference) - 2):
        left, delete = iter(range(count)), Place.delete

        def stop(self, name, left=left, delete=delete):
            if next(left, None) is None:
                raise Stopped
            delete(self, name)

        with monkeypatch.context() as patch:
            patch.setattr(Place, "delete", stop)
            with pytest.raises(Stopped):
                run(made, tmp_path / "out", "overwrite=true", *words)
        assert files_in(run(made, tmp_path / "out", *words)) == reference


def test_what_an_export_left_that_was_stopped_in_its_first_part_goes(photos, model, tmp_path):
    source = finish(save_coordinates(tmp_path / "in", 3), tmp_path / "set", model)
    output = run(source, tmp_path / "out")
    (output / "_SUCCESS").unlink()
    shutil.rmtree(output / "index")
    (output / "gt/mine.txt").write_text("keep me")
    shutil.rmtree(tmp_path / "set")
    (tmp_path / "in/001.png").unlink()
    source = finish(tmp_path / "in", tmp_path / "set", model)
    run(source, output)
    assert {file.name for file in (output / "gt").iterdir()} == {"000_png_0.png", "002_png_0.png", "mine.txt"}
    assert {file.name for file in (output / "lq").iterdir()} == {"000_png_0.png", "002_png_0.png"}


def test_parts_added_to_the_dataset_are_exported_and_the_others_left(photos, model, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("astronaut.PNG", "cat.jpeg", "coffee.jpg", "smallest.png"):
        shutil.copy(photos / name, tmp_path / "in" / name)
    words = ["shard.images=3"]
    source = finish(tmp_path / "in", tmp_path / "set", model, *words)
    output = run(source, tmp_path / "out")
    assert len(files_in(output / "gt")) == 4
    before = times_in(output / "lq")
    (tmp_path / "in/bad.png").write_bytes(b"")
    shutil.copy(photos / "a b#c%20.png", tmp_path / "in/again.png")
    finish(tmp_path / "in", source, model, *words)
    shutil.copy(photos / "coffee.jpg", tmp_path / "in/bad.png")
    finish(tmp_path / "in", source, model, *words, retry=True)
    run(source, output)
    assert times_in(output / "lq").items() >= before.items()
    assert files_in(output) == files_in(run(source, tmp_path / "reference"))
    keys = [pair["key"] for pair in index_of(output)]
    assert sorted(keys) == sorted(keys_of(tmp_path / "in"))


def test_object_storage_to_object_storage(s3, photos, model, tmp_path):
    inside = Place(s3.uri("photos"))
    for name in ("astronaut.PNG", "coffee.jpg", "cat.jpeg"):
        inside.write(name, (photos / name).read_bytes())
    source = finish(inside.uri, s3.uri("set"), model, "shard.images=2", "scale.per_image=2")
    for layout in ("paired", "webdataset"):
        local = files_in(run(source, tmp_path / layout, f"layout={layout}"))
        remote = Place(s3.uri(layout))
        run(source, remote.uri, f"layout={layout}", "workers=2")
        assert {file.key: remote.read(file.key) for file in remote.files()} == local
        run(source, remote.uri, f"layout={layout}", "overwrite=true")
        assert {file.key: remote.read(file.key) for file in remote.files()} == local


def test_what_is_missing_or_damaged_is_named_and_nothing_is_finished(made, tmp_path):
    copy = Path(shutil.copytree(made, tmp_path / "copy"))
    part = copy / "data/part-000001.parquet"
    data = part.read_bytes()
    part.write_bytes(data[:60] + bytes(50) + data[110:])
    with pytest.raises(ValueError, match=r"data/part-000001\.parquet: sha256"):
        run(copy, tmp_path / "out", "verify=true")
    assert not (tmp_path / "out/_SUCCESS").exists()
    part.write_bytes(data)
    run(copy, tmp_path / "out", "verify=true")
    assert (tmp_path / "out/_SUCCESS").exists()
    (copy / "_SUCCESS").unlink()
    with pytest.raises(ValueError, match="no finished dataset"):
        run(copy, tmp_path / "out")


def test_an_output_that_holds_something_else_is_left_alone(made, tmp_path):
    (tmp_path / "gt").mkdir()
    (tmp_path / "gt/precious_png_0.png").write_bytes(b"mine")
    for words in ([], ["overwrite=true"]):
        with pytest.raises(ValueError, match="is not empty and holds no export of this job"):
            run(made, tmp_path, *words)
        with pytest.raises(ValueError, match="is not empty and holds no export of this job"):
            run(made, made, *words)
    assert files_in(tmp_path) == {"gt/precious_png_0.png": b"mine"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["layout=lmdb"], "layout=lmdb: must be paired, realsr or webdataset"),
        (["labels={2: 2.0}"], "labels={'2': 2.0}: is for layout=realsr only"),
        (["tolerance=0.1"], "tolerance=0.1: is for layout=realsr only"),
        (["layout=realsr", "tolerance=-1"], "tolerance=-1.0: must not be negative"),
        (["layout=realsr", "labels={../x: 2.0}"], "'../x' must be a number"),
        (["layout=realsr", "labels={1: 1.0}"], "'1' must be a number such as 2 or 1.5, and not 1"),
        (["layout=realsr", "labels={2: -1}"], "scales must be positive numbers"),
        (["workers=0"], "workers=0: must be null or at least 1"),
        (["threads=0"], "threads=0: must be at least 1"),
        (["output="], "output: must be given"),
    ],
)
def test_bad_configuration_names_key_value_and_rule(words, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load(ExportConfig, ["input=a", "output=b", *words])
