import pytest
import ray

from tests.sources import model, photos  # noqa: F401 (fixtures)
from tests.synthesis.clusters import share_ray


@pytest.fixture
def shared_ray(s3):
    """The Ray that tests share; it starts with the environment of the S3 server."""
    share_ray()


@pytest.fixture(scope="package", autouse=True)
def _stop_ray():
    yield
    ray.shutdown()
