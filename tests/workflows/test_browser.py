"""The workflows in ComfyUI's real web page: each opens, says what its API form says, and runs from there.

Workflow 1 is also made by hand, from the blueprint in the node library.

A screenshot of each, after its run, lies in the test's temporary folder; with `-s` its path is printed.
"""

import json
import os
import shutil
import time

import pytest

from tests.workflows.helpers import (
    BLUEPRINT,
    FILES,
    NAMES,
    NO_BLUEPRINTS,
    ONE_NODE,
    SMALL,
    api_form,
    choices_of,
    editor_form,
    place_clip,
    served_blueprints,
    subgraphs_of,
    unpack,
)

STEPS = {"CoveDDIMInversion": {"steps": 2}}

# The page comes up with a workflow of its own; what is opened before that would be lost.
READY = "return !!window.app?.graph?.nodes.length && 'CoveLoadFrames' in LiteGraph.registered_node_types"

# As the template browser opens it.
OPEN = """
const [name, pack] = arguments;
const answer = await fetch(`/api/workflow_templates/${pack}/${name}.json`);
await app.loadGraphData(await answer.json(), true, true, name);
"""

EMPTY = """
const empty = {version: 0.4, last_node_id: 0, last_link_id: 0, nodes: [], links: [], groups: []};
await app.loadGraphData(empty, true, true, 'empty');
"""

# Nodes with the ids of the API form, and the node that shows their graph.
ALL = """
const all = app.graph.nodes.flatMap(outer => [
    {node: outer, id: String(outer.id)},
    ...(outer.subgraph?.nodes ?? []).map(node => ({node, outer, id: `${outer.id}:${node.id}`})),
]);
"""

LOOK = f"""
{ALL}
const known = ({{node}}) => node.subgraph || node.type in LiteGraph.registered_node_types;
return JSON.stringify({{
    prompt: (await app.graphToPrompt()).output,
    missing: all.filter(one => !known(one)).map(({{node}}) => node.type),
    red: all.filter(({{node}}) => node.has_errors).map(({{id}}) => id),
    shown: [...document.querySelectorAll('.p-dialog, .p-toast-message-error')].map(element => element.innerText),
    titles: all.map(({{node}}) => node.title),
}});
"""

# A value that the outer node shows is set there.
SET = f"""
{ALL}
for (const {{node, outer}} of all)
    for (const [name, value] of Object.entries(arguments[0][node.type] ?? {{}})) {{
        const link = outer?.subgraph.getLink(node.inputs.find(input => input.widget?.name === name)?.link);
        const [place, shown] = link ? [outer, outer.subgraph.inputs[link.origin_slot].name] : [node, name];
        place.widgets.find(widget => widget.name === shown).value = value;
    }}
"""

LISTEN = """
window.ended = null;
for (const kind of ['execution_success', 'execution_error', 'execution_interrupted'])
    app.api.addEventListener(kind, event => window.ended = [kind, event.detail.prompt_id], {once: true});
"""

RUN = f"{LISTEN} await app.queuePrompt(0, 1);"

ENDED = "return window.ended || document.querySelector('.p-dialog')?.innerText"

PICTURES = """
return [...document.querySelectorAll('video')].filter(video => video.videoWidth).length
    + app.graph.nodes.flatMap(node => node.imgs ?? []).filter(image => image.naturalWidth).length;
"""


@pytest.fixture(scope="module")
def page(server, tmp_path_factory):
    """The web page of the server in headless Chromium."""
    webdriver = pytest.importorskip("selenium.webdriver")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    chromium = os.environ.get("CHROMIUM_PATH") or next(filter(None, map(shutil.which, names)), None)
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip(f"no {'chromedriver' if chromium else 'Chromium'} on PATH (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"),
        *("disable-component-update", "disable-sync", "disable-dev-shm-usage", "window-size=1920,1080"),
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(f"--{flag}")
    place_clip(server.base)
    server._request("/settings", {"Comfy.TutorialCompleted": True})  # else the page greets with all templates
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        browser.set_script_timeout(300)
        browser.get(server.url)
        until(lambda: browser.execute_script(READY), "the page is ready")
        yield browser
    finally:
        browser.quit()


def until(condition, what: str, timeout: float = 60) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {timeout:g} s"
        time.sleep(0.2)


def lacks_a_file(server, node: dict) -> bool:
    """Whether a node names a file that is not there, which newer pages mark."""
    slots = server.object_info()[node["class_type"]]["input"]["required"]
    named = {slot: value for slot, value in node["inputs"].items() if slot in FILES}
    return any(value not in choices_of(slots[slot]) for slot, value in named.items())


def wait_for_success(server, page) -> dict:
    """Outputs of the prompt that the page queued last, by node id."""
    until(lambda: page.execute_script(ENDED), "the workflow has run", 240)
    result, prompt_id = page.execute_script(ENDED)
    assert result == "execution_success", server.log_tail()
    return server.wait(prompt_id, 30)


