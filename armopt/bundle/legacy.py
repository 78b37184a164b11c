"""Bundles of schema 1 (one graph) and 2 (submodules as graphs), as JSON of the present schema."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from armopt.bundle.graph_file import quotable
from armopt.errors import BundleError


def manifest(content: dict[str, Any], where: str | Path) -> dict[str, Any]:
    """The content of a manifest; what does not fit is left for the schema to refuse.

    Raises:
        BundleError: It is of neither schema.
    """
    try:
        if content["schema_version"] not in (1, 2):
            raise ValueError("schema_version")
        model = dict(content["model"])
        is_module = model.pop("kind", "graph") == "module"
        inputs = {"inputs": model.pop("inputs"), "symbols": model.pop("symbols")}
        parts = model.pop("parts") if is_module else [{"path": "", **inputs}]
        session = dict(content["onnxruntime"])
        session["model"] = session["model"] or None
        accuracy = dict(content["accuracy"])
        accuracy.setdefault("gates", [_cosine_gate(accuracy)])  # the first bundles had this one, and nothing below
        return {
            **content,
            "accuracy": {**_NOT_MEASURED, **accuracy},
            "model": {"factory": "", **model, "parts": parts},
            "plan": [{"part": "", **entry} for entry in content["plan"]],
            "onnxruntime": session if "layers" in session else None,
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _unfit(error, where) from None


_NOT_MEASURED: dict[str, Any] = {
    "inputs": "the example inputs, as given",
    "inputs_given": False,
    "task": {"name": "", "why": "", "metrics": {}},
    "repair": None,
}


def _cosine_gate(accuracy: dict[str, Any]) -> dict[str, Any]:
    return {
        "gate": f"cosine>={accuracy['min_cosine']}",
        "value": accuracy["cosine"],
        "where": "",
        "passed": accuracy["passed"],
    }


def graph(content: Any, where: str | Path) -> dict[str, Any]:
    """The content of a graph.json.

    Raises:
        BundleError: It is of neither schema.
    """
    try:
        parts = content.get("parts", [content])
        return {
            "parts": [
                {
                    "path": part.get("path", ""),
                    "signature": _signature(part),
                    "programs": [_program(entry) for entry in part["programs"]],
                }
                for part in parts
            ]
        }
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise _unfit(error, where) from None


def program(content: Any, where: str | Path) -> dict[str, Any]:
    """The content of a reference.json.

    Raises:
        BundleError: It is of neither schema.
    """
    try:
        return _program(content)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise _unfit(error, where) from None


def _signature(part: dict[str, Any]) -> dict[str, Any]:
    inputs, outputs = part["inputs"], dict(part["outputs"])
    args, kwargs = (inputs["items"][name]["items"] for name in ("args", "kwargs"))
    positions = outputs.pop("positions")
    return {
        "inputs": {"args": args, "kwargs": kwargs, "names": inputs["names"]},
        "outputs": {"tree": outputs, "positions": positions},
        "specs": [{**spec, "statistics": spec.get("statistics") or None} for spec in part["specs"]],
        "symbols": part["symbols"],
    }


def _program(content: dict[str, Any]) -> dict[str, Any]:
    nodes = []
    for node in content["nodes"]:
        node = dict(node)
        if node["op"] == "call":
            node["args"] = [_argument(arg) for arg in node["args"]]
            node["kwargs"] = {name: _argument(value) for name, value in node.get("kwargs", {}).items()}
        nodes.append(node)
    return {**content, "nodes": nodes, "output": [_argument(value) for value in content["output"]]}


def _argument(value: Any) -> Any:
    if isinstance(value, list):
        return [_argument(item) for item in value]
    if isinstance(value, str):
        return quotable(value)
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "complex":
        return {"kind": kind, "real": float(content[0]), "imag": float(content[1])}
    return {"kind": kind, "name": content}


def _unfit(error: Exception, where: str | Path) -> BundleError:
    return BundleError(
        f"does not fit its schema: {error!r}", where=str(where), hint="Make the bundle again with armopt optimize"
    )
