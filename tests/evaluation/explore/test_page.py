"""The page in a real browser: Debian's Chromium without a window, driven by Playwright, and the real job."""

import io
import math
import os
import shutil
import subprocess
import sys
import zipfile
from urllib.parse import urlsplit

import pytest
from PIL import Image

from degflow import images
from tests import ROOT
from tests.sources import save_model

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium on the path (Debian: apt-get install chromium)"),
]
sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
skimage = pytest.importorskip("skimage.data")


@pytest.fixture(scope="module")
def photograph(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos") / "my photo.png"
    Image.fromarray(skimage.coffee()[:160, :200]).save(path)
    return path


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The address that the job prints, with a small model that draws."""
    levels = {"1": 1.0, "2": 2.0, "4": 3.97}  # the slider's last value is no round one
    model = save_model(tmp_path_factory.mktemp("model") / "model.safetensors", draws=True, levels=levels)
    command = [sys.executable, "jobs/explore.py", "port=0", "window=96", f"model={model}"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as job:
        try:
            assert job.stdout
            yield job.stdout.readline().split()[1]
        finally:
            job.terminate()


@pytest.fixture(scope="module")
def chromium():
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # root has none
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield browser
        browser.close()


class Visit:
    """The open page, and all that the browser said and asked for meanwhile."""

    def __init__(self, chromium, url, width=1280, height=900):
        self.complaints, self.hosts = [], set()
        self.page = chromium.new_page(viewport={"width": width, "height": height})
        self.page.set_default_timeout(20_000)
        self.page.on("console", lambda said: self.complaints.append(said.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self._note)
        self.page.goto(url)

    def _note(self, request):
        parts = urlsplit(request.url)
        if parts.scheme not in ("data", "blob"):
            self.hosts.add(parts.netloc)

    def open(self, path):
        """Open a photograph, and wait for its first pictures."""
        before = self.page.get_attribute("body", "data-photograph")
        self.page.set_input_files("#file", path)
        self.page.wait_for_selector(f"body[data-photograph]:not([data-photograph='{before}'])")
        return self.wait()

    def wait(self, *words):
        """Until the pictures of a question with these words are on the page."""
        asked = "".join(f"[data-shown*='{word}']" for word in words)
        self.page.wait_for_selector(f"body[data-shown]{asked}:not(:has(figure.stale))")
        return self

    def screen(self, name):
        """What is seen of one picture, as pixels."""
        self.page.mouse.move(0, 0)
        return images.decode(self.page.locator(f"figure#{name} canvas").screenshot()).tobytes()

    def text(self, selector):
        return self.page.inner_text(selector)


@pytest.fixture
def visit(chromium, url):
    made = Visit(chromium, url)
    yield made
    made.page.close()


def slide(page, name, value):
    """Move a slider as a hand does: its events are the browser's own."""
    page.locator(f"#{name}").press({"low": "Home", "high": "End"}[value])


def test_a_photograph_its_scale_its_draws_and_the_pair(visit, url, photograph):
    page = visit.page
    assert "Open a photograph" in visit.text("#shown")
    visit.open(photograph).wait("seed=0", "scale=2.5")
    assert "A window of 96 × 96 pixels at (52, 32) of 200 × 160." in visit.text("#shown")
    first = {name: visit.screen(name) for name in ("hr", "lr", "bicubic", "plain")}
    assert len(set(first.values())) == 4
    assert page.locator("#spectrum polyline").count() == 4

    page.click("#again")
    visit.wait("seed=1")
    assert page.input_value("#seed") == "1"
    second = visit.screen("lr")
    assert second != first["lr"]
    assert [visit.screen(name) == first[name] for name in ("hr", "bicubic", "plain")] == [True] * 3

    page.fill("#seed", "0")
    page.press("#seed", "Tab")
    visit.wait("seed=0")
    assert visit.screen("lr") == first["lr"]

    slide(page, "scale", "high")
    visit.wait("scale=3.97")
    assert visit.text("#scale-value") == "×3.97"
    stronger = {name: visit.screen(name) for name in first}
    assert [stronger[name] == first[name] for name in first] == [True, False, False, False]
    assert visit.text("figure#lr b") == "Generated LR, ×3.97"

    slide(page, "spread", "low")
    visit.wait("spread=0", "scale=3.97")
    assert visit.screen("lr") != stronger["lr"]
    assert "mean of what the model would draw" in visit.text("figure#lr .about")

    with page.expect_download() as download:
        page.click("#pair")
    assert download.value.suggested_filename == "my_photo_at52-32_x3.97_seed0_spread0.zip"
    with zipfile.ZipFile(io.BytesIO(download.value.path().read_bytes())) as pair:
        hr, _ = (images.decode(pair.read(name)) for name in pair.namelist())
    assert (hr == images.decode(photograph.read_bytes())[32:128, 52:148]).all()

    assert visit.complaints == []
    assert visit.hosts == {urlsplit(url).netloc}


def test_zoom_and_cursor_are_those_of_all_pictures(visit, photograph):
    page, pixels = visit.page, images.decode(photograph.read_bytes())
    visit.open(photograph)
    page.click("text=600%")
    canvas = page.locator("figure#lr canvas")
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2 + 3, box["y"] + box["height"] / 2 + 3)
    told = [visit.text(f"figure#{name} .value") for name in ("hr", "lr", "bicubic", "plain")]
    assert {words.partition(":")[0] for words in told} == {"(100, 80)"}  # the window's middle
    assert told[0] == "(100, 80): " + " ".join(map(str, pixels[80, 100]))
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2 + 3 - 60, box["y"] + box["height"] / 2 + 3)  # ten pixels
    page.mouse.up()
    assert visit.text("figure#hr .value").startswith("(100, 80):")  # they go with the hand
    page.mouse.move(box["x"] + box["width"] / 2 + 3, box["y"] + box["height"] / 2 + 3)
    assert visit.text("figure#plain .value").startswith("(110, 80):")
    page.mouse.move(0, 0)
    # Enlarged without smoothing: 6 x 6 pixels of the screen for each of the picture.
    seen = images.decode(page.locator("figure#hr canvas").screenshot())
    top, left = (math.floor(side / 2 - 48 * 6 + 0.5) % 6 for side in seen.shape[:2])  # a pixel's first row and column
    part = seen[top:, left:][:120, :120]
    assert (part == part[::6, ::6].repeat(6, 0).repeat(6, 1)).all()
    assert visit.complaints == []


