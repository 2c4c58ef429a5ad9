"""Being stopped in time: the signals that announce the end of a process, and who must not hear them.

Spot instances and Kubernetes announce it with SIGTERM, Slurm with SIGTERM or the signal of `--signal` (SIGUSR1). A
launcher passes its own on to the processes that it started, and to their loader workers.
"""

import multiprocessing
import os
import signal
import threading
from ctypes import c_bool
from types import TracebackType
from typing import Any

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: saved; the same command goes on
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(SystemExit):
    """A training that was asked to stop, and saved what it had; leaves the process with `EXIT_CODE`."""

    def __init__(self):
        super().__init__(EXIT_CODE)


class Notice:
    """While this context is open, SIGTERM and SIGUSR1 are noted and nothing else.

    The end of the launcher counts as SIGTERM: one that is killed, or that does not pass signals on, would leave its
    processes behind, writing to an output that a restarted job writes to as well.
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
    """Keeps loader workers alive through signals that reach every process of a group: the training process decides.

    Call the instance in each worker; call `end` in the training process before the workers are to go.
    """

    def __init__(self):
        self.ended = multiprocessing.RawValue(c_bool, False)

    def __call__(self, worker: int) -> None:
        """Ignore Ctrl-C and the signals of `Notice`, but go when `multiprocessing` terminates the worker at exit."""
        for number in (signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0) if self.ended.value else None)

    def end(self) -> None:
        """From now on SIGTERM ends a worker."""
        self.ended.value = True
