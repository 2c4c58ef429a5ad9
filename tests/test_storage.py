import errno
import json
import os
import threading
import time
import uuid

import pytest
import safetensors.torch
import torch
from botocore.exceptions import CredentialRetrievalError, EndpointConnectionError

from degflow import storage
from degflow.models.files import load_checkpoint, save_checkpoint
from degflow.storage import Place, TooLarge, split_uri
from tests.faults import proxying
from tests.s3 import forget_clients

NAMES = [
    "a#1.png",
    "b?c.png",
    "50%20.png",
    "x[1-3].png",
    "with space.png",
    "ünï/日本語.png",
    "star*.png",
    "{a,b}.png",
    "~u.png",
]


@pytest.fixture(autouse=True)
def _fresh_clients():
    yield
    forget_clients()


@pytest.fixture(params=["local", "file", "memory", "s3"])
def place(request, tmp_path):
    if request.param == "s3":
        yield Place(request.getfixturevalue("s3").uri("data [1]#%20") + "/data [1]#%20")
    elif request.param == "memory":
        found = Place(f"memory://{uuid.uuid4().hex}/data [1]#%20")
        yield found
        found.delete("")
    else:
        yield Place(f"{'file://' if request.param == 'file' else ''}{tmp_path}/data [1]#%20")


def test_a_file_comes_back_and_is_overwritten(place):
    assert not place.exists("a/b.bin")
    place.write("a/b.bin", b"first")
    place.write("a/b.bin", b"second, longer")
    assert place.read("a/b.bin") == b"second, longer"
    assert place.exists("a/b.bin")
    assert place.exists("a")
    assert place.exists()


def test_keys_are_literal(place):
    assert place.root.endswith("/data [1]#%20")
    for number, name in enumerate(NAMES):
        place.write(name, bytes(number + 1))
    found = place.files()
    assert [(file.key, file.size) for file in found] == sorted((name, n + 1) for n, name in enumerate(NAMES))
    for number, name in enumerate(NAMES):
        assert len(place.read(name)) == number + 1
        assert place.exists(name)


def test_files_are_those_below_a_folder_with_keys_from_the_root(place, monkeypatch):
    for name in ("z.txt", "data/part-1", "data/deep/er/part-2", "database/part-3"):
        place.write(name, b"x")
    assert [file.key for file in place.files()] == ["data/deep/er/part-2", "data/part-1", "database/part-3", "z.txt"]
    assert [file.key for file in place.files("data")] == ["data/deep/er/part-2", "data/part-1"]
    assert place.files("absent") == []
    assert Place(place.uri_of("absent")).files() == []
    found = place.files()
    monkeypatch.setattr(storage, "_PAGE", 3)
    pages = list(place.pages())
    assert [source for page in pages for source in page] == found
    if "s3" in place.fs.protocol:
        assert [len(page) for page in pages] == [3, 1]


def test_s3_without_a_bucket_is_named(s3):
    with pytest.raises(ValueError, match=r"^s3://: names no bucket$"):
        Place("s3://").files()


def test_a_files_tag_changes_with_its_content(place):
    place.write("a", b"1")
    first = place.files()[0].etag
    if place.local:
        os.utime(place.path("a"), (1, 1))
    else:
        place.write("a", b"2")
    assert first
    assert place.files()[0].etag not in ("", first)


def test_delete_takes_its_name_literally(place):
    for name in ("part[1].bin", "part1.bin", "star*.bin", "starfish.bin", "old/a", "old/b/c", "older/d"):
        place.write(name, b"x")
    place.delete("part[1].bin")
    place.delete("star*.bin")
    place.delete("old")
    place.delete("never there")
    place.delete_all(["starfish.bin", "never there"])
    assert [file.key for file in place.files()] == ["older/d", "part1.bin"]


def test_many_files_are_deleted_with_few_requests(s3, monkeypatch):
    place = Place(s3.uri("many"))
    names = [f"part[{number}] *&<.bin" for number in range(25)]
    for name in [*names, "kept"]:
        place.write(name, b"x")
    monkeypatch.setattr(storage, "_PAGE", 10)
    with monkeypatch.context() as patch, proxying(s3.endpoint) as (proxy, endpoint):
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        forget_clients()
        Place(place.uri).delete_all([*names, "never there"])
        assert proxy.met.total() == 3
    forget_clients()
    assert [file.key for file in place.files()] == ["kept"]


