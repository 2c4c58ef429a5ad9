from pathlib import Path

from degflow.storage import Place
from degflow.training import logs as module
from degflow.training.logs import Logs


def test_in_an_object_store_a_large_event_file_is_left_alone_and_another_is_begun(s3, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(module, "PART", 2000)
    place, uploaded = Place(s3.uri("event-files")), []
    upload = Place.upload
    monkeypatch.setattr(Place, "upload", lambda self, file, key: uploaded.append(key) or upload(self, file, key))
    logs = Logs(place, 0)
    for step in range(1, 201):
        logs.add("train", {"loss": float(step)}, step)
        if step % 20 == 0:
            logs.flush()
    logs.close()
    keys = [source.key for source in place.files("logs")]
    assert len(keys) >= 4
    assert all(uploaded.count(key) <= 4 for key in keys)  # each was left when it had 2000 bytes, of some 50 a step
    for key in keys:
        (tmp_path / Path(key).name).write_bytes(place.read(key))
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")
    assert [event.step for event in events] == list(range(1, 201))
    assert [event.value for event in events] == list(range(1, 201))
