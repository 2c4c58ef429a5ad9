"""What a run finds in its output, and what is left to do: may it go on, and which photographs come next in the plan."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute

from degflow import images
from degflow.config import parse, plain, read
from degflow.dataset.layout import CONFIG, SOURCE, Record, is_leftover
from degflow.dataset.manifest import rejects_of
from degflow.dataset.plan import Part, Plan
from degflow.storage import Place, Source
from degflow.synthesis.inventory import Listing, list_input, root_of
from degflow.synthesis.settings import SynthesizeConfig

pc: Any = pyarrow.compute  # its functions are made at import, unseen by type checkers

# A run may be continued with other values of these; of the rest, it may not.
# The model is compared by its sha256.
FREE = (
    *("actors.min", "actors.max", "actors.gpus", "actors.threads", "actors.device", "actors.compile"),
    *("output", "model", "max_reject_rate", "dry_run", "overwrite", "extend", "retry_rejects"),
)


def continued(config: SynthesizeConfig, output: Place) -> SynthesizeConfig:
    """The configuration, checked against the run that `output` holds; with `overwrite` it may differ.

    Raises:
        ValueError: the output holds something else, or a run that differs.
    """
    stored = _stored(config, output)
    if stored is None or config.overwrite:
        return config
    if config.actors.threads == 0:
        config = replace(config, actors=replace(config.actors, threads=stored.actors.threads))
    old, new = dict(_flat(plain(stored))), dict(_flat(plain(config)))
    for name in ("input", "root"):
        if old[name] and new[name] and Place(old[name]).is_same(Place(new[name])):
            old[name] = new[name]
    differing = [name for name in new if name not in FREE and old[name] != new[name]]
    if differing:
        changes = "; ".join(f"{name} was {old[name]}, now {new[name]}" for name in differing)
        raise ValueError(
            f"output={config.output}: holds a run with another configuration ({changes}); "
            "choose another output, or overwrite=true"
        )
    return config


def _stored(config: SynthesizeConfig, output: Place) -> SynthesizeConfig | None:
    """The configuration of the run that the output holds; None when it holds nothing."""
    elsewhere = f"output={config.output}: is not empty and holds no dataset of this job; choose another"
    try:
        return parse(SynthesizeConfig, read(output.read(CONFIG).decode()))
    except FileNotFoundError:
        names = _names_in(config, output)
        if CONFIG in names:  # another driver has just written it
            return _stored(config, output)
        if names:
            raise ValueError(elsewhere) from None
        return None
    except NotADirectoryError:
        raise ValueError(f"output={config.output}: is a file, or lies in one") from None
    except OSError as error:
        raise OSError(f"output={config.output}: cannot be read ({type(error).__name__}: {error})") from error
    except Exception as error:  # whatever a foreign file of that name makes a YAML reader say
        raise ValueError(f"{elsewhere} (its config.yaml: {error})") from None


def _names_in(config: SynthesizeConfig, output: Place) -> list[str]:
    try:
        return [file.key for file in output.files() if not is_leftover(file.key)]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"output={config.output}: cannot be written ({error})") from error


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def recipe_of(config: SynthesizeConfig, sources: Sequence[Source]) -> str:
    """Digest of all that decides a shard's rows: the resolved configuration and the planned files."""
    decisive = {name: value for name, value in _flat(plain(config)) if name not in (*FREE, "input", "root")}
    text = json.dumps([decisive, [list(source) for source in sources]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def is_still_wanted(config: SynthesizeConfig, sources: Sequence[Source]) -> bool:
    """Whether the output's configuration is still this one: a driver with overwrite=true may have come since."""
    try:
        stored = parse(SynthesizeConfig, read(Place(config.output).read(CONFIG).decode()))
    except FileNotFoundError:
        return True
    return recipe_of(stored, sources) == recipe_of(config, sources)


def first_part(config: SynthesizeConfig) -> Part:
    """List the input, keep images, and deal them into shards in the order of their keys.

    Raises:
        ValueError: no images there.
        OSError: the input cannot be listed.
    """
    listing = _list(config)
    if not len(listing.sources):
        found = _count(listing.others, "other file") if listing.others else "nothing"
        raise ValueError(f"input={config.input}: {found} there, but no file ending in {', '.join(images.SUFFIXES)}")
    return Plan.empty().next_part(listing.sources, config.shard.images)


def _list(config: SynthesizeConfig) -> Listing:
    listing = list_input(config.input, config.root, without=Place(config.output))
    if listing.others and len(listing.sources):
        print(f"{_count(listing.others, 'file')} in {config.input} without an image's suffix: left out")
    if listing.unnamed:
        first = listing.unnamed[0]
        print(f"{_count(len(listing.unnamed), 'name')} in {config.input} not in UTF-8: left out, e.g. {first!a}")
    return listing._replace(sources=listing.sources.slice(0, config.limit or None))


def news(config: SynthesizeConfig, plan: Plan) -> Part:
    """The files that came to the input since the plan was made, as its next part."""
    listed = _list(config).sources
    new = listed.filter(pc.invert(pc.is_in(listed["key"], plan.table["key"])))
    room = max(0, config.limit - plan.files) if config.limit else len(new)
    return plan.next_part(new.slice(0, room), config.shard.images)


def rejected(config: SynthesizeConfig, plan: Plan, records: Mapping[int, Record], output: Place) -> Part:
    """The files that stand rejected, with the size and tag that they have now, as the plan's next part."""
    keys = sorted(reject.key for reject in rejects_of(output, plan, records))
    rows = plan.table.filter(pc.is_in(plan.table["key"], pa.array(keys, pa.string())))
    planned = {row["key"]: Source(row["key"], row["size"], row["etag"]) for row in rows.to_pylist()}
    root = root_of(config.input, config.root)
    with ThreadPoolExecutor(16) as pool:
        now = list(pool.map(lambda key: _as_it_is_now(root, planned[key]), keys))
    columns = list(zip(*now, strict=True)) or [[], [], []]
    sources = [pa.array(column, field.type) for column, field in zip(columns, SOURCE, strict=True)]
    return plan.next_part(pa.table(sources, SOURCE), config.shard.images)


def _as_it_is_now(root: Place, source: Source) -> Source:
    try:
        found = root.source(source.key)
    except OSError:
        return source  # whatever is wrong with it, the shard will say
    return Source(source.key, found.size if source.size >= 0 else -1, found.etag if source.etag else "")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
