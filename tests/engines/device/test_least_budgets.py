"""The least budgets that README states, against what is planned at full size; the provider's tests have ``cuda``'s."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from i2l.engines.device.predict import graph_memory
from i2l.engines.device.residency import GraphMemory, plan_residency
from i2l.engines.directory.manifest import INTERMEDIATES, Model
from i2l.engines.plugin.backend import plan_plugin
from i2l.engines.plugin.graph_paths import FORMS
from i2l.engines.plugin.providers import WEBGPU
from i2l.export.graphs.attention_forms import with_attention
from i2l.export.graphs.graphs import export_graphs
from i2l.export.packs.planning import planned_model
from i2l.export.precisions.choosing import plugin_precision
from i2l.runtime.passes import IMAGES_PER_PASS
from i2l.specs import PRESETS, Family

README = (Path(__file__).parents[3] / "README.md").read_text(encoding="utf-8")
ALL = 1 << 62
MIB = 1 << 20


def stated_mib(backend: str, precision: str) -> int:
    """Of the row ``| `backend` | 1,250 MiB (fp8), 1,415 MiB (int8) |``."""
    (row,) = re.findall(rf"^\| `{backend}` \| (\S+ MiB \(.*) \|$", README, re.MULTILINE)
    (number,) = re.findall(rf"([\d,]+) MiB \({precision}\)", row)
    return int(number.replace(",", ""))


def full_models(precision: str) -> dict[Family, Model]:
    return {spec.family: planned_model(spec, precision) for spec in PRESETS["full"]}


@pytest.mark.parametrize("precision", ["fp8", "int8", "bf16"])
def test_tensorrt_s_are_what_readme_says(precision: str) -> None:
    """By the estimate of scratch, which is more than the builder's own where both are known (test_plans.py)."""
    models = full_models(precision)
    chunks = {family: model.chunks for family, model in models.items()}
    plan = plan_residency(chunks, graph_memory(models, IMAGES_PER_PASS), ALL)
    assert 0.97 * stated_mib("tensorrt", precision) < plan.least_bytes / MIB <= stated_mib("tensorrt", precision)


def plugin_memory(precision: str, form: str) -> dict[str, GraphMemory]:
    """What the graphs of a form say that they take, for as many images as share a pass."""
    memory = {}
    for spec in PRESETS["full"]:
        wanted = plugin_precision(precision, spec)
        assert wanted is not None
        for name, exported in export_graphs(spec, wanted):
            graph = with_attention(exported, form)
            facts: Mapping[str, str] = {entry.key: entry.value for entry in graph.metadata_props}
            fixed, each = map(int, facts[INTERMEDIATES].split(","))
            _, *shape = (dimension.dim_value for dimension in graph.graph.input[0].type.tensor_type.shape.dim)
            given = 4 * IMAGES_PER_PASS * math.prod(shape)
            memory[name] = GraphMemory(0, given, fixed + each * IMAGES_PER_PASS)
    return memory


@pytest.mark.webgpu
@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_webgpu_s_are_what_readme_says(precision: str) -> None:
    """In the form that takes more: which one is used is the proof's affair. Exported at full size, without weights."""
    models, memory = full_models(precision), plugin_memory(precision, FORMS[0])
    plan = plan_plugin(models, memory, WEBGPU.reserved_bytes, ALL)
    assert 0.97 * stated_mib("webgpu", precision) < plan.least_bytes / MIB <= stated_mib("webgpu", precision)
