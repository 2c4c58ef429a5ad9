"""The pool: which node does which work, compiled networks, and a decoder that crashes."""

import errno
import os
import re
import resource
import socket
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import ray.data
import torch
from ray.data import ActorPoolStrategy

from degflow import Degrader, images
from degflow.config import Unfinished, load
from degflow.dataset.writer import ShardWriter
from degflow.synthesis import cluster, pool, reports
from degflow.synthesis.actor import ShardActor
from degflow.synthesis.run import Run, synthesize
from degflow.synthesis.settings import ActorsConfig, SynthesizeConfig
from tests import ROOT
from tests.finished import synthesize_here
from tests.hooks import DEADLY
from tests.sources import png, rejects_of, rows_of, save_model
from tests.synthesis.clusters import own_cluster, own_ray


class Watched(ShardActor):
    """An actor that makes a shard, then allocates and frees as networks do, and returns what that cost."""

    def __call__(self, batch):
        """The number of reports of the shard, and of page faults in 40 rounds of `once` after 10 others."""
        reports = sum(1 for _ in super().__call__(batch))
        for _ in range(10):
            self.once()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(40):
            self.once()
        return {"faults": [resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before], "reports": [reports]}

    def once(self):
        """Allocates eight tensors of 2 MiB, then frees them."""
        return sum(tensor[0] for tensor in [torch.ones(2**19) for _ in range(8)])


class OnCpu(ShardActor):
    """An actor on a node that only says that it has a GPU."""

    def device(self):
        return "cpu"


class Compiled(ShardActor):
    """An actor that compiles without C++ code, and leaves a file beside the output for each compiled graph."""

    def __init__(self, maker, *arguments):
        output, compile = ray.get(maker).output, Degrader.compile

        def backend(graph, inputs):
            with open(f"{output}.graphs", "a") as file:
                file.write("graph\n")
            return graph

        Degrader.compile = lambda self, **options: compile(self, backend=backend, **options)
        super().__init__(maker, *arguments)


def note(maker, text):
    with open(f"{maker.output}.notes", "a") as file:
        file.write(f"{text}\n")


class Failing(ShardActor):
    """An actor that fails as a GPU does: `fails` says when, from a shard's number and how often it was tried."""

    PAUSE, GRACE = 0.0, 1.0
    early = False  # as the actor starts, instead of amid the shard

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.call = threading.local()  # each of an actor's calls has its thread

    def __call__(self, batch):
        shard = batch.to_pylist()[0]["shard"]
        notes = Path(ray.get(self.reference).output + ".tries")
        notes.mkdir(exist_ok=True)
        tries = len(list(notes.glob(f"{shard}-*")))
        self.call.shard = shard
        self.call.fails = not self.turn.broken and self.fails(shard, tries)
        if not self.turn.broken:
            (notes / f"{shard}-{tries}-{os.getpid()}").touch()
        if self.call.fails and self.early:
            self.maker = None  # `load` again
        if not self.call.fails:
            time.sleep(0.5)  # a shard that fails has its turn first
        yield from super().__call__(batch)

    def load(self):
        maker = super().load()
        if self.early:
            self.fail_now(maker)
        degrade = maker.degrader.degrade

        def fragile(window):
            self.fail_now(maker)
            note(maker, f"{os.getpid()}")
            return degrade(window)

        maker.degrader.degrade = fragile
        return maker

    def fail_now(self, maker):
        if self.call.fails:
            self.wait(Path(f"{maker.output}.tries"))
            note(maker, f"failed{self.call.shard}")
            raise RuntimeError("CUDA error: an illegal access")

    def fails(self, shard, tries):
        raise NotImplementedError

    def wait(self, notes):
        """Wait, before a failure, for what must have happened."""


class Slow(ShardActor):
    """An actor that needs long for a shard's upload, and notes when shards are degraded and put."""

    def load(self):
        maker, finish = super().load(), ShardWriter.finish
        degrade = maker.degrader.degrade

        def degrading(window):
            note(maker, f"degrade {os.getpid()}")
            return degrade(window)

        def finishing(*arguments):
            note(maker, f"put {os.getpid()}")
            self.wait(maker)
            record = finish(*arguments)
            note(maker, f"end {os.getpid()}")
            return record

        maker.degrader.degrade, ShardWriter.finish = degrading, finishing
        return maker

    def wait(self, maker):
        time.sleep(1)


class Waiting(Slow):
    """An actor that puts nothing until another one degrades."""

    def wait(self, maker):
        end = time.monotonic() + 90
        while len(processes_in(f"{maker.output}.notes")) < 2 and time.monotonic() < end:
            time.sleep(0.1)