def test_many_files_are_deleted_one_by_one_by_a_store_that_knows_no_other_request(s3, monkeypatch):
    place, call = Place(s3.uri("many")), Place(s3.uri("many")).fs.call_s3

    def refusing(method, *arguments, **options):
        if method == "delete_objects":
            raise OSError("A header you provided implies functionality that is not implemented.")
        return call(method, *arguments, **options)

    for name in ("a b/1", "a b/[2]", "c"):
        place.write(name, b"x")
    monkeypatch.setattr(place.fs, "call_s3", refusing)
    place.delete("a b")
    assert [file.key for file in place.files()] == ["c"]


def test_a_new_file_never_replaces_another(place, tmp_path):
    (tmp_path / "local").write_bytes(b"third" * 1000)
    assert place.write("a/b", b"first", new=True)
    assert not place.write("a/b", b"second", new=True)
    assert not place.upload(str(tmp_path / "local"), "a/b", new=True)
    assert place.read("a/b") == b"first"
    assert place.upload(str(tmp_path / "local"), "a/c", new=True)
    assert place.upload(str(tmp_path / "local"), "a/b")
    assert place.read("a/b") == place.read("a/c") == b"third" * 1000
    assert [file.key for file in place.files()] == ["a/b", "a/c"]


def test_a_piece_of_a_file_is_read(place):
    place.write("a", b"0123456789")
    assert place.read("a", 3, 7) == b"3456"
    assert place.read("a", 8, 10) == b"89"


def test_a_store_that_puts_over_others_is_noticed(place, monkeypatch):
    assert place.keeps_first("config.yaml")
    assert place.files() == []
    if not place.local:
        put = place.fs.pipe_file
        monkeypatch.setattr(place.fs, "pipe_file", lambda path, data, **_: put(path, data))
        assert not place.keeps_first("config.yaml")
        assert place.files() == []


def test_a_store_that_puts_pieces_over_others_is_noticed_too(s3, monkeypatch):
    place = Place(s3.uri("data"))
    put = place.fs.pipe_file

    def over(path, data, **options):
        return put(path, data, **({} if len(data) > 1 << 20 else options))

    monkeypatch.setattr(place.fs, "pipe_file", over)
    assert not place.keeps_first("config.yaml")
    assert place.files() == []


def test_a_store_that_fails_at_that_question_ends_nothing(s3, monkeypatch):
    place = Place(s3.uri("data"))
    put = place.fs.pipe_file

    def failing(path, data, **options):
        if len(data) > 1 << 20:
            raise EndpointConnectionError(endpoint_url="http://nowhere")
        return put(path, data, **options)

    monkeypatch.setattr(place.fs, "pipe_file", failing)
    assert place.keeps_first("config.yaml")
    assert place.files() == []


def test_a_file_that_is_too_large_is_not_read(place, monkeypatch):
    place.write("a", b"0123456789")
    assert place.read_tagged("a", 10)[0] == b"0123456789"
    monkeypatch.setattr(Place, "_bytes_of", None)
    with pytest.raises(TooLarge, match=r"^10 bytes$"):
        place.read_tagged("a", 9)


def test_a_missing_bucket_is_an_error_and_an_empty_prefix_is_none(s3):
    assert Place(s3.uri("nothing")).files() == []
    with pytest.raises(FileNotFoundError, match="there-is-no-such-bucket"):
        Place("s3://there-is-no-such-bucket/a").files()


def test_credentials_that_come_late_are_waited_for(s3, monkeypatch):
    """The service that gives them may be busy, as when a thousand pods renew theirs at once."""
    place, tries = Place(s3.uri("data")), []
    place.write("a", b"12")

    def late(read):
        def ask(*arguments):
            tries.append(1)
            if len(tries) == 1:
                raise CredentialRetrievalError(provider="iam-role", error_msg="throttled")
            return read(*arguments)

        return ask

    monkeypatch.setattr(Place, "_bytes_of", late(Place._bytes_of))
    assert place.read("a") == b"12"
    assert len(tries) == 2


