"""The page at / in a real browser: Debian's chromium, driven by playwright, which downloads nothing."""
# mypy: disable-error-code="arg-type"
# Playwright types what it takes more narrowly than a literal in a list is inferred.

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from conftest import MakeEngines
from served import Served, png

pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None and os.environ.get("I2L_TEST_PAGE") != "must":
    pytest.skip("needs a browser: apt-get install chromium", allow_module_level=True)

TOKEN = "0123456789abcdef0123"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert CHROMIUM, "make test-serve needs a browser: apt-get install chromium"
    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def served(engines: MakeEngines, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(engines("tiny", "int8"), tmp_path_factory.mktemp("page")) as started:
        yield started


@pytest.fixture
def page(browser: Browser, served: Served) -> Iterator[Page]:
    """The page; anything that it asks of another host, and any error in its console, fails the test."""
    context = browser.new_context(accept_downloads=True)
    opened = context.new_page()
    opened.set_default_timeout(30_000)
    wrong: list[str] = []
    own = f"http://127.0.0.1:{served.port}/"
    opened.on(
        "request", lambda request: None if request.url.startswith((own, f"blob:{own}")) else wrong.append(request.url)
    )
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("console", lambda message: wrong.append(message.text) if "Content Security" in message.text else None)
    opened.goto(own)
    yield opened
    context.close()
    assert wrong == []


def files(*seeds: int) -> list[dict[str, object]]:
    return [{"name": f"cat {seed}.png", "mimeType": "image/png", "buffer": png(seed, 200)} for seed in seeds]


def test_pictures_become_a_lora_with_its_heat_map(page: Page, tmp_path: Path) -> None:
    page.get_by_text("Ready: cpu").wait_for()
    page.set_input_files("#files", files(1, 2))
    page.get_by_label("Weight of cat 1.png").fill("0.7")
    page.get_by_label("Weight of cat 2.png").fill("0.3")
    assert page.get_by_label("Name").input_value() == "cat 1"
    page.get_by_role("button", name="Make the LoRA").click()
    page.locator("#plot").wait_for()
    assert "0 of 2 pictures came from the cache" in page.locator("#facts").inner_text()
    assert page.locator("#plot").evaluate("image => image.naturalWidth") > 400
    with page.expect_download() as waiting:
        page.get_by_role("link", name="Download cat 1.safetensors").click()
    waiting.value.save_as(tmp_path / waiting.value.suggested_filename)
    assert load_file(tmp_path / "cat 1.safetensors")
    page.get_by_role("button", name="Make the LoRA").click()
    page.get_by_text("2 of 2 pictures came from the cache").wait_for()
    assert page.locator("#pictures").get_by_text("came from the cache").count() == 2


def test_it_can_be_used_by_keyboard_alone(page: Page) -> None:
    """Everything is reached by Tab in the order of the page, and pressed by Enter."""
    page.set_input_files("#files", files(3, 4))
    page.locator("#files").focus()
    reached = []
    for _ in range(16):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.getAttribute('aria-label') || document.activeElement.id"))
        if reached[-1] == "make":
            break
    assert reached == [
        "Weight of cat 3.png", "Remove cat 3.png", "Weight of cat 4.png", "Remove cat 4.png",
        "name", "strength", "rank", "dtype", "key_format", "make",
    ]  # fmt: skip
    page.get_by_label("Remove cat 4.png").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Remove cat 3.png"
    assert "cat 4.png was removed; 1 picture is chosen." in page.locator("#said").inner_text()
    page.locator("#name").focus()
    page.keyboard.press("Enter")
    page.locator("#result").wait_for()
    assert page.evaluate("document.activeElement.id") == "result"


def test_a_screen_reader_is_told_what_is_what(page: Page) -> None:
    """Every control has a name, what changes is announced, and the page has a title, a language and headings."""
    page.set_input_files("#files", files(1))
    tree = page.locator("body").aria_snapshot()
    for part in (
        'heading "Pictures to a LoRA" [level=1]', 'heading "1. Pictures" [level=2]', "main", "status",
        'list "Chosen pictures"', 'spinbutton "Weight of cat 1.png"', 'button "Remove cat 1.png"', 'textbox "Name"',
        'spinbutton "Strength"', 'spinbutton "Rank, at most"', 'combobox "Values"', 'combobox "Keys"',
        'button "Make the LoRA"',
    ):  # fmt: skip
        assert part in tree, (part, tree)
    assert page.locator("#problem").get_attribute("role") == "alert"
    assert page.locator("html").get_attribute("lang") == "en"
    unnamed = "[...document.querySelectorAll('input, select, button')].filter(e => !e.labels?.length && !e.textContent)"
    assert page.evaluate(f"{unnamed}.length") == 0


def test_what_is_wrong_is_said_where_it_is_read(page: Page) -> None:
    page.get_by_role("button", name="Make the LoRA").click()
    assert page.locator("#problem").inner_text() == "Choose one picture or more first."
    page.set_input_files("#files", [{"name": "a.png", "mimeType": "image/png", "buffer": b"no picture"}])
    page.get_by_role("button", name="Make the LoRA").click()
    page.get_by_text("picture 1 (a.png) cannot be read as an image").wait_for()
    assert page.get_by_role("button", name="Make the LoRA").is_enabled()


def test_pictures_are_dropped_and_names_are_texts(page: Page) -> None:
    """A file whose name is HTML, dropped on the page, stays a text."""
    page.evaluate(
        """() => {
            const data = new DataTransfer();
            data.items.add(new File(["x"], "<img src=x onerror=alert(1)>.png", {type: "image/png"}));
            document.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));
        }"""
    )
    assert page.locator("#pictures .name").inner_text() == "<img src=x onerror=alert(1)>.png"
    assert page.locator("#pictures img").count() == 1


def contrast(page: Page, selector: str) -> float:
    """By WCAG 2, between an element's text and what is behind it."""
    return float(
        page.locator(selector).first.evaluate(
            """element => {
            const numbers = text => text.match(/[\\d.]+/g).map(Number);
            const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
                .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
                .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
            let behind = element;
            const clear = e => (numbers(getComputedStyle(e).backgroundColor)[3] ?? 1) === 0;
            while (behind && clear(behind)) behind = behind.parentElement;
            const pair = [light(numbers(getComputedStyle(element).color)),
                light(numbers(getComputedStyle(behind || document.body).backgroundColor))].sort((a, b) => b - a);
            return (pair[0] + 0.05) / (pair[1] + 0.05);
        }"""
        )
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out_in_light_and_dark(page: Page, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.get_by_role("button", name="Make the LoRA").click()
    for selector in ("h1", "#drop span", "#make", "#problem", "label", "#name"):
        assert contrast(page, selector) >= 4.5, selector
    red = int(re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[0])
    assert (red < 128) == (scheme == "dark")


def test_a_narrow_screen_scrolls_one_way_only(page: Page) -> None:
    page.set_viewport_size({"width": 320, "height": 640})
    page.set_input_files("#files", files(1, 2, 3))
    assert page.evaluate("document.documentElement.scrollWidth") <= 320


def test_the_token_is_asked_for(browser: Browser, engines: MakeEngines, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    with Served(engines("tiny", "int8"), tmp_path, "--token-file", tmp_path / "token") as served:
        opened = browser.new_page()
        opened.goto(f"http://127.0.0.1:{served.port}/")
        opened.set_input_files("#files", files(1))
        opened.get_by_role("button", name="Make the LoRA").click()
        opened.get_by_text("this service wants a token").wait_for()
        opened.get_by_label("Token").fill(TOKEN)
        opened.get_by_role("button", name="Make the LoRA").click()
        opened.locator("#plot").wait_for()
        opened.close()


def test_a_job_is_cancelled_from_the_page(browser: Browser, engines: MakeEngines, tmp_path: Path) -> None:
    from served import SLOW

    with Served(engines("tiny", "int8"), tmp_path, "--no-cache", code=SLOW) as served, served.held():
        opened = browser.new_page()
        opened.goto(f"http://127.0.0.1:{served.port}/")
        opened.set_input_files("#files", files(1))
        opened.get_by_role("button", name="Make the LoRA").click()
        opened.get_by_text("Making the LoRA").wait_for()
        opened.get_by_role("button", name="Cancel").click()
        opened.get_by_text("Cancelled.").wait_for()
        while not served.outcomes():
            opened.wait_for_timeout(50)
        assert served.outcomes() == {"cancelled": 1}
        opened.close()