def processes_in(notes):
    return {line.split()[1] for line in Path(notes).read_text().splitlines()}


class Blind(ShardActor):
    """An actor whose first process has a GPU that makes no numbers."""

    PAUSE, GRACE = 0.0, 1.0

    def load(self):
        maker = super().load()
        note(maker, "load")
        if self.is_blind(len(Path(f"{maker.output}.notes").read_text().split())):
            maker.degrader.degrader.register_forward_hook(lambda module, given, lr: lr * torch.nan)
        return maker

    def is_blind(self, process):
        return process == 1


class AlwaysBlind(Blind):
    def is_blind(self, process):
        return True


class OnABadDisk(Failing):
    """An actor whose first process is on a machine with a bad disk."""

    def fail_now(self, maker):
        if self.call.fails:
            raise OSError(errno.EIO, "Input/output error", "/tmp/spool")

    def fails(self, shard, tries):
        return shard == 0 and tries == 0


class StartsLate(ShardActor):
    """An actor whose first two processes do not start, as on a machine that lacks a package."""

    def __init__(self, maker, *arguments):
        note(ray.get(maker), "start")
        if len(Path(f"{ray.get(maker).output}.notes").read_text().split()) <= 2:
            self.fail()
        super().__init__(maker, *arguments)

    def fail(self):
        raise ModuleNotFoundError("no module of this machine")


class DiesAsItStarts(StartsLate):
    """The same, as on a machine with a wrong library."""

    def fail(self):
        os._exit(1)


class Forgetful(ShardActor):
    """An actor of whose reports the records are lost."""

    def __call__(self, batch):
        yield from (report | {"record": [""]} for report in super().__call__(batch))


class FailsOnce(Failing):
    def fails(self, shard, tries):
        return shard in (0, 2) and tries == 0

    def wait(self, notes):
        """Until this process has had another shard too, as on a machine that is not busy."""
        end = time.monotonic() + 60
        while len(list(notes.glob(f"*-{os.getpid()}"))) < 2:
            assert time.monotonic() < end, "no other shard came"
            time.sleep(0.1)


class FailsAsItStarts(FailsOnce):
    early = True


class Hangs(ShardActor):
    """An actor for which a device hangs at one photograph."""

    PAUSE = 0.0

    def load(self):
        maker = super().load()
        degrade = maker.degrader.degrade

        def hanging(window):
            if window[0].loaded.key == "03.png":
                time.sleep(1.5)  # there is a report before the device hangs
            if window[0].loaded.key == "04.png":
                note(maker, f"{os.getpid()}")
                time.sleep(600)
            return degrade(window)

        maker.degrader.degrade = hanging
        return maker


class NeverMakesOne(Failing):
    def fails(self, shard, tries):
        return shard == 1


class MakesNothing(Failing):
    def fails(self, shard, tries):
        return True


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number in range(12):
        pixels = random.integers(0, 256, (24, 32, 3), np.uint8)
        (folder / f"{number:02d}.png").write_bytes(images.encode_png(pixels))
    return folder


def run(photos, output, model, *words):
    words = [f"input={photos}", f"output={output}", f"model={model}", "shard.images=3", "actors.threads=1", *words]
    synthesize(load(SynthesizeConfig, words))


