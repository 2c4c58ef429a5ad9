"""cluster/kubernetes as `kubectl kustomize` renders it: KubeRay or Kubernetes knows every field, and numbers that are
written in several places agree."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from degflow.config import load
from degflow.synthesis.settings import SynthesizeConfig
from degflow.training.lfm import TrainLFMConfig
from degflow.training.rae import TrainRAEConfig
from degflow.training.residual import TrainResidualConfig
from tests import ROOT

FOLDER = ROOT / "cluster/kubernetes"
OVERLAYS = ("dev", "prod")  # with GPUs, and all jobs
ALL = (*OVERLAYS, "kind")
COMPONENTS = ("volume", "service-account")
TRAININGS = {
    "train-rae": (TrainRAEConfig, "realsr_rae"),
    "train-residual": (TrainResidualConfig, "realsr_residual"),
    "train-lfm": (TrainLFMConfig, "paper_lfm"),
}
JOBS = {"synthesize", *TRAININGS}
KUBERNETES = "1.33"
# Maps whose keys are the user's own.
FREE = {"labels", "annotations", "matchLabels", "selector", "data", "rayStartParams", "limits", "requests"}


@cache
def rendered(overlay):
    kubectl = shutil.which("kubectl", path=Path(sys.executable).parent)
    done = subprocess.run([kubectl, "kustomize", FOLDER / overlay], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@cache
def with_component(overlay, name):
    """An overlay that takes a component, as docs/kubernetes.md says."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(FOLDER, folder, dirs_exist_ok=True)
        with (Path(folder) / overlay / "kustomization.yaml").open("a") as file:
            file.write(f"components: [../{name}]\n")
        return rendered(Path(folder) / overlay)


@cache
def rayjob_validator():
    """KubeRay's schema, with unknown fields forbidden."""
    schema = json.loads((ROOT / "tests/cluster/kuberay/rayjob_v1.schema.json").read_text())
    schema["properties"]["metadata"] |= {
        "properties": {name: {} for name in ("name", "namespace", "labels", "annotations")}
    }
    return jsonschema.Draft202012Validator(closed(schema))


def closed(schema):
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: closed(value) for key, value in schema.items()}
    return inner | {"additionalProperties": False} if isinstance(schema.get("properties"), dict) else inner


def validate(document):
    if document["kind"] == "RayJob":
        rayjob_validator().validate(document)
    else:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


def is_valid(document):
    try:
        validate(document)
    except (jsonschema.ValidationError, kubernetes_validate.ValidationError):
        return False
    return True


def one(overlay, kind, job):
    return pick(rendered(overlay), kind, job)


def pick(documents, kind, job):
    found = [d for d in documents if d["kind"] == kind and d["metadata"]["labels"]["degflow/job"] == job]
    assert len(found) == 1
    return found[0]


def fields(value, path=()):
    """Paths of all fields, except those inside FREE maps."""
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from fields(item, (*path, number))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield (*path, key)
            if key not in FREE:
                yield from fields(item, (*path, key))


def pods_of(document):
    """Group name -> pod template, for every pod of a document."""
    spec = document["spec"]
    if document["kind"] == "Pod":
        return {"files": document}
    if document["kind"] == "Job":
        return {"train": spec["template"]}
    cluster = spec["rayClusterSpec"]
    groups = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {"submitter": spec["submitterPodTemplate"], "head": cluster["headGroupSpec"]["template"], **groups}


def all_pods():
    for overlay in ALL:
        for document in rendered(overlay):
            if document["kind"] in ("Job", "RayJob", "Pod"):
                for group, pod in pods_of(document).items():
                    yield pytest.param(overlay, document, pod, id=f"{overlay}-{document['metadata']['name']}-{group}")


def settings(overlay, job):
    """Name and text of the file in a job's ConfigMap."""
    data = one(overlay, "ConfigMap", job)["data"]
    assert list(data) == [job.replace("-", "_") + ".yaml"]
    return next(iter(data.items()))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_is_rendered_is_valid_and_each_part_belongs_to_a_job(overlay):
    kinds = sorted((d["kind"], d["metadata"]["labels"]["degflow/job"]) for d in rendered(overlay))
    train = [(kind, job) for kind in ("ConfigMap", "Job", "Service") for job in TRAININGS]
    assert kinds == sorted([*train, *((kind, "synthesize") for kind in ("ConfigMap", "NetworkPolicy", "RayJob"))])
    for document in rendered(overlay):
        validate(document)
        assert document["metadata"]["namespace"] == f"degflow-{overlay}"


