"""Export: checkpoints to graphs and packs. torch and onnx live here and nowhere else."""
