"""The service over HTTP: what it answers, that it is what ``i2l run`` makes, and what it refuses."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from conftest import MakeEngines
from i2l.cli import main
from i2l.serve.http.guard import CONTENT_POLICY
from served import SLOW, Served, assert_problem, png

TOKEN = "0123456789abcdef0123"


@pytest.fixture(scope="module")
def directory(engines: MakeEngines) -> Path:
    return engines("tiny", "int8")


@pytest.fixture(scope="module")
def served(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(directory, tmp_path_factory.mktemp("served"), "--no-cache") as started:
        yield started


@pytest.fixture
def slow(directory: Path, tmp_path: Path) -> Iterator[Served]:
    options = ("--no-cache", "--max-requests", 3, "--pass-pictures", 1)
    with Served(directory, tmp_path, *options, code=SLOW) as started:
        yield started


def of_run(engines: Path, folder: Path, seeds: tuple[int, ...], name: str, *options: str) -> bytes:
    """What ``i2l run`` writes for these pictures."""
    folder.mkdir(exist_ok=True)
    pictures = []
    for seed in seeds:
        (folder / f"{seed}.png").write_bytes(png(seed))
        pictures.append(str(folder / f"{seed}.png"))
    output = folder / f"{name}.safetensors"
    arguments = ["run", *pictures, "--engines", str(engines), "--output", str(output), "--no-cache"]
    arguments += ["--threads", "1", *options]  # as the service: how sums are cut depends on it, and so the last bits
    assert CliRunner().invoke(main, arguments, catch_exceptions=False).exit_code == 0
    return output.read_bytes()


# --- what it makes -----------------------------------------------------------------------------------------------


def test_the_lora_is_that_of_run_to_the_bit(served: Served, directory: Path, tmp_path: Path) -> None:
    wish: dict[str, Any] = {
        "strength": "0.8",
        "rank": "4",
        "dtype": "fp16",
        "key_format": "diffsynth",
        "name": "zwei Bilder",
    }
    response = served.post(1, 2, weights=["0.7", "0.3"], **wish)
    assert response.status_code == 200, response.text
    assert "zwei%20Bilder.safetensors" in response.headers["content-disposition"]
    assert 'cache;desc="0 of 2"' in response.headers["server-timing"]
    options = ["--weight", "0.7", "--weight", "0.3", "--strength", "0.8", "--reduce-rank", "4"]
    options += ["--dtype", "fp16", "--key-format", "diffsynth"]
    assert response.content == of_run(directory, tmp_path, (1, 2), "zwei Bilder", *options)
    assert [path.name for path in served.jobs.iterdir()] == ["lock"]  # nothing of it stays


def test_requests_that_wait_together_share_passes_and_get_their_own(directory: Path, tmp_path: Path) -> None:
    with Served(directory, tmp_path, "--no-cache", "--window", 5, "--pass-pictures", 4) as served:
        with ThreadPoolExecutor(4) as pool:
            loras = list(pool.map(lambda seed: served.post(seed, name=f"{seed}").content, range(4)))
        metrics = served.metrics()
    assert metrics["i2l_pass_pictures_count"] == 1
    assert metrics["i2l_pass_pictures_sum"] == 4
    assert loras == [of_run(directory, tmp_path / "run", (seed,), f"{seed}") for seed in range(4)]


def test_a_job_is_followed_and_fetched(served: Served) -> None:
    begun = served.begin(3, name="three")
    stream = served.client.get(begun["links"]["events"])
    assert stream.headers["content-type"].startswith("text/event-stream")
    data = [line.removeprefix("data: ") for line in stream.text.splitlines() if line.startswith("data: ")]
    seen = [json.loads(each) for each in data]
    assert seen[-1]["state"] == "done"
    progress = [report["progress"] for report in seen]
    assert progress == sorted(progress)
    assert progress[-1] == 1
    report = served.job(begun["id"])
    assert report["lora"].keys() == {"rank", "tensors", "bytes"}
    assert report["from_cache"] == [False]
    assert {"siglip2", "dinov3", "adapter"} <= report["seconds"].keys()
    lora = served.client.get(report["links"]["lora"])
    assert lora.content == served.post(3, name="three").content
    assert len(lora.content) == report["lora"]["bytes"]
    plot = served.client.get(report["links"]["plot"])
    assert plot.content.startswith(b"\x89PNG")
    assert served.client.delete(begun["links"]["self"]).status_code == 200
    assert_problem(served.client.get(begun["links"]["self"]), 404, "no such job")


def test_known_pictures_come_from_the_cache(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("I2L_CACHE_DIR", str(tmp_path / "cache"))
    with Served(directory, tmp_path) as served:
        first, second = served.post(1), served.post(1, 2)
        assert first.status_code == second.status_code == 200
        assert 'cache;desc="0 of 1"' in first.headers["server-timing"]
        assert 'cache;desc="1 of 2"' in second.headers["server-timing"]
        assert served.metrics()["i2l_cache_hits_total"] == 1


# --- what nobody waits for ---------------------------------------------------------------------------------------


def test_cancelled_and_abandoned_work_is_dropped(slow: Served) -> None:
    """One runs and is cancelled, one waits and is cancelled, one's client hangs up: the next is served at once."""
    with slow.held():
        running, waiting = slow.begin(1), slow.begin(2)
        slow.wait(running["id"], ["running"])
        assert slow.client.delete(waiting["links"]["self"]).json()["state"] == "cancelled"
        assert slow.client.delete(running["links"]["self"]).json()["state"] == "cancelled"
        slow.abandon(3)
        slow.until(lambda: slow.outcomes().get("cancelled") == 3)
    assert_problem(slow.client.get(f"{waiting['links']['self']}/lora"), 409, "the job is cancelled")
    assert slow.post(4).status_code == 200
    assert slow.outcomes() == {"cancelled": 3, "done": 1}


