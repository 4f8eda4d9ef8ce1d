"""LoRAs from several engines directories, in one process: starting Python is the slow part on an emulated CPU.

usage: loras.py PICTURES PACKS OUTPUT, three folders: of pictures, of engines directories, and for the LoRAs. OUTPUT
gets ``<engines>/<picture>.safetensors`` of each picture alone and ``<engines>/all.safetensors`` of all in one pass,
joined with weight 1, so that each one's factors stand in it as they are. float32, as bf16 would hide rounding. Needs
what i2l needs to run.
"""

import sys
from pathlib import Path

import i2l


def write_loras(pictures: list[Path], engines: Path, output: Path) -> None:
    output.mkdir(parents=True)
    with i2l.open_engines(engines, backend="cpu", threads=1) as pipeline:  # waiting threads spin, and are emulated too
        for picture in pictures:
            pipeline.lora_from_images(picture).save(output / f"{picture.stem}.safetensors", dtype="fp32")
        joined = pipeline.lora_from_images(pictures, weights=[1] * len(pictures))
        joined.save(output / "all.safetensors", dtype="fp32")


if __name__ == "__main__":
    pictures, packs, output = map(Path, sys.argv[1:])
    for engines in packs.iterdir():
        write_loras(sorted(pictures.iterdir()), engines, output / engines.name)
