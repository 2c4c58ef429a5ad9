import json
import re
import sys
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from degflow import config
from degflow.config import load, option, required
from tests import ROOT


@dataclass(frozen=True)
class Inner:
    levels: dict[str, float] = option({"1": 1.0, "2": 2.0, "4": 4.0}, "label -> scale")
    crop: int = option(256, "side of crops")
    rate: float = option(0.5, "learning rate")
    solver: Literal["euler", "heun"] = option("euler", "which solver")
    words: tuple[str, ...] = option(("a", "b"), "a list of words")
    counts: tuple[int, ...] = option((1, 2), "whole numbers")
    shares: list[float] = option([0.5], "numbers")
    pair: tuple[float, float] = option((0.9, 0.999), "two numbers")
    limit: int | None = option(None, "how many")
    gpus: int | str = option("auto", "how many, or auto")
    flip: bool = option(True, "whether to flip")

    def __post_init__(self):
        if self.crop < 8:
            raise ValueError(f"inner.crop={self.crop}: must be at least 8")


@dataclass(frozen=True)
class Outer:
    output: str = required("where results go")
    note: str = option("", "any text")
    inner: Inner = option(Inner())
    tuned: Inner = option(Inner(crop=64, levels={"1": 1.0, "3": 3.0}))


@dataclass(frozen=True)
class Texts:
    trees: dict[str, str] = option({}, "name -> folder")
    words: list[str] = option([], "any texts")


@pytest.fixture
def yaml(tmp_path):
    def write(text):
        path = tmp_path / "config.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return f"config={path}"

    return write


def refused(words):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        load(Outer, ["output=x", *words])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_then_yaml_then_words(yaml):
    file = yaml("output: from-yaml\ninner:\n  crop: 64\n  rate: 0.25\n")
    loaded = load(Outer, ["inner.crop=32", file])
    assert loaded == Outer("from-yaml", "", Inner(crop=32, rate=0.25))
    assert isinstance(loaded.inner, Inner)
    assert loaded.tuned.crop == 64


def test_of_two_files_or_words_the_later_counts(yaml, tmp_path):
    (tmp_path / "second.yaml").write_text("inner:\n  crop: 16\n")
    loaded = load(Outer, [yaml("output: x\ninner:\n  crop: 64\n  rate: 2\n"), f"config={tmp_path}/second.yaml"])
    assert (loaded.inner.crop, loaded.inner.rate) == (16, 2.0)
    assert load(Outer, ["output=x", "output=y"]).output == "y"


def test_values_take_their_fields_type():
    words = [
        "inner.rate=1",
        "inner.solver=heun",
        "inner.words=[c,1]",
        "inner.limit=3",
        "inner.gpus=0",
        "inner.flip=false",
    ]
    loaded = load(Outer, ["output=x", *words])
    assert loaded.inner == Inner(rate=1.0, solver="heun", words=("c", "1"), limit=3, gpus=0, flip=False)
    assert isinstance(loaded.inner.rate, float)
    assert load(Outer, ["output=x", "inner.limit=3", "inner.limit=null"]).inner.limit is None


@pytest.mark.parametrize("text", ["007", "1e5", "true", "*.png", "@here", "[a", "x # y", "a: b", "a=b", "s3://b/{p}?*"])
def test_a_word_for_a_text_field_is_literal(text):
    assert load(Outer, [f"output={text}"]).output == text


def test_an_empty_word_empties_a_text_field(yaml):
    assert load(Outer, [yaml("output: x\nnote: something\n"), "note="]).note == ""


@pytest.mark.parametrize("labels", ["1: 1.0, 2: 2.1", "'1': 1.0, '2': 2.1", '"1": 1, "2": 2.1'])
def test_a_given_dict_replaces_the_default_and_may_have_numbers_as_labels(yaml, labels):
    expected = {"1": 1.0, "2": 2.1}
    from_word = load(Outer, ["output=x", f"inner.levels={{{labels}}}"])
    from_file = load(Outer, ["output=x", yaml(f"inner:\n  levels: {{{labels}}}\n")])
    assert from_word.inner.levels == from_file.inner.levels == expected
    assert [type(key) for key in from_word.inner.levels] == [str, str]
    assert from_word.tuned.levels == {"1": 1.0, "3": 3.0}


