"""benchmarks/as_cpu.py makes onnxruntime choose an older CPU's kernel, the one that saturates; nothing else fails."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

AS_CPU = Path(__file__).parents[1] / "benchmarks" / "as_cpu.py"
PRODUCT = """
import numpy as np
import onnxruntime as ort
from onnx import TensorProto as T, helper
values = {"x": (T.FLOAT, [64, 512]), "w": (T.INT8, [512, 256]), "s": (T.FLOAT, [1])}
inputs = [helper.make_tensor_value_info(name, *of) for name, of in values.items()]
node = helper.make_node("DynamicQuantizeMatMul", ["x", "w", "s"], ["y"], domain="com.microsoft")
graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("y", T.FLOAT, [64, 256])])
opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
x = np.random.default_rng(0).uniform(-1, 1, (64, 512)).astype(np.float32)
w = np.random.default_rng(1).integers(-127, 128, (512, 256), np.int8)
(y,) = session.run(None, {"x": x, "w": w, "s": np.ones(1, np.float32)})
exact = x @ w.astype(np.float32)
print(np.linalg.norm(y - exact) / np.linalg.norm(exact))
"""


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="masks x86's cpuid by glibc's means"
)
@pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("objdump")), reason="wants gcc and objdump")
@pytest.mark.parametrize("cpu", ["avx2", "avx512"])
def test_onnxruntime_adds_as_a_cpu_without_vnni_does(cpu: str, tmp_path: Path) -> None:
    command, variables = [sys.executable, str(AS_CPU), cpu, "-c", PRODUCT], os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    assert float(done.stdout) > 0.1, "uniform weights make the kernel without VNNI saturate; exact is below 0.01"
