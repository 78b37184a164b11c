from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from armopt.bundle import manifest
from armopt.errors import BundleError


def example(**changes: Any) -> manifest.Manifest:
    values: dict[str, Any] = {
        "schema_version": manifest.SCHEMA_VERSION,
        "armopt_version": "0.1.0",
        "target": "graviton3",
        "machine": "aarch64",
        "required_features": ("bf16",),
        "environment": {"OMP_NUM_THREADS": {"value": "4", "why": "größer"}},
        "versions": {"torch": "2.13.0"},
        "files": {"graph.json": "00" * 32},
        "model": {"source": "m.pt2", "inputs": [{"name": "x", "shape": ["batch", 3]}]},
        "plan": ({"bucket": {"batch": 1}, "nodes": []},),
        "refused": ({"node": "fc", "reason": "out_features=1"},),
        "accuracy": {"cosine": 0.99975, "passed": True},
        "weights": {"bytes": 10, "fp32_bytes": 20},
        "onnxruntime": {"session_options": {"intra_op_num_threads": {"value": 0}}},
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
    later = json.loads(DATA) | {"schema_version": 3, "armopt_version": "9.1", "new_field": 1}
    with pytest.raises(BundleError, match=r"schema 3.*up to 2.*armopt 9\.1"):
        manifest.from_bytes(json.dumps(later).encode(), "m")


@pytest.mark.parametrize("change", [{"extra": 1}, {"target": None}])
def test_a_field_too_many_or_too_few_is_found_even_with_a_true_digest(change: dict[str, Any]) -> None:
    import hashlib

    content = {k: v for k, v in json.loads(DATA).items() if k != "digest"} | change
    content = {k: v for k, v in content.items() if v is not None}
    content["digest"] = hashlib.sha256(manifest._canonical(content)).hexdigest()
    with pytest.raises(BundleError):
        manifest.from_bytes(manifest._canonical(content), "m")
