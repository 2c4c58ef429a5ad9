"""The experiment: its plan, its cells, its tables, and a tiny one from photographs to table."""

import csv
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from degflow import config, protocol
from degflow.config import Unfinished
from degflow.evaluation import Measurement, parquet
from degflow.evaluation.draws import DrawScore
from degflow.protocol import Cell, ProtocolConfig, cells
from degflow.protocol.cells import finished, record
from degflow.protocol.checks import SCHEMAS, check
from degflow.protocol.run import run_protocol
from degflow.protocol.tables import PUBLISHED
from degflow.storage import Place
from degflow.training.stopping import Stopped
from tests import ROOT
from tests.captures import save_scenes
from tests.jobs import run_job
from tests.sources import save_model


def loaded(*words):
    return config.load(ProtocolConfig, ["output=out", *words])


@pytest.mark.parametrize(
    "words",
    [
        ("data=RealSR", "config=paper_protocol"),
        ("data=RealSR", "config=paper_protocol", "resize_lr=true", "real=[Canon,Nikon]"),
        ("data=RealSR", "config=realsr_protocol"),
        ("photographs=photos", "config=small_protocol"),
        ("photographs=photos", "config=small_protocol_ablations"),
        ("photographs=photos", "config=small_protocol_baselines"),
    ],
)
def test_every_cell_of_the_configurations_that_ship_is_one_that_its_job_accepts(words):
    planned = cells(loaded(*words))
    assert len({cell.name for cell in planned}) == len(planned)
    outputs = set()
    for cell in planned:
        settings = config.load(SCHEMAS[cell.job], cell.words)
        outputs.add(settings.output)
        for needed in re.findall(r"out/[\w/ -]+", " ".join(w for w in cell.words if not w.startswith("output="))):
            folder = needed.removesuffix("/").removesuffix("/degrader").removesuffix("/rae.safetensors")
            assert any(folder.startswith(made) for made in outputs), (cell.name, needed)
        if "resize_lr=true" in words and cell.job != "synthesize":
            trained = cell.job in ("train_rae", "train_lfm", "train_residual")
            assert (settings.scenes if trained else settings).resize_lr


@pytest.mark.parametrize("name", ["paper_protocol", "realsr_protocol"])
def test_published_numbers_stand_beside_the_rows_that_repeat_them(name):
    settings = loaded("data=R", f"config={name}")
    assert set(PUBLISHED) <= set(settings.rows)
    (degrader,) = settings.rows["generated x2..x4"]
    assert "stage2=train_lfm" in settings.degraders[degrader]


def test_the_plan_is_the_papers():
    planned = {cell.name: cell for cell in cells(loaded("data=R", "config=paper_protocol"))}
    assert [name for name in planned if name.startswith("rae")] == [
        "rae/DegFlow",
        "rae/no HR skips",
        "rae/optical scales",
    ]
    assert "rae=out/rae/DegFlow/rae.safetensors" in planned["stage2/linear path"].words
    assert planned["stage2/linear path"].words[-1] == "path=linear"
    assert "autoencoder.hr_skips=false" in planned["rae/no HR skips"].words
    assert "autoencoder.hr_skips=false" not in planned["stage2/no HR skips"].words
    assert "levels={1: 1.0, 2: 2.1, 3: 3.0, 4: 3.75}" in planned["fidelity/optical scales/Nikon"].words
    assert "input=R/Nikon/Train/2/*_HR.*" in planned["generated/DegFlow"].words
    assert [name for name in planned if name.startswith("generated")] == ["generated/DegFlow"]
    assert 'train={"Canon": "R/Canon/Train"}' in planned["sr/hat/real-x2-x4/0"].words
    assert 'levels={"2": 2.0, "4": 4.0}' in planned["sr/hat/real-x2-x4/0"].words
    assert 'train={"DegFlow": "out/generated/DegFlow"}' in planned["sr/hat/generated-x2-x4/0"].words
    assert 'test={"Canon": "R/Canon/Test", "Nikon": "R/Nikon/Test"}' in planned["sr/hat/real-x3/0"].words


