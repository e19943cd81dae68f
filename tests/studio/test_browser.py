"""The studio in a real browser: Debian's chromium, headless. Skipped where there is none, or no gradio.

Install what it needs with: pip install -e ".[test,test-studio]"; apt-get install chromium
"""

import json
import shutil
import socket
import urllib.request
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from sflow_jax.pictures.files import read_png_record
from sflow_jax.pipeline import StableFlow

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytest.importorskip("gradio", reason="the studio's extra is not installed")
api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium in PATH")
# Milliseconds: a first edit compiles.
PATIENCE = 120_000
# Hosts that anything in this process looked up while the studio ran.
ASKED = set()


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    """The studio on the embedded model, and its address."""
    folder = tmp_path_factory.mktemp("studio")
    with pytest.MonkeyPatch.context() as patch:
        find = socket.getaddrinfo
        patch.setattr(
            socket, "getaddrinfo", lambda host, *more, **how: (ASKED.add(host), find(host, *more, **how))[1]
        )
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "uploads"))
        from sflow_jax.studio.page import serve
        from sflow_jax.studio.studio import Studio

        shared = Studio(StableFlow.load("toyworld"), folder)
        page, address = serve(shared, host="127.0.0.1", port=None, share=False, open_browser=False)
        yield shared, address
        page.close()


@pytest.fixture(scope="module")
def browser():
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, studio):
    """The page, loaded; every request but to its own server, and every error of its scripts, fails the test."""
    page, elsewhere, errors = browser.new_page(viewport={"width": 1280, "height": 900}), [], []
    own = (studio[1].rstrip("/"), studio[1].rstrip("/").replace("http", "ws"), "data:", "blob:")
    page.on("request", lambda request: elsewhere.append(request.url) if not request.url.startswith(own) else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.set_default_timeout(PATIENCE)
    page.goto(studio[1])
    page.wait_for_selector("#paint")
    yield page
    assert elsewhere == [] and errors == []
    page.close()


def set_steps(page, steps: int) -> None:
    page.get_by_text("Method and numbers").click()
    page.fill("#steps textarea, #steps input", str(steps))


def edit(page) -> None:
    page.click("#paint")
    # The line of an edit before this one says so too.
    page.wait_for_function("!document.querySelector('#status').innerText.startsWith('done')")
    page.wait_for_function("document.querySelector('#status').innerText.startsWith('done')")


def results(studio) -> list[Path]:
    """Folders of what was painted, the newest last."""
    return sorted((studio[0].store.folder / "results").iterdir())


def bring(page, path: Path) -> None:
    with page.expect_file_chooser() as chooser:
        page.click("#open")
    chooser.value.set_files(path)


def open_result(page, path: Path) -> None:
    bring(page, path)
    page.wait_for_function("document.querySelector('#status').innerText.startsWith('opened')")


def test_edits_are_painted_reopened_and_gone_on_from(page, studio, tmp_path):
    set_steps(page, 3)
    page.click("#layers label:nth-of-type(2)")
    page.wait_for_selector("#layer-set label:has-text('chosen') input:checked")
    edit(page)
    assert "layers: 1" in page.inner_text("#status")
    assert page.locator("#gallery button img").count() == 2
    source, edited = (page.locator("#slider img").nth(i).get_attribute("src") for i in (0, 1))
    assert source.endswith("source.png") and edited.endswith("edit-1.png")
    page.click("#gallery button >> nth=0")
    page.wait_for_selector("#slider label:has-text('source:')")
    page.click("#gallery button >> nth=1")
    page.wait_for_selector("#slider label:has-text('hat')")
    with page.expect_download() as download:
        page.click("#picture")
    download.value.save_as(tmp_path / "edit-1.png")
    assert '"layers":[1]' in read_png_record(tmp_path / "edit-1.png").replace(" ", "")
    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(tmp_path / "all.zip")
    with zipfile.ZipFile(tmp_path / "all.zip") as archive:
        archive.extract("edit.json", tmp_path)
        assert archive.read("edit-1.png") == (tmp_path / "edit-1.png").read_bytes()
    page.click("#onward")
    page.wait_for_function("document.querySelector('#prompt textarea').value.includes('hat')")
    first = results(studio)[-1]
    edit(page)
    onward = json.loads((results(studio)[-1] / "edit.json").read_text())
    assert (onward["continue"], onward["pick"]) == (str(first / "edit.json"), 1)
    for name in ("edit-1.png", "edit.json"):
        page.reload()
        page.wait_for_selector("#paint")
        open_result(page, tmp_path / name)
        edit(page)
        assert (results(studio)[-1] / "edit-1.png").read_bytes() == (tmp_path / "edit-1.png").read_bytes()


def test_stop_ends_an_edit_and_mistakes_are_shown(page, tmp_path):
    set_steps(page, 100)
    page.click("#paint")
    page.wait_for_function("/editing|begins/.test(document.querySelector('#status').innerText)")
    page.click("#stop")
    page.wait_for_function("document.querySelector('#status').innerText.startsWith('stopped')")
    for place, text, said in (
        ("#steps textarea, #steps input", "101", "at most 100"),
        ("#steps textarea, #steps input", "many", "must be a whole number"),
        ("#edits textarea", "a hat\n" * 9, "at most 8 edits"),
        ("#edits textarea", "", "no edit yet"),
    ):
        before = page.input_value(place)
        page.fill(place, text)
        page.click("#paint")
        page.wait_for_selector(f"#status [role=alert]:has-text('{said}')")
        page.fill(place, before)
    (tmp_path / "notes.json").write_text("{}")
    bring(page, tmp_path / "notes.json")
    page.wait_for_selector("#status [role=alert]:has-text('record')")


def test_a_photo_is_brushed_on(page, studio, tmp_path):
    Image.new("RGB", (64, 64), "green").save(tmp_path / "photo.png")
    set_steps(page, 2)
    page.set_input_files("#photo input[type=file]", tmp_path / "photo.png")
    page.wait_for_selector("#photo img")
    page.get_by_text("Where it may change").click()
    page.click("#load-brush")
    page.wait_for_function("document.querySelector('#region label:last-of-type input').checked")
    canvas = page.locator("#brush canvas").first
    canvas.scroll_into_view_if_needed()
    page.wait_for_timeout(1500)
    box = canvas.bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] + 40, middle[1] + 5, steps=8)
    page.mouse.up()
    edit(page)
    folder = results(studio)[-1]
    share = sum(Image.open(folder / "region-1.png").convert("L").histogram()[128:]) / 64**2
    assert 0 < share < 0.7 and (folder / "mask.png").exists()


