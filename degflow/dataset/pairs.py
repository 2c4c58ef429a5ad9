"""A finished dataset as a PyTorch dataset of (LR, HR) pairs.

1. An epoch is one sequence of rows: the parts in an order drawn from (seed, epoch), their rows as stored. Every loader
   worker of every rank reads one contiguous slice of it. The slices share no row, leave none out, and differ in length
   by one row at most, whatever the number of parts.
2. A slice is read at several places side by side, so rows of several parts meet in a buffer of limited size, which
   shuffles them. All this works on row numbers (`order`). So a resumed epoch repeats the shuffling without reading, and
   then reads only the rows that are still to come.
3. Crop, flips and rotation of a row depend on (seed, epoch, key, draw) alone, not on the worker.
"""

import hashlib
import itertools
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from degflow import images
from degflow.dataset.epoch import SharedEpoch
from degflow.dataset.order import lanes_of, merged, shuffled, slice_of
from degflow.dataset.ranks import agreed_parts, check_rank, processes
from degflow.dataset.reader import FinishedDataset, StoredDataset
from degflow.dataset.writer import ROW_GROUP_BYTES, ROW_GROUP_ROWS

_BUFFER_BYTES, _BUFFER_ROWS = 256 << 20, 1024
_LANES, _LANE_GROUPS = 8, 4  # by default: the most lanes, and the fewest row groups in one


