"""Configuration: dataclass defaults <- YAML file <- `key=value` arguments; and `run`, which starts every job."""

import contextlib
import copy
import ctypes
import dataclasses
import io
import math
import os
import sys
import textwrap
import traceback
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

T = TypeVar("T")
HELP = {"--help", "-h", "help"}
_CHECK = "--check"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt(3)
_KEYS = (
    "Keys are given as key=value. config=NAME takes keys from a configuration that ships, and config=FILE from a YAML\n"
    "file. Keys in the command override these."
)


class Unfinished(RuntimeError):
    """A job that did not do all its work, where the same command may do the rest."""


class Key(NamedTuple):
    """One key of a configuration, and what `--help` says of it."""

    name: str
    value: Any
    meaning: str
    group: str
    required: bool
    common: bool


def option(default: Any, meaning: str = "", *, common: bool = False, when: str = "") -> Any:
    """Make a dataclass field.

    Args:
        default: its value when none is given. A dataclass makes a group of keys.
        meaning: the line that `--help` prints for it; a group's heading is its class's docstring.
        common: `--help` shows the key, or every key of the group; the rest comes with `--help all`.
        when: for a group, the value that its neighbour `name` must have for `--help` to show the group.
    """
    metadata = {"meaning": meaning, "common": common, "when": when}
    if isinstance(default, (dict, list)) or (dataclasses.is_dataclass(default) and not isinstance(default, type)):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def required(meaning: str, kind: type = str) -> Any:
    """Make a field that the user must set: a text, or a `kind` that is not empty."""
    return dataclasses.field(default_factory=kind, metadata={"meaning": meaning, "required": True})


def load(schema: type[T], arguments: Sequence[str]) -> T:
    """Build a configuration.

    A value is read as YAML, except that texts are taken literally, also in files, in lists and in dicts:
    `output=007` is the folder 007, and `input: yes` the folder yes. Lists and dicts are given whole, and replace
    the default; the labels of a dict may be written as numbers. Numbers are finite, and whole ones below 2^63.
    OmegaConf's `${...}` and `???` are refused: the first would put a variable of the environment into the stored
    configuration, the second means that a key is missing.

    Args:
        schema: a dataclass whose fields were made by `option` or `required`.
        arguments: `key=value` words; `config=FILE` names a YAML file that they override, `config=NAME` one that ships.

    Raises:
        ValueError: unknown key, value of the wrong type, broken rule, missing required key or file.
    """
    loaded = _merged(schema, arguments)
    for key in _keys(loaded):
        if key.required and not key.value:
            raise ValueError(f"{key.name}: must be given ({key.meaning})")
    return loaded


def _merged(schema: type[T], arguments: Sequence[str]) -> T:
    words = list(arguments)
    if wrong := [word for word in words if not word.partition("=")[0] or "=" not in word]:
        raise ValueError(f"argument {wrong[0]!r}: must be key=value (see --help)")
    files = [word.partition("=")[2] for word in words if word.startswith("config=")]
    words = [word for word in words if not word.startswith("config=")]
    parts = [(file, _file(schema, file)) for file in files]
    return _build(schema, [*parts, *(("", _word(schema, word)) for word in words)])


def parse(schema: type[T], values: dict[str, Any]) -> T:
    """A configuration from plain values, e.g. those stored in a checkpoint; unknown keys are errors, as in `load`."""
    return _build(schema, [("", values)])


def _check_values(value: Any, name: str = "") -> None:
    """Raise ValueError for a value below this one that `load` refuses whatever its key."""
    if isinstance(value, Mapping):
        for key, below in value.items():
            _check_values(below, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for below in value:
            _check_values(below, name)
    elif isinstance(value, str) and ("${" in value or value == "???"):
        raise ValueError(f"{name}={value}: must not hold ${{...}} or ???")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}={value}: must be a finite number")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}={value}: must be below 2^63")


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
    """Run a job: print its help, or load its configuration and call `main` with it; `--check` only loads it.

    The exit code is 0 after success. It is 2 if a key, or a file that a key names, breaks a rule of degflow
    (ValueError): the same command would fail again. It is 1 if the job failed at its work (`Unfinished`, OSError,
    ImportError). The last line on stderr then says why. Other errors keep their traceback, with 1. The process keeps
    freed memory from then on (`keep_freed_memory`).
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if HELP & set(words):
            given = [word for word in words if word not in HELP | {"all"}]
            show(usage(schema, about or "", given, everything="all" in words))
            return
        config = load(schema, [word for word in words if word != _CHECK])
    except ValueError as error:
        sys.exit(_complain(error, 2))
    if _CHECK in words:
        return
    keep_freed_memory()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a log shows each line at once
    try:
        main(config)
    except (ValueError, OSError, ImportError, Unfinished) as error:
        if os.environ.get("DEGFLOW_TRACEBACK"):
            raise
        said = _is_said_here(error)
        code = 2 if said and isinstance(error, ValueError) else 1
        sys.exit(_complain(error, code, "" if said else " (DEGFLOW_TRACEBACK=1 shows where)"))
    except KeyboardInterrupt:
        sys.exit(_complain("interrupted", 130))


def keep_freed_memory() -> None:
    """Let glibc keep up to 128 MiB of freed memory in each of its arenas, for arrays and tensors of up to 32 MiB.

    By default it returns every freed tensor of some MB to the system, and the next tensor causes page faults. For an
    image of 256 x 256 pixels an actor of `synthesize` had 18 000 of them, a third of its time; with this it has 51.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)  # glibc's largest
        libc.mallopt(M_TRIM_THRESHOLD, 128 << 20)