def test_learn_says_whether_an_edit_happened(page):
    page.get_by_role("tab", name="Learn").click()
    page.click("#learn")
    page.wait_for_selector("#outcome b")
    assert "dB to the right answer" in page.inner_text("#outcome")


def test_a_sweep_is_run_and_its_layers_are_looked_at(page):
    page.get_by_role("tab", name="Layers").click()
    page.fill("#sweep-prompts input", "1")
    page.click("#sweep")
    page.wait_for_selector("#chart svg")
    page.click("#layer label:nth-of-type(1)")
    page.wait_for_selector("#layer-pictures img")
    assert "without layer 0" in page.inner_text("#layer-pictures")
    page.click("#bypass label:nth-of-type(1)")
    page.click("#paint-without")
    page.wait_for_selector("#without img")


def test_a_phone_shows_all_of_it(page):
    """Nothing is wider than the page, and whatever is clicked lies on it, in every tab with pictures in it."""
    page.set_viewport_size({"width": 390, "height": 844})
    set_steps(page, 3)
    edit(page)
    page.get_by_text("Where it may change").click()
    page.click("#load-brush")
    page.wait_for_selector("#brush canvas")
    check_phone(page)
    page.get_by_role("tab", name="Learn").click()
    check_phone(page)
    page.get_by_role("tab", name="Layers").click()
    page.fill("#sweep-prompts input", "1")
    page.click("#sweep")  # finished by the test before
    page.wait_for_selector("#chart svg")
    page.click("#layer label:nth-of-type(1)")
    page.wait_for_selector("#layer-pictures img")
    check_phone(page)


def check_phone(page) -> None:
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for part in page.locator("button:visible, textarea:visible, label.selected:visible, img:visible").all():
        box = part.bounding_box()
        assert box is None or -1 <= box["x"] and box["x"] + box["width"] <= 391, part.evaluate("it => it.outerHTML")


def test_only_this_machine_is_served_and_nobody_is_told(studio):
    import gradio

    address = urllib.request.urlopen(studio[1])
    assert "default-src 'self'" in address.headers["Content-Security-Policy"]
    assert gradio.analytics.analytics_enabled() is False
    assert ASKED <= {"127.0.0.1", "localhost", "::1", "", None, socket.gethostname()}
    port = int(studio[1].rstrip("/").rsplit(":", 1)[1])
    others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    for host in others - {"127.0.0.1"}:
        with socket.socket() as one:
            assert one.connect_ex((host, port)) != 0
