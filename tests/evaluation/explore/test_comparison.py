"""What the page is sent, and what the server refuses; with small degraders of both kinds and real requests."""

import base64
import http.client
import io
import json
import socket
import threading
import zipfile
from contextlib import contextmanager
from urllib.parse import urlencode

import numpy as np
import pytest
import torch
from PIL import Image

from degflow import Degrader, images
from degflow.capture.filters import blur
from degflow.config import load
from degflow.evaluation import bicubic, psnr
from degflow.evaluation.explore.comparison import MARGIN, Explorer
from degflow.evaluation.explore.run import ExploreConfig, explore
from degflow.evaluation.explore.server import Server
from tests.jobs import run_job
from tests.sources import save_model

skimage = pytest.importorskip("skimage.data")


@pytest.fixture(scope="module", params=[True, False], ids=["draws", "published"])
def degrader(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("explored")
    return Degrader.load(save_model(folder / "model.safetensors", draws=request.param))


@pytest.fixture(scope="module")
def drawing(tmp_path_factory):
    return Degrader.load(save_model(tmp_path_factory.mktemp("drawing") / "model.safetensors", draws=True))


@contextmanager
def serving(degrader, window=64, **options):
    with Server(Explorer(degrader, window, **options), 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield Client(server)
        finally:
            server.shutdown()
            thread.join()


class Client:
    def __init__(self, server):
        self.server, self.port = server, server.server_port

    def ask(self, path, body=None, method=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method or ("POST" if body is not None else "GET"), path, body, headers)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        return answer, data

    def json(self, path, body=None, **headers):
        answer, data = self.ask(path, body, **headers)
        return answer.status, json.loads(data)

    def open(self, picture, name="photo.png"):
        status, told = self.json(f"/photographs?{urlencode({'name': name})}", encoded(picture))
        assert status == 200, told
        return told

    def pictures(self, told, **values):
        status, answer = self.json(f"/pictures?{query(told, **values)}")
        assert status == 200, answer
        return answer | {"pictures": {p["name"]: p | {"pixels": pixels_of(p["png"])} for p in answer["pictures"]}}


def query(told, **values):
    asked = {"photograph": told["identity"], "x": 0, "y": 0, "scale": 2.5, "seed": 3, "spread": 1}
    return urlencode(asked | values)


def encoded(pixels, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def pixels_of(uri):
    assert uri.startswith("data:image/png;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def batch(pixels):
    return images.to_tensor(pixels)[None]


def test_a_small_photograph_is_shown_whole_and_each_picture_is_what_its_caption_says(degrader):
    photo = np.ascontiguousarray(skimage.astronaut()[20:80, :56])
    with serving(degrader) as client:
        answer = client.pictures(client.open(photo), scale=2.5, seed=3, spread=0.5)
    shown, hr = answer["pictures"], batch(photo)
    assert answer["whole"]
    assert answer["window"] == {"left": 0, "top": 0, "width": 56, "height": 60}
    assert np.array_equal(shown["hr"]["pixels"], photo)
    lr = np.asarray(degrader.degrade(Image.fromarray(photo), 2.5, seed=3, spread=0.5))
    assert np.array_equal(shown["lr"]["pixels"], lr)
    assert np.array_equal(shown["bicubic"]["pixels"], images.to_pixels(bicubic(hr, 2.5))[0])
    assert shown["lr"]["psnr"] == round(float(psnr(batch(lr), hr)), 2)
    assert shown["hr"]["psnr"] is None
    assert [len(picture["spectrum"]) for picture in shown.values()] == [24] * 4
    if client.server.explorer.degrader.draws:
        plain = degrader.flow.guide(hr, torch.tensor([2.5]))
        assert "lens" in shown["plain"]["caption"]
    else:
        sigma = float(shown["plain"]["caption"].partition("sigma ")[2].split()[0])
        assert "draws nothing" in shown["lr"]["caption"]
        tried = (max(0.05, sigma - 0.1), sigma, min(2.5, sigma + 0.1))  # no blur is stronger than the scale
        near = {s: float(psnr(blur(hr, s), batch(lr))) for s in tried}
        assert max(near, key=lambda s: near[s]) == sigma
        plain = blur(hr, sigma)
    off = shown["plain"]["pixels"].astype(int) - images.to_pixels(plain)[0]
    assert np.abs(off).max() <= 1  # the caption rounds sigma


def test_of_a_large_photograph_the_window_around_the_chosen_point_is_shown(drawing):
    photo = skimage.coffee()[:300, :400]
    with serving(drawing, 64) as client:
        told = client.open(photo)
        middle = client.pictures(told, x=200, y=151)
        corner = client.pictures(told, x=1e9, y=-5)
    assert (told["width"], told["height"]) == (400, 300)
    assert not middle["whole"]
    window = middle["window"]
    assert window == {"left": 168, "top": 119, "width": 64, "height": 64}
    assert corner["window"] == {"left": 336, "top": 0, "width": 64, "height": 64}
    for answer in (middle, corner):
        box = answer["window"]
        rows, columns = slice(box["top"], box["top"] + 64), slice(box["left"], box["left"] + 64)
        assert np.array_equal(answer["pictures"]["hr"]["pixels"], photo[rows, columns])
    # The surroundings are worked on too: no border shows in the optics' picture.
    top, rows, columns = 80, slice(119, 183), slice(168, 232)  # 119 - MARGIN is no multiple of 8
    around = photo[top : 183 + MARGIN + 1, 168 - MARGIN : 232 + MARGIN]
    whole = images.to_pixels(drawing.flow.guide(batch(photo), torch.tensor([2.5])))[0][rows, columns]
    alone = images.to_pixels(drawing.flow.guide(batch(photo[rows, columns]), torch.tensor([2.5])))[0]
    shown = middle["pictures"]["plain"]["pixels"]
    assert np.abs(shown.astype(int) - whole).max() <= 1 < np.abs(alone.astype(int) - whole).max()
    place = torch.tensor([[top, 168 - MARGIN]])
    lr = drawing(batch(around), torch.tensor([2.5]), seed=3, place=place)
    inner = images.to_pixels(lr)[0][119 - top : 183 - top, MARGIN:-MARGIN]
    assert np.array_equal(middle["pictures"]["lr"]["pixels"], inner)
    # And the noise is that of the whole photograph.
    drawn = np.asarray(drawing.degrade(Image.fromarray(photo), 2.5, seed=3))[rows, columns]
    assert np.abs(inner.astype(int) - drawn).max() <= 1
    elsewhere = images.to_pixels(drawing(batch(around), torch.tensor([2.5]), seed=3))[0]
    assert np.abs(elsewhere[119 - top : 183 - top, MARGIN:-MARGIN].astype(int) - drawn).max() > 4


def test_every_pixel_can_be_reached_and_every_border_has_a_margin(degrader):
    photo = skimage.coffee()[:251, :377]
    with serving(degrader, 64) as client:
        told = client.open(photo)
        last = client.pictures(told, x=1e9, y=1e9)
        inside = client.pictures(told, x=190, y=130)
    assert last["window"] == {"left": 377 - 64, "top": 251 - 64, "width": 64, "height": 64}
    assert np.array_equal(last["pictures"]["hr"]["pixels"], photo[-64:, -64:])
    box = inside["window"]
    # The blurs of all four sides see what lies outside the window: it is unlike the window blurred alone.
    rows, columns = (slice(box[start], box[start] + 64) for start in ("top", "left"))
    alone = images.to_pixels(bicubic(batch(photo[rows, columns]), 2.5))[0].astype(int)
    unlike = np.abs(inside["pictures"]["bicubic"]["pixels"] - alone).max(2)
    assert all(unlike[side].max() > 2 for side in (np.s_[:3], np.s_[-3:], np.s_[:, :3], np.s_[:, -3:]))


def test_a_picture_that_differs_in_its_borders_alone_has_no_psnr(drawing):
    pixels = np.full((72, 72, 3), 255, np.uint8)
    pixels[:2] = 0  # PSNR leaves the borders out
    with serving(drawing, 72) as client:
        told = client.open(pixels)
        shown = client.pictures(told, scale=1.05, spread=0)["pictures"]
    assert shown["bicubic"]["psnr"] is None
    assert not np.array_equal(shown["bicubic"]["pixels"], pixels)


def test_seed_scale_and_spread_each_change_the_generated_picture(drawing):
    photo = skimage.coffee()[:64, :64]
    with serving(drawing) as client:
        told = client.open(photo)
        asked = ({}, {}, {"seed": 4}, {"scale": 3}, {"spread": 0}, {"spread": 0, "seed": 4})
        first, again, seed, scale, mean, other = (
            client.pictures(told, **a)["pictures"]["lr"]["pixels"].tobytes() for a in asked
        )
    assert first == again
    assert mean == other
    assert len({first, seed, scale, mean}) == 4


def test_the_pair_is_what_was_shown_and_its_names_say_how_it_was_made(drawing):
    photo = skimage.coffee()[:100, :64]
    with serving(drawing) as client:
        told = client.open(photo, "my holiday/../Ünïcode 1.jpeg")
        shown = client.pictures(told, y=99)["pictures"]
        answer, data = client.ask(f"/pair?{query(told, y=99)}")
        mean, _ = client.ask(f"/pair?{query(told, spread=0.25)}")
    name = "%C3%9Cn%C3%AFcode_1_at0-36_x2.5_seed3"
    assert answer.getheader("Content-Disposition") == f"attachment; filename*=UTF-8''{name}.zip"
    assert mean.getheader("Content-Disposition").endswith("_at0-0_x2.5_seed3_spread0.25.zip")
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        stem = "Ünïcode_1_at0-36_x2.5_seed3"
        assert file.namelist() == [f"{stem}_HR.png", f"{stem}_LR.png"]
        hr, lr = (images.decode(file.read(name)) for name in file.namelist())
    assert np.array_equal(hr, shown["hr"]["pixels"])
    assert np.array_equal(lr, shown["lr"]["pixels"])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"scale": 4.5}, "scale=4.5: must lie in the trained range [1.0, 4.0]"),
        ({"scale": "nan"}, "must lie in the trained range"),
        ({"scale": ""}, "scale=: must be a number"),
        ({"seed": -1}, "seed=-1: must lie in [0, 2^63)"),
        ({"seed": "1.5"}, "seed=1.5: must be a whole number"),
        ({"spread": 1.5}, "spread=1.5: must lie in [0, 1]"),
        ({"photograph": "other"}, "open it again"),
    ],
)
def test_a_wrong_question_is_answered_with_a_sentence(drawing, values, said):
    with serving(drawing) as client:
        told = client.open(skimage.coffee()[:16, :16])
        for path in ("/pictures", "/pair"):
            status, answer = client.json(f"{path}?{query(told, **values)}")
            assert (status, said in answer["error"]) == (400, True), answer


