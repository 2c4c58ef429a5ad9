"""What a driver makes of the parts that it finds: of its own run, of an overwritten one, of another driver's plan."""

import shutil

import pyarrow.parquet as pq
import pytest

from degflow.config import Unfinished, load
from degflow.dataset.layout import REJECT, Reject
from degflow.degrader import Degrader
from degflow.storage import Place
from degflow.synthesis import run as module
from degflow.synthesis.codec import Codec, Threads
from degflow.synthesis.run import Run
from degflow.synthesis.settings import SynthesizeConfig
from degflow.synthesis.shard import Turn
from tests.finished import Here, pool_here, save_coordinates, synthesize_here
from tests.sources import rejects_of, rows_of

pytestmark = pytest.mark.usefixtures("one_thread")
TWO = ("limit=4", "shard.images=2")


def open_run(photos, output, model, *words):
    words = [f"input={photos}", f"output={output}", f"model={model}", *TWO, *words]
    return Run(load(SynthesizeConfig, words), Degrader.load(model))


def claimed(photos, output, model, *words):
    """A run whose plan is written."""
    run = open_run(photos, output, model, *words)
    run.plan()
    run.claim()
    return run


def put(run, number, sources=None):
    """Make one shard, as an actor of the run does."""
    return list(run.maker().make(number, sources or run.state.plan[number], Threads(1), Turn()))