def test_a_word_replaces_a_files_dict_and_fractions_are_labels(yaml):
    file = yaml("output: x\ninner:\n  levels: {1: 1, 2: 2, 3: 3}\n")
    loaded = load(Outer, [file, "inner.levels={1: 1, 1.532: 1.6, 3.361: 3.4}"])
    assert loaded.inner.levels == {"1": 1.0, "1.532": 1.6, "3.361": 3.4}
    assert load(Outer, [file]).inner.levels == {"1": 1.0, "2": 2.0, "3": 3.0}


def test_a_group_merges_where_a_dict_replaces(yaml):
    loaded = load(Outer, ["output=x", yaml("tuned:\n  rate: 0.1\n")])
    assert loaded.tuned == Inner(crop=64, rate=0.1, levels={"1": 1.0, "3": 3.0})


def test_defaults_are_not_shared():
    first, second = Outer("x"), Outer("x")
    first.inner.levels["9"] = 9.0
    assert second.inner.levels == Inner().levels == {"1": 1.0, "2": 2.0, "4": 4.0}


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("inner.crops=3", ["inner.crops", "Did you mean: 'crop'"]),
        ("fit.steps=3", ["fit", "not in"]),
        ("inner.crop=big", ["inner.crop", "'big'", "Integer"]),
        ("inner.crop=64.5", ["inner.crop", "'64.5'", "Integer"]),
        ("inner.crop=", ["inner.crop", "int"]),
        ("inner.rate=fast", ["inner.rate", "'fast'", "Float"]),
        ("inner.flip=maybe", ["inner.flip", "'maybe'", "bool"]),
        ("inner.solver=rk9", ["inner.solver", "'rk9'", "['euler', 'heun']"]),
        ("inner.crop=4", ["inner.crop=4", "must be at least 8"]),
        ("inner=3", ["inner=3", "must be a group of keys"]),
        ("inner.levels=3", ["inner.levels=3", "must be a dict"]),
        ("inner.levels={1: one}", ["inner.levels.1", "'one'", "Float"]),
        ("inner.levels.3=3.0", ["inner.levels.3=3.0", "inner.levels is given whole"]),
        ("inner.words=a", ["inner.words=a", "must be a list"]),
        ("inner.words=[a", ["inner.words=[a", "not YAML"]),
        ("inner.counts=[1.5,2]", ["inner.counts=[1.5,2]", "must be whole numbers"]),
        ("inner.counts=[a]", ["inner.counts=[a]", "must be whole numbers"]),
        ("inner.counts=[2.0]", ["inner.counts=[2.0]", "must be whole numbers"]),
        ("inner.rate=nan", ["inner.rate=nan", "must be a finite number"]),
        ("inner.rate=-inf", ["inner.rate=-inf", "must be a finite number"]),
        ("inner.levels={1: 1, 2: inf}", ["inner.levels.2=inf", "must be a finite number"]),
        ("inner.shares=[inf]", ["inner.shares=inf", "must be a finite number"]),
        ("inner.crop='9223372036854775808'", ["inner.crop=9223372036854775808", "must be below 2^63"]),
        ("inner.counts=[true]", ["inner.counts=[true]", "must be whole numbers"]),
        ("inner.counts=[[1]]", ["inner.counts=[[1]]", "must be whole numbers"]),
        ("inner.shares=[a,b]", ["inner.shares=[a,b]", "must be numbers"]),
        ("inner.shares=[1,.inf]", ["inner.shares=inf", "must be a finite number"]),
        ("inner.pair=[0.9]", ["inner.pair=[0.9]", "must have 2 values"]),
        ("inner.rate=.nan", ["inner.rate=nan", "must be a finite number"]),
        ("inner.levels={1: 1, 2: .inf}", ["inner.levels.2=inf", "must be a finite number"]),
        ("inner.crop=9223372036854775808", ["inner.crop=9223372036854775808", "must be below 2^63"]),
        ("output=", ["output", "must be given", "where results go"]),
        ("crop", ["'crop'", "must be key=value"]),
        ("=3", ["'=3'", "must be key=value"]),
        ("config=nowhere.yaml", ["config=nowhere.yaml", "no such file"]),
        ("config=", ["config=", "no such file"]),
    ],
)
def test_a_bad_word_is_named_with_its_rule_in_one_line(word, parts):
    message = refused([word])
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("inner: [1, 2\n", ["config.yaml", "line 1"]),
        ("- 1\n- 2\n", ["config.yaml", "must hold keys and values"]),
        (b"\xff\xfe\x00", ["config.yaml"]),
        ("inner:\n  crops: 3\n", ["inner.crops", "Did you mean: 'crop'"]),
        ("inner: 3\n", ["inner=3", "must be a group of keys"]),
        ("inner:\n  levels: [1, 2]\n", ["inner.levels=[1,2]", "must be a dict"]),
        ("output: [a]\n", ["output", "['a']"]),
        ("inner:\n  crop: 9\n  crop: 10\n", ["config.yaml", "duplicate key"]),
    ],
)
def test_a_bad_file_is_named_with_its_rule_in_one_line(yaml, text, parts):
    message = refused([yaml(text)])
    assert all(part in message for part in parts), message