def test_a_full_queue_says_when_to_come_back(slow: Served) -> None:
    with slow.held():
        begun = [slow.begin(seed) for seed in range(3)]
        refused = slow.post(9)
        assert_problem(refused, 429, "3 requests are here already", "try again in")
        assert int(refused.headers["retry-after"]) >= 1
        for job in begun:
            slow.client.delete(job["links"]["self"])
    assert slow.post(9).status_code == 200


def test_a_request_that_takes_too_long_is_told_so(directory: Path, tmp_path: Path) -> None:
    with Served(directory, tmp_path, "--no-cache", "--time-limit", 1, code=SLOW) as served, served.held():
        assert_problem(served.post(1), 504, "longer than 1 s", "--time-limit")


# --- what is refused ---------------------------------------------------------------------------------------------


def multipart(*parts: tuple[str, str | None, bytes]) -> dict[str, Any]:
    body = b""
    for name, filename, data in parts:
        file = "" if filename is None else f'; filename="{filename}"'
        body += f'--b\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + data + b"\r\n"
    return {"content": body + b"--b--\r\n", "headers": {"Content-Type": "multipart/form-data; boundary=b"}}


def bomb() -> bytes:
    """The header of a picture of 30,000 x 30,000 pixels."""
    data = bytearray(png())
    data[16:24] = (30_000).to_bytes(4, "big") * 2
    return bytes(data)


