"""Signals that announce the end of a process: the training process saves and ends, its loader workers ignore them.

Spot instances and Kubernetes send SIGTERM, Slurm sends SIGTERM or the signal of `--signal` (SIGUSR1). A launcher passes
its signals on to the processes that it started, and to their loader workers.
"""

import multiprocessing
import os
import signal
import threading
from ctypes import c_bool
from types import TracebackType
from typing import Any

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: saved, the same command continues
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(SystemExit):
    """The training was asked to stop, and has saved; ends the process with `EXIT_CODE`."""

    def __init__(self):
        super().__init__(EXIT_CODE)


class Notice:
    """A context in which SIGTERM and SIGUSR1 are only noted.

    The end of the launcher counts as SIGTERM. Otherwise the processes of a launcher that was killed would go on, and
    write to the same output as the restarted job.
    """

    def __init__(self):
        self.signal = 0
        self.launcher = os.getppid() if "ACCELERATE_MIXED_PRECISION" in os.environ else None
        self.before: dict[signal.Signals, Any] = {}

    def given(self) -> int:
        """The signal's number, or 0."""
        if not self.signal and self.launcher not in (None, os.getppid()):
            self.signal = signal.SIGTERM
        return self.signal

    def __enter__(self) -> "Notice":
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread set handlers
            self.before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        self.signal = number


class Shield:
    """Keeps loader workers alive when a signal reaches the whole process group: the training process ends them.

    Call the instance in each worker. Call `end` in the training process before the workers are to end.
    """

    def __init__(self):
        self.ended = multiprocessing.RawValue(c_bool, False)

    def __call__(self, worker: int) -> None:
        """Ignore Ctrl-C and the signals of `Notice`, but end when `multiprocessing` terminates the worker at exit."""
        for number in (signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0) if self.ended.value else None)

    def end(self) -> None:
        """From now on SIGTERM ends a worker."""
        self.ended.value = True
