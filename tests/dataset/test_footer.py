"""Parts are put once: whoever writes, in whatever order, the manifest matches the objects that are there."""

import io
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs.core

from degflow.config import Unfinished
from degflow.dataset import manifest
from degflow.dataset.footer import Footer, body_sha256, footer_of, read_footer
from degflow.dataset.layout import MANIFEST, ROW, SUCCESS, Reject
from degflow.dataset.manifest import data_files, judge, write_manifest, write_rejects
from degflow.dataset.plan import Plan
from degflow.dataset.writer import ShardWriter
from degflow.storage import Place
from tests import ROOT
from tests.s3 import BUCKET

GONE = Reject("b", "read", "gone")
PART = "data/part-000000.parquet"
PIECE = 5 << 20  # bytes; the smallest that S3 takes
TWO_PIECES = PIECE + 100_000  # a part has these bytes twice
PLAN = Plan.empty().plus(pa.table({"shard": pa.array([0], pa.int32()), "key": ["a"], "size": [1], "etag": [""]}))


def put(place, fill, recipe="mine", rejects=(), size=1000):
    """Put shard 0, with one row whose bytes are `fill`."""
    with ShardWriter(place, 0, recipe) as writer:
        image = {"bytes": bytes([fill]) * size, "path": "a"}
        writer.add([dict.fromkeys(ROW.names) | {"key": "a", "draw": 0, "lr": image, "hr": image}])
        for reject in rejects:
            writer.reject(reject)
        return writer.finish(float(fill), None, None, None)


def finish(place):
    """What the driver does at the end, in its two steps."""
    done = judge(place, data_files(place), PLAN, lambda sources: "mine").done
    yield
    write_rejects(place, PLAN, done)
    write_manifest(place, PLAN, done)
    place.write(SUCCESS, b"")
    yield


def assert_described(place):
    """The manifest says what the object is."""
    data = place.read(PART)
    (row,) = pq.read_table(io.BytesIO(place.read(MANIFEST))).to_pylist()
    assert (row["bytes"], row["sha256"]) == (len(data), body_sha256(io.BytesIO(data)))
    assert row["seconds"] == pq.read_table(io.BytesIO(data))["lr"][0]["bytes"].as_py()[0]


class Slow(Place):
    """A place where something happens before the next upload: the writer has looked, and found no part."""

    happens = staticmethod(lambda: None)

    def upload(self, file, name, *, new=False):
        happens, self.happens = self.happens, lambda: None
        happens()
        return super().upload(file, name, new=new)


@pytest.fixture(params=["local", "s3"])
def uri(request, tmp_path):
    return str(tmp_path / "out") if request.param == "local" else request.getfixturevalue("s3").uri("out")


@pytest.mark.parametrize("looked", ["before the first put", "after it"])
@pytest.mark.parametrize("order", ["late after _SUCCESS", "while the driver finishes", "before it finishes"])
def test_of_two_writers_with_other_bytes_the_first_wins_whenever_the_second_comes(uri, order, looked):
    place, late, records = Place(uri), Slow(uri), []
    driver = finish(place)
    steps = {"late after _SUCCESS": 2, "while the driver finishes": 1, "before it finishes": 0}[order]

    def first():
        records.append(put(place, 1))
        for _ in range(steps):
            next(driver)

    if looked == "after it":
        first()
    else:
        late.happens = first
    records.append(put(late, 2, size=1500))
    before = place.read(PART)
    assert list(driver) == [None] * (2 - steps)
    assert records[0] == records[1]
    assert (records[0].seconds, records[0].bytes, place.read(PART)) == (1.0, len(before), before)
    assert_described(place)
    assert [file.key for file in data_files(place)] == [PART]


def small_pieces(monkeypatch):
    monkeypatch.setattr(s3fs.core, "calculate_chunksize", lambda size, **_: PIECE)


KILLED = """
import os, sys, s3fs.core
from tests.dataset.test_footer import PIECE, TWO_PIECES, put
from degflow.storage import Place
s3fs.core.calculate_chunksize = lambda size, **_: PIECE
call, put_pieces = s3fs.S3FileSystem._call_s3, []
async def counted(self, method, *arguments, **options):
    if method == "upload_part":
        put_pieces.append(options.get("PartNumber"))
    if len(put_pieces) == 2:
        os._exit(9)
    return await call(self, method, *arguments, **options)
s3fs.S3FileSystem._call_s3 = counted
put(Place(sys.argv[1]), 3, size=TWO_PIECES)
"""


def test_a_writer_that_is_killed_between_pieces_leaves_nothing_and_the_next_one_puts_the_part(s3, monkeypatch):
    place = Place(s3.uri("killed"))
    command = [sys.executable, "-c", KILLED, place.uri]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 9
    assert place.files() == []
    small_pieces(monkeypatch)
    record = put(place, 1, size=TWO_PIECES)
    assert record.bytes > PIECE * 2
    late = Slow(place.uri)
    assert put(late, 2, size=TWO_PIECES + 1000) == record
    assert read_footer(place, PART, record.bytes) == Footer(record, [])


def test_of_two_writers_in_pieces_the_first_wins_and_a_lost_answer_is_no_other_writer(s3, monkeypatch):
    place = Place(s3.uri("pieces"))
    late = Slow(place.uri)
    small_pieces(monkeypatch)
    call, calls = s3fs.S3FileSystem._call_s3, []

    async def lossy(self, method, *arguments, **options):
        answer = await call(self, method, *arguments, **options)
        if method == "complete_multipart_upload":
            calls.append(options["IfNoneMatch"])
            if len(calls) == 1:
                raise ConnectionError("the answer is lost")
        return answer

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", lossy)
    records = []
    late.happens = lambda: records.append(put(place, 1, size=TWO_PIECES))
    records.append(put(late, 2, size=TWO_PIECES + 1000))
    assert records[0] == records[1]
    assert records[0].seconds == 1.0
    assert calls == ["*"]  # the second and the third completion were refused
    assert read_footer(place, PART, place.source(PART).size) == Footer(records[0], [])


