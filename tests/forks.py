"""Python programs in processes of their own, forked from one that has imported torch, which takes 3 s of a CPU.

A test uses the fixture `forks` (see conftest.py). A program finds nothing imported but `degflow.degrader` and what that
imports, so its environment still decides e.g. which Hub the client asks, or where S3 is.
"""

import json
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

from tests import ROOT

_SERVER = """
import json, os, signal, sys
import degflow.degrader
for line in sys.stdin:
    children = []
    for program, arguments, environment, *files in json.loads(line):
        children.append(os.fork())
        if not children[-1]:
            for number, file in enumerate([os.devnull, *files]):
                os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), number)
            signal.alarm(300)
            os.environ.clear()
            os.environ.update(environment)
            sys.argv[1:] = arguments
            exec(program, {"__name__": "__main__"})
            sys.exit()
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(json.dumps(codes), flush=True)
"""


@contextmanager
def forking():
    """Yields a function that runs a program side by side with itself, once for each list of arguments given."""
    command, pipe = [sys.executable, "-c", _SERVER], subprocess.PIPE
    server = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdin=pipe, stdout=pipe, text=True
    )

    def run(program, *calls, **environment):
        with tempfile.TemporaryDirectory() as folder:
            files = [[Path(folder, f"{kind}{n}") for kind in ("out", "err")] for n in range(len(calls))]
            asked = [
                [program, [*map(str, words)], os.environ | environment, *map(str, texts)]
                for words, texts in zip(calls, files, strict=True)
            ]
            server.stdin.write(json.dumps(asked) + "\n")
            server.stdin.flush()
            said = server.stdout.readline()
            assert said, f"the server of forks has ended: {server.poll()}"
            codes = json.loads(said)
            return [
                subprocess.CompletedProcess(words, code, *(text.read_text() for text in texts))
                for words, code, texts in zip(calls, codes, files, strict=True)
            ]

    try:
        yield run
    finally:
        server.stdin.close()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
