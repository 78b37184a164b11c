"""A bundle's graph as an ONNX model, for other runtimes. See docs/onnx.md."""