@dataclass(frozen=True)
class Stage1:
    skips: str = option("")
    scenes: dict[str, Any] = option({})
    autoencoder: dict[str, Any] = option({})
    fit: dict[str, Any] = option({})


def test_a_name_alone_is_a_configuration_that_ships_unless_there_is_such_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "paper_rae").mkdir()  # a folder is no configuration
    assert load(Stage1, ["config=small_rae"]) == load(Stage1, [f"config={ROOT}/configs/small_rae.yaml"])
    assert load(Stage1, ["config=small_rae", "config=paper_rae", "skips=hr"]).fit["steps"] == 200000
    (tmp_path / "small_rae").write_text("skips: mine\n")
    assert load(Stage1, ["config=small_rae"]).skips == "mine"


@pytest.mark.parametrize("name", ["nonsense", "small_rae.yaml", ""])
def test_a_name_that_is_nowhere_gets_those_that_ship(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ", ".join(sorted(path.stem for path in (ROOT / "configs").iterdir()))
    assert refused([f"config={name}"]) == f"config={name}: no such file, and none of those that ship: {names}"


def test_a_path_is_no_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused(["config=./small_rae"]) == "config=./small_rae: no such file"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "# Stage 2.\nfoo: 1\n",
            r"^foo: Key 'foo' not in 'Outer' \(in .*config.yaml, which begins '# Stage 2\.'; is ",
        ),
        ("foo: 1\n", r"^foo: Key 'foo' not in 'Outer' \(in .*config.yaml; is it for another job\?\)$"),
    ],
)
def test_a_file_with_an_unknown_key_may_be_for_another_job(yaml, text, said):
    with pytest.raises(ValueError, match=said):
        load(Outer, ["output=x", yaml(text), "note=y"])
    assert "another job" not in refused([yaml("note: z\n"), "foo=1"])


def test_a_configuration_that_ships_may_be_for_another_job_too():
    said = r"^\w+: Key '\w+' not in 'Outer' \(in small_residual, which begins '# .*'; is it for another job\?\)$"
    assert re.search(said, refused(["config=small_residual", "output=x"]))


def test_an_empty_file_changes_nothing(yaml):
    assert load(Outer, ["output=x", yaml("")]) == Outer("x")


def test_a_missing_required_key_says_what_it_means():
    with pytest.raises(ValueError, match=r"^output: must be given \(where results go\)$"):
        load(Outer, [])


def test_dump_and_plain_come_back():
    saved = Outer("007", "a # b", Inner(levels={"1": 1.0, "1.532": 2.0}, limit=3))
    assert config.parse(Outer, config.plain(saved)) == saved
    assert config.parse(Outer, json.loads(json.dumps(config.plain(saved)))) == saved
    assert config.parse(Outer, config.read(config.dump(saved))) == saved
    assert config.dump(config.plain(saved)) == config.dump(saved)


def test_no_configuration_sees_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET", "hidden")
    (tmp_path / "keys.yaml").write_text("output: ${oc.env:SECRET}\n")
    for made in (
        lambda: config.parse(Outer, config.read("output: ${oc.env:SECRET}")),
        lambda: load(Outer, ["output=${oc.env:SECRET}"]),
        lambda: load(Outer, [f"config={tmp_path}/keys.yaml"]),
        lambda: load(Outer, ["output=x", "note=???"]),
    ):
        with pytest.raises(ValueError, match=r"=.*(SECRET|\?\?\?).*: must not hold \$\{...\} or \?\?\?") as error:
            made()
        assert "hidden" not in str(error.value)


def test_parse_names_an_unknown_key():
    with pytest.raises(ValueError, match=r"inner\.depth: Key 'depth' not in 'Inner'"):
        config.parse(Outer, {"output": "x", "inner": {"depth": 3}})