@pytest.mark.parametrize("name", NAMES)
def test_workflow_opens_and_runs_in_the_page(server, page, tmp_path, name):
    (pack,) = server._request("/workflow_templates")
    page.execute_script(OPEN, name, pack)
    seen, saved = json.loads(page.execute_script(LOOK)), api_form(name)
    assert not seen["missing"] and not seen["shown"]
    lacking = {key for key, node in saved.items() if lacks_a_file(server, node)}
    assert set(seen["red"]) <= lacking | {key.partition(":")[0] for key in lacking}
    assert seen["prompt"].keys() == saved.keys()
    for key, node in seen["prompt"].items():  # without what a page adds, such as the player of a clip
        node["inputs"] = {slot: value for slot, value in node["inputs"].items() if slot in saved[key]["inputs"]}
    assert seen["prompt"] == saved
    workflow = editor_form(name)
    assert len(seen["titles"]) == len(unpack(workflow)[0]) + len(subgraphs_of(workflow))
    assert "Source prompt" in seen["titles"] and ("Note" in seen["titles"]) == (name not in ONE_NODE)

    page.execute_script(SET, SMALL | STEPS)
    page.execute_script(RUN)
    assert wait_for_success(server, page)
    shown = 1 if name in ONE_NODE else 2  # the source's preview is inside the one node
    until(lambda: page.execute_script(PICTURES) >= shown, "the source's preview and a result are shown")
    assert not json.loads(page.execute_script(LOOK))["shown"]
    screenshot = tmp_path / f"{name}.png"
    page.save_screenshot(str(screenshot))
    print(screenshot)


# By hand

OUTPUT = """
const node = app.graph.nodes.find(node => node.subgraph), [x, y] = node.getOutputPos(0);
const {scale, offset} = app.canvas.ds, {left, top} = app.canvas.canvas.getBoundingClientRect();
return [(x + offset[0]) * scale + left, (y + offset[1]) * scale + top].map(Math.round);
"""


class Hand:
    """A mouse that counts its clicks, and a keyboard. A drag is one click."""

    def __init__(self, page):
        self.page, self.clicks = page, 0

    def _act(self):
        from selenium.webdriver import ActionChains

        return ActionChains(self.page)

    def move(self, x: int, y: int) -> None:
        actions = self._act()
        actions.w3c_actions.pointer_action.move_to_location(x, y)
        actions.perform()

    def click(self, css: str, text: str | None = None) -> None:
        """Click the element that is shown with this text in its first line."""
        until(lambda: find(self.page, css, text), f"{css} {text or ''} is shown")
        self._act().click(find(self.page, css, text)).perform()
        self.clicks += 1

    def click_at(self, x: int, y: int) -> None:
        self.move(x, y)
        self._act().click().perform()
        self.clicks += 1

    def drag(self, start: tuple[int, int], end: tuple[int, int], hold: str | None = None) -> None:
        self.move(*start)
        self._act().click_and_hold().perform()
        self.move(start[0] + 40, start[1])
        self.move(*end)
        if hold:
            self._act().key_down(hold).perform()
        self._act().release().perform()
        if hold:
            self._act().key_up(hold).perform()
        self.clicks += 1

    def type(self, *keys: str) -> None:
        for key in keys:
            self._act().send_keys(key).perform()
            time.sleep(1)  # search fields wait for the end of the word


def find(page, css: str, text: str | None = None):
    """The element that is shown with this text in its first line, or None."""
    for element in page.find_elements("css selector", css):
        if element.is_displayed() and text in (None, *element.text.splitlines()[:1]):
            return element
    return None


def drawing(prompt: dict) -> list[str]:
    """What a prompt computes, without its ids: class, settings and wires of each node. Where it saves is left out."""
    known = {node["class_type"]: node["inputs"] for node in api_form("1_edit_a_clip").values()}
    lines = []
    for node in prompt.values():
        inputs = {slot: value for slot, value in node["inputs"].items() if slot in known[node["class_type"]]}
        inputs |= {
            slot: [prompt[value[0]]["class_type"], value[1]]
            for slot, value in inputs.items()
            if isinstance(value, list)
        }
        inputs.pop("filename_prefix", None)
        lines.append(json.dumps([node["class_type"], inputs], sort_keys=True))
    return sorted(lines)


def test_workflow_1_is_made_from_the_blueprint_in_six_clicks(server, page):
    """Nodes, the blueprint, a drag from its output to Save Video, Run; values are set between, as a user would.

    0.3.75 and 0.10.0: Nodes; Subgraph Blueprints; Edit a Clip; drag; SaveVideo; Run.
    0.33.0, where placing a node takes a click: Nodes, type; Edit a Clip; canvas; drag with Shift, type; canvas; Run.
    """
    from selenium.webdriver.common.keys import Keys

    if served_blueprints(server) is None:
        pytest.skip(NO_BLUEPRINTS)
    page.execute_script(EMPTY)
    hand = Hand(page)
    hand.click(".node-library-tab-button")
    item, folder = "[role=treeitem]", "Subgraph Blueprints"
    until(lambda: find(page, item), "the node library is open")
    if by_folder := bool(find(page, item, folder)):
        hand.click(item, folder)
        hand.click(f"{item} {item}", BLUEPRINT)
    else:
        hand.type(BLUEPRINT)
        hand.click(item, BLUEPRINT)
        hand.click_at(900, 400)
    until(lambda: page.execute_script("return app.graph.nodes.length") == 1, "the blueprint is on the canvas")
    start = page.execute_script(OUTPUT)
    end = (start[0] + 60, start[1] - 150)
    if by_folder:
        hand.drag(start, end)
        hand.click(".litemenu-entry", "SaveVideo")
    else:
        hand.drag(start, end, hold=Keys.SHIFT)
        hand.type("Save Video", Keys.ENTER)
        hand.click_at(*end)
    until(lambda: page.execute_script("return app.graph.nodes.length") == 2, "Save Video is on the canvas")
    seen = json.loads(page.execute_script(LOOK))
    assert drawing(seen["prompt"]) == drawing(api_form("1_edit_a_clip"))

    page.execute_script(SET, SMALL | STEPS)
    page.execute_script(LISTEN)
    hand.click("button", "Run")
    outputs = wait_for_success(server, page)
    assert hand.clicks <= 6
    (saved,) = [output["images"][0] for output in outputs.values() if "images" in output and output.get("animated")]
    assert server.path_of(saved).is_file()
