"""What is decided without a server: who shares a pass, who waits, what a form's texts and a header mean."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from i2l.errors import AddressOpen, I2LError, JobsFolderForeign, JobUnknown, QueueFull, RequestInvalid, TokenWrong
from i2l.serve import errors as serve_errors
from i2l.serve.grouping import leading, retry_seconds, seconds_to_wait
from i2l.serve.http.guard import host_name, require_token
from i2l.serve.http.problems import STATUS, problem
from i2l.serve.jobbook import JobBook
from i2l.serve.settings import ServeLimits, Sharing, is_loopback, read_token, require_guarded
from i2l.serve.spool import RECORD, Record, Spool
from i2l.serve.uploads import upload
from i2l.serve.wishes import NOT_IN_NAMES, Wish, read_wish

SIZES = st.lists(st.integers(1, 16), min_size=1, max_size=30)


@given(SIZES, st.integers(1, 16))
def test_a_pass_is_full_but_never_overfull_and_nobody_is_overtaken(pictures: list[int], limit: int) -> None:
    count = leading(pictures, limit)
    assert 1 <= count <= len(pictures)
    assert count == 1 or sum(pictures[:count]) <= limit
    assert count == len(pictures) or sum(pictures[: count + 1]) > limit


@given(SIZES, st.floats(0, 100), st.floats(0, 10), st.integers(1, 16))
def test_nobody_waits_longer_than_the_window_nor_behind_a_full_pass(
    pictures: list[int], waited: float, window: float, limit: int
) -> None:
    pause = seconds_to_wait(pictures, waited, Sharing(window, limit))
    assert 0 <= pause <= max(0.0, window - waited)
    if sum(pictures) >= limit or window == 0:
        assert pause == 0
    assert seconds_to_wait([], waited, Sharing(window, limit)) == 0


@given(st.integers(0, 10_000), st.floats(0, 1000))
def test_when_to_come_back_is_soon_and_not_never(pictures: int, seconds: float) -> None:
    assert 1 <= retry_seconds(pictures, seconds) <= 600


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=100)


@given(NAMES, NAMES, NAMES)
def test_any_text_is_a_wish_or_an_error_that_names_the_field(name: str, strength: str, rank: str) -> None:
    try:
        wish = read_wish({"name": [name], "strength": [strength], "rank": [rank]}, 1)
    except RequestInvalid as error:
        assert str(error).startswith(("name is", "strength is", "rank is"))  # noqa: PT017
    else:
        assert wish.name == name
        assert not NOT_IN_NAMES & set(wish.name)
        assert wish.rank == int(rank)


@given(NAMES)
def test_a_name_stays_in_its_folder(name: str) -> None:
    folder = Path("/jobs/0")
    try:
        wish = read_wish({"name": [name]}, 1)
    except RequestInvalid:
        return
    assert (folder / f"{wish.name}.safetensors").resolve().parent == folder


@given(st.text(max_size=80))
def test_a_picture_stays_in_its_folder_whatever_it_is_called(name: str) -> None:
    folder = Path("/jobs/0")
    made = upload(folder, 1, name)
    assert made.path.resolve().parent == folder
    assert made.path.name.startswith("picture-1")
    assert len(made.path.name) < 20
    assert made.shown.isprintable()


def test_defaults_are_those_of_run() -> None:
    assert read_wish({}, 3) == Wish("lora", 1.0, None, None, "bf16", "comfyui")


@pytest.mark.parametrize(
    ("host", "inside"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("127.9.9.9", True), ("0.0.0.0", False), ("::", False),
     ("192.168.0.2", False), ("example.org", False), ("localhost.example.org", False), ("", False)],
)  # fmt: skip
def test_any_address_but_loopback_wants_a_token(host: str, inside: bool) -> None:
    assert is_loopback(host) == inside
    require_guarded(host, has_token=True, insecure=False)
    require_guarded(host, has_token=False, insecure=True)
    if not inside:
        with pytest.raises(AddressOpen, match="--token-file FILE, or --insecure"):
            require_guarded(host, has_token=False, insecure=False)


@pytest.mark.parametrize(
    ("host", "name"),
    [("localhost:8190", "localhost"), ("[::1]:8190", "::1"), ("127.0.0.1", "127.0.0.1"), ("", ""), ("[", ""),
     ("evil.example:80", "evil.example"), ("localhost@evil.example", "evil.example")],
)  # fmt: skip
def test_the_name_in_a_host_header(host: str, name: str) -> None:
    assert host_name(host) == name


@given(st.text(max_size=60))
def test_no_other_token_opens(given_text: str) -> None:
    require_token("Bearer 0123456789abcdef", "0123456789abcdef")
    with pytest.raises(TokenWrong):
        require_token(f"Bearer 0{given_text}", "0123456789abcdef")
    with pytest.raises(TokenWrong):
        require_token(given_text, "0123456789abcdef")


@pytest.mark.parametrize("text", ["", "short", "two words of sixteen letters", "ümlaut-ümlaut-ümlaut", "a\nb" * 9])
def test_a_poor_token_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "token").write_text(text)
    with pytest.raises(ValueError, match="16 or more letters"):
        read_token(tmp_path / "token")


def test_every_error_of_the_room_has_a_status_or_ends_the_command() -> None:
    """A new error without a status would be our own fault, 500, to a client."""
    ends_the_command = {"ServeError", "AddressOpen", "AddressTaken", "JobsFolderForeign", "JobsFolderTaken"}
    ends_the_command |= {"TokenUnusable"}
    classes = {
        name for name, kind in vars(serve_errors).items() if isinstance(kind, type) and issubclass(kind, I2LError)
    }
    known = {kind.__name__ for kind, _ in STATUS}
    assert classes - known - ends_the_command == {"I2LError", "InternalFailure"}


def test_a_problem_has_the_sentence_of_the_error() -> None:
    assert problem(QueueFull(3, 7)) == {
        "type": "urn:i2l:problem:queue-full",
        "title": "Queue full",
        "status": 429,
        "detail": "3 requests are here already: try again in 7 s",
    }


def test_what_an_earlier_service_left_is_said(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    a, b, c, d, e, never_accepted, damaged = (letter * 32 for letter in "abcdef0")
    for name, state in [(a, "accepted"), (b, "accepted"), (c, "failed"), (d, "done"), (e, "done")]:
        spool.make(name)
        spool.write(Record(name, "lora", state, 0.0, {"error": "why: so"} if state == "failed" else {}))
    spool.make(never_accepted)
    (tmp_path / damaged).mkdir()
    (tmp_path / damaged / RECORD).write_text("{")
    for name in (b, d):
        spool.lora(name, "lora").write_bytes(b"whole")
    (tmp_path / a / ".lora.safetensors.9.part").write_bytes(b"half")
    (tmp_path / a / "square-0.rgb").write_bytes(b"private")
    book = JobBook(spool, ServeLimits(), Sharing())
    states: dict[str, str] = {}
    for name in (a, b, c, d, e):
        try:
            states[name] = book.get(name).state
        except JobUnknown:
            states[name] = "unknown"
    assert states == {a: "lost", b: "done", c: "failed", d: "done", e: "unknown"}
    assert str(book.get(c).error) == "why: so"
    assert {path.name for path in tmp_path.iterdir()} == {a, b, c, d, "lock"}
    assert [path.name for path in (tmp_path / a).iterdir()] == [RECORD]
    assert json.loads((tmp_path / a / RECORD).read_text())["state"] == "lost"


def test_jobs_are_not_kept_among_other_files(tmp_path: Path) -> None:
    """Folders without a record of ours would be removed as jobs that were never accepted."""
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "photo.jpg").write_bytes(b"mine")
    before = tmp_path.stat().st_mode
    with pytest.raises(JobsFolderForeign, match="holiday, which is no job"):
        Spool(tmp_path)
    assert (tmp_path / "holiday" / "photo.jpg").read_bytes() == b"mine"
    assert (tmp_path.stat().st_mode, list(tmp_path.iterdir())) == (before, [tmp_path / "holiday"])


def test_a_job_whose_name_leads_out_is_forgotten(tmp_path: Path) -> None:
    (tmp_path / "mine.safetensors").write_bytes(b"mine")
    spool = Spool(tmp_path / "jobs")
    spool.make("a" * 32)
    spool.write(Record("a" * 32, "../../mine", "accepted", 0.0))
    assert list(spool.recover()) == []


def test_jobs_end_once_and_old_ones_are_forgotten(tmp_path: Path) -> None:
    ended: list[object] = []
    book = JobBook(Spool(tmp_path), ServeLimits(requests=2, keep_seconds=0.0), Sharing(), ended.append)
    first, second = book.begin(), book.begin()
    with pytest.raises(QueueFull):
        book.begin()
    book.accept(first)
    assert book.end(first, "done")
    assert not book.end(first, "failed")
    book.cancel(first)
    assert (first.state, ended) == ("done", [first])
    book.cancel(second)
    assert [path.name for path in (tmp_path / first.id).iterdir()] == [RECORD]
    book.expire()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
