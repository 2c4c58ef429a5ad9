"""Degraders and datasets on the Hugging Face Hub, read by the Hub's own client from a stand-in on this machine."""

import json
import os
import re
import subprocess
import sys
import threading
import tomllib
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from degflow import __version__
from degflow.dataset.card import card
from tests import ROOT
from tests.sources import save_model

DatasetCard = pytest.importorskip("huggingface_hub").DatasetCard
READ = """
import sys
from degflow import Degrader
for uri in sys.argv[1:]:
    try:
        print(Degrader.load(uri).sha256)
    except ValueError as error:
        print(error)
"""


@contextmanager
def hub(files):
    """Serve the files (path -> bytes) of the model repository user/repo by the routes that the client uses."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.partition("?")[0].removeprefix("/api/models/user/repo")
            if path in ("", "/revision/main"):
                self.answer(json.dumps({"id": "user/repo", "sha": "0" * 40, "siblings": []}).encode())
            elif path in ("/tree/main", "/tree/main/"):
                entries = [{"type": "file", "path": name, "size": len(files[name]), "oid": "0" * 40} for name in files]
                self.answer(json.dumps(entries).encode())
            elif (name := path.removeprefix("/user/repo/resolve/main/")) in files:
                self.answer(files[name])
            else:
                self.answer(b"{}", 404, {"X-Error-Code": "RepoNotFound"})

        do_HEAD = do_GET

        def answer(self, data, status=200, headers=()):
            first, last = 0, len(data) - 1
            if (wanted := self.headers.get("Range")) and status == 200:
                first, last = (int(end) for end in wanted.removeprefix("bytes=").split("-"))
                status, headers = 206, {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
            self.send_response(status)
            for name, value in dict(headers).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(last - first + 1))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data[first : last + 1])

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


def test_a_degrader_is_loaded_from_a_repository_and_what_is_not_there_is_named(tmp_path):
    data = Path(save_model(tmp_path / "d.safetensors")).read_bytes()
    there = ["hf://user/repo/degrader.safetensors", "hf://user/repo@main/degrader.safetensors"]
    missing = ["hf://user/repo/none.safetensors", "hf://user/none/degrader.safetensors", "hf://user/repo/README.md"]
    with hub({"degrader.safetensors": data, "README.md": b"a card"}) as endpoint:
        environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-c", READ, *there, *missing]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[:2] == [sha256(data).hexdigest()] * 2
    assert said[2:4] == [f"{uri}: no such file" for uri in missing[:2]]
    assert said[4].startswith(f"{missing[2]}: not a degflow checkpoint")


def test_the_hub_s_client_finds_the_rows_named_in_a_dataset_s_card():
    recipe = {"scale": {"per_image": 4}, "hr": "embed", "codec": "png", "size": "same", "seed": 0}
    recipe["model_sha256"] = "0" * 64
    text = card({}, 0, recipe, "uniform in [1, 4]")
    data = DatasetCard(text).data.to_dict()
    assert data["configs"] == [{"config_name": "default", "data_files": "data/*.parquet"}]
    assert (data["license"], data["size_categories"]) == ("other", ["n<1K"])


def test_the_citation_is_that_of_the_readme():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"] | {"version": __version__}
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    for here, there in (("title", "name"), ("version", "version"), ("license", "license")):
        assert cited[here] == project[there]
    paper, readme = cited["preferred-citation"], (ROOT / "README.md").read_text()
    names = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
    for field, value in (("title", paper["title"]), ("author", names), ("year", paper["year"])):
        assert re.search(rf"{field} += \{{{re.escape(str(value))}\}}", readme), field
