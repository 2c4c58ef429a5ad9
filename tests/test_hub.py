"""Degraders and datasets on the Hugging Face Hub: the Hub's own client, and a stand-in of the Hub on this machine."""

import base64
import json
import re
import threading
import tomllib
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from degflow import Degrader, __version__
from degflow.dataset.card import card
from tests import ROOT
from tests.sources import save_model

DatasetCard, ModelCard = (
    getattr(pytest.importorskip("huggingface_hub"), name) for name in ("DatasetCard", "ModelCard")
)
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
def hub(files, public=False):
    """The model repository user/repo with these files (path -> bytes), by the routes that the client uses.

    Private, unless `public`.

    Whoever writes needs the token hf_writes. Beside the endpoint stands a list of what new repositories were asked for.
    """
    asked: list[dict[str, object]] = []
    blobs: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.partition("?")[0].removeprefix("/api/models/user/repo")
            if path in ("", "/revision/main"):
                self.answer(
                    json.dumps({"id": "user/repo", "sha": "0" * 40, "siblings": [], "private": not public}).encode()
                )
            elif path in ("/tree/main", "/tree/main/"):
                entries = [{"type": "file", "path": name, "size": len(files[name]), "oid": "0" * 40} for name in files]
                self.answer(json.dumps(entries).encode())
            elif (name := path.removeprefix("/user/repo/resolve/main/")) in files:
                self.answer(files[name])
            else:
                self.answer(b"{}", 404, {"X-Error-Code": "RepoNotFound"})

        do_HEAD = do_GET

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Authorization") != "Bearer hf_writes":
                self.answer(json.dumps({"error": "Invalid credentials"}).encode(), 401)
            elif self.path == "/api/repos/create":
                asked.append(json.loads(body))
                self.answer(json.dumps({"url": f"http://{self.headers['Host']}/user/repo"}).encode())
            elif self.path == "/api/validate-yaml":
                self.answer(json.dumps({"errors": [], "warnings": []}).encode())
            elif self.path == "/api/models/user/repo/preupload/main":
                large = [(file["path"], file["path"].endswith("safetensors")) for file in json.loads(body)["files"]]
                modes = [
                    {"path": p, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False} for p, lfs in large
                ]
                self.answer(json.dumps({"files": modes}).encode())
            elif self.path == "/user/repo.git/info/lfs/objects/batch":
                put = {"upload": {"href": f"http://{self.headers['Host']}/lfs"}}
                objects = [one | {"authenticated": True, "actions": put} for one in json.loads(body)["objects"]]
                self.answer(json.dumps({"transfer": "basic", "objects": objects}).encode())
            elif self.path == "/api/models/user/repo/commit/main":
                for line in map(json.loads, body.splitlines()):
                    about = line["value"]
                    if line["key"] == "file":
                        files[about["path"]] = base64.b64decode(about["content"])
                    if line["key"] == "lfsFile":
                        assert sha256(blobs[-1]).hexdigest() == about["oid"]
                        files[about["path"]] = blobs[-1]
                url = f"http://{self.headers['Host']}/user/repo/commit/{'1' * 40}"
                self.answer(json.dumps({"commitUrl": url, "commitOid": "1" * 40, "success": True}).encode())
            else:
                self.answer(b"{}", 404)

        def do_PUT(self):
            blobs.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.answer(b"")

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
            if self.command != "HEAD":
                self.wfile.write(data[first : last + 1])

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()


@pytest.fixture
def at_hub(forks, tmp_path):
    """Runs a Python program whose Hub is the stand-in."""

    def run(endpoint, program, *arguments, token=""):
        variables = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
        variables |= {"HF_TOKEN": token} if token else {}
        return forks(program, arguments, **variables)[0]

    return run


def test_a_degrader_is_loaded_from_a_repository_and_what_is_not_there_is_named(at_hub, tmp_path):
    data = Path(save_model(tmp_path / "d.safetensors")).read_bytes()
    there = ["hf://user/repo/degrader.safetensors", "hf://user/repo@main/degrader.safetensors"]
    missing = ["hf://user/repo/none.safetensors", "hf://user/none/degrader.safetensors", "hf://user/repo/README.md"]
    with hub({"degrader.safetensors": data, "README.md": b"a card"}) as (endpoint, _):
        done = at_hub(endpoint, READ, *there, *missing)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[:2] == [sha256(data).hexdigest()] * 2
    assert said[2:4] == [f"{uri}: no such file" for uri in missing[:2]]
    assert said[4].startswith(f"{missing[2]}: not a degflow checkpoint")


