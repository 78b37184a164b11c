"""The manifest for KServe, by the schemas of KServe's client and of Kubernetes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.full
kserve = pytest.importorskip("kserve", reason="pip install kserve kubernetes-validate")
kubernetes = pytest.importorskip("kubernetes_validate", reason="pip install kserve kubernetes-validate")
MANIFEST = yaml.safe_load((Path(__file__).parents[2] / "examples/kserve.yaml").read_text())
TYPES = {"int": int, "str": str, "bool": bool}


def check(content: dict[str, Any], model: Any) -> None:
    """Fields and types, as far as they are KServe's own: what is Kubernetes's has models elsewhere."""
    kinds = {model.attribute_map[name]: kind for name, kind in model.openapi_types.items()}
    if unknown := content.keys() - kinds.keys():
        raise ValueError(f"{model.__name__} has no {sorted(unknown)}")
    for name, value in content.items():
        if inner := getattr(kserve, kinds[name], None):
            check(value, inner)
        elif not isinstance(value, TYPES.get(kinds[name], object)):
            raise ValueError(f"{model.__name__}.{name} is no {kinds[name]}")


def valid(manifest: dict[str, Any]) -> None:
    """Raises where KServe or Kubernetes would refuse a manifest."""
    check(manifest, kserve.V1beta1InferenceService)
    predictor = manifest["spec"]["predictor"]
    of_pods = kserve.V1beta1PodSpec.attribute_map.values()
    pod = {name: value for name, value in predictor.items() if name in of_pods}
    kubernetes.validate(
        {"apiVersion": "v1", "kind": "Pod", "metadata": manifest["metadata"], "spec": pod}, "1.37", strict=True
    )


def test_the_manifest_is_one() -> None:
    assert (MANIFEST["apiVersion"], MANIFEST["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    valid(MANIFEST)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda predictor: predictor.update(minReplica=1),
        lambda predictor: predictor.update(minReplicas="1"),
        lambda predictor: predictor.update(nodeSelector="arm64"),
        lambda predictor: predictor["containers"][0].update(readinesProbe={}),
        lambda predictor: predictor["containers"][0].pop("name"),
        lambda predictor: predictor["containers"][0]["ports"][0].update(containerPort="8080"),
        lambda predictor: predictor["containers"][0]["securityContext"].update(readOnlyRootFileSystem=True),
    ],
)
def test_what_is_wrong_with_it_is_found(spoil: Callable[[dict[str, Any]], Any]) -> None:
    spoiled = copy.deepcopy(MANIFEST)
    spoil(spoiled["spec"]["predictor"])
    with pytest.raises((ValueError, kubernetes.ValidationError)):
        valid(spoiled)