PHOTO = ("pictures", "a.png", png())
REFUSED: dict[str, tuple[dict[str, Any], int, tuple[str, ...]]] = {
    "no body": ({}, 415, ("the body is ''", "multipart/form-data")),
    "JSON": ({"json": {"pictures": []}}, 415, ("application/json",)),
    "no boundary": ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 422, ("boundary",)),
    "garbage": ({"content": b"x" * 999, "headers": multipart()["headers"]}, 422, ("no multipart form",)),
    "half a body": ({**multipart(PHOTO), "content": multipart(PHOTO)["content"][:-7]}, 422, ("ends before",)),
    "no picture": (multipart(("name", None, b"x")), 422, ("no picture",)),
    "a text as picture": (multipart(("pictures", None, b"x")), 422, ("is no file",)),
    "a file as name": (multipart(PHOTO, ("name", "x", b"x")), 422, ("is a file",)),
    "unknown field": (multipart(PHOTO, ("steps", None, b"9")), 422, ("no field 'steps'",)),
    "twice": (multipart(PHOTO, ("name", None, b"a"), ("name", None, b"b")), 422, ("name is there 2 times",)),
    "long field": (multipart(PHOTO, ("name", None, b"a" * 500)), 422, ("longer than 400 bytes",)),
    "no text": (multipart(PHOTO, ("name", None, b"\xff\xfe")), 422, ("not UTF-8",)),
    "a path as name": (multipart(PHOTO, ("name", None, b"../../etc/cron")), 422, ("name is", "no path")),
    "a hidden name": (multipart(PHOTO, ("name", None, b".bashrc")), 422, ("name is",)),
    "a line in a name": (multipart(PHOTO, ("name", None, b"a\r\nSet-Cookie: x")), 422, ("name is",)),
    "no number": (multipart(PHOTO, ("strength", None, b"strong")), 422, ("strength is 'strong'",)),
    "not finite": (multipart(PHOTO, ("strength", None, b"nan")), 422, ("strength is 'nan'",)),
    "rank 0": (multipart(PHOTO, ("rank", None, b"0")), 422, ("rank is '0'",)),
    "dtype": (multipart(PHOTO, ("dtype", None, b"int4")), 422, ("one of bf16, fp16, fp32",)),
    "two weights": (multipart(PHOTO, *[("weights", None, b"1")] * 2), 422, ("2 weights for 1 picture",)),
    "no image": (multipart(("pictures", "../a.txt", b"hi")), 422, ("picture 1 (../a.txt) cannot be read",)),
    "two bad": (multipart(*[("pictures", "x.png", b"hi")] * 2), 422, ("2 of 2 images", "picture 2 (x.png)")),
    "a bomb": (multipart(("pictures", "b.png", bomb())), 413, ("30000 x 30000", "at most 100,000,000")),
    "many": (multipart(*[PHOTO] * 17), 413, ("more than 16 pictures",)),
    "too many parts": (multipart(*[("weights", None, b"1")] * 60), 422, ("more than 48 parts",)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_a_problem_document(served: Served, name: str) -> None:
    request, status, fragments = REFUSED[name]
    assert_problem(served.client.post("/v1/loras", **request), status, *fragments)
    assert [path.name for path in served.jobs.iterdir()] == ["lock"]


def test_a_large_body_is_refused_before_it_is_sent_and_while(directory: Path, tmp_path: Path) -> None:
    def endless() -> Iterator[bytes]:
        yield multipart(PHOTO)["content"][:-7]
        for _ in range(400):
            yield bytes(10_000)

    with Served(directory, tmp_path, "--max-body", "1MiB") as served:
        headers = multipart()["headers"]
        assert_problem(served.client.post("/v1/loras", content=bytes(1_100_000), headers=headers), 413, "1.0 MiB")
        assert_problem(served.client.post("/v1/loras", content=endless(), headers=headers), 413, "1.0 MiB")
        assert served.post(1).status_code == 200


def test_http_is_explained_too(served: Served) -> None:
    assert_problem(served.client.get("/v2"), 404)
    assert_problem(served.client.get("/v1/loras"), 405)
    assert_problem(served.client.get("/v1/jobs/../../etc"), 404)
    for kind in ("jobs", "events"):
        assert_problem(served.client.get(f"/v1/{kind}/{'0' * 32}"), 404, "no such job")


def test_only_who_has_the_token_is_served(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    with Served(directory, tmp_path, "--token-file", tmp_path / "token") as served:
        for given in ("", "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}"):
            for method, address in (("POST", "/v1/loras"), ("GET", "/v1/jobs/0"), ("GET", "/metrics"), ("GET", "/x")):
                refused = served.client.request(method, address, headers={"Authorization": given})
                assert_problem(refused, 401, "Authorization: Bearer TOKEN")
                assert refused.headers["www-authenticate"] == "Bearer"
        for public in ("/", "/page.js", "/healthz", "/readyz", "/openapi.json"):
            assert served.client.get(public).status_code == 200
        assert served.post(1, headers={"Authorization": f"bearer {TOKEN}"}).status_code == 200
        assert served.metrics(TOKEN)["i2l_accepted_total"] == 1


def test_other_sites_cannot_use_a_browser_as_their_arm(served: Served) -> None:
    for headers in (
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Host": "evil.example"},
        {"Sec-Fetch-Site": "cross-site"},
    ):
        assert_problem(served.post(1, headers=headers), 403, next(iter(headers)))
    own = {"Origin": f"http://127.0.0.1:{served.port}", "Sec-Fetch-Site": "same-origin"}
    assert served.post(1, headers=own).status_code == 200
    assert served.client.get("/").headers["content-security-policy"] == CONTENT_POLICY


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (["--host", "0.0.0.0"], "--token-file FILE, or --insecure"),
        (["--host", "::"], "--token-file FILE, or --insecure"),
        (["--token-file", "no"], "no cannot be used as a token"),
        (["--engines", "no"], "no has no manifest.json"),
        (["--host", "203.0.113.1", "--insecure"], "cannot listen on 203.0.113.1"),
    ],
)
def test_it_does_not_start_where_it_should_not(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], fragment: str
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["serve", "--engines", str(directory), "--port", "0", "--jobs-dir", "jobs", *options]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 1
    assert fragment in result.stderr.splitlines()[-1]


