"""The image and the manifests name things that exist, and agree with pyproject and with each other."""

import hashlib
import importlib
import importlib.util
import inspect
import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
INFRA = ROOT / "infra"
JOB = INFRA / "kuberay" / "rayjob.train-video.yaml"
SERVICE = INFRA / "kuberay" / "rayservice.serve-video.yaml"


@pytest.fixture(scope="module")
def validate():
    """infra/validate.py as a module; nothing imports `infra` by name."""
    spec = importlib.util.spec_from_file_location("validate_manifests", INFRA / "validate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def ray_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (pin,) = (
        match[1] for text in project["dependencies"] if (match := re.fullmatch(r"ray\[.*\]~=(\d+\.\d+\.\d+)", text))
    )
    return pin


@pytest.fixture(scope="module")
def dockerfile():
    """The Dockerfile's instructions: (name, rest of the line), lines joined, comments dropped."""
    text = (INFRA / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in lines]


def read(path):
    return yaml.safe_load(path.read_text())


def clusters():
    return [read(JOB)["spec"]["rayClusterSpec"], read(SERVICE)["spec"]["rayClusterConfig"]]


def groups():
    return [group for spec in clusters() for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def pods():
    return [group["template"]["spec"] for group in groups()]


def gib(quantity):
    return float(re.fullmatch(r"(\d+)Gi", quantity)[1])


# --- the image ------------------------------------------------------------------------------------------------------


def test_image_has_the_pinned_ray(dockerfile, ray_version):
    assert dict(dockerfile)["FROM"] == f"rayproject/ray:{ray_version}-py311${{RAY_VARIANT}}"
    assert {spec["rayVersion"] for spec in clusters()} == {ray_version}
    images = {container["image"] for pod in pods() for container in pod["containers"]}
    assert len(images) == 1
    assert images.pop().endswith(f":ray-{ray_version}")


def test_image_copies_the_packages_and_nothing_else(dockerfile):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    copied = [word for name, rest in dockerfile if name == "COPY" for word in rest.split()[:-1] if word[0] != "-"]
    packages = {package.split(".")[0] for package in project["tool"]["setuptools"]["packages"]}
    assert set(copied) == packages | {"jobs", "pyproject.toml", "LICENSE", project["project"]["readme"]}
    assert [path for path in copied if not (ROOT / path).exists()] == []


def test_image_runs_as_a_user_and_leaves_the_command_to_the_pod(dockerfile):
    names = [name for name, _ in dockerfile]
    assert [rest for name, rest in dockerfile if name == "USER"] == ["ray"]
    assert names.index("USER") < names.index("RUN")
    assert not {"CMD", "ENTRYPOINT"} & set(names)


def test_licence_is_the_exact_text():
    digest = hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest()
    assert digest == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


# --- the manifests --------------------------------------------------------------------------------------------------


def test_kinds():
    manifests = {path: read(path) for path in sorted((INFRA / "kuberay").glob("*.yaml"))}
    assert {path: manifest["kind"] for path, manifest in manifests.items()} == {JOB: "RayJob", SERVICE: "RayService"}
    assert {manifest["apiVersion"] for manifest in manifests.values()} == {"ray.io/v1"}


def test_every_pod_is_a_user_with_the_shared_volume_and_enough_shared_memory():
    for pod in pods():
        (container,) = pod["containers"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert pod["securityContext"]["runAsNonRoot"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert volumes[mounts["/data"]]["persistentVolumeClaim"] == {"claimName": "kinoray-data"}
        shared = volumes[mounts["/dev/shm"]]["emptyDir"]
        assert shared["medium"] == "Memory"
        memory_gib = gib(container["resources"]["limits"]["memory"])
        assert 0.3 * memory_gib <= gib(shared["sizeLimit"]) < memory_gib  # Ray's object store is 30 % of the memory


def test_head_schedules_and_workers_have_the_gpus():
    for spec in clusters():
        assert spec["authOptions"]["mode"] == "token"
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        for group in spec["workerGroupSpecs"]:
            pod = group["template"]["spec"]
            assert int(pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]) >= 1
            assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod["tolerations"]


def test_entrypoint_is_a_job_in_the_image_and_keeps_its_results(dockerfile):
    python, script, _recipe, flag, storage = shlex.split(read(JOB)["spec"]["entrypoint"])
    inside = Path(script).relative_to(dict(dockerfile)["WORKDIR"])
    assert (python, flag, inside.parent) == ("python", "--storage", Path("jobs"))
    assert (ROOT / inside).is_file()
    assert storage.startswith("/data/")


def test_deletion_rules_are_what_the_operator_takes():
    spec = read(JOB)["spec"]
    assert "shutdownAfterJobFinishes" not in spec  # excludes the rules
    assert "enableInTreeAutoscaling" not in spec["rayClusterSpec"]  # excludes DeleteWorkers
    rules = spec["deletionStrategy"]["deletionRules"]
    endings = [{"jobStatus": "SUCCEEDED"}, {"jobDeploymentStatus": "Failed"}]
    assert all(any(ending.items() <= rule["condition"].items() for rule in rules) for ending in endings)
    for ending in endings:
        after_s = {r["policy"]: r["condition"]["ttlSeconds"] for r in rules if ending.items() <= r["condition"].items()}
        in_order = [after_s[policy] for policy in ("DeleteWorkers", "DeleteCluster", "DeleteSelf") if policy in after_s]
        assert in_order == sorted(in_order)  # workers go before their cluster, and it before the job


def test_serve_config_is_ray_serves_and_names_a_builder():
    from ray.serve.schema import ServeDeploySchema

    config = ServeDeploySchema.model_validate(yaml.safe_load(read(SERVICE)["spec"]["serveConfigV2"]))
    (application,) = config.applications
    module, attribute = application.import_path.split(":")
    builder = getattr(importlib.import_module(module), attribute)
    assert len(inspect.signature(builder).parameters) == 1  # Serve hands it the args, a dict


def test_served_workers_are_as_many_as_the_gpus_and_share_a_database():
    from pipeline.serve.config import ServeConfig

    (application,) = yaml.safe_load(read(SERVICE)["spec"]["serveConfigV2"])["applications"]
    config = ServeConfig(**application["args"])
    assert config.model.startswith("/data/")
    assert config.storage.startswith("/data/")
    (group,) = read(SERVICE)["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert config.num_workers * config.gpus_per_worker == group["replicas"] * int(limits["nvidia.com/gpu"])
    assert not config.database_url.startswith("sqlite")  # SQLite holds for one machine, and an upgrade is two


# --- validate.py ----------------------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {
        "apiVersion": {"type": "string"},
        "kind": {"type": "string"},
        "metadata": {"type": "object"},
        "spec": {
            "type": "object",
            "required": ["groups"],
            "properties": {
                "port": {"x-kubernetes-int-or-string": True},
                "note": {"type": "string", "nullable": True},
                "labels": {"type": "object", "additionalProperties": {"type": "string"}},
                "properties": {"type": "object", "properties": {"x": {"type": "integer"}}},
                "free": {"type": "object", "properties": {}, "x-kubernetes-preserve-unknown-fields": True},
                "groups": {
                    "type": "array",
                    "items": {"type": "object", "properties": {"replicas": {"type": "integer", "minimum": 0}}},
                },
            },
        },
    },
}


def manifest(**spec):
    return {"apiVersion": "ray.io/v1", "kind": "RayToy", "metadata": {"name": "a"}, "spec": {"groups": [], **spec}}


@pytest.mark.parametrize(
    "spec",
    [
        {"groups": [{"replicas": 2}]},
        {"port": 8000},
        {"port": "http"},
        {"note": None},
        {"labels": {"any": "name"}},
        {"properties": {"x": 1}},
        {"free": {"any": [1]}},
    ],
)
def test_a_right_manifest_has_no_problems(validate, spec):
    assert validate.problems(manifest(**spec), SCHEMA) == []


@pytest.mark.parametrize(
    ("spec", "path", "value", "rule"),
    [
        ({"groups": [{}, {"replicas": "two"}]}, "spec.groups[1].replicas", "two", 'type must be "integer"'),
        ({"groups": [{"replicas": -1}]}, "spec.groups[0].replicas", -1, "minimum must be 0"),
        ({"groups": [{"replica": 2}]}, "spec.groups[0].replica", 2, "the schema has no such field"),
        ({"properties": {"y": 1}}, "spec.properties.y", 1, "the schema has no such field"),
        ({"labels": {"a": 1}}, "spec.labels.a", 1, 'type must be "string"'),
    ],
)
def test_a_problem_has_path_value_and_rule(validate, spec, path, value, rule):
    assert validate.problems(manifest(**spec), SCHEMA) == [(path, value, rule)]


def test_every_unknown_and_every_missing_field_is_named(validate):
    wrong = manifest(colour="red", size=3)
    del wrong["spec"]["groups"]
    found = validate.problems(wrong, SCHEMA)
    assert [problem.path for problem in found] == ["spec", "spec.colour", "spec.size"]
    assert found[0].rule == "'groups' is a required property"


def test_command_prints_a_line_a_manifest_and_fails_on_a_problem(validate, tmp_path, capsys):
    (tmp_path / "RayToy.v1.schema.json").write_text(json.dumps(SCHEMA))
    right, wrong, other = (tmp_path / f"{name}.yaml" for name in ("right", "wrong", "other"))
    right.write_text(yaml.safe_dump(manifest()))
    wrong.write_text(yaml.safe_dump(manifest(port=[1])))
    other.write_text(yaml.safe_dump({**manifest(), "kind": "Pod"}))
    assert validate.main(["--schemas", str(tmp_path), str(right)]) == 0
    assert capsys.readouterr().out == "right.yaml: ok\n"
    assert validate.main(["--schemas", str(tmp_path), str(right), str(wrong), str(other)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["right.yaml: ok", "wrong.yaml: 1 problems"]
    assert lines[2].startswith("  spec.port: [1]: anyOf must be ")
    assert lines[3:] == ["other.yaml: 1 problems", f'  kind: "Pod": no schema Pod.v1.schema.json in {tmp_path}']
