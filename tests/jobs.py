"""Run a job in this process: a process of its own would spend seconds on its imports."""

import contextlib
import io
import runpy
import sys
from unittest import mock

from tests import ROOT


def run_job(name: str, *words: str, **keys: object) -> tuple[int, str]:
    """Run `python jobs/NAME.py WORDS KEY=VALUE ...`; returns the exit status and what it printed."""
    words += tuple(f"{key}={value}" for key, value in keys.items())
    said = io.StringIO()
    script = str(ROOT / f"jobs/{name}.py")
    with (
        mock.patch.object(sys, "argv", [script, *words]),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else int(end.code is not None), said.getvalue()
    return 0, said.getvalue()
