"""croissant.json; tests/synthesis/test_run.py reads a dataset by it."""

import json

import pytest

from degflow.dataset.croissant import croissant
from degflow.dataset.layout import ROW


@pytest.mark.parametrize(
    ("hr", "kind", "part"), [("embed", "sc:ImageObject", "bytes"), ("reference", "sc:Text", "path")]
)
def test_hr_is_an_image_or_where_to_find_one(hr, kind, part):
    (rows,) = json.loads(croissant(30, {"hr": hr}))["recordSet"]
    fields = {field["name"].removeprefix("rows/"): field for field in rows["field"]}
    assert list(fields) == ROW.names
    assert fields["hr"]["dataType"] == kind
    assert fields["hr"]["source"]["transform"] == {"jsonPath": part}
    assert fields["lr"]["dataType"] == "sc:ImageObject"
    assert "transform" not in fields["scale"]["source"]


def test_it_says_how_many_images_there_are_and_what_to_cite():
    description = json.loads(croissant(1234, {"hr": "reference"}))
    assert "1234 low-resolution images" in description["description"]
    assert "Latent Flow Matching" in description["citeAs"]