def test_what_is_no_accepted_photograph_is_refused_with_a_sentence(drawing):
    with serving(drawing, max_pixels=1000) as client:
        refused = (
            (b"this is text", "not a JPEG, PNG, WebP or TIFF file"),
            (b"", "empty file"),
            (encoded(skimage.coffee()[:100, :100]), "10000 pixels, more than max_pixels=1000"),
            (encoded(skimage.coffee()[:16, :16])[:200], "damaged image"),
        )
        for data, said in refused:
            status, answer = client.json("/photographs?name=x.png", data)
            assert (status, said in answer["error"]) == (400, True), answer
        assert client.json("/about")[1]["photograph"] is None
        client.open(skimage.coffee()[:16, :16])
        with socket.create_connection(("127.0.0.1", client.port)) as link:  # refused before its body is sent
            link.sendall(b"POST /photographs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999999999\r\n\r\n")
            assert b"999999999999 bytes, more than the" in link.makefile("rb").read()


def test_the_smallest_photograph_is_shown_without_measures(degrader):
    with serving(degrader) as client:
        shown = client.pictures(client.open(skimage.coffee()[:9, :8]))["pictures"]
    assert [picture["pixels"].shape for picture in shown.values()] == [(9, 8, 3)] * 4
    assert [picture["spectrum"] for picture in shown.values()] == [None] * 4


