"""The epoch of a dataset, which reaches loader workers that are already running."""

from typing import Any

import torch


class SharedEpoch:
    """A whole number in memory that a dataset shares with the loader workers that it starts.

    A copy of it, by pickle or by `copy`, has a number of its own, and shares that with its own workers.
    """

    def __init__(self):
        self._number = torch.zeros((), dtype=torch.int64).share_memory_()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._number.share_memory_()  # a copy's memory is not shared; that of a worker's is already

    def __int__(self) -> int:
        return int(self._number)

    def set(self, epoch: int) -> None:
        """Choose the epoch."""
        self._number.fill_(epoch)
