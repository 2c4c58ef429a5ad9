import errno
import hashlib
import itertools
import json
import pickle
import re
import shutil
import socket
from copy import deepcopy
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from degflow import images, storage
from degflow.config import load
from degflow.dataset import writer
from degflow.dataset.card import read_rows
from degflow.dataset.exports import ExportConfig, export
from degflow.dataset.order import lanes_of, merged
from degflow.dataset.pairs import SynthesizedPairs, aligned_crops
from degflow.dataset.reader import FinishedDataset
from degflow.dataset.references import _is_reference, read_reference, reference_to
from degflow.storage import Place
from tests.finished import finish, save_coordinates
from tests.sources import png, rows_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(photos, model, tmp_path_factory):
    """Nine photographs, two draws each: 18 rows in three parts, HR by reference."""
    words = ["shard.images=3", "scale.per_image=2", "hr=reference"]
    return finish(photos, tmp_path_factory.mktemp("out") / "set", model, *words)


@pytest.fixture(scope="module")
def grid(model, tmp_path_factory):
    """Forty photographs of 24 x 32 coordinates, one draw each, in parts of 16, 16 and 8 rows, HR embedded."""
    folder = tmp_path_factory.mktemp("grid")
    return finish(save_coordinates(folder / "in", 40), folder / "set", model, "shard.images=16", "batch=16")


@pytest.fixture(scope="module")
def scaled(photos, model, tmp_path_factory):
    return finish(photos, tmp_path_factory.mktemp("out") / "set", model, "shard.images=3", "size=scaled")


@pytest.fixture
def copy(grid, tmp_path):
    """A copy of `grid` that a test may change."""
    return Path(shutil.copytree(grid, tmp_path / "copy"))


def names(samples):
    return [(sample["key"], sample["draw"]) for sample in samples]


def same(left, right):
    assert left.keys() == right.keys()
    return all(torch.equal(left[name], right[name]) for name in ("lr", "hr")) and all(
        left[name] == right[name] for name in ("scale", "time", "key", "draw")
    )


def identity(sample):
    return sample


@pytest.mark.parametrize("source", ["made", "grid", "scaled"])
def test_every_row_comes_once_with_its_pixels(source, photos, request):
    uri = request.getfixturevalue(source)
    rows = rows_of(Path(uri))
    samples = list(SynthesizedPairs(uri))
    assert sorted(names(samples)) == sorted(rows)
    for sample in samples:
        row = rows[sample["key"], sample["draw"]]
        assert list(sample) == ["lr", "hr", "scale", "time", "key", "draw"]
        assert (sample["scale"], sample["time"]) == (row["scale"], row["time"])
        hr = png(row["hr"]["bytes"]) if row["hr"]["bytes"] else images.decode((photos / row["key"]).read_bytes())
        for name, pixels in (("lr", png(row["lr"]["bytes"])), ("hr", hr)):
            assert sample[name].dtype == torch.float32
            assert torch.equal(sample[name], images.to_tensor(pixels))


def test_batches_collate_to_what_the_degrader_takes(grid):
    batch = next(iter(DataLoader(SynthesizedPairs(grid, crop=16), batch_size=4)))
    assert batch["lr"].shape == batch["hr"].shape == (4, 3, 16, 16)
    assert batch["lr"].dtype == batch["hr"].dtype == torch.float32
    assert batch["hr"].flatten(1).std(1).min() > 0
    assert batch["scale"].dtype == batch["time"].dtype == torch.float64
    assert len(batch["key"]) == len(batch["draw"]) == 4


@pytest.mark.parametrize(("world", "workers"), [(2, 2), (3, 0), (1, 1), (50, 0)])
def test_ranks_and_workers_share_the_rows_out_evenly(grid, world, workers):
    """Also if there are more of them than parts (4 and 3), or than rows (50 and 40)."""
    shares = []
    for rank in range(world):
        pairs = SynthesizedPairs(grid, rank=rank, world=world, shuffle=bool(workers), lanes=3)
        share = names(DataLoader(pairs, batch_size=None, num_workers=workers, collate_fn=identity))
        assert len(share) == len(pairs)
        shares.append(share)
    assert sorted(itertools.chain(*shares)) == sorted(rows_of(Path(grid)))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_rank_and_world_come_from_torch_distributed_or_the_launcher(grid, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    launched = SynthesizedPairs(grid)
    assert (launched.rank, launched.world, len(launched)) == (1, 4, 10)
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=2, world_size=3, store=FakeStore())
    try:
        joined = SynthesizedPairs(grid)
    finally:
        torch.distributed.destroy_process_group()
    assert (joined.rank, joined.world) == (2, 3)
    given = SynthesizedPairs(grid, rank=0, world=1)
    assert (given.rank, given.world) == (0, 1)


