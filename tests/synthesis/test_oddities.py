"""Bad and odd files: each is used or refused as the rule says; mutations of them; and all of them through Ray."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from degflow import images
from degflow.config import load
from degflow.images import ImageError, check_bytes, decode
from degflow.synthesis.run import synthesize
from degflow.synthesis.settings import SynthesizeConfig
from tests import ROOT
from tests.oddities import chunk, file, noise, oddities, smooth, webp
from tests.sources import png, rejects_of, rows_of

ODDITIES = oddities()
EXAMPLES = int(os.environ.get("DEGFLOW_FUZZ_EXAMPLES", "1500"))  # per fuzzing test; they repeat unless this is set
FUZZ = settings(
    max_examples=EXAMPLES,
    derandomize="DEGFLOW_FUZZ_EXAMPLES" not in os.environ,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
MOST = 1 << 20  # pixels, while fuzzing


def outcome(oddity, pixels):
    """What is wrong with the decoded pixels, in words; empty if they are right."""
    expected = oddity.expected
    if pixels.dtype != np.uint8 or pixels.shape != expected.shape:
        return f"{oddity.name!r}: {pixels.dtype} {pixels.shape}, not {expected.shape}"
    difference = np.abs(pixels.astype(float) - expected).max()
    return "" if difference <= oddity.tolerance else f"{oddity.name!r}: off by {difference}"


def assert_readable(reason):
    assert 5 < len(reason) < 300
    assert reason.isprintable()
    assert not re.search(r" at 0x|Traceback|<class|: $", reason), reason


def test_the_corpus_is_as_large_and_varied_as_it_should_be():
    refused = [oddity for oddity in ODDITIES if isinstance(oddity.expected, str)]
    assert len(refused) >= 60
    assert len(ODDITIES) - len(refused) >= 60
    assert len({oddity.name for oddity in ODDITIES}) == len(ODDITIES)
    assert len({oddity.data for oddity in ODDITIES}) > len(ODDITIES) - 12  # good images under odd names differ too


@pytest.mark.parametrize("oddity", ODDITIES, ids=lambda oddity: ascii(oddity.name)[1:40])
def test_each_is_used_or_refused_as_written(oddity):
    if isinstance(oddity.expected, str):
        with pytest.raises(ImageError, match=oddity.expected) as refusal:
            decode(oddity.data)
        assert_readable(str(refusal.value))
    else:
        assert outcome(oddity, decode(oddity.data)) == ""


@pytest.mark.parametrize("spoil", ["pillow's limit", "warnings are errors"])
def test_pixels_do_not_depend_on_what_else_the_process_has_set(spoil, monkeypatch):
    used = [oddity for oddity in ODDITIES if not isinstance(oddity.expected, str)]
    with warnings.catch_warnings():
        if spoil == "pillow's limit":
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
            monkeypatch.setattr(images, "_BAND", 128)  # several bands in each image
        warnings.simplefilter("error")
        assert list(filter(None, (outcome(oddity, decode(oddity.data)) for oddity in used))) == []


def test_pillow_must_not_be_set_to_take_truncated_files(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(RuntimeError, match="LOAD_TRUNCATED_IMAGES is set"):
        decode(file(noise()))


def in_a_fresh_process(body):
    """Run a script that prints JSON, with `peak()`: bytes of memory at most since the last call."""
    script = (
        "import json, time\nfrom tests.oddities import *\nfrom degflow.images import ImageError, decode\n"
        "def status(name):\n    text = open('/proc/self/status').read()\n"
        "    return 1024 * int(text.split(name + ':')[1].split()[0])\n"
        "def peak():\n    most = status('VmHWM')\n    open('/proc/self/clear_refs', 'w').write('5')\n"
        "    return most - status('VmRSS')\n"
        "decode(file(noise()))\npeak()\n"
    )
    root = str(ROOT)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    done = subprocess.run([sys.executable, "-c", script + body], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")  # libtiff and Pillow write there
    return json.loads(done.stdout)


def test_a_file_larger_than_any_image_is_refused():
    with pytest.raises(ImageError, match=r"^300000000 bytes, more than the 268435456 that max_pixels=1000000 allows$"):
        decode(bytes(300_000_000), max_pixels=1_000_000)
    with pytest.raises(
        ImageError, match=r"^4000000000 bytes, more than the 3200000000 that max_pixels=200000000 allows$"
    ):
        check_bytes(4_000_000_000)
    check_bytes(3_200_000_000)


LINUX = pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="measures memory as Linux counts it")


@LINUX
def test_none_of_them_costs_much_or_writes_to_stderr():
    costs = in_a_fresh_process(
        "costs = {}\n"
        "for oddity in oddities():\n"
        "    started = time.process_time()\n"
        "    try:\n        decode(oddity.data)\n    except ImageError:\n        pass\n"
        "    costs[oddity.name] = time.process_time() - started, peak()\n"
        "print(json.dumps(costs))\n"
    )
    assert len(costs) == len(ODDITIES)
    assert {name: seconds for name, (seconds, _) in costs.items() if seconds > 5} == {}
    assert {name: memory for name, (_, memory) in costs.items() if memory > 100e6} == {}


@LINUX
def test_memory_is_bounded_by_the_pixels_of_the_header():
    """The most expensive kinds, 6 megapixels each: 20 bytes per pixel, as the rule says, plus less than 40 MB."""
    peaks = in_a_fresh_process(
        "large = Image.fromarray(smooth(2000, 3000))\n"
        "frames = file(Image.fromarray(noise()), 'WEBP', save_all=True, append_images=[Image.new('RGB', (32, 24))])\n"
        "at = frames.index(b'VP8X')\n"
        "canvas = frames[:at + 12] + struct.pack('<I', 2999)[:3] + struct.pack('<I', 1999)[:3] + frames[at + 18:]\n"
        "turned = Image.Exif()\nturned[274] = 6\n"
        "files = {'animated': canvas,\n"
        "  'webp': file(large.convert('RGBA'), 'WEBP', method=0, exif=turned, icc_profile=profile(P3, 2)),\n"
        "  'progressive': file(large.convert('CMYK'), 'JPEG', progressive=True, subsampling=0),\n"
        "  'png': file(large.convert('RGBA'), compress_level=1, exif=turned, icc_profile=profile(P3, 2))}\n"
        "peaks = {}\n"
        "for name, data in files.items():\n"
        "    peak()\n    assert decode(data).size == 18_000_000\n    peaks[name] = peak()\n"
        "print(json.dumps(peaks))\n"
    )
    assert sorted(peaks) == ["animated", "png", "progressive", "webp"]
    assert max(peaks.values()) > 6e6 * 10  # a canvas twice, and the picture
    assert all(peak < 6e6 * 20 + 40e6 for peak in peaks.values()), peaks


def test_a_decode_that_pillows_own_limit_would_refuse_is_ours_to_allow(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Image.open would refuse 201 pixels
    for kind, options in (("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("WEBP", {"lossless": True})):
        np.testing.assert_array_equal(decode(file(noise(), kind, **options)), noise())


# Fuzzing

WHOLE = [
    *(oddity.data for oddity in ODDITIES if not isinstance(oddity.expected, str) and len(oddity.data) < 6000),
    *(file(smooth(), "JPEG", restart_marker_rows=1), webp(32, 24, file(noise(), "WEBP")[12:])),
]
STARTS = (
    b"",
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"RIFF\x99\0\0\0WEBPVP8",
    b"II*\0\x08\0\0\0",
    b"MM\0*\0\0\0\x08",
    b"II+\0\x08",
)
NUMBERS = (
    b"\0",
    b"\xff",
    b"\0\0\0\0",
    b"\xff" * 4,
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\1\0",
    b"\0\1",
    b"\x80\0",
)


def with_right_checksums(data):
    """A damaged PNG with right checksums of its chunks, so that the damage reaches the decoder."""
    out, at = data[:8], 8
    while at + 8 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        out, at = out + chunk(data[at + 4 : at + 8], data[at + 8 : end]), end + 4
    return out


@st.composite
def mutated(draw):
    """A whole file of an accepted format with some bytes changed, cut, repeated, or of another file."""
    data = draw(st.sampled_from(WHOLE))
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, min(len(data), 200)) | st.integers(0, len(data)))  # headers most
        end = min(len(data), at + draw(st.integers(1, 16) | st.integers(1, 2000)))
        match draw(st.sampled_from(["flip", "number", "truncate", "delete", "repeat", "splice", "insert"])):
            case "flip":
                data = (
                    data[:at] + bytes(byte ^ draw(st.integers(1, 255)) for byte in data[at : at + 1]) + data[at + 1 :]
                )
            case "number":
                number = draw(st.sampled_from(NUMBERS))
                data = data[:at] + number + data[at + len(number) :]
            case "truncate":
                data = data[:end]
            case "delete":
                data = data[:at] + data[end:]
            case "repeat":
                data = data[:end] + draw(st.integers(1, 50)) * data[at:end] + data[end:]
            case "splice":
                data = data[:at] + draw(st.sampled_from(WHOLE))[at:]
            case "insert":
                data = data[:at] + draw(st.binary(max_size=40)) + data[at:]
    return with_right_checksums(data) if data.startswith(b"\x89PNG") and draw(st.booleans()) else data


def assert_pixels_or_a_reason(data):
    started = time.process_time()
    try:
        pixels = decode(data, max_pixels=MOST)
    except ImageError as refusal:
        assert_readable(str(refusal))
    else:
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3
        assert pixels.shape[2] == 3
        assert min(pixels.shape[:2]) >= 8
        assert pixels.shape[0] * pixels.shape[1] <= MOST
    assert time.process_time() - started < 10  # milliseconds; more would be a bomb


@FUZZ
@given(st.sampled_from(STARTS), st.binary(max_size=300))
def test_any_bytes_give_pixels_or_a_reason(start, rest):
    assert_pixels_or_a_reason(start + rest)


@FUZZ
@given(mutated())
def test_mutated_files_give_pixels_or_a_reason(data):
    assert_pixels_or_a_reason(data)


# All of them through Ray


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("oddities")
    for oddity in ODDITIES:
        path = folder / oddity.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(oddity.data)
    return folder


def save_what_is_no_file(folder):
    """Make folders, pipes, links, ...; returns the expected reasons of those with an image's name."""
    (folder / "folder.png").mkdir()
    (folder / "folder.png" / "inside.png").write_bytes(file(noise(9, 9)))
    os.mkfifo(folder / "pipe.png")
    place, here = socket.socket(socket.AF_UNIX), os.getcwd()
    os.chdir(folder)  # a socket's path may have 107 bytes
    place.bind("socket.jpg")
    os.chdir(here)
    (folder / "endless.tif").symlink_to("/dev/zero")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "nowhere.png").symlink_to("nowhere")
    (folder / "link to a folder.png").symlink_to("folder.png")
    (folder / "link to itself all.png").symlink_to(".")
    (folder / "link.png").symlink_to("folder.png/inside.png")
    (folder / "notes.txt").write_text("no image")
    Path(os.fsdecode(os.fsencode(folder) + b"/not UTF-8 \xff.png")).write_bytes(file(noise(9, 9)))
    place.close()
    device = "pipe, socket or device"
    return {
        "pipe.png": device,
        "socket.jpg": device,
        "endless.tif": device,
        "loop.png": "symbolic links|no longer there",
        "nowhere.png": "no longer there|No such file",
        "link to a folder.png": "IsADirectoryError",
        "link to itself all.png": "IsADirectoryError",
    }


