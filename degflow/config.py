"""Configuration: dataclass defaults <- YAML file <- `key=value` arguments; and the frame that every job runs in."""

import copy
import dataclasses
import os
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")


def option(default: Any, meaning: str) -> Any:
    """A dataclass field with its default and the line that `--help` prints for it."""
    if isinstance(default, (dict, list)) or (dataclasses.is_dataclass(default) and not isinstance(default, type)):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata={"meaning": meaning})
    return dataclasses.field(default=default, metadata={"meaning": meaning})


def required(meaning: str) -> Any:
    """A text field that the user must set."""
    return dataclasses.field(default="", metadata={"meaning": meaning, "required": True})


def load(schema: type[T], arguments: Sequence[str]) -> T:
    """Build a configuration.

    A value is read as YAML, except that a word for a text field is taken literally: `output=007` is the folder 007.
    Lists and dicts are given whole, and replace the default; the labels of a dict may be written as numbers.

    Args:
        schema: a dataclass whose fields were made by `option` or `required`.
        arguments: `key=value` words; `config=FILE` names a YAML file that they override.

    Raises:
        ValueError: unknown key, value of the wrong type, broken rule, missing required key or file.
    """
    words = list(arguments)
    if wrong := [word for word in words if not word.partition("=")[0] or "=" not in word]:
        raise ValueError(f"argument {wrong[0]!r}: must be key=value (see --help)")
    files = [word.partition("=")[2] for word in words if word.startswith("config=")]
    words = [word for word in words if not word.startswith("config=")]
    loaded = _build(schema, [_file(file) for file in files] + [_word(schema, word) for word in words])
    for name, value, field in _leaves(loaded):
        if field.metadata.get("required") and not value:
            raise ValueError(f"{name}: must be given ({field.metadata['meaning']})")
    return loaded


def parse(schema: type[T], values: dict[str, Any]) -> T:
    """A configuration from plain values, e.g. those stored in a checkpoint; unknown keys are errors."""
    return _build(schema, [values])


def plain(config: Any) -> dict[str, Any]:
    """A dataclass as nested dicts and lists of plain values, ready for JSON."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True))


def dump(config: Any) -> str:
    """The resolved configuration as YAML; takes a dataclass or nested plain values."""
    return OmegaConf.to_yaml(OmegaConf.create(config) if isinstance(config, dict) else OmegaConf.structured(config))


def read(text: str) -> dict[str, Any]:
    """YAML text -> nested plain values."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(text)))


def run(main: Callable[[T], None], schema: type[T], about: str | None, arguments: Sequence[str] | None = None) -> None:
    """Run a job: `--help`, configuration, `main(config)`, and an exit code that scripts can trust.

    Exits with 0 after success, 2 for a bad configuration, 1 when the job failed; the last line on stderr says why.
    Other than expected errors (ValueError, OSError, ...) leave with their traceback.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if {"--help", "-h", "help"} & set(words):
        print(usage(schema, about or ""))
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
        sys.exit(_complain("interrupted", 130))


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
    """A value as a user would write it."""
    if isinstance(value, (tuple, list)):
        return "[" + ",".join(map(_short, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_short(item)}" for key, item in value.items()) + "}"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _leaves(config: Any, prefix: str = "") -> typing.Iterator[tuple[str, Any, dataclasses.Field]]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value, field


def _build(schema: type[T], parts: Sequence[dict[str, Any]]) -> T:
    """The schema's defaults <- each part in turn."""
    try:
        config = OmegaConf.structured(schema)
        for part in parts:
            values = _prepare(schema, part)
            _empty_dicts(config, values)
            config = OmegaConf.merge(config, values)
        return cast(T, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        raise ValueError(_explain(error)) from None


def _prepare(schema: type, values: Mapping[Any, Any], prefix: str = "") -> dict[Any, Any]:
    """Check that lists, dicts and groups of keys are given as such, and turn the labels of dicts into text."""
    types, prepared = typing.get_type_hints(schema), dict(values)
    for name, value in values.items():
        kind, key = types.get(name), f"{prefix}{name}"
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, Mapping):
                raise ValueError(f"{key}={_short(value)}: must be a group of keys, as {key}.NAME=VALUE")
            prepared[name] = _prepare(cast(type, kind), value, f"{key}.")
        elif typing.get_origin(kind) is dict:
            if not isinstance(value, Mapping):
                raise ValueError(f"{key}={_short(value)}: must be a dict, as {key}='{{LABEL: VALUE}}'")
            prepared[name] = {str(label): item for label, item in value.items()}
        elif typing.get_origin(kind) in (tuple, list) and not isinstance(value, (tuple, list)):
            raise ValueError(f"{key}={_short(value)}: must be a list, as {key}=[VALUE,VALUE]")
    return prepared


def _empty_dicts(config: Any, values: dict[Any, Any]) -> None:
    """Empty the dict fields that `values` gives: merging would keep the default's entries beside the new ones."""
    OmegaConf.set_readonly(config, False)  # nodes of frozen dataclasses are
    for name, value in values.items():
        kind = OmegaConf.get_type(config, name) if name in config else None
        if kind is dict:
            config[name] = {}
        elif isinstance(value, dict) and dataclasses.is_dataclass(kind):
            _empty_dicts(config[name], value)


def _word(schema: type, word: str) -> dict[str, Any]:
    """`a.b=value` -> {"a": {"b": value}}."""
    key, _, text = word.partition("=")
    names, kind = key.split("."), cast(Any, schema)
    for depth, name in enumerate(names):
        if typing.get_origin(kind) is dict:
            whole = ".".join(names[:depth])
            raise ValueError(f"{key}={text}: {whole} is given whole, as {whole}='{{LABEL: VALUE}}'")
        kind = typing.get_type_hints(kind).get(name) if dataclasses.is_dataclass(kind) else None
    values: Any = text if kind is str else _yaml(text, word)
    for name in reversed(names):
        values = {name: values}
    return values


def _file(file: str) -> dict[str, Any]:
    if not os.path.isfile(file):
        raise ValueError(f"config={file}: no such file")
    try:
        values = OmegaConf.to_container(OmegaConf.load(file))
    except Exception as error:  # the YAML parser's own, a broken encoding, an unreadable file
        raise ValueError(f"config={file}: {_line(error)}") from None
    if not isinstance(values, dict):
        raise ValueError(f"config={file}: must hold keys and values, as in KEY: VALUE")
    return cast(dict[str, Any], values)


def _yaml(text: str, word: str) -> Any:
    try:
        return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"])))["value"]
    except Exception as error:
        raise ValueError(f"{word}: not YAML: {_line(error)}") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _explain(error: OmegaConfBaseException) -> str:
    """One line: key, what is wrong."""
    message = (error.msg or str(error)).splitlines()[0]
    key = error.full_key
    return f"{key}: {message}" if key and not message.startswith(str(key)) else message


def _complain(error: object, code: int) -> int:
    hint = " (DEGFLOW_TRACEBACK=1 shows where)" if code == 1 else ""
    print(f"error: {error}{hint}", file=sys.stderr, flush=True)
    return code
