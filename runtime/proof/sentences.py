"""Proofs in words: for the terminal, and as a text that says nothing of who ran it."""

import getpass
import os
import platform
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ...engines.base import CardFacts
from ...engines.directory.manifest import Manifest
from ...machine.outputs import Format, Found
from ...machine.threads import default_threads
from ...machine.wording import format_bytes, printable
from ...specs import EncoderSpec
from .judging import FormOutcome
from .records import Record

PATHS = re.compile(r"\S*[\\/]\S*")
"""What may be a path, or a part of one with blanks in it."""
CARD_WORD = re.compile(r"\w{1,8}/\w{1,8}")
HEAD = b"i2l proof report, "
"""How every report begins."""
RATES = re.compile(r"GB/s[,;)]?")


def _find_report(path: Path) -> Found | None:
    with path.open("rb") as file:
        return None if file.read(len(HEAD)) == HEAD else Found("there already, and no proof report of i2l")


REPORT = Format("a proof report", (".txt", ".md"), _find_report)


def verdict(record: Record) -> str:
    """One line: right or not, and how fast."""
    if record.best is None:
        return f"{'could not be proven' if record.refused else 'failed its proof'}: {printable(record.failure)}"
    form = f" ({record.best.form})" if record.best.form else ""
    cpu = "" if record.cpu_ms_per_image is None else f", the CPU {_ms(record.cpu_ms_per_image, record.cpu_estimated)}"
    alone = ", one picture at a time" if record.best.alone else ""
    return f"right{form}{alone}, {_ms(record.best.ms_per_image, record.best.estimated)} an image{cpu}"


def record_lines(record: Record) -> Iterator[str]:
    """A record for people: files of records are anybody's, so nothing in it does anything to a terminal."""
    return map(printable, _record_lines(record))


def _record_lines(record: Record) -> Iterator[str]:
    yield f"{record.subject.backend} on {card_text(record.subject.card)}: {verdict(record)}"
    for outcome in record.forms:
        if len(record.forms) > 1:
            yield f"  {outcome.form}: {outcome.failure or outcome.refusal or 'right'}"
        yield from (f"    {line}" for line in _form_lines(outcome))
    yield f"  proven at {record.made} in {record.seconds:.0f} s"


def report_text(records: Sequence[Record], manifest: Manifest) -> str:
    """All records as a text to pass on: card, driver, versions and figures; neither paths nor names of people."""
    sizes = (
        f"{family} {spec.hidden} x {spec.depth}"
        for family, model in manifest.models.items()
        if isinstance(spec := model.spec, EncoderSpec)
    )
    system = f"{platform.system()} {platform.machine()}"
    lines = [
        f"{HEAD.decode()}{system}, Python {platform.python_version()}, {default_threads()} cores for the CPU",
        f"engines: {manifest.precision}, {', '.join(sizes)}",
    ]
    for record in records:
        lines += ["", f"i2l {record.subject.version}", *record_lines(record)]
        libraries = ", ".join(f"{name} {version}" for name, version in record.subject.card.libraries.items())
        lines += [f"  libraries: {libraries or 'not told'}"]
    return anonymous("\n".join(lines), [record.subject.card.name for record in records]) + "\n"


def anonymous(text: str, cards: Iterable[str] = ()) -> str:
    """Without paths, and without the names of this user and this machine, whatever an error quoted.

    Args:
        text: a report.
        cards: names with a stroke in them that are no paths, such as Radeon RX 6700/6750 XT.
    """
    kept = {word for card in cards for word in card.split() if CARD_WORD.fullmatch(word)}
    text = text.replace(str(Path.home()), "~/")
    text = PATHS.sub(
        lambda found: found[0] if RATES.fullmatch(found[0]) or found[0].rstrip(",:") in kept else "PATH", text
    )
    for name in {getpass.getuser() if _has_user() else "", platform.node()} - {""}:
        text = re.sub(rf"\b{re.escape(name)}\b", "NAME", text)
    return text


def card_text(card: CardFacts) -> str:
    """A card with its driver."""
    driver = f", driver {card.driver}" if card.driver else ""
    return f"{card.name}{driver}{', a renderer in software' if card.software else ''}"


def _form_lines(outcome: FormOutcome) -> Iterator[str]:
    if outcome.errors:
        worst = max(outcome.errors, key=lambda graph: outcome.errors[graph])
        yield f"worst error {outcome.errors[worst]:.1e} ({worst}), tolerance {outcome.tolerance:.0e}"
    if outcome.peak_bytes is not None and outcome.budget_bytes is not None:
        peak, budget = format_bytes(outcome.peak_bytes), format_bytes(outcome.budget_bytes)
        yield f"{peak} of the card in use at most by i2l's count, budget {budget}; {_told(outcome)}"
    if outcome.upload_bytes_per_second and outcome.busy_upload_bytes_per_second:
        alone, busy = (x / 1e9 for x in (outcome.upload_bytes_per_second, outcome.busy_upload_bytes_per_second))
        yield f"uploads {alone:.3g} GB/s alone, {busy:.3g} GB/s while computing"
    if outcome.overlap is not None:
        yield f"{_overlap(outcome)}{_shares(outcome)}"
    if outcome.ms_per_image is not None:
        yield f"{_ms(outcome.ms_per_image, outcome.estimated)} an image"


def _overlap(outcome: FormOutcome) -> str:
    """How far the less busy lane was hidden."""
    less, more = ("computing", "copying") if outcome.mostly_copying else ("copying", "computing")
    return f"{100 * (outcome.overlap or 0):.0f} % of the {less} ran beside {more}"


def _shares(outcome: FormOutcome) -> str:
    """What of pinned memory's bandwidth was reached."""
    if outcome.unpinned:
        return "; no memory could be pinned to compare copies with"
    if not (outcome.pinned_bytes_per_second and outcome.copying_share and outcome.streaming_share):
        return ""
    copying, streaming = (100 * share for share in (outcome.copying_share, outcome.streaming_share))
    pinned = f"pinned memory's {outcome.pinned_bytes_per_second / 1e9:.3g} GB/s"
    return f"; copies run at {copying:.0f} % of {pinned}, streaming as a whole at {streaming:.0f} %"


def _told(outcome: FormOutcome) -> str:
    """What others counted."""
    if outcome.told_bytes is None:
        return "neither NVML nor the kernel tells more"
    return f"{format_bytes(outcome.told_bytes)} by {outcome.told_by}'s"


def _ms(ms: float | None, estimated: bool) -> str:
    return "no time" if ms is None else f"{'about ' if estimated else ''}{ms:.0f} ms"


def _has_user() -> bool:
    return bool({"LOGNAME", "USER", "LNAME", "USERNAME"} & os.environ.keys())
