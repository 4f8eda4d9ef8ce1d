"""Checkpoints: recognised by their tensors whatever they are called, and refused with every reason at once."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from i2l.errors import (
    CheckpointAmbiguous,
    CheckpointError,
    CheckpointForeign,
    CheckpointMismatch,
    CheckpointMissing,
    CheckpointUnreadable,
)
from i2l.export.checkpoints.finding import find_checkpoints
from i2l.export.checkpoints.recognise import SPEC_KEY, describe, recognise
from i2l.export.checkpoints.shapes import shape_hash, tensor_shapes
from i2l.machine.wording import format_path
from i2l.specs import FAMILIES, PRESETS, AdapterSpec, EncoderSpec, Family, Spec, spec_to_dict

Shapes = Mapping[str, tuple[int, ...]]

# The smallest of each kind: a file is a few KB.
MINIATURES: dict[Family, Spec] = {
    "siglip2": EncoderSpec("siglip2", hidden=8, depth=2, heads=2, intermediate=12, image_size=8, patch=4),
    "dinov3": EncoderSpec("dinov3", hidden=8, depth=2, heads=2, intermediate=12, image_size=8, patch=4, registers=3),
    "adapter": AdapterSpec("adapter", embedding=16, compress=3, rank=2, hidden=5, feed_forward=7, layers=2, refiners=1),
}
TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
PART = ": this is a part of it: give the whole published file, or all of its shards in one folder"
PUBLISHED_HASHES = {
    "siglip2": "469c78b61e3e31bc9eec0d0af3d3f2f8",
    "dinov3": "5722b5c873720009de96422993b15682",
    "adapter": "9510cb8cd1dd34ee0e4f111c24905510",
}


def save_miniature(
    path: Path,
    family: Family,
    *,
    dtype: str = "F32",
    changes: Mapping[str, torch.Tensor | None] | None = None,
    carried: str | None = None,
) -> Path:
    """A whole checkpoint by the safetensors library; ``changes`` replaces tensors, or removes those that are None."""
    spec = MINIATURES[family]
    tensors = {name: torch.ones(shape, dtype=TORCH_DTYPES[dtype]) for name, shape in tensor_shapes(spec).items()}
    changed = {**tensors, **(changes or {})}
    path.parent.mkdir(parents=True, exist_ok=True)
    marks = {SPEC_KEY: json.dumps(spec_to_dict(spec)) if carried is None else carried}
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, path, marks)
    return path


def save_sparse(path: Path, shapes: Shapes, dtype: str) -> Path:
    """A file with a real header and as many zeros as it asks for, which take no room on the disk."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    return path


def full_shapes(family: Family) -> dict[str, tuple[int, ...]]:
    return tensor_shapes(getattr(PRESETS["full"], family))


# --- recognised -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_published_file_under_any_name_in_any_folder(family: Family, dtype: str, tmp_path: Path) -> None:
    path = save_sparse(tmp_path / "downloads" / "von Oma" / "model (1).safetensors", full_shapes(family), dtype)
    found = find_checkpoints(tmp_path, [family])[family]
    assert (found.path, found.spec, found.dtype) == (path, getattr(PRESETS["full"], family), dtype)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_that_carries_its_spec(family: Family, dtype: str, tmp_path: Path) -> None:
    path = save_miniature(tmp_path / "a" / "b" / "c" / "x.safetensors", family, dtype=dtype)
    found = find_checkpoints(tmp_path, [family])[family]
    assert (found.path, found.spec, found.dtype) == (path, MINIATURES[family], dtype)


def test_all_three_in_one_folder_beside_other_files(tmp_path: Path) -> None:
    for number, family in enumerate(FAMILIES):
        save_miniature(tmp_path / f"{number}.safetensors", family)
    save_file({"unet.weight": torch.ones(2)}, tmp_path / "-.safetensors")
    (tmp_path / "notes.txt").write_text("siglip2")
    (tmp_path / ".0.safetensors.17.part").write_text("half a download")
    save_miniature(tmp_path / ".hidden.safetensors", "dinov3")
    (tmp_path / "folder.safetensors").mkdir()
    found = find_checkpoints(tmp_path)
    assert {family: checkpoint.path.name for family, checkpoint in found.items()} == {
        family: f"{number}.safetensors" for number, family in enumerate(FAMILIES)
    }


