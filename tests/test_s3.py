"""The tests' S3 server is a real one: it checks keys, and keeps its data when it is killed."""

import botocore.exceptions
import pytest

from degflow.storage import Place


def test_it_keeps_objects_over_a_kill_and_refuses_a_wrong_secret(s3):
    place = Place(s3.uri("server"))
    place.write("a/b", b"kept")
    s3.kill()
    with pytest.raises(botocore.exceptions.EndpointConnectionError):
        s3.client().cat_file(place.path("a/b"))
    s3.start()
    assert s3.client().cat_file(place.path("a/b")) == b"kept"
    assert [file.key for file in place.files()] == ["a/b"]
    s3.secret_key, right = "wrong", s3.secret_key
    try:
        with pytest.raises(PermissionError):
            s3.client().cat_file(place.path("a/b"))
    finally:
        s3.secret_key = right
