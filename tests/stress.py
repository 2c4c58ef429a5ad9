"""Many syntheses with failures: not part of the test suite.

    PYTHONPATH=. python tests/stress.py [rounds] [seed]

Each round makes one dataset on a real S3 server, behind a proxy that fails a share of the requests and, in some rounds,
throttles all photographs for a while. One to four times, at random moments, a driver, a worker or the store is killed
(-9), and started again. 1% of the calls in actors raise, at their start too. Every second round has two drivers at
once, whose threads and PNG bytes differ. The photographs have up to 12 megapixels, which are cut into tiles, and three
files are bad.

The dataset must then equal the uninterrupted one: every (key, draw) once, with its scale and noise seed, the same HR
pixels, LR pixels within one level (tiles and threads round), the same rejects, a manifest that matches the objects, and
no file besides the documented layout.
"""

import io
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import ray
import torch
from PIL import Image

from degflow import images
from degflow.config import load
from degflow.dataset.manifest import data_files
from degflow.degrader import Degrader
from degflow.models import AutoencoderConfig, ResidualAutoencoder
from degflow.storage import Place
from degflow.synthesis.run import synthesize
from degflow.synthesis.settings import SynthesizeConfig
from tests import ROOT
from tests.captures import residual_flow
from tests.faults import proxying
from tests.finished import synthesize_here
from tests.s3 import S3Server, serving
from tests.synthesis.test_storms import rows_of

WORDS = ("shard.images=5", "scale.per_image=2", "memory=1.1", "batch=2", "actors.gpus=0", "max_reject_rate=0.2")
SMALL, SIZES = 27, ((4000, 3000), (1500, 1000), (800, 600))
BAD = {"bad/empty.png": "decode", "bad/page.png": "decode", "bad/truncated.jpg": "decode"}
FAULTS, ERRORS, PATIENCE = 0.03, 0.01, 900  # shares of requests and of calls that fail; seconds for one round
USUAL, OTHER = ("3", "1"), ("1", "2")  # PNG level and threads of a driver
AGENTS = (b"ray::DashboardAgent", b"ray::RuntimeEnvAgent")  # their node ends with them, and a driver there exits
LEVELS = {b"\x78\x01": "1", b"\x78\x5e": "3"}  # by the first bytes of zlib's stream


def save_fast_model(path: Path) -> str:
    """A degrader that draws, at some second per megapixel."""
    torch.manual_seed(0)
    network = ResidualAutoencoder(AutoencoderConfig(base_width=2, multipliers=(1, 1, 1, 1), blocks=1, gate_init=0.5))
    levels = {"1": 1.0, "2": 2.0, "4": 4.0}
    Degrader(network, residual_flow(levels, network.config.compression, blocks=0), levels).save(str(path), {})
    return str(path)


