"""A finished dataset -> the layouts that SR trainers read.

    paired       gt/NAME.png  lq/NAME.png  meta_info.txt  meta_info_pair.txt     (size=scaled: below x2/, x3/, ...)
    realsr       2/NAME_HR.png  2/NAME_LR2.png  3/...
    webdataset   part-000000.tar ... with NAME.hr.png  NAME.lr.png  NAME.json

Every layout also has `export.yaml`, `index/part-000000.json` ... and `_SUCCESS`, which is written last.

1. `export` gives the parts of the dataset to processes (`export_parts`). A part's files depend on the part alone, so
   any number of processes leaves the same bytes.
2. A part is done when its index exists. The index has the part's sha256, and the row of every pair. So a second run
   continues where the first one stopped, and exports the parts that were added to the dataset meanwhile.
3. A file's name depends on the row's key and draw alone, and cannot lead out of its folder (`file_name`).
4. `index/` says which parts are done. In an object store the pairs' files, which may be millions, are listed only to be
   deleted. A continued export to a local folder also looks through them for hidden files that a killed process left.
"""

import contextlib
import math
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from degflow.capture.scenes import HR_LABEL
from degflow.config import dump, option, plain, read, required
from degflow.dataset.export_layouts import Layout, Paired, RealSR, WebDataset
from degflow.dataset.export_parts import INDEX, PartExporter, Tally, export_parts, index_name, read_index, tally_of
from degflow.dataset.layout import EXPORT, SUCCESS
from degflow.dataset.reader import FinishedDataset
from degflow.storage import Place

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
        {},
        "for realsr: folder label -> scale; a row goes to the nearest. {}: the dataset's scales, if they are a list or "
        "a grid",
    )
    tolerance: float | None = option(
        None,
        "for realsr: rows farther than this from their label's scale are left out; null: none (with labels={}: all but "
        "equal ones)",
    )
    workers: int | None = option(None, "processes, each with a part of the dataset; null: as many as CPUs or parts")
    threads: int = option(4, "photographs that each process fetches, encodes and writes at the same time")
    verify: bool = option(False, "first compare each part with the manifest's sha256; reads parts twice")
    overwrite: bool = option(False, "first delete the export in output (no other file)")

    def __post_init__(self):
        rules = (
            ("layout", self.layout in ("paired", "realsr", "webdataset"), "must be paired, realsr or webdataset"),
            ("labels", not self.labels or self.layout == "realsr", "is for layout=realsr only"),
            ("tolerance", self.tolerance is None or self.layout == "realsr", "is for layout=realsr only"),
            ("tolerance", self.tolerance is None or self.tolerance >= 0, "must not be negative"),
            ("workers", self.workers is None or self.workers >= 1, "must be null or at least 1"),
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
    total, pending = sum(part.rows for part in source.parts), [part for part in source.parts if part.name not in done]
    exporter = PartExporter(source, layout, config.output, config.layout == "webdataset", config.threads)
    with tqdm(total=total, initial=total - sum(part.rows for part in pending), desc="exporting", unit="row") as bar:
        done |= export_parts(exporter, pending, config.workers, bar.update)
    if isinstance(layout, Paired):
        _list(layout, source, output)
    output.write(SUCCESS, source.sha256.encode())
    _summarise(config, total, list(done.values()))


def _list(layout: Paired, source: FinishedDataset, output: Place) -> None:
    """Write the files that list all pairs, which may be too many for the memory."""
    names = [index_name(part.name) for part in source.parts]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as closing, ThreadPoolExecutor(16) as pool:
        files: dict[str, TextIO] = {}
        for first in range(0, len(names), 64):
            for index in pool.map(lambda name: read_index(output, name), names[first : first + 64]):
                for name, line in (found for pair in index["pairs"] for found in layout.listings(pair).items()):
                    if name not in files:
                        files[name] = closing.enter_context(open(f"{folder}/{len(files)}", "w", encoding="utf-8"))
                    files[name].write(line)
        for name, file in files.items():
            file.close()
            output.upload(file.name, name)


def _layout(config: ExportConfig, source: FinishedDataset) -> Layout:
    if config.layout == "paired":
        return Paired(source)
    return WebDataset(source) if config.layout == "webdataset" else RealSR(source, config.labels, config.tolerance)


def _summarise(config: ExportConfig, rows: int, tallies: Sequence[Tally]) -> None:
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


def _claim(config: ExportConfig, source: FinishedDataset, output: Place) -> dict[str, Tally] | None:
    """Prepare the output, and return its finished parts; None if the whole export is finished."""
    asked = {name: value for name, value in plain(config).items() if name in ("layout", "labels", "tolerance")}
    stored, done = _stored(output), {}
    if stored is None and output.exists() and output.files():
        raise ValueError(f"output={config.output}: is not empty and holds no export of this job; choose another")
    if stored is not None and config.overwrite:
        _clear(output)
    elif stored is not None:
        if changed := [
            f"{name} was {stored.get(name)}, now {asked[name]}" for name in asked if asked[name] != stored.get(name)
        ]:
            raise ValueError(f"output={config.output}: holds another export ({'; '.join(changed)}); choose another")
        finished = output.exists(SUCCESS)
        if finished and output.read(SUCCESS).decode() == source.sha256:
            return None
        done = _done(config, source, output)
        if finished:
            output.delete(SUCCESS)
        if not done and stored.get("dataset") != source.sha256:
            _clear(output)  # what an export of another dataset left that was stopped in its first parts
        for name in _leftovers(output):
            output.delete(name)
    output.write(EXPORT, dump({"input": config.input, "dataset": source.sha256} | asked).encode())
    return done


def _clear(output: Place) -> None:
    """Delete the export's files but EXPORT, and no others: first what says that it or a part of it is done."""
    names = [file.key for file in output.files() if _is_ours(file.key) and file.key != EXPORT]
    for first in (lambda name: name == SUCCESS, lambda name: name.startswith(f"{INDEX}/"), lambda name: True):
        output.delete_all(list(filter(first, names)))
        names = [name for name in names if not first(name)]


def _stored(output: Place) -> dict[str, Any] | None:
    """The configuration of the export in the output, if there is one."""
    try:
        return read(output.read(EXPORT).decode())
    except FileNotFoundError:
        return None


def _done(config: ExportConfig, source: FinishedDataset, output: Place) -> dict[str, Tally]:
    parts = {part.name: part.sha256 for part in source.parts}

    def look(name: str) -> tuple[str, Tally]:
        index = read_index(output, name)
        if parts.get(index["part"]) != index["sha256"]:
            raise ValueError(
                f"output={config.output}: holds an export of another dataset ({index['part']} differs from that of "
                f"{config.input}); choose another output, or overwrite=true"
            )
        return index["part"], tally_of(index["pairs"])

    with ThreadPoolExecutor(16) as pool:
        return dict(pool.map(look, [file.key for file in output.files(INDEX) if _OURS.fullmatch(file.key)]))


def _leftovers(output: Place) -> Iterator[str]:
    """The hidden files of local writes that were killed; an object store keeps no half-written object."""
    for folder, _, names in os.walk(output.root) if output.local else ():
        place = Path(folder).relative_to(output.root)
        for name in (str(place / name) for name in names if name.startswith(".")):
            if _is_ours(name):
                yield name


def _is_ours(name: str) -> bool:
    leftover = _LEFTOVER.fullmatch(name)
    return bool(_OURS.fullmatch("".join(leftover.groups()) if leftover else name))
