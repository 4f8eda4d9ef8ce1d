"""The tensorrt backend: TensorRT plans on a CUDA card."""
