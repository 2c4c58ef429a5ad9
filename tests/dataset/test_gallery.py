"""preview.html: one static file that shows what its rows hold, and nothing of where they were made."""

import base64
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from degflow.dataset.layout import find_objects
from degflow.storage import Place
from tests.finished import finish, save_coordinates
from tests.sources import png, rows_of

pytest.importorskip("skimage.data")
DRAWS = 3
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Elements with their text; fails on a tag that is not closed in its order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append([tag, dict(attrs), ""])
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_startendtag(self, tag, attrs):
        self.elements.append([tag, dict(attrs), ""])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for element in self.open:
            element[2] += data

    def all(self, tag):
        return [(attributes, text) for name, attributes, text in self.elements if name == tag]


@pytest.fixture(scope="module")
def dataset(photos, model, tmp_path_factory):
    output = tmp_path_factory.mktemp("gallery") / "dataset"
    return Place(finish(photos, output, model, f"scale.per_image={DRAWS}", "hr=embed", "shard.images=4"))


@pytest.fixture(scope="module")
def page(dataset):
    return Page(dataset.read("preview.html").decode())


def test_it_asks_nobody_for_anything(page, dataset):
    assert not {"script", "link", "iframe", "object", "form", "a"} & {name for name, _, _ in page.elements}
    attributes = [item for _, found, _ in page.elements for item in found.items()]
    addresses = [value for key, value in attributes if key in ("src", "href")]
    assert addresses
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    assert not any(key.startswith("on") for key, _ in attributes)
    policies = [about["content"] for about, _ in page.all("meta") if "http-equiv" in about]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert dataset.root not in dataset.read("preview.html").decode()


def test_its_crops_and_figures_are_those_of_the_rows(page, dataset):
    rows, seen = rows_of(Path(dataset.root)), 0
    images = [png(base64.b64decode(about["src"].partition(",")[2])) for about, _ in page.all("img")]
    captions = [text for _, text in page.all("figcaption")]
    articles = [text for _, text in page.all("h3") if "." in text]
    assert len(articles) == 6
    assert len(images) == len(captions) == 6 * (1 + DRAWS)
    for n, key in enumerate(articles):
        mine = sorted((row for (name, _), row in rows.items() if name == key), key=lambda row: row["scale"])
        assert len(mine) == DRAWS
        start, hr = n * (1 + DRAWS), png(mine[0]["hr"]["bytes"])
        assert captions[start] == "HR"
        assert holds(hr, images[start])
        for row, caption, crop in zip(mine, captions[start + 1 :], images[start + 1 :], strict=False):
            lr = png(row["lr"]["bytes"])
            psnr = 10 * np.log10(255**2 / np.square(lr.astype(float) - hr).mean())
            assert caption == f"×{row['scale']:.2f} {psnr:.1f} dB"
            assert holds(lr, crop)
            seen += 1
    assert seen == 6 * DRAWS
    weakest = [float(captions[n * (1 + DRAWS) + 1].split()[0][1:]) for n in range(6)]
    assert weakest == sorted(weakest)


def holds(whole, crop):
    """Whether a crop is a part of an image."""
    if crop.shape[0] > whole.shape[0] or crop.shape[1] > whole.shape[1]:
        return False
    windows = np.lib.stride_tricks.sliding_window_view(whole, crop.shape)
    return bool((windows == crop).all((-3, -2, -1)).any())


def test_its_histograms_count_every_row(page):
    counts, chart = Counter(), ""
    for tag, _, text in page.elements:
        chart = text if tag == "h3" else chart
        if tag == "title" and (bar := re.fullmatch(r"\S+ to \S+: (\d+)", text)):
            counts[chart] += int(bar[1])
    assert counts["Scales"] == 9 * DRAWS
    assert counts["PSNR"] == 6 * DRAWS
    assert len(page.all("circle")) == 6 * DRAWS


def test_equal_datasets_get_equal_pages(photos, model, dataset, tmp_path):
    words = (f"scale.per_image={DRAWS}", "hr=embed", "shard.images=4")
    other = Place(finish(photos, tmp_path / "elsewhere", model, *words))
    assert other.read("preview.html") == dataset.read("preview.html")


def test_names_are_text_and_not_markup(model, tmp_path):
    photos = save_coordinates(tmp_path / "in", 1)
    (photos / "000.png").rename(photos / "<img src=x onerror=1>&amp;.png")
    output = Place(finish(photos, tmp_path / "out", model))
    page = Page(output.read("preview.html").decode())
    assert ({}, "<img src=x onerror=1>&amp;.png") in page.all("h3")
    assert len(page.all("img")) == 2


def test_it_belongs_to_the_layout_and_a_shrunk_lr_has_no_psnr(model, tmp_path):
    photos = save_coordinates(tmp_path / "in", 2)
    output = Place(finish(photos, tmp_path / "out", model, "size=scaled", "scale.low=2"))
    assert "preview.html" in find_objects(output)
    text = output.read("preview.html").decode()
    assert "LR images below" not in text
    assert re.fullmatch(r"×[234]\.\d\d", Page(text).all("figcaption")[1][1])