def usage(schema: type, about: str, arguments: Sequence[str] = (), *, everything: bool = False) -> str:
    """The text of `--help`.

    Args:
        schema: the job's configuration.
        about: what the job does.
        arguments: words as for `load`; the text shows their values, and only the groups that they choose.
        everything: show every key, not only the required and common ones. So it is where no key is common.
    """
    keys = sorted(_keys(_merged(schema, arguments)), key=lambda key: not key.required)
    everything = everything or not any(key.common for key in keys)
    shown = [key for key in keys if everything or key.required or key.common]
    groups: dict[str, list[str]] = {}
    for key in shown:
        value = "(required)" if key.required and not key.value else _short(key.value)
        lines = groups.setdefault("Required" if key.required else key.group, [])
        lines += [f"  {key.name}={value}", textwrap.indent(textwrap.fill(key.meaning, 110), " " * 6)]
    parts = [about.strip(), _KEYS]
    parts += ["\n".join([f"{group}:", *lines]) for group, lines in groups.items()]
    if len(shown) < len(keys):
        parts.append(f"{len(keys) - len(shown)} more keys: --help all")
    parts.append(f"{_CHECK} says whether the keys are good, and stops: exit code 0, or 2.")
    return "\n\n".join(parts)


def _short(value: Any) -> str:
    """A value as a user would write it."""
    if isinstance(value, (tuple, list)):
        return "[" + ",".join(map(_short, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_short(item)}" for key, item in value.items()) + "}"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _keys(config: Any, prefix: str = "", common: bool = False) -> Iterator[Key]:
    """The keys of a configuration, without the groups that `when` leaves out; a class's own keys come first."""
    doc = (type(config).__doc__ or "").partition("\n")[0].rstrip(".")
    group, below = f"{prefix[:-1]}: {doc}" if prefix else doc, []
    for field in dataclasses.fields(config):
        value, said = getattr(config, field.name), field.metadata
        known = common or said.get("common", False)
        if not dataclasses.is_dataclass(value):
            yield Key(prefix + field.name, value, said.get("meaning", ""), group, said.get("required", False), known)
        elif said.get("when", "") in ("", getattr(config, "name", "")):
            below.append((value, f"{prefix}{field.name}.", known))
    for arguments in below:
        yield from _keys(*arguments)