def test_usage_prints_every_key_with_its_default_and_meaning():
    text = config.usage(Outer, "What it does.\n")
    assert text.startswith("What it does.\n")
    lines = [line.strip() for line in text.splitlines()]
    for left, meaning in [
        ("output=(required)", "where results go"),
        ("note=", "any text"),
        ("inner.levels={1: 1.0, 2: 2.0, 4: 4.0}", "label -> scale"),
        ("inner.crop=256", "side of crops"),
        ("inner.rate=0.5", "learning rate"),
        ("inner.solver=euler", "which solver"),
        ("inner.words=[a,b]", "a list of words"),
        ("inner.limit=null", "how many"),
        ("inner.gpus=auto", "how many, or auto"),
        ("inner.flip=true", "whether to flip"),
        ("tuned.crop=64", "side of crops"),
    ]:
        assert lines[lines.index(left) + 1] == meaning
    assert sum("=" in line for line in text.splitlines() if line.startswith("  ")) == 24


@dataclass(frozen=True)
class Small:
    """A small network."""

    width: int = option(8, "channels")


@dataclass(frozen=True)
class Large:
    """A large network."""

    depth: int = option(2, "layers")
    data: str = required("what only the large network needs")


@dataclass(frozen=True)
class Chosen:
    """Which network."""

    name: str = option("small", "small or large", common=True)
    seed: int = option(0, "of the weights")
    small: Small = option(Small(), common=True, when="small")
    large: Large = option(Large(), common=True, when="large")


@dataclass(frozen=True)
class Job:
    """Keys of the job."""

    network: Chosen = option(Chosen())
    limit: int = option(0, "how many")
    rate: float = option(0.5, "learning rate", common=True)
    input: str = required("what is read")
    trees: dict[str, str] = required("name -> folder", dict)


def test_help_shows_required_and_common_keys_in_groups_and_counts_the_rest():
    parts = config.usage(Job, "About.\n").split("\n\n")
    assert parts[0] == "About."
    assert parts[2:] == [
        "Required:\n  input=(required)\n      what is read\n  trees=(required)\n      name -> folder",
        "Keys of the job:\n  rate=0.5\n      learning rate",
        "network: Which network:\n  network.name=small\n      small or large",
        "network.small: A small network:\n  network.small.width=8\n      channels",
        "2 more keys: --help all",
        "--check says whether the keys are good, and stops: exit code 0, or 2.",
    ]


def test_help_shows_the_values_that_words_give_and_the_group_that_they_choose(yaml):
    text = config.usage(Job, "", ["network.name=large", "input=x", yaml("rate: 2\n")])
    assert "  input=x\n" in text
    assert "  rate=2.0\n" in text
    assert "  network.large.depth=2\n" in text
    assert "  network.large.data=(required)\n" in text
    assert "small.width" not in text


def test_all_help_shows_every_key_of_what_is_chosen():
    text = config.usage(Job, "", everything=True)
    assert "  limit=0\n" in text
    assert "  network.seed=0\n" in text
    assert "network.large" not in text
    assert "more keys" not in text


def test_required_keys_may_be_dicts_and_are_asked_for_only_in_the_chosen_group():
    given = ["input=x", "trees={a: b}"]
    assert load(Job, given).trees == {"a": "b"}
    with pytest.raises(ValueError, match=r"^trees: must be given \(name -> folder\)$"):
        load(Job, given[:1])
    with pytest.raises(ValueError, match=r"^network.large.data: must be given"):
        load(Job, [*given, "network.name=large"])


JOB = """
import sys
from dataclasses import dataclass
from degflow.config import Unfinished, load, option, required, run

@dataclass(frozen=True)
class Config:
    mode: str = required("what to do")
    count: int = option(1, "a number")

def main(config):
    print("doing", config.mode, config.count)
    if config.mode == "said":
        load(Config, ["mode=x", "counts=1"])
    if config.mode == "unfinished":
        raise Unfinished("1 of 2 is missing")
    if config.mode == "value":
        raise ValueError("mode=value: is refused")
    if config.mode == "missing":
        open("/nowhere/at/all")
    if config.mode == "interrupt":
        raise KeyboardInterrupt
    if config.mode == "bug":
        raise RuntimeError("a bug")

run(main, Config, "About this job.")
"""


