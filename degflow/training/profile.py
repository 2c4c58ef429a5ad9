"""A profile of some training steps: what each operation takes, on the CPU and on the GPU."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from degflow.storage import Place

FILE = "profile.json"
_BEFORE, _WARM = 8, 2  # steps that are not timed, and that the profiler takes to start


@contextlib.contextmanager
def profiling(place: Place, steps: int) -> Iterator[Callable[[], None]]:
    """Time some steps; gives what is to be called after every step.

    The file has the format of Chrome's tracing. It is written after `steps` steps that follow the first ten, or with
    those that were timed when the training is stopped.

    Args:
        place: where profile.json goes.
        steps: number of them; 0: none.
    """
    if not steps:
        yield lambda: None
        return

    def save(profiler: profile) -> None:
        with tempfile.TemporaryDirectory() as folder:
            file = str(Path(folder, FILE))
            profiler.export_chrome_trace(file)
            place.upload(file, FILE)
        print(f"profile: {place.uri_of(FILE)}", flush=True)

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    plan = schedule(wait=_BEFORE, warmup=_WARM, active=steps, repeat=1)
    with profile(activities=kinds, schedule=plan, on_trace_ready=save) as profiler:
        yield profiler.step