def test_two_that_delete_the_same_folder_are_harmless(tmp_path, monkeypatch):
    place = Place(str(tmp_path))
    for name in "bcd":
        place.write(f"a/{name}", b"1")

    def other(path, recursive):
        if names := os.listdir(path):  # one file at a time, and each was just taken away
            os.unlink(f"{path}/{names[0]}")
            raise FileNotFoundError(path)
        os.rmdir(path)

    monkeypatch.setattr(place.fs, "rm", other)
    place.delete("a")
    assert not place.exists("a")


def test_a_tagged_read_of_s3_is_one_request(s3, monkeypatch):
    place = Place(s3.uri("data"))
    place.write("a", b"12")
    with monkeypatch.context() as patch, proxying(s3.endpoint) as (proxy, endpoint):
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        forget_clients()
        assert Place(place.uri).read_tagged("a") == (b"12", place.files()[0].etag)
        assert proxy.met == {"none": 1}


def test_a_tagged_read_gives_the_listed_tag(place):
    for name, data in (("a [1]", b"1"), ("empty", b"")):
        place.write(name, data)
        assert place.read_tagged(name) == (data, {file.key: file.etag for file in place.files()}[name])


def test_a_pattern_matches_keys_below_a_literal_root(place):
    for name in ("a.png", "b.jpg", "deep/c.png", "deep/er/d.png", "deep [x]/e.png"):
        place.write(name, b"x")
    assert [file.key for file in place.match("*.png")] == ["a.png"]
    assert [file.key for file in place.match("**/*.png")] == ["a.png", "deep [x]/e.png", "deep/c.png", "deep/er/d.png"]
    assert [file.key for file in place.match("deep/**")] == ["deep/c.png", "deep/er/d.png"]
    assert place.match("absent*") == []


def test_a_place_knows_what_lies_below_it(tmp_path):
    place = Place(f"file://{tmp_path}/a")
    assert place.contains(Place(f"{tmp_path}/a"))
    assert place.contains(Place(f"{tmp_path}/a/b"))
    assert not place.contains(Place(f"{tmp_path}/ab"))
    assert not place.contains(Place(f"memory://{tmp_path}/a/b"))


def test_a_missing_file_is_named(place):
    with pytest.raises(FileNotFoundError, match="absent"):
        place.read("absent")


def test_uris_name_places_and_their_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Place("photos/").path("a.png") == f"{tmp_path}/photos/a.png"
    assert Place("photos/").uri_of("a.png") == "photos/a.png"
    assert Place("/").path("a") == Place("/").uri_of("a") == "/a"
    assert Place("memory://").uri_of("a") == "memory://a"
    assert not Place("memory://").local
    assert Place("file:///").path("a") == "/a"
    with pytest.raises(ValueError, match="empty"):
        Place("")
    for uri, folder, name in [
        ("a.bin", str(tmp_path), "a.bin"),
        ("runs/a.bin", f"{tmp_path}/runs", "a.bin"),
        ("/a.bin", "", "a.bin"),
        ("memory://a.bin", "", "a.bin"),
        ("memory://x/y/a.bin", "/x/y", "a.bin"),
    ]:
        place, found = split_uri(uri)
        assert (place.root, found) == (folder, name)
        assert place.local == (not uri.startswith("memory"))


def test_a_reader_sees_all_of_a_file_or_none(tmp_path):
    place, contents = Place(str(tmp_path)), [bytes([n]) * 3_000_000 for n in (1, 2)]
    place.write("a", contents[0])

    def write():
        for n in range(12):
            place.write("a", contents[n % 2])

    writer = threading.Thread(target=write)
    writer.start()
    reads = 0
    while writer.is_alive():
        assert place.read("a") in contents
        reads += 1
    writer.join()
    assert reads > 3


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, broken):
    place = Place(str(tmp_path))
    place.write("a", b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, broken, full)
        with pytest.raises(OSError, match="No space left"):
            place.write("a", b"new")
    assert os.listdir(tmp_path) == ["a"]
    assert place.read("a") == b"old"


def test_a_write_onto_a_folder_or_below_a_file_fails_without_remains(tmp_path):
    place = Place(str(tmp_path))
    place.write("folder/file", b"x")
    with pytest.raises(OSError, match="folder"):
        place.write("folder", b"y")
    with pytest.raises(OSError, match="file"):
        place.write("folder/file/below", b"y")
    assert [file.key for file in place.files()] == ["folder/file"]