def save_mixed_photos(uri: str) -> str:
    """Small photographs, some of real size, and the files of BAD."""
    place, draw = Place(uri), np.random.default_rng(0)
    for number in range(SMALL):
        pixels = draw.integers(0, 256, (24 + number % 3 * 8, 32, 3), np.uint8)
        place.write(f"a b/{number % 4}#%20/{number:03d}.png", images.encode_png(pixels))
    buffer = io.BytesIO()
    for number, (width, height) in enumerate(SIZES):
        coarse = Image.fromarray(draw.integers(0, 256, (height // 50, width // 50, 3), np.uint8))
        buffer = io.BytesIO()
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=92)
        place.write(f"a b/{number}#%20/large.jpg", buffer.getvalue())
    contents = (b"", b"<!DOCTYPE html><html>403</html>", buffer.getvalue()[:900])
    for name, data in zip(BAD, contents, strict=True):
        place.write(name, data)
    return uri


def drive() -> None:
    """The job, in a Ray whose workers run `tests.hooks.stress`."""
    ray.init(
        "local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"worker_process_setup_hook": "tests.hooks.stress"},
    )
    synthesize(load(SynthesizeConfig, sys.argv[2:]))


@dataclass
class Driver:
    """A driver, and how to start it again."""

    words: list[str]
    environment: dict[str, str]
    process: subprocess.Popen | None = None
    errors: Path = Path(os.devnull)

    def start(self) -> None:
        command = [sys.executable, __file__, "drive", *self.words]
        with self.errors.open("ab") as file:
            self.process = subprocess.Popen(
                command, env=os.environ | self.environment, stdout=subprocess.DEVNULL, stderr=file
            )

    def code(self) -> int | None:
        return self.process.poll() if self.process else None

    def kill(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()

    def workers(self) -> list[int]:
        """The processes of its Ray's workers."""
        mark, found = f"DEGFLOW_STRESS={self.environment['DEGFLOW_STRESS']}\0", []
        for entry in Path("/proc").iterdir():
            try:
                title = (entry / "cmdline").read_bytes()
                named = title.startswith(b"ray::") and not title.startswith(AGENTS)
                if named and mark.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except (OSError, ValueError):
                continue
        return found

    def last_words(self) -> str:
        return (self.errors.read_text(errors="replace").strip().splitlines() or ["nothing said"])[-1][:200]


@dataclass
class Round:
    """One dataset, and all that happens to it."""

    number: int
    server: S3Server
    photos: str
    model: str
    folder: Path
    draw: random.Random
    met: Counter = field(default_factory=Counter)

    def make(self) -> str:
        """Make the dataset; returns its URI."""
        output, log = self.server.uri("round"), self.folder / f"errors{self.number}"
        with proxying(self.server.endpoint, rate=FAULTS, seed=self.number) as (proxy, endpoint):
            kinds = (USUAL, OTHER) if self.number % 2 else (USUAL,)
            drivers = [self._driver(n, kind, output, endpoint, log) for n, kind in enumerate(kinds)]
            self.met["drivers"] += len(drivers)
            for driver in drivers:
                driver.start()
            throttling = threading.Thread(target=self._throttle, args=(proxy,))
            throttling.start()
            try:
                self._attack(drivers, proxy)
                self._end(drivers)
            finally:
                for driver in drivers:
                    driver.kill()
            throttling.join()
        self.met.update({f"request: {kind}": count for kind, count in proxy.met.items() if kind != "none"})
        if log.exists():
            self.met.update(f"error: {line}" for line in log.read_text().splitlines())
        return output

    def _driver(self, n, kind, output, endpoint, log) -> Driver:
        level, threads = kind
        words = [f"input={self.photos}", f"output={output}", f"model={self.model}", *WORDS, f"actors.threads={threads}"]
        environment = {
            "AWS_ENDPOINT_URL": endpoint,
            "DEGFLOW_STRESS": f"{self.number}-{n}",
            "DEGFLOW_STRESS_RATE": str(ERRORS),
            "DEGFLOW_STRESS_LOG": str(log),
            "DEGFLOW_STRESS_PNG": level,
            "PYTHONPATH": str(ROOT),  # of workers too, for the hook
        }
        return Driver(words, environment, errors=self.folder / f"stderr{self.number}-{n}")

    def _throttle(self, proxy) -> None:
        """In two of three rounds the store throttles all photographs for a while, but no longer than a job waits."""
        time.sleep(self.draw.uniform(5, 20))
        if self.number % 3:
            proxy.throttled = "/" + self.photos.removeprefix("s3://")
            time.sleep(self.draw.uniform(5, 15))
            proxy.throttled = None

    def _attack(self, drivers, proxy) -> None:
        """Kill what the dice say, each time after some more requests: so a kill comes in the midst of the work."""
        for _ in range(self.draw.randint(1, 4)):
            until, deadline = proxy.met.total() + self.draw.randint(1, 60), time.monotonic() + 60
            while proxy.met.total() < until and time.monotonic() < deadline:
                time.sleep(0.02)
            victim = self.draw.choice(drivers)
            kind = self.draw.choice(("driver", "worker", "worker", "store"))
            if all(driver.code() == 0 for driver in drivers):
                return
            if kind == "store":
                self.server.kill()
                time.sleep(self.draw.uniform(0, 2))
                self.server.start()
            elif kind == "driver":
                victim.kill()
                victim.start()
                self.met["restarts"] += 1
            elif workers := victim.workers():
                os.kill(self.draw.choice(workers), signal.SIGKILL)
            else:
                continue
            self.met[f"kill: {kind}"] += 1

    def _end(self, drivers) -> None:
        """Start each driver until it exits with 0."""
        deadline = time.monotonic() + PATIENCE
        while any(driver.code() != 0 for driver in drivers):
            assert time.monotonic() < deadline, f"round {self.number} does not finish"
            for driver in drivers:
                if driver.code():
                    print(f"  round {self.number}: exit code {driver.code()}: {driver.last_words()}", flush=True)
                    self.met["restarts"] += 1
                    driver.start()
            time.sleep(0.2)


def told(row):
    """What must be equal in a row, and its LR pixels."""
    pixels = images.decode(row["lr"]["bytes"])
    assert pixels.shape[:2] == (row["height"], row["width"])
    hr = hash(images.decode(row["hr"]["bytes"]).tobytes())
    return (row["scale"], row["time"], row["noise_seed"], row["hr_sha256"], hr, row["model_sha256"]), pixels


def differences(output: str, reference: dict) -> list[str]:
    """How a dataset differs from the rows of the uninterrupted one; `rows_of` has asserted what is true of any."""
    try:
        found = rows_of(output, told)
    except AssertionError as error:
        return [f"not whole: {error}"]
    said = [f"missing {key}" for key in reference.keys() - found.keys()]
    said += [f"too many {key}" for key in found.keys() - reference.keys()]
    for key in reference.keys() & found.keys():
        (row, pixels), (wanted, expected) = found[key], reference[key]
        if row != wanted:
            said.append(f"another row {key}")
        elif np.abs(pixels.astype(np.int16) - expected).max() > 1:
            said.append(f"other pixels {key}")
    place = Place(output)
    rejects = pq.read_table(io.BytesIO(place.read("rejects/part-000000.parquet"))).to_pylist()
    if sorted((row["key"], row["stage"]) for row in rejects) != sorted(BAD.items()):
        said.append(f"other rejects {rejects}")
    manifest = pq.read_table(io.BytesIO(place.read("manifest.parquet")))
    if sum(manifest["rejects"].to_pylist()) != len(BAD):
        said.append("other rejects in the manifest")
    return said


def writers_of(output: str) -> Counter:
    """How many shards each PNG level has."""
    place, levels = Place(output), Counter()
    for file in data_files(place):
        table = pq.read_table(io.BytesIO(place.read(file.key)), columns=["lr"])
        found = {LEVELS[row["bytes"][41:43]] for row in table["lr"].to_pylist()}
        levels.update(f"shards at PNG level {level}" for level in found)
    return levels


def main(rounds: int, seed: int) -> None:
    totals, good, started = Counter(), 0, time.monotonic()
    with tempfile.TemporaryDirectory() as name, serving(Path(name) / "s3") as server:
        folder = Path(name)
        model, photos = save_fast_model(folder / "fast.safetensors"), save_mixed_photos(server.uri("photos"))
        output = server.uri("reference")
        torch.set_num_threads(1)
        synthesize_here(photos, output, model, *WORDS, "actors.threads=1")
        reference = rows_of(output, told)
        assert len(reference) == 2 * (SMALL + len(SIZES))
        for number in range(1, rounds + 1):
            begun = time.monotonic()
            this = Round(number, server, photos, model, folder, random.Random(f"{seed} {number}"))
            output = this.make()
            wrong = differences(output, reference)
            this.met.update({} if wrong else writers_of(output))
            good, totals = good + (not wrong), totals + this.met
            outcome = "; ".join(wrong[:5]) if wrong else "the same dataset"
            print(f"round {number}, {time.monotonic() - begun:.0f} s: {outcome}; {_line(this.met)}", flush=True)
    print(f"{good} of {rounds} rounds ended in the same {len(reference)} rows, {time.monotonic() - started:.0f} s")
    print(f"in all: {_line(totals)}", flush=True)
    sys.exit(good != rounds)


def _line(met: Counter) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(met.items()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["drive"]:
        drive()
    else:
        main(*([int(word) for word in sys.argv[1:]] + [10, 0][len(sys.argv) - 1 :])[:2])