def show(text: str) -> None:
    """Print a text, of which a reader as `head` may take as much as it wants."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would try to flush it again at its end


def _build(schema: type[T], parts: Sequence[tuple[str, dict[str, Any]]]) -> T:
    """The schema's defaults <- the values of each part in turn, which come from a file or from elsewhere ("")."""
    file = ""
    try:
        config = OmegaConf.structured(schema)
        for file, part in parts:  # noqa: B007 (the error names it)
            _check_values(part)
            values = _prepare(schema, part)
            _empty_dicts(config, values)
            config = OmegaConf.merge(config, values)
        _check_values(OmegaConf.to_container(config, enum_to_str=True))  # of texts it has made numbers
        return cast(T, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        unknown = file and isinstance(error, (ConfigKeyError, ConfigAttributeError))
        raise ValueError(_explain(error) + (_of_another_job(file) if unknown else "")) from None


def _of_another_job(file: str) -> str:
    """What an unknown key in a file may mean."""
    with open(found_file(file), encoding="utf-8") as text:
        first = text.readline().strip()
    about = f", which begins {first!r}" if first.startswith("#") else ""
    return f" (in {file}{about}; is it for another job?)"


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
        elif typing.get_origin(kind) in (tuple, list):
            _check_items(key, typing.get_origin(kind), typing.get_args(kind), value)
    return prepared


def _check_items(key: str, kind: Any, kinds: tuple[Any, ...], items: Sequence[Any]) -> None:
    """Raise ValueError unless a list has the items of its type; OmegaConf's own errors do not name the key."""
    if kind is tuple and Ellipsis not in kinds and len(items) != len(kinds):
        raise ValueError(f"{key}={_short(items)}: must have {len(kinds)} values")
    rules: dict[Any, str] = {int: "must be whole numbers", float: "must be numbers"}
    if kinds[0] in rules and not all(_is_number(item, kinds[0]) for item in items):
        raise ValueError(f"{key}={_short(items)}: {rules[kinds[0]]}")


def _is_number(item: Any, kind: type) -> bool:
    """Whether it is an int or float, or the text of one."""
    try:
        return not isinstance(item, bool) and (kind is float or isinstance(item, (int, str))) and kind(item) is not None
    except (TypeError, ValueError):
        return False


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
    values: Any = text if kind is str else _yaml(text, word, kind)
    for name in reversed(names):
        values = {name: values}
    return values


def shipped() -> dict[str, Path]:
    """Name -> file of the configurations that ship: beside this file in a wheel, at the root of a clone."""
    here = Path(__file__).parent
    folder = next((f for f in (here / "configs", here.parent / "configs") if f.is_dir()), here)
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def found_file(file: str) -> Path:
    """The file that `config=` names; where no file has this name, the configuration that ships under it."""
    if os.path.isfile(file):
        return Path(file)
    if os.sep in file:
        raise ValueError(f"config={file}: no such file")
    if file not in (ships := shipped()):
        raise ValueError(f"config={file}: no such file, and none of those that ship: {', '.join(ships)}")
    return ships[file]


def _file(schema: type, file: str) -> dict[str, Any]:
    path = found_file(file)
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
        values = _as_written(values, yaml.compose(path.read_text("utf-8"), yaml.SafeLoader), schema)
    except Exception as error:  # the YAML parser's own, a broken encoding, an unreadable file
        raise ValueError(f"config={file}: {_line(error)}") from None
    if not isinstance(values, dict):
        raise ValueError(f"config={file}: must hold keys and values, as in KEY: VALUE")
    return cast(dict[str, Any], values)


def _yaml(text: str, word: str, kind: Any) -> Any:
    try:
        value = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"])))["value"]
        return _as_written(value, yaml.compose(text, yaml.SafeLoader), kind)
    except Exception as error:
        raise ValueError(f"{word}: not YAML: {_line(error)}") from None


def _as_written(value: Any, node: Any, kind: Any) -> Any:
    """A value of a type, with its texts as they stand in the YAML node that it was read from.

    Raises:
        ValueError: a dict has a label twice. OmegaConf sees this for texts alone, not for numbers.
    """
    if kind is str and isinstance(node, yaml.ScalarNode) and value is not None:
        return node.value
    if isinstance(node, yaml.SequenceNode) and isinstance(value, list):
        items = typing.get_args(kind)[:1] or (None,)
        return [_as_written(item, below, items[0]) for item, below in zip(value, node.value, strict=True)]
    if not isinstance(node, yaml.MappingNode) or not isinstance(value, Mapping):
        return value
    pairs = [(label.value, below) for label, below in node.value if label.tag != "tag:yaml.org,2002:merge"]
    written = dict(pairs)
    if len(written) < len(pairs):
        labels = [label for label, _ in pairs]
        raise ValueError(f"{next(label for label in labels if labels.count(label) > 1)} is given twice")
    kinds = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
    items = typing.get_args(kind)[1] if typing.get_origin(kind) is dict else None
    return {label: _as_written(item, written.get(str(label)), kinds.get(label, items)) for label, item in value.items()}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _explain(error: OmegaConfBaseException) -> str:
    """One line: key, what is wrong."""
    message = (error.msg or str(error)).splitlines()[0]
    key = error.full_key
    return f"{key}: {message}" if key and not message.startswith(str(key)) else message


def _is_said_here(error: BaseException) -> bool:
    """Whether a `raise` of degflow raised it: then its sentence says all, and a traceback adds nothing."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith("degflow.") and (last.line or "").startswith("raise ")


def _complain(error: object, code: int, hint: str = "") -> int:
    print(f"error: {error}{hint}", file=sys.stderr, flush=True)
    return code
