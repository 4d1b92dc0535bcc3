"""The page of `oxe-mix report` in a real Chromium: it is seen, it moves, and it asks nobody for anything."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.wait import WebDriverWait

from tests.browser import LAPTOP, PHONE, Browser, browser
from tests.conftest import OXE_MIX, run
from tests.converting import convert, viola_episode, viola_folder
from tests.report_pages import Page, points_of, report

EVIL = "</script><img src=x onerror=\"document.title='taken'\">"
_FRAME = "return document.getElementById('view-frame').src"
_ARROW = "return document.getElementById('arrow').getAttribute('d')"
_SHOWN = "return [...document.querySelectorAll('[role=tabpanel]')].filter(p => !p.hidden).map(p => p.id)"
_BROKEN = (
    "return [...document.querySelectorAll('[role=tabpanel]:not([hidden]) img')]"
    ".filter(i => !i.complete || !i.naturalWidth).length"
)
_SIDES = ("left", "right")
_TOO_WIDE = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium")) as window:
        yield window


@pytest.fixture(scope="module")
def moving(bucket: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted folder whose robot goes another way at each step, told to do what no page must do."""
    folder = tmp_path_factory.mktemp("moving")
    moves = [[0.0, 0.5, -1.0, 1.0, 0.25, -0.5], [1.0, -1.0, 0.5], [0.3, 0.1]]
    payloads = [
        viola_episode([text] * len(own), gripper=1.0 if i else -1.0, moves=own)
        for i, (text, own) in enumerate(zip([EVIL, "open the drawer", "wait"], moves, strict=True))
    ]
    convert(viola_folder(folder / "data", bucket, payloads), folder / "llava")
    return folder / "llava"


