import functools
import os
import shutil
import tempfile
from typing import Any

import pytest
import torch

from tests import s3 as server
from tests.forks import forking

# Tests of one group run one after another in one process of pytest-xdist. The groups below come first, for they take
# longest. Every other file is a group of its own, so that its fixtures are made once.
GROUPS = {
    "slurm": ("tests/cluster/test_slurm.py",),  # it has nodes with networks of their own
    "pool": (  # they share one Ray
        "tests/synthesis/test_pool.py",
        "tests/synthesis/test_cluster.py",
        "tests/synthesis/test_tasks.py",
        "tests/synthesis/test_metrics.py",
    ),
    "runs": (  # they share another one
        "tests/synthesis/test_storms.py",
        "tests/synthesis/test_run.py",
        "tests/synthesis/test_oddities.py",
    ),
    "jobs": (  # commands that start a Ray of their own
        "tests/cluster/test_ray.py",
        "tests/benchmarking/test_benchmark.py",
        "tests/protocol/test_protocol.py",
        "tests/test_wheel.py",
        "tests/test_docs.py",
    ),
    "processes": (  # trainings of several processes, whose launchers open ports
        "tests/training/test_launch.py",
        "tests/training/test_jobs.py",
        "tests/training/test_residual.py",
        "tests/training/test_loop.py",
    ),
    "networks": (  # compilations and large images
        "tests/test_degrader.py",
        "tests/test_shipped.py",
        "tests/test_tiling.py",
    ),
}
ORDER = {file: (group, place) for group, files in enumerate(GROUPS.values()) for place, file in enumerate(files)}


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Give each process of pytest-xdist a folder of Ray's, so that no process finds the Ray of another."""
    if os.environ.get("PYTEST_XDIST_WORKER"):
        above = os.environ.get("RAY_TMPDIR", "/tmp")  # short, for sockets
        os.environ["RAY_TMPDIR"] = folder = tempfile.mkdtemp(prefix="degflow-", dir=above)
        config.add_cleanup(functools.partial(shutil.rmtree, folder, ignore_errors=True))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where the tests of numerics compute")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device of --device; without it on this machine, the test is skipped and counted as such."""
    device = torch.device(request.config.getoption("--device"))
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("--device cuda: this machine has no such device")
    return device


@pytest.fixture(scope="session")
def s3(tmp_path_factory):
    """A real S3 server that this process's environment points to; see tests/s3.py."""
    with server.serving(tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture(scope="session")
def forks():
    """Runs programs in processes that have imported torch already; see tests/forks.py."""
    with forking() as run:
        yield run


@pytest.fixture(scope="module")
def one_thread():
    """One CPU thread, so that results are equal bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def group_of(nodeid: str) -> str:
    """The group of a test: one of GROUPS, or its file."""
    file = nodeid.partition("::")[0]
    return next((group for group, files in GROUPS.items() if file in files), file)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long groups first, so that no process is left with one of them at the end."""
    # In a group, tests that need a Ray of their own come last: the shared one is stopped for them.
    places = {item: ORDER.get(item.nodeid.partition("::")[0], (len(GROUPS), 0)) for item in items}
    items.sort(key=lambda item: (places[item][0], item.get_closest_marker("own_ray") is not None, places[item][1]))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each process a whole group at a time.

    `--dist loadgroup` would do this too, but drops the groups silently with pytest 9.2 and pytest-xdist 3.8.
    """
    from xdist.scheduler import LoadScopeScheduling

    class GroupScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return GroupScheduling(config, log)
