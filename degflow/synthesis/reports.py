"""Reports: what actors say of the shards that they make, and what it adds up to.

A report is a row of Ray Data: the shard's number, its images and rejects since the report before, and texts. `record`
is JSON, and empty but in the last report of a shard. `failure` says why an attempt failed, `withheld` that the store
did not give a photograph, and `fatal` that storage failed; the last two are not the shard's fault. `host` is the
machine of a failure, and `node` Ray's name for it.
"""

import contextlib
import json
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import Any

import ray
from ray.experimental import internal_kv
from tqdm import tqdm

from degflow.config import Unfinished
from degflow.dataset.layout import Record
from degflow.synthesis.metrics import DriverMetrics
from degflow.synthesis.shard import Progress

ATTEMPTS = 3  # of a shard
HOPELESS = 10  # failures end the run as long as no shard is made
JUDGED = 200  # images in made shards, after which a run ends if most of them are rejects
REPORTS = 10  # a second, from all actors of a run; Ray Data keeps 0.7 kB of each, so 0.6 GB a day
BROKE = "as the pool of actors broke: "  # begins the reason of a failure of the whole pool
SEEN = 3  # machines that fail before a run without a made shard ends, if the pool may have so many


def row(
    shard: int = -1,
    images: int = 0,
    rejects: int = 0,
    *,
    record: Record | None = None,
    failure: str = "",
    fatal: str = "",
    withheld: str = "",
    host: str = "",
) -> dict[str, Any]:
    """A report of this machine, or of another `host`; a shard of -1 stands for the whole pool."""
    return {
        "shard": shard,
        "images": images,
        "rejects": rejects,
        "record": json.dumps(asdict(record)) if record else "",
        "failure": failure,
        "fatal": fatal,
        "withheld": withheld,
        "host": host or (socket.gethostname() if failure or fatal else ""),
        "node": ray.get_runtime_context().get_node_id() if failure and ray.is_initialized() else "",
    }


def columns(shard: int, *counts: int, **more: Any) -> dict[str, list[Any]]:
    """The same as a batch of one row; arguments as `row`."""
    return {name: [value] for name, value in row(shard, *counts, **more).items()}


def seldom(reports: Iterable[Progress], seconds: float) -> Iterator[Progress]:
    """Sums of the reports over `seconds`: each report costs an actor some 2 ms, and the driver some 4."""
    images, rejects, begun = 0, 0, time.monotonic()
    for report in reports:
        images, rejects = images + report.images, rejects + report.rejects
        if report.record or time.monotonic() - begun >= seconds:
            yield Progress(images, rejects, report.record)
            images, rejects, begun = 0, 0, time.monotonic()


def between_reports(most: int, gpus: int, threads: int) -> float:
    """Seconds between two reports of an actor: 1, or more if the run may have, and the cluster holds, many actors."""
    kind, each = ("GPU", gpus) if gpus else ("CPU", threads)
    try:
        room = ray.cluster_resources().get(kind, 0) / each
    except Exception:  # Ray's head may be away for a moment, and an actor need not wait for it
        room = 0
    return max(1.0, min(most, room) / REPORTS)


def note_failure(run: ray.ObjectRef, number: int, *, failure: str = "", withheld: str = "") -> None:
    """Note in Ray why a repeated call made no shard: of its reports Ray drops as many as the first call has made.

    Args:
        run: the reference of its maker.
        number: of the shard.
        failure, withheld: of the report, one of them.
    """
    text = json.dumps(row(number, failure=failure, withheld=withheld))
    with contextlib.suppress(Exception):  # the report may come through all the same
        internal_kv._internal_kv_put(f"degflow failed {run.hex()} {number}".encode(), text.encode())


def noted_failure(run: ray.ObjectRef, number: int) -> dict[str, Any] | None:
    """The report that `note_failure` left, if there is one; it is taken away."""
    key = f"degflow failed {run.hex()} {number}".encode()
    text = internal_kv._internal_kv_get(key)
    internal_kv._internal_kv_del(key)
    return json.loads(text) if text else None


