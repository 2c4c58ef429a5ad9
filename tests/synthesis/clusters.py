"""Ray for the tests of this room: one on this machine that they share, and clusters of a test's own."""

import time
from contextlib import contextmanager

import ray
from ray.cluster_utils import Cluster


def share_ray() -> None:
    """Start the Ray that tests share, of two CPUs, unless it runs; only after the S3 server, whose address it needs."""
    if not ray.is_initialized():
        often = {"metrics_report_interval_ms": 1000}
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, _system_config=often)


@contextmanager
def own_ray(**options):
    """Another Ray on this machine, while the shared one is stopped."""
    ray.shutdown()
    try:
        ray.init("local", include_dashboard=False, log_to_driver=False, **options)
        yield
    finally:
        ray.shutdown()


@contextmanager
def own_cluster(*nodes, **options):
    """A cluster of a head without CPUs and nodes with these resources; yields it and the nodes."""
    ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        added = [cluster.add_node(**node) for node in nodes]
        ray.init(address=cluster.address, log_to_driver=False, **options)
        yield cluster, added
    finally:
        ray.shutdown()
        cluster.shutdown()


def until(condition):
    """Wait until a condition holds, two minutes at most."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
