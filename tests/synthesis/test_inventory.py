import csv

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from degflow.synthesis.inventory import list_input, root_of


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return str(path)


def keys_of(listing):
    return listing.sources["key"].to_pylist()


def test_a_csv_inventory_keeps_keys_as_they_are(tmp_path):
    rows = [["etag", "key", "size", "owner"], ['"abc"', 'b, "c".PNG', "12", "x"]]
    rows += [["", "007.jpg", "", ""], ["", "n.txt", "", ""]]
    listing = list_input(write_csv(tmp_path / "list.csv", rows))
    assert listing.sources.to_pylist() == [
        {"key": "007.jpg", "size": -1, "etag": ""},
        {"key": 'b, "c".PNG', "size": 12, "etag": "abc"},
    ]
    assert listing.others == 1
    assert root_of(str(tmp_path / "list.csv")).root == str(tmp_path)
    assert root_of(str(tmp_path / "list.csv"), "s3://bucket/photos").root == "bucket/photos"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"name": ["a.png"]}, r"an inventory has a column named key; this one has \[\]"),
        ({"key": ["a.png", None]}, "1 rows without a key"),
        ({"key": ["b.png", "a.png", "a.png"]}, "keys must be unique; named more than once: a.png"),
        ({"key": ["a.png"], "size": ["large"]}, "key, size or etag is there twice, or of another type"),
        ({"key": [["a.png"]]}, "key, size or etag is there twice, or of another type"),
    ],
)
def test_an_inventory_that_breaks_a_rule_is_named(tmp_path, table, message):
    file = tmp_path / "list.parquet"
    pq.write_table(pa.table(table), file)
    with pytest.raises(ValueError, match=f"^input={file}: {message}"):
        list_input(str(file))


def test_a_file_that_is_no_inventory_is_named(tmp_path):
    (tmp_path / "list.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match="not a readable inventory"):
        list_input(f"{tmp_path}/list.parquet")
    with pytest.raises(ValueError, match="root=x: has a meaning for an inventory"):
        list_input(str(tmp_path), "x")


def test_a_folder_with_wildcards_in_its_name_is_that_folder(tmp_path):
    for name in ("a [1]/x.png", "a 1/y.png", "b/z.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert keys_of(list_input(f"{tmp_path}/a [1]")) == ["x.png"]
    assert keys_of(list_input(f"{tmp_path}/a ?/*.png")) == ["a 1/y.png"]
    assert keys_of(list_input(f"{tmp_path}/**/*.*g")) == ["a 1/y.png", "a [1]/x.png", "b/z.jpg"]
    with pytest.raises(FileNotFoundError, match=r"absent\.csv: not there"):
        list_input(f"{tmp_path}/absent.csv")
