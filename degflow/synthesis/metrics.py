"""Figures of a run for dashboards, through Ray: each node's metrics endpoint gives them, with the prefix `ray_`.

`cluster/ray/grafana.json` is a dashboard of them.
"""

import time
from collections.abc import Iterator
from typing import Any

from ray.util import metrics

from degflow.synthesis.shard import Progress, ShardMaker

COUNTERS = {  # of an actor; name -> what `ShardMaker.tally` calls it, and what it is
    "degflow_images": ("images", "images finished, rejects too"),
    "degflow_shards": ("shards", "shards put into the output"),
    "degflow_waiting_seconds": ("waiting", "seconds in which the degrader waited for decoded images"),
    "degflow_device_seconds": ("device", "seconds in the degrader"),
    "degflow_upload_seconds": ("upload", "seconds of putting shards into the output"),
}
REJECTS = "degflow_rejects"  # of an actor, by stage
GAUGES = {  # of the driver
    "degflow_shards_left": "shards that are not made yet",
    "degflow_shards_set_aside": "shards that failed too often and are not tried again",
}


class ActorMetrics:
    """What an actor counts.

    Args:
        output: URI of the dataset; a tag of every figure.
    """

    def __init__(self, output: str):
        self.counters = {
            figure: _tagged(metrics.Counter(name, description, ("output",)), output)
            for name, (figure, description) in COUNTERS.items()
        }
        rejects = metrics.Counter(REJECTS, "files rejected, by stage", ("output", "stage"))
        self.rejects = _tagged(rejects, output)

    def counting(self, maker: ShardMaker, reports: Iterator[Progress]) -> Iterator[Progress]:
        """Pass the reports of `maker.make` on, and count what was done for each of them."""
        started = time.monotonic()
        for report in reports:
            maker.tally["images"] += report.images
            if report.record:  # what came last was the upload alone
                maker.tally["shards"], maker.tally["upload"] = 1, time.monotonic() - started
            self._add(maker.tally)
            maker.tally.clear()
            yield report
            started = time.monotonic()

    def _add(self, tally: dict[str, float]) -> None:
        for figure, amount in tally.items():
            if figure in self.counters and amount > 0:
                self.counters[figure].inc(amount)
            elif figure.startswith("reject "):
                self.rejects.inc(amount, tags={"stage": figure.removeprefix("reject ")})


class DriverMetrics:
    """What the driver of a run shows.

    Args:
        output: as for `ActorMetrics`.
    """

    def __init__(self, output: str):
        self.left, self.aside = (
            _tagged(metrics.Gauge(name, description, ("output",)), output) for name, description in GAUGES.items()
        )

    def show(self, left: int, aside: int) -> None:
        """Set both numbers of shards."""
        self.left.set(left)
        self.aside.set(aside)


def _tagged(metric: Any, output: str) -> Any:
    return metric.set_default_tags({"output": output})