def test_a_degrader_says_how_both_stages_train_and_what_synthesize_does():
    own = {
        "draws": ["residual.blocks=0", "scenes.crop=96", "spread=0.5", "solver.steps=2"],
        "published": ["stage2=train_lfm", "skips=hr", "path=linear"],
        "ready": ["model=shipped", "scale.per_image=2"],
    }
    rows = {"all": ["4", "2", *own]}
    words = [f"degraders={json.dumps(own)}", f"rows={json.dumps(rows)}", "seeds={hat: 2}", "row_words={all: [crop=32]}"]
    planned = {cell.name: cell for cell in cells(loaded("photographs=p", *words))}
    assert {name: cell.job for name, cell in planned.items() if name.startswith("stage2")} == {
        "stage2/draws": "train_residual",
        "stage2/published": "train_lfm",
    }
    assert {name for name in planned if name.startswith("rae")} == {"rae/draws", "rae/published"}
    assert planned["rae/draws"].words[-1] == "scenes.crop=96"
    assert planned["stage2/draws"].words[-2:] == ["scenes.crop=96", "residual.blocks=0"]
    assert planned["rae/published"].words[-1] == "skips=hr"
    assert planned["stage2/published"].words[-1] == "path=linear"
    assert planned["generated/draws"].words[-2:] == ["spread=0.5", "solver.steps=2"]
    assert planned["fidelity/draws/Canon"].words[-2:] == ["spread=0.5", "steps=2"]  # what its SR networks train on
    assert planned["generated/ready"].words[0] == "model=shipped"
    assert "input=out/scenes/Nikon/Train/2/*_HR.*" in planned["generated/ready"].words
    assert planned["sr/hat/all/1"].words[-1] == "crop=32"


def test_rows_of_baselines_and_other_trees_are_trained_at_their_own_levels():
    words = [
        "degraders={}",
        "baselines={random: [baseline=random], spline: [baseline=spline]}",
        "trees={far: runs/far/Train}",
        "between={a: 2.5, b: 3.5}",
        "rows={real: ['2'], all: [random, spline, far]}",
        "networks={hat: []}",
    ]
    planned = {cell.name: cell for cell in cells(loaded("data=R", *words))}
    assert [*planned] == ["baselines/random", "baselines/spline", "sr/hat/real/0", "sr/hat/all/0"]
    assert planned["baselines/random"].words == [
        "data=R/Nikon/Train",
        "output=out/baselines/random",
        'levels={"a": 2.5, "b": 3.5}',
        "baseline=random",
    ]
    assert planned["baselines/spline"].words[0] == "data=R/Canon/Train"  # it needs captured pairs of A
    sources = '{"random": "out/baselines/random", "spline": "out/baselines/spline", "far": "runs/far/Train"}'
    assert f"train={sources}" in planned["sr/hat/all/0"].words
    assert 'levels={"a": 2.5, "b": 3.5}' in planned["sr/hat/all/0"].words
    assert 'levels={"2": 2.0}' in planned["sr/hat/real/0"].words


def test_stage_1_is_trained_once_for_degraders_that_share_it():
    own = {"flow": [], "Gaussian": ["residual.blocks=0"]}
    planned = {c.name: c for c in cells(loaded("data=d", f"degraders={json.dumps(own)}", "rows={}"))}
    assert [name for name in planned if name.startswith("rae")] == ["rae/flow"]
    assert "rae=out/rae/flow/rae.safetensors" in planned["stage2/Gaussian"].words


