"""The rival: the original's path on the CPU, torch in bfloat16, from image file to LoRA file.

transformers' own vision models and DiffSynth's own adapter code, weights loaded from the same checkpoints; everything
stays in memory between two images, as the original's CPU mode does it. Prints one JSON line: seconds to load, seconds
of each call by stage, peak resident bytes.

Usage: python benchmarks/rival.py --models DIR --image FILE --output FILE [--calls N]
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from i2l.export.checkpoints.finding import find_checkpoints
from i2l.machine.memory import peak_resident_bytes
from i2l.runtime.pictures.images import load_image
from i2l.runtime.pictures.pixels import pixels_dinov3, pixels_siglip2, square_image
from i2l.specs import EncoderSpec
from oracles import adapter_oracle, encoder_oracle


def main() -> None:
    """Load the models, then turn the image into a LoRA as often as asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--calls", type=int, default=2)
    arguments = parser.parse_args()

    checkpoints = find_checkpoints(arguments.models)
    specs = {family: checkpoint.spec for family, checkpoint in checkpoints.items()}
    start = time.perf_counter()
    siglip2, dinov3 = (
        encoder_oracle(checkpoints[family].spec, checkpoints[family].path, torch.bfloat16)
        for family in ("siglip2", "dinov3")
    )
    adapter = adapter_oracle(checkpoints["adapter"].spec, checkpoints["adapter"].path, torch.bfloat16)
    load_seconds = time.perf_counter() - start

    seconds = []
    for _ in range(arguments.calls):
        stages = {}
        start = time.perf_counter()
        square = square_image(load_image(arguments.image))
        inputs = [
            resize(square, spec.image_size)
            for resize, spec in ((pixels_siglip2, specs["siglip2"]), (pixels_dinov3, specs["dinov3"]))
            if isinstance(spec, EncoderSpec)
        ]
        embeddings = []
        for name, encoder, pixels in zip(("siglip2", "dinov3"), (siglip2, dinov3), inputs, strict=True):
            mark = time.perf_counter()
            embeddings.append(encoder(torch.from_numpy(pixels)[None].bfloat16())[0])
            stages[name] = round(time.perf_counter() - mark, 3)
        mark = time.perf_counter()
        lora = adapter(torch.cat(embeddings))
        stages["adapter"] = round(time.perf_counter() - mark, 3)
        save_file({name: tensor.contiguous() for name, tensor in lora.items()}, arguments.output)
        seconds.append({"total": round(time.perf_counter() - start, 3), **stages})
    facts = {"load_seconds": round(load_seconds, 2), "calls": seconds, "peak_resident_bytes": peak_resident_bytes()}
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
