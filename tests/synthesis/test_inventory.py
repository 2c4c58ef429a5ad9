import csv
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from degflow.dataset.plan import Plan
from degflow.storage import Place
from degflow.synthesis.inventory import Input


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return str(path)


def keys_in(uri, **options):
    return Input(uri, **options).images()["key"].to_pylist()


def test_a_csv_inventory_keeps_keys_as_they_are(tmp_path, capsys):
    rows = [["etag", "key", "size", "owner"], ['"abc"', 'b, "c".PNG', "12", "x"]]
    rows += [["", "007.jpg", "", ""], ["", "n.txt", "", ""]]
    found = Input(write_csv(tmp_path / "list.csv", rows))
    assert found.images().to_pylist() == [
        {"key": "007.jpg", "size": -1, "etag": ""},
        {"key": 'b, "c".PNG', "size": 12, "etag": "abc"},
    ]
    assert capsys.readouterr().out == f"1 file in {tmp_path}/list.csv without an image's suffix: left out\n"
    assert found.root.root == str(tmp_path)
    assert Input(str(tmp_path / "list.csv"), "s3://bucket/photos").root.root == "bucket/photos"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"name": ["a.png"], "size": [1]}, "an inventory needs a column named key; its columns are: name, size$"),
        ({"key": ["a.png", None]}, "1 rows without a key"),
        ({"key": ["b.png", "a.png", "a.png"]}, "keys must be unique; these appear more than once: a.png"),
        ({"key": ["a.png"], "size": ["large"]}, "key, size or etag appears twice or has another type"),
        ({"key": [["a.png"]]}, "key, size or etag appears twice or has another type"),
    ],
)
def test_an_inventory_that_breaks_a_rule_is_named(tmp_path, table, message):
    file = tmp_path / "list.parquet"
    pq.write_table(pa.table(table), file)
    with pytest.raises(ValueError, match=f"^input={file}: {message}"):
        Input(str(file)).images()


def test_a_file_that_is_no_inventory_is_named(tmp_path):
    (tmp_path / "list.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match="not a readable inventory"):
        Input(f"{tmp_path}/list.parquet").images()
    with pytest.raises(ValueError, match=r"root=x: only an inventory .* has a root"):
        Input(str(tmp_path), "x")


def test_a_csv_without_keys_has_its_columns_named(tmp_path):
    file = write_csv(tmp_path / "list.csv", [["path", "bytes"], ["a.png", "3"]])
    with pytest.raises(ValueError, match=r"list.csv: an inventory needs a column named key; its .*: path, bytes$"):
        Input(file).images()


@pytest.mark.parametrize("name", ["a.png", "b [1] #?.JPG"])
def test_one_file_is_an_input(tmp_path, name):
    for file in (name, "other.png"):
        (tmp_path / file).write_bytes(b"x")
    for uri in (f"{tmp_path}/{name}", f"file://{tmp_path}/{name}"):
        found = Input(uri)
        assert found.images()["key"].to_pylist() == [name]
        assert found.root.root == str(tmp_path)
        assert found.as_now([found.root.source(name)]) == found.images()


def test_one_object_is_an_input(s3):
    place = Place(s3.uri("one"))
    place.write("a.png", b"x")
    assert keys_in(f"{place.uri}/a.png") == ["a.png"]
    for uri in (f"{place.uri}/b.png", f"{place.uri}/none"):
        with pytest.raises(ValueError, match=f"^input={uri}: no such file, folder or prefix$"):
            keys_in(uri)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "no such file or folder"),
        ("absent.png", "no such file or folder"),
        ("empty", r"nothing that could be a photograph: no file ending in \.png, .*"),
        ("texts", r"1 other file there, but no file ending in .*"),
        (
            "texts/a.txt",
            r"a file, but neither an image \(its name .*\) nor an inventory \(\.parquet, \.csv\)",
        ),
        ("texts/*.png", r"no file below .*/texts matches \*\.png"),
        ("none.csv", "an inventory without rows"),
    ],
)
def test_inputs_without_images_are_told_apart(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("text")
    write_csv(tmp_path / "none.csv", [["key"]])
    with pytest.raises(ValueError, match=f"^input={re.escape(f'{tmp_path}/{name}')}: {message}$"):
        keys_in(f"{tmp_path}/{name}")


def test_datasets_and_exports_and_what_macos_adds_are_no_photographs(tmp_path, capsys):
    place = Place(str(tmp_path))
    for name in ("a.png", "._a.png", "sub/._b.png", "sub/b.png", "x/preview.png", "runs/ds/preview.png"):
        place.write(name, b"")
    for name in (
        "runs/ds/config.yaml",
        "runs/ds/_SUCCESS",
        "lq/export.yaml",
        "lq/_SUCCESS",
        "lq/gt/a.png",
        "x/_SUCCESS",
    ):
        place.write(name, b"")
    assert keys_in(str(tmp_path)) == ["a.png", "sub/b.png", "x/preview.png"]
    said = capsys.readouterr().out
    assert f"runs/ds/ in {tmp_path} is a dataset of degflow's, or an export: left out" in said
    assert f"lq/ in {tmp_path} is" in said
    assert f"2 names in {tmp_path} beginning with ._: left out" in said
    assert keys_in(str(tmp_path / "runs/ds")) == ["preview.png"]  # asked for by name


def test_a_folder_with_wildcards_in_its_name_is_that_folder(tmp_path):
    for name in ("a [1]/x.png", "a 1/y.png", "b/z.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert keys_in(f"{tmp_path}/a [1]") == ["x.png"]
    assert keys_in(f"{tmp_path}/a ?/*.png") == ["a 1/y.png"]
    assert keys_in(f"{tmp_path}/**/*.*g") == ["a 1/y.png", "a [1]/x.png", "b/z.jpg"]
    with pytest.raises(FileNotFoundError, match=r"absent\.csv: not there"):
        keys_in(f"{tmp_path}/absent.csv")


def test_a_limit_counts_what_is_planned_already(tmp_path):
    for name in "abcde":
        (tmp_path / f"{name}.png").write_bytes(b"x")
    assert keys_in(str(tmp_path), limit=2) == ["a.png", "b.png"]
    plan = Plan.empty().plus(Plan.empty().next_part(Input(str(tmp_path)).images().slice(1, 2), 10))
    for limit, new in ((0, ["a.png", "d.png", "e.png"]), (4, ["a.png", "d.png"]), (3, ["a.png"]), (2, [])):
        assert Input(str(tmp_path), limit=limit).new_images(plan)["key"].to_pylist() == new


def test_files_as_now_keep_what_an_inventory_leaves_out(tmp_path):
    (tmp_path / "a.png").write_bytes(b"four")
    found = Input(str(tmp_path))
    now = found.root.source("a.png")
    planned = [now._replace(size=1, etag="old"), now._replace(size=-1, etag=""), now._replace(key="gone.png")]
    assert found.as_now(planned).to_pylist() == [now._asdict(), planned[1]._asdict(), planned[2]._asdict()]
