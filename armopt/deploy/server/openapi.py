"""The model's description by the protocol, and the OpenAPI description of the routes with a page that shows it."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from typing import Any

import torch

from armopt._version import __version__
from armopt.deploy.server import protocol
from armopt.deploy.server.served import Served

_ERRORS = {
    "400": "the request can't be used: the text says why",
    "404": "there is no such model, version or page",
    "405": "the page takes another method",
    "408": "the body did not come in time",
    "413": "the body, or the JSON in it, is too large",
    "415": "the body is compressed",
    "429": "too many requests wait: try again",
    "500": "a fault of the server's",
    "501": "an output has a datatype for which the protocol has no name",
    "503": "too many connections, or not ready",
    "504": "no answer in time",
}


def metadata(name: str, served: Served) -> dict[str, Any]:
    """The model as ``GET /v2/models/NAME`` describes it."""
    inputs = [(spec.name, spec.shape, getattr(torch, spec.dtype)) for spec in served.inputs]
    return {
        "name": name,
        "versions": [served.version],
        "platform": "armopt_bundle",
        "inputs": protocol.metadata(inputs),
        "outputs": protocol.metadata(served.outputs),
    }


def describe(name: str, served: Served) -> dict[str, Any]:
    """All routes, as OpenAPI 3.1."""
    model, version = f"/v2/models/{name}", f"/v2/models/{name}/versions/{served.version}"
    paths: dict[str, Any] = {
        "/v2": _get("The server's name, version and extensions.", "Server"),
        "/v2/health/live": _get("Whether the process answers.", "Live"),
        "/v2/health/ready": _get(
            "Whether requests should be sent here: the kernels answer as planned.", "Ready", "503"
        ),
        "/metrics": _get("Metrics for Prometheus.", None),
        "/openapi.json": _get("This description.", "Any"),
        "/docs": _get("This description as a page.", None, kind="text/html"),
    }
    for prefix in (model, version):
        paths[prefix] = _get("What the model takes and returns.", "Model")
        paths[f"{prefix}/ready"] = _get("Whether requests should be sent here.", "Ready", "503")
        paths[f"{prefix}/infer"] = {"post": _infer(name, served)}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"{name}, served by armopt",
            "version": __version__,
            "description": "The Open Inference Protocol v2 with the extension of binary tensors.",
        },
        "paths": paths,
        "components": {"schemas": _schemas()},
    }


def page(description: Mapping[str, Any]) -> str:
    """The description as one page that loads nothing."""
    info = description["info"]
    rows = "".join(
        f"<tr><td>{method.upper()}</td><td><code>{html.escape(path)}</code></td>"
        f"<td>{html.escape(operation['summary'])}</td><td>{', '.join(operation['responses'])}</td></tr>"
        for path, methods in description["paths"].items()
        for method, operation in methods.items()
    )
    example = next(
        methods["post"]["requestBody"]["content"][protocol.JSON]["example"]
        for methods in description["paths"].values()
        if "post" in methods
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(info['title'])}</title>"
        "<style>body{font-family:sans-serif;margin:2em}td{padding:.2em .8em;border-bottom:1px solid #ccc}</style>"
        f"<h1>{html.escape(info['title'])}</h1><p>{html.escape(info['description'])} "
        '<a href="/openapi.json">openapi.json</a></p>'
        f"<table><tr><th>method<th>path<th>what<th>answers</tr>{rows}</table>"
        f"<h2>A request</h2><pre>{html.escape(json.dumps(example, indent=1))}</pre></html>"
    )


def _get(summary: str, schema: str | None, *errors: str, kind: str = "text/plain") -> dict[str, Any]:
    content = {protocol.JSON: {"schema": _ref(schema)}} if schema else {kind: {"schema": {"type": "string"}}}
    good = {"description": summary, "content": content}
    return {"get": {"summary": summary, "responses": {"200": good, **_refusals("405", *errors, schema=schema)}}}


def _refusals(*codes: str, schema: str | None = None) -> dict[str, Any]:
    return {
        code: {
            "description": _ERRORS[code],
            "content": {protocol.JSON: {"schema": _ref("Ready" if schema == "Ready" and code == "503" else "Error")}},
        }
        for code in codes
    }


def _infer(name: str, served: Served) -> dict[str, Any]:
    inputs = metadata(name, served)["inputs"]
    example = {
        "inputs": [
            {**each, "shape": shape, "data": [0] * _count(shape)}
            for each in inputs
            for shape in ([1 if size < 0 else size for size in each["shape"]],)
            if _count(shape) <= 64
        ]
    }
    binary = {"schema": {"type": "string", "format": "binary"}}
    answer = {protocol.JSON: {"schema": _ref("Answer")}, protocol.BINARY: binary}
    return {
        "summary": "Runs the model.",
        "parameters": [
            {
                "name": "Inference-Header-Content-Length",
                "in": "header",
                "description": "Bytes of JSON, where binary tensors stand behind it.",
                "schema": {"type": "integer", "minimum": 0},
            }
        ],
        "requestBody": {
            "required": True,
            "content": {
                protocol.JSON: {"schema": _ref("Request"), "example": example},
                protocol.BINARY: {"schema": {"type": "string", "format": "binary"}},
            },
        },
        "responses": {
            "200": {"description": "The outputs.", "content": answer},
            **_refusals("400", "405", "408", "413", "415", "429", "500", "501", "503", "504"),
        },
    }


def _count(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _ref(schema: str | None) -> dict[str, Any]:
    return {} if schema in (None, "Any") else {"$ref": f"#/components/schemas/{schema}"}


def _schemas() -> dict[str, Any]:
    text, shape = {"type": "string"}, {"type": "array", "items": {"type": "integer"}}
    datatype = {"type": "string", "enum": list(protocol.DATATYPES.values())}
    sizes = {"type": "array", "maxItems": 64, "items": {"type": "integer", "minimum": 0}}
    described = _object(name=text, datatype=datatype, shape=shape)
    parameters = {"type": "object"}
    given = _object(name=text, datatype=datatype, shape=sizes)
    given["properties"] |= {"parameters": parameters, "data": {"type": "array"}}
    wanted = _object(name=text)
    wanted["properties"]["parameters"] = parameters
    request = _object(inputs={"type": "array", "items": given})
    request["properties"] |= {"id": text, "parameters": parameters, "outputs": {"type": "array", "items": wanted}}
    output = _object(name=text, datatype=datatype, shape=shape)
    output["properties"] |= {"parameters": parameters, "data": {"type": "array"}}
    answer = _object(model_name=text, model_version=text, outputs={"type": "array", "items": output})
    answer["properties"]["id"] = text
    ready = _object(name=text, ready={"type": "boolean"})
    ready["properties"]["error"] = text
    several = {"type": "array", "items": described}
    return {
        "Server": _object(name=text, version=text, extensions={"type": "array", "items": text}),
        "Live": _object(live={"type": "boolean"}),
        "Ready": ready,
        "Model": _object(
            name=text, versions={"type": "array", "items": text}, platform=text, inputs=several, outputs=several
        ),
        "Request": request,
        "Answer": answer,
        "Error": _object(error=text),
    }


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}
