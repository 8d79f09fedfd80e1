"""The workflows in ComfyUI's real web page: each opens, says what its API form says, and runs from there.

A screenshot of each, after its run, lies in the test's temporary folder; with `-s` its path is printed.
"""

import json
import os
import shutil
import time

import pytest

from tests.workflow_helpers import FILES, NAMES, SMALL, api_form, choices_of, editor_form, place_clip

STEPS = {"CoveDDIMInversion": {"steps": 2}}

# The page comes up with a workflow of its own; what is opened before that would be lost.
READY = "return !!window.app?.graph?.nodes.length && 'CoveLoadFrames' in LiteGraph.registered_node_types"

# As the template browser opens it.
OPEN = """
const [name, pack] = arguments;
const answer = await fetch(`/api/workflow_templates/${pack}/${name}.json`);
await app.loadGraphData(await answer.json(), true, true, name);
"""

LOOK = """
return JSON.stringify({
    prompt: (await app.graphToPrompt()).output,
    missing: app.graph.nodes.filter(node => !(node.type in LiteGraph.registered_node_types)).map(node => node.type),
    red: app.graph.nodes.filter(node => node.has_errors).map(node => String(node.id)),
    shown: [...document.querySelectorAll('.p-dialog, .p-toast-message-error')].map(element => element.innerText),
    titles: app.graph.nodes.map(node => node.title),
});
"""

SET = """
for (const node of app.graph.nodes)
    for (const [name, value] of Object.entries(arguments[0][node.type] ?? {}))
        node.widgets.find(widget => widget.name === name).value = value;
"""

RUN = """
window.ended = null;
for (const kind of ['execution_success', 'execution_error', 'execution_interrupted'])
    app.api.addEventListener(kind, event => window.ended = [kind, event.detail.prompt_id], {once: true});
await app.queuePrompt(0, 1);
"""

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


@pytest.mark.parametrize("name", NAMES)
def test_workflow_opens_and_runs_in_the_page(server, page, tmp_path, name):
    (pack,) = server._request("/workflow_templates")
    page.execute_script(OPEN, name, pack)
    seen, saved = json.loads(page.execute_script(LOOK)), api_form(name)
    assert not seen["missing"] and not seen["shown"]
    assert set(seen["red"]) <= {key for key, node in saved.items() if lacks_a_file(server, node)}
    assert seen["prompt"].keys() == saved.keys()
    for key, node in seen["prompt"].items():  # without what a page adds, such as the player of a clip
        node["inputs"] = {slot: value for slot, value in node["inputs"].items() if slot in saved[key]["inputs"]}
    assert seen["prompt"] == saved
    assert len(seen["titles"]) == len(editor_form(name)["nodes"])
    assert {"Note", "Source prompt"} <= set(seen["titles"])

    page.execute_script(SET, SMALL | STEPS)
    page.execute_script(RUN)
    until(lambda: page.execute_script(ENDED), "the workflow has run", 240)
    result, prompt_id = page.execute_script(ENDED)
    assert result == "execution_success", server.log_tail()
    assert server.wait(prompt_id, 30)
    until(lambda: page.execute_script(PICTURES) >= 2, "the source's preview and a result are shown")
    assert not json.loads(page.execute_script(LOOK))["shown"]
    screenshot = tmp_path / f"{name}.png"
    page.save_screenshot(str(screenshot))
    print(screenshot)