def test_a_folder_of_them_is_accounted_for_to_the_last_file(shared_ray, folder, model, tmp_path, capsys):
    unreadable = save_what_is_no_file(folder)
    locked = folder / "locked.png"
    locked.write_bytes(file(noise(9, 9)))
    locked.chmod(0)
    used = {oddity.name: oddity for oddity in ODDITIES if not isinstance(oddity.expected, str)}
    reasons = {oddity.name: oddity.expected for oddity in ODDITIES if isinstance(oddity.expected, str)}
    more = {"folder.png/inside.png", "link.png"}
    if os.access(locked, os.R_OK):  # root reads everything
        more.add("locked.png")
    else:
        unreadable["locked.png"] = "PermissionError"
    words = [f"input={folder}", f"output={tmp_path / 'out'}", f"model={model}"]
    words += ["shard.images=60", "max_reject_rate=1", "solver.solver=euler", "solver.steps=1", "batch=40"]
    synthesize(load(SynthesizeConfig, words))
    rows, rejects = rows_of(tmp_path / "out"), rejects_of(tmp_path / "out")
    manifest = pq.read_table(tmp_path / "out" / "manifest.parquet").to_pylist()
    assert len(rows) == sum(part["rows"] for part in manifest)  # no key twice
    assert len(rejects) == sum(part["rejects"] for part in manifest)
    assert {key for key, _ in rows} == set(used) | more
    assert set(rejects) == set(reasons) | set(unreadable)
    said = capsys.readouterr().out
    assert "1 file in " in said
    assert "1 name in " in said  # not in UTF-8
    for key, oddity in used.items():
        assert outcome(oddity, png(rows[key, 0]["hr"]["bytes"])) == ""
    for expected, stage in ((reasons, "decode"), (unreadable, "read")):
        for key, reason in expected.items():
            assert rejects[key]["stage"] == stage
            assert re.search(reason, rejects[key]["error"]), rejects[key]
            assert_readable(rejects[key]["error"])
