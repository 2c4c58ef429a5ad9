"""A finished dataset -> the layouts that SR trainers read.

    paired       gt/NAME.png  lq/NAME.png  meta_info.txt  meta_info_pair.txt     (size=scaled: below x2/, x3/, ...)
    realsr       2/NAME_HR.png  2/NAME_LR2.png  3/...
    webdataset   part-000000.tar ... with NAME.hr.png  NAME.lr.png  NAME.json

Every layout also has `export.yaml`, `index/part-000000.json` ... and `_SUCCESS`, which is written last.

1. `export` takes the dataset part by part; threads fetch, encode and write the photographs of a part.
2. A part is done when its index exists. The index has the part's sha256, and the row of every pair. So a second run
   continues where the first one stopped, and exports the parts that were added to the dataset meanwhile.
3. A file's name depends on the row's key and draw alone, and cannot lead out of its folder (`file_name`).
"""

import io
import json
import math
import re
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, groupby, islice
from typing import Any, NamedTuple

from tqdm import tqdm

from degflow.capture.scenes import HR_LABEL
from degflow.config import dump, option, plain, read, required
from degflow.dataset.export_layouts import Layout, Paired, RealSR, WebDataset
from degflow.dataset.reader import FinishedDataset, Part
from degflow.storage import Place

CONFIG, INDEX, SUCCESS = "export.yaml", "index", "_SUCCESS"
_NAME = r"[A-Za-z0-9_-]+"
_OURS = re.compile(
    rf"{SUCCESS}|export\.yaml|index/part-\d+\.json|part-\d+\.tar|(x\d+/)?(meta_info(_pair)?\.txt|(gt|lq)/{_NAME}\.png)"
    rf"|[\d.]+/{_NAME}_(HR|LR[\d.]+)\.png"
)
_LEFTOVER = re.compile(r"((?:.*/)?)\.([^/]+)\.[0-9a-f]{32}")  # left by a local write that was killed


@dataclass(frozen=True)
class ExportConfig:
    """Keys of export."""

    input: str = required("folder or URI of a finished dataset")
    output: str = required("folder or URI of the export; an unfinished export is continued")
    layout: str = option("paired", "paired (gt/ and lq/ folders with meta_info), realsr, or webdataset (tars)")
    labels: dict[str, float] = option(
        {}, "for realsr: folder label -> scale; a row goes to the nearest. {}: the dataset's scales, if they are few"
    )
    tolerance: float | None = option(None, "for realsr: largest distance of a row from its label's scale; null: any")
    threads: int = option(4, "photographs that are fetched, encoded and written at the same time")
    verify: bool = option(False, "first compare each part with the manifest's sha256; reads parts twice")
    overwrite: bool = option(False, "first delete the export in output (no other file)")

    def __post_init__(self):
        rules = (
            ("layout", self.layout in ("paired", "realsr", "webdataset"), "must be paired, realsr or webdataset"),
            ("labels", not self.labels or self.layout == "realsr", "is for layout=realsr only"),
            ("tolerance", self.tolerance is None or self.layout == "realsr", "is for layout=realsr only"),
            ("tolerance", self.tolerance is None or self.tolerance >= 0, "must not be negative"),
            ("threads", self.threads >= 1, "must be at least 1"),
        )
        for name, kept, rule in rules:
            if not kept:
                raise ValueError(f"{name}={getattr(self, name)}: {rule}")
        if not all(0 < scale < math.inf for scale in self.labels.values()):
            raise ValueError(f"labels={self.labels}: scales must be positive numbers")
        for label in self.labels:
            if not re.fullmatch(r"\d+(\.\d+)?", label) or label == HR_LABEL:
                raise ValueError(
                    f"labels={self.labels}: {label!r} must be a number such as 2 or 1.5, and not {HR_LABEL}"
                )


class _Tally(NamedTuple):
    """Numbers of pairs and of cut pairs, and the largest misalignment at the far edge, in HR pixels."""

    pairs: int
    cut: int
    off: int


def export(config: ExportConfig) -> None:
    """Write the dataset in the layout, or what is missing of it.

    Raises:
        ValueError: no finished dataset, a dataset that does not fit the layout, a damaged part, or an output that
            holds something else.
        OSError: storage that cannot be read or written.
    """
    source, output = FinishedDataset(config.input, config.verify), Place(config.output)
    layout = _layout(config, source)
    done = _claim(config, source, output)
    if done is None:
        print(f"{config.output}: finished already, nothing to do (overwrite=true makes it again)")
        return
    total = sum(part.rows for part in source.parts)
    with ThreadPoolExecutor(config.threads) as pool, tqdm(total=total, desc="exporting", unit="row") as bar:
        for part in source.parts:
            if part.name in done:
                bar.update(part.rows)
                continue
            index = {"part": part.name, "sha256": part.sha256, "pairs": []}
            for rows, infos in _write(config, source, part, layout, output, pool):
                index["pairs"] += infos
                bar.update(rows)
            output.write(_index_name(part.name), json.dumps(index).encode())
            done[part.name] = _tally(index)
    infos = (info for part in source.parts for info in _index(output, _index_name(part.name))["pairs"])
    for name, text in layout.listings(infos).items():
        output.write(name, text.encode())
    output.write(SUCCESS, source.sha256.encode())
    _summarise(config, total, list(done.values()))


