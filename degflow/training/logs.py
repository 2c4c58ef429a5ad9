"""Logs of a training in `logs/` of its output: JSON lines, and TensorBoard's files; and the means that are logged."""

import json
import math
import os
import re
import tempfile
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from degflow.storage import Place

PART = 1 << 20  # bytes of a file from which on the next one is begun (an event file: in an object store)
QUARTER, _COUNT = "error_quarter_", "_count"  # names of the flow's errors by time, and of the samples there


def quarters(by_time: Tensor | None) -> dict[str, Tensor]:
    """The scalars of `objectives.Losses.by_time`, of which `Means.take` makes means; none of None."""
    if by_time is None:
        return {}
    names = (f"{QUARTER}{n + 1}{kind}" for kind in ("", _COUNT) for n in range(by_time.shape[1]))
    return dict(zip(names, by_time.flatten(), strict=True))


class Means:
    """Means of scalars over the steps since they were last taken, and over the processes.

    Steps are kept apart until then, on their device. So nothing waits for it in between, and a training that is
    interrupted between two log lines logs the same numbers.

    Args:
        accelerator: of the processes.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.settled: list[dict[str, float]] = []
        self.waiting: list[dict[str, Tensor]] = []

    def add(self, scalars: dict[str, Tensor]) -> None:
        """Add a step's scalars, of the same names in each step."""
        self.waiting.append({name: value.detach().float() for name, value in scalars.items()})

    def settle(self) -> list[dict[str, float]]:
        """All steps since the last `take`, means over the processes; waits for the device."""
        if self.waiting:
            steps = torch.stack([torch.stack(tuple(step.values())) for step in self.waiting])
            rows = cast(Tensor, self.accelerator.reduce(steps, "mean")).tolist()
            self.settled += [dict(zip(self.waiting[0], row, strict=True)) for row in rows]
            self.waiting = []
        return self.settled

    def take(self) -> dict[str, float]:
        """Give the means, and begin anew. A quarter of the time without samples has none."""
        steps, self.settled = self.settle(), []
        means = {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
        for name in [name for name in means if name.endswith(_COUNT)]:
            count, error = means.pop(name), means.pop(name.removesuffix(_COUNT))
            if count:
                means[name.removesuffix(_COUNT)] = error / count
        return means


class Logs:
    """The files of one run or continuation: `steps-00000001.jsonl`, from that step on, and an event file.

    A line of JSON has the scalars (null: not finite), "step" and "group" (train or validation). After an interruption,
    a step may come twice: then the later file counts.

    TensorBoard appends to its file, which object stores cannot do. There the file is kept in a temporary local folder,
    and `flush` uploads it. Once it is large, it stays as it is and another one is begun.

    Args:
        place: the output.
        step: finished steps; TensorBoard discards what an interrupted run logged after them.
    """

    def __init__(self, place: Place, step: int):
        self.place, self.folder = place, None
        self.lines: list[str] = []  # of the file that begins at `first`
        self.step, self.first = step, step + 1
        for file in place.files("logs"):  # what follows is logged again
            found = re.fullmatch(r"logs/steps-(\d+)\.jsonl", file.key)
            if found and int(found[1]) > step:
                place.delete(file.key)
        self.writer = self._writer(step + 1)

    def _writer(self, purge_step: int | None) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            print('no TensorBoard files: pip install "degflow[train]" adds them')
            return None
        if not self.place.local and not self.folder:
            self.folder = tempfile.TemporaryDirectory(prefix="degflow-logs-")
        return SummaryWriter(self.folder.name if self.folder else self.place.path("logs"), purge_step=purge_step)

    def add(self, group: str, scalars: dict[str, float], step: int, picture: np.ndarray | None = None) -> None:
        """Scalars "group/name", and a picture "H W 3" uint8, at a step."""
        if step > self.step and sum(map(len, self.lines)) >= PART:
            self._write_lines()
            self.lines, self.first = [], step
        finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        self.lines.append(json.dumps({**finite, "step": step, "group": group}, allow_nan=False) + "\n")
        self.step = step
        if self.place.local:
            self._write_lines()
        if self.writer is None:
            return
        for name, value in scalars.items():
            self.writer.add_scalar(f"{group}/{name}", value, step)
        if picture is not None:
            self.writer.add_image(group, picture, step, dataformats="HWC")

    def flush(self) -> None:
        """Write everything added so far to the output."""
        self._write_lines()
        if self.writer is None:
            return
        self.writer.flush()
        if self.folder:
            for name in os.listdir(self.folder.name):
                self.place.upload(f"{self.folder.name}/{name}", f"logs/{name}")
            self._begin_another()

    def _write_lines(self) -> None:
        if self.lines:
            self.place.write(f"logs/steps-{self.first:08d}.jsonl", "".join(self.lines).encode())

    def _begin_another(self) -> None:
        assert self.folder
        (file,) = (f"{self.folder.name}/{name}" for name in os.listdir(self.folder.name))
        if os.path.getsize(file) >= PART:
            self.writer.close()
            os.remove(file)
            self.writer = self._writer(None)

    def close(self) -> None:
        """Flush and close the files."""
        self.flush()
        if self.writer is None:
            return
        self.writer.close()
        if self.folder:
            self.folder.cleanup()