class SynthesizedPairs(IterableDataset[dict[str, Any]]):
    """The rows of a finished dataset, for training.

    An element is a dict with
        lr, hr: float32 "3 H W" in [-1, 1].
        scale, time: float; float64 "B" in a batch.
        key, draw: str and int; together they identify a row.

    `crop` cuts `lr` to crop x crop at a random place, and `hr` at the same place. With `size=same` both crops have that
    size. With `size=scaled`, the HR crop has round(crop * scale) pixels a side, so a batch needs equal scales (or its
    own collate_fn). The centres of the two crops are equal if the scale is whole and HR's sides are multiples of it;
    otherwise they are at most half an HR pixel apart, and at HR's far edge a quarter of the scale. An image smaller
    than its crop is extended by reflection.

    All ranks must have the same number of loader workers. These may use any multiprocessing context, with any storage.
    `set_epoch` reaches them, persistent ones too. At the end of an epoch a rank may have up to one batch per worker
    fewer than another; if the other rank would wait for it, use `repeat`, which never ends. Frameworks that split an
    IterableDataset among ranks themselves (Accelerate's `prepare`) need rank=0, world=1. To save the state with loader
    workers, use torchdata's StatefulDataLoader; without them, DataLoader and `state_dict` are enough.

    A dataset that is still being made is read with `unfinished` or `parts`. Only whole parts are read, and which ones
    is decided here, once. All ranks must read the same ones: rank 0 tells them to the others through torch.distributed,
    and without it all ranks need the same `parts`. To go on with a saved state later, give the `parts` of that time.

    A worker's memory holds `buffer` encoded rows, for each lane the rest of a row group (at most 100 rows or some 64
    MB, or one photograph with all its LR images if that is more), and the pair being decoded. While a row group is
    read, Arrow's buffers take some 240 MB more.

    Args:
        uri: the dataset's folder or URI.
        crop: side of the LR crops, in pixels; None: whole images.
        flips: mirror at random, left to right and upside down.
        rotations: turn by 0, 90, 180 or 270 degrees at random.
        shuffle: shuffle the parts, read at several places at once, and shuffle in a buffer; False: the stored order.
        lanes: number of places at which a worker's rows are read side by side; None: at most 8, and so few that a lane
            has four row groups or more, because the row group where two lanes meet is read twice.
        buffer: number of rows in the buffer; None: as many as take some 256 MB on average, at most 1024.
        seed: decides order, crops, flips and rotations.
        repeat: continue with the next epoch, without end.
        rank: of this process; None: from torch.distributed, else RANK, else 0. Given with `world` or not at all.
        world: number of processes; None: from torch.distributed, else WORLD_SIZE, else 1.
        verify: compare each part with its sha256 in the manifest or in its footer before its first use.
        unfinished: read the parts that are there now, also without `_SUCCESS`.
        parts: read these parts alone, also without `_SUCCESS`, e.g. the attribute `parts` of another SynthesizedPairs.

    Attributes:
        parts: names of the parts, e.g. "data/part-000000.parquet".

    Raises:
        ValueError: no finished dataset, no row yet, a bad argument, or a launcher of several processes that does not
            tell this one its rank; while reading, a part or a source that is missing or has changed.
            An iteration raises it, too, if torch.distributed has started after the object was made and says another
            rank: then all ranks would read the same rows.
        OSError: a part that cannot be read.
    """

    def __init__(
        self,
        uri: str | os.PathLike[str],
        *,
        crop: int | None = None,
        flips: bool = False,
        rotations: bool = False,
        shuffle: bool = True,
        lanes: int | None = None,
        buffer: int | None = None,
        seed: int = 0,
        repeat: bool = False,
        rank: int | None = None,
        world: int | None = None,
        verify: bool = False,
        unfinished: bool = False,
        parts: Sequence[str] | None = None,
    ):
        uri, self._own_rank = os.fspath(uri), rank is None and world is None
        self.rank, self.world = processes(rank, world)
        rules = (
            ("crop", crop, crop is None or crop >= 1, "must be None or at least 1"),
            ("lanes", lanes, lanes is None or lanes >= 1, "must be None or at least 1"),
            ("buffer", buffer, buffer is None or buffer >= 1, "must be None or at least 1"),
            ("seed", seed, seed >= 0, "must not be negative"),
            ("parts", parts, not isinstance(parts, str), "must be a list of names"),
        )
        for name, value, kept, rule in rules:
            if not kept:
                raise ValueError(f"{name}={value}: {rule}")
        if unfinished or parts is not None:
            self.dataset = StoredDataset(uri, agreed_parts(uri, parts, self.world, given=world is not None), verify)
        else:
            self.dataset = FinishedDataset(uri, verify)
        self.parts = [part.name for part in self.dataset.parts]
        self.crop, self.flips, self.rotations = crop, flips, rotations
        self.shuffle, self.seed, self.repeat = shuffle, seed, repeat
        self._total = sum(part.rows for part in self.dataset.parts)
        self.lanes = lanes
        self.buffer = buffer or self._rows_in(_BUFFER_BYTES, _BUFFER_ROWS)
        self._scaled = self.dataset.recipe["size"] == "scaled"
        self._epoch = SharedEpoch()
        self._at = (0, 0)  # epoch, and number of its rows that were given
        self._resume: tuple[int, int] | None = None

    def __len__(self) -> int:
        """Number of rows of this rank in one epoch; a TypeError with `repeat`, which never ends.

        A trainer that counted its epochs by it would begin again after them, with the same rows in the same order.
        """
        if self.repeat:
            raise TypeError("SynthesizedPairs(repeat=True) has no length, because it never ends")
        first, last = slice_of(self._total, self.rank, self.world)
        return last - first

    def __getitem__(self, index: Any) -> NoReturn:
        """A TypeError: one row costs the reading of a whole row group.

        A sampler or a Subset that took rows this way would read a dataset some hundred times.
        """
        raise TypeError(
            "SynthesizedPairs has no pairs[i], because one row costs a whole row group (up to 64 MB); iterate over it, "
            f"or see single rows with datasets.load_dataset('parquet', data_files='{self.dataset.uri}/data/*.parquet')"
        )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self._epoch.set(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The position of this process, for `load_state_dict` in the same worker of the same rank."""
        consumer, consumers = self._consumer()
        epoch, position = self._at
        place = {"epoch": epoch, "position": position, "consumer": consumer, "consumers": consumers}
        return place | {"identity": self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration continue after the state's last row, with the same rows in the same order.

        Raises:
            ValueError: the state belongs to another dataset, other arguments, or another number of ranks and workers.
        """
        here = self._identity() | dict(zip(("consumer", "consumers"), self._consumer(), strict=True))
        there = state["identity"] | {name: state[name] for name in ("consumer", "consumers")}
        if changed := [
            f"{name} was {there.get(name)}, now {value}" for name, value in here.items() if there.get(name) != value
        ]:
            advice = (
                " (the dataset has other parts now: give parts= of that time)" if changed[0][:6] == "parts " else ""
            )
            raise ValueError(f"{self.dataset.uri}: the state does not fit: {'; '.join(changed)}{advice}")
        self._resume = self._at = state["epoch"], state["position"]
        # torchdata loads states as an iteration begins, so after the caller's `set_epoch`.
        if not self._is_over(state["position"]) or int(self._epoch) < state["epoch"]:
            self.set_epoch(state["epoch"])

    def _is_over(self, position: int) -> bool:
        """Whether this worker has no more rows in the epoch."""
        first, last = self._slice()
        return position >= last - first and not self.repeat

    def _identity(self) -> dict[str, Any]:
        names = ("crop", "flips", "rotations", "shuffle", "lanes", "buffer", "seed", "repeat")
        return {"parts": self.dataset.sha256} | {name: getattr(self, name) for name in names}

    def _consumer(self) -> tuple[int, int]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        return self.rank * count + number, self.world * count

    def _slice(self) -> tuple[int, int]:
        """This worker's first row of the epoch, and the row after its last."""
        return slice_of(self._total, *self._consumer())

    def _rows_in(self, size: int, most: int) -> int:
        """How many rows take this number of bytes on average, at least 1 and at most `most`."""
        stored = sum(part.bytes for part in self.dataset.parts)
        return max(1, min(most, size * self._total // max(1, stored)))

    def _lanes(self, count: int) -> list[int]:
        """The first rows of the lanes of a slice of `count` rows, and `count`."""
        if not self.shuffle:
            return lanes_of(count, 1)
        group = self._rows_in(ROW_GROUP_BYTES, ROW_GROUP_ROWS)
        return lanes_of(count, self.lanes or min(_LANES, count // (_LANE_GROUPS * group)))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self._own_rank:
            check_rank(self.rank, self.world)
        self._at = self._resume or (int(self._epoch), 0)
        if self._resume and self._is_over(self._at[1]) and int(self._epoch) > self._at[0]:
            self._at = (int(self._epoch), 0)  # the state's epoch has ended, and the caller has gone on to another one
        self._resume = None
        return self._samples(*self._at)

    def _samples(self, epoch: int, position: int) -> Iterator[dict[str, Any]]:
        first, last = self._slice()
        for number in itertools.count(epoch) if self.repeat and first < last else (epoch,):
            for row in self._rows(number, position):
                position += 1
                self._at = number, position
                yield self._sample(number, row)
            position = 0

    def _rows(self, epoch: int, position: int) -> Iterator[dict[str, Any]]:
        """This worker's rows of an epoch, starting at `position`."""
        first, last = self._slice()
        starts, order = self._lanes(last - first), iter(range(last - first))
        if self.shuffle:
            random = np.random.default_rng((self.seed, 1, epoch, self._consumer()[0]))
            order = shuffled(merged(starts, random).tolist(), self.buffer, random)
        wanted = np.ones(last - first, bool)
        wanted[np.fromiter(itertools.islice(order, position), np.int64)] = False
        lanes = [self._lane(epoch, first, wanted, *ends) for ends in itertools.pairwise(starts)]
        waiting = {}
        for number in order:
            lane = lanes[bisect_right(starts, number) - 1]
            while number not in waiting:
                found, row = next(lane)
                waiting[found] = row
            yield waiting.pop(number)

    def _lane(
        self, epoch: int, first: int, wanted: np.ndarray, start: int, end: int
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """The wanted rows from `start` to `end` of the slice that begins at row `first` of the epoch, as stored."""
        parts = self.dataset.parts
        if self.shuffle:
            parts = [parts[n] for n in np.random.default_rng((self.seed, 0, epoch)).permutation(len(parts))]
        begin = -first  # the part's first row, as a row of the slice
        for part in parts:
            low, high = max(start, begin), min(end, begin + part.rows)
            if low < high and wanted[low:high].any():
                mask = np.zeros(part.rows, bool)
                mask[low - begin : high - begin] = wanted[low:high]
                yield from ((begin + n, row) for n, row in self.dataset.rows(part, mask))
            begin += part.rows

    def _sample(self, epoch: int, row: dict[str, Any]) -> dict[str, Any]:
        lr, hr = self.dataset.lr_of(row), self.dataset.hr_of(row)
        digest = hashlib.blake2b(f"{self.seed}/{epoch}/{row['draw']}/{row['key']}".encode(), digest_size=16).digest()
        random = np.random.default_rng(int.from_bytes(digest, "little"))
        if self.crop:
            lr, hr = aligned_crops(lr, hr, self.crop, row["scale"] if self._scaled else 1.0, random)
        lr, hr = turned(lr, hr, self.flips, self.rotations, random)
        names = ("scale", "time", "key", "draw")
        return {"lr": images.to_tensor(lr), "hr": images.to_tensor(hr)} | {name: row[name] for name in names}


def aligned_crops(
    lr: np.ndarray, hr: np.ndarray, crop: int, scale: float, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Cut two images at the same random place.

    Args:
        lr: uint8 "h w 3".
        hr: uint8 "H W 3", `scale` times as large as `lr`, to rounding.
        crop: side of the LR crop.
        scale: side of the HR crop / side of the LR crop.
        random: draws the place.

    Returns:
        LR "crop crop 3" and HR "S S 3", S = round(crop * scale); see `SynthesizedPairs` for their centres.
    """
    side, places = round(crop * scale), []
    for small, large in zip(lr.shape[:2], hr.shape[:2], strict=True):
        start = int(random.integers(max(0, small - crop) + 1))
        centre = (start + crop / 2) * large / small
        places.append((start, min(max(0, round(centre - side / 2)), max(0, large - side))))
    (top, left), (hr_top, hr_left) = zip(*places, strict=True)
    return cut(lr, top, left, crop), cut(hr, hr_top, hr_left, side)


def turned(
    lr: np.ndarray, hr: np.ndarray, flips: bool, rotations: bool, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Views of two images "H W 3", mirrored and turned alike, at random where asked for."""
    if flips:
        steps = tuple(int(step) for step in random.choice((-1, 1), 2))
        lr, hr = (image[:: steps[0], :: steps[1]] for image in (lr, hr))
    if rotations:
        turns = int(random.integers(4))
        lr, hr = np.rot90(lr, turns), np.rot90(hr, turns)
    return lr, hr


def cut(pixels: np.ndarray, top: int, left: int, side: int) -> np.ndarray:
    """A square of an image "H W 3", extended by reflection where the image ends.

    The axis is the image's edge, which LR and HR of different sizes have in common, and not its last pixel.
    """
    found = pixels[top : top + side, left : left + side]
    missing = [(0, side - length) for length in found.shape[:2]]
    return np.pad(found, (*missing, (0, 0)), mode="symmetric") if found.shape[:2] != (side, side) else found