def _layout(config: ExportConfig, source: FinishedDataset) -> Layout:
    if config.layout == "paired":
        return Paired(source)
    return WebDataset(source) if config.layout == "webdataset" else RealSR(source, config.labels, config.tolerance)


def _summarise(config: ExportConfig, rows: int, tallies: Sequence[_Tally]) -> None:
    pairs, cut = (sum(getattr(tally, name) for tally in tallies) for name in ("pairs", "cut"))
    print(f"{pairs} pairs in {config.output}")
    if rows > pairs:
        reason = "too far from every label's scale, or LR images too small for a reader"
        print(f"{rows - pairs} of {rows} rows left out: {reason}")
    if cut:
        print(
            f"{cut} pairs were cut, because their HR image was not a multiple of their scale; "
            f"at the far edge they are misaligned by up to {max(tally.off for tally in tallies)} HR pixels"
        )


def _claim(config: ExportConfig, source: FinishedDataset, output: Place) -> dict[str, _Tally] | None:
    """Prepare the output, and return its finished parts; None if the whole export is finished."""
    names = [file.key for file in output.files()]
    if names and CONFIG not in names:
        raise ValueError(f"output={config.output}: is not empty and holds no export of this job; choose another")
    if config.overwrite:
        for name in sorted(filter(_is_ours, names), key=lambda name: (name != SUCCESS, name == CONFIG)):
            output.delete(name)
        names = []
    asked = {name: value for name, value in plain(config).items() if name in ("layout", "labels", "tolerance")}
    if names:
        stored = read(output.read(CONFIG).decode())
        if changed := [
            f"{name} was {stored.get(name)}, now {asked[name]}" for name in asked if asked[name] != stored.get(name)
        ]:
            raise ValueError(f"output={config.output}: holds another export ({'; '.join(changed)}); choose another")
    done = _done(config, source, output, [name for name in names if name.startswith(f"{INDEX}/") and _is_ours(name)])
    if SUCCESS in names:
        if output.read(SUCCESS).decode() == source.sha256:
            return None
        output.delete(SUCCESS)
    for name in names:
        if _is_ours(name) and not _OURS.fullmatch(name):
            output.delete(name)
    output.write(CONFIG, dump({"input": config.input} | asked).encode())
    return done


def _done(config: ExportConfig, source: FinishedDataset, output: Place, names: Sequence[str]) -> dict[str, _Tally]:
    parts = {part.name: part.sha256 for part in source.parts}
    with ThreadPoolExecutor(16) as pool:
        indices = list(pool.map(lambda name: _index(output, name), filter(_OURS.fullmatch, names)))
    for index in indices:
        if parts.get(index["part"]) != index["sha256"]:
            raise ValueError(
                f"output={config.output}: holds an export of another dataset ({index['part']} differs from that of "
                f"{config.input}); choose another output, or overwrite=true"
            )
    return {index["part"]: _tally(index) for index in indices}


def _tally(index: dict[str, Any]) -> _Tally:
    off = [info["off"] for info in index["pairs"] if info.get("off")]
    return _Tally(len(index["pairs"]), len(off), max(off, default=0))


def _index_name(part: str) -> str:
    return f"{INDEX}/{part.rpartition('/')[2].removesuffix('.parquet')}.json"


def _index(output: Place, name: str) -> dict[str, Any]:
    return json.loads(output.read(name))


def _is_ours(name: str) -> bool:
    leftover = _LEFTOVER.fullmatch(name)
    return bool(_OURS.fullmatch("".join(leftover.groups()) if leftover else name))


def _write(
    config: ExportConfig, source: FinishedDataset, part: Part, layout: Layout, output: Place, pool: ThreadPoolExecutor
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Write the pairs of a part; yields the number of rows and the pairs' index entries of each photograph."""
    rows = (row for _, row in source.rows(part))
    photos = (list(photo) for _, photo in groupby(rows, key=lambda row: row["key"]))
    windows = iter(lambda: list(islice(photos, config.threads)), [])
    if config.layout == "webdataset":
        yield from _write_tar(part, layout, output, pool, windows)
        return

    def put(photo: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        pairs = layout.pairs(photo)
        for name, data in chain.from_iterable(pair.files.items() for pair in pairs):
            output.write(name, data)
        return [pair.info for pair in pairs]

    for window in windows:
        yield from zip(map(len, window), pool.map(put, window), strict=True)


def _write_tar(
    part: Part, layout: Layout, output: Place, pool: ThreadPoolExecutor, windows: Iterable[list[list[dict[str, Any]]]]
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    with tempfile.NamedTemporaryFile() as spool:
        with tarfile.open(fileobj=spool, mode="w") as tar:
            for window in windows:
                for photo, pairs in zip(window, pool.map(layout.pairs, window), strict=True):
                    for name, data in chain.from_iterable(pair.files.items() for pair in pairs):
                        member = tarfile.TarInfo(name)
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
                    yield len(photo), [pair.info for pair in pairs]
        spool.flush()
        output.upload(spool.name, part.name.rpartition("/")[2].removesuffix(".parquet") + ".tar")
