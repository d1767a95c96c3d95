"""The viewer in a real browser: one server and one Chromium for all tests."""

import io
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from callbacks.viewing.server import SceneServer
from datamodules.readers.gaussians import read_gaussians
from lightning_modules.functional.cameras import project_points
from tests.callbacks.viewing.shelf import CENTRES, COLOURS, PER_BALL, content, shelf

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")

CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-dev-shm-usage",
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
]
PATIENCE_MS = 20_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        own = driver.chromium.executable_path
        found = own if Path(own).is_file() else None
        for name in ("chromium", "chromium-browser", "google-chrome"):
            found = found or shutil.which(name)
        if found is None:
            pytest.skip("no Chromium: neither playwright's own (playwright install chromium) nor one on the path")
        chromium = driver.chromium.launch(executable_path=found, args=CHROMIUM_FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def server() -> Iterator[SceneServer]:
    server = SceneServer(content(), shelf(), port=0, max_pixels=30_000)
    yield server
    server.stop()


class Tab:
    """A page of the viewer, as a user sees and handles it."""

    def __init__(self, browser: Any, server: SceneServer) -> None:
        self.foreign: list[str] = []
        before = set(server._browsers)
        self.page = browser.new_page(viewport={"width": 900, "height": 600})
        self.page.route(
            lambda url: url.startswith("http") and not url.startswith(server.url),
            lambda route: (self.foreign.append(route.request.url), route.abort()),
        )
        self.page.goto(server.url)
        self.page.get_by_text("What is here").wait_for(timeout=PATIENCE_MS)
        self.until(lambda: len(set(server._browsers) - before) == 1)
        (self.key,) = set(server._browsers) - before
        self.session = server._browsers[self.key].session
        self.until(lambda: "×" in self.text())  # the first fine picture

    def text(self) -> str:
        return self.page.locator("body").inner_text()

    def field(self, label: str) -> Any:
        row = self.page.locator("label", has_text=re.compile(f"^{label}$")).locator("xpath=../../..")
        return row.locator("input:visible").first

    def folder(self, name: str) -> None:
        self.page.get_by_text(name, exact=True).click()

    def button(self, name: str) -> Any:
        return self.page.get_by_role("button", name=re.compile(f"^{name}"))

    def ask(self, prompt: str) -> None:
        self.field("Prompt").fill(prompt)

    def until(self, is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_MS / 1000
        while time.monotonic() < deadline:
            if is_so():
                return
            self.page.wait_for_timeout(50)  # sleeping would stop the page's events
        raise AssertionError(f"it did not come to pass; the page says:\n{self.text()}")

    def pixels(self) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(self.page.screenshot())).convert("RGB")).astype(float)

    def ball_pixels(self) -> list[tuple[int, int]]:
        """Where the balls are on the page, by the camera that the server has of this tab."""
        camera = self.session.camera()
        centres, _ = project_points(CENTRES, camera)
        canvas = self.page.locator("canvas").first.bounding_box()  # its own pixels become fewer where drawing is slow
        scale = torch.tensor([canvas["width"] / camera.width, canvas["height"] / camera.height])
        corner = torch.tensor([canvas["x"], canvas["y"]])
        return [tuple(at) for at in (centres * scale + corner).round().int().tolist()]

    def ball_colours(self) -> np.ndarray:
        image = self.pixels()
        return np.stack([np.median(image[y - 2 : y + 3, x - 2 : x + 3], axis=(0, 1)) for x, y in self.ball_pixels()])


@pytest.fixture(scope="module")
def tab(browser, server) -> Iterator[Tab]:
    tab = Tab(browser, server)
    yield tab
    tab.page.close()


def test_the_balls_are_where_the_camera_of_the_browser_has_them(tab):
    shown = 255 * COLOURS.numpy()

    def in_place() -> bool:
        return float(np.abs(tab.ball_colours() - shown).max()) < 40  # blended and as JPEG

    tab.until(in_place)
    assert tab.foreign == []  # nothing is fetched from elsewhere


