"""The Open Inference Protocol v2: requests to tensors and tensors to answers, as JSON and as binary tensors.

JSON has no NaN and no infinity: where an output holds one, its place in ``data`` is ``null``. Binary tensors keep them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Annotated, Any

import msgspec
import numpy as np
import orjson
import torch
from msgspec import Meta, Raw, Struct

from armopt.errors import first_line, printable

HEADER_LENGTH = "inference-header-content-length"
JSON, BINARY = "application/json", "application/octet-stream"
#: Of the protocol, by torch's names.
DATATYPES = {
    torch.bool: "BOOL",
    torch.uint8: "UINT8",
    torch.uint16: "UINT16",
    torch.uint32: "UINT32",
    torch.uint64: "UINT64",
    torch.int8: "INT8",
    torch.int16: "INT16",
    torch.int32: "INT32",
    torch.int64: "INT64",
    torch.float16: "FP16",
    torch.bfloat16: "BF16",
    torch.float32: "FP32",
    torch.float64: "FP64",
}
_DTYPES = {name: dtype for dtype, name in DATATYPES.items()}
_MOST_DIMENSIONS = 64
#: Characters of an error: a client may have sent ten thousand names.
_MOST_SAID = 1000
#: Of Triton's, by their parameters: who asks for these would take another answer for theirs.
_EXTENSIONS = ("classification", "shared_memory_region")


class RefusedError(Exception):
    """A request that is answered with an error: what is wrong, and the status code."""

    def __init__(self, what: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> None:
        super().__init__(printable(what if len(what) <= _MOST_SAID else f"{what[:_MOST_SAID]}…"))
        self.status = status


class _Input(Struct):
    name: str
    shape: Annotated[list[Annotated[int, Meta(ge=0)]], Meta(max_length=_MOST_DIMENSIONS)]
    datatype: str
    parameters: dict[str, Any] | None = None
    data: Raw = Raw(b"")


class _Output(Struct):
    name: str
    parameters: dict[str, Any] | None = None


class _Head(Struct):
    inputs: list[_Input]
    id: str | None = None
    parameters: dict[str, Any] | None = None
    outputs: list[_Output] | None = None


class Request(Struct, frozen=True):
    """One request.

    Attributes:
        id: The client's own, given back.
        tensors: Inputs by name.
        outputs: Names of the outputs that are asked for; empty asks for all.
        binary: Of those, and whether all others, are wanted as binary tensors.
    """

    id: str
    tensors: Mapping[str, torch.Tensor]
    outputs: tuple[str, ...]
    binary: Mapping[str, bool]
    all_binary: bool


_heads = msgspec.json.Decoder(_Head)


def read(body: bytes | bytearray, header_length: str | None, max_json_bytes: int) -> Request:
    """A request from its body.

    Args:
        body: JSON, and behind it what binary tensors hold.
        header_length: The header that says how long the JSON is; None where it is all.
        max_json_bytes: Of the JSON.

    Raises:
        RefusedError: Saying what is wrong with it.
    """
    view = memoryview(body)
    length = _length(len(body), header_length, max_json_bytes)
    try:
        head = _heads.decode(view[:length])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RefusedError(f"the body is no inference request: {first_line(error)}") from None
    tensors: dict[str, torch.Tensor] = {}
    at = length
    for given in head.inputs:
        if given.name in tensors:
            raise RefusedError(f"input {given.name} is given twice")
        dtype = _DTYPES.get(given.datatype)
        if dtype is None:
            raise RefusedError(f"input {given.name}: datatype {given.datatype!r} is none of {', '.join(_DTYPES)}")
        size = (given.parameters or {}).get("binary_data_size")
        if size is None:
            tensors[given.name] = _from_json(given, dtype)
        else:
            tensors[given.name] = _from_bytes(given, dtype, size, view[at:])
            at += size
    if at != len(body):
        raise RefusedError(f"{len(body) - at} bytes behind the JSON belong to no input")
    names, binary = _asked(head.outputs or ())
    return Request(head.id or "", tensors, names, binary, bool(flag(head.parameters, "binary_data_output")))


def _asked(outputs: Sequence[_Output]) -> tuple[tuple[str, ...], dict[str, bool]]:
    """The names of outputs, and whether they are wanted as binary tensors, of those that say so."""
    for output in outputs:
        if extension := next((name for name in _EXTENSIONS if name in (output.parameters or ())), None):
            raise RefusedError(f"output {output.name}: this server has no {extension}")
    names = tuple(output.name for output in outputs)
    if len(set(names)) < len(names):
        raise RefusedError("an output is asked for twice")
    binary = {output.name: flag(output.parameters, "binary_data") for output in outputs}
    return names, {name: wanted for name, wanted in binary.items() if wanted is not None}


def _length(most: int, header_length: str | None, max_json_bytes: int) -> int:
    """Bytes of the JSON in a body of `most`."""
    length = most
    if header_length is not None:
        if not (header_length.isascii() and header_length.isdecimal() and len(header_length) < 20):
            raise RefusedError("Inference-Header-Content-Length is no number of bytes")
        length = int(header_length)
        if length > most:
            raise RefusedError(f"Inference-Header-Content-Length is {length}, the body has {most} bytes")
    if length > max_json_bytes:
        raise RefusedError(
            f"{length} bytes of JSON, and at most {max_json_bytes} are read: send binary tensors",
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        )
    return length


def flag(parameters: Mapping[str, Any] | None, name: str) -> bool | None:
    """A parameter that is true or false; None where it isn't given.

    Raises:
        RefusedError: It is neither.
    """
    value = (parameters or {}).get(name)
    if value is not None and not isinstance(value, bool):
        raise RefusedError(f"parameter {name} is {value!r}, not true or false")
    return value


def _from_bytes(given: _Input, dtype: torch.dtype, size: Any, data: memoryview) -> torch.Tensor:
    expected = math.prod(given.shape) * dtype.itemsize
    if type(size) is not int or size != expected:
        raise RefusedError(f"input {given.name}: binary_data_size is {size!r}, its shape and datatype take {expected}")
    if bytes(given.data):
        raise RefusedError(f"input {given.name} has both data and binary_data_size")
    if size > len(data):
        raise RefusedError(f"input {given.name}: {size} bytes announced, {len(data)} sent")
    if not size:
        return _shaped(given, torch.empty(0, dtype=dtype))
    flat = torch.frombuffer(bytearray(data[:size]), dtype=torch.uint8)
    if dtype is torch.bool and bool((flat > 1).any()):
        raise RefusedError(f"input {given.name}: a BOOL is a byte of 0 or 1")
    return _shaped(given, flat.view(dtype))


def _from_json(given: _Input, dtype: torch.dtype) -> torch.Tensor:
    raw = bytes(given.data)
    if not raw:
        raise RefusedError(f"input {given.name} has neither data nor binary_data_size")
    depth = _depth(raw)
    if depth not in (1, len(given.shape)):
        raise RefusedError(f"input {given.name}: data is nested {depth} deep, its shape has {len(given.shape)} sizes")
    kind: Any = float if dtype.is_floating_point else bool if dtype is torch.bool else int
    for _ in range(depth):
        kind = list[kind]
    stored: Any = np.float32 if dtype is torch.bfloat16 else getattr(np, str(dtype).removeprefix("torch."), None)
    try:
        with np.errstate(over="raise"):
            values = np.array(msgspec.json.decode(raw, type=kind), dtype=np.bool_ if dtype is torch.bool else stored)
    except (msgspec.DecodeError, ValueError, OverflowError, FloatingPointError) as error:
        raise RefusedError(f"input {given.name}: {first_line(error)}") from None
    if depth > 1 and values.shape != tuple(given.shape):
        raise RefusedError(f"input {given.name}: data has shape {list(values.shape)}, not {given.shape}")
    if values.size != math.prod(given.shape):
        raise RefusedError(f"input {given.name}: {values.size} values, its shape takes {math.prod(given.shape)}")
    return _shaped(given, torch.from_numpy(values.reshape(-1)).to(dtype))


def _depth(raw: bytes) -> int:
    depth = 0
    for byte in raw[: 4 * _MOST_DIMENSIONS]:
        if byte == ord("["):
            depth += 1
        elif byte not in b" \t\r\n":
            break
    return depth


def _shaped(given: _Input, flat: torch.Tensor) -> torch.Tensor:
    try:
        return flat.reshape(given.shape)
    except (RuntimeError, TypeError, OverflowError):
        raise RefusedError(f"input {given.name}: no tensor has shape {given.shape}") from None


def write(
    request: Request, outputs: Mapping[str, torch.Tensor], name: str, version: str
) -> tuple[list[bytes], dict[str, str]]:
    """An answer: the parts of its body, and its headers.

    Raises:
        RefusedError: An output is asked for that the model lacks.
    """
    wanted = request.outputs or tuple(outputs)
    if unknown := [each for each in wanted if each not in outputs]:
        raise RefusedError(f"the model has no output {unknown[0]}: it has {', '.join(outputs)}")
    described: list[dict[str, Any]] = []
    parts: list[bytes] = []
    for each in wanted:
        tensor = outputs[each].detach().contiguous()
        entry: dict[str, Any] = {"name": each, "shape": list(tensor.shape), "datatype": datatype(tensor.dtype, each)}
        if request.binary.get(each, request.all_binary):
            data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
            entry["parameters"] = {"binary_data_size": len(data)}
            parts.append(data)
        else:
            flat = tensor.reshape(-1)
            entry["data"] = (flat.float() if flat.dtype is torch.bfloat16 else flat).numpy()
        described.append(entry)
    answer = {"model_name": name, "model_version": version, "outputs": described}
    if request.id:
        answer["id"] = request.id
    head = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
    if not any("parameters" in entry for entry in described):
        return [head], {"content-type": JSON}
    return [head, *parts], {"content-type": BINARY, HEADER_LENGTH: str(len(head))}


def datatype(dtype: torch.dtype, where: str) -> str:
    """The protocol's name of a dtype.

    Raises:
        RefusedError: It has none.
    """
    if dtype not in DATATYPES:
        raise RefusedError(f"{where} is {dtype}, for which the protocol has no name", HTTPStatus.NOT_IMPLEMENTED)
    return DATATYPES[dtype]


def metadata(shapes: Sequence[tuple[str, Sequence[int | str], torch.dtype]]) -> list[dict[str, Any]]:
    """Inputs or outputs as the protocol describes them; a dynamic size is -1."""
    return [
        {"name": name, "datatype": datatype(dtype, name), "shape": [s if isinstance(s, int) else -1 for s in shape]}
        for name, shape, dtype in shapes
    ]
