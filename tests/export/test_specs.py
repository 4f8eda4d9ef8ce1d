"""Specs: the presets against the published facts, and the way to JSON and back."""

import json
import math
from dataclasses import fields
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from i2l.export.checkpoints.shapes import shape_hash, tensor_shapes
from i2l.specs import (
    FAMILIES,
    LARGEST_EPS,
    LARGEST_THETA,
    PRESETS,
    AdapterSpec,
    EncoderSpec,
    Family,
    Spec,
    spec_from_dict,
    spec_to_dict,
)

# Facts about the published files: shape hash, tensors, parameters.
PUBLISHED: dict[Family, tuple[str, int, int]] = {
    "siglip2": ("469c78b61e3e31bc9eec0d0af3d3f2f8", 656, 1_163_659_776),
    "dinov3": ("5722b5c873720009de96422993b15682", 687, 6_716_035_072),
    "adapter": ("9510cb8cd1dd34ee0e4f111c24905510", 952, 1_613_234_176),
}
ALL_SPECS = [pytest.param(spec, id=f"{name}-{spec.family}") for name, preset in PRESETS.items() for spec in preset]
ENCODERS = [
    pytest.param(getattr(preset, family), id=f"{name}-{family}")
    for name, preset in PRESETS.items()
    for family in ("siglip2", "dinov3")
]

counts = st.integers(1, 1 << 20)


@st.composite
def sound_encoder_specs(draw: st.DrawFn) -> EncoderSpec:
    """Specs whose numbers fit one another."""
    families: tuple[Literal["siglip2", "dinov3"], ...] = ("siglip2", "dinov3")
    family = draw(st.sampled_from(families))
    heads, patch = draw(st.integers(1, 8)), draw(st.integers(1, 32))
    return EncoderSpec(
        family=family,
        hidden=4 * heads * draw(st.integers(1, 64)),
        depth=draw(counts),
        heads=heads,
        intermediate=draw(counts),
        image_size=patch * draw(st.integers(1, 16)),
        patch=patch,
        registers=draw(st.integers(0, 8)) if family == "dinov3" else 0,
        norm_eps=draw(st.floats(1e-12, LARGEST_EPS)),
        rope_theta=draw(st.floats(1, LARGEST_THETA)),
    )


encoder_specs = sound_encoder_specs()
adapter_specs = st.builds(
    AdapterSpec,
    family=st.just("adapter"),
    embedding=counts,
    compress=counts,
    rank=counts,
    hidden=counts,
    feed_forward=counts,
    layers=counts,
    refiners=st.integers(0, 8),
)


def refused(values: dict[str, Any]) -> str:
    """The message with which ``values`` are refused."""
    with pytest.raises(ValueError, match=r".") as caught:
        spec_from_dict(values)
    return str(caught.value)


# --- presets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_full_preset_has_the_published_keys_and_shapes(family: Family) -> None:
    shapes = tensor_shapes(getattr(PRESETS["full"], family))
    facts = (shape_hash(shapes), len(shapes), sum(math.prod(shape) for shape in shapes.values()))
    assert facts == PUBLISHED[family]


@pytest.mark.parametrize("spec", ENCODERS)
def test_heads_divide_the_width(spec: EncoderSpec) -> None:
    assert spec.head_dim * spec.heads == spec.hidden


@pytest.mark.parametrize("name", PRESETS)
def test_rotary_positions_fit_the_heads(name: str) -> None:
    assert PRESETS[name].dinov3.head_dim % 4 == 0  # sine and cosine of y and of x


@pytest.mark.parametrize("spec", ENCODERS)
def test_patches_tile_the_image(spec: EncoderSpec) -> None:
    assert spec.grid * spec.patch == spec.image_size


@pytest.mark.parametrize("name", PRESETS)
def test_the_adapter_takes_both_embeddings(name: str) -> None:
    preset = PRESETS[name]
    assert preset.adapter.embedding == preset.siglip2.hidden + preset.dinov3.hidden


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_one_spec_of_each_family(name: str) -> None:
    assert [spec.family for spec in PRESETS[name]] == list(FAMILIES)


def test_tokens_of_the_published_encoders() -> None:
    full = PRESETS["full"]
    assert (full.siglip2.tokens, full.dinov3.tokens) == (24 * 24, 1 + 4 + 14 * 14)


def test_targets_of_the_published_adapter() -> None:
    spec = PRESETS["full"].adapter
    targets = [*spec.attention_targets, *spec.feed_forward_targets]
    blocks = sum(count for _, count in spec.components)
    values = blocks * sum(spec.rank * (wide + narrow) for _, wide, narrow in targets)
    assert (2 * blocks * len(targets), values) == (476, 9_922_560)  # "476 tensors, 9.9 M values" per image


# --- JSON -------------------------------------------------------------------------------------------------------


@given(encoder_specs | adapter_specs)
@settings(deadline=None)
def test_a_spec_survives_json(spec: Spec) -> None:
    assert spec_from_dict(json.loads(json.dumps(spec_to_dict(spec)))) == spec


@given(encoder_specs | adapter_specs, st.data())
@settings(deadline=None)
def test_a_missing_field_is_named(spec: Spec, data: st.DataObject) -> None:
    optional = ("family", "diffusion_model")  # the second came later: without it, z-image
    name = data.draw(st.sampled_from([field.name for field in fields(spec) if field.name not in optional]))
    values = spec_to_dict(spec)
    del values[name]
    assert f"['{name}']" in refused(values)


@given(encoder_specs | adapter_specs, st.text(st.characters(categories=["Ll"]), min_size=1))
@settings(deadline=None)
def test_an_unknown_field_is_named(spec: Spec, name: str) -> None:
    values = spec_to_dict(spec)
    if name not in values:
        assert f"['{name}']" in refused(values | {name: 1})


@given(encoder_specs | adapter_specs, st.data())
@settings(deadline=None)
def test_a_field_of_the_wrong_type_is_named(spec: Spec, data: st.DataObject) -> None:
    field = data.draw(st.sampled_from([field for field in fields(spec) if field.name != "family"]))
    wrong: list[object] = [None, True, "4", [4], {}, -1, math.nan, math.inf, -math.inf]
    if field.type is int:
        wrong += [4.0, 1.5]
    value = data.draw(st.sampled_from(wrong))
    assert refused(spec_to_dict(spec) | {field.name: value}).startswith(f"{field.name} is {value!r}")


@pytest.mark.parametrize("name", ["hidden", "depth", "heads", "intermediate", "image_size", "patch"])
def test_an_encoder_has_none_of_nothing(name: str) -> None:
    assert refused(spec_to_dict(PRESETS["tiny"].siglip2) | {name: 0}) == f"{name} is 0, not a count"


@pytest.mark.parametrize("family", [None, "clip", "", 3, ["siglip2"], "SIGLIP2"])
def test_an_unknown_family(family: object) -> None:
    assert refused(spec_to_dict(PRESETS["tiny"].siglip2) | {"family": family}) == f"unknown family {family!r}"


def test_no_family() -> None:
    values = spec_to_dict(PRESETS["tiny"].siglip2)
    del values["family"]
    assert refused(values) == "unknown family None"


@pytest.mark.parametrize("spec", ALL_SPECS)
def test_the_fields_of_another_kind(spec: Spec) -> None:
    other = "dinov3" if spec.family == "adapter" else "adapter"
    assert refused(spec_to_dict(spec) | {"family": other}).startswith("fields differ")
