"""What a second look found: files of facts beside engines, LoRAs and jobs that are pipes, huge, or of wrong values.

And what onnxruntime would send, and a report of a proof over a photograph.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from fuzzers import mutated_tree

from conftest import MakeEngines, MakeModels, picture
from i2l.cli import main
from i2l.engines.base import CardFacts
from i2l.engines.cuda.graph_files import GraphFacts
from i2l.engines.directory.integrity import CHECKED
from i2l.engines.directory.manifest import MANIFEST, PROOFS, read_manifest
from i2l.engines.directory.ownership import LOCK, require_own
from i2l.engines.directory.typed_facts import typed
from i2l.engines.tensorrt.plans import FACTS, PlanFacts, PlanKey, read_plans
from i2l.errors import FolderNotEngines, ManifestInvalid, OutputMisnamed, OutputTaken, TraceUnreadable
from i2l.export.checkpoints.finding import find_checkpoints
from i2l.look.inspection import inspect_path, text_lines
from i2l.look.trace_picture import draw_trace, models_of, read_trace
from i2l.machine import files
from i2l.machine.files import read_small
from i2l.machine.outputs import require_output
from i2l.runtime.pipeline import open_engines
from i2l.runtime.proof.judging import FormOutcome
from i2l.runtime.proof.records import Record, Records, Subject, records_to_json
from i2l.runtime.proof.sentences import REPORT, record_lines, report_text
from i2l.runtime.trace import Trace
from injectors import answered, doctored, i2l_process


@pytest.fixture
def own(engines: MakeEngines, tmp_path: Path) -> Path:
    return Path(shutil.copytree(engines("tiny", "int8"), tmp_path / "engines"))


def mutations(tree: Any, count: int) -> Iterator[Any]:
    generator = np.random.default_rng(0)
    for _ in range(count):
        other = json.loads(json.dumps(tree))
        mutated_tree(generator, other)
        yield other


# --- nothing is told to anybody ------------------------------------------------------------------------------------


def test_onnxruntime_tells_nobody(engines: MakeEngines, photo: Path, tmp_path: Path) -> None:
    """It opens its connections in C++, where a test that blocks Python's sockets does not look; its files show it."""
    home = tmp_path / "home"
    home.mkdir()
    kept = {name: value for name, value in os.environ.items() if name not in {"CI", "ORT_DISABLE_TELEMETRY"}}
    run = ("run", photo, "--engines", engines("tiny", "int8"), "--output", home / "x.safetensors", "--no-cache")
    with pytest.MonkeyPatch.context() as patch:
        for name in set(os.environ) - set(kept):
            patch.delenv(name)
        done = i2l_process(*run, env={"HOME": str(home)})
    assert done.returncode == 0, done.stderr
    assert [path.relative_to(home).as_posix() for path in home.rglob("*") if path.is_file()] == ["x.safetensors"]


# --- pipes and sparse files ----------------------------------------------------------------------------------------


def test_pipes_beside_engines_are_not_waited_for(own: Path) -> None:
    for name in (CHECKED, PROOFS, MANIFEST):
        (own / name).unlink(missing_ok=True) if name != MANIFEST else (own / name).rename(own / "aside")
        os.mkfifo(own / name)
        with answered():
            if name == MANIFEST:
                with pytest.raises(ManifestInvalid, match="a pipe"):
                    open_engines(own)
                (own / LOCK).unlink(missing_ok=True)
                with pytest.raises(FolderNotEngines):
                    require_own(own)
            else:
                open_engines(own).close()
                assert Records(own, read_manifest(own).build, own).read() == []


def test_what_a_killed_run_left_beside_engines_goes_with_the_next_note(own: Path) -> None:
    """Its number is beyond Linux's largest: it is dead."""
    left = own / f".i2l-{files._host()}-{2**22 + 7}-{'0' * 16}.part"
    left.touch()
    open_engines(own).close()  # a copy has other times, so that its check is noted
    assert not left.exists()


def test_a_file_of_facts_is_small(tmp_path: Path) -> None:
    path = tmp_path / MANIFEST
    path.write_text("{}")
    assert read_small(path) == b"{}"
    os.truncate(path, 3 << 30)
    with pytest.raises(ManifestInvalid, match="too large"):
        read_manifest(tmp_path)


def test_a_deep_index_beside_a_checkpoint_is_none(models: MakeModels, tmp_path: Path) -> None:
    own = Path(shutil.copytree(models("tiny"), tmp_path / "own"))
    for folder in (path for path in own.iterdir() if path.is_dir()):
        (folder / "model.safetensors.index.json").write_text('{"weight_map": ' + "[" * 100_000)
    assert len(find_checkpoints(own)) == 3


# --- values of other types -----------------------------------------------------------------------------------------

TEXTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "versions": lambda m: m.update(versions=["x"]),
    "a version": lambda m: m["versions"].update(torch=[1]),
    "precision_reason": lambda m: m.update(precision_reason=[1]),
    "created": lambda m: m.update(created=None),
    "blocks_per_chunk": lambda m: m.update(blocks_per_chunk="\x1b[2J"),
    "checkpoint": lambda m: m["models"]["dinov3"].update(checkpoint=None),
    "shape_hash": lambda m: m["models"]["adapter"]["checkpoint"].pop("shape_hash"),
}


@pytest.mark.parametrize("what", TEXTS)
def test_what_a_manifest_only_tells_is_of_its_type_too(own: Path, what: str) -> None:
    doctored(own, TEXTS[what])
    with pytest.raises(ManifestInvalid):
        list(text_lines(inspect_path(own)))


def record_of(build: str) -> Record:
    card = CardFacts("a card", "1.2", {"onnxruntime": "1.0"})
    right = FormOutcome(
        None, errors={"dinov3.block": 1e-5}, tolerance=1e-3, peak_bytes=7, ms_per_image=3.0, seconds=1.0
    )
    wrong = FormOutcome("other", failure="it crashed")
    return Record(Subject("webgpu", card, build, "0.1.0"), (right, wrong), 4.0, False, 9.0, "2026-01-01T00:00:00")


def test_a_doctored_record_is_as_good_as_none_or_can_be_told(own: Path) -> None:
    manifest = read_manifest(own)
    record = record_of(manifest.build)
    tree = json.loads(records_to_json([record]))
    records, outcomes = Records(own, manifest.build, own / "elsewhere"), {"read": 0, "none": 0}
    assert records.keep(record) == own / PROOFS
    assert records.of(record.subject) == record
    escaped = json.loads(json.dumps(tree).replace("it crashed", "\\u001b[2J"))
    for doctored_tree in (escaped, *mutations(tree, 300)):
        (own / PROOFS).write_text(json.dumps(doctored_tree))
        found = records.read()
        outcomes["read" if found else "none"] += 1
        for each in found:
            assert all(line.isprintable() for line in record_lines(each))
            report_text([each], manifest)
    assert min(outcomes.values()) > 20, outcomes


def test_facts_of_plans_and_graphs_are_of_their_types(tmp_path: Path) -> None:
    key = PlanKey("0" * 64, "1" * 64, "tensorrt", "10.1", 89, "fp8", (1, 1, 8))
    tree = {"dinov3.block": asdict(PlanFacts(key, "2" * 64, 10, 20))}
    for doctored_tree in mutations(tree, 100):
        (tmp_path / FACTS).write_text(json.dumps(doctored_tree))
        for facts in read_plans(tmp_path).values():
            assert facts.nbytes + facts.activation_bytes + facts.key.sm is not None
            assert facts.key.flavour + facts.key.version + facts.sha256
    with pytest.raises(ValueError, match="sha256"):
        typed(GraphFacts(2, "x", None))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seconds"):
        typed(FormOutcome(None, seconds=float("nan")))


def test_a_doctored_trace_is_refused_or_drawn(tmp_path: Path) -> None:
    trace = Trace()
    with trace.span("copy", "prefetch dinov3.block.0"), trace.span("compute", "run dinov3.block.0"):
        trace.count("memory", weights=7)
    trace.save(tmp_path / "trace.json")
    tree: Mapping[str, Any] = json.loads((tmp_path / "trace.json").read_text())
    drawn = refused = 0
    for doctored_tree in mutations(tree, 150):
        (tmp_path / "bad.json").write_text(json.dumps(doctored_tree))
        try:
            _, spans, _ = read_trace(tmp_path / "bad.json")
        except TraceUnreadable:
            refused += 1
            continue
        models_of(spans)
        drawn += 1
        if drawn % 20 == 0:
            draw_trace(tmp_path / "bad.json", tmp_path / "x.png")
    assert min(drawn, refused) > 20


# --- the one rule, for reports too ---------------------------------------------------------------------------------


def test_a_report_of_a_proof_replaces_reports_alone(own: Path, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    picture(40, 40).save(photo)
    before = photo.read_bytes()
    done = CliRunner().invoke(main, ["prove", "--engines", str(own), "--report", str(photo)])
    assert done.exit_code == 1
    assert "cannot be a proof report" in done.output
    assert photo.read_bytes() == before
    path = tmp_path / "report.txt"
    path.write_text(report_text([record_of("build-x")], read_manifest(own)))
    require_output(path, REPORT)
    path.write_text("a diary")
    with pytest.raises(OutputTaken):
        require_output(path, REPORT)
    with pytest.raises(OutputMisnamed):
        require_output(tmp_path / "report.jpg", REPORT)