def hooked(name, **variables):
    """A runtime environment whose processes call a function of tests.hooks as they start."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {"worker_process_setup_hook": f"tests.hooks.{name}", "env_vars": {"PYTHONPATH": path, **variables}}


def test_a_pool_of_compiled_networks_makes_the_same_images(shared_ray, photos, tmp_path, monkeypatch):
    model = save_model(tmp_path / "shallow.safetensors", multipliers=(1, 2), blocks=1)  # compiling takes long
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("00.png", "01.png"):
        (folder / name).write_bytes((photos / name).read_bytes())
    synthesize_here(folder, tmp_path / "plain", model)
    monkeypatch.setattr(pool, "ShardActor", Compiled)
    run(folder, tmp_path / "compiled", model, "actors.compile=true")
    assert len((tmp_path / "compiled.graphs").read_text().splitlines()) >= 3  # encoder, decoder, velocity network
    plain, found = rows_of(tmp_path / "plain"), rows_of(tmp_path / "compiled")
    assert found.keys() == plain.keys()
    for place, row in found.items():
        expected, pixels = (png(r["lr"]["bytes"]).astype(int) for r in (plain[place], row))
        assert np.abs(pixels - expected).max() <= 1


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_an_actor_pages_nothing_in_again_and_reports_less_often_than_images(shared_ray, photos, model, tmp_path):
    words = [f"input={photos}", f"output={tmp_path}", f"model={model}", "batch=1"]
    run = Run(load(SynthesizeConfig, words), Degrader.load(model))
    run.plan()
    run.claim()
    found = ray.data.from_arrow(run.state.plan.task(0, last=False, resigned=False)).map_batches(
        Watched,
        fn_constructor_args=(ray.put(run.maker()), ActorsConfig(), 0, 1, 1),
        compute=ActorPoolStrategy(size=1, max_concurrent_calls_per_actor=2, enable_true_multi_threading=True),
        batch_format="pyarrow",
        num_cpus=1,
    )
    found = found.take(1)[0]
    assert len(rows_of(tmp_path)) == 12
    assert 1 <= found["reports"] < 12
    assert found["faults"] < 640 * 256 / 2  # of 640 MiB with 256 pages each; some 5% here, 75 to 100% without


@pytest.mark.own_ray
def test_codecs_run_on_the_cpu_node_and_actors_on_the_gpu_nodes(photos, model, tmp_path, monkeypatch):
    trace, gpu = tmp_path / "trace", {"num_cpus": 1, "num_gpus": 1}
    monkeypatch.setattr(pool, "ShardActor", OnCpu)
    hook = hooked("trace", DEGFLOW_TRACE=str(trace))
    with own_cluster({"num_cpus": 8}, gpu, gpu, runtime_env=hook) as (_, (cpu, *gpus)):
        run(photos, tmp_path / "out", model, "actors.min=2", "batch=1")
    assert len(rows_of(tmp_path / "out")) == 12
    nodes: dict[str, set[str]] = {}
    for line in trace.read_text().splitlines():
        function, node = line.split()
        nodes.setdefault(function, set()).add(node)
    assert nodes["load"] == nodes["encode"] == {cpu.node_id}
    assert nodes["actor"] <= {node.node_id for node in gpus}


@pytest.mark.own_ray
def test_a_file_that_kills_its_decoder_is_a_reject_and_the_others_are_rows(photos, model, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for photo in photos.iterdir():
        (folder / photo.name).write_bytes(photo.read_bytes())
    for name in ("04b.png", "04c.png"):
        (folder / name).write_bytes(DEADLY)
    with own_ray(num_cpus=2, runtime_env=hooked("fragile_decoder")):
        run(folder, tmp_path / "out", model, "actors.max=1", "max_reject_rate=0.5")
    assert len(rows_of(tmp_path / "out")) == 12
    rejects = rejects_of(tmp_path / "out")
    assert {key: row["stage"] for key, row in rejects.items()} == {"04b.png": "decode", "04c.png": "decode"}
    assert all("its process died" in row["error"] for row in rejects.values())


@pytest.mark.parametrize(
    ("most", "room", "shards", "expected"),
    [
        (0, 2, 100, (1, 100, 2, 2)),  # a pool that may grow with its cluster
        (0, 2, 4, (1, 4, 2, 2)),
        (0, 2, 3, (1, 3, 2, 1)),  # few shards: each actor has its share
        (1, 8, 2, (1, 1, 1, 2)),
        (8, 1, 16, (1, 8, 1, 2)),
        (16, 0, 16, (1, 16, 1, 1)),
    ],
)
def test_actors_make_two_shards_at_a_time_if_there_are_enough(most, room, shards, expected):
    found = pool.Pool(ActorsConfig(max=most), 1, 1, room)._strategy(shards, pool.SHARDS_AT_ONCE)
    assert (found.min_size, found.max_size, found.initial_size, found.max_tasks_in_flight_per_actor) == expected
    assert found.max_concurrent_calls_per_actor == expected[-1]


def test_a_node_that_ray_names_a_moment_after_its_start_is_waited_for(monkeypatch):
    """On a busy machine; seen in tests/stress.py."""
    answers = [[], [{"Alive": False, "Resources": {"CPU": 2.0}}], [{"Alive": True, "Resources": {"CPU": 2.0}}]]
    monkeypatch.setattr(ray, "nodes", lambda: answers.pop(0) if len(answers) > 1 else answers[0])
    assert pool._measured(ActorsConfig(threads=1, gpus="0"), own=True).room == 2
    assert len(answers) == 1


def test_a_pool_grows_when_there_is_room(shared_ray, photos, model, tmp_path, monkeypatch):
    measured = pool._measured
    monkeypatch.setattr(pool, "_measured", lambda *words, **more: replace(measured(*words, **more), room=1))
    monkeypatch.setattr(pool, "ShardActor", Waiting)
    run(photos, tmp_path / "out", model, "shard.images=1")
    assert len(rows_of(tmp_path / "out")) == 12
    assert len(processes_in(tmp_path / "out.notes")) == 2


@pytest.mark.parametrize("shards", [2, 1])
def test_an_actor_degrades_a_shard_while_it_puts_the_one_before(
    shared_ray, photos, model, tmp_path, monkeypatch, shards
):
    monkeypatch.setattr(pool, "ShardActor", Slow)
    monkeypatch.setattr(pool, "SHARDS_AT_ONCE", shards)
    run(photos, tmp_path / "out", model, "actors.max=1")
    assert len(rows_of(tmp_path / "out")) == 12
    notes, processes = zip(*map(str.split, (tmp_path / "out.notes").read_text().splitlines()), strict=True)
    assert len(set(processes)) == 1
    text = " ".join(notes)
    assert (text == " ".join(["degrade put end"] * 4)) == (shards == 1)
    assert ("degrade degrade" in text or "put degrade" in text) == (shards == 2)


@pytest.mark.parametrize(
    ("actor", "said_of_it"),
    [
        (StartsLate, r"actors do not start on {node} \(2 times\): ModuleNotFoundError: no module of this machine"),
        (DiesAsItStarts, r"processes of actors die as they start \(2 times\)"),
    ],
)
def test_actors_that_do_not_start_are_replaced_cost_no_shard_an_attempt_and_are_named_with_their_node(
    shared_ray, photos, model, tmp_path, monkeypatch, capsys, actor, said_of_it
):
    said: list[str] = []
    monkeypatch.setattr(pool, "ShardActor", actor)
    monkeypatch.setattr(cluster, "STARTS", 2)
    monkeypatch.setattr(cluster, "FIRST_WORD", 0.2)
    monkeypatch.setattr(cluster, "NEXT_WORD", 0.2)
    monkeypatch.setattr(pool.tqdm, "write", lambda bar, line: said.append(line))
    run(photos, tmp_path / "out", model, "actors.max=1")
    assert len(rows_of(tmp_path / "out")) == 12
    assert (tmp_path / "out.notes").read_text().split() == ["start"] * 3
    [node] = ray.nodes()
    name = rf"{node['NodeManagerAddress']} \(Ray's node {node['NodeID'][:8]}\)"
    named = [line for line in said if re.search(said_of_it.replace("{node}", name), line)]
    assert len(named) == 1  # and not at each question
    assert not re.search(r"come again|attempt \d|pool of actors broke", capsys.readouterr().out)


def test_a_shard_that_one_machine_rejects_is_made_by_another(shared_ray, photos, model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pool, "ShardActor", Blind)
    run(photos, tmp_path / "out", model, "shard.images=12", "actors.max=1")
    assert len(rows_of(tmp_path / "out")) == 12
    assert rejects_of(tmp_path / "out") == {}
    assert "attempt 1 of 3: RuntimeError: 12 of 12 photographs were lost here" in capsys.readouterr().out


def test_the_last_attempt_stores_what_every_machine_rejects(shared_ray, photos, model, tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "ShardActor", AlwaysBlind)
    monkeypatch.setattr(reports, "ATTEMPTS", 2)
    run(photos, tmp_path / "out", model, "shard.images=12", "actors.max=1", "max_reject_rate=1")
    assert len(rejects_of(tmp_path / "out")) == 12
    assert (tmp_path / "out.notes").read_text().split() == ["load"] * 2


def test_a_bad_disk_and_a_pool_that_breaks_cost_an_attempt_and_not_the_run(
    shared_ray, photos, model, tmp_path, monkeypatch, capsys
):
    from_arrow, calls = ray.data.from_arrow, []

    def asserts(tables):
        calls.append(len(tables))
        if len(calls) == 1:
            raise AssertionError("as Ray Data does")
        return from_arrow(tables)

    monkeypatch.setattr(ray.data, "from_arrow", asserts)
    monkeypatch.setattr(pool, "ShardActor", OnABadDisk)
    run(photos, tmp_path / "out", model, "actors.max=1")
    assert len(rows_of(tmp_path / "out")) == 12
    said = capsys.readouterr().out
    assert said.count("the pool of actors broke: AssertionError: as Ray Data does") == 1
    assert re.search(r"shard 0 failed .*, attempt 2 of 3: OSError: \[Errno 5\] Input/output error", said)
    assert calls == [4, 4, 1]


@pytest.mark.parametrize("actor", [FailsOnce, FailsAsItStarts])
def test_a_shard_whose_actor_fails_is_made_by_another_process(
    shared_ray, photos, model, tmp_path, monkeypatch, capsys, actor
):
    synthesize_here(photos, tmp_path / "plain", model)
    monkeypatch.setattr(pool, "ShardActor", actor)
    run(photos, tmp_path / "out", model, "actors.max=1")
    assert rows_of(tmp_path / "out").keys() == rows_of(tmp_path / "plain").keys()
    assert (tmp_path / "out/_SUCCESS").exists()
    # The actor had another shard beside one of these. That one did not fail, and was made by another process too.
    assert sorted(re.findall(r"^shard (\d) failed .*, attempt (\d)", capsys.readouterr().out, re.M)) == [
        ("0", "1"),
        ("2", "1"),
    ]
    tries = sorted(file.name.split("-") for file in (tmp_path / "out.tries").iterdir())
    assert any(shard in "13" and number == "1" for shard, number, _ in tries)  # which began in a process that ended
    notes = (tmp_path / "out.notes").read_text().split()
    for failed in "02":
        first, second = (process for shard, _, process in tries if shard == failed)
        assert first != second
        assert first not in notes[notes.index(f"failed{failed}") :]


def test_a_shard_whose_last_report_is_lost_is_found_in_the_output(
    shared_ray, photos, model, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(pool, "ShardActor", Forgetful)
    monkeypatch.setattr(pool, "ROUND", 3)  # of four shards
    run(photos, tmp_path / "out", model, "actors.max=1")
    assert len(rows_of(tmp_path / "out")) == 12
    said = capsys.readouterr().out
    assert len(re.findall(r"^data/part-00000\d\.parquet: 3 rows", said, re.M)) == 4
    assert "attempt" not in said


def test_a_shard_that_always_fails_is_set_aside_and_tried_by_the_same_command(
    shared_ray, photos, model, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        patch.setattr(pool, "ShardActor", NeverMakesOne)
        patch.setattr(pool, "ROUND", 2)
        with pytest.raises(Unfinished, match=r"^1 of 4 shards were set aside .*\(shards 1\)") as failed:
            run(photos, tmp_path / "out", model, "actors.max=1")
    assert "CUDA error: an illegal access" in str(failed.value)
    assert socket.gethostname() in str(failed.value)
    said = capsys.readouterr().out
    assert said.count("attempt") == 3
    assert said.index("attempt 1") < said.index("part-000003") < said.index("attempt 2")  # after all others
    assert not (tmp_path / "out/_SUCCESS").exists()
    assert len(rows_of(tmp_path / "out")) == 9
    assert rejects_of(tmp_path / "out") == {}
    run(photos, tmp_path / "out", model, "actors.max=1")
    assert len(rows_of(tmp_path / "out")) == 12


def test_a_device_that_hangs_costs_its_process_and_one_attempt_of_its_shard(
    shared_ray, photos, model, tmp_path, monkeypatch
):
    monkeypatch.setattr(pool, "ShardActor", Hangs)
    monkeypatch.setattr(reports, "ATTEMPTS", 1)
    monkeypatch.setattr(pool, "SHARDS_AT_ONCE", 1)
    with pytest.raises(Unfinished, match=r"(?s)^1 of 4 shards were set aside .*\(shards 1\).*its device hung for 6 s"):
        run(photos, tmp_path / "out", model, "actors.timeout=6", "actors.max=1", "batch=1")
    assert len((tmp_path / "out.notes").read_text().split()) == 1
    assert len(rows_of(tmp_path / "out")) == 9


def test_a_run_in_which_every_shard_fails_ends_early(shared_ray, photos, model, tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "ShardActor", MakesNothing)
    monkeypatch.setattr(reports, "HOPELESS", 2)  # each costs a process
    with pytest.raises(Unfinished, match=r"^2 attempts failed and no shard was made") as failed:
        run(photos, tmp_path / "out", model, "shard.images=1", "actors.max=1")
    assert "an illegal access" in str(failed.value)
    assert not (tmp_path / "out/data").exists()


def test_a_run_whose_images_are_mostly_rejects_ends_early(shared_ray, model, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(1500):
        (folder / f"{number:04d}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"^(\d+) of the first \1 images were rejected; the rejects folder says why"):
        run(folder, tmp_path / "out", model, "shard.images=50", "actors.max=1")
    # The whole shards whose rejects can be read; a run that judged sooner would leave none of them.
    assert 200 <= len(rejects_of(tmp_path / "out")) < 1500