def test_the_first_seed_of_every_network_comes_first():
    words = ["degraders={ready: [model=d.safetensors]}", "seeds={hat: 2}", "rows={real x3: ['3']}"]
    planned = cells(loaded("photographs=p", *words))
    runs = [cell.name for cell in planned if cell.name.startswith("sr")]
    assert runs == [
        f"sr/{name}/real-x3/{seed}" for name, seed in (("swinir", 0), ("hat", 0), ("mambair", 0), ("hat", 1))
    ]
    assert not [cell for cell in planned if cell.job.startswith("train_") and cell.job != "train_sr"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cameras=[Canon,Canon]"], "cameras=.*: must be two"),
        (["real=[Sony]"], "real=.*: must be of cameras=.*, not Sony"),
        (["rows={a: [Other]}"], "rows: 'a': .*must be level labels and names of degraders"),
        (["rows={real x3: ['3'], real-x3: ['3']}"], "rows: .*must differ in letters and digits"),
        (["networks={../x: []}"], "networks: '../x' must be of letters"),
        (["degraders={a: [stage2=train_sr]}"], "degraders: a: stage2=train_sr: must be stage2=train_lfm or"),
        (["degraders={a: [model=shipped, fit.steps=9]}"], "degraders: a: fit.steps=9: does nothing beside model="),
        (["row_words={b: ['noise={draws: 3}']}"], "row_words: 'b' must be one of rows="),
        (["sr=[config=paper_sr, fit.seed=7]"], "sr: fit.seed=7: the protocol itself gives each train-sr this key"),
        (["networks={hat: [test_level=2]}"], "networks: hat: test_level=2: the protocol itself"),
        (["row_words={real x3: ['train={}']}"], "row_words: real x3: train={}: the protocol itself"),
        (["seeds={edsr: 2}"], "seeds=.*: 'edsr' must be one of networks"),
        (["networks={}"], "networks={}: needs at least one entry"),
        (["between={3: 3.0}"], "between=.*: at least one level, and neither scale 1 nor the test level 3"),
        (["between={}"], "between=.*: at least one level"),
        (["baselines={draws: [baseline=random]}"], "degraders, baselines, trees: 'draws' is the name of two"),
        (
            ["trees={far: runs/far}", "rows={a: ['2', far]}"],
            "rows: 'a': .*: level 2 cannot stand beside a baseline or a tree",
        ),
    ],
)
def test_a_configuration_that_cannot_be_is_named(words, said):
    with pytest.raises(ValueError, match=said):
        loaded(*words)


@pytest.fixture
def tree(tmp_path):
    """Both cameras' Train and Test at levels 2, 3 and 4."""
    for camera in ("Canon", "Nikon"):
        for split in ("Train", "Test"):
            save_scenes(tmp_path / "tree" / camera / split, [np.zeros((48, 48, 3), np.uint8)], ("2", "3", "4"))
    return tmp_path / "tree"


