"""ComfyUI's web interface in a headless Chromium: workflows opened, queued and looked at as a user would."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comfy_server import RUN_TIMEOUT, Server
from PIL import Image

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Error, Page

TIMEOUT = 180_000  # ms, for a page on a slow machine
CHROMIUMS = ("chromium", "chromium-browser", "chromium-headless-shell", "google-chrome", "google-chrome-stable",
             "chrome")
OURS = re.compile("flux.?kit", re.IGNORECASE)
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.UseNewMenu": "Top", "Comfy.Graph.CanvasInfo": False,
            "Comfy.Graph.CanvasMenu": False, "Comfy.Minimap.Visible": False, "Comfy.Locale": "en",
            "Comfy.OnboardingCoachmarks.Seen": ["appMode"]}
NODES2 = "Comfy.VueNodes.Enabled"
WIDTH, HEIGHT = 1600, 1000  # of the window
MENU = 150  # pixels at each edge where menus may stand
MARGIN = 24  # round the graph in a picture of it
GAP = 10  # at least, between nodes
BADGE = 20  # above a title bar on the canvas

READY = "() => !!(window.app?.graph && window.LiteGraph?.registered_node_types?.FluxKitSave && app.extensionManager)"
# `afterConfigureGraph` is the interface's own word for: this workflow is open. It names the types it does not know.
WATCH = """() => {
    window.opened = [];
    app.registerExtension({name: 'tests.opened', afterConfigureGraph(missing) { window.opened.push(missing ?? []) }});
}"""
OPEN = """([name, text]) => {
    window.opened.length = 0;
    app.handleFile(new File([text], name, {type: 'application/json'}));
}"""
DRAWN = """async () => {
    await document.fonts.ready;
    app.graph.setDirtyCanvas(true, true);
    for (let frame = 0; frame < 3; frame++) await new Promise(requestAnimationFrame);
}"""
LOOK = """() => {
    const all = graph => graph.nodes.flatMap(node => [node, ...(node.subgraph ? all(node.subgraph) : [])]);
    const unknown = node => !LiteGraph.registered_node_types[node.type];
    const wrong = node => node.has_errors || app.lastNodeErrors?.[node.id];
    const told = node => `${node.id} ${node.type}`;
    return {
        missing: [...window.opened.flat().map(m => m.type ?? String(m)), ...all(app.graph).filter(unknown).map(told)],
        red: all(app.graph).filter(wrong).map(told),
        dialogs: [...document.querySelectorAll('[role=dialog], .p-dialog, [data-testid^=error-overlay]')]
            .filter(e => e.checkVisibility()).map(e => e.innerText),
    };
}"""
BOXES = """() => app.graph.nodes.map(node => [node.title, node.pos[0], node.pos[1] - LiteGraph.NODE_TITLE_HEIGHT,
    node.size[0], node.size[1] + LiteGraph.NODE_TITLE_HEIGHT])"""
# Text that its own box cuts off, in nodes made of HTML. Prompts and notes may scroll.
CUT = """() => [...document.querySelectorAll('[data-node-id] *')].filter(e => !e.closest('textarea, .ProseMirror'))
    .filter(e => getComputedStyle(e).overflowX == 'hidden' && e.innerText?.trim() && !e.querySelector('*')
        && e.scrollWidth > e.clientWidth + 1).map(e => e.innerText.trim())"""
LISTEN = """() => {
    const run = window.run = {ended: null, executed: {}};
    const on = (kind, act) => app.api.addEventListener(kind, event => window.run === run && act(event.detail));
    on('executed', told => run.executed[told.node] = told.output);
    for (const kind of ['execution_success', 'execution_error', 'execution_interrupted'])
        on(kind, told => run.ended = [kind, told.exception_message ?? '']);
}"""
PICTURE = """id => {
    app.graph.setDirtyCanvas(true, true);  // pictures are fetched when the node is drawn
    const shown = LiteGraph.vueNodesMode ? [...document.querySelectorAll(`[data-node-id="${id}"] img`)]
        : app.graph.getNodeById(id).imgs ?? [];
    return shown.length && shown.every(image => image.complete && image.naturalWidth) ? shown[0].src : null;
}"""
APP_MODE = "Comfy.ToggleLinear"
FIND_COMMAND = "id => app.extensionManager.command.commands.some(command => command.id === id)"
PLACE = """([x, y, scale, edge]) => {
    app.canvas.ds.scale = scale;
    app.canvas.ds.offset[0] = edge / scale - x;
    app.canvas.ds.offset[1] = edge / scale - y;
}"""


def chromium() -> str | None:
    """The browser that CHROMIUM_PATH names, else one on PATH."""
    return os.environ.get("CHROMIUM_PATH") or next(filter(None, map(shutil.which, CHROMIUMS)), None)


@dataclass(frozen=True)
class Seen:
    """`missing`: node types nobody knows. `red`: nodes marked as wrong. `dialogs`: texts of what stands in the way."""

    missing: list[str]
    red: list[str]
    dialogs: list[str]


@dataclass(frozen=True)
class Box:
    title: str
    left: float
    top: float
    width: float
    height: float

    def touches(self, other: Box) -> bool:
        """Whether less than GAP is between them."""
        return (self.left < other.left + other.width + GAP and other.left < self.left + self.width + GAP
                and self.top < other.top + other.height + GAP and other.top < self.top + self.height + GAP)


class Frontend:
    """One page of a server's interface, with nodes drawn on the canvas or (`nodes2`) made of HTML.

    `problems`: uncaught errors and what went to the console as an error, with everything there that names Flux Kit.
    Addresses outside the server are not reached; that they and the server's own optional files fail is no problem.
    """

    def __init__(self, browser: Browser, server: Server, *, nodes2: bool) -> None:
        self.server = server
        self.problems: list[str] = []
        self._started = False
        server.call("/settings", SETTINGS | {NODES2: nodes2})
        self.home = f"http://127.0.0.1:{server.port}/"
        self.page: Page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        self.page.set_default_timeout(TIMEOUT)
        self.page.route(lambda url: not url.startswith((self.home, "data:", "blob:")), lambda route: route.abort())
        self.page.on("console", self._on_console)
        self.page.on("pageerror", self._on_error)
        self.page.goto(self.home)
        self._wait(READY)
        self.page.wait_for_load_state("networkidle")
        self.page.evaluate(WATCH)
        self._started = True

    def _on_console(self, message: ConsoleMessage) -> None:
        text = f"{message.type}: {message.text} ({message.location['url']})"
        if message.text.startswith("Failed to load resource"):
            found = self.home in text and OURS.search(text)
        else:
            found = OURS.search(text) or (message.type == "error" and self._started)
        if found:
            self.problems.append(text)

    def _on_error(self, error: Error) -> None:
        """On its way up the interface of 0.3.64 throws an error of its own, with or without this pack."""
        text = f"{error.message} {error.stack}"
        if self._started or OURS.search(text):
            self.problems.append(text)

    def _wait(self, expression: str, argument: Any = None) -> Any:
        return self.page.wait_for_function(expression, arg=argument, timeout=TIMEOUT).json_value()

    @property
    def offers_nodes2(self) -> bool:
        """Whether users are offered nodes made of HTML; 0.3.64 hides its unfinished ones."""
        kind = self.page.evaluate("id => app.ui.settings.settingsLookup[id]?.type ?? 'hidden'", NODES2)
        return bool(kind != "hidden")

    @property
    def offers_app_mode(self) -> bool:
        return bool(self.page.evaluate(FIND_COMMAND, APP_MODE))

    def toggle_app_mode(self) -> None:
        """From the graph to App mode or back."""
        self.page.evaluate("id => app.extensionManager.command.execute(id)", APP_MODE)
        self.page.evaluate(DRAWN)

    def saved(self) -> dict[str, Any]:
        """The workflow as it would be saved now."""
        found: dict[str, Any] = json.loads(self.page.evaluate("() => JSON.stringify(app.graph.serialize())"))
        return found

    def open(self, name: str, workflow: dict[str, Any]) -> Seen:
        """Open a workflow as if its file had been dropped on the page."""
        self.page.evaluate(OPEN, [name, json.dumps(workflow)])
        self._wait("() => window.opened.length > 0")
        self.page.evaluate(DRAWN)
        return self.look()

    def look(self) -> Seen:
        return Seen(**self.page.evaluate(LOOK))

    def look_when(self, condition: str) -> Seen:
        """What is seen once `condition`, JavaScript about `seen`, holds."""
        self._wait(f"() => {{ const seen = ({LOOK})(); return {condition}; }}")
        return self.look()

    def prompt(self) -> dict[str, Any]:
        """What would be queued now."""
        found: dict[str, Any] = self.page.evaluate("async () => (await app.graphToPrompt()).output")
        return found

    def boxes(self) -> list[Box]:
        """The nodes with their title bars, as drawn now, in units of the graph."""
        return [Box(*row) for row in self.page.evaluate(BOXES)]

    def cut(self) -> list[str]:
        """Labels and values that are not shown whole; none are known of nodes on the canvas."""
        found: list[str] = self.page.evaluate(CUT)
        return found

    def run(self) -> dict[str, Any]:
        """Press the Run button and wait; outputs by node id, as they came to the page."""
        self.page.evaluate(LISTEN)
        self.page.locator("[data-testid=queue-button], button[aria-label=Run]").first.click()
        end, message = self.page.wait_for_function("() => window.run.ended", timeout=RUN_TIMEOUT * 1000).json_value()
        assert end == "execution_success", f"{end}: {message}"
        executed: dict[str, Any] = self.page.evaluate("() => window.run.executed")
        return executed

    def picture_in(self, node: int) -> Image.Image:
        """The picture that a node shows, once it has come."""
        address = self._wait(PICTURE, node)
        return Image.open(io.BytesIO(self.page.request.get(address).body()))

    def screenshot(self, path: Path, width: int = 1400) -> None:
        """The whole graph, `width` pixels wide, without the menus round it, as a PNG."""
        boxes = self.boxes()
        left, top = min(box.left for box in boxes), min(box.top for box in boxes) - BADGE
        right = max(box.left + box.width for box in boxes)
        bottom = max(box.top + box.height for box in boxes)
        scale = width / (right - left + 2 * MARGIN)
        height = round((bottom - top + 2 * MARGIN) * scale)
        self.page.set_viewport_size({"width": width + 2 * MENU, "height": height + 2 * MENU})
        self.page.evaluate(PLACE, [left - MARGIN, top - MARGIN, scale, MENU])
        self.page.evaluate(DRAWN)
        shot = self.page.screenshot(clip={"x": MENU, "y": MENU, "width": width, "height": height})
        Image.open(io.BytesIO(shot)).convert("RGB").save(path, optimize=True)
