"""The cuda backend: onnxruntime on a CUDA card."""