def parts_of(output):
    return {path.name: path.read_bytes() for path in sorted((output / "data").iterdir())}


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    monkeypatch.setattr(module, "pool_of", pool_here)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Seven photographs that take little time."""
    return save_coordinates(tmp_path_factory.mktemp("photos"), 7, 16, 16)


@pytest.fixture(scope="module")
def finished(photos, model, tmp_path_factory):
    """A dataset of two shards."""
    output = tmp_path_factory.mktemp("finished")
    synthesize_here(photos, output, model, *TWO)
    return output


@pytest.fixture(scope="module")
def others(photos, model, tmp_path_factory):
    """A part of another recipe."""
    output = tmp_path_factory.mktemp("others")
    put(claimed(photos, output, model, "seed=9"), 0)
    return output / "data/part-000000.parquet"


def test_foreign_parts_are_deleted_when_an_unfinished_output_is_claimed(photos, model, others, tmp_path, capsys):
    run = claimed(photos, tmp_path, model)
    put(run, 0)
    kept = parts_of(tmp_path)
    for number in (1, 7):
        shutil.copy(others, tmp_path / f"data/part-{number:06d}.parquet")
    synthesize_here(photos, tmp_path, model, *TWO)
    said = capsys.readouterr().out
    for number in (1, 7):
        assert f"data/part-{number:06d}.parquet: damaged, or no part of this run: deleted" in said
    assert "2 shards, 1 of them done" in said
    assert parts_of(tmp_path).items() > kept.items()
    assert list(parts_of(tmp_path)) == ["part-000000.parquet", "part-000001.parquet"]
    assert {row["seed"] for row in rows_of(tmp_path).values()} == {0}
    assert len(rows_of(tmp_path)) == 4


@pytest.mark.parametrize(("number", "word"), [(1, "extend=true"), (7, "batch=1")])
def test_no_part_of_a_finished_dataset_is_deleted(photos, model, finished, others, tmp_path, number, word):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    shutil.copy(others, tmp_path / f"data/part-{number:06d}.parquet")
    before = parts_of(tmp_path)
    reason = rf"is finished, but .*: data/part-00000{number}\.parquet; .* delete _SUCCESS"
    with pytest.raises(ValueError, match=reason):
        synthesize_here(photos, tmp_path, model, *TWO, word, "limit=5")
    assert (parts_of(tmp_path), (tmp_path / "_SUCCESS").exists()) == (before, True)
    (tmp_path / "_SUCCESS").unlink()
    synthesize_here(photos, tmp_path, model, *TWO)
    assert len(rows_of(tmp_path)) == 4


def test_a_finished_dataset_is_not_finished_while_a_missing_part_is_made(photos, model, finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (tmp_path / "data/part-000001.parquet").unlink()
    run = claimed(photos, tmp_path, model)
    assert not (tmp_path / "_SUCCESS").exists()
    run.make()
    assert run.finish()
    assert len(rows_of(tmp_path)) == 4


def test_a_late_writer_of_an_overwritten_run_harms_no_other_shard(photos, model, tmp_path, capsys, monkeypatch):
    """It looked at the configuration before the new one was stored, and puts two shards after the deletion."""
    late = claimed(photos, tmp_path, model, "seed=9", "limit=6")
    run = claimed(photos, tmp_path, model, "overwrite=true")
    with monkeypatch.context() as patch:
        patch.setattr(type(late.recipe), "is_stored_in", lambda recipe, output: True)
        for number in (1, 2):
            put(late, number)
    put(run, 0)
    with pytest.raises(Unfinished, match=r"part-000001\.parquet: another run writes into this output.*another recipe"):
        put(run, 1)
    with pytest.raises(OSError, match="another run has overwritten it"):
        late.finish()
    capsys.readouterr()
    synthesize_here(photos, tmp_path, model, *TWO)
    assert capsys.readouterr().out.count(": deleted") == 2
    assert list(parts_of(tmp_path)) == ["part-000000.parquet", "part-000001.parquet"]
    assert {row["seed"] for row in rows_of(tmp_path).values()} == {0}


def test_a_part_that_comes_late_is_gone_before_the_dataset_is_finished(photos, model, others, tmp_path, capsys):
    run = claimed(photos, tmp_path, model)
    run.make()
    shutil.copy(others, tmp_path / "data/part-000002.parquet")
    assert run.finish()
    assert "data/part-000002.parquet: damaged, or no part of this run: deleted" in capsys.readouterr().out
    assert list(parts_of(tmp_path)) == ["part-000000.parquet", "part-000001.parquet"]


def test_a_foreign_part_that_another_driver_has_replaced_is_kept(photos, model, others, tmp_path):
    run, other = (claimed(photos, tmp_path, model) for _ in range(2))
    (tmp_path / "data").mkdir()
    shutil.copy(others, tmp_path / "data/part-000000.parquet")
    run.state.read()
    other.state.read()
    other.state.sweep()
    put(other, 0)
    kept = parts_of(tmp_path)
    run.state.sweep()
    assert parts_of(tmp_path) == kept
    assert run.state.pending() == [1]


class Interrupted(Place):
    """A place where another driver acts between the first listing of files and the second."""

    def files(self, name=""):
        found = super().files(name)
        act, self.act = self.act, lambda: None
        act()
        return found


def test_a_part_of_a_plan_that_another_driver_has_just_extended_is_not_foreign(photos, model, finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    run = open_run(photos, tmp_path, model)
    run.plan()
    run.state.output = Interrupted(str(tmp_path))

    def extend():
        put(claimed(photos, tmp_path, model, "limit=6", "extend=true"), 2)

    run.state.output.act = extend
    run.state.read()
    assert run.state.foreign == []
    assert (len(run.state.plan), run.state.pending()) == (3, [2])  # it was listed before, so it is looked at later
    run.state.read()
    assert run.state.pending() == []


def test_a_driver_of_an_overwritten_run_does_not_finish_it(photos, model, tmp_path):
    run = claimed(photos, tmp_path, model)
    run.make()
    other = claimed(photos, tmp_path, model, "overwrite=true", "limit=3")
    for _ in range(2):
        with pytest.raises(OSError, match="another run has overwritten it"):
            run.finish()
        other.make()
    assert other.finish()
    assert len(rows_of(tmp_path)) == 3


def test_what_an_interrupted_overwriting_leaves_is_no_part_of_the_new_run(photos, model, tmp_path, monkeypatch):
    synthesize_here(photos, tmp_path, model, *TWO, "limit=6", "seed=9")
    delete, done = Place.delete, []

    def stopping(place, name):
        if name.startswith("data/"):
            raise KeyboardInterrupt
        done.append(name)
        delete(place, name)

    monkeypatch.setattr(Place, "delete", stopping)
    with pytest.raises(KeyboardInterrupt):
        synthesize_here(photos, tmp_path, model, *TWO, "overwrite=true")
    assert done[:2] == ["_SUCCESS", "plan/part-000000.parquet"]
    monkeypatch.setattr(Place, "delete", delete)
    assert list(parts_of(tmp_path)) == [f"part-00000{n}.parquet" for n in range(3)]
    synthesize_here(photos, tmp_path, model, *TWO)
    assert list(parts_of(tmp_path)) == [f"part-00000{n}.parquet" for n in range(2)]
    assert {row["seed"] for row in rows_of(tmp_path).values()} == {0}


def set_one_aside(pool, maker, plan, pending, price):
    for number in pending:
        if number != 1:
            list(maker.make(number, plan[number], Threads(1), Turn()))
    raise ValueError("1 of 3 shards were set aside")


def test_the_rejects_are_in_one_file_after_every_end_of_a_run(photos, model, tmp_path, monkeypatch):
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    good = (photos / "000.png").read_bytes()
    for name in "abcdef":
        (folder / f"{name}.png").write_bytes(good if name in "ad" else b"")
    words = ["limit=0", "shard.images=2", "max_reject_rate=1"]

    def rejected():
        assert [path.name for path in (output / "rejects").iterdir()] == ["part-000000.parquet"]
        assert pq.read_schema(output / "rejects/part-000000.parquet") == REJECT
        return [key.removesuffix(".png") for key in rejects_of(output)]

    with monkeypatch.context() as patch:
        patch.setattr(Here, "make", set_one_aside)
        with pytest.raises(ValueError, match="set aside"):
            synthesize_here(folder, output, model, *words)
    assert rejected() == ["b", "e", "f"]
    synthesize_here(folder, output, model, *words)
    assert rejected() == ["b", "c", "e", "f"]
    for name in "bf":
        (folder / f"{name}.png").write_bytes(good)
    synthesize_here(folder, output, model, *words, "retry_rejects=true")
    assert rejected() == ["c", "e"]
    for name in "ce":
        (folder / f"{name}.png").write_bytes(good)
    synthesize_here(folder, output, model, *words, "retry_rejects=true")
    assert rejected() == []
    assert len(rows_of(output)) == 6


def test_a_lost_shard_that_is_made_again_leaves_a_photograph_to_the_newer_shard(model, tmp_path, monkeypatch):
    """`001.png` was rejected by shard 0 and made by shard 1; now shard 0 is lost, and could make it as well."""
    photos, output = save_coordinates(tmp_path / "in", 3), tmp_path / "out"
    words, load = ["shard.images=3", "max_reject_rate=1"], Codec.load

    def unread(codec, source, *arguments):
        return Reject(source.key, "read", "no") if source.key == "001.png" else load(codec, source, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Codec, "load", unread)
        synthesize_here(photos, output, model, *words)
    synthesize_here(photos, output, model, *words, "retry_rejects=true")
    (output / "data/part-000000.parquet").unlink()
    synthesize_here(photos, output, model, *words)
    parts = [pq.read_table(path).to_pylist() for path in sorted(output.glob("data/*.parquet"))]
    assert [[row["key"] for row in rows] for rows in parts] == [["000.png", "002.png"], ["001.png"]]
    assert (output / "_SUCCESS").exists()
    assert rejects_of(output) == {}
