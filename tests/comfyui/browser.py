"""What a person sees: the frontend in a headless Chromium, on the classic canvas and in Nodes 2.0.

The graph is asked through ``window.app``, which packs use too; buttons by their test ids and labels. Debian's Chromium
is driven, as playwright's own would have to be downloaded.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from comfyui.server import EXAMPLES, Json, Server, example, say

ORIGINAL_HEIGHT = 98
"""Of Apply in workflows that the original node saved."""
OURS = {"Z-Image i2L Apply", "Z-Image i2L Loader", "Z-Image i2L Load Picture", "Save Z-Image i2L LoRA"}
TEXT = "$$node-text-preview"


class Browser:
    """A page with ComfyUI's frontend."""

    def __init__(self, page: Any, server: Server, shots: Path) -> None:
        self.page, self.server, self._shots = page, server, shots

    def nodes_2(self, on: bool) -> None:
        """Choose between the classic canvas and Nodes 2.0."""
        self.page.evaluate("on => window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", on)

    def load(self, workflow: Json) -> None:
        self.page.evaluate("workflow => window.app.loadGraphData(workflow)", workflow)
        self.until(lambda: len(self.nodes()) == len(workflow["nodes"]))
        self.page.keyboard.press(".")  # fits the view
        self.page.wait_for_timeout(1500)

    def nodes(self) -> list[Json]:
        """Type, place, size, texts and pictures of every node of the graph."""
        nodes: list[Json] = self.page.evaluate(
            f"""() => window.app.graph.nodes.map(node => ({{
                type: node.type, known: node.constructor.nodeData !== undefined || node.type === "MarkdownNote",
                place: [...node.pos], size: [...node.size], progress: node.progress ?? null,
                text: (node.widgets ?? []).find(widget => widget.name === "{TEXT}")?.value ?? "",
                shown: (node.widgets ?? []).filter(widget => !widget.hidden).map(widget => widget.name),
                pictures: node.imgs?.length ?? 0}}))"""
        )
        return nodes

    def node(self, name: str) -> Json:
        return next(node for node in self.nodes() if node["type"] == f"ZImageI2L_{name}")

    def set(self, node: str, widget: str, value: object) -> None:
        self.page.evaluate(
            """([type, name, value]) => {
                const node = window.app.graph.nodes.find(node => node.type === type);
                node.widgets.find(widget => widget.name === name).value = value;
            }""",
            [f"ZImageI2L_{node}", widget, value],
        )

    def press_run(self) -> None:
        self.page.get_by_test_id("queue-button").click()

    def until(self, condition: Callable[[], object], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                self.shoot("failed")
                raise AssertionError(f"waited {seconds:g} s: {[n for n in self.nodes() if n['text']]}")
            self.page.wait_for_timeout(200)

    def shoot(self, name: str) -> None:
        """Keep a screenshot: small, as those of docs/ are in the repository."""
        self.page.screenshot(path=self._shots / f"{name}.jpg", type="jpeg", quality=70)

    def read(self) -> str:
        """The text of the whole page."""
        return str(self.page.evaluate("document.body.innerText"))


@contextmanager
def open_browser(server: Server, shots: Path) -> Iterator[Browser]:
    """Open the frontend; the tour for new users is off."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert chromium, "no Chromium: apt-get install chromium"
    server.post("/api/settings", {"Comfy.TutorialCompleted": True})
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 800})
        try:
            page.goto(server.url)
            page.wait_for_function("window.app?.graph && window.app.extensionManager", timeout=120_000)
            page.wait_for_timeout(3000)
            yield Browser(page, server, shots)
        finally:
            browser.close()


def check_browser(browser: Browser) -> None:
    """All of them, in an order that saves building engines."""
    for check in (check_search, check_looks, check_original, check_build, check_errors, check_cancel, check_help):
        check(browser)


def check_search(browser: Browser) -> None:
    for words in ("style lora", "image to lora"):
        browser.page.evaluate("window.app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
        browser.page.wait_for_timeout(700)
        browser.page.keyboard.type(words, delay=20)
        results = browser.page.get_by_test_id("result-item")
        results.first.wait_for()
        browser.page.wait_for_timeout(700)
        titles = [text.splitlines()[0] for text in results.all_inner_texts()]
        ours = [title[2:].strip() for title in titles if "i2L" in title]
        assert ours[0] == "Z-Image i2L Apply", titles
        assert set(ours) == OURS, titles
        assert titles.index(f"\N{ARTIST PALETTE} {ours[0]}") < 2, titles
        browser.shoot("search")
        browser.page.keyboard.press("Escape")
    say("browser: a search for 'image to lora' or 'style lora' finds all four nodes, Apply among the first two")


def check_looks(browser: Browser) -> None:
    for on in (False, True):
        browser.nodes_2(on)
        for name in EXAMPLES:
            browser.load(example(name))
            nodes = browser.nodes()
            assert all(node["known"] for node in nodes), [node["type"] for node in nodes if not node["known"]]
            assert not overlaps(nodes), (name, on, overlaps(nodes))
    browser.page.set_viewport_size({"width": 1900, "height": 900})
    browser.load(example(EXAMPLES[2]))  # Nodes 2.0 writes texts however small they are
    browser.page.get_by_test_id("error-overlay-dismiss").click()  # Z-Image is not installed here
    browser.shoot("positive_only")
    browser.page.set_viewport_size({"width": 1400, "height": 800})
    browser.nodes_2(False)
    say("browser: all examples open, on the classic canvas and in Nodes 2.0; no node is unknown or lies on another")


def check_original(browser: Browser) -> None:
    browser.load(original_workflow([1.0]))
    nodes = {node["type"]: node for node in browser.nodes()}
    assert nodes["ZImageI2L_Apply"]["size"][1] == ORIGINAL_HEIGHT, nodes["ZImageI2L_Apply"]
    assert nodes["ZImageI2L_Apply"]["shown"] == ["strength"], nodes["ZImageI2L_Apply"]
    assert not overlaps(list(nodes.values()))
    browser.press_run()
    browser.until(lambda: browser.node("Save")["pictures"])
    browser.load(original_workflow([1.0, True]))
    assert "use_cpu_for_vision" in browser.node("Apply")["shown"]  # nothing that was changed is hidden
    say(f"browser: a workflow saved by the original looks as it did (Apply {ORIGINAL_HEIGHT} high) and runs")


def check_build(browser: Browser) -> None:
    browser.load(example(EXAMPLES[0]))
    browser.set("Apply", "precision", "bf16")
    browser.press_run()
    texts: list[str] = []
    steps: set[float] = set()

    def ended() -> bool:
        node = browser.node("Apply")
        if node["text"] and node["text"] not in texts:
            texts.append(node["text"])
            if len(texts) == 3:
                browser.shoot("building")
        if node["text"].startswith("building") and node["progress"]:
            steps.add(node["progress"])
        return bool(browser.node("Save")["pictures"])

    browser.until(ended, 300)
    assert any(text.startswith("building engines, once: exporting ") for text in texts), texts
    assert len(steps) >= 4, steps
    assert texts[-1].startswith("rank 8 from 2 pictures ("), texts
    saved = browser.node("Save")["text"]
    assert saved.startswith("output/loras/z_image_style_lora"), saved
    assert "\nrank 8, " in saved, saved
    browser.page.wait_for_timeout(1000)
    browser.shoot("saved")
    say(f"browser: {len(texts)} texts on Apply while it built, the bar at {len(steps)} places; Save: {saved!r}")


def check_errors(browser: Browser) -> None:
    browser.set("PipelineLoader", "model_filename", "my_lora.safetensors")
    browser.press_run()
    browser.until(lambda: "is a LoRA, not Z-Image-i2L" in browser.node("PipelineLoader")["text"])
    browser.page.get_by_test_id("error-overlay-see-errors").click()
    browser.page.wait_for_timeout(1500)
    assert "is a LoRA, not Z-Image-i2L" in browser.read()
    browser.shoot("error")
    browser.set("PipelineLoader", "model_filename", "Z-Image-i2L.safetensors")
    say("browser: a wrong file is named on the Loader and in the list of errors")


def check_cancel(browser: Browser) -> None:
    browser.load(example(EXAMPLES[0]))
    browser.set("Apply", "precision", "fp8")
    browser.press_run()
    browser.until(lambda: browser.node("Apply")["text"].startswith("building"))
    browser.page.get_by_label("Cancel current run").click()
    browser.until(lambda: browser.node("Apply")["text"] == "interrupted")
    say("browser: the button that cancels stops a build, and Apply says 'interrupted'")


def check_help(browser: Browser) -> None:
    browser.page.evaluate(
        """() => window.app.canvas.selectNode(
            window.app.graph.nodes.find(node => node.type === "ZImageI2L_Apply"))"""
    )
    browser.page.wait_for_timeout(1500)
    browser.page.get_by_test_id("info-button").click()
    browser.until(lambda: "Dual Model CFG Guider does not do this" in browser.read(), 30)
    browser.shoot("help")
    say("browser: Node Info shows the help page")


def original_workflow(widgets: list[object]) -> Json:
    """Nodes as the original pack saved them: their places and sizes, two outputs, one to three widget values."""
    kinds: list[Json] = [
        {
            "type": "ZImageI2L_PipelineLoader",
            "pos": [0, 0],
            "size": [315, 58],
            "outputs": [{"name": "z_image_file_path", "type": "ZI2L_FILE", "links": [1]}],
            "widgets_values": ["Z-Image-i2L.safetensors"],
        },
        {
            "type": "LoadImage",
            "pos": [0, 120],
            "size": [315, 314],
            "outputs": [
                {"name": "IMAGE", "type": "IMAGE", "links": [2]},
                {"name": "MASK", "type": "MASK", "links": []},
            ],
            "widgets_values": ["example.png", "image"],
        },
        {
            "type": "ZImageI2L_Apply",
            "pos": [380, 0],
            "size": [315, ORIGINAL_HEIGHT],
            "inputs": [
                {"name": "z_image_file_path", "type": "ZI2L_FILE", "link": 1},
                {"name": "images", "type": "IMAGE", "link": 2},
                {"name": "model", "type": "MODEL", "shape": 7, "link": None},
            ],
            "outputs": [
                {"name": "patched_model", "type": "MODEL", "links": []},
                {"name": "lora_data", "type": "lora_weights", "links": [3]},
            ],
            "widgets_values": widgets,
        },
        {
            "type": "ZImageI2L_Save",
            "pos": [380, 149],
            "size": [315, 58],
            "inputs": [{"name": "lora_data", "type": "lora_weights", "link": 3}],
            "widgets_values": ["z_image_style_lora"],
        },
    ]
    rest = {"flags": {}, "mode": 0, "inputs": [], "outputs": [], "properties": {}}
    nodes = [{**rest, "id": number, "order": number, **kind} for number, kind in enumerate(kinds, 1)]
    links = [[1, 1, 0, 3, 0, "ZI2L_FILE"], [2, 2, 0, 3, 1, "IMAGE"], [3, 3, 1, 4, 0, "lora_weights"]]
    return {"last_node_id": 4, "last_link_id": 3, "nodes": nodes, "links": links, "groups": [], "version": 0.4}


def overlaps(nodes: list[Json]) -> list[tuple[str, str]]:
    """Pairs of nodes whose bodies lie on one another."""
    found = []
    for index, first in enumerate(nodes):
        for second in nodes[index + 1 :]:
            apart = any(
                first["place"][axis] + first["size"][axis] <= second["place"][axis]
                or second["place"][axis] + second["size"][axis] <= first["place"][axis]
                for axis in (0, 1)
            )
            if not apart:
                found.append((first["type"], second["type"]))
    return found
