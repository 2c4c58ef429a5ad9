"""The list of commands, and what a word that is none of them gets."""

import os
import resource
import subprocess
import sys
from dataclasses import dataclass

import pytest

from degflow import __version__
from degflow.__main__ import COMMANDS, main
from tests import ROOT


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_command_with_a_line(words, capsys):
    main(words)
    lines = capsys.readouterr().out.splitlines()
    listed = dict(line.split(maxsplit=1) for line in lines if line.startswith("  "))
    assert list(listed) == list(COMMANDS)
    assert listed["export"] == "A finished dataset -> folders or tars that SR trainers read."
    assert all(40 < len(text) < 110 and text.endswith(".") for text in listed.values())
    assert max(map(len, lines)) <= 130


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_explains_its_keys(name, capsys):
    main([name, "--help"])
    text = capsys.readouterr().out
    assert f"\n    degflow {name} " in text  # an example
    assert "\nKeys are given as key=value." in text
    assert (" photograph=" if name == "explore" else " output=") in text


@dataclass(frozen=True)
class Nothing:
    """A command without keys."""


def page_faults():
    """Page faults in 40 rounds of eight tensors of 2 MiB, after 10 others."""
    import torch

    def once():
        return sum(tensor[0] for tensor in [torch.ones(2**19) for _ in range(8)])

    for _ in range(10):
        once()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(40):
        once()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def allocate():
    """Allocates and frees, as networks do."""
    return lambda _: print(page_faults(), file=sys.stderr), Nothing


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_a_command_pages_freed_memory_in_once():
    program = "from degflow.__main__ import start; from tests.test_command import *; allocate()[0](None)"
    command = [sys.executable, "-c", f"{program}; start(allocate, [])"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    plain, started = map(int, done.stderr.split()[-2:])
    assert started < plain / 5  # of 640 MiB: without the command nearly every page


def test_a_command_gets_the_words_behind_its_name(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["export", "input=x", "outputs=y"])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: outputs: Key 'outputs' not in 'ExportConfig'.")
    with pytest.raises(SystemExit) as end:
        main(["export", f"input={tmp_path}", f"output={tmp_path}/out"])
    assert end.value.code == 2
    assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("syntesize", "error: 'syntesize': no such command; did you mean synthesize? (degflow --help lists all)"),
        ("train_rae", "error: 'train_rae': no such command; did you mean train-rae or "),
        ("train", "error: 'train': no such command; did you mean train-sr or "),
        ("Export", "error: 'Export': no such command; did you mean export or "),
        ("xyz", "error: 'xyz': no such command (degflow --help lists all)"),
        ("input=photos", "error: 'input=photos': no such command"),
    ],
)
def test_a_word_that_is_no_command_gets_the_nearest_ones(word, said, capsys):
    with pytest.raises(SystemExit) as end:
        main([word, "output=x"])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(said)
    assert error.count("\n") == 1


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"degflow {__version__}\n"


@pytest.mark.parametrize("call", ["main(['--help'])", "start(allocate, ['--help', 'all'])"], ids=["list", "keys"])
def test_help_ends_quietly_when_its_reader_has_gone(call):
    reader, writer = os.pipe()
    os.close(reader)
    # No real command: each imports torch for its keys.
    command = [sys.executable, "-c", f"from degflow.__main__ import start; from tests.test_command import *; {call}"]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