class Noting(Place):
    """Notes how many bytes each read takes."""

    def read(self, name, start=0, end=None):
        data = super().read(name, start, end)
        self.reads.append(len(data))
        return data


def noting(uri):
    place = Noting(uri)
    place.reads = []
    return place


@pytest.mark.parametrize("count", [0, 3, 2000])
def test_a_footer_is_read_from_the_end_in_one_piece_or_two(uri, count):
    place, rejects = noting(uri), [Reject(f"{n} \u00fc.png", "decode", "no image", 2) for n in range(count)]
    record = put(place, 1, rejects=rejects, size=300_000)
    assert read_footer(place, PART, record.bytes) == Footer(record, rejects)
    assert record.rejects == count
    assert place.reads[0] == 64 << 10
    assert len(place.reads) == (2 if count == 2000 else 1)
    assert sum(place.reads) < 400_000


def damaged():
    yield "empty", lambda data: b""
    yield "short", lambda data: b"PAR1"
    yield "text", lambda data: b"<html>503</html>" * 100
    yield "cut at its end", lambda data: data[:-1]
    yield "cut in its rows", lambda data: data[: len(data) // 2]
    yield "a length beyond the file", lambda data: data[:-8] + b"\xff\xff\xff\x7fPAR1"
    yield "no length", lambda data: data[:-8] + bytes(4) + b"PAR1"
    yield "zeros in its footer", lambda data: data[: len(data) - int.from_bytes(data[-8:-4], "little")] + bytes(60)
    yield "another program's", lambda data: serialised(pa.table({"a": [1]}))
    yield "rejects are missing", lambda data: with_footer(rejects=[])
    yield "rows are missing", lambda data: with_footer(rows=1)
    yield "another version's", lambda data: serialised(pa.table({"a": [1]}), {"degflow.record": '{"rows": 1}'})


def with_footer(rows=0, rejects=(GONE,)):
    place = Place("memory://footer")
    record = put(place, 1, rejects=[GONE])
    place.delete("")
    return serialised(ROW.empty_table(), footer_of(replace(record, rows=rows), rejects))


def serialised(table, metadata=None):
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata(metadata or {})
    return sink.getvalue()


@pytest.mark.parametrize("spoil", [pytest.param(spoil, id=name) for name, spoil in damaged()])
def test_a_damaged_part_is_foreign_and_named_by_the_writer_that_finds_it(tmp_path, spoil):
    place = Place(str(tmp_path))
    put(place, 1)
    place.write(PART, spoil(place.read(PART)))
    done, foreign = judge(place, data_files(place), PLAN, lambda sources: "mine")
    assert (done, [file.key for file in foreign]) == ({}, [PART])
    before = place.read(PART)
    with pytest.raises(Unfinished, match=rf"^{tmp_path}/{PART}: another run writes into this output.*is damaged"):
        put(place, 2)
    assert place.read(PART) == before


def test_parts_that_are_not_planned_are_foreign(tmp_path):
    place = Place(str(tmp_path))
    put(place, 1)
    for name in ("data/part-000001.parquet", "data/part-0000000.parquet"):
        place.write(name, place.read(PART))
    place.write("data/mine.txt", b"no part")
    done, foreign = judge(place, data_files(place), PLAN, lambda sources: "mine")
    assert (list(done), [file.key for file in foreign]) == (
        [0],
        ["data/part-0000000.parquet", "data/part-000001.parquet"],
    )
    assert judge(place, data_files(place), PLAN, lambda sources: "other").done == {}


def test_many_parts_of_a_store_are_read_by_processes_with_the_same_result(s3, monkeypatch):
    place, names = Place(f"s3://{BUCKET}/footers"), [f"data/part-{n:06d}.parquet" for n in range(4)]
    put(place, 1)
    for name in (names[1], names[3], "data/part-000009.parquet"):
        place.write(name, place.read(PART))
    place.write(names[2], place.read(PART)[:-20])
    keys = {"key": list("abcd"), "size": [1] * 4, "etag": [""] * 4}
    plan = Plan.empty().plus(pa.table({"shard": pa.array(range(4), pa.int32()), **keys}))
    files, counts = data_files(place), []
    place.delete(names[3])

    class Counted(ProcessPoolExecutor):
        def __init__(self, count, context):
            super().__init__(count, context)
            counts.append(count)

    monkeypatch.setattr(manifest, "ProcessPoolExecutor", Counted)
    few = judge(place, files, plan, lambda sources: "mine")
    assert counts == []
    monkeypatch.setattr(manifest, "_CHUNK", 2)
    many = judge(place, files, plan, lambda sources: "mine")
    assert counts == [2]
    assert many == few
    assert sorted(many.done) == [0, 1]  # 3 was deleted meanwhile
    assert sorted(file.key for file in many.foreign) == [names[2], "data/part-000009.parquet"]


def test_the_digest_is_of_the_bytes_before_the_footer(tmp_path):
    first, second = (Place(str(tmp_path / name)) for name in ("a", "b"))
    records = [put(first, 1), put(second, 1, rejects=[GONE])]
    assert records[0].sha256 == records[1].sha256
    assert records[0].bytes < records[1].bytes
    assert put(Place(str(tmp_path / "c")), 2).sha256 != records[0].sha256
    with pytest.raises(ValueError, match="no parquet file: its end is damaged"):
        body_sha256(io.BytesIO(b"text"))