def test_a_click_on_the_small_picture_moves_the_window(visit, photograph):
    visit.open(photograph)
    box = visit.page.locator("#overview").bounding_box()
    visit.page.mouse.click(box["x"] + box["width"] - 2, box["y"] + box["height"] - 2)
    visit.page.wait_for_selector("#shown:has-text('at (104, 64)')")
    assert visit.complaints == []


def test_what_is_no_photograph_is_said_on_the_page(visit, photograph, tmp_path):
    (tmp_path / "text.jpg").write_text("text")
    visit.page.set_input_files("#file", tmp_path / "text.jpg")
    said = visit.page.wait_for_selector("#error:visible").inner_text()
    assert said.startswith("text.jpg: not a JPEG, PNG, WebP or TIFF file")
    visit.open(photograph)
    assert visit.page.locator("#error").is_hidden()


@pytest.mark.parametrize(("width", "height"), [(1920, 1080), (800, 600), (380, 700)])
def test_nothing_is_wider_than_the_page(chromium, url, photograph, width, height):
    visit = Visit(chromium, url, width, height)
    visit.open(photograph)
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = [visit.page.locator(f"figure#{name}").bounding_box() for name in ("hr", "lr", "bicubic", "plain")]
    boxes.append(visit.page.locator("#controls").bounding_box())
    for n, a in enumerate(boxes):
        assert a["x"] >= 0
        assert a["x"] + a["width"] <= width
        for b in boxes[:n]:
            apart_x = a["x"] + a["width"] <= b["x"] or b["x"] + b["width"] <= a["x"]
            assert apart_x or a["y"] + a["height"] <= b["y"] or b["y"] + b["height"] <= a["y"]
    visit.page.close()


def test_a_file_opened_before_the_server_s_first_answer_waits_for_it(chromium, url, photograph):
    visit = Visit(chromium, "about:blank")
    waiting = []
    visit.page.route("**/about", lambda route: waiting.append(route))
    visit.page.goto(url)
    visit.page.set_input_files("#file", photograph)
    visit.page.wait_for_timeout(300)
    assert visit.page.locator("#error").is_hidden()
    waiting[0].continue_()
    visit.wait()
    assert visit.complaints == []
    visit.page.close()
