"""The recipe of a dataset: the keys of its configuration that decide the rows, and the digests of it in its parts."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from degflow.config import read
from degflow.dataset.layout import CONFIG
from degflow.storage import Place, Source

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
        config: a resolved configuration of synthesize, as nested dicts.
    """

    def __init__(self, config: Mapping[str, Any]):
        self.values = {name: value for name, value in flat(config) if name not in FREE}

    @classmethod
    def stored_in(cls, output: Place) -> "Recipe":
        """The recipe of the dataset in the output.

        Raises:
            OSError: it cannot be read, or there is none (FileNotFoundError).
        """
        return cls(read(output.read(CONFIG).decode()))

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
            OSError: as `stored_in`.
        """
        return Recipe.stored_in(output).digest([]) == self.digest([])


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested keys as "scale.low"."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
