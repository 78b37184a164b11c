"""ONNX Runtime as a contender: prepares calls of its sessions, on the emulated side, one thread each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

FAST_MATH = "mlas.enable_gemm_fastmath_arm64_bfloat16"
Array = NDArray[np.float32]
Nodes = Sequence[onnx.NodeProto]


def session(
    model: str | bytes, feeds: Mapping[str, NDArray[Any]], *, fast_math: bool, options: Mapping[str, Any] | None = None
) -> Callable[[], Any]:
    """A call of a model on one thread, with or without the BF16 flag and with other options.

    A name with a dot is a configuration entry, another one an attribute of SessionOptions.
    """
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    for name, value in ({FAST_MATH: "1"} if fast_math else {}).items() | (options or {}).items():
        if "." in name:
            settings.add_session_config_entry(name, value)
        else:
            setattr(settings, name, type(getattr(settings, name))(value))
    opened = onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
    return lambda: opened.run(None, feeds)


#: How one Linear with bias can stand in a graph, by name: nodes over x, w ([K, N]) or wt ([N, K]), b ([N]).
LINEAR_FORMS: dict[str, Nodes] = {
    "Gemm": [helper.make_node("Gemm", ["x", "w", "b"], ["y"])],
    "Gemm transB": [helper.make_node("Gemm", ["x", "wt", "b"], ["y"], transB=1)],
    "MatMul+Add": [helper.make_node("MatMul", ["x", "w"], ["t"]), helper.make_node("Add", ["t", "b"], ["y"])],
    "MatMul+Sub": [helper.make_node("MatMul", ["x", "w"], ["t"]), helper.make_node("Sub", ["t", "nb"], ["y"])],
}


def linear_model(form: str, m: int, k: int, n: int) -> tuple[bytes, dict[str, Array]]:
    """A model of one Linear in one of LINEAR_FORMS, and its inputs."""
    random = np.random.default_rng(0)
    x, w, b = (random.standard_normal(shape, dtype=np.float32) for shape in ((m, k), (k, n), (n,)))
    constants = {"w": w, "wt": np.ascontiguousarray(w.T), "b": b, "nb": -b}
    return _model(LINEAR_FORMS[form], {"x": x}, constants), {"x": x}


def conv_model(
    form: str, shape: Sequence[int], weight: Sequence[int], stride: int = 1, padding: int = 0, groups: int = 1
) -> tuple[bytes, dict[str, Array]]:
    """A model of one convolution with bias and relu: as Conv, or with one pixel as MatMul between two Transposes."""
    random = np.random.default_rng(0)
    x, w = (random.standard_normal(tuple(s), dtype=np.float32) for s in (shape, weight))
    b = random.standard_normal(weight[0], dtype=np.float32)
    constants = {"b": b, "w": w}
    if form == "Conv":
        attributes = {"strides": [stride] * 2, "pads": [padding] * 4, "group": groups}
        nodes = [helper.make_node("Conv", ["x", "w", "b"], ["t"], **attributes)]
    else:
        constants |= {"w": np.ascontiguousarray(w.reshape(weight[0], -1).T), "nb": -b}
        nodes = [
            helper.make_node("Transpose", ["x"], ["last"], perm=[0, 2, 3, 1]),
            helper.make_node("MatMul", ["last", "w"], ["p"]),
            helper.make_node("Sub", ["p", "nb"], ["q"]),
            helper.make_node("Transpose", ["q"], ["t"], perm=[0, 3, 1, 2]),
        ]
    nodes.append(helper.make_node("Relu", ["t"], ["y"]))
    return _model(nodes, {"x": x}, constants), {"x": x}


def attention_model(form: str, heads: int, keys: int, size: int) -> tuple[bytes, dict[str, Array]]:
    """A model of the second product of attention, probabilities by values: as MatMul or as Einsum."""
    random = np.random.default_rng(0)
    p = random.standard_normal((1, heads, keys, keys), dtype=np.float32)
    v = random.standard_normal((1, heads, keys, size), dtype=np.float32)
    attributes = {"equation": "...mk,...kn->...mn"} if form == "Einsum" else {}
    return _model([helper.make_node(form, ["p", "v"], ["y"], **attributes)], {"p": p, "v": v}, {}), {"p": p, "v": v}


def _model(nodes: Nodes, inputs: Mapping[str, Array], constants: Mapping[str, NDArray[Any]]) -> bytes:
    read = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "contender",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape) for name, value in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items() if name in read],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    data: bytes = model.SerializeToString()
    return data


# --- jobs -----------------------------------------------------------------------------------------


def linear(form: str, m: int, k: int, n: int, fast_math: bool) -> Callable[[], Any]:
    """One Linear with bias."""
    return session(*linear_model(form, m, k, n), fast_math=fast_math)


def attention(form: str, fast_math: bool, **sizes: int) -> Callable[[], Any]:
    """The second product of attention."""
    return session(*attention_model(form, **sizes), fast_math=fast_math)


def conv(form: str, fast_math: bool, **geometry: Any) -> Callable[[], Any]:
    """One convolution with bias and relu."""
    return session(*conv_model(form, **geometry), fast_math=fast_math)


def model(path: str, fast_math: bool, options: Mapping[str, Any] | None = None) -> Callable[[], Any]:
    """A model from a file, on seeded noise."""
    inputs = {}
    random = np.random.default_rng(0)
    for entry in onnx.load(path, load_external_data=False).graph.input:
        shape = [size.dim_value for size in entry.type.tensor_type.shape.dim]
        inputs[entry.name] = random.standard_normal(shape, dtype=np.float32)
    return session(path, inputs, fast_math=fast_math, options=options)
