"""The cpu backend: onnxruntime over a mapped pack."""
