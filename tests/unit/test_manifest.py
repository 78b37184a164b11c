from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from armopt.bundle import manifest
from armopt.environment import Variable
from armopt.errors import BundleError
from armopt.ir.records import Decision, InputSpec, Skip, Symbol
from tests.hashed_manifest import hashed


def example(**changes: Any) -> manifest.Manifest:
    values: dict[str, Any] = {
        "schema_version": manifest.SCHEMA_VERSION,
        "armopt_version": "0.1.0",
        "target": "graviton3",
        "machine": "aarch64",
        "required_features": ("bf16",),
        "environment": {"OMP_NUM_THREADS": Variable("4", "größer")},
        "versions": {"torch": "2.13.0"},
        "files": {"graph.json": "00" * 32},
        "model": manifest.SourceModel(
            "m.pt2",
            "11" * 32,
            (manifest.PartInputs("", (InputSpec("x", ("batch", 3), "float32"),), (Symbol("batch", "s0", 1, None),)),),
        ),
        "plan": (
            manifest.PartPlan(
                "",
                {"batch": 1},
                "cost",
                (Decision("fc", "linear", "blas_fp32", "fp32", "plain", (1, 3), "1 M instructions"),),
            ),
        ),
        "refused": (Skip("fc", "out_features=1"),),
        "accuracy": manifest.Accuracy(
            cosine=0.99975,
            max_abs=0.5,
            finite=True,
            min_cosine=None,
            passed=True,
            reference="FP32",
            gates=(manifest.GateResult("cosine>=0.99", 0.99975, "logits", True),),
            inputs="given",
            inputs_given=True,
            task=manifest.TaskFigures("", "as asked", {"static": {}}),
            repair=manifest.RepairResult(True, 3, "1 layer", (manifest.Change("fc", "a", "b", "fp32"),)),
        ),
        "weights": manifest.Weights(10, 20),
        "onnxruntime": manifest.Session(
            "1.31",
            {"flag": manifest.SessionFlag("1", True, "why")},
            {"intra_op_num_threads": manifest.SessionOption(0, "why")},
            manifest.LayerCount(1, 1),
            manifest.OnnxModel(20, "fp32", {"batch": 1}),
        ),
    }
    return manifest.Manifest(**{**values, **changes})


DATA = manifest.to_bytes(example())


def test_it_survives() -> None:
    assert manifest.from_bytes(DATA, "m") == example()


def test_it_is_sorted_json_for_people() -> None:
    content = json.loads(DATA)
    assert list(content) == sorted(content)
    assert DATA.count(b"\n") > 20
    assert manifest.to_bytes(example()) == DATA


@given(st.integers(0, len(DATA) - 1), st.integers(1, 255))
@settings(max_examples=300, deadline=None)
def test_any_changed_byte_is_found(position: int, flip: int) -> None:
    changed = bytearray(DATA)
    changed[position] ^= flip
    with pytest.raises(BundleError) as found:
        manifest.from_bytes(bytes(changed), "somewhere/manifest.json")
    assert found.value.where == "somewhere/manifest.json"


@given(st.integers(0, len(DATA) - 1))
@settings(max_examples=100, deadline=None)
def test_any_missing_or_extra_byte_is_found(position: int) -> None:
    for changed in (DATA[:position], DATA[:position] + DATA[position + 1 :], DATA[:position] + b" " + DATA[position:]):
        with pytest.raises(BundleError):
            manifest.from_bytes(changed, "m")


@given(
    st.binary(max_size=64)
    | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(lambda v: json.dumps(v).encode())
)
@settings(max_examples=100, deadline=None)
def test_anything_else_is_an_error_of_ours(data: bytes) -> None:
    with pytest.raises(BundleError):
        manifest.from_bytes(data, "m")


def test_a_later_schema_says_what_to_install() -> None:
    later = json.loads(DATA) | {"schema_version": 4, "armopt_version": "9.1", "new_field": 1}
    with pytest.raises(BundleError, match=r"schema 4.*up to 3.*armopt 9\.1"):
        manifest.from_bytes(json.dumps(later).encode(), "m")


@pytest.mark.parametrize("change", [{"extra": 1}, {"target": None}])
def test_a_field_too_many_or_too_few_is_found_even_with_a_true_digest(change: dict[str, Any]) -> None:
    content = json.loads(DATA) | change
    with pytest.raises(BundleError):
        manifest.from_bytes(hashed({k: v for k, v in content.items() if v is not None}), "m")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("plan", 0, "nodes", 0, "shape"), "1x3", "m: plan[0].nodes[0].shape: expected array, got str. Make"),
        (("plan", 0, "bucket"), {"batch": -1}, "m: plan[0].bucket[...]: expected int >= 0. Make"),
        (("environment", "OMP_NUM_THREADS"), "4", "m: environment[...]: expected object, got str. Make"),
        (("files", "graph.json"), "../x", "m: files[...]: expected str matching regex"),
        (("model", "parts"), [], "m: model.parts: expected array of length >= 1. Make"),
        (("model", "parts", 0, "inputs", 0, "dtype"), "load", "m: model.parts[0].inputs[0].dtype: expected str match"),
        (("accuracy", "cosine"), None, "m: accuracy.cosine: expected float, got null. Make"),
        (("weights",), {"bytes": 1}, "m: weights: object missing required field fp32_bytes. Make"),
        (("accuracy", "surplus"), 1, "m: accuracy.surplus is no field that armopt knows. Make"),
        (("plan", 0, "nodes", 0, "surplus"), 1, "m: plan[0].nodes[0].surplus is no field that armopt knows. Make"),
        (("schema_version",), 0, "m: does not fit its schema"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_with_its_place(path: tuple[Any, ...], value: Any, message: str) -> None:
    content = json.loads(DATA)
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(BundleError) as found:
        manifest.from_bytes(hashed(content), "m")
    assert str(found.value).startswith(message)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_numbers_that_json_lacks_are_an_error_of_ours(number: str) -> None:
    with pytest.raises(BundleError):
        manifest.from_bytes(DATA.replace(b"0.5,", f"{number},".encode()), "m")