@pytest.fixture(scope="module")
def page(moving: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "report.html"
    report(moving, file)
    return file


@pytest.fixture(autouse=True)
def _asks_for_nothing_and_says_nothing(chromium: Browser) -> Iterator[None]:
    """Of every test here: no request, and nothing on the console."""
    yield
    assert chromium.requests() == []
    assert chromium.complaints() == []


def _press(window: Browser, *keys: str) -> None:
    for key in keys:
        window.driver.switch_to.active_element.send_keys(key)


def _pick_longest(window: Browser, page: Path) -> list[list[float]]:
    """Show the episode of six steps in the viewer; returns its arrows."""
    episodes = Page(page.read_text()).episodes("viola")
    number = max(range(len(episodes)), key=lambda i: len(episodes[i]["steps"]))
    Select(window.driver.find_element(By.ID, "pick-episode")).select_by_index(number)
    window.driver.find_element(By.ID, "panel-viewer").click()
    arrows: list[list[float]] = episodes[number]["arrows"]
    return arrows


def test_its_parts_are_shown_by_click_by_key_and_by_address(chromium: Browser, page: Path) -> None:
    chromium.open(page)
    assert chromium.run(_SHOWN) == ["panel-overview"]
    chromium.driver.find_element(By.ID, "tab-0").click()
    assert chromium.run(_SHOWN) == ["panel-0"]
    assert chromium.run(_BROKEN) == 0
    assert chromium.run("return location.hash") == "#dataset/viola"
    _press(chromium, Keys.ARROW_UP)
    assert chromium.run(_SHOWN) == ["panel-viewer"]
    _press(chromium, Keys.HOME)
    assert chromium.run(_SHOWN) == ["panel-overview"]
    chromium.driver.find_element(By.LINK_TEXT, "viola").click()
    WebDriverWait(chromium.driver, 60).until(lambda _: chromium.run(_SHOWN) == ["panel-0"])
    chromium.open(page, "no-such-part%")
    assert chromium.run(_SHOWN) == ["panel-overview"]


def test_the_viewer_steps_and_its_arrow_is_the_action(chromium: Browser, page: Path) -> None:
    chromium.open(page, "episodes")
    moved = _pick_longest(chromium, page)
    every = np.concatenate([episode["arrows"] for episode in Page(page.read_text()).episodes("viola")])
    full = float(np.quantile(np.hypot(every[:, 0], every[:, 1]), 0.99))  # that is drawn 100 long
    seen = []
    for x, y, z in moved:
        path, look = (
            chromium.run(_ARROW),
            chromium.run("return document.getElementById('lift').className.baseVal"),
        )
        seen.append((chromium.run(_FRAME), path))
        if abs(x) > 0.05:
            _, tip, barb, *_ = points_of(path)
            # x of the robot is up on the dial, y is left; no arrow leaves the dial.
            scale = 100 / max(full, float(np.hypot(x, y)))
            assert tip == pytest.approx((-y * scale, -x * scale), abs=0.1)
            assert np.hypot(barb[0] - tip[0], barb[1] - tip[1]) <= 0.41 * np.hypot(*tip)
            assert look == ("up" if z > 0 else "down")
        _press(chromium, Keys.ARROW_RIGHT)
    assert len({path for _, path in seen}) == len({tuple(own) for own in moved})
    _press(chromium, Keys.HOME)
    assert (chromium.run(_FRAME), chromium.run(_ARROW)) == seen[0]
    chromium.driver.find_element(By.ID, "view-on").click()
    assert (chromium.run(_FRAME), chromium.run(_ARROW)) == seen[1]
    slider = chromium.driver.find_element(By.ID, "view-slider")
    slider.send_keys(Keys.END)
    assert (chromium.run(_FRAME), chromium.run(_ARROW)) == seen[-1]
    assert slider.get_attribute("aria-valuetext") == "step 5"


def test_the_fingers_are_apart_where_the_gripper_is_open(chromium: Browser, page: Path) -> None:
    chromium.open(page, "episodes")
    episodes, seen = Page(page.read_text()).episodes("viola"), set[int]()
    for number, episode in enumerate(episodes):
        Select(chromium.driver.find_element(By.ID, "pick-episode")).select_by_index(number)
        wide = episode["actions"][0][-1]
        fingers = [f"return document.getElementById('finger-{side}').getAttribute('d')" for side in _SIDES]
        places = [float(chromium.run(finger)[1:].split()[0]) for finger in fingers]
        assert places == pytest.approx([-5 - 33 * wide, 5 + 33 * wide], abs=0.01)
        said = chromium.driver.find_element(By.ID, "gripper-words").text
        assert said.startswith("gripper open, " if wide > 0.5 else "gripper closed, ")
        seen.add(round(wide))
    assert seen == {0, 1}


def test_a_step_without_a_frame_has_its_action_and_the_frame_before(
    chromium: Browser, moving: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train_llava.report.pictures._ALL_FRAMES", 3)
    report(moving, tmp_path / "r.html")
    chromium.open(tmp_path / "r.html", "episodes")
    moved, seen = _pick_longest(chromium, tmp_path / "r.html"), []
    assert len(moved) == 6
    for x, _, _ in moved:
        caption = chromium.driver.find_element(By.ID, "view-caption").text
        cells = chromium.driver.find_elements(By.CSS_SELECTOR, "#view-dims .now")
        assert float(cells[0].text) == pytest.approx(x, rel=0.01)
        seen.append(caption)
        _press(chromium, Keys.ARROW_RIGHT)
    assert seen[0] == "step 0 (1 of 6)"
    assert seen[1] == "step 1 (2 of 6); the frame is that of step 0"
    assert [caption.partition("; ")[2][-1:] for caption in seen] == ["", "0", "", "2", "2", ""]


def test_a_phone_chooses_its_part_from_a_list(chromium: Browser, page: Path) -> None:
    chromium.open(page, size=PHONE)
    parts = Select(chromium.driver.find_element(By.ID, "pick-part"))
    assert [option.text for option in parts.options] == ["Overview", "Episodes", "viola"]
    assert not chromium.driver.find_element(By.ID, "tab-0").is_displayed()
    parts.select_by_visible_text("viola")
    assert chromium.run(_SHOWN) == ["panel-0"]
    chromium.open(page, "episodes", PHONE)
    assert _part_shown(chromium) == "Episodes"
    chromium.open(page)
    assert not chromium.driver.find_element(By.ID, "pick-part").is_displayed()


def _part_shown(window: Browser) -> str:
    """The part that the list shows."""
    return Select(window.driver.find_element(By.ID, "pick-part")).first_selected_option.text


def test_the_frame_changes_from_step_to_step(chromium: Browser, llava: Path, tmp_path: Path) -> None:
    report(llava, tmp_path / "report.html")
    chromium.open(tmp_path / "report.html", "episodes")
    first = chromium.run(_FRAME)
    chromium.driver.find_element(By.ID, "view-on").click()
    assert chromium.run(_FRAME) != first
    assert chromium.run(_BROKEN) == 0
    chromium.screenshot("report-viewer-laptop")


def test_play_goes_to_the_end_and_stops(chromium: Browser, page: Path) -> None:
    chromium.open(page, "episodes")
    _pick_longest(chromium, page)
    _press(chromium, Keys.SPACE)
    button = chromium.driver.find_element(By.ID, "view-play")
    assert button.text == "Pause"
    WebDriverWait(chromium.driver, 60).until(lambda _: button.text == "Play")
    assert chromium.driver.find_element(By.ID, "view-caption").text == "step 5 (6 of 6)"


def test_a_contact_sheet_leads_to_its_episode(chromium: Browser, page: Path) -> None:
    chromium.open(page, "dataset/viola")
    second = chromium.driver.find_elements(By.CSS_SELECTOR, "[data-view]")[1]
    second.click()
    assert chromium.run(_SHOWN) == ["panel-viewer"]
    told = Page(page.read_text()).episodes("viola")[1]["instruction"]
    assert chromium.driver.find_element(By.ID, "view-told").text == f"“{told}”"


def test_what_an_instruction_says_is_never_done(chromium: Browser, page: Path) -> None:
    chromium.open(page, "dataset/viola")
    assert EVIL.lower() in chromium.run("return document.body.innerText").lower()
    chromium.open(page, "episodes")
    _pick_longest(chromium, page)
    assert EVIL in chromium.driver.find_element(By.ID, "view-told").text
    assert chromium.driver.title == "llava: oxe-mix report"


def test_the_pages_own_policy_lets_nothing_out_should_anything_get_in(chromium: Browser, page: Path) -> None:
    chromium.open(page)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(1)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/x"
        chromium.run(
            "document.body.insertAdjacentHTML('beforeend', `<img src='${arguments[0]}'"
            " onerror='document.title=1'>`); fetch(arguments[0]).catch(() => 0)",
            address,
        )
        with pytest.raises(TimeoutError):
            server.accept()
    said = chromium.complaints()
    for directive in ("img-src", "script-src", "connect-src"):
        assert any("violates" in line and directive in line for line in said), directive
    assert chromium.driver.title == "llava: oxe-mix report"
    assert set(chromium.requests()) <= {address}  # that were tried, and refused before they were sent


def test_26_datasets_are_one_page_that_fits_laptop_and_phone(
    chromium: Browser, bucket26: Path, tmp_path: Path
) -> None:
    data, llava = tmp_path / "data", tmp_path / "llava"
    run(OXE_MIX, "download", "--mix", "default.yaml", "--source", bucket26, "--out", data)
    convert(data, llava, "--val-fraction", "0.1")
    for folder in (data, llava):
        file = tmp_path / f"{folder.name}.html"
        assert len(report(folder, file).rows) == 26
        assert file.stat().st_size < 25_000_000
        for name, size in (("laptop", LAPTOP), ("phone", PHONE)):
            for part in ("overview", "episodes", "dataset/bridge_orig"):
                chromium.open(file, part, size)
                assert chromium.run(_TOO_WIDE) <= 0
                chromium.screenshot(f"report-{folder.name}-{part.split('/')[0]}-{name}")
        chromium.open(file, "overview", dark=True)
        chromium.screenshot(f"report-{folder.name}-overview-dark")
        assert len(chromium.driver.find_elements(By.CSS_SELECTOR, '[role="tab"]')) == 28
        head = chromium.driver.find_elements(By.CSS_SELECTOR, ".sort")[2]
        head.click()
        cells = chromium.driver.find_elements(By.CSS_SELECTOR, "table.all tbody tr td:nth-child(3)")
        values = [int(cell.text.replace(",", "")) for cell in cells]
        assert values == sorted(values)
