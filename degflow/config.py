"""Configuration: dataclass defaults <- YAML file <- `key=value` arguments; and the frame that every job runs in."""

import dataclasses
import os
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")


def option(default: Any, meaning: str) -> Any:
    """A dataclass field with its default and the line that `--help` prints for it."""
    if isinstance(default, (dict, list)) or (dataclasses.is_dataclass(default) and not isinstance(default, type)):
        return dataclasses.field(default_factory=lambda: default, metadata={"meaning": meaning})
    return dataclasses.field(default=default, metadata={"meaning": meaning})


def required(meaning: str) -> Any:
    """A text field that the user must set."""
    return dataclasses.field(default="", metadata={"meaning": meaning, "required": True})


def load(schema: type[T], arguments: Sequence[str]) -> T:
    """Build a configuration.

    Args:
        schema: a dataclass whose fields were made by `option` or `required`.
        arguments: `key=value` words; `config=FILE` names a YAML file that they override.

    Raises:
        ValueError: unknown key, value of the wrong type, broken rule, missing required key or file.
    """
    words = list(arguments)
    if wrong := [word for word in words if "=" not in word]:
        raise ValueError(f"argument {wrong[0]!r}: must be key=value (see --help)")
    files = [word.partition("=")[2] for word in words if word.startswith("config=")]
    words = [word for word in words if not word.startswith("config=")]
    try:
        parts = [_yaml(file) for file in files] + [OmegaConf.from_dotlist(words)]
        loaded = cast(T, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), *parts)))
    except OmegaConfBaseException as error:
        raise ValueError(_explain(error)) from None
    for name, value, field in _leaves(loaded):
        if field.metadata.get("required") and not value:
            raise ValueError(f"{name}: must be given ({field.metadata['meaning']})")
    return loaded


def parse(schema: type[T], values: dict[str, Any]) -> T:
    """A configuration from plain values, e.g. those stored in a checkpoint; unknown keys are errors."""
    try:
        return cast(T, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values)))
    except OmegaConfBaseException as error:
        raise ValueError(_explain(error)) from None


def plain(config: Any) -> dict[str, Any]:
    """A dataclass as nested dicts and lists of plain values, ready for JSON."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True))


def dump(config: Any) -> str:
    """The resolved configuration as YAML; takes a dataclass or nested plain values."""
    return OmegaConf.to_yaml(OmegaConf.create(config) if isinstance(config, dict) else OmegaConf.structured(config))


def read(text: str) -> dict[str, Any]:
    """YAML text -> nested plain values."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(text)))


def run(main: Callable[[T], None], schema: type[T], about: str, arguments: Sequence[str] | None = None) -> None:
    """Run a job: `--help`, configuration, `main(config)`, and an exit code that scripts can trust.

    Exits with 0 after success, 2 for a bad configuration, 1 when the job failed; the last line on stderr says why.
    Other than expected errors (ValueError, OSError, ...) leave with their traceback.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if {"--help", "-h", "help"} & set(words):
        print(usage(schema, about))
        return
    try:
        config = load(schema, words)
    except ValueError as error:
        sys.exit(_complain(error, 2))
    try:
        main(config)
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("DEGFLOW_TRACEBACK"):
            raise
        sys.exit(_complain(error, 1))
    except KeyboardInterrupt:
        sys.exit(_complain("interrupted; the same command continues where it stopped", 130))


def usage(schema: type, about: str) -> str:
    """The text of `--help`: what the job does, and every key with its default and meaning."""
    lines = [about.strip(), "", "Keys (key=value; config=FILE reads a YAML file first, the words override it):", ""]
    rows = []
    for name, value, field in _leaves(schema()):
        default = "(required)" if field.metadata.get("required") else _short(value)
        rows.append((f"{name}={default}", field.metadata["meaning"]))
    for left, meaning in rows:
        lines.append(f"  {left}")
        lines.append(f"      {meaning}")
    return "\n".join(lines)


def _short(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "[" + ",".join(map(str, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}: {item}" for key, item in value.items()) + "}"
    return {True: "true", False: "false", None: "null"}.get(value, str(value)) if not isinstance(value, (int, float)) or isinstance(value, bool) else str(value)


def _leaves(config: Any, prefix: str = "") -> typing.Iterator[tuple[str, Any, dataclasses.Field]]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value, field


def _yaml(file: str) -> Any:
    if not os.path.isfile(file):
        raise ValueError(f"config={file}: no such file")
    try:
        return OmegaConf.load(file)
    except Exception as error:
        raise ValueError(f"config={file}: {error}") from None


def _explain(error: OmegaConfBaseException) -> str:
    """One line: key, what is wrong."""
    message = (error.msg or str(error)).splitlines()[0]
    key = error.full_key
    return f"{key}: {message}" if key and not message.startswith(str(key)) else message


def _complain(error: object, code: int) -> int:
    hint = " (DEGFLOW_TRACEBACK=1 shows where)" if code == 1 else ""
    print(f"error: {error}{hint}", file=sys.stderr, flush=True)
    return code
