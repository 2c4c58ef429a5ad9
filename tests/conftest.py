import pytest
import torch

from tests import ROOT
from tests import s3 as server

# Tests of one group run one after another in one process of pytest-xdist. The groups below come first, for they take
# longest. Every other file is a group of its own, so that its fixtures are made once.
GROUPS = {
    "ray": (  # two Rays at a time would share ports, memory and this machine's cores
        "tests/synthesis/test_pool.py",
        "tests/synthesis/test_storms.py",
        "tests/synthesis/test_run.py",
        "tests/synthesis/test_oddities.py",
        "tests/cluster/test_ray.py",
        "tests/benchmarking/test_benchmark.py",
        "tests/protocol/test_protocol.py",
    ),
    "processes": (  # trainings of several processes, whose launchers open ports
        "tests/cluster/test_slurm.py",
        "tests/training/test_launch.py",
        "tests/training/test_jobs.py",
        "tests/training/test_loop.py",
    ),
}
ORDER = {file: (group, place) for group, files in enumerate(GROUPS.values()) for place, file in enumerate(files)}


@pytest.fixture(scope="session")
def s3(tmp_path_factory):
    """A real S3 server that this process's environment points to; see tests/s3.py."""
    with server.serving(tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture(scope="module")
def one_thread():
    """One CPU thread, so that results are equal bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in its own hook of this name
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each test its group, and put the long groups first (`--dist loadgroup --no-loadscope-reorder`)."""
    names = {file: name for name, files in GROUPS.items() for file in files}

    def file_of(item: pytest.Item) -> str:
        return item.path.relative_to(ROOT).as_posix()

    for item in items:
        item.add_marker(pytest.mark.xdist_group(names.get(file_of(item), file_of(item))))
    items.sort(key=lambda item: ORDER.get(file_of(item), (len(GROUPS), 0)))
