"""Large runs: planning many photographs, and finding out which of many shards are done."""

import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from degflow.benchmarking.measure import Table, run_process
from degflow.config import load
from degflow.dataset.writer import ShardWriter
from degflow.degrader import Degrader
from degflow.storage import Place
from degflow.synthesis.run import Run
from degflow.synthesis.settings import SynthesizeConfig
from degflow.synthesis.state import State

GOAL = 40_000  # shards
_BYTES = 100_000  # of a part: more than are read of its end
_WRITERS = 16

_PLAN = """
import sys, time
from degflow.benchmarking.measure import forget_peak, peak
from degflow.config import load
from degflow.synthesis.run import synthesize
from degflow.synthesis.settings import SynthesizeConfig
config = load(SynthesizeConfig, sys.argv[1:])
before, begun = forget_peak("cpu"), time.perf_counter()
synthesize(config)
print(time.perf_counter() - begun, peak("cpu") - before, peak("cpu"))
"""


def inventory(path: Path, keys: int) -> str:
    """An inventory of photographs that are not there."""
    names = [f"photographs/{n // 1000:05d}/{n:08d}.jpg" for n in range(keys)]
    table = pa.table(
        {"key": names, "size": [4_000_000 + n for n in range(keys)], "etag": [f"{n:032x}" for n in range(keys)]}
    )
    pq.write_table(table, path)
    return str(path)


def planning(keys: int) -> Table:
    """Seconds and memory of a dry run with an inventory of so many keys, in its own process."""
    with tempfile.TemporaryDirectory() as folder:
        words = [f"input={inventory(Path(folder, 'keys.parquet'), keys)}", f"output={folder}/out", "dry_run=true"]
        said = run_process([sys.executable, "-c", _PLAN, *words])
    seconds, above, whole = map(float, said.splitlines()[-1].split())
    about = (
        "`synthesize input=keys.parquet dry_run=true`, without Python's imports: reading the inventory, checking it, "
        "sorting it, dividing it into shards. Peak above the process's memory before."
    )
    row = (f"{keys:,}", f"{seconds:.1f}", f"{above / 1e6:.0f}", f"{whole / 1e6:.0f}")
    return Table("Planning", about, ("keys", "s", "peak MB", "whole process MB"), [row])


def recognising(degrader: Degrader, output: str, shards: int) -> Table:
    """Seconds in which a restart finds out which shards are done: on a local disk, and on `output` if that is a store.

    Args:
        degrader: on the CPU. output: of the benchmark; the parts lie below it for a while.
        shards: parts that are there.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        keys = inventory(Path(folder, "keys.parquet"), shards)
        places = {"local disk": Place(f"{folder}/out")}
        if not Place(output).local:
            places[output.partition("://")[0]] = Place(f"{output}/shards")
        for name, place in places.items():
            try:
                seconds, cpu, overwriting = _recognised(degrader, keys, place, shards)
            finally:
                place.delete("")
            goals = (f"{spent * GOAL / shards:.0f}" for spent in (seconds, overwriting))
            rows.append((name, f"{shards:,}", f"{seconds:.2f}", f"{1e3 * cpu / shards:.2f}", *goals))
    about = (
        f"A restart lists `data/` and reads the end of each part; here parts have {_BYTES / 1e3:.0f} kB. "
        "`overwrite=true` deletes them. The last two columns are EXTRAPOLATED from the number of shards that was "
        "measured."
    )
    header = ("on", "shards", "s", "CPU ms per shard", f"s for {GOAL:,}", f"s to overwrite {GOAL:,}")
    return Table("Finding finished shards", about, header, rows)


def _recognised(degrader: Degrader, keys: str, place: Place, shards: int) -> tuple[float, float, float]:
    """Seconds, CPU seconds of this process, and seconds to overwrite."""
    config = load(SynthesizeConfig, [f"input={keys}", f"output={place.uri}", "shard.images=1"])
    run = Run(config, degrader)
    run.plan()
    run.claim()
    _put_parts(run, place, shards)
    begun, cpu = time.perf_counter(), time.process_time()
    state = State(place, run.recipe)
    state.read()
    spent = time.perf_counter() - begun, time.process_time() - cpu
    assert len(state.done) == shards, f"{len(state.done)} of {shards} shards found"
    again = Run(replace(config, overwrite=True), degrader)
    again.plan()
    begun = time.perf_counter()
    again.claim()
    return *spent, time.perf_counter() - begun


def _put_parts(run: Run, place: Place, shards: int) -> None:
    """Parts of one row with the size of `_BYTES`; the row's images are no images."""

    def put(number: int) -> None:
        with ShardWriter(place, number, run.recipe.digest(run.state.plan[number])) as writer:
            writer.add([{"key": str(number), "draw": 0, "lr": {"bytes": bytes(_BYTES)}, "hr": {"bytes": b""}}])
            writer.finish(0.0, None, None, None)

    with ThreadPoolExecutor(_WRITERS) as pool:
        list(pool.map(put, range(shards)))
