"""What test_onnx_runtime.py sends to the emulated side: models for ONNX Runtime. Without torch, as a server may be."""

import sys

import numpy as np
import onnxruntime


def run(path, inputs, config=None, threads=1):
    """The outputs of a model by name, for inputs in an .npz file."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    for name, value in (config or {}).items():
        options.add_session_config_entry(name, value)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    assert "torch" not in sys.modules
    names = [entry.name for entry in session.get_outputs()]
    return dict(zip(names, session.run(None, dict(np.load(inputs))), strict=True))


def version():
    return onnxruntime.__version__
