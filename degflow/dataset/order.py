"""The order of an epoch's rows, as numbers alone: nothing is read here.

1. `slice_of` deals the epoch's rows out to its readers.
2. `lanes_of` cuts a slice into lanes, which are read side by side: each row group once, except where two lanes meet.
3. `merged` merges the lanes at random, and `shuffled` shuffles the result in a buffer of limited size.
"""

from collections.abc import Iterable, Iterator

import numpy as np


def slice_of(total: int, reader: int, readers: int) -> tuple[int, int]:
    """The first row of one of `readers` equal slices of `total` rows, and the row after its last."""
    return total * reader // readers, total * (reader + 1) // readers


def lanes_of(count: int, lanes: int) -> list[int]:
    """The first rows of lanes of equal length, to one row, and at the end `count`; no lane is empty if `count` > 0."""
    lanes = max(1, min(lanes, count))
    return [count * lane // lanes for lane in range(lanes + 1)]


def merged(starts: list[int], random: np.random.Generator) -> np.ndarray:
    """The rows of all lanes, int64 "count": each lane's in their order, and all such orders equally likely.

    Args:
        starts: see `lanes_of`.
        random: draws the order.
    """
    turns = random.permutation(np.repeat(np.arange(len(starts) - 1, dtype=np.int32), np.diff(starts)))
    rows = np.empty(starts[-1], np.int64)
    rows[np.argsort(turns, kind="stable")] = np.arange(starts[-1])
    return rows


def shuffled(rows: Iterable[int], buffer: int, random: np.random.Generator) -> Iterator[int]:
    """The rows, each drawn from a buffer of the next `buffer` ones, whose place the following row takes."""
    held: list[int] = []
    for row in rows:
        if len(held) < buffer:
            held.append(row)
            continue
        place = int(random.integers(buffer))
        yield held[place]
        held[place] = row
    random.shuffle(held)
    yield from held