PUSH = """
import sys
from degflow import Degrader
file, repo = sys.argv[1:]
try:
    uri = Degrader.load(file).push_to_hub(repo, private=True)
    print(uri, Degrader.load(uri).sha256)
except ValueError as error:
    print(error)
"""


def test_a_degrader_is_pushed_with_a_card_and_loaded_again_by_what_push_returns(at_hub, tmp_path):
    file, files = save_model(tmp_path / "d.safetensors"), {}
    with hub(files) as (endpoint, asked):
        done = at_hub(endpoint, PUSH, file, "user/repo", token="hf_writes")
        assert done.returncode == 0, done.stderr
        uri, digest = done.stdout.split()
        assert (uri, files.keys()) == ("hf://user/repo/degrader.safetensors", {"degrader.safetensors", "README.md"})
        assert digest == sha256(files["degrader.safetensors"]).hexdigest() == Degrader.load(file).sha256
        assert asked[0]["name"] == "repo"
        assert "private" in (asked[0].get("visibility"), *(name for name, value in asked[0].items() if value is True))
        text = files["README.md"].decode()
        found = ModelCard(text)
        assert (found.data.library_name, found.data.license) == ("degflow", "other")
        assert f'Degrader.load("{uri}")' in text
        assert digest in text
        files["README.md"] = b"my own words"
        assert at_hub(endpoint, PUSH, file, "user/repo", token="hf_writes").returncode == 0
        assert files["README.md"] == b"my own words"


@pytest.mark.parametrize(
    ("repo", "token", "said"),
    [
        ("user/repo", "hf_secret", r"user/repo: not uploaded: .*401.*; is HF_TOKEN set, with write access\?$"),
        ("not a name", "hf_secret", r"not a name: not uploaded: Repo id must .*"),
    ],
)
def test_a_refused_push_says_why_without_the_token(at_hub, tmp_path, repo, token, said):
    files = {}
    with hub(files) as (endpoint, _):
        done = at_hub(endpoint, PUSH, save_model(tmp_path / "d.safetensors"), repo, token=token)
    assert done.returncode == 0, done.stderr
    assert re.match(said, done.stdout.strip()), done.stdout
    assert token not in done.stdout + done.stderr
    assert not files


def test_nothing_private_is_pushed_into_a_public_repository(at_hub, tmp_path):
    files = {}
    with hub(files, public=True) as (endpoint, _):
        file = save_model(tmp_path / "d.safetensors")
        done = at_hub(endpoint, PUSH, file, "user/repo", token="hf_writes")
    assert done.stdout == "user/repo: not uploaded: private=True, but the repository is there and public\n", done.stderr
    assert not files


def test_a_hub_that_does_not_answer_is_named(at_hub, tmp_path):
    with hub({}) as (endpoint, _):
        pass
    done = at_hub(endpoint, PUSH, save_model(tmp_path / "d.safetensors"), "user/repo", token="hf_writes")
    assert done.stdout.startswith("user/repo: not uploaded: "), done.stdout + done.stderr


def test_the_hub_s_client_finds_the_rows_named_in_a_dataset_s_card():
    recipe = {"scale": {"per_image": 4}, "hr": "embed", "codec": "png", "size": "same", "seed": 0, "spread": 1.0}
    recipe["model_sha256"] = "0" * 64
    text = card({}, 0, recipe, "uniform in [1, 4]", draws=True)
    data = DatasetCard(text).data.to_dict()
    assert data["configs"] == [{"config_name": "default", "data_files": "data/*.parquet"}]
    assert (data["license"], data["size_categories"]) == ("other", ["n<1K"])


@pytest.mark.parametrize(
    ("draws", "spread", "said"),
    [
        (True, 1.0, "with the noise of a camera"),
        (True, 0.0, "the mean of"),
        (False, 1.0, "the latent flow of [DegFlow]"),
    ],
)
def test_a_dataset_s_card_names_the_method_of_its_model(draws, spread, said):
    recipe = {"scale": {"per_image": 4}, "hr": "embed", "codec": "png", "size": "same", "seed": 0, "spread": spread}
    text = card({}, 0, recipe | {"model_sha256": "0"}, "uniform in [1, 4]", draws)
    assert f"made from high-resolution photographs with\n`degflow synthesize`, {'each ' if draws else 'by '}" in text
    assert said in text


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
