"""`python -m degflow.benchmarking.stand_in KEY=VALUE ...`: the synthesis job with a degrader that sleeps.

It works without a GPU, where Ray is told of one. The environment has its settings: DEGFLOW_STAND_IN_SECONDS, for each
photograph, and DEGFLOW_STAND_IN_TRACE, a file that gets a JSON object for each photograph that is degraded, for each
window whose rows are written and for each report that the driver takes. It has `who` (image, rows or report), `at`
(clock, s), `thread`, and `cpu` (s): of the actor's thread that runs the degrader, of its second thread (every shard has
threads of its own), or of the driver.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from degflow.config import load
from degflow.degrader import Degrader
from degflow.flow import PathFlow
from degflow.models import AutoencoderConfig, ResidualAutoencoder, VelocityConfig, VelocityNetwork
from degflow.synthesis import pool, run, shard
from degflow.synthesis.buffers import Arrival
from degflow.synthesis.settings import SynthesizeConfig
from degflow.synthesis.shard import _Taken
from degflow.synthesis.window import Item, WindowDegrader

SECONDS, TRACE = "DEGFLOW_STAND_IN_SECONDS", "DEGFLOW_STAND_IN_TRACE"


class StandIn(Degrader):
    """A degrader that stays on the CPU, whatever device it is sent to."""

    def __init__(self):
        autoencoder = ResidualAutoencoder(AutoencoderConfig(base_width=8))
        flow = PathFlow(VelocityNetwork(VelocityConfig(width=8, blocks=1)))
        super().__init__(autoencoder, flow, {"1": 1.0, "4": 4.0})

    def to(self, *_: Any, **__: Any) -> "StandIn":
        """This one."""
        return self


class Sleeper(WindowDegrader):
    """Sleeps for each photograph, and returns it for every scale.

    Two copies stay, of those that a GPU needs: the photographs to it, by way of memory that is used again, and the LR
    images from it.
    """

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        shard._Rows = Noted  # type: ignore[misc] # in the actor's process, which unpickles this

    def _forward(self, batch: Sequence[Item], memory: float) -> Arrival:
        for _ in batch:
            note("image", time.thread_time())
        sent, shape = self.buffers.empty((len(batch), *batch[0].loaded.pixels.shape)), batch[0].loaded.pixels.shape
        for n, item in enumerate(batch):
            np.copyto(sent[n], item.loaded.pixels)
        time.sleep(float(os.environ[SECONDS]) * len(batch))
        got = self.buffers.empty((len(batch), len(batch[0].scales), *shape))
        np.copyto(got, sent[:, None])
        return Arrival(got, torch.ones(len(batch), dtype=torch.bool))


def note(who: str, cpu: float) -> None:
    """Write a line into the trace, if there is one."""
    if path := os.environ.get(TRACE):
        with open(path, "a") as file:
            noted = {"who": who, "at": time.monotonic(), "thread": threading.get_ident(), "cpu": cpu}
            file.write(json.dumps(noted) + "\n")


class Noted(shard._Rows):
    """What the second thread does, which notes each window of one photograph."""

    def take(self, window: Sequence[Any], lrs: Sequence[Any]) -> _Taken:
        """As usual."""
        done = super().take(window, lrs)
        if window:
            note("rows", time.thread_time())
        return done


class Count(pool.Count):
    """The driver's count of reports, which notes each."""

    def take(self, report: dict[str, Any]) -> None:
        """Count one report."""
        note("report", time.process_time())
        super().take(report)


def main() -> None:
    """Run the job. Only the driver's degrader is replaced; actors get the objects that it makes."""
    from degflow.benchmarking import stand_in  # its importable name: actors could not unpickle objects of __main__

    Degrader.load = classmethod(lambda *_: stand_in.StandIn())  # type: ignore[method-assign]
    run.WindowDegrader, pool.Count = stand_in.Sleeper, stand_in.Count  # type: ignore[misc]
    run.synthesize(load(SynthesizeConfig, sys.argv[1:]))


if __name__ == "__main__":
    main()