def test_a_single_file_instead_of_a_folder(tmp_path: Path) -> None:
    path = save_miniature(tmp_path / "model", "dinov3")
    assert find_checkpoints(path, ["dinov3"])["dinov3"].path == path


def test_links_are_followed(tmp_path: Path) -> None:
    save_miniature(tmp_path / "elsewhere" / "blob", "siglip2")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "model.safetensors").symlink_to(tmp_path / "elsewhere" / "blob")
    (tmp_path / "linked").symlink_to(tmp_path / "models")
    assert find_checkpoints(tmp_path / "linked", ["siglip2"])["siglip2"].spec == MINIATURES["siglip2"]


def test_one_file_under_several_names_is_one_checkpoint(tmp_path: Path) -> None:
    path = save_miniature(tmp_path / "a" / "model.safetensors", "siglip2")
    (tmp_path / "b.safetensors").symlink_to(path)
    (tmp_path / "c").symlink_to(path.parent)
    assert find_checkpoints(tmp_path, ["siglip2"])["siglip2"].spec == MINIATURES["siglip2"]


def test_links_that_go_round_in_circles(tmp_path: Path) -> None:
    save_miniature(tmp_path / "a" / "model.safetensors", "siglip2")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    assert list(find_checkpoints(tmp_path, ["siglip2"])) == ["siglip2"]


def test_a_broken_file_beside_good_ones_does_no_harm(tmp_path: Path) -> None:
    save_miniature(tmp_path / "good.safetensors", "siglip2")
    (tmp_path / "broken.safetensors").write_bytes(b"half a download")
    assert find_checkpoints(tmp_path, ["siglip2"])["siglip2"].path.name == "good.safetensors"


def test_the_dtype_is_that_of_most_values(tmp_path: Path) -> None:
    # Norms in float32, matrices in bfloat16: most tensors here are F32, most values BF16.
    shapes = tensor_shapes(MINIATURES["dinov3"])
    norms = {name: torch.ones(shape) for name, shape in shapes.items() if len(shape) == 1}
    assert len(norms) > len(shapes) / 2
    path = save_miniature(tmp_path / "mixed.safetensors", "dinov3", dtype="BF16", changes=norms)
    assert recognise(path).dtype == "BF16"


# --- shape hash -------------------------------------------------------------------------------------------------


def test_the_shape_hash_of_a_small_example() -> None:
    words = b"a.weight,a.weight:2_3,b,b:4"
    assert shape_hash({"b": (4,), "a.weight": (2, 3)}) == hashlib.md5(words).hexdigest()


@given(st.permutations(list(tensor_shapes(MINIATURES["dinov3"]).items())))
@settings(deadline=None)
def test_the_shape_hash_does_not_depend_on_the_order(items: list[tuple[str, tuple[int, ...]]]) -> None:
    assert shape_hash(dict(items)) == shape_hash(tensor_shapes(MINIATURES["dinov3"]))


@given(st.sampled_from(sorted(tensor_shapes(MINIATURES["dinov3"]))), st.data())
@settings(deadline=None)
def test_the_shape_hash_changes_with_any_shape(name: str, data: st.DataObject) -> None:
    shapes = tensor_shapes(MINIATURES["dinov3"])
    axis = data.draw(st.integers(0, len(shapes[name]) - 1))
    shape = [size + (at == axis) for at, size in enumerate(shapes[name])]
    assert shape_hash({**shapes, name: tuple(shape)}) != shape_hash(shapes)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shape_hash_of_a_file(family: Family, tmp_path: Path) -> None:
    path = save_sparse(tmp_path / "model.safetensors", full_shapes(family), "BF16")
    assert recognise(path).shape_hash == PUBLISHED_HASHES[family]


