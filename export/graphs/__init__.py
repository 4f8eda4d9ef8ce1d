"""Graphs: the models as torch modules, and as ONNX."""
