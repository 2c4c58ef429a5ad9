"""The export of a dataset's parts, each by one of several processes.

What a part becomes depends on the part and the layout alone. Its last file is its entry in `index/`: the part's sha256
and what the layout says of every pair.
"""

import io
import json
import multiprocessing
import os
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, groupby, islice
from typing import Any, NamedTuple

from degflow.dataset.export_layouts import Layout, Pair
from degflow.dataset.reader import Part, StoredDataset
from degflow.storage import Place

INDEX = "index"
_LOOK = 0.5  # seconds between two looks at what the processes have done
_process: dict[str, Any] = {}  # of a process of the pool: its exporter, and what it shares with the others


class Tally(NamedTuple):
    """Numbers of pairs and of cut pairs, and the largest misalignment at the far edge, in HR pixels."""

    pairs: int
    cut: int
    off: int


class PartExporter:
    """Writes the files of a part. It can be pickled.

    Args:
        source: the dataset.
        layout: what its rows become.
        output: folder or URI of the export.
        tars: each part becomes one tar, instead of many files.
        threads: photographs that are fetched, encoded and written at the same time.
    """

    def __init__(self, source: StoredDataset, layout: Layout, output: str, tars: bool, threads: int):
        self.source, self.layout, self.output = source, layout, output
        self.tars, self.threads = tars, threads

    def export(self, part: Part, progress: Callable[[int], Any]) -> Tally:
        """Write the files of a part, and its index last.

        Args:
            part: one of the dataset's.
            progress: is called with numbers of further rows that are done.

        Raises:
            ValueError: the part is missing or damaged.
            OSError: storage that cannot be read or written.
        """
        output, infos = Place(self.output), []
        with ThreadPoolExecutor(self.threads) as pool:
            for rows, found in (self._tar if self.tars else self._files)(part, output, pool):
                infos += found
                progress(rows)
        index = {"part": part.name, "sha256": part.sha256, "pairs": infos}
        output.write(index_name(part.name), json.dumps(index).encode())
        return tally_of(infos)

    def _windows(self, part: Part) -> Iterator[list[list[dict[str, Any]]]]:
        """The rows of as many photographs as there are threads."""
        rows = (row for _, row in self.source.rows(part))
        photos = (list(photo) for _, photo in groupby(rows, key=lambda row: row["key"]))
        return iter(lambda: list(islice(photos, self.threads)), [])

    def _files(self, part: Part, output: Place, pool: ThreadPoolExecutor) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """Yields the number of rows and the pairs' index entries of each photograph."""

        def put(photo: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
            pairs = self.layout.pairs(photo)
            for name, data in _files_of(pairs):
                output.write(name, data)
            return [pair.info for pair in pairs]

        for window in self._windows(part):
            yield from zip(map(len, window), pool.map(put, window), strict=True)

    def _tar(self, part: Part, output: Place, pool: ThreadPoolExecutor) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """Like `_files`, but as members of one tar, in the order of the rows."""
        with tempfile.TemporaryFile() as spool:
            with tarfile.open(fileobj=spool, mode="w") as tar:
                for window in self._windows(part):
                    for photo, pairs in zip(window, pool.map(self.layout.pairs, window), strict=True):
                        for name, data in _files_of(pairs):
                            member = tarfile.TarInfo(name)
                            member.size = len(data)
                            tar.addfile(member, io.BytesIO(data))
                        yield len(photo), [pair.info for pair in pairs]
            spool.flush()
            output.upload(f"/dev/fd/{spool.fileno()}", f"{_stem(part.name)}.tar")


def export_parts(
    exporter: PartExporter, parts: Sequence[Part], workers: int | None, progress: Callable[[int], Any]
) -> dict[str, Tally]:
    """Export parts in several processes; returns a tally by part.

    Args:
        exporter: of the parts.
        parts: of its dataset.
        workers: number of processes; None: as many as CPUs. There are never more than parts, and one needs none.
        progress: is called with numbers of further rows that are done.

    Raises:
        ValueError, OSError: see `PartExporter.export`.
        ChildProcessError: a process was killed.
    """
    workers = min(workers or len(os.sched_getaffinity(0)), len(parts))
    if workers <= 1:
        return {part.name: exporter.export(part, progress) for part in parts}
    spawn = multiprocessing.get_context("spawn")  # a fork would copy the locks of running threads
    rows, stop, shown, done = spawn.Value("q", 0), spawn.Event(), 0, {}
    pool = ProcessPoolExecutor(workers, spawn, _start, (exporter, rows, stop))
    try:
        calls = {pool.submit(_export, part): part.name for part in parts}
        waiting = set(calls)
        while waiting:
            finished, waiting = wait(waiting, _LOOK, FIRST_COMPLETED)
            if (now := rows.value) > shown:
                progress(now - shown)
                shown = now
            done |= {calls[call]: call.result() for call in finished}
        return done
    except BrokenProcessPool:
        raise ChildProcessError(
            f"workers={workers}: one of these processes was killed, perhaps because memory ran out; "
            "the same command with fewer workers continues"
        ) from None
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _start(exporter: PartExporter, rows: Any, stop: Any) -> None:
    _process.update(exporter=exporter, rows=rows, stop=stop)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _export(part: Part) -> Tally:
    return _process["exporter"].export(part, _count)


def _count(rows: int) -> None:
    if _process["stop"].is_set():
        raise InterruptedError("another part has failed")
    with _process["rows"].get_lock():
        _process["rows"].value += rows


def index_name(part: str) -> str:
    """Name of a part's entry in `index/`."""
    return f"{INDEX}/{_stem(part)}.json"


def read_index(output: Place, name: str) -> dict[str, Any]:
    """A part's name, its sha256 and its pairs."""
    return json.loads(output.read(name))


def tally_of(infos: Sequence[dict[str, Any]]) -> Tally:
    """The tally of the pairs of an index."""
    off = [info["off"] for info in infos if info.get("off")]
    return Tally(len(infos), len(off), max(off, default=0))


def _stem(part: str) -> str:
    return part.rpartition("/")[2].removesuffix(".parquet")


def _files_of(pairs: Iterable[Pair]) -> Iterator[tuple[str, bytes]]:
    return chain.from_iterable(pair.files.items() for pair in pairs)