# --- nearly right -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_near_miss_of_a_published_file_is_told_tensor_by_tensor(family: Family, tmp_path: Path) -> None:
    shapes = full_shapes(family)
    names = list(shapes)
    gone, other, misshapen = names[3], names[50], names[100]
    wanted = shapes.pop(gone)
    shapes["brand.new"] = wanted
    shapes |= {misshapen: (2, 3), other: (7, *shapes[other])}
    path = save_sparse(tmp_path / "model.safetensors", shapes, "BF16")
    with pytest.raises(CheckpointMismatch) as caught:
        recognise(path)
    message = str(caught.value)
    assert message.startswith(
        f"{format_path(path)} looks like {family}, but missing: {gone}; unexpected: brand.new; misshapen: "
    )
    for name in (misshapen, other):
        full = list(full_shapes(family)[name])
        assert f"{name} is {list(shapes[name])}, not {full}" in message
    assert message.count(" is [") == 2
    assert message.endswith(PART)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_near_miss_of_a_carried_spec_is_told_tensor_by_tensor(family: Family, tmp_path: Path) -> None:
    shapes = tensor_shapes(MINIATURES[family])
    gone, misshapen, counted = sorted(shapes)[:3]
    changes = {
        gone: None,
        misshapen: torch.ones(1, 1),
        "brand.new": torch.ones(1),
        counted: torch.ones(shapes[counted], dtype=torch.int32),
    }
    path = save_miniature(tmp_path / "model.safetensors", family, changes=changes)
    with pytest.raises(CheckpointMismatch) as caught:
        recognise(path)
    assert str(caught.value) == (
        f"{format_path(path)} looks like {family}, but missing: {gone}; unexpected: brand.new; "
        f"misshapen: {misshapen} is [1, 1], not {list(shapes[misshapen])}; "
        f"neither F32, F16 nor BF16: {counted} is I32{PART}"
    )


def test_a_misshapen_tensor_is_no_reason_for_another_download(tmp_path: Path) -> None:
    path = save_miniature(tmp_path / "model.safetensors", "dinov3", changes={"norm.weight": torch.ones(3)})
    with pytest.raises(CheckpointMismatch, match=r"norm\.weight is \[3\], not \[\d+\]: give the published file"):
        recognise(path)


@pytest.mark.parametrize(("dtype", "name"), [(torch.float64, "F64"), (torch.int8, "I8")])
def test_a_wrong_dtype_is_named(dtype: torch.dtype, name: str, tmp_path: Path) -> None:
    path = save_miniature(tmp_path / "model.safetensors", "dinov3", changes={"norm.weight": torch.ones(8).to(dtype)})
    with pytest.raises(CheckpointMismatch, match=f"neither F32, F16 nor BF16: norm.weight is {name}: give the"):
        recognise(path)


def test_a_near_miss_is_what_a_search_reports(tmp_path: Path) -> None:
    save_miniature(tmp_path / "model.safetensors", "dinov3", changes={"norm.weight": None})
    with pytest.raises(CheckpointMismatch, match=rf"missing: norm\.weight{PART}$"):
        find_checkpoints(tmp_path, ["dinov3"])


# A shard of a sharded download, a download of which half the blocks were lost, all but one block.
@pytest.mark.parametrize("share", [1 / 8, 1 / 2, 39 / 40])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_part_of_a_published_file_looks_like_it(family: Family, share: float, tmp_path: Path) -> None:
    shapes = full_shapes(family)
    part = dict(list(shapes.items())[: int(share * len(shapes))])
    path = save_sparse(tmp_path / "model.safetensors", part, "BF16")
    with pytest.raises(CheckpointMismatch, match=f"looks like {family}, but missing: ") as caught:
        recognise(path)
    lost = sorted(shapes.keys() - part.keys())
    assert f"{', '.join(lost[:8])} and {len(lost) - 8} more{PART}" in str(caught.value)


@pytest.mark.parametrize("prefix", ["model.", "vision_model.", "model.vision_model."])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_on_every_name_does_not_matter(family: Family, prefix: str, tmp_path: Path) -> None:
    shapes = {f"{prefix}{name}": shape for name, shape in full_shapes(family).items()}
    path = save_sparse(tmp_path / "model.safetensors", shapes | {"text_model.embeddings": (4, 4)}, "BF16")
    found = recognise(path)
    assert (found.spec.family, set(found.tensors)) == (family, set(full_shapes(family)))


@pytest.mark.parametrize(
    "shapes",
    [
        {"norm.weight": (4096,), "norm.bias": (4096,)},  # two tensors that DINOv3 has, too
        {f"model.{name}": shape for name, shape in list(full_shapes("dinov3").items())[:3]},
        # another size of the same architecture: every name is known, no shape is right
        tensor_shapes(EncoderSpec("dinov3", 1024, depth=24, heads=16, intermediate=4096, image_size=224, registers=4)),
    ],
    ids=["two tensors", "three prefixed tensors", "another size"],
)
def test_a_few_known_names_are_no_likeness(shapes: Shapes, tmp_path: Path) -> None:
    with pytest.raises(CheckpointForeign):
        recognise(save_sparse(tmp_path / "model.safetensors", shapes, "BF16"))


