import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from degflow import images
from degflow.config import load
from degflow.evaluation import run as evaluation_run
from degflow.evaluation.crops import central
from degflow.evaluation.metrics import psnr
from tests.captures import save_scenes, small_degrader
from tests.jobs import run_job

LEVELS = "levels={1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    """Two small simulated scenes as a tree of RealSR V2."""
    data = pytest.importorskip("skimage.data")
    photos = (data.astronaut()[:96, 100:220], data.coffee()[:96, :120])
    return save_scenes(tmp_path_factory.mktemp("captured") / "tree", photos, ("2", "3", "4"), first=0)


@pytest.fixture
def tree(tmp_path, captured):
    """A copy of them, to be spoilt."""
    return shutil.copytree(captured, tmp_path / "tree")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    file = tmp_path_factory.mktemp("model") / "model.safetensors"
    small_degrader({"1": 1.0, "2": 2.0, "4": 4.0}).save(str(file), {})
    return str(file)


@pytest.fixture
def run(tree, model):
    """Run the job with these words added to those that every run here has."""

    def run(*words):
        given = (f"data={tree}", f"output={tree.parent}/out", f"model={model}", "lpips=none", LEVELS)
        return run_job("evaluate", *given, *words)

    return run


@pytest.fixture
def evaluate(run):
    """Run the job, which must succeed; what it printed."""

    def succeed(*words):
        code, said = run(*words)
        assert code == 0, said
        return said

    return succeed


@pytest.fixture
def refused(run, tree):
    """Run the job, which must end with an error and write nothing; its code and last line."""

    def fail(*words):
        code, said = run(*words)
        assert code != 0
        assert not (tree.parent / "out").exists()
        return code, said.splitlines()[-1]

    return fail


def shrink(file, scale=2):
    pixels = images.decode(file.read_bytes())
    file.write_bytes(images.encode_png(images.resize(pixels, *images.shrunk_size(*pixels.shape[:2], scale))))


def rows_of(file):
    return pq.read_table(file).to_pylist()


def test_the_job_writes_tables_rows_and_a_figure(evaluate, tree):
    out, said = tree.parent / "out", evaluate("crop=64", "sweep=7", "optical={2: 2.1, 4: 3.75}")
    files = ["best_times", "measurements", "sweep"]
    assert sorted(file.name for file in out.iterdir()) == sorted(
        ["config.yaml", "figure.png", "table.md", *(f"{name}.parquet" for name in files)]
    )
    rows = rows_of(out / "measurements.parquet")
    four = ("generated", "hr", "bicubic", "autoencoder", "gaussian", "random")
    assert {(row["scene"], row["label"], row["method"]) for row in rows} == {
        (scene, label, method)
        for scene in ("Canon_000", "Canon_001")
        for label in "234"
        for method in (*four, *(("spline", "linear") if label == "3" else ()))
    }
    unchanged = [row for row in rows if row["method"] == "hr"]
    assert all(row["psnr_to_hr"] == float("inf") for row in unchanged)
    assert all(15 < row["psnr"] < 45 for row in unchanged)
    assert {row["scale"] for row in rows_of(out / "sweep.parquet")} == {1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0}
    best = rows_of(out / "best_times.parquet")
    assert [(row["scene"], row["level"]) for row in best] == [
        (s, level) for s in ("Canon_000", "Canon_001") for level in "234"
    ]
    text = (out / "table.md").read_text()
    titles = [line for line in text.splitlines() if line.startswith("#")]
    assert titles[1:] == ["## Fidelity", "## Baselines", "## Realism", "## Best-matching t", "## Curve"]
    mean = sum(row["psnr"] for row in unchanged if row["label"] == "2") / 2
    (line,) = (line for line in text.split("## Baselines")[0].splitlines() if line.startswith("| x2 |"))
    assert f"{mean:.2f} / " in line.split("|")[3]
    assert "an advantage" in text
    assert "| x2 | 0.333 | 0.367 |" in text
    assert "| x3 | 0.667 | — |" in text
    assert text.strip() in said
    assert "measuring: 100%" in said
    with Image.open(out / "figure.png") as figure:
        assert figure.size == (5 * (48 * 4 + 4) + 4, 2 * (16 + 2 * (48 * 4 + 4) + 4))


def test_a_model_that_draws_is_shown_beside_captured_images(evaluate, tree, tmp_path):
    small_degrader({"1": 1.0, "2": 2.0, "4": 4.0}, draws=True).save(str(tmp_path / "draws.safetensors"), {})
    evaluate(f"model={tmp_path}/draws.safetensors", "crop=64", "sweep=0", "figure=2", "baselines=[]", "draws=2")
    with Image.open(tree.parent / "out/closeups.png") as picture:
        assert picture.size == (4 * (64 * 3 + 4) + 4, 16 + 6 * (64 * 3 + 4) + 4)
    assert len(rows_of(tree.parent / "out/draws.parquet")) == 2 * 3


def test_closeups_show_a_captured_lr_level_however_far_from_x3(tree, tmp_path, monkeypatch):
    small_degrader({"1": 1.0, "4": 6.0}, draws=True).save(str(tmp_path / "draws.safetensors"), {})
    shown, closeups = [], evaluation_run.closeups
    noting = lambda *given, **more: shown.append(given[3]) or closeups(*given, **more)  # noqa: E731
    monkeypatch.setattr(evaluation_run, "closeups", noting)
    words = [f"data={tree}", f"output={tmp_path}/out", f"model={tmp_path}/draws.safetensors", "lpips=none", "draws=0"]
    words += ["levels={1: 1.0, 4: 6.0}", "crop=64", "sweep=0", "figure=1", "baselines=[]"]
    evaluation_run.evaluate(load(evaluation_run.EvaluateConfig, words))
    assert shown == ["4"]


def test_the_mean_of_a_model_that_draws_is_measured_with_spread_0(evaluate, tree, tmp_path):
    degrader, file = small_degrader({"1": 1.0, "2": 2.0, "4": 4.0}, draws=True), tmp_path / "draws.safetensors"
    degrader.save(str(file), {})
    said = evaluate(f"model={file}", "crop=64", "sweep=0", "figure=1", "baselines=[]", "spread=0")
    assert "draws.safetensors, spread 0." in said
    assert not (tree.parent / "out/draws.parquet").exists()
    assert not (tree.parent / "out/closeups.png").exists()
    row = next(row for row in rows_of(tree.parent / "out/measurements.parquet") if row["method"] == "generated")
    hr, lr = (
        images.decode((tree / row["label"] / f"{row['scene']}_{kind}.png").read_bytes())
        for kind in ("HR", f"LR{row['label']}")
    )
    hr, lr = (images.to_tensor(central(pixels[None], 64)) for pixels in (hr, lr))
    mean = images.to_tensor(images.to_pixels(degrader(hr, row["scale"], spread=0.0)))
    assert row["psnr"] == pytest.approx(float(psnr(mean, lr)), abs=1e-6)


def test_parts_can_be_left_out(evaluate, tree):
    said = evaluate("levels={1: 1.0, 2: 2.0, 3: 3.0}", "baselines=[linear]", "sweep=0", "figure=0")
    out = tree.parent / "out"
    assert sorted(file.name for file in out.iterdir()) == ["config.yaml", "measurements.parquet", "table.md"]
    text = (out / "table.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## Fidelity",
        "## Baselines",
        "## Realism",
    ]
    assert "Latent interpolation is left out: it needs captured level 4 too." in said


def test_the_blurs_are_fitted_on_other_scenes_when_asked(evaluate, tree, captured):
    shutil.copytree(captured, tree.parent / "other")
    for file in (tree.parent / "other").rglob("*_HR.png"):  # LR images that are not blurred
        shutil.copy(file, file.with_name(file.name.replace("_HR", f"_LR{file.parent.name}")))
    words = ("baselines=[gaussian]", "sweep=0", "figure=0")
    psnr = []
    for other in ((), (f"fit_data={tree.parent}/other",)):
        evaluate(*words, *other)
        rows = rows_of(tree.parent / "out/measurements.parquet")
        psnr.append(
            {name: np.mean([row["psnr"] for row in rows if row["method"] == name]) for name in ("gaussian", "hr")}
        )
    assert psnr[0]["gaussian"] > psnr[1]["gaussian"] + 1
    assert psnr[1]["gaussian"] < psnr[1]["hr"] + 1
    text = (tree.parent / "out/table.md").read_text()
    assert f"fitted per level on {tree.parent}/other." in text
    assert "advantage" not in text


def test_a_tree_of_realsr_v3_works_when_asked_and_names_its_first_file_otherwise(evaluate, refused, tree):
    for label in "234":
        for name in ("Canon_000", "Canon_001"):
            shrink(tree / f"{label}/{name}_LR{label}.png", int(label))
    code, error = refused()
    assert code == 2
    assert f"error: {tree}/2/Canon_000_LR2.png: 60 x 48 pixels, its HR image 120 x 96; " in error
    assert "or set resize_lr=true (V3)" in error
    evaluate("resize_lr=true", "sweep=0", "figure=0", "baselines=[]")
    rows = rows_of(tree.parent / "out/measurements.parquet")
    assert len(rows) == 2 * 3 * 4
    near = [row["psnr"] for row in rows if row["method"] == "bicubic"]
    assert min(near) > 25


def test_one_image_of_another_size_is_named_with_the_expected_size(refused, tree):
    shrink(tree / "3/Canon_001_LR3.png")
    code, error = refused()
    assert code == 2
    assert f"{tree}/3/Canon_001_LR3.png: 60 x 48 pixels, its HR image 120 x 96" in error


def test_a_level_that_is_not_there_is_named_with_its_first_file(refused, tree):
    for file in (tree / "3").iterdir():
        file.unlink()
    code, error = refused()
    assert code == 2
    assert "no scene has every level of ['1', '2', '3', '4'] (found 1: 2, 2: 2, 3: 0, 4: 2)" in error
    assert "expected 2/ID_HR.png and 2/ID_LR2.png; the first that is missing is 3/Canon_000_LR3.png" in error


def test_files_of_other_names_are_named(refused, tree):
    for label in "234":
        for file in (tree / label).glob("*_LR*.png"):
            file.rename(file.with_name(file.name.replace("_LR", "_x")))
    code, error = refused()
    assert code == 2
    assert "expected 2/ID_HR.png and 2/ID_LR2.png" in error
    assert "; 2/Canon_000_x2.png is not named so" in error


def test_a_scene_that_lacks_a_level_is_left_out_and_named(evaluate, tree):
    (tree / "4/Canon_001_LR4.png").unlink()
    said = evaluate("sweep=0", "figure=0", "baselines=[]")
    assert "1 scene at levels 1, 2, 3, 4 (120 x 96); 1 without level 4: Canon_001" in said
    assert {row["scene"] for row in rows_of(tree.parent / "out/measurements.parquet")} == {"Canon_000"}


def test_an_image_smaller_than_the_crop_is_named(refused, tree):
    code, error = refused("crop=100")
    assert code == 2
    assert f"{tree}/2/Canon_000_HR.png: 120 x 96 pixels, smaller than crop=100" in error


def test_a_level_beyond_the_trained_range_is_refused(refused):
    assert refused("levels={1: 1.0, 2: 2.0, 3: 4.5}") == (
        2,
        "error: scale=4.5: must lie in the trained range [1.0, 4.0]",
    )


@pytest.mark.parametrize(
    ("word", "rule"),
    [
        ("crop=10", "crop=10: must be 0 (whole images) or at least 24"),
        ("baselines=[gaussian,spine]", "baselines=['gaussian', 'spine']: must be of "),
        ("optical={5: 5.0}", "optical={'5': 5.0}: its labels must be of ['2', '3', '4']"),
        ("sweep=2", "sweep=2: must be 0 (none) or at least 3"),
        ("figure=-1", "figure=-1: must not be negative"),
    ],
)
def test_a_wrong_key_is_refused_with_its_rule(refused, word, rule):
    code, error = refused(word)
    assert code == 2
    assert rule in error