def test_a_name_as_long_as_the_filesystem_allows(tmp_path):
    name = "日" * 83 + ".png"  # 253 bytes
    Place(str(tmp_path)).write(name, b"x")
    assert os.listdir(tmp_path) == [name]


TENSORS = {"weight": torch.arange(6.0).reshape(2, 3), "half": torch.ones(3).half(), "steps": torch.tensor(7)}


@pytest.mark.parametrize(
    "uri", ["{tmp}/runs/a.safetensors", "file://{tmp}/a.safetensors", "memory://{id}/a.safetensors"]
)
def test_a_checkpoint_comes_back_with_its_description(tmp_path, uri):
    uri = uri.format(tmp=tmp_path, id=uuid.uuid4().hex)
    description = {"kind": "degrader", "levels": {"1": 1.0, "2": 2.1}, "text": 'ü "quoted"\n'}
    save_checkpoint(uri, TENSORS | {"view": torch.arange(6).reshape(2, 3).T}, description)
    tensors, found, sha256 = load_checkpoint(uri, "degrader")
    assert found == description
    assert len(sha256) == 64
    assert tensors["view"].tolist() == [[0, 3], [1, 4], [2, 5]]
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_a_checkpoint_is_a_plain_safetensors_file(tmp_path):
    save_checkpoint(f"{tmp_path}/a.safetensors", TENSORS, {"kind": "degrader"})
    assert set(safetensors.torch.load_file(tmp_path / "a.safetensors")) == set(TENSORS)


def test_a_checkpoint_of_another_kind_is_refused(tmp_path):
    save_checkpoint(f"{tmp_path}/a.safetensors", TENSORS, {"kind": "autoencoder"})
    with pytest.raises(ValueError, match=r"a\.safetensors: of kind 'autoencoder', where 'degrader' is needed"):
        load_checkpoint(f"{tmp_path}/a.safetensors", "degrader")