def experiment(tmp_path, tree, **changes):
    keys = {
        "data": tree,
        "degraders": "{draws: [model=shipped], ours: [fit.steps=9]}",
        "networks": "{rcan: [network.name=rcan]}",
        "evaluate": "[lpips=none, 'levels={1: 1.0, 2: 2.0, 3: 3.0}']",
        "sr": "[test_lpips=none]",
    }
    words = [f"{key}={value}" for key, value in (keys | changes).items()]
    return config.load(ProtocolConfig, [f"output={tmp_path / 'out'}", *words])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"networks": "{rcan: [network.nam=rcan]}"},
            "sr/rcan/real-x3/0: train_sr: network.nam: .*Did you mean: 'name'",
        ),
        ({"evaluate": "[lpips=none, levls=3]"}, "fidelity/draws/Canon: evaluate: levls: "),
        (
            {"evaluate": "[lpips=none]"},
            "fidelity/draws/Canon: evaluate: data=.*Canon/Test: no scene has every level of",
        ),
        ({"sr": "['test.t=nowhere', test_lpips=none]"}, "sr/rcan/real-x3/0: train_sr: .*nowhere"),
        (
            {"networks": "{hat: [network.name=hat, network.hat.width=7]}"},
            "sr/hat/real-x3/0: train_sr: hat.width=7: must be a multiple",
        ),
        (
            {"baselines": "{noise: [data=nowhere]}", "rows": "{a: [noise]}"},
            "baselines/noise: baseline_scenes: .*nowhere",
        ),
        ({"cameras": "[Canon, Sony]"}, "fidelity/draws/Sony: evaluate: .*Sony/Test"),
        ({"trees": "{far: nowhere}", "rows": "{a: [far]}"}, "sr/rcan/a/0: train_sr: .*nowhere"),
        ({"degraders": "{draws: [model=none.safetensors]}"}, "none.safetensors"),
        ({"synthesize": "[scale.high=5]"}, r"generated/draws: synthesize: scale.high=5: must lie in \[1, 4\]"),
        (
            {"degraders": "{draws: ['scenes.levels={1: 1.0, 2: 2.0, 4: 2.5}']}"},
            r"fidelity/draws/Canon: evaluate: levels: 3=3: must lie in \[1, 2.5\]",
        ),
        ({"sr": "[test_lpips_weights=none.pth]"}, "sr/rcan/real-x3/0: train_sr: .*none.pth"),
        (
            {"degraders": "{draws: [validation_lpips=alex, validation_lpips_weights=none.pth]}"},
            "train_residual: .*none.pth",
        ),
    ],
)
def test_what_would_end_a_later_cell_is_told_before_the_first_one(changes, said, tree, tmp_path):
    with pytest.raises((ValueError, OSError), match=said):
        run_protocol(experiment(tmp_path, tree, **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["swinir", "hat", "mambair", "liif"])
def test_networks_of_the_paper_s_size_can_be(name, tree, tmp_path):
    settings = experiment(tmp_path, tree, networks=f"{{a: [network.name={name}]}}")
    check(planned := [cell for cell in cells(settings) if cell.name.startswith("sr/")], settings.output)
    assert {f"network.name={name}" in cell.words for cell in planned} == {True}


def test_photographs_to_degrade_that_are_missing_are_told_before_the_first_cell(tree, tmp_path):
    shutil.rmtree(tree / "Nikon/Train")
    with pytest.raises(ValueError, match=r"generated/draws: synthesize: input=.*Nikon/Train/2/\*_HR\.\*: no file "):
        run_protocol(experiment(tmp_path, tree))
    assert not (tmp_path / "out").exists()


def test_a_cell_that_was_finished_with_other_words_is_told_before_the_others_run(tree, tmp_path):
    settings = experiment(tmp_path, tree)
    last, place = cells(settings)[-1], Place(settings.output)
    place.write(f"cells/{last.name}.json", json.dumps({"job": last.job, "words": ["other"]}).encode())
    with pytest.raises(ValueError, match="finished with another"):
        run_protocol(settings)
    assert [file.name for file in (tmp_path / "out/cells").rglob("*") if file.is_file()] == ["0.json"]


def test_a_cell_whose_files_or_earlier_cells_have_changed_is_not_finished(place, tmp_path):
    keys, model = tmp_path / "keys.yaml", tmp_path / "model.safetensors"
    keys.write_text("fit: {steps: 10}")
    model.write_bytes(b"1")
    words = [f"config={keys}", f"model={model}", f"rae={place.uri}/rae/a/rae.safetensors", f"data={place.uri}/scenes"]
    cell = Cell("stage2/a", "train_x", [*words, f"output={place.uri}/stage2/a"])
    for name in ("rae/a", "rae/ab", "scenes"):
        place.write(f"cells/{name}.json", b"{}")
    place.write("cells/stage2/a.json", json.dumps(record(cell, place)).encode())
    assert finished(cell, place)
    place.write("cells/scenes.json", b'{"seconds": 2}')  # the same again
    assert finished(cell, place)
    assert not finished(cell._replace(name="stage2/b"), place)
    for change, undo, named in (
        (lambda: keys.write_text("fit: {steps: 99}"), lambda: keys.write_text("fit: {steps: 10}"), "config="),
        (lambda: model.write_bytes(b"2"), lambda: model.write_bytes(b"1"), "model="),
        *(
            (lambda n=n: place.write(n, b'{"job": "other"}'), lambda n=n: place.write(n, b"{}"), n)
            for n in ("cells/rae/a.json", "cells/scenes.json")
        ),
    ):
        change()
        with pytest.raises(ValueError, match=rf"stage2/a\.json: finished with another {named}"):
            finished(cell, place)
        undo()
        assert finished(cell, place)
    place.write("cells/rae/ab.json", b'{"job": "other"}')  # which it does not read
    assert finished(cell, place)


def test_what_earlier_cells_make_is_not_looked_for(tree, tmp_path):
    made = tmp_path / "made"  # by synthesize
    made.mkdir()
    (made / "_SUCCESS").touch()
    rows = "{real x3: ['3'], ours: [ours], made: [made]}"
    settings = experiment(tmp_path, tree, trees=f"{{made: {made}}}", rows=rows)
    check(cells(settings), settings.output)
    (made / "_SUCCESS").unlink()
    with pytest.raises(ValueError, match="made"):  # it is looked at
        check(cells(settings), settings.output)


@pytest.fixture
def place(tmp_path):
    return Place(str(tmp_path / "out"))


def script(tmp_path, text):
    """A stand-in for a training: the launch command that runs it in the training's place."""
    (tmp_path / "train_x.py").write_text(text)
    return [sys.executable, str(tmp_path / "train_x.py")]


def test_a_cell_leaves_its_log_and_is_done_once(tmp_path, place):
    launch, cell = (
        script(tmp_path, "import sys\nprint('words', sys.argv[1:])"),
        Cell("a/b c", "train_x", [f"x={place.uri}/y"]),
    )
    assert not protocol.finished(cell, place)
    protocol.perform(cell, place, launch)
    assert protocol.finished(cell, place)
    assert f"words ['-m', 'degflow', 'train-x', 'x={place.uri}/y']" in (tmp_path / "out/cells/a/b c.log").read_text()
    os.rename(tmp_path / "out", tmp_path / "moved")
    moved = Place(str(tmp_path / "moved"))
    assert protocol.finished(cell._replace(words=[f"x={moved.uri}/y"]), moved)
    with pytest.raises(ValueError, match=r"a/b c.json: finished with another x=OUTPUT/y; use the same"):
        protocol.finished(cell._replace(words=["x=other"]), moved)


def test_trainings_are_started_as_asked_and_other_commands_by_this_python(tmp_path, place, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    protocol.perform(Cell("a", "train_rae", ["--help", "skips=optics"]), place, launch)
    protocol.perform(Cell("b", "simulate_scenes", ["--help"]), place, launch)
    log = (tmp_path / "out/cells/a.log").read_text()
    assert "--num_processes 1 -m degflow train-rae --help skips=optics\n" in log
    assert "  skips=optics\n" in log
    log = (tmp_path / "out/cells/b.log").read_text()
    assert log.startswith(f"$ {sys.executable} -m degflow simulate-scenes --help\n")
    assert "\nPhotographs -> RealSR-like scene folders" in log


@pytest.mark.parametrize(("code", "error"), [(1, Unfinished), (2, ValueError)])
def test_a_failed_cell_is_told_with_its_last_words_and_is_not_done(code, error, tmp_path, place):
    text = f"import sys\nprint('before')\nprint('error: no such file', file=sys.stderr)\nsys.exit({code})"
    launch, cell = script(tmp_path, text), Cell("a", "train_x", [])
    said = rf"a: train_x ended with exit code {code}: error: no such file \(whole log: .*a.log"
    with pytest.raises(error, match=said):
        protocol.perform(cell, place, launch)
    assert not protocol.finished(cell, place)


WAITING = """
import signal, sys, time
def end(number, frame):
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(60)
"""


def test_sigterm_reaches_the_job_which_may_save(tmp_path, place):
    launch, log = script(tmp_path, WAITING), tmp_path / "out/cells/a.log"

    def stop():
        while "ready" not in (log.read_text() if log.exists() else ""):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as stopped:
        protocol.perform(Cell("a", "train_x", []), place, launch)
    thread.join()
    assert stopped.value.code == 75
    assert "saved" in log.read_text()
    assert signal.getsignal(signal.SIGTERM) is before
    assert not place.exists("cells/a.json")


def result(place, name, scores):
    """A finished SR cell whose two cameras have these (PSNR, SSIM, LPIPS), and an LR image of 20 dB."""
    lines = ["tree,scene,image,psnr,ssim,lpips"]
    for camera, score in scores.items():
        for scene, shift in (("s1", -1.0), ("s2", 1.0)):
            lines.append(f"{camera},{scene},restored,{score[0] + shift},{score[1]},{score[2]}")
            lines.append(f"{camera},{scene},LR,20,0.5,nan")
    place.write(f"{name}/measurements.csv", "\n".join(lines).encode())
    place.write(f"cells/{name}.json", b"{}")


def test_the_tables_hold_means_spread_and_the_published_numbers(place):
    settings = config.load(ProtocolConfig, [f"output={place.uri}", "photographs=p", "seeds={hat: 2}"])
    protocol.write_tables(settings, place)
    assert "| real x3 | – | 30.69 / 0.8647 / 0.3217 | – | 30.71" in place.read("table.md").decode()
    result(place, "sr/hat/real-x2-x4/0", {"Canon": (27, 0.7, 0.3), "Nikon": (29, 0.8, 0.4)})
    result(place, "sr/hat/generated-x2-x4-draws/0", {"Canon": (28, 0.7, 0.3), "Nikon": (30, 0.8, 0.4)})
    result(place, "sr/hat/real-x2-x4/1", {"Canon": (28, 0.7, 0.3), "Nikon": (30, 0.8, 0.4)})
    result(place, "sr/hat/generated-x2-x4-draws/1", {"Canon": (28.5, 0.7, 0.3), "Nikon": (30.5, 0.8, 0.4)})
    place.write("cells/fidelity/draws/Canon.json", b"{}")
    scored = [
        Measurement(scene, label, float(label), method, psnr, 0.5, 0.25, *[math.nan] * 7)
        for label, method, psnr in (("2", "generated", 30), ("2", "hr", 20), ("3", "generated", 25))
        for scene, psnr in (("s1", psnr - 1), ("s2", psnr + 1))
    ]
    place.write("fidelity/draws/Canon/measurements.parquet", parquet(scored))
    drawn = [
        DrawScore(**dict.fromkeys(DrawScore._fields, 0.0) | {"scene": scene, "label": label, "energy": energy})
        for label, energies in (("2", (1.0, 1.5)), ("3", (2.0, 2.5)))
        for scene, energy in zip(("s1", "s2"), energies, strict=True)
    ]
    place.write("fidelity/draws/Canon/draws.parquet", parquet(drawn))
    protocol.write_tables(settings, place)
    text = place.read("table.md").decode()
    assert "lower is better.\n\n| degrader | x2 | x3 |\n|---|---|---|\n| draws | 1.25 | 2.25 |" in text
    assert "simulated cameras, not RealSR" in text
    assert "| (LR as it is) | 20.00 / 0.5000 |" in text
    sd = np.std([28, 29], ddof=1)
    assert (
        f"| real x2, x4 | – | 30.23 / 0.8597 / 0.3255 | 28.50 ± {sd:.2f} / 0.7500 ± 0.0000 / 0.3500 ± 0.0000 (2 seeds)"
        in text
    )
    assert "| 29.25 ± 0.35 / 0.7500" in text
    assert f"| generated x2..x4, draws over real x2, x4 | – | +0.75 ± {np.std([1, 0.5], ddof=1):.2f} | – |" in text
    assert "| draws | 30.00 / 0.5000 / 0.2500 | 25.00 / 0.5000 / 0.2500 |" in text
    rows = list(csv.DictReader(place.read("results.csv").decode().splitlines()))
    assert len(rows) == 4 * 2 * 2


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    data, folder = pytest.importorskip("skimage.data"), tmp_path_factory.mktemp("photos")
    for n, photo in enumerate((data.astronaut(), data.coffee(), data.chelsea(), data.rocket())):
        Image.fromarray(photo[100:164, 150:222]).save(folder / f"{n}.png")
    return folder


def test_a_tiny_experiment_ends_in_a_table_and_runs_once(photographs, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rcan = ["network.name=rcan", "network.rcan.width=8", "network.rcan.groups=1", "network.rcan.blocks=1"]
    tiny = ["network.rcan.squeeze=4", "crop=32", "fit.steps=2", "fit.batch=2", "fit.workers=0", "test_lpips=none"]
    keys = {
        "photographs": photographs,
        "output": tmp_path / "out",
        "degraders": json.dumps({"tiny": [f"model={save_model(tmp_path / 'model.safetensors')}"]}),
        "simulate": json.dumps(["test_fraction=0.5", "scales={2: 2.0, 3: 3.0, 4: 4.0}"]),
        "evaluate": json.dumps(["lpips=none", "sweep=0", "figure=0", "baselines=[]", "levels={1: 1.0, 3: 3.0}"]),
        "synthesize": json.dumps(["scale.low=2", "scale.high=4", "actors.max=1", "actors.threads=1"]),
        "rows": "{real x3: ['3'], 'generated x2..x4': [tiny]}",
        "networks": json.dumps({"rcan": rcan}),
        "sr": json.dumps(tiny),
    }
    code, said = run_job("protocol", **keys)
    assert code == 0, said
    assert re.findall(r"^\d of \d: (.*): \d+ s$", said, re.M) == [
        "scenes",
        *(f"fidelity/tiny/{camera}" for camera in ("Canon", "Nikon")),
        "generated/tiny",
        "sr/rcan/real-x3/0",
        "sr/rcan/generated-x2-x4/0",
    ]
    table = (tmp_path / "out/table.md").read_text()
    assert re.search(r"^\| real x3 \| \d\d\.\d\d / 0\.\d{4} \| – \|$", table, re.M)
    assert re.search(r"^\| generated x2\.\.x4 \| \d\d\.\d\d / 0\.\d{4} \| – \|$", table, re.M)
    assert re.search(r"^\| tiny \| \d+\.\d\d / ", table, re.M)
    rows = list(csv.DictReader((tmp_path / "out/results.csv").open()))
    assert {(row["row"], row["camera"]) for row in rows} == {
        (r, c) for r in ("real x3", "generated x2..x4") for c in ("Canon", "Nikon")
    }
    before = {
        file: file.stat().st_mtime_ns
        for file in (tmp_path / "out").rglob("*")
        if file.suffix in (".log", ".safetensors")
    }
    code, said = run_job("protocol", **keys)
    assert code == 0
    assert not re.search(r"^\d of \d", said, re.M)
    assert before == {file: file.stat().st_mtime_ns for file in before}
    others = ["fit.workers=1", "memory=9", f"cache={tmp_path}/cache"]  # they decide nothing
    code, said = run_job("protocol", **keys | {"sr": json.dumps([*tiny, *others])})
    assert code == 0
    assert before == {file: file.stat().st_mtime_ns for file in before}
    code, said = run_job("protocol", **keys | {"sr": json.dumps([*tiny, "fit.learning_rate=9"])})
    assert code == 2
    assert "real-x3/0.json: finished with another fit.learning_rate=9" in said
