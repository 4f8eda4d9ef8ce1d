"""Which kernels TensorRT chose, read from its engine inspector: do the products take eight-bit operands?

The inspector's JSON is ``{"Layers": [...]}``; a layer has ``Name``, ``LayerType``, ``TacticName`` and ``Inputs`` with a
datatype each. TensorRT 10 calls that ``Format/Datatype`` and 11 splits it; the words for a type differ too. A plan that
was built without details has only names, and its products cannot be told.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

PRODUCT = re.compile(r"gemm|matrix_?multipl|matmul|fully_?connected", re.IGNORECASE)
"""In the type of a layer, in the name of its kernel, or in its own name if no more is known."""
NO_PRODUCT = re.compile(r"reformat|shuffle|constant|signal|wait|mha|attention", re.IGNORECASE)
FP8 = re.compile(r"fp8|float8|e4m3", re.IGNORECASE)
HALF = re.compile(r"bf16|bfloat16|fp16|float16|half", re.IGNORECASE)
DATATYPES = ("Format/Datatype", "Datatype", "DataType", "Format")


@dataclass(frozen=True)
class Products:
    """The matrix products of a graph by the type of their two operands."""

    fp8: int
    half: int
    """Both in 16 bits."""
    other: int
    """Float32, or two types: an eight-bit matrix that the kernel itself widens."""
    unknown: tuple[str, ...]
    """Names of layers that look like products but say no type."""


def products(layers: str) -> Products:
    """Count the products in the inspector's JSON.

    Raises:
        ValueError: it is no JSON.
    """
    counts = {"fp8": 0, "half": 0, "other": 0}
    unknown = []
    for layer in json.loads(layers).get("Layers", []):
        if not is_product(layer):
            continue
        types = list(operand_types(layer))
        if len(types) < 2:
            unknown.append(layer if isinstance(layer, str) else str(layer.get("Name", "")))
        else:
            first = types[0]
            counts[first if first == types[1] else "other"] += 1
    return Products(**counts, unknown=tuple(unknown))


def is_product(layer: str | Mapping[str, Any]) -> bool:
    """Whether a layer multiplies two matrices; attention's fused kernels are not meant."""
    if isinstance(layer, str):
        return PRODUCT.search(layer) is not None
    text = f"{layer.get('LayerType', '')} {layer.get('TacticName', '')}"
    return PRODUCT.search(text) is not None and NO_PRODUCT.search(text) is None


def operand_types(layer: str | Mapping[str, Any]) -> Iterator[str]:
    """``fp8``, ``half`` or ``other`` of the first two inputs that say a type; scales and biases come behind them."""
    if isinstance(layer, str):
        return
    for tensor in layer.get("Inputs", [])[:2]:
        text = next((str(tensor[key]) for key in DATATYPES if tensor.get(key)), "")
        if text:
            yield "fp8" if FP8.search(text) else "half" if HALF.search(text) else "other"