def test_a_typed_text_changes_the_picture_and_names_the_level(tab):
    tab.ask("green ball")
    tab.until(lambda: "green ball at level fine" in tab.text())
    green, blue = 1, 2
    tab.until(lambda: tab.ball_colours()[green, green] < 120)  # it was 200, and turbo's upper end is dark red
    before = tab.ball_colours()[blue]
    tab.ask("toys")
    tab.until(lambda: "toys at level coarse" in tab.text())
    tab.until(lambda: float(np.abs(tab.ball_colours()[blue] - before).max()) > 60)


def test_an_unknown_text_is_told_and_the_next_one_is_answered(tab):
    tab.ask("zebra")
    tab.page.get_by_text("No answer to that prompt").first.wait_for(timeout=PATIENCE_MS)
    assert "no embedding of 'zebra'" in tab.text()
    tab.ask("red ball")
    tab.until(lambda: "red ball at level fine" in tab.text())


def test_no_text_is_told_when_it_is_sent(tab):
    tab.ask("")
    tab.field("Prompt").press("Enter")
    tab.page.get_by_text("The prompt is empty").first.wait_for(timeout=PATIENCE_MS)
    tab.until(lambda: tab.session.state.prompt is None)


def test_the_downloaded_selection_holds_the_gaussians_of_the_ball(tab, tmp_path):
    tab.ask("blue ball")
    tab.until(lambda: "blue ball at level fine" in tab.text())
    tab.folder("Take objects out")
    tab.button("Select by the prompt").click()
    tab.until(lambda: re.search(r"blue ball: \d+ Gaussians in \d+ part", tab.text()) is not None)
    with tab.page.expect_download(timeout=PATIENCE_MS) as download:
        tab.button("Download .ply").click()
    download.value.save_as(tmp_path / download.value.suggested_filename)
    read = read_gaussians(tmp_path / "blue_ball.ply")
    assert 1 <= read.num_gaussians <= PER_BALL
    assert (read.means - CENTRES[2]).norm(dim=1).max() < 1
    tab.folder("Take objects out")


def test_a_click_tells_what_is_there(tab):
    tab.folder("What is here")
    tab.page.mouse.click(*tab.ball_pixels()[2])
    tab.until(lambda: re.search(r"blue ball \d\.\d\d \(fine\)\nred ball", tab.text()) is not None)
    tab.folder("What is here")


def test_dragging_moves_the_camera_and_the_picture_follows_and_there_is_a_way_back(tab):
    before, picture = tab.ball_pixels(), tab.pixels()
    tab.page.mouse.move(300, 450)
    tab.page.mouse.down()
    tab.page.mouse.move(380, 430, steps=6)
    tab.page.mouse.up()
    tab.until(lambda: max(abs(a[0] - b[0]) for a, b in zip(tab.ball_pixels(), before, strict=True)) > 10)
    tab.until(lambda: float(np.abs(tab.pixels() - picture)[:, :500].mean()) > 0.5)
    tab.folder("Camera")
    tab.button("Back to this photograph").click()
    tab.until(lambda: max(abs(a[0] - b[0]) for a, b in zip(tab.ball_pixels(), before, strict=True)) <= 1)
    tab.folder("Camera")


def test_a_second_browser_has_its_own_prompt_and_may_go_away(tab, browser, server):
    tab.ask("red ball")
    other = Tab(browser, server)
    assert server.num_browsers == 2
    other.ask("toys")
    other.until(lambda: "toys at level coarse" in other.text())
    assert tab.session.state.prompt.texts == ("red ball",)
    other.page.mouse.move(300, 300)
    other.page.mouse.down()
    other.page.mouse.move(400, 300, steps=3)
    other.page.close()  # in the middle of a drag
    tab.until(lambda: server.num_browsers == 1)
    assert other.session.is_gone
    tab.ask("blue ball")
    tab.until(lambda: "blue ball at level fine" in tab.text())


def test_a_newer_scene_is_shown_without_being_asked_for(tab, server):
    server.show(shelf(), "step 12")
    tab.until(lambda: "step 12" in tab.text())