def test_two_services_do_not_share_a_jobs_folder(served: Served, directory: Path) -> None:
    arguments = ["serve", "--engines", str(directory), "--port", "0", "--jobs-dir", str(served.jobs)]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 1
    assert "belongs to another service" in result.stderr


# --- what it says of itself --------------------------------------------------------------------------------------


def test_the_examples_of_openapi_work(served: Served) -> None:
    page = served.client.get("/openapi.json").json()
    post = page["paths"]["/v1/loras"]["post"]
    examples = post["requestBody"]["content"]["multipart/form-data"]["examples"]
    prefers = [each["value"] for each in post["parameters"][0]["examples"].values()]
    assert len(examples) == len(prefers) == 2
    properties = post["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]
    for example in examples.values():
        fields = {name: value for name, value in example["value"].items() if name != "pictures"}
        assert fields.keys() <= properties.keys()
        files = [("pictures", (name, png(seed))) for seed, name in enumerate(example["value"]["pictures"])]
        for prefer in prefers:
            made = served.client.post("/v1/loras", files=files, data=fields, headers={"Prefer": prefer})
            assert str(made.status_code) in post["responses"], made.text
            if prefer == "respond-async":
                report = served.wait(made.json()["id"])
    assert report["state"] == "done"
    schema, example = page["components"]["schemas"]["Job"], page["paths"]["/v1/jobs/{job_id}"]["get"]["responses"]
    shown = example["200"]["content"]["application/json"]["example"]
    for found in (report, shown):
        assert set(schema["required"]) <= found.keys() <= schema["properties"].keys()
    assert shown.keys() == report.keys()
    for address, methods in page["paths"].items():
        for method in methods:
            answer = served.client.request(method, address.replace("{job_id}", report["id"]))
            known = methods[method]["responses"].keys()
            assert str(answer.status_code) in known or answer.headers["content-type"] == "application/problem+json"


def test_metrics_count_what_happened(directory: Path, tmp_path: Path) -> None:
    with Served(directory, tmp_path, "--no-cache") as served:
        served.post(1)
        served.post(1, dtype="no")
        metrics = served.metrics()
    assert metrics['i2l_requests_total{outcome="done"}'] == metrics['i2l_requests_total{outcome="refused"}'] == 1
    assert metrics["i2l_accepted_total"] == metrics["i2l_pass_pictures_sum"] == 1
    assert metrics['i2l_stage_seconds_count{stage="dinov3"}'] == 1
    assert metrics["i2l_queue_depth"] == metrics["i2l_open_requests"] == metrics["i2l_cache_hits_total"] == 0
    assert metrics['i2l_ready{backend="cpu"}'] == 1
    assert metrics["process_resident_memory_bytes"] > 1e7


def test_twenty_followers_of_one_job_all_see_its_end(slow: Served) -> None:
    begun = slow.begin(5)
    ends: list[str] = []

    def follow() -> None:
        with httpx.Client(base_url=slow.client.base_url, timeout=60) as client:
            ends.append(client.get(begun["links"]["events"]).text.rsplit("event: ", 1)[1].split("\n")[0])

    threads = [threading.Thread(target=follow) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ends == ["end"] * 20
