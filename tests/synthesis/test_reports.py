"""Reports: what they add up to, how often they come, and what the images that are made and left cost."""

import io
import re
import sys

import pyarrow.parquet as pq
import pytest
from tqdm import tqdm

from degflow.config import Unfinished, load
from degflow.dataset.layout import Record
from degflow.synthesis import reports
from degflow.synthesis.reports import REPORTS, Count, between_reports, row, seldom
from degflow.synthesis.settings import SynthesizeConfig
from degflow.synthesis.shard import Progress
from tests.finished import synthesize_here


def test_what_a_failed_attempt_had_counted_is_taken_back():
    count = Count(tqdm(disable=True), 2)
    for report in ((0, 3, 1), (1, 4, 0), (0, 2, 0)):
        count.take(row(*report))
    assert (count.rejects, count.open) == (1, {0: {"images": 5, "rejects": 1}, 1: {"images": 4, "rejects": 0}})
    count.take(row(0, failure="on a machine: it did"))
    assert (count.rejects, count.open) == (0, {1: {"images": 4, "rejects": 0}})


def made(number, images=1, seconds=1.0):
    """The last report of a shard."""
    record = Record(f"data/part-{number:06d}.parquet", images, 0, 1, "", "", seconds, None, None, None)
    return row(number, images, record=record)


def on(host, **report):
    """A report of another machine."""
    return row(**report) | {"host": host, "node": host}


def test_a_shard_whose_photographs_are_withheld_comes_again_twice_and_has_not_failed(capsys):
    count = Count(tqdm(total=3, file=sys.stdout), 3)
    for _ in range(2):
        assert not count.is_resigned(1)
        count.take(row(1, 3, 1))
        count.take(row(1, withheld="the store does not give a.png"))
        assert count.open == {}
        assert count.silent([1]) == []
        assert count.to_repeat([1]) == [1]
    assert (count.is_last(1), count.is_resigned(1)) == (False, True)
    assert (count.failures, count.rejects) == ({}, 0)
    assert capsys.readouterr().out.count("shard 1 comes again later: the store does not give a.png") == 2
    count.take(made(1))
    assert count.to_repeat([1]) == []
    count.check()


def test_a_pool_that_breaks_costs_each_unmade_shard_an_attempt_if_it_made_none(capsys):
    count = Count(tqdm(total=3, file=sys.stdout), 3)
    count.take(made(0))
    count.take(row(failure="as the pool of actors broke: a line\nit did"))
    assert count.to_repeat([0, 1, 2]) == [1, 2]
    assert count.failures == {}
    assert count.to_repeat([1, 2]) == [1, 2]
    assert not count.is_last(1)
    assert count.to_repeat([1, 2]) == [1, 2]
    assert count.is_last(1)
    assert count.to_repeat([1, 2]) == []
    assert [count.is_last(number) for number in (0, 1, 2)] == [False, False, False]
    said = capsys.readouterr().out
    assert "the pool of actors broke: it did" in said
    told = re.findall(r"no shard was made; (\d) of 2 shards come again: it did", said)
    assert told == ["2", "2", "0"]  # once for all shards
    with pytest.raises(
        Unfinished, match=r"^2 of 3 shards were set aside after 3 failures .*as the pool of actors broke"
    ):
        count.check()


def test_storage_that_fails_on_one_machine_of_many_costs_no_attempt_and_on_two_ends_the_run():
    count = Count(tqdm(disable=True), 9, machines=lambda: 8)
    with pytest.raises(OSError, match=r"^on n1: shard 0: no$"):  # nothing is made yet
        count.take(on("n1", shard=0, fatal="shard 0: no"))
    count = Count(tqdm(disable=True), 9, machines=lambda: 8)
    count.take(made(0))
    count.take(row(1, images=5))
    for number in (1, 2):
        count.take(on("n1", shard=number, fatal=f"shard {number}: no"))
    assert count.to_repeat([0, 1, 2]) == [1, 2]
    assert (count.failures, count.open) == ({}, {})
    with pytest.raises(OSError, match=r"^on n2: shard 3: no$"):
        count.take(on("n2", shard=3, fatal="shard 3: no"))
    count.take(made(4))  # days later another machine has the same trouble
    count.take(on("n3", shard=5, fatal="shard 5: no"))
    with pytest.raises(OSError, match=r"^on n2: shard 3: no$"):
        count.take(on("n2", shard=3, fatal="shard 3: no"))
    count = Count(tqdm(disable=True), 9)  # of one machine
    count.take(made(0))
    with pytest.raises(OSError, match=r"^on n1: shard 1: no$"):
        count.take(on("n1", shard=1, fatal="shard 1: no"))


