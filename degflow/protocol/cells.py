"""Run a cell: a job as its own process, with a log, and a record when it is finished."""

import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from degflow.config import Unfinished
from degflow.protocol.plan import Cell
from degflow.storage import Place
from degflow.training.stopping import EXIT_CODE, Stopped


def finished(cell: Cell, place: Place) -> bool:
    """Whether the cell was finished with the same words.

    Raises:
        ValueError: it was finished with other words.
    """
    if not place.exists(f"cells/{cell.name}.json"):
        return False
    found, now = json.loads(place.read(f"cells/{cell.name}.json")), record(cell, place)
    if (found["job"], found["words"]) != (now["job"], now["words"]):
        changed = sorted(set(found["words"]) ^ set(now["words"])) or ["order of its words"]
        raise ValueError(
            f"{place.uri_of(f'cells/{cell.name}.json')}: finished with another {changed[0]}; "
            "use the same configuration or another output, or delete this file and the cell's folder"
        )
    return True


def perform(cell: Cell, place: Place, launch: Sequence[str]) -> float:
    """Run a cell; returns its seconds.

    Args:
        cell: what to run.
        place: the experiment's output.
        launch: command that starts a training, as `python` would: it gets `-m degflow` and words; empty: this Python.

    Raises:
        Stopped: SIGTERM or SIGUSR1 came; it was passed on to the job, which had time to save.
        ValueError: the job's keys, or files that they name, break a rule; the message has its last line.
        Unfinished: the job failed otherwise; the same.
    """
    start = [*launch] if launch and cell.job.startswith("train") else [sys.executable]
    command = [*start, "-m", "degflow", cell.job.replace("_", "-"), *cell.words]
    log, begun = Path(place.path(f"cells/{cell.name}.log")), time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        file.write(f"$ {shlex.join(command)}\n".encode())
        file.flush()
        told, process = [], subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)

        def tell(number: int, frame: Any) -> None:
            told.append(number)
            process.send_signal(number)

        before = {number: signal.signal(number, tell) for number in (signal.SIGTERM, signal.SIGUSR1)}
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if code and (told or code == EXIT_CODE):
        print(f"stopped during {cell.name}; the same command continues", flush=True)
        raise Stopped
    if code:
        lines = log.read_text(errors="replace").strip().splitlines()
        failed = ValueError if code == 2 else Unfinished
        raise failed(f"{cell.name}: {cell.job} ended with exit code {code}: {lines[-1]} (whole log: {log})")
    seconds = time.monotonic() - begun
    done = record(cell, place) | {"seconds": round(seconds, 1)}
    place.write(f"cells/{cell.name}.json", json.dumps(done, indent=1).encode())
    return seconds


def record(cell: Cell, place: Place) -> dict[str, Any]:
    """A cell's job and words, with OUTPUT for the experiment's folder, which may be moved."""
    return {"job": cell.job, "words": [word.replace(place.uri, "OUTPUT") for word in cell.words]}