@pytest.mark.parametrize(
    ("words", "code", "last"),
    [
        (["mode=fine"], 0, None),
        (["--help"], 0, None),
        (["help", "all", "count=1"], 0, None),
        (["--help", "counts=1"], 2, "error: counts: Key 'counts' not in 'Config'. Did you mean: 'count'?"),
        (["mode=fine", "-h"], 0, None),
        (["mode=interrupt", "--check"], 0, None),
        (["--check"], 2, "error: mode: must be given (what to do)"),
        ([], 2, "error: mode: must be given (what to do)"),
        (["mode=fine", "counts=1"], 2, "error: counts: Key 'counts' not in 'Config'. Did you mean: 'count'?"),
        (["mode=unfinished"], 1, "error: 1 of 2 is missing"),
        (["mode=value"], 1, "error: mode=value: is refused (DEGFLOW_TRACEBACK=1 shows where)"),
        (["mode=said"], 2, "error: counts: Key 'counts' not in 'Config'. Did you mean: 'count'?"),
        (["mode=missing"], 1, "error: [Errno 2] No such file or directory: '/nowhere/at/all'"),
        (["mode=interrupt"], 130, "error: interrupted"),
    ],
)
def test_a_jobs_exit_code_and_last_line(words, code, last, monkeypatch, capsys):
    monkeypatch.delenv("DEGFLOW_TRACEBACK", raising=False)
    monkeypatch.setattr(sys, "argv", ["job.py", *words])
    found = 0
    try:
        exec(compile(JOB, "job.py", "exec"), {"__name__": "job"})
    except SystemExit as stop:
        found = stop.code
    out, err = capsys.readouterr()
    assert found == code
    assert ("doing" in out) == (len(words) == 1 and words[0].startswith("mode="))
    if last:
        assert err.splitlines()[-1].startswith(last)
        assert ("DEGFLOW_TRACEBACK" in err) == (words in (["mode=value"], ["mode=missing"], ["mode=unfinished"]))
        assert "Traceback" not in err
    else:
        assert err == ""
    if {"-h", "--help", "help"} & set(words) and code == 0:
        assert "About this job." in out
        assert "count=1" in out


@pytest.mark.parametrize(("mode", "error"), [("bug", RuntimeError), ("value", ValueError)])
def test_an_unexpected_error_and_a_wanted_traceback_come_through(mode, error, monkeypatch):
    monkeypatch.setenv("DEGFLOW_TRACEBACK", "1" if error is ValueError else "")
    monkeypatch.setattr(sys, "argv", ["job.py", f"mode={mode}"])
    with pytest.raises(error):
        exec(compile(JOB, "job.py", "exec"), {"__name__": "job"})


def test_a_field_without_option_needs_no_meaning_to_load():
    @dataclass(frozen=True)
    class Bare:
        sizes: list[int] = field(default_factory=lambda: [1])

    assert load(Bare, ["sizes=[2,3]"]).sizes == [2, 3]


@pytest.mark.parametrize("text", ["007", "2024_01_15", "yes", "1:30", "1e3", "0x10", "2026-11-30"])
def test_texts_are_taken_as_they_stand_in_files_too(text, yaml):
    loaded = load(Outer, [yaml(f"output: {text}\nnote: '{text}'\n")])
    assert (loaded.output, loaded.note) == (text, text)
    assert load(Texts, [f"trees={{a: {text}, b: '{text}'}}"]).trees == {"a": text, "b": text}
    assert load(Texts, [yaml(f"trees:\n  a: {text}\n")]).trees == {"a": text}
    assert load(Texts, [f"words=[{text}, '{text}']"]).words == [text, text]


def test_a_file_may_merge_a_group_and_leave_a_text_empty(yaml):
    for tuned in ("{<<: *a, rate: 0.1}", "{rate: 0.1, <<: *a}"):
        loaded = load(Outer, ["output=x", yaml(f"inner: &a {{crop: 32}}\ntuned: {tuned}\n")])
        assert (loaded.tuned.crop, loaded.tuned.rate) == (32, 0.1)
    for merged in ("{<<: *a, b: 008}", "{b: 008, <<: *a}"):
        text = f"words: []\ntrees: {merged}\n".replace("*a", "{a: x}")
        assert load(Texts, [yaml(text)]).trees == {"a": "x", "b": "008"}
    assert "note" in refused([yaml("note: null\n")])


@pytest.mark.parametrize("text", ["{1: 1.0, 2: 2.0, 2: 4.0}", "{1: 1.0, '2': 2.0, 2: 4.0}", "{a: 1.0, a: 2.0}"])
def test_a_label_that_is_given_twice_is_refused(text, yaml):
    for said in (refused([f"inner.levels={text}"]), refused([yaml(f"inner: {{levels: {text}}}")])):
        assert re.search("given twice|duplicate|Conflicting", said)