def test_storage_that_fails_on_the_only_machine_with_actors_ends_the_run_after_ten_shards_or_three_rounds():
    count = Count(tqdm(disable=True), 99, machines=lambda: 8)
    count.take(made(0))
    for number in range(1, 10):
        count.take(on("n1", shard=number, fatal=f"shard {number}: no"))
    with pytest.raises(OSError, match=r"^on n1: shard 10: no$"):
        count.take(on("n1", shard=10, fatal="shard 10: no"))
    count = Count(tqdm(disable=True), 2, machines=lambda: 8)
    count.take(made(0))
    for _ in range(4):  # the first one made a shard
        count.take(on("n1", shard=1, fatal="shard 1: no"))
        left = count.to_repeat([1])
    assert left == []
    assert count.failures[1] == ["on n1: shard 1: no"] * 3


def test_what_an_unfinished_shard_has_reported_is_forgotten_in_the_next_round():
    bar = tqdm(total=9, disable=False, file=io.StringIO())
    count = Count(bar, 2)
    count.take(made(0))
    count.take(row(1, images=5, rejects=1))
    assert count.to_repeat([0, 1]) == [1]
    assert (bar.n, count.open, count.rejects) == (1, {}, 0)


def test_a_run_is_hopeless_if_three_machines_fail_and_not_one_of_many():
    count = Count(tqdm(disable=True), 99, machines=lambda: 8)
    for number in range(15):
        count.take(on("n1", shard=number, failure="it did"))
    count.take(on("n2", shard=20, failure="it did"))
    with pytest.raises(Unfinished, match=r"^10 attempts failed and no shard was made; the last one on n3: it did"):
        count.take(on("n3", shard=30, failure="it did"))
    count = Count(tqdm(disable=True), 99)
    for number in range(9):
        count.take(on("n1", shard=number, failure="it did"))
    with pytest.raises(Unfinished, match=r"^10 attempts failed"):
        count.take(on("n1", shard=9, failure="it did"))


def test_reports_summed_up_lose_no_count():
    record = Record("data/part-000000.parquet", 3, 1, 1, "", "", 1.0, None, None, None)
    said = [Progress(1, 0), Progress(1, 1), Progress(0, 0), Progress(2, 0), Progress(0, 0, record)]
    assert list(seldom(said, seconds=0)) == said
    assert list(seldom(said, seconds=60)) == [Progress(4, 1, record)]


def test_actors_report_less_often_the_more_of_them_there_may_be(monkeypatch):
    cluster = {"CPU": 8000.0, "GPU": 8.0}
    monkeypatch.setattr(reports.ray, "cluster_resources", lambda: cluster)
    assert between_reports(most=5000, gpus=1, threads=4) == 1
    assert between_reports(most=5000, gpus=0, threads=4) == 2000 / REPORTS == 200
    assert between_reports(most=500, gpus=0, threads=4) == 50
    cluster.clear()  # nodes come later
    assert between_reports(most=5000, gpus=1, threads=4) == 1
    monkeypatch.setattr(reports.ray, "cluster_resources", lambda: 1 / 0)
    assert between_reports(most=5000, gpus=1, threads=4) == 1


def test_costs_are_told_with_the_progress_and_for_what_is_left(photos, model, tmp_path, capsys):
    count = Count(tqdm(total=10, disable=True), 3, price=1800.0)
    assert count._cost() == {}
    for number, images, seconds in ((0, 3, 4.0), (1, 2, 6.0)):
        count.take(made(number, images, seconds))
    assert count._cost() == {"cost": "5.00", "in all": "10.00"}  # 10 s for 5 of 10 images
    words = ["shard.images=2", "price.per_hour=3600"]
    synthesize_here(photos, tmp_path / "out", model, "limit=4", *words)
    synthesize_here(photos, tmp_path / "out", model, "dry_run=true", "extend=true", *words)
    said = capsys.readouterr().out
    found = re.search(r"^5 images are left; .* take \S+ hours of one actor, which cost (\S+)$", said, re.M)
    assert found
    done = pq.read_table(tmp_path / "out/manifest.parquet").to_pylist()
    assert float(found[1]) == pytest.approx(sum(row["seconds"] for row in done) / 4 * 5, abs=0.01)
    with pytest.raises(ValueError, match=r"price\.per_hour=-1\.0: must not be negative"):
        load(SynthesizeConfig, ["input=a", "output=b", "price.per_hour=-1"])