@pytest.mark.parametrize("name", ["absent.safetensors", "", "folder", "folder/file/below"])
def test_a_missing_checkpoint_is_named(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/file").write_text("x")
    with pytest.raises(ValueError, match=rf"^{tmp_path}/{name}: no such file$"):
        load_checkpoint(f"{tmp_path}/{name}", "degrader")


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\n")
    with pytest.raises(ValueError, match=r"a\.safetensors: a pointer of Git LFS .*: `git lfs pull` fetches it$"):
        load_checkpoint(f"{tmp_path}/a.safetensors", "degrader")


def damaged_files():
    whole = safetensors.torch.save(TENSORS, {"degflow": json.dumps({"kind": "degrader"})})
    yield "text", b"<html>not found</html>"
    yield "empty", b""
    yield "cut in its header", whole[:20]
    yield "cut in its tensors", whole[:-4]
    yield "longer than it says", whole + b"more"
    yield "another project's", safetensors.torch.save(TENSORS)
    yield "without a kind", safetensors.torch.save(TENSORS, {"degflow": "{}"})
    yield "no object", safetensors.torch.save(TENSORS, {"degflow": "[1]"})
    yield "no JSON", safetensors.torch.save(TENSORS, {"degflow": "kind: degrader"})


@pytest.mark.parametrize("data", [pytest.param(data, id=name) for name, data in damaged_files()])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, data):
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/a\.safetensors: not a degflow checkpoint \(") as caught:
        load_checkpoint(f"{tmp_path}/a.safetensors", "degrader")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("uri", ["ftp://me:hunter2@host/photos", "s3://AK:hunter2@bucket/photos"])
def test_a_uri_with_a_password_is_refused_without_repeating_it(uri):
    with pytest.raises(ValueError, match="must not hold a password") as caught:
        Place(uri)
    assert "hunter2" not in str(caught.value)


ASKED = {
    "read": lambda place: place.read("b"),
    "write": lambda place: place.write("b", b"x"),
    "create": lambda place: place.write("b", b"x", new=True),
    "list": lambda place: place.files(),
    "look": lambda place: place.exists("b"),
}


@pytest.mark.parametrize(
    ("variables", "uri", "kind", "asked"),
    [
        *[({"AWS_SECRET_ACCESS_KEY": "hunter2"}, "s3://demo/a", PermissionError, asked) for asked in ASKED],
        *[({"AWS_SECRET_ACCESS_KEY": None}, "s3://demo/a", PermissionError, asked) for asked in ASKED],
        *[({}, "s3://nowhere-at-all/a", FileNotFoundError, asked) for asked in ("read", "list")],
    ],
)
def test_what_s3_refuses_is_an_error_at_once_without_the_secret(s3, monkeypatch, variables, uri, kind, asked):
    for name, value in variables.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    forget_clients()
    started = time.monotonic()
    with pytest.raises(kind) as caught:
        ASKED[asked](Place(uri))
    assert time.monotonic() - started < 10
    assert "hunter2" not in str(caught.value)
    assert s3.secret_key not in str(caught.value)


def test_a_store_that_is_down_is_waited_for_and_then_named(s3, monkeypatch):
    place = Place(s3.uri("down"))
    place.write("a", b"kept")
    s3.kill()
    back = threading.Timer(1, s3.start)
    back.start()
    assert place.read("a") == b"kept"
    back.join()
    s3.kill()
    monkeypatch.setattr(storage, "PATIENCE", 2)
    with pytest.raises(
        storage.StorageError, match=r"/a: EndpointConnectionError: .*127\.0\.0\.1.* \(attempts: \d\)"
    ) as caught:
        place.read("a")
    assert caught.value.attempts >= 2
    s3.start()


def test_local_links_are_listed_as_what_they_lead_to(tmp_path):
    (tmp_path / "a.png").write_bytes(b"photograph")
    (tmp_path / "link.png").symlink_to("a.png")
    os.utime(tmp_path / "link.png", (1, 1), follow_symlinks=False)
    (tmp_path / "nowhere.png").symlink_to("b.png")
    place = Place(str(tmp_path))
    file, link, nowhere = place.files()
    assert (link.size, link.etag) == (file.size, file.etag)
    assert place.read_tagged("link.png") == (b"photograph", link.etag)
    assert nowhere.key == "nowhere.png"
    assert [found.key for found in place.match("l*.png")] == ["link.png"]


def test_a_link_to_a_folder_is_followed_but_never_in_circles(tmp_path):
    for name in ("photos/a/1.png", "other/2.png", "other/deep/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "photos/b").symlink_to("../other")
    (tmp_path / "photos/a/loop").symlink_to("..")
    (tmp_path / "other/back").symlink_to("../photos")
    place = Place(str(tmp_path / "photos"))
    (tmp_path / "photos/c").symlink_to("a")
    keys = [file.key for file in place.files()]
    assert keys == ["a/1.png", "a/loop", "b/2.png", "b/back", "b/deep/3.png", "c"]  # three are left as they are
    assert [file.key for file in place.match("*")] == []
    assert place.read("b/deep/3.png") == b""


def test_a_stale_handle_of_a_shared_folder_is_waited_for_and_other_errors_are_not(tmp_path):
    place, calls = Place(str(tmp_path), patience=2), []

    def answers(number, times):
        calls.clear()

        def read():
            calls.append(number)
            if len(calls) <= times:
                raise OSError(number, "no")
            return b"data"

        return read

    assert place._try("a", answers(errno.ESTALE, 2)) == b"data"
    assert len(calls) == 3
    with pytest.raises(storage.StorageError, match=rf"^{tmp_path}/a: OSError: \[Errno 5\] no \(attempts: \d\)"):
        place._try("a", answers(errno.EIO, 99))
    with pytest.raises(PermissionError):
        place._try("a", answers(errno.EACCES, 1))
    assert len(calls) == 1


def test_pipes_and_devices_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # to open one would wait for somebody to write
    (tmp_path / "endless").symlink_to("/dev/zero")
    place = Place(str(tmp_path))
    for name in ("pipe", "endless"):
        for read in (place.read, place.read_tagged):
            with pytest.raises(OSError, match="a pipe, socket or device, not a file"):
                read(name)


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EPERM])
def test_a_folder_without_hard_links_is_named_with_the_reason(tmp_path, monkeypatch, number):
    def link(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", link)
    place = Place(str(tmp_path))
    with pytest.raises(OSError, match=rf"{tmp_path}: this file system has no hard links") as error:
        place.write("a", b"1", new=True)
    assert error.value.errno == number
    assert place.write("b", b"2")
    assert [file.name for file in tmp_path.iterdir()] == ["b"]
