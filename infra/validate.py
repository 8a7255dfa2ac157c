"""Check the KubeRay manifests against the operator's CRD schemas, before a cluster does.

    python infra/validate.py --schemas DIR [MANIFEST ...]

DIR holds one JSON schema a kind (RayJob.v1.schema.json, ...): the `openAPIV3Schema` of the operator's CRDs. A cluster
drops a field that its schema does not know without a word; here it is an error. The CEL rules
(`x-kubernetes-validations`) are left to the API server: `kubectl apply --dry-run=server`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonschema import Draft202012Validator, ValidationError

MANIFESTS = Path(__file__).parent / "kuberay"


class Problem(NamedTuple):
    """One thing wrong in a manifest: where, what stands there and what the schema asks for."""

    path: str
    value: Any
    rule: str

    def __str__(self) -> str:
        return f"{self.path}: {json.dumps(self.value, default=str)[:120]}: {self.rule}"


def closed(schema: Any) -> Any:
    """The schema with Kubernetes' own meaning spelled out for a plain JSON Schema validator.

    An object takes only the fields it names (the API server prunes others), unless it says otherwise; `nullable` also
    takes null; an int-or-string without further rules takes both.
    """
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    fixed = {key: named(value) if key == "properties" else closed(value) for key, value in schema.items()}
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        fixed.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        fixed.setdefault("anyOf", [{"type": "integer"}, {"type": "string"}])
    return {"anyOf": [fixed, {"type": "null"}]} if schema.get("nullable") else fixed


def named(properties: dict[str, Any]) -> dict[str, Any]:
    """Schemas by field name: the names are data, not keywords."""
    return {name: closed(schema) for name, schema in properties.items()}


def problems(manifest: Any, schema: dict[str, Any]) -> list[Problem]:
    """Everything in `manifest` that breaks `schema` or that it does not know, in the order of the paths."""
    errors = Draft202012Validator(closed(schema)).iter_errors(manifest)
    return sorted((problem for error in errors for problem in explain(error)), key=lambda problem: problem.path)


def explain(error: ValidationError) -> Iterator[Problem]:
    """One validation error as problems; an object with several unknown fields gives one each."""
    path = list(error.absolute_path)
    if error.validator == "additionalProperties" and error.validator_value is False:
        known = error.schema.get("properties", {})
        for field in sorted(set(error.instance) - set(known)):
            yield Problem(dotted([*path, field]), error.instance[field], "the schema has no such field")
    else:
        rule = f"{error.validator} must be {json.dumps(error.validator_value)[:120]}"
        yield Problem(dotted(path), error.instance, error.message if error.validator == "required" else rule)


def dotted(path: list[str | int]) -> str:
    """`spec.containers[0].name`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".") or "(root)"


def check(path: Path, schemas: Path) -> list[Problem]:
    """The problems of one manifest file, by the schema of its kind and version."""
    manifest = yaml.safe_load(path.read_text())
    name = f"{manifest.get('kind')}.{str(manifest.get('apiVersion')).rpartition('/')[2]}.schema.json"
    if not (schemas / name).is_file():
        return [Problem("kind", manifest.get("kind"), f"no schema {name} in {schemas}")]
    return problems(manifest, json.loads((schemas / name).read_text()))


def main(arguments: list[str] | None = None) -> int:
    """Print one line a manifest, and one more for each problem; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemas", type=Path, required=True, metavar="DIR", help="folder of the CRD schemas")
    parser.add_argument("manifests", nargs="*", type=Path, help="default: all of infra/kuberay")
    options = parser.parse_args(arguments)
    num_problems = 0
    for path in options.manifests or sorted(MANIFESTS.glob("*.yaml")):
        found = check(path, options.schemas)
        num_problems += len(found)
        print(f"{path.name}: {f'{len(found)} problems' if found else 'ok'}")
        for problem in found:
            print(f"  {problem}")
    return 1 if num_problems else 0


if __name__ == "__main__":
    sys.exit(main())