# --- a family that has no whole file ---------------------------------------------------------------------------


def half(path: Path) -> Path:
    """The file, cut in the middle of its data."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    return path


def test_damage_elsewhere_does_not_hide_what_is_missing(tmp_path: Path) -> None:
    save_miniature(tmp_path / "siglip2.safetensors", "siglip2")
    half(save_miniature(tmp_path / "a.safetensors", "siglip2"))
    save_miniature(tmp_path / "b.safetensors", "siglip2", changes={"head.probe": None})
    with pytest.raises(CheckpointMissing) as caught:
        find_checkpoints(tmp_path, ["siglip2", "dinov3"])
    assert str(caught.value).startswith("no checkpoint for dinov3 under ")


def test_the_damaged_file_of_the_missing_family_is_the_error(tmp_path: Path) -> None:
    save_miniature(tmp_path / "siglip2.safetensors", "siglip2")
    save_miniature(tmp_path / "a.safetensors", "siglip2", changes={"head.probe": None})
    half(save_miniature(tmp_path / "z.safetensors", "dinov3"))
    with pytest.raises(CheckpointUnreadable, match=r"^\S*z\.safetensors is not a whole safetensors file"):
        find_checkpoints(tmp_path, ["siglip2", "dinov3"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_published_file_that_ends_early_is_known(family: Family, tmp_path: Path) -> None:
    path = save_sparse(tmp_path / "model.safetensors", full_shapes(family), "BF16")
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(CheckpointUnreadable) as caught:
        find_checkpoints(tmp_path, [family])
    assert caught.value.family == family


def test_all_that_may_be_a_missing_family_is_named(tmp_path: Path) -> None:
    half(save_miniature(tmp_path / "a.safetensors", "siglip2"))
    save_miniature(tmp_path / "b.safetensors", "siglip2", changes={"head.probe": None})
    (tmp_path / "c.safetensors").write_text("<html>404: there is no such file</html>")
    save_miniature(tmp_path / "d.safetensors", "adapter")
    with pytest.raises(CheckpointMissing) as caught:
        find_checkpoints(tmp_path)
    message = str(caught.value)
    assert all(format_path(tmp_path / f"{name}.safetensors") in message for name in "abc")
    assert "missing: head.probe" in message
    assert "; no checkpoint for siglip2 and dinov3 under " in message


# --- damaged ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.5, 0.99])
def test_a_truncated_file(share: float, tmp_path: Path) -> None:
    path = save_miniature(tmp_path / "model.safetensors", "siglip2")
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckpointUnreadable, match=r"model.safetensors is not a whole safetensors file .* again$"):
        recognise(path)


def test_a_published_file_that_lacks_its_last_byte(tmp_path: Path) -> None:
    path = save_sparse(tmp_path / "model.safetensors", full_shapes("dinov3"), "BF16")
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(CheckpointUnreadable):
        find_checkpoints(tmp_path, ["dinov3"])


def test_no_safetensors_file_at_all(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("<html>404</html>")
    with pytest.raises(CheckpointUnreadable):
        recognise(path)


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(CheckpointUnreadable, match="No such file"):
        recognise(tmp_path / "model.safetensors")


CARRIED = spec_to_dict(MINIATURES["dinov3"])


@pytest.mark.parametrize(
    "carried",
    [
        "",
        "{",
        "[]",
        "5",
        "null",
        '"dinov3"',
        "{}",
        json.dumps({**CARRIED, "family": "clip"}),
        json.dumps({name: value for name, value in CARRIED.items() if name != "depth"}),
        json.dumps({**CARRIED, "colour": 1}),
        json.dumps({**CARRIED, "depth": "2"}),
        json.dumps({**CARRIED, "depth": 2.5}),
        json.dumps({**CARRIED, "depth": 10**9}),  # comparing with its tensors would never end
        json.dumps({**spec_to_dict(MINIATURES["adapter"]), "layers": 10**9}),
        json.dumps({**spec_to_dict(MINIATURES["adapter"]), "refiners": 10**9}),
        "[" * 10**5,
        json.dumps({**CARRIED, "patch": 0}),
        json.dumps({**CARRIED, "hidden": -8}),
        json.dumps({**CARRIED, "norm_eps": math.nan}),
    ],
)
def test_a_carried_spec_that_makes_no_sense(carried: str, tmp_path: Path) -> None:
    path = save_miniature(tmp_path / "model.safetensors", "dinov3", carried=carried)
    with pytest.raises(CheckpointUnreadable, match="the spec in its header is wrong"):
        recognise(path)


# --- other models, too many, none -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["weight"],
        ["model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.logit_scale"],
        [f"text_model.encoder.layers.{layer}.self_attn.q_proj.weight" for layer in range(12)],
    ],
)
def test_another_model_is_foreign(names: list[str], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({name: torch.ones(2) for name in names}, path, {"format": "pt"})
    with pytest.raises(CheckpointForeign, match=f"holds {len(names)} tensors of a model that i2l does not know"):
        recognise(path)


def test_two_of_a_family_are_both_named(tmp_path: Path) -> None:
    paths = [
        save_miniature(tmp_path / name / "model.safetensors", "dinov3", changes={"norm.bias": torch.full((8,), value)})
        for name, value in (("old", 1.0), ("new", 2.0))
    ]
    with pytest.raises(CheckpointAmbiguous) as caught:
        find_checkpoints(tmp_path, ["dinov3"])
    assert all(format_path(path) in str(caught.value) for path in paths)


def test_two_of_a_family_that_nobody_asked_for(tmp_path: Path) -> None:
    for name in ("old", "new"):
        save_miniature(tmp_path / name / "model.safetensors", "dinov3")
    save_miniature(tmp_path / "model.safetensors", "siglip2")
    assert list(find_checkpoints(tmp_path, ["siglip2"])) == ["siglip2"]


@pytest.mark.parametrize("error", [CheckpointMissing, CheckpointError, FileNotFoundError])
def test_an_empty_folder(error: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(error):
        find_checkpoints(tmp_path)


def test_another_model_does_not_stand_for_a_missing_one(tmp_path: Path) -> None:
    save_file({"unet.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointMissing):
        find_checkpoints(tmp_path)


def test_what_is_missing_and_the_next_command_are_named(tmp_path: Path) -> None:
    save_miniature(tmp_path / "model.safetensors", "dinov3")
    with pytest.raises(CheckpointMissing) as caught:
        find_checkpoints(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"no checkpoint for siglip2 and adapter under {format_path(tmp_path)}")
    assert "make-checkpoints" not in message  # there is a real one
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointMissing, match=f"make-checkpoints {format_path(tmp_path)} --preset tiny"):
        find_checkpoints(tmp_path)


# --- described --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "facts"),
    [
        (
            "siglip2",
            {
                "family": "siglip2",
                "hidden": 1536,
                "depth": 40,
                "heads": 16,
                "intermediate": 6144,
                "patch": 16,
                "image_size": 384,
                "registers": 0,
                "dtype": "F32",
                "shape_hash": PUBLISHED_HASHES["siglip2"],
                "tensors": 656,
                "nbytes": 4 * 1_163_659_776,
            },
        ),
        (
            "dinov3",
            {
                "family": "dinov3",
                "hidden": 4096,
                "depth": 40,
                "heads": 32,
                "intermediate": 8192,
                "patch": 16,
                "image_size": 224,
                "registers": 4,
                "dtype": "F32",
                "shape_hash": PUBLISHED_HASHES["dinov3"],
                "tensors": 687,
                "nbytes": 4 * 6_716_035_072,
            },
        ),
        (
            "adapter",
            {
                "family": "adapter",
                "hidden": 3840,
                "depth": None,
                "heads": None,
                "intermediate": None,
                "patch": None,
                "image_size": None,
                "registers": None,
                "embedding": 5632,
                "compress": 128,
                "rank": 4,
                "feed_forward": 10240,
                "layers": 30,
                "refiners": 2,
                "diffusion_model": "z-image",
                "dtype": "F32",
                "shape_hash": PUBLISHED_HASHES["adapter"],
                "tensors": 952,
                "nbytes": 4 * 1_613_234_176,
            },
        ),
    ],
)
def test_the_facts_of_a_published_file(family: Family, facts: dict[str, object], tmp_path: Path) -> None:
    path = save_sparse(tmp_path / "model.safetensors", full_shapes(family), "F32")
    assert json.loads(json.dumps(describe(recognise(path)))) == {"path": str(path), **facts}
