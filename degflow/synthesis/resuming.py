"""Whether a run may continue what its output holds: the stored configuration must make the same rows as the new one."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from degflow.config import parse, plain, read
from degflow.dataset.layout import CONFIG, is_leftover
from degflow.storage import Place, Source
from degflow.synthesis.settings import SynthesizeConfig

# These keys may change when a run is continued. `model` may too: the file's sha256 is compared instead.
FREE = (
    *("actors.min", "actors.max", "actors.gpus", "actors.threads", "actors.compile", "actors.timeout"),
    "price.per_hour",
    *("memory", "batch"),  # tiles and batches of another size change pixels by float rounding alone
    *("output", "model", "limit", "max_reject_rate", "dry_run", "overwrite", "extend", "retry_rejects"),
)
SOURCES = ("input", "root")  # in a shard's digest the planned files stand for these


class Recipe:
    """The keys and values that decide the rows.

    Args:
        config: resolved.
    """

    def __init__(self, config: SynthesizeConfig):
        self.values = {name: value for name, value in _flat(plain(config)) if name not in FREE}

    def digest(self, sources: Sequence[Source]) -> str:
        """Sha256 of all that decides the rows of a shard: the recipe and the planned files."""
        values = {name: value for name, value in self.values.items() if name not in SOURCES}
        text = json.dumps([values, [list(source) for source in sources]], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def changes(self, stored: "Recipe") -> list[str]:
        """What differs from a stored recipe, in words; two URIs of one place do not differ."""
        changed = []
        for name, value in self.values.items():
            old = stored.values[name]
            same = old == value or (name in SOURCES and old and value and Place(old).is_same(Place(value)))
            changed += [] if same else [f"{name} was {old}, now {value}"]
        return changed

    def is_stored_in(self, output: Place) -> bool:
        """Whether the output's configuration makes these rows; another driver may have overwritten it.

        Raises:
            OSError: it cannot be read, or there is none (FileNotFoundError).
        """
        stored = Recipe(parse(SynthesizeConfig, read(output.read(CONFIG).decode())))
        return stored.digest([]) == self.digest([])


def continued(config: SynthesizeConfig, output: Place) -> SynthesizeConfig:
    """Check a resolved configuration against the run in `output`, and take over that run's number of threads.

    With `overwrite` the configurations may differ.

    Raises:
        ValueError: the output holds something else, or a run with another configuration.
        OSError: the output cannot be read.
    """
    stored = _stored(output)
    if stored is None or config.overwrite:
        return config
    _check_version(config, output)
    if changes := Recipe(config).changes(Recipe(stored)):
        raise ValueError(
            f"output={output.uri}: holds a run with another configuration ({'; '.join(changes)}); "
            "choose another output, or overwrite=true"
        )
    threads = config.actors.threads or stored.actors.threads
    return replace(config, actors=replace(config.actors, threads=threads))


def _check_version(config: SynthesizeConfig, output: Place) -> None:
    """Raise ValueError if the stored configuration lacks keys: its shards' digests are of another version's recipe."""
    there = {name for name, _ in _flat(read(output.read(CONFIG).decode()))}
    if missing := sorted(Recipe(config).values.keys() - there):
        raise ValueError(
            f"output={output.uri}: its {CONFIG} has no {missing[0]}, so another version of degflow has begun it; "
            "finish it with that version, or choose another output, or overwrite=true"
        )


def _stored(output: Place) -> SynthesizeConfig | None:
    """The configuration of the run in the output; None if the output is empty."""
    foreign = f"output={output.uri}: is not empty and holds no dataset of this job; choose another"
    try:
        return parse(SynthesizeConfig, read(output.read(CONFIG).decode()))
    except FileNotFoundError:
        names = _names_in(output)
        if CONFIG in names:  # another driver has just written it
            return _stored(output)
        if names:
            raise ValueError(foreign) from None
        return None
    except NotADirectoryError:
        raise ValueError(f"output={output.uri}: is a file, or lies in one") from None
    except OSError as error:
        raise OSError(f"output={output.uri}: cannot be read ({type(error).__name__}: {error})") from error
    except Exception as error:  # the YAML reader raises many kinds for a foreign config.yaml
        raise ValueError(f"{foreign} (its config.yaml: {error})") from None


def _names_in(output: Place) -> list[str]:
    try:
        return [file.key for file in output.files() if not is_leftover(file.key)]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"output={output.uri}: cannot be written ({error})") from error


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested keys as "scale.low"."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