@pytest.mark.parametrize(
    "environment",
    [
        {"WORLD_SIZE": "4", "LOCAL_RANK": "2"},
        {"LOCAL_RANK": "1"},
        {"SLURM_STEP_NUM_TASKS": "8"},
        {"OMPI_COMM_WORLD_SIZE": "2"},
    ],
)
def test_a_process_that_does_not_know_its_rank_is_refused(grid, environment, monkeypatch):
    """Else it would read the rows of another one, or all."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    name, value = next(iter(environment.items()))
    with pytest.raises(ValueError, match=f"{name}={value}.*: one of several processes, but RANK and WORLD_SIZE do not"):
        SynthesizedPairs(grid)
    assert SynthesizedPairs(grid, rank=1, world=8).rank == 1


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"WORLD_SIZE": "1", "LOCAL_RANK": "0"},
        {"RANK": "0"},  # as cluster/train.sh has it
    ],
)
def test_a_process_that_is_alone_reads_all(grid, environment, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    pairs = SynthesizedPairs(grid)
    assert (pairs.rank, pairs.world) == (0, 1)


class Flaky:
    """A file whose first reads fail, as on a shared folder whose server starts again."""

    def __init__(self, file, failing):
        self.file, self.failing = file, failing

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def read(self, *size):
        if self.failing and self.file.tell() < 1000:  # not of the footer
            raise self.failing.pop()
        return self.file.read(*size)


def test_a_read_that_fails_for_a_moment_is_repeated(grid, monkeypatch):
    failing, opened = [OSError(errno.EIO, "Input/output error"), OSError(errno.ESTALE, "Stale file handle")], []
    whole, open_file = names(SynthesizedPairs(grid)), LocalFileSystem.open

    def flaky(self, path, *args, **words):
        file = open_file(self, path, *args, **words)
        if "data/part" not in path:
            return file
        opened.append(path)
        return Flaky(file, failing)

    monkeypatch.setattr(LocalFileSystem, "open", flaky)
    assert names(SynthesizedPairs(grid)) == whole
    assert not failing
    assert opened


def test_a_damaged_part_is_told_at_once_by_an_object_store_too(s3, grid, monkeypatch):
    uri = s3.uri("damaged")
    for file in Place(grid).files():
        Place(uri).write(file.key, Place(grid).read(file.key))
    part = "data/part-000001.parquet"
    whole = Place(uri).read(part)
    Place(uri).write(part, whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
    monkeypatch.setattr(storage.time, "sleep", None)  # nothing is tried again
    for read in (lambda: list(SynthesizedPairs(uri)), lambda: read_rows(Place(uri), part, ("key",))):
        with pytest.raises((OSError, pa.ArrowInvalid), match="Parquet magic bytes not found"):
            read()


def test_order_follows_from_seed_and_epoch(grid):
    stored = sorted(rows_of(Path(grid)))
    assert names(SynthesizedPairs(grid, shuffle=False)) == stored
    pairs = SynthesizedPairs(grid, buffer=8)
    first = names(pairs)
    assert names(pairs) == first == names(SynthesizedPairs(grid, buffer=8))
    assert sorted(first) == stored != first
    pairs.set_epoch(1)
    assert sorted(names(pairs)) == stored
    assert names(pairs) != first != names(SynthesizedPairs(grid, buffer=8, seed=1))
    parts = [[key for key, _ in first if int(key[:3]) // 16 == part] for part in range(3)]
    assert all(keys != sorted(keys) for keys in parts)
    orders = set()
    for epoch in range(20):
        pairs.set_epoch(epoch)
        orders.add(int(names(pairs)[0][0][:3]) // 16)
    assert orders == {0, 1, 2}  # any part may be the first


def test_the_buffer_bounds_how_far_a_row_is_moved_and_held(grid):
    order = names(SynthesizedPairs(grid, buffer=4))
    stored = list(dict.fromkeys(int(key[:3]) // 16 for key, _ in order))
    place = {
        key: n
        for n, key in enumerate(sorted(rows_of(Path(grid)), key=lambda k: (stored.index(int(k[0][:3]) // 16), k)))
    }
    assert all(place[key] <= n + 4 for n, key in enumerate(order))
    assert any(place[key] != n for n, key in enumerate(order))


def parts_of(samples):
    """The part of `grid` that each sample is from."""
    return [int(sample["key"][:3]) // 16 for sample in samples]


def test_a_batch_has_rows_of_several_parts(grid, monkeypatch):
    for epoch in range(10):
        pairs, alone = (SynthesizedPairs(grid, lanes=lanes, buffer=2) for lanes in (3, 1))
        pairs.set_epoch(epoch)
        assert len(set(parts_of(itertools.islice(pairs, 16)))) >= 2
        alone.set_epoch(epoch)
        assert len(set(parts_of(itertools.islice(alone, 6)))) == 1
    monkeypatch.setattr("degflow.dataset.pairs.ROW_GROUP_ROWS", 1)  # by default eight lanes, each of four row groups
    assert set(parts_of(itertools.islice(SynthesizedPairs(grid, buffer=1), 20))) == {0, 1, 2}


def test_each_lane_keeps_its_order_and_all_orders_of_lanes_come():
    starts = lanes_of(7, 3)
    assert starts == [0, 2, 4, 7]
    orders = {tuple(merged(starts, np.random.default_rng(seed))) for seed in range(3000)}
    assert len(orders) == 210  # 7! / (2! 2! 3!)
    for order in orders:
        assert sorted(order) == list(range(7))
        assert [n for n in order if n >= 4] == [4, 5, 6]
        assert order.index(0) < order.index(1)
    assert lanes_of(2, 8) == [0, 1, 2]
    assert lanes_of(0, 8) == [0, 0]
    assert len(merged([0, 0], np.random.default_rng(0))) == 0


def test_lanes_read_each_row_group_once_except_where_two_meet(model, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "ROW_GROUP_ROWS", 5)
    words = ["batch=10", "shard.images=10"]
    uri = finish(save_coordinates(tmp_path / "in", 40, 8, 8), tmp_path / "out", model, *words)
    read, group = [], pq.ParquetFile.read_row_group

    def noted(self, number, *arguments, **options):
        read.append(number)
        return group(self, number, *arguments, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", noted)
    pairs = SynthesizedPairs(uri, lanes=3, buffer=2)
    assert len(list(pairs)) == 40
    assert len(read) == 8 + 2
    state = pairs.state_dict() | {"position": 36}
    read.clear()
    pairs.load_state_dict(state)
    assert len(list(pairs)) == 4
    assert len(read) <= 4


def test_a_row_by_its_number_is_refused_with_what_to_use_instead(grid):
    datasets = pytest.importorskip("datasets")
    pairs = SynthesizedPairs(grid)
    for ask in (lambda: pairs[0], lambda: pairs[:2], lambda: torch.utils.data.Subset(pairs, [3])[0]):
        with pytest.raises(TypeError, match=r"no pairs\[i\].*datasets\.load_dataset") as said:
            ask()
    (data_files,) = re.findall(r"data_files='(.*)'", str(said.value))
    rows = datasets.load_dataset("parquet", data_files=data_files, split="train", streaming=True)
    assert next(iter(rows))["key"] == "000.png"


@pytest.mark.parametrize("way", [identity, deepcopy, lambda pairs: pickle.loads(pickle.dumps(pairs))])
def test_set_epoch_reaches_workers_that_are_already_running(grid, way):
    pairs = way(SynthesizedPairs(grid, crop=8))
    loader = DataLoader(pairs, batch_size=None, num_workers=2, persistent_workers=True, collate_fn=identity)
    epochs = []
    for epoch in range(2):
        pairs.set_epoch(epoch)
        epochs.append(list(loader))
    assert sorted(names(epochs[0])) == sorted(names(epochs[1]))
    assert names(epochs[0]) != names(epochs[1])
    again = {(sample["key"], sample["draw"]): sample for sample in epochs[1]}
    assert not all(same(sample, again[sample["key"], sample["draw"]]) for sample in epochs[0])


def test_repeat_goes_on_with_the_next_epoch(grid):
    endless = iter(SynthesizedPairs(grid, crop=8, repeat=True))
    for epoch in range(3):
        pairs = SynthesizedPairs(grid, crop=8)
        pairs.set_epoch(epoch)
        assert all(same(sample, next(endless)) for sample in pairs)
    assert list(SynthesizedPairs(grid, repeat=True, rank=0, world=50)) == []  # it has no row to repeat
    with pytest.raises(TypeError, match="no length, because it never ends"):
        len(DataLoader(SynthesizedPairs(grid, crop=8, repeat=True), batch_size=4))


@pytest.mark.parametrize(("words", "crop"), [({}, 9), ({"flips": True}, 24), ({"flips": True, "rotations": True}, 16)])
def test_lr_and_hr_are_cut_and_turned_alike(grid, words, crop):
    """HR pixels are coordinates: the LR crop must be the stored LR image at these coordinates."""
    rows = rows_of(Path(grid))
    corners, turned = set(), set()
    for epoch in range(3):
        pairs = SynthesizedPairs(grid, crop=crop, **words)
        pairs.set_epoch(epoch)
        for sample in pairs:
            hr, lr = images.to_pixels(sample["hr"]), images.to_pixels(sample["lr"])
            assert hr.shape == lr.shape == (crop, crop, 3)
            row, column = (hr[..., n].astype(int) // 2 for n in range(2))
            np.testing.assert_array_equal(lr, png(rows[sample["key"], 0]["lr"]["bytes"])[row, column])
            corners.add((row.min(), column.min()))
            turned.add((int(row[1, 0] - row[0, 0]), int(column[0, 1] - column[0, 0])))
    assert len(corners) > 5
    expected = {"": {(1, 1)}, "flips": {(a, b) for a in (1, -1) for b in (1, -1)}}
    expected["flips rotations"] = expected["flips"] | {(0, 0)}  # transposed
    assert turned == expected[" ".join(words)]


@pytest.mark.parametrize(
    ("height", "width", "scale"), [(96, 120, 2.0), (96, 120, 3.0), (96, 120, 2.37), (101, 87, 2.0), (95, 113, 3.361)]
)
def test_crops_of_shrunk_images_share_their_centre(height, width, scale):
    row, column = np.indices((height, width))
    hr = np.stack([2 * row, 2 * column, np.zeros_like(row)], -1).astype(np.uint8)
    lr = images.resize(hr, *images.shrunk_size(height, width, scale))
    random, exact = np.random.default_rng(0), height % scale == width % scale == 0
    starts = set()
    for _ in range(50):
        small, large = aligned_crops(lr, hr, 16, scale, random)
        side = round(16 * scale)
        assert small.shape == (16, 16, 3)
        assert large.shape == (side, side, 3)
        inner = small[4:12, 4:12, :2].mean((0, 1)) / 2  # away from the border, where the resize sees an edge
        apart = np.abs(large[..., :2].mean((0, 1)) / 2 - inner)
        assert (apart < (0.15 if exact else 0.7)).all()  # half a pixel, and the 8 bits of the coordinates
        starts.add(tuple(large[0, 0]))
        if exact:
            assert (large[0, 0] % (2 * scale) == 0).all()
    assert len(starts) > 20


def test_scaled_crops_have_their_scale(scaled):
    for sample in SynthesizedPairs(scaled, crop=12, flips=True):
        assert sample["lr"].shape == (3, 12, 12)
        side = round(12 * sample["scale"])
        assert sample["hr"].shape == (3, side, side)


def test_an_image_smaller_than_the_crop_is_continued_by_reflection(made):
    samples = {(s["key"], s["draw"]): s for s in SynthesizedPairs(made, crop=20)}
    whole = {(s["key"], s["draw"]): s for s in SynthesizedPairs(made)}
    small, full = samples["smallest.png", 1], whole["smallest.png", 1]
    for name in ("lr", "hr"):
        assert full[name].shape == (3, 8, 9)
        assert small[name].shape == (3, 20, 20)
        assert torch.equal(small[name][:, :8, :9], full[name])
        assert torch.equal(small[name][:, 8:16, 0], full[name][:, :, 0].flip(1))


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_shrunk_images_smaller_than_the_crop_are_continued_alike(scale):
    """Where both end, HR and LR have the same edge, and so the same reflection."""
    random = np.random.default_rng(0)
    hr = images.resize(random.integers(0, 256, (5, 5, 3), dtype=np.uint8), 24 * scale, 24 * scale)
    lr, large = aligned_crops(images.resize(hr, 24, 24), hr, 40, scale, random)
    assert large.shape == (40 * scale, 40 * scale, 3)
    apart = images.resize(large, 40, 40).astype(float) - lr
    inside, beyond = apart[4:20, 4:20], apart[28:, 28:]
    assert np.abs(beyond).mean() < 2 * np.abs(inside).mean() + 1


@pytest.mark.parametrize(
    "words",
    [{"buffer": 7}, {"buffer": 1000}, {"shuffle": False}, {"buffer": 1}, {"lanes": 3, "buffer": 5}],
)
def test_a_state_of_any_row_goes_on_exactly(grid, words):
    words = {"crop": 8, "flips": True, "rotations": True, "rank": 1, "world": 2} | words
    pairs = SynthesizedPairs(grid, **words)
    pairs.set_epoch(3)
    reference = list(pairs)
    assert len(reference) == 20
    states = [pairs.state_dict()]
    for position in range(21):
        resumed = SynthesizedPairs(grid, **words)
        resumed.load_state_dict(states[0] | {"position": position})
        assert resumed.state_dict()["position"] == position
        rest = []
        for sample in resumed:
            rest.append(sample)
            assert resumed.state_dict() == json.loads(json.dumps(states[0] | {"position": position + len(rest)}))
        assert len(rest) == 20 - position
        assert all(map(same, rest, reference[position:]))
    again = list(resumed)  # the iteration after a resumed one is a whole epoch again
    assert len(again) == 20
    assert all(map(same, again, reference))


def test_a_state_of_an_epoch_s_end_goes_on_with_the_next_epoch(grid):
    pairs = SynthesizedPairs(grid)
    pairs.set_epoch(2)
    reference = list(pairs)
    pairs.set_epoch(1)
    assert not all(map(same, list(pairs), reference))
    resumed = SynthesizedPairs(grid)
    resumed.load_state_dict(pairs.state_dict())
    resumed.set_epoch(2)
    rest = list(resumed)
    assert len(rest) == len(reference)
    assert all(map(same, rest, reference))


@pytest.mark.parametrize(
    "more", [{"num_workers": 0}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}]
)
def test_torchdata_goes_on_with_the_next_epoch_after_an_epoch_s_end(grid, more):
    def keys(pairs, loader, epoch):
        pairs.set_epoch(epoch)
        return [
            key + str(draw) for batch in loader for key, draw in zip(batch["key"], batch["draw"].tolist(), strict=True)
        ]

    pairs = SynthesizedPairs(grid, crop=8)
    loader = StatefulDataLoader(pairs, batch_size=3, **more)
    first, second = keys(pairs, loader, 1), keys(pairs, loader, 2)
    assert sorted(first) == sorted(second)
    assert first != second
    pairs = SynthesizedPairs(grid, crop=8)
    loader = StatefulDataLoader(pairs, batch_size=3, **more)
    assert keys(pairs, loader, 1) == first
    state = loader.state_dict()
    pairs = SynthesizedPairs(grid, crop=8)
    loader = StatefulDataLoader(pairs, batch_size=3, **more)
    loader.load_state_dict(state)
    assert keys(pairs, loader, 2) == second


@pytest.mark.parametrize("lanes", [1, 5])
def test_a_resumed_epoch_reads_only_what_is_still_to_come(grid, monkeypatch, lanes):
    read = []
    rows = FinishedDataset.rows

    def noted(self, part, wanted=None):
        for number, row in rows(self, part, wanted):
            read.append(row["key"])
            yield number, row

    monkeypatch.setattr(FinishedDataset, "rows", noted)
    pairs = SynthesizedPairs(grid, lanes=lanes, buffer=4)
    samples = iter(pairs)
    given = [next(samples)["key"] for _ in range(30)]
    assert len(read) <= 34
    state = pairs.state_dict()
    read.clear()
    resumed = SynthesizedPairs(grid, lanes=lanes, buffer=4)
    resumed.load_state_dict(state)
    assert len(list(resumed)) == len(read) == 10
    assert not set(read) & set(given)


@pytest.mark.parametrize("repeat", [False, True])
def test_a_stateful_loader_goes_on_exactly_in_mid_epoch(grid, repeat):
    def loader():
        pairs = SynthesizedPairs(grid, crop=8, flips=True, lanes=3, buffer=6, rank=0, world=2, repeat=repeat)
        pairs.set_epoch(5)
        return StatefulDataLoader(pairs, batch_size=3, num_workers=2)

    count = 20 if repeat else 8
    stop = 13 if repeat else 3
    running = loader()
    batches = iter(running)
    for _ in range(stop):
        next(batches)
    state = running.state_dict()
    rest = [batch for batch, _ in zip(batches, range(count - stop), strict=False)]
    resumed = loader()
    resumed.load_state_dict(state)
    again = [batch for batch, _ in zip(resumed, range(count - stop), strict=False)]
    assert len(again) == len(rest) == count - stop
    for left, right in zip(again, rest, strict=True):
        assert left["key"] == right["key"]
        assert torch.equal(left["lr"], right["lr"])
        assert torch.equal(left["hr"], right["hr"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"buffer": 5}, "buffer was 4, now 5"),
        ({"lanes": 2}, "lanes was None, now 2"),
        ({"crop": 16}, "crop was None, now 16"),
        ({"rank": 1, "world": 2}, "consumer was 0, now 1; consumers was 1, now 2"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(grid, changes, message):
    state = SynthesizedPairs(grid, buffer=4).state_dict()
    with pytest.raises(ValueError, match=f"the state does not fit: {message}"):
        SynthesizedPairs(grid, **({"buffer": 4} | changes)).load_state_dict(state)


def test_a_state_of_another_dataset_is_refused(grid, made):
    with pytest.raises(ValueError, match=r"parts was [0-9a-f]{64}, now [0-9a-f]{64}"):
        SynthesizedPairs(made, buffer=4).load_state_dict(SynthesizedPairs(grid, buffer=4).state_dict())


def test_rows_of_files_that_were_added_or_tried_again_come_once(photos, model, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    shutil.copy(photos / "astronaut.PNG", folder / "a.png")
    (folder / "b.png").write_bytes(b"")
    uri = finish(folder, tmp_path / "set", model, "shard.images=1")
    state = SynthesizedPairs(uri, buffer=4).state_dict()
    shutil.copy(photos / "coffee.jpg", folder / "c.jpg")
    finish(folder, uri, model, "shard.images=1")
    shutil.copy(photos / "cat.jpeg", folder / "b.png")
    finish(folder, uri, model, "shard.images=1", retry=True)
    assert sorted(names(SynthesizedPairs(uri))) == [("a.png", 0), ("b.png", 0), ("c.jpg", 0)]
    with pytest.raises(ValueError, match=r"the state does not fit: parts was"):
        SynthesizedPairs(uri, buffer=4).load_state_dict(state)


def test_an_unfinished_dataset_is_refused_unless_asked_for(copy, tmp_path):
    (copy / "_SUCCESS").unlink()
    for uri, more in ((copy, "writes it last; .*unfinished=True"), (tmp_path / "missing", "writes it last$")):
        with pytest.raises(ValueError, match=rf"^{uri}: no finished dataset \(_SUCCESS is missing\); .*{more}"):
            SynthesizedPairs(str(uri))
    with pytest.raises(ValueError, match=r"missing: no dataset \(config\.yaml is missing\)"):
        SynthesizedPairs(str(tmp_path / "missing"), unfinished=True)


def test_the_parts_of_an_unfinished_dataset_are_chosen_once(grid, copy):
    for name in ("_SUCCESS", "manifest.parquet"):
        (copy / name).unlink()
    late, damaged = copy / "data/part-000001.parquet", copy / "data/part-000007.parquet"
    data = late.read_bytes()
    late.unlink()
    damaged.write_bytes(data[:-20])
    pairs = SynthesizedPairs(str(copy), unfinished=True, verify=True)
    late.write_bytes(data)  # the run goes on
    assert pairs.parts == ["data/part-000000.parquet", "data/part-000002.parquet"]
    samples = iter(pairs)
    first = names(itertools.islice(samples, 10))
    state = pairs.state_dict()
    rest = names(samples)
    assert sorted(first + rest) == [name for name in sorted(rows_of(Path(grid))) if int(name[0][:3]) // 16 != 1]
    assert len(SynthesizedPairs(str(copy), unfinished=True)) == 40
    for uri in (str(copy), grid):  # a state goes on with the parts of its time, also when the dataset is finished
        resumed = SynthesizedPairs(uri, parts=pairs.parts)
        resumed.load_state_dict(state)
        assert names(resumed) == rest
    with pytest.raises(ValueError, match="the state does not fit: parts was"):
        SynthesizedPairs(grid).load_state_dict(state)
    with pytest.raises(ValueError, match=r"parts=data/part-000007\.parquet: no such part, or a damaged one"):
        SynthesizedPairs(str(copy), parts=["data/part-000007.parquet"])
    now = SynthesizedPairs(str(copy), unfinished=True)
    late.write_bytes(data + b"x")
    with pytest.raises(ValueError, match=r"part-000001.* bytes, but the list of parts says"):
        list(now)
    for part in (copy / "data").iterdir():
        part.unlink()
    with pytest.raises(ValueError, match=r"copy: no rows yet"):
        SynthesizedPairs(str(copy), unfinished=True)


@pytest.mark.parametrize(
    ("wrong", "right"), [("size: same", "size: scaled"), ("seed: 0", "seed: 1"), ("codec: png", "codec: webp")]
)
def test_parts_of_an_overwritten_run_are_no_part_of_an_unfinished_dataset(copy, wrong, right):
    """As `overwrite=true` leaves them for a moment: the new configuration is there, and the old parts still are."""
    (copy / "_SUCCESS").unlink()
    assert len(SynthesizedPairs(str(copy), unfinished=True)) == 40
    config = (copy / "config.yaml").read_text()
    assert config.count(f"\n{wrong}\n") == 1
    (copy / "config.yaml").write_text(config.replace(wrong, right))
    with pytest.raises(ValueError, match="copy: no rows yet"):
        SynthesizedPairs(str(copy), unfinished=True)
    (copy / "config.yaml").write_text(config)
    shutil.rmtree(copy / "plan")
    with pytest.raises(ValueError, match="copy: no rows yet"):
        SynthesizedPairs(str(copy), unfinished=True)


def test_a_part_whose_number_is_not_planned_is_left_out(copy):
    (copy / "_SUCCESS").unlink()
    shutil.copy(copy / "data/part-000001.parquet", copy / "data/part-000003.parquet")
    assert SynthesizedPairs(str(copy), unfinished=True).parts == [f"data/part-00000{n}.parquet" for n in range(3)]


def test_ranks_that_start_after_the_object_was_made_are_refused(forks, grid, tmp_path):
    script = """
