"""README and docs: their commands load, their examples run in order, their links lead somewhere."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from degflow.__main__ import COMMANDS
from degflow.config import usage
from tests import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text()
LONGEST_README = 9000
# Run in place of the programs of a page; they print their words, and nothing else on a page can run without a PATH.
RECORD = """
for name in degflow accelerate python python3 ray sbatch; do
    eval "$name() { printf '%s\\x1f' $name \\"\\$@\\"; echo; }"
done
PATH=
"""


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(page, folder):
    """The degflow commands of a page, as lists of words, expanded by a real shell."""
    text = re.sub(r"&(?= *(#|$))", "", "\n".join(blocks(page.read_text(), "bash")), flags=re.MULTILINE)
    script = RECORD + re.sub(r"&&|\|\|", ";", text)
    done = subprocess.run(["/bin/bash", "-c", script], cwd=folder, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        words = line.split("\x1f")[:-1]
        for place, word in enumerate(words):
            script = re.fullmatch(r"jobs/(\w+)\.py", word)
            if word == "degflow" and place + 1 < len(words):
                yield words[place + 1 :]
                break
            if script or word == "cluster/slurm/synthesize.sbatch":
                yield [script[1].replace("_", "-") if script else "synthesize", *words[place + 1 :]]
                break


COMMAND = re.compile(r"^ *degflow |jobs/\w+\.py", re.MULTILINE)
WITH_COMMANDS = [page for page in PAGES if COMMAND.search("\n".join(blocks(page.read_text(), "bash")))]


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.name)
def test_each_command_of_a_page_has_keys_and_values_that_its_job_takes(page, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = list(commands(page, tmp_path))
    assert found  # else the words are not seen, and cannot be wrong
    for name, *words in found:
        if name.startswith("--") or "--help" in words or "COMMAND" in name:
            continue
        _, schema = COMMANDS[name]()
        usage(schema, "", [word for word in words if word not in ("...", "config=...", "--check")])


def test_a_wrong_key_on_a_page_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```bash\nL='{2: 2.0}'\ndegflow synthesize input=photos \\\n    output=\"$L\" scale.lo=2 # why\n```\n"
    )
    ((name, *words),) = commands(page, tmp_path)
    assert [name, *words] == ["synthesize", "input=photos", "output={2: 2.0}", "scale.lo=2"]
    with pytest.raises(ValueError, match=r"scale\.lo\b"):
        usage(COMMANDS[name]()[1], "", words)


def test_the_readme_is_short():
    assert len(README.encode()) <= LONGEST_README


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_link_of_a_page_leads_to_a_file_and_a_heading(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            assert heading in [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles], target


def test_the_readme_s_examples_run_in_order(tmp_path):
    (tmp_path / "photos").mkdir()
    generator = np.random.default_rng(0)
    for name in ("photos/a.png", "photos/b.png", "photos/c.png", "photos/d.png", "photo.jpg"):
        small = Image.fromarray(generator.integers(0, 256, (20, 24, 3), dtype=np.uint8))
        small.resize((160, 144), Image.Resampling.BICUBIC).save(tmp_path / name)
    making = next(block for block in blocks(README, "bash") if "synthesize input=photos" in block)
    shell = f'degflow() {{ "{sys.executable}" -m degflow "$@"; }}\nset -e\n{making}'
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = {"cwd": tmp_path, "env": environment}
    subprocess.run(["/bin/bash", "-c", shell], **run, check=True)
    program = "\n".join(blocks(README, "python")) + "\nprint(rows.num_rows, batch['lr'].shape, lr.shape, scale.shape)"
    done = subprocess.run([sys.executable, "-c", program], **run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    crops = "torch.Size([4, 3, 128, 128])"
    assert done.stdout.splitlines()[-1] == f"16 {crops} {crops} torch.Size([4])"
    with Image.open(tmp_path / "lr.png") as lr:
        assert lr.size == (160, 144)
