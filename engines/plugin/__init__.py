"""Backends that are plugins of onnxruntime: libraries that load into the plain package."""
