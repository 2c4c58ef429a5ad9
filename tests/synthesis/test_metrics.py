"""The metrics of a run: what Ray's endpoint gives, and the dashboard that shows it."""

import json
import re
import time
import urllib.request

import ray
from prometheus_client.parser import text_string_to_metric_families

from degflow.synthesis import metrics
from tests import ROOT
from tests.sources import save_spoiled
from tests.synthesis.test_pool import run

DASHBOARD = ROOT / "cluster/ray/grafana.json"
NAMES = [*(f"ray_{name}_total" for name in (*metrics.COUNTERS, metrics.REJECTS)), *(f"ray_{g}" for g in metrics.GAUGES)]


def scraped():
    """What each node's endpoint gives, of ours: (name, output, stage) -> value."""
    found = {}
    for node in ray.nodes():
        address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        try:
            with urllib.request.urlopen(address) as answer:
                text = answer.read().decode()
        except OSError:
            continue
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if "degflow" in sample.name:
                    place = sample.name, sample.labels["output"], sample.labels.get("stage", "")
                    found[place] = found.get(place, 0) + sample.value
    return found


def test_the_endpoint_of_ray_gives_what_a_run_counts(shared_ray, photos, model, tmp_path):
    output, seen = str(tmp_path / "out"), {}
    folder = save_spoiled(tmp_path / "in", photos)
    run(folder, output, model, "max_reject_rate=1", "actors.max=1")
    deadline = time.monotonic() + 60
    last = {
        ("ray_degflow_images_total", ""): 11,
        ("ray_degflow_shards_total", ""): 4,
        ("ray_degflow_shards_left", ""): 0,
    }
    while len(seen) < 9 or not last.items() <= seen.items():  # values come one after the other
        assert time.monotonic() < deadline, seen
        time.sleep(0.5)
        seen = {(name, stage): value for (name, uri, stage), value in scraped().items() if uri == output}
    assert {name for name, _ in seen} == set(NAMES)
    assert {stage: value for (name, stage), value in seen.items() if "rejects" in name} == {"read": 1, "decode": 7}
    assert seen["ray_degflow_shards_set_aside", ""] == 0
    for name in ("waiting", "device", "upload"):
        assert 0 < seen[f"ray_degflow_{name}_seconds_total", ""] < 600


def test_the_dashboard_shows_all_metrics_and_no_other():
    dashboard = json.loads(DASHBOARD.read_text())
    shown = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert set(re.findall(r"ray_\w+", " ".join(shown))) == set(NAMES)
    listed = dashboard["templating"]["list"][1]["query"]
    assert set() < set(re.findall(r"ray_\w+", listed)) <= set(NAMES)
