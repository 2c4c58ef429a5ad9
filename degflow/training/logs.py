"""TensorBoard logs of a training: scalars and pictures, in `logs/` of its output."""

import os
import tempfile
from typing import Any

import numpy as np

from degflow.storage import Place


class Logs:
    """The event file of one run or continuation.

    TensorBoard appends to its file, which object stores cannot do. There the file is kept in a temporary local folder,
    and `flush` uploads it whole.

    Args:
        place: the output.
        step: finished steps; TensorBoard discards what an interrupted run logged after them.
    """

    def __init__(self, place: Place, step: int):
        self.place, self.folder = place, None
        self.writer = self._writer(step)

    def _writer(self, step: int) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            print('no TensorBoard logs: pip install "degflow[train]" adds them')
            return None
        if not self.place.local:
            self.folder = tempfile.TemporaryDirectory(prefix="degflow-logs-")
        return SummaryWriter(self.folder.name if self.folder else self.place.path("logs"), purge_step=step + 1)

    def add(self, group: str, scalars: dict[str, float], step: int, picture: np.ndarray | None = None) -> None:
        """Scalars "group/name", and a picture "H W 3" uint8, at a step."""
        if self.writer is None:
            return
        for name, value in scalars.items():
            self.writer.add_scalar(f"{group}/{name}", value, step)
        if picture is not None:
            self.writer.add_image(group, picture, step, dataformats="HWC")

    def flush(self) -> None:
        """Write everything added so far to the output."""
        if self.writer is None:
            return
        self.writer.flush()
        if self.folder:
            for name in os.listdir(self.folder.name):
                self.place.upload(f"{self.folder.name}/{name}", f"logs/{name}")

    def close(self) -> None:
        """Flush and close the file."""
        if self.writer is None:
            return
        self.writer.close()
        self.flush()
        if self.folder:
            self.folder.cleanup()
