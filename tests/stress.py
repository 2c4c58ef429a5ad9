"""Many syntheses with failures: not part of the test suite.

    PYTHONPATH=. python tests/stress.py [rounds] [seed]

Each round makes one dataset on a real S3 server, behind a proxy that fails a share of the requests. One to four times,
at random moments, the driver, a worker or the store is killed (-9), and started again. The dataset must then equal the
uninterrupted one: every (key, draw) once, the same scales, the same PNG bytes, and no file besides the documented
layout.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.faults import proxying
from tests.s3 import serving
from tests.sources import save_model
from tests.synthesis.test_storms import driver, finish, rows_of, save_small_photos


def children_of(process: subprocess.Popen, name: str) -> list[int]:
    """Processes of the driver's Ray whose title contains `name`."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            title = (entry / "cmdline").read_bytes().decode(errors="replace")
            environment = (entry / "environ").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if name in title and f"DEGFLOW_STRESS={process.args[-1]}" in environment:
            found.append(int(entry.name))
    return found


def kill_driver(process, server, draw):
    process.send_signal(signal.SIGKILL)


def kill_worker(process, server, draw):
    if workers := children_of(process, "ray::"):
        os.kill(draw.choice(workers), signal.SIGKILL)


def kill_store(process, server, draw):
    server.kill()
    time.sleep(draw.uniform(0, 2))
    server.start()


KILLS = (kill_driver, kill_driver, kill_worker, kill_store)


def one_round(number, server, photos, model, draw, met):
    output, mark = server.uri("round"), f"limit={1000 + number}"  # a last word that tells this round's processes
    with proxying(server.endpoint, rate=0.02, seed=number) as (proxy, endpoint):
        environment = {"AWS_ENDPOINT_URL": endpoint, "DEGFLOW_STRESS": mark}
        kills = draw.randint(1, 4)
        while True:
            process = driver(photos, output, model, mark, environment=environment)
            while kills and process.poll() is None:
                time.sleep(draw.uniform(0.5, 12))
                kill, kills = draw.choice(KILLS), kills - 1
                if process.poll() is None:
                    met[kill.__name__] += 1
                    kill(process, server, draw)
                if kill is kill_driver:
                    break
            if process.wait(timeout=600) == 0:
                finish(process)
                break
            process.communicate()
            met["restarts"] += 1
            assert met["restarts"] < 10 * (number + 1), "it does not finish"
    met.update({f"fault: {kind}": count for kind, count in proxy.met.items() if kind != "none"})
    return rows_of(output)


def main(rounds: int, seed: int) -> None:
    draw, met, good = random.Random(seed), Counter(), 0
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder) / "s3") as server:
        model = save_model(Path(folder) / "tiny.safetensors")
        photos = save_small_photos(server.uri("photos"))
        output = server.uri("reference")
        finish(driver(photos, output, model))
        reference = rows_of(output)
        for number in range(rounds):
            same = one_round(number, server, photos, model, draw, met) == reference
            good += same
            outcome = "the same dataset" if same else "ANOTHER DATASET"
            print(f"round {number + 1}: {outcome}; so far {dict(met)}", flush=True)
    print(f"{good} of {rounds} rounds ended in the same {len(reference)} rows", flush=True)
    sys.exit(good != rounds)


if __name__ == "__main__":
    rounds, seed = ([int(word) for word in sys.argv[1:]] + [10, 0][len(sys.argv) - 1 :])[:2]
    main(rounds, seed)
