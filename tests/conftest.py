import pytest

from tests import s3 as server


@pytest.fixture(scope="session")
def s3(tmp_path_factory):
    """A real S3 server that this process's environment points to; see tests/s3.py."""
    with server.serving(tmp_path_factory.mktemp("s3")) as running:
        yield running