class Count:
    """What the reports of a run add up to.

    Args:
        bar: shows the images.
        shards: of the run.
        price: of an hour of an actor; 0: unknown.
        metrics: show the numbers of shards.
        machines: tells on how many machines the pool's actors may be.
    """

    def __init__(
        self,
        bar: tqdm,
        shards: int,
        price: float = 0.0,
        metrics: DriverMetrics | None = None,
        machines: Callable[[], int] = lambda: 1,
    ):
        self.bar, self.shards, self.price, self.metrics, self.machines = bar, shards, price, metrics, machines
        self.seconds = 0.0  # of actors, for the shards that are made
        self.open: dict[int, Counter[str]] = {}  # images and rejects of each shard that is being made
        self.whole: Counter[str] = Counter()  # of all shards that are made
        self.rejects = 0
        self.failures: dict[int, list[str]] = {}
        self.failing: set[str] = set()  # machines
        self.without_storage: set[str] = set()  # machines
        self.storage_failures = 0  # since the last shard was made
        self.made: set[int] = set()
        self.failed: set[int] = set()  # in this round
        self.spared: dict[int, str] = {}  # shards of this round that storage failed, and why
        self.withheld: Counter[int] = Counter()  # attempts of shards, given up because the store withheld a photograph
        self.waiting: set[int] = set()  # such shards of this round
        self.fruitful = False  # whether this round made a shard
        self.broke = "on an unknown machine: no report came back"

    def take(self, report: dict[str, Any]) -> None:
        """Count one report.

        Raises:
            OSError, ValueError, Unfinished: see `pool.Pool.make`.
        """
        number, place = report["shard"], f"on {report['host']}: "
        if report["fatal"]:
            self._without_storage(number, place + report["fatal"], report["host"])
            return
        if report["failure"]:
            self._failed(number, (place if number >= 0 else "") + report["failure"], report["node"])
            return
        if report["withheld"]:
            self._take_back(number)
            self.withheld[number] += 1
            self.waiting.add(number)
            self.bar.write(f"shard {number} comes again later: {report['withheld']}")
            return
        shard = self.open.setdefault(number, Counter())
        shard.update(images=report["images"], rejects=report["rejects"])
        self.rejects += report["rejects"]
        if report["record"]:
            record = Record(**json.loads(report["record"]))
            self.made.add(number)
            self.fruitful, self.storage_failures = True, 0
            self.without_storage.clear()
            self.whole.update(self.open.pop(number))
            self.seconds += record.seconds
            self.bar.write(_log_line(record))
            self._show()
            self._judge()
        self.bar.set_postfix({"rejects": self.rejects, **self._cost()}, refresh=False)
        self.bar.update(report["images"])

    def _cost(self) -> dict[str, str]:
        """What the made shards cost, and by them all images of the run; nothing before the first one."""
        if not self.price or not self.whole["images"]:
            return {}
        cost = self.price * self.seconds / 3600
        total = cost * (self.bar.total or 0) / self.whole["images"]
        return {"cost": f"{cost:.2f}", "in all": f"{total:.2f}"}

    def _show(self) -> None:
        if self.metrics:
            aside = sum(len(texts) >= ATTEMPTS for number, texts in self.failures.items() if number not in self.made)
            self.metrics.show(self.shards - len(self.made) - aside, aside)

    def _judge(self) -> None:
        """End a run that mostly makes rejects. Shards that are made count alone: their rejects can be read."""
        images, rejects = self.whole["images"], self.whole["rejects"]
        if images >= JUDGED and rejects > images / 2:
            raise ValueError(f"{rejects} of the first {images} images were rejected; the rejects folder says why")

    def _without_storage(self, number: int, why: str, host: str) -> None:
        """End a run whose storage has failed, unless that may be the trouble of one machine, and others go on."""
        self.without_storage.add(host)
        self.storage_failures += 1
        alone = len(self.without_storage) == 1 and self.machines() > 1
        if not self.made or not alone or self.storage_failures >= HOPELESS:
            raise OSError(why)
        self._take_back(number)
        self.spared[number] = why
        self.bar.write(f"shard {number} comes again later: {why.strip().splitlines()[-1]}")

    def _take_back(self, number: int) -> None:
        """Forget what was reported of a shard that comes again."""
        lost = self.open.pop(number, Counter())
        self.bar.update(-lost["images"])
        self.rejects -= lost["rejects"]

    def _failed(self, number: int, why: str, node: str = "") -> None:
        if number < 0:
            self.broke = why
            self.bar.write(f"the pool of actors broke: {_last_line(why)}")
            return
        self._take_back(number)
        self.failed.add(number)
        times = self.failures.setdefault(number, [])
        times.append(why)
        last = why.strip().splitlines()[-1]
        self.bar.write(f"shard {number} failed {why.partition(':')[0]}, attempt {len(times)} of {ATTEMPTS}: {last}")
        self.failing |= {node} - {""}
        hopeless = not self.made and sum(map(len, self.failures.values())) >= HOPELESS
        if hopeless and len(self.failing) >= min(SEEN, self.machines()):
            raise Unfinished(f"{HOPELESS} attempts failed and no shard was made; the last one {why}")

    def _failed_together(self, shards: list[int]) -> None:
        """Count a failure of each, and say it once: these may be thousands."""
        for number in shards:
            self.failures.setdefault(number, []).append(self.spared.get(number, self.broke))
        if shards:
            last = _last_line(self.failures[shards[0]][-1])
            again = sum(len(self.failures[number]) < ATTEMPTS for number in shards)
            self.bar.write(f"no shard was made; {again} of {len(shards)} shards come again: {last}")

    def is_last(self, number: int) -> bool:
        """Whether the next attempt of a shard is its last one."""
        return len(self.failures.get(number, [])) == ATTEMPTS - 1

    def is_resigned(self, number: int) -> bool:
        """Whether the next attempt of a shard does without photographs that the store withholds."""
        return self.is_last(number) or self.withheld[number] >= ATTEMPTS - 1

    def silent(self, tried: list[int]) -> list[int]:
        """The shards of the last round that were not made, and of which no report says why."""
        told = self.made | self.failed | self.waiting | self.spared.keys()
        return [number for number in tried if number not in told]

    def to_repeat(self, tried: list[int]) -> list[int]:
        """The shards of the last round that are to be tried again."""
        left = [number for number in tried if number not in self.made]
        for number in left:
            self._take_back(number)
        if not self.fruitful:  # else the pool broke at some shard, which nobody knows, or a machine had no storage
            self._failed_together([number for number in left if number not in self.failed | self.waiting])
        self.failed, self.waiting, self.spared, self.fruitful = set(), set(), {}, False
        self._show()
        return [number for number in left if len(self.failures.get(number, [])) < ATTEMPTS]

    def check(self) -> None:
        """Raise an `Unfinished` that names the shards that were set aside, if there are any."""
        aside = {number: texts for number, texts in self.failures.items() if number not in self.made}
        if aside:
            names = ", ".join(str(number) for number in sorted(aside)[:10]) + (", ..." if len(aside) > 10 else "")
            raise Unfinished(
                f"{len(aside)} of {self.shards} shards were set aside after {ATTEMPTS} failures each (shards {names}). "
                f"All others are made; the same command tries these again. The last failure, {aside[max(aside)][-1]}"
            )


def _last_line(why: str) -> str:
    return why.strip().splitlines()[-1].removeprefix(BROKE)


def _log_line(record: Record) -> str:
    quality = "" if record.psnr is None else f", LR at {record.psnr:.2f} dB"
    size = f"{record.bytes / 1e6:.1f} MB"
    return f"{record.part}: {record.rows} rows, {record.rejects} rejects, {size}, {record.seconds:.1f} s{quality}"
