"""Run a cell: a job as its own process, with a log, and a record when it is finished."""

import hashlib
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from degflow.config import Unfinished, found_file
from degflow.protocol.plan import Cell
from degflow.storage import Place, split_uri
from degflow.training.checkpoints import MACHINE
from degflow.training.stopping import EXIT_CODE, Stopped

_MACHINE = re.compile(rf"{MACHINE}|batch|device|actors\..+")  # keys


def finished(cell: Cell, place: Place) -> bool:
    """Whether the cell was finished with the same words, files and earlier cells.

    Raises:
        ValueError: it was finished with others.
    """
    if not place.exists(f"cells/{cell.name}.json"):
        return False
    found, now = json.loads(place.read(f"cells/{cell.name}.json")), record(cell, place)
    found["words"] = _deciding(found.get("words", []))
    if any(found.get(part) != now[part] for part in now):
        reads = {item[0] for item in set(found.get("reads", {}).items()) ^ set(now["reads"].items())}
        changed = sorted(set(found["words"]) ^ set(now["words"])) or sorted(reads) or ["order of its words"]
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
    log, begun, done = Path(place.path(f"cells/{cell.name}.log")), time.monotonic(), record(cell, place)
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
    done["seconds"] = round(seconds, 1)
    place.write(f"cells/{cell.name}.json", json.dumps(done, indent=1).encode())
    if told:  # in the job's last moments
        raise Stopped
    return seconds


def record(cell: Cell, place: Place) -> dict[str, Any]:
    """A cell's job, its words, and digests of what it reads; OUTPUT stands for the experiment's folder, which may move.

    Words that change how a job runs, and not what comes out, are left out.
    It reads the files of keys and degraders in its words, and the records of cells whose folders are in its words.
    These may change while the words do not. Scenes outside the experiment's folder are not checked.
    """
    words = _deciding([word.replace(place.uri, "OUTPUT") for word in cell.words])
    reads = {}
    for word in cell.words:
        name, _, value = word.partition("=")
        if name == "config":
            reads[word] = _digest(str(found_file(value)))
        elif name == "model" and value != "shipped" and not value.startswith(f"{place.uri}/"):
            reads[word] = _digest(value)
    text = "".join(f"{word}/" for word in words)
    for file in sorted(Path(place.path("cells")).rglob("*.json")):
        name = str(file.relative_to(place.path("cells")).with_suffix(""))
        if name != cell.name and re.search(rf"OUTPUT/{re.escape(name)}[/\"]", text):
            asked = {part: value for part, value in json.loads(file.read_bytes()).items() if part != "seconds"}
            reads[f"cells/{name}.json"] = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    return {"job": cell.job, "words": words, "reads": reads}


def _deciding(words: Sequence[str]) -> list[str]:
    return [word for word in words if not _MACHINE.fullmatch(word.partition("=")[0])]


def _digest(uri: str) -> str:
    place, name = split_uri(uri)
    return hashlib.sha256(place.read(name)).hexdigest()