import sys, torch
from degflow import SynthesizedPairs
rank, store, uri = int(sys.argv[1]), *sys.argv[2:]
early, given = SynthesizedPairs(uri), SynthesizedPairs(uri, rank=0, world=1)
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
try:
    next(iter(early))
except ValueError as error:
    print(error)
print(len(list(given)), len(list(SynthesizedPairs(uri))))
"""
    jobs = forks(script, *([rank, tmp_path / "store", grid] for rank in range(2)))
    said = [job.stdout.splitlines() for job in jobs]
    for rank, (error, counts) in enumerate(said):
        assert error.startswith(f"made as rank 0 of 1 before torch.distributed started, which says rank {rank} of 2:")
        assert counts == "40 20"


def test_ranks_agree_on_the_parts_that_rank_0_has_seen(forks, grid, copy, tmp_path):
    """Each rank lists a folder of its own, as if they had looked at different moments."""
    (copy / "_SUCCESS").unlink()
    (copy / "data/part-000001.parquet").unlink()
    script = """
import sys, torch
from degflow import SynthesizedPairs
rank, store, *uris = int(sys.argv[1]), *sys.argv[2:]
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
try:
    SynthesizedPairs(uris[2], unfinished=True)
except ValueError as error:
    print(error)
pairs = SynthesizedPairs(uris[rank], unfinished=True)
print(*pairs.parts, *(sample["key"] for sample in pairs))
"""
    jobs = forks(script, *([rank, tmp_path / "store", copy, grid, tmp_path / "missing"] for rank in range(2)))
    said = [job.stdout.splitlines() for job in jobs]
    assert said[0][0] == said[1][0] == f"{tmp_path}/missing: no dataset (config.yaml is missing)"
    shares = [lines[1].split() for lines in said]
    parts = ["data/part-000000.parquet", "data/part-000002.parquet"]
    assert [share[:2] for share in shares] == [parts, parts]
    assert sorted(shares[0][2:] + shares[1][2:]) == [f"{n:03d}.png" for n in range(40) if n // 16 != 1]


def test_ranks_that_could_not_agree_are_refused(copy, monkeypatch):
    (copy / "_SUCCESS").unlink()
    with pytest.raises(ValueError, match=r"unfinished=True, world=2: .* give all ranks the same parts="):
        SynthesizedPairs(str(copy), unfinished=True, rank=0, world=2)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"unfinished=True, world=3: "):
        SynthesizedPairs(str(copy), unfinished=True)
    assert len(SynthesizedPairs(str(copy), parts=["data/part-000002.parquet"])) == 3


def test_a_missing_part_is_named(copy):
    (copy / "data/part-000001.parquet").unlink()
    with pytest.raises(ValueError, match=r"copy/data/part-000001\.parquet: no such part"):
        list(SynthesizedPairs(str(copy)))


def test_a_part_of_another_size_is_named(copy):
    part = copy / "data/part-000002.parquet"
    part.write_bytes(part.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"part-000002\.parquet: \d+ bytes, but the manifest says \d+"):
        list(SynthesizedPairs(str(copy)))


@pytest.mark.parametrize("place", ["footer", "page", "pixels"])
def test_a_damaged_part_is_named(copy, place):
    part = copy / "data/part-000000.parquet"
    data = bytearray(part.read_bytes())
    row = pq.read_table(part).to_pylist()[0]
    footer = len(data) - int.from_bytes(data[-8:-4], "little") - 8
    at = {"footer": footer + 4, "page": 6, "pixels": data.index(row["hr"]["bytes"]) + 60}[place]
    data[at : at + 40] = bytes(40)
    part.write_bytes(data)
    differs = r"cannot be read" if place == "footer" else r"sha256 [0-9a-f]{64}, but the manifest says"
    with pytest.raises((ValueError, OSError), match=rf"part-000000\.parquet: {differs}"):
        list(SynthesizedPairs(str(copy), verify=True))
    message = r"000\.png, draw 0: damaged hr" if place == "pixels" else r"part-000000\.parquet: cannot be read"
    with pytest.raises((ValueError, OSError), match=message):
        list(SynthesizedPairs(str(copy)))


def test_verifying_gives_the_same_rows(grid):
    assert names(SynthesizedPairs(grid, verify=True)) == names(SynthesizedPairs(grid))


def test_a_referenced_source_that_is_gone_or_changed_is_named(photos, model, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("astronaut.PNG", "coffee.jpg"):
        shutil.copy(photos / name, folder / name)
    uri = finish(folder, tmp_path / "out", model, "hr=reference")
    assert len(list(SynthesizedPairs(uri))) == 2
    shutil.copy(photos / "cat.jpeg", folder / "coffee.jpg")
    with pytest.raises(ValueError, match=rf"{folder}/coffee\.jpg: changed since it was degraded"):
        list(SynthesizedPairs(uri))
    (folder / "coffee.jpg").unlink()
    with pytest.raises(ValueError, match=rf"{folder}/coffee\.jpg: no longer there"):
        list(SynthesizedPairs(uri))


def test_a_row_does_not_choose_what_is_opened(photos, model, tmp_path):
    folder, secret = tmp_path / "in", tmp_path / "secret.png"
    folder.mkdir()
    shutil.copy(photos / "astronaut.PNG", folder / "a.png")
    secret.write_bytes((folder / "a.png").read_bytes())  # even the right bytes
    uri = finish(folder, tmp_path / "out", model, "hr=reference")
    dataset, (row,) = FinishedDataset(uri), rows_of(Path(uri)).values()
    assert dataset.hr_of(row).shape == (80, 96, 3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        web = f"http://127.0.0.1:{server.getsockname()[1]}/a.png"
        paths = (str(secret), f"file://{secret}", f"{folder}/../secret.png", web, f"s3://bucket{folder}/a.png")
        for path, key in [*((path, "a.png") for path in paths), (f"{folder}/../secret.png", "../secret.png")]:
            with pytest.raises(
                ValueError, match=rf"^{re.escape(path)}: is not opened, because it is not .* below"
            ) as said:
                dataset.hr_of(row | {"key": key, "hr": {"bytes": None, "path": path}})
            assert row["hr_sha256"] not in str(said.value)
        with pytest.raises(TimeoutError):
            server.accept()


def test_no_key_leaves_the_root_but_in_object_stores_where_dots_are_a_name(s3, monkeypatch):
    inside = images.encode_png(np.zeros((9, 9, 3), np.uint8))
    digest = hashlib.sha256(inside).hexdigest()

    def read(root, key):
        row = {"key": key, "draw": 0, "hr": {"path": reference_to(Place(root), key)}, "hr_sha256": digest}
        return read_reference(row, {"input": root, "root": ""})

    fsspec.filesystem("memory").pipe_file("/dots/secret.png", inside)
    with pytest.raises(ValueError, match=r"is not opened, because it is not \.\./secret\.png below"):
        read("memory://dots/photos", "../secret.png")
    monkeypatch.setattr(storage, "PATIENCE", 0.0)
    with pytest.raises(OSError, match=r"\.\./a\.png: "):  # asked for; this server takes no such key
        read(s3.uri("dots"), "../a.png")


def test_an_export_is_no_dataset(made, tmp_path):
    export(load(ExportConfig, [f"input={made}", f"output={tmp_path}/out"]))
    with pytest.raises(ValueError, match=rf"^{tmp_path}/out: is an export, which is no dataset"):
        SynthesizedPairs(tmp_path / "out")
    assert len(SynthesizedPairs(Path(made))) == len(SynthesizedPairs(made))


def test_a_store_s_reference_may_have_another_name_of_its_scheme():
    root = Place("s3://bucket/photos")
    for path, same in {
        "s3://bucket/photos/a/b.png": True,
        "s3a://bucket/photos/a/b.png": True,
        "gs://bucket/photos/a/b.png": False,
        "s3a://other/photos/a/b.png": False,
        "bucket/photos/a/b.png": False,
        "s3a:///etc/passwd": False,
    }.items():
        assert _is_reference(path, root, "a/b.png") == same
    assert not _is_reference("s3a://a.png", Place("/photos"), "a.png")


def test_references_of_every_kind_of_input_are_read_from_anywhere(photos, model, tmp_path, monkeypatch):
    for key in ("x[1]/b/a.png", "y/c.png"):
        (tmp_path / "in" / key).parent.mkdir(parents=True)
        shutil.copy(photos / "astronaut.PNG", tmp_path / "in" / key)
    (tmp_path / "in/list.csv").write_text("key\ny/c.png\n")
    (tmp_path / "list.csv").write_text("key\nc.png\n")
    (tmp_path / "elsewhere").mkdir()
    for number, words in enumerate(("in/x[1]", "in/**/b/*.png", "in/list.csv", "list.csv root=in/y")):
        monkeypatch.chdir(tmp_path)
        photos_here, *more = words.split()
        uri = finish(photos_here, tmp_path / f"out{number}", model, "hr=reference", *more)
        assert (tmp_path / f"out{number}/preview.png").exists()
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert len(list(SynthesizedPairs(uri))) == 1


def test_references_have_any_name_and_the_runs_own_pixel_limit(photos, model, tmp_path):
    folder = tmp_path / "in"
    for key in ("a::b/c d#e%20?.png", "[x]*/zip:∕x.png", "x/..y/ünï.png"):
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photos / "astronaut.PNG", folder / key)
    uri = finish(folder, tmp_path / "out", model, "hr=reference", "max_pixels=7680")
    assert len(list(SynthesizedPairs(uri))) == 3
    config = Path(uri) / "config.yaml"
    config.write_text(config.read_text().replace("max_pixels: 7680", "max_pixels: 7679"))
    with pytest.raises(images.ImageError, match="max_pixels=7679"):
        list(SynthesizedPairs(uri))


def test_draws_of_a_photograph_share_the_bytes_of_hr(model, tmp_path):
    uri = finish(save_coordinates(tmp_path / "in", 2), tmp_path / "out", model, "scale.per_image=3")
    dataset = FinishedDataset(uri)
    rows = [row for part in dataset.parts for _, row in dataset.rows(part)]
    assert [row["draw"] for row in rows] == [0, 1, 2] * 2
    assert len({id(row["hr"]["bytes"]) for row in rows}) == len({row["key"] for row in rows}) == 2


def test_a_part_without_rows_is_passed_over(photos, model, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(b"")
    shutil.copy(photos / "astronaut.PNG", tmp_path / "in/b.png")
    uri = finish(tmp_path / "in", tmp_path / "out", model, "shard.images=1")
    assert names(SynthesizedPairs(uri)) == [("b.png", 0)]


def test_a_photograph_of_very_many_bytes_has_several_row_groups(model, photos, tmp_path, monkeypatch):
    words = ["limit=1", "scale.per_image=5"]
    usual = rows_of(Path(finish(photos, tmp_path / "usual", model, *words)))
    size = max(len(row[name]["bytes"]) for row in usual.values() for name in ("lr", "hr"))
    monkeypatch.setattr(writer, "MOST_BYTES", 4 * size)
    output = Path(finish(photos, tmp_path / "split", model, *words))
    parquet = pq.ParquetFile(output / "data/part-000000.parquet")
    groups = [parquet.metadata.row_group(n).num_rows for n in range(parquet.num_row_groups)]
    assert groups == [2, 2, 1]
    assert {key: row["hr"] for key, row in rows_of(output).items()} == {key: row["hr"] for key, row in usual.items()}
    assert sorted(names(SynthesizedPairs(str(output)))) == sorted(usual)


def test_one_row_group_is_held_at_a_time(model, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "ROW_GROUP_ROWS", 5)
    uri = finish(save_coordinates(tmp_path / "in", 20, 8, 8), tmp_path / "out", model, "batch=20")
    part = FinishedDataset(uri).parts[0]
    parquet = pq.ParquetFile(Path(uri) / part.name)
    assert parquet.num_row_groups == 4
    read, group = [], pq.ParquetFile.read_row_group

    def noted(self, number, *arguments, **options):
        read.append(number)
        return group(self, number, *arguments, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", noted)
    rows = FinishedDataset(uri).rows(part)
    for number in range(20):
        assert next(rows)[0] == number
        assert read == list(range(number // 5 + 1))
    read.clear()
    wanted = np.zeros(20, bool)
    wanted[[7, 19]] = True
    assert [number for number, _ in FinishedDataset(uri).rows(part, wanted)] == [7, 19]
    assert read == [1, 3]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"crop": 0}, "crop=0: must be None or at least 1"),
        ({"lanes": 0}, "lanes=0: must be None or at least 1"),
        ({"buffer": 0}, "buffer=0: must be None or at least 1"),
        ({"seed": -1}, "seed=-1: must not be negative"),
        ({"rank": 2, "world": 2}, "rank=2, world=2: give both"),
        ({"rank": 0}, "rank=0, world=None: give both"),
    ],
)
def test_bad_arguments_are_named(grid, words, message):
    with pytest.raises(ValueError, match=message):
        SynthesizedPairs(grid, **words)


@pytest.mark.parametrize("hr", ["embed", "reference"])
def test_object_storage_is_read_by_forked_workers_of_a_process_that_used_it(s3, photos, model, hr):
    source, output = Place(s3.uri("photos")), s3.uri("set")
    for name in ("astronaut.PNG", "coffee.jpg", "cat.jpeg", "deep/palette.png"):
        source.write(name, (photos / name).read_bytes())
    uri = finish(source.uri, output, model, "shard.images=2", f"hr={hr}")
    pairs = SynthesizedPairs(uri, verify=True)
    here = list(pairs)
    assert len(here) == 4
    ranks = [SynthesizedPairs(uri, rank=rank, world=2) for rank in range(2)]
    words = {"batch_size": None, "num_workers": 2, "multiprocessing_context": "fork", "collate_fn": identity}
    found = list(itertools.chain(*(DataLoader(pairs, **words) for pairs in ranks)))
    assert len(found) == 4
    found = {sample["key"]: sample for sample in found}
    assert all(same(found[sample["key"]], sample) for sample in here)
    place = Place(uri)
    place.delete("data/part-000001.parquet")
    with pytest.raises(ValueError, match=rf"{uri}/data/part-000001\.parquet: no such part"):
        list(pairs)


def test_a_spawned_worker_of_one_rank_reads_its_share_of_an_object_store(s3, grid, monkeypatch):
    place = Place(s3.uri("set"))
    for path in Path(grid).rglob("*"):
        if path.is_file():
            place.write(str(path.relative_to(grid)), path.read_bytes())
    shares = [names(SynthesizedPairs(place.uri, rank=rank, world=2)) for rank in range(2)]
    assert sorted(itertools.chain(*shares)) == sorted(rows_of(Path(grid)))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    pairs = SynthesizedPairs(place.uri)
    assert names(DataLoader(pairs, batch_size=None, num_workers=1, multiprocessing_context="spawn")) == shares[1]
