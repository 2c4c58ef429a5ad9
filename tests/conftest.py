import pytest
import torch

from tests import s3 as server


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
