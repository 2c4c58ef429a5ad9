"""The codec in Ray tasks: the memory they ask for, and files that take more than their node has."""

import math

import numpy as np
import pytest
import ray
from ray._common.utils import get_system_memory
from ray._private.utils import get_used_memory

from degflow import images
from degflow.storage import Place
from degflow.synthesis import pool, tasks
from degflow.synthesis.codec import Codec, Draw, NeedsMemory
from degflow.synthesis.tasks import Tasks
from tests.hooks import HUNGRY
from tests.sources import rejects_of, rows_of
from tests.synthesis.clusters import own_ray, until
from tests.synthesis.test_pool import OnCpu, hooked, run

MB = 1 << 20


class Asking(Tasks):
    """Tasks that note what they ask for."""

    def __init__(self):
        super().__init__(0)
        self.asked = []

    def _remote(self, memory):
        self.asked.append(memory // MB)
        return super()._remote(memory)


@pytest.fixture
def flat(tmp_path):
    """A file of 16 megapixels that compress to 50 kB, and the codec of its folder."""
    (tmp_path / "flat.png").write_bytes(images.encode_png(np.zeros((4000, 4000, 3), np.uint8), 9))
    more = {"embed": True, "codec": "png", "scaled": False, "keep_gray": False}
    return Codec(str(tmp_path), images.MAX_PIXELS, **more, seed=0, model_sha256="")


def test_a_task_asks_for_what_the_header_says_and_no_more_than_a_node_has(shared_ray, flat):
    (source,) = Place(flat.root).files()
    assert flat.load(source, room=300 * MB) == NeedsMemory(20 * 4000**2 + 2 * source.size)
    tasks = Asking()
    handle = tasks.load(flat, source)
    assert handle.result().pixels.shape == (4000, 4000, 3)
    assert tasks.asked == [256, 512]
    lrs = np.zeros((1, 4000, 4000, 3), np.uint8)
    assert len(tasks.encode(flat, handle, [Draw(2.0, 0.5, 0)], lrs).result().rows) == 1
    assert tasks.asked == [256, 512, 1024]
    small = Asking()
    small._most, small._seen = 300 * MB, math.inf  # the largest node's
    assert small.load(flat, source).result().pixels.shape == (4000, 4000, 3)
    assert small.asked == [256, 300]


@ray.remote(num_cpus=0)
class Owner:
    """A process whose results are lost with it."""

    def result(self):
        return [ray.put(1)]


def is_lost(reference):
    try:
        return not ray.get(reference)
    except ray.exceptions.ObjectLostError:
        return True


def test_a_result_that_is_lost_with_its_process_is_made_again(shared_ray, monkeypatch):
    monkeypatch.setattr(tasks, "CRASHES", 1)
    owners, asked = [Owner.remote() for _ in range(2)], []
    lost = [ray.get(owner.result.remote())[0] for owner in owners]
    for owner, result in zip(owners, lost, strict=True):
        ray.kill(owner)
        until(lambda result=result: is_lost(result))
    later = iter([lost[0], ray.put("made again")])
    task = tasks._Task(lambda memory: asked.append(memory) or next(later), 7)
    assert task.result() == "made again"
    assert asked == [7, 7]
    later = iter(lost)
    with pytest.raises(ray.exceptions.ObjectLostError):
        tasks._Task(lambda memory: next(later), 7).result()


@pytest.mark.own_ray
def test_a_file_that_fills_its_node_is_a_reject_and_the_others_are_rows(photos, model, tmp_path, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("astronaut.PNG", "coffee.jpg"):
        (folder / name).write_bytes((photos / name).read_bytes())
    (folder / "hungry.png").write_bytes(HUNGRY)
    monkeypatch.setattr(pool, "ShardActor", OnCpu)  # actors with GPUs use tasks
    limits = {
        "memory_usage_threshold": (get_used_memory() + 4000 * MB) / get_system_memory(),
        "memory_monitor_refresh_ms": 50,
        "task_oom_retry_delay_base_ms": 10,
    }
    with own_ray(num_cpus=2, num_gpus=1, runtime_env=hooked("hungry_decoder"), _system_config=limits):
        run(folder, tmp_path / "out", model, "max_reject_rate=0.5")
    assert {key for key, _ in rows_of(tmp_path / "out")} == {"astronaut.PNG", "coffee.jpg"}
    rejects = rejects_of(tmp_path / "out")
    assert {key: row["stage"] for key, row in rejects.items()} == {"hungry.png": "decode"}
    assert tasks.KILLS == 5  # in the processes of this test 2: each costs a new process
    assert "2 times over: killed as its node ran out of memory" in rejects["hungry.png"]["error"]