def test_only_the_last_photographs_are_kept(drawing):
    with serving(drawing) as client:
        told = [client.open(skimage.coffee()[:16, : 16 + n]) for n in range(4)]
        assert client.json(f"/pictures?{query(told[0])}")[0] == 400
        assert client.json(f"/pictures?{query(told[1])}")[0] == 200
        assert client.json("/about")[1]["photograph"]["identity"] == told[3]["identity"]


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "photos.example"},
        {"Host": "127.0.0.1.photos.example"},
        {"Origin": "http://photos.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
    ],
)
def test_another_site_in_the_same_browser_gets_nothing(drawing, headers):
    with serving(drawing) as client:
        for path, body in (("/about", None), ("/", None), ("/photographs?name=x", encoded(skimage.coffee()[:16, :16]))):
            status, answer = client.json(path, body, **headers)
            assert (status, list(answer)) == (403, ["error"])
        assert client.json("/about", Host=f"localhost:{client.port}")[1]["photograph"] is None


def test_the_page_may_ask_nobody_else(drawing):
    with serving(drawing) as client:
        for path in ("/", "/page.js", "/page.css", "/about", "/nowhere", "/../run.py"):
            answer, data = client.ask(path)
            assert answer.status == (404 if path in ("/nowhere", "/../run.py") else 200)
            policy = answer.getheader("Content-Security-Policy")
            assert "default-src 'none'" in policy
            assert "http" not in policy
            assert b"https://" not in data


def test_it_listens_on_this_machine_alone(drawing):
    with serving(drawing) as client:
        assert client.server.server_address[0] == "127.0.0.1"
        assert client.server.url == f"http://127.0.0.1:{client.port}/"
        with pytest.raises(OSError, match=rf"port={client.port}: cannot be used .*; port=0 picks a free one"):
            Server(client.server.explorer, client.port)


@pytest.mark.parametrize(
    ("word", "said"), [("port=70000", "[0, 65535]"), ("window=63", "at least 64"), ("device=gpu", "cuda:N")]
)
def test_a_bad_key_is_named(word, said):
    with pytest.raises(ValueError, match=f"^{word}: must") as caught:
        load(ExploreConfig, [word])
    assert said in str(caught.value)


def test_a_photograph_that_is_none_ends_the_job(tmp_path, drawing):
    (tmp_path / "text.jpg").write_text("text")
    with pytest.raises(ValueError, match=r"photograph=.*text.jpg: not a JPEG, PNG, WebP or TIFF file"):
        explore(ExploreConfig(photograph=str(tmp_path / "text.jpg"), port=0))
    status, said = run_job("explore", photograph=tmp_path / "none.jpg", port=0)
    assert status == 1
    assert "none.jpg" in said