def test_kind_has_one_small_machine_without_gpu_s3_or_registry():
    documents = rendered("kind")
    kinds = [(d["kind"], d["metadata"]["labels"]["degflow/job"]) for d in documents]
    files = [("PersistentVolumeClaim", "files"), ("Pod", "files")]
    job = [(kind, "synthesize") for kind in ("ConfigMap", "NetworkPolicy", "RayJob")]
    assert sorted(kinds) == sorted([*files, *job])
    for document in documents:
        validate(document)
        assert document["metadata"]["namespace"] == "degflow-kind"
    assert not re.search("gpu: |AWS_|secret|s3:|registry", json.dumps(documents))
    config = load(SynthesizeConfig, [f"config={FOLDER}/kind/synthesize.yaml"])
    cluster = one("kind", "RayJob", "synthesize")["spec"]["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert (config.actors.gpus, config.actors.max) == ("0", group["maxReplicas"])
    assert config.actors.threads == int(limits["cpu"])
    assert 0 < config.memory <= int(limits["memory"].removesuffix("Gi")) / 4
    assert config.input.startswith("/data/")
    assert config.output.startswith("/data/")
    images = {container["image"] for pod in all_pods_of("kind") for container in pod["spec"]["containers"]}
    assert images == {"degflow:kind"}  # no :latest, which would be pulled


def all_pods_of(overlay):
    return [pod for parameters in all_pods() for pod in parameters.values[2:] if parameters.values[0] == overlay]


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_component_gives_every_pod_that_reads_or_writes_another_access(overlay, component):
    documents = with_component(overlay, component)
    for document in documents:
        validate(document)
    pods = {
        (document["metadata"]["name"], group): pod["spec"]
        for document in documents
        if document["kind"] in ("Job", "RayJob")
        for group, pod in pods_of(document).items()
        if group != "submitter"
    }
    assert len(pods) == len(TRAININGS) + 3
    for spec in pods.values():
        (container,) = spec["containers"]
        names = {entry["name"] for entry in container.get("env", ()) if entry["name"].startswith("AWS_")}
        if component == "volume":
            assert names == set()
            assert {"name": "data", "mountPath": "/data"} in container["volumeMounts"]
            assert {"name": "data", "persistentVolumeClaim": {"claimName": "degflow-data"}} in spec["volumes"]
        else:
            assert names == {"AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"}
            assert spec["serviceAccountName"] == "degflow"
    kinds = {document["kind"] for document in documents if document["metadata"]["labels"]["degflow/job"] not in JOBS}
    assert kinds == ({"PersistentVolumeClaim", "Pod"} if component == "volume" else {"ServiceAccount"})


@pytest.mark.parametrize(
    "kind",
    ["RayJob", "Job", "Service", "NetworkPolicy", "ConfigMap", "PersistentVolumeClaim", "Pod", "ServiceAccount"],
)
def test_any_misspelt_field_is_refused(kind):
    documents = [*rendered("prod"), *rendered("kind"), *with_component("prod", "service-account")]
    document = next(d for d in documents if d["kind"] == kind)
    paths = list(fields(document))
    accepted = []
    for path in paths:
        spoiled = copy.deepcopy(document)
        parent = spoiled
        for step in path[:-1]:
            parent = parent[step]
        parent[path[-1] + "x"] = parent.pop(path[-1])
        if path not in [("kind",), ("apiVersion",)] and is_valid(spoiled):
            accepted.append(path)
    assert accepted == []
    assert len(paths) > {"RayJob": 200, "Job": 80, "NetworkPolicy": 15}.get(kind, 5)


def test_a_misspelt_field_of_a_kustomization_is_refused(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "k")
    file = tmp_path / "k/dev/kustomization.yaml"
    file.write_text(file.read_text().replace("patches:", "patchez:"))
    with pytest.raises(AssertionError, match="patchez"):
        rendered(tmp_path / "k/dev")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_ray_cluster_has_no_work_on_its_head_and_scales_from_zero(overlay):
    spec = one(overlay, "RayJob", "synthesize")["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    cluster = spec["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["authOptions"] == {"mode": "token"}
    head = cluster["headGroupSpec"]
    assert head["rayStartParams"] == {"num-cpus": "0"}
    assert "gpu" not in json.dumps(head["template"]["spec"]["containers"])
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    assert set(groups) == {"gpu", "cpu"}
    for name, group in groups.items():
        assert (group["minReplicas"], group["replicas"]) == (0, 0)
        assert group["maxReplicas"] >= 1
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert limits.get("nvidia.com/gpu") == ("1" if name == "gpu" else None)
        tolerated = {toleration["key"] for toleration in group["template"]["spec"]["tolerations"]}
        assert "cloud.google.com/gke-spot" in tolerated
        assert ("nvidia.com/gpu" in tolerated) == (name == "gpu")
    name, text = settings(overlay, "synthesize")
    assert spec["entrypoint"] == f"python /app/jobs/synthesize.py config=/etc/degflow/{name}"
    config = load(SynthesizeConfig, [f"config={FOLDER / overlay / name}"])
    assert text == (FOLDER / overlay / name).read_text()
    assert config.actors.gpus == "1"
    assert config.actors.max == groups["gpu"]["maxReplicas"]
    assert config.actors.threads == int(
        groups["gpu"]["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"]
    )


def test_ray_in_the_manifest_is_the_image_s():
    requirements = (ROOT / "cluster/requirements.txt").read_text()
    version = re.search(r"^ray==([\d.]+)", requirements, re.M)
    assert version
    assert one("prod", "RayJob", "synthesize")["spec"]["rayClusterSpec"]["rayVersion"] == version[1]


@pytest.mark.parametrize("job", TRAININGS)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_training_s_machines_processes_and_batch_agree(overlay, job):
    document, service = one(overlay, "Job", job), one(overlay, "Service", job)
    spec, pod = document["spec"], document["spec"]["template"]["spec"]
    container = pod["containers"][0]
    values = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == int(values["NODES"])
    first, second = spec["podFailurePolicy"]["rules"]
    assert first["action"] == "FailJob"
    assert first["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}
    assert second["action"] == "Ignore"
    limits = container["resources"]["limits"]
    assert values["PROCESSES"] == limits["nvidia.com/gpu"]
    assert int(values["PROCESSES"]) * int(values["THREADS"]) == int(limits["cpu"])
    name = document["metadata"]["name"]
    assert values["HEAD"] == "$(JOB)-0.$(JOB)"  # pod 0's host name and subdomain
    assert name == pod["subdomain"] == service["metadata"]["name"] == f"degflow-{job}"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert (service["spec"]["clusterIP"], service["spec"]["publishNotReadyAddresses"]) == ("None", True)
    assert container["command"] == ["/app/cluster/train.sh"]
    file, _ = settings(overlay, job)
    stage = values["STAGE"]
    schema, name = TRAININGS[job]
    assert values["CONFIG"] == name
    job_file, *configs = [word.replace("$(STAGE)", stage).replace("$(CONFIG)", name) for word in container["args"]]
    assert configs == [f"config=/app/configs/{name}.yaml", f"config=/etc/degflow/{file}"]
    assert job_file == f"/app/jobs/train_{stage}.py"
    config = load(schema, [f"config={ROOT}/configs/{name}.yaml", f"config={FOLDER / overlay / file}"])
    assert config.scenes.crop == 256
    assert config.fit.batch % (int(values["NODES"]) * int(values["PROCESSES"]) * config.fit.accumulate) == 0


def test_bad_keys_end_a_training_pod_with_the_code_that_fails_its_job():
    environment = os.environ | {"NODES": "1", "RANK": "0", "HEAD": "localhost", "PROCESSES": "2"}
    environment |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    words = [ROOT / "cluster/train.sh", ROOT / "jobs/train_rae.py", "scenes.data=x", "output=y", "fit.stepz=1"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    rule = one("prod", "Job", "train-rae")["spec"]["podFailurePolicy"]["rules"][0]
    assert done.returncode in rule["onExitCodes"]["values"]
    assert done.stderr.startswith("error: fit.stepz: ")


@pytest.mark.parametrize(("overlay", "document", "pod"), list(all_pods()))
def test_every_pod_is_bounded_unprivileged_and_names_its_secrets_only(overlay, document, pod):
    spec = pod["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 1000
    assert pod["metadata"]["labels"]["degflow/job"] == document["metadata"]["labels"]["degflow/job"]
    for container in spec["containers"]:
        assert container["image"] == ("degflow:kind" if overlay == "kind" else "registry.example.com/degflow:0.1.0")
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert set(container["resources"]) == {"requests", "limits"}
        for bounds in container["resources"].values():
            assert {"cpu", "memory", "ephemeral-storage"} <= set(bounds)
        for entry in container.get("env", ()):
            if entry["name"].startswith("AWS_"):
                assert list(entry) == ["name", "valueFrom"]
                assert entry["valueFrom"]["secretKeyRef"]["name"] == "degflow-s3"


def test_the_network_policy_covers_the_ray_cluster_alone():
    policy = one("prod", "NetworkPolicy", "synthesize")["spec"]
    assert policy["podSelector"] == {"matchLabels": {"degflow/job": "synthesize"}}
    assert policy["policyTypes"] == ["Ingress"]
    assert [rule.get("ports") for rule in policy["ingress"]] == [
        None,
        [{"port": 8265, "protocol": "TCP"}],
        [{"port": 8080, "protocol": "TCP"}],
    ]


def test_the_page_names_each_field_that_is_to_be_changed_before_the_first_apply():
    page = (ROOT / "docs/kubernetes.md").read_text()
    first = page.index("kubectl apply")
    changed = [file.name for file in FOLDER.rglob("*.yaml") if "CHANGE" in file.read_text()]
    assert len(changed) > 5
    assert all(f"`{name}`" in page[:first] for name in changed)
    assert set(re.findall(r"[a-z]+(?:-[a-z]+)?", page)) >= JOBS
    for folder in (*ALL, *COMPONENTS):
        assert (FOLDER / folder / "kustomization.yaml").exists()
        assert f"`{folder}`" in page


def test_the_page_s_operator_is_that_of_the_tested_schema():
    page = (ROOT / "docs/kubernetes.md").read_text()
    tested = re.search(r"KubeRay (\d+\.\d+\.\d+)", (ROOT / "tests/cluster/kuberay/NOTICE").read_text())
    assert tested
    assert re.findall(r"kuberay/kuberay-operator --version (\S+)", page) == [tested[1]]
