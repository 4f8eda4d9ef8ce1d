"""What the peers of peers.py load: the first blocks of each encoder in every form, and what they take and give.

They are transformers' own layers, exported by each library's own means; inputs and exact outputs are those of the
project's picture, in float32. The calibrated form is calibrated with the very input that is measured, which is the best
case for it. What is there stays. Usage: python benchmarks/peer_files.py --models DIR --work DIR (wants nncf, openvino)
"""

import argparse
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino as ov
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from contenders import BLOCKS
from i2l.export.checkpoints.finding import find_checkpoints
from i2l.machine.threads import default_threads
from i2l.runtime.pictures.images import load_image
from i2l.runtime.pictures.pixels import pixels_dinov3, pixels_siglip2, square_image
from i2l.specs import EncoderSpec, Family
from oracles import encoder_model

IMAGE = Path(__file__).parents[1] / "docs" / "photo.jpg"


class Layer(torch.nn.Module):
    """A layer with all but its first argument fixed."""

    def __init__(self, layer: Any, others: tuple, named: dict) -> None:
        super().__init__()
        self.layer, self.others, self.named = layer, others, named

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.layer(hidden, *self.others, **self.named)


def main() -> None:
    """Write everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    arguments = parser.parse_args()
    prepare(arguments.models, arguments.work)


def prepare(models: Path, work: Path) -> None:
    """Inputs, exact outputs, and the blocks in every form that a peer loads; what is there stays."""
    work.mkdir(parents=True, exist_ok=True)
    for family in BLOCKS:
        if (work / f"{family}.outputs.npy").exists():
            continue
        layers, inputs, outputs = torch_layers(models, family, "float32")
        for index, (layer, x) in enumerate(zip(layers, inputs, strict=True)):
            base = str(work / f"{family}.{index}.")
            with torch.inference_mode():
                torch.onnx.export(
                    layer, (x,), base + "fp32.onnx", input_names=["hidden"], dynamo=True, opset_version=23,
                    external_data=True, verbose=False,
                )  # fmt: skip
                model = ov.convert_model(layer, example_input=x)
            for form, kind in (("s8", QuantType.QInt8), ("u8", QuantType.QUInt8)):
                quantize_dynamic(
                    base + "fp32.onnx", base + f"{form}.onnx", ["MatMul"], per_channel=True, weight_type=kind,
                    use_external_data_format=True,
                )  # fmt: skip
            ov.save_model(model, base + "fp32.xml", compress_to_fp16=False)
            samples = nncf.Dataset([x.numpy()])
            w8a8 = nncf.quantize(model.clone(), samples, subset_size=1, model_type=nncf.ModelType.TRANSFORMER)
            ov.save_model(w8a8, base + "w8a8.xml", compress_to_fp16=False)
            weights = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
            ov.save_model(weights, base + "weights.xml", compress_to_fp16=False)
        np.save(work / f"{family}.inputs.npy", torch.stack(inputs).numpy())
        np.save(work / f"{family}.outputs.npy", torch.stack(outputs).numpy())


def torch_layers(models: Path, family: Family, dtype: str) -> tuple[list[Any], list[Any], list[Any]]:
    """Its layers as modules of one input, with the inputs and outputs that the picture gives them."""
    checkpoint = find_checkpoints(models, [family])[family]
    assert isinstance(checkpoint.spec, EncoderSpec)
    spec = replace(checkpoint.spec, depth=BLOCKS[family])
    with safe_open(checkpoint.path, "pt") as file:
        names = [name for name in file.keys() if int((re.findall(r"layers?\.(\d+)", name) or "0")[0]) < spec.depth]  # noqa: SIM118
        model = encoder_model(spec, {name: file.get_tensor(name).to(getattr(torch, dtype)) for name in names})

    calls: list[tuple[Any, tuple, dict, Any]] = []
    layers = [
        module for module in model.modules() if re.fullmatch(r"(SiglipEncoder|DINOv3ViT)Layer", type(module).__name__)
    ]
    for layer in layers:
        layer.register_forward_hook(lambda *call: calls.append(call), with_kwargs=True)
    resize = pixels_siglip2 if family == "siglip2" else pixels_dinov3
    pixels = torch.from_numpy(resize(square_image(load_image(IMAGE)), spec.image_size))[None]
    torch.set_num_threads(default_threads())
    with torch.inference_mode():
        model(pixels.to(getattr(torch, dtype)))
    for layer in layers:
        layer._forward_hooks.clear()  # noqa: SLF001
    wrapped = [Layer(layer, others[1:], named).eval() for layer, others, named, _ in calls]
    return wrapped, [others[0] for _, others, _, _ in calls], [output for *_, output in calls]


if __name__ == "__main__":
    main()
