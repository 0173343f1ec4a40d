"""The page in Chromium: it draws, answers to mouse and keyboard, fits a phone, follows light and dark, asks nobody."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from findings_examples import HOSTILE, findings, hostile, picture, sound, text
from selenium import webdriver
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from arrow_quant_v2.report.page import page

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
DESKTOP, PHONE = 1280, 390
READABLE = 4.5  # contrast that WCAG asks of text
OURS = re.compile(r"(file|data|blob):|about:blank|chrome")
COLOURS = (
    ("--ink", "--paper"), ("--ink", "--raised"), ("--soft", "--paper"), ("--soft", "--raised"),
    ("--accent", "--raised"), ("--met", "--met-paper"), ("--missed", "--missed-paper"), ("--mark-ink", "--mark"),
    ("--missed", "--raised"), ("--ink", "--met-paper"), ("--ink", "--missed-paper"),
)  # fmt: skip


class Browser:
    """Chromium with one page at a time."""

    def __init__(self, driver: webdriver.Chrome, folder: Path) -> None:
        self.driver, self.folder = driver, folder

    def open(self, content: str, *, width: int = DESKTOP, scheme: str = "light") -> Browser:
        path = self.folder / "page.html"
        path.write_text(content, encoding="utf-8")
        return self.visit(path, width=width, scheme=scheme)

    def visit(self, path: Path, *, width: int = DESKTOP, scheme: str = "light") -> Browser:
        size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width == PHONE}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.prefer(scheme)
        self.driver.get(path.as_uri())
        WebDriverWait(self.driver, 60).until(lambda _: self.js("return 'drawn' in document.documentElement.dataset"))
        return self

    def prefer(self, scheme: str) -> None:
        wish = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", wish)

    def js(self, code: str, *given: object) -> Any:
        return self.driver.execute_script(code, *given)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def said(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def asked_for(self) -> list[str]:
        """Every address that was asked for since the last time."""
        events = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        return [one["params"]["request"]["url"] for one in events if one["method"] == "Network.requestWillBeSent"]

    def colour(self, name: str) -> tuple[int, int, int]:
        value = self.js("return getComputedStyle(document.documentElement).getPropertyValue(arguments[0])", name)
        red, green, blue = (int(value.strip()[place : place + 2], 16) for place in (1, 3, 5))
        return red, green, blue


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and chromedriver):
        missing = "no browser: apt-get install chromium chromium-driver"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    yield Browser(driver, tmp_path_factory.mktemp("pages"))
    driver.quit()


@pytest.fixture(scope="module")
def rich_page() -> str:
    return page({"a model": findings(40, samples=(text(), picture(), sound()))})


def contrast(one: tuple[int, int, int], other: tuple[int, int, int]) -> float:
    """As WCAG 2 defines it: (L1 + 0.05) / (L2 + 0.05) of the relative luminances."""

    def luminance(colour: tuple[int, int, int]) -> float:
        parts = [part / 255 for part in colour]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_every_chart_is_drawn_without_a_complaint_or_a_request(browser: Browser, rich_page: str) -> None:
    browser.asked_for(), browser.said()
    browser.open(rich_page)
    assert len(browser.all(".plot")) == 5
    assert browser.js("return [...document.querySelectorAll('.plot')].every((p) => p.querySelector('svg.main-svg'))")
    assert browser.js("return document.querySelectorAll('.plot .heatmaplayer image').length") == 1
    assert browser.said() == []
    asked = browser.asked_for()
    assert any(address.startswith("file:") for address in asked)
    assert [address for address in asked if not OURS.match(address)] == []


def test_a_chart_answers_to_the_mouse(browser: Browser, rich_page: str) -> None:
    browser.open(rich_page)
    heat = browser.js("return document.querySelector('.heatmaplayer').closest('.plot')")
    browser.js("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", heat)
    ActionChains(browser.driver).move_to_element(heat).perform()
    hovered = "return [...document.querySelectorAll('.hoverlayer text')].map((t) => t.textContent).join(' ')"
    WebDriverWait(browser.driver, 20).until(lambda _: "model.layers." in browser.js(hovered))
    assert re.search(r"model\.layers\.\d+\.mlp\.weight.*error 0\.0\d+", browser.js(hovered))


def test_a_chart_follows_light_and_dark_and_paper_is_white(browser: Browser, rich_page: str) -> None:
    browser.open(rich_page)
    ink = "return getComputedStyle(document.querySelector('.plot .xtick text')).fill"
    light = browser.js(ink)
    assert browser.js("return getComputedStyle(document.body).backgroundColor") == "rgb(247, 248, 250)"
    browser.prefer("dark")
    WebDriverWait(browser.driver, 20).until(lambda _: browser.js(ink) != light)
    assert browser.js("return getComputedStyle(document.body).backgroundColor") == "rgb(16, 22, 28)"
    browser.js("dispatchEvent(new Event('beforeprint'))")
    WebDriverWait(browser.driver, 20).until(lambda _: browser.js(ink) == light)
    browser.js("dispatchEvent(new Event('afterprint'))")
    WebDriverWait(browser.driver, 20).until(lambda _: browser.js(ink) != light)


def test_text_is_readable_in_light_and_dark(browser: Browser, rich_page: str) -> None:
    browser.open(rich_page)
    for scheme in ("light", "dark"):
        browser.prefer(scheme)
        found = {pair: contrast(*map(browser.colour, pair)) for pair in COLOURS}
        assert {pair: value for pair, value in found.items() if value < READABLE} == {}, scheme


@pytest.mark.parametrize("kind", ["one", "several", "hostile"])
def test_a_phone_shows_all_of_it_without_scrolling_sideways(browser: Browser, rich_page: str, kind: str) -> None:
    one = findings(8, samples=(text(), picture(), sound()))
    pages = {
        "one": lambda: rich_page,
        "several": lambda: page(dict.fromkeys(("int2", "int4", "int8"), one)),
        "hostile": lambda: page({HOSTILE * 3: hostile()}),
    }
    browser.open(pages[kind](), width=PHONE)
    browser.js("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert browser.js("return document.documentElement.scrollWidth") <= PHONE
    wide = (
        "return [...document.querySelectorAll('.plot, .tiles, .sample, .cards')].map((e) => e.getBoundingClientRect())"
    )
    assert all(box["left"] >= 0 and box["right"] <= PHONE for box in browser.js(wide))


def test_nothing_of_a_model_runs(browser: Browser) -> None:
    browser.open(page({HOSTILE: hostile(), "again": hostile()}))
    browser.js("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert len(browser.all("tbody tr")) > 4
    assert browser.js("return window.hacked") is None
    # and what escaping might miss, the policy refuses
    browser.js("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hacked = 1\">')")
    browser.js(
        "const s = document.createElement('script'); s.textContent = 'window.hacked = 1'; document.body.append(s)"
    )
    WebDriverWait(browser.driver, 20).until(lambda _: any("Content Security Policy" in line for line in browser.said()))
    assert browser.js("return window.hacked") is None


def test_thousands_of_layers_are_searched_and_sorted(browser: Browser) -> None:
    browser.open(page({"large": findings(3_000)}))
    (told,) = browser.all(".filters output")
    (search,) = browser.all(".filters input")
    assert told.text == "3001 of 3001 layers"
    search.send_keys("layers.299")
    assert told.text == "11 of 3001 layers"
    search.clear()
    Select(browser.all(".filters select")[0]).select_by_value("fallback")
    assert told.text == "750 of 3001 layers"
    heads = [button for button in browser.all(".layers thead button") if button.text.startswith("weight cosine")]
    for direction, first in (("descending", 0.99), ("ascending", 0.941)):
        heads[0].send_keys(Keys.ENTER)
        assert browser.js("return arguments[0].parentNode.getAttribute('aria-sort')", heads[0]) == direction
        top = "return document.querySelector('.layers tbody tr').cells[4].textContent"
        assert float(browser.js(top)) == pytest.approx(first)


def test_pictures_and_sounds_are_there_and_described(browser: Browser, rich_page: str) -> None:
    browser.open(rich_page)
    assert browser.js("return [...document.images].every((i) => i.naturalWidth > 0 && i.hasAttribute('alt'))")
    lengths = "return [...document.querySelectorAll('audio')].map((a) => a.duration)"
    WebDriverWait(browser.driver, 20).until(lambda _: browser.js(lengths) == [0.5, 0.5])
    assert len(browser.all("mark")) >= 4
    names = "return [...document.querySelectorAll('.plot')].map((p) => p.getAttribute('aria-label'))"
    assert all(len(name) > 30 for name in browser.js(names))


def test_headings_leave_no_level_out(browser: Browser, rich_page: str) -> None:
    browser.open(rich_page)
    levels = [
        int(tag[1]) for tag in browser.js("return [...document.querySelectorAll('h1,h2,h3,h4')].map((h) => h.tagName)")
    ]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_charts_of_several_models_are_drawn_when_their_part_is_opened(browser: Browser) -> None:
    one = findings(6)
    browser.open(page({"int2": one, "int4": replace(one, passed=False)}))
    assert len(browser.all("#beside .plot svg.main-svg")) >= 2
    assert browser.all("#model-1 .plot svg.main-svg") == []
    browser.all("#model-1 summary")[0].send_keys(Keys.ENTER)
    drawn = "return [...document.querySelectorAll('#model-1 .plot')].filter((p) => p.querySelector('svg')).length"
    WebDriverWait(browser.driver, 20).until(lambda _: browser.js(drawn) == 4)
    assert [line for line in browser.said() if "ERROR" in line or "SEVERE" in line] == []


def test_the_report_of_a_real_model_is_drawn(browser: Browser, quantized: Callable[..., Any]) -> None:
    browser.said()
    browser.visit(quantized("minilm", 4).path / "report.html")
    assert len(browser.all(".plot svg.main-svg")) >= 2
    assert len(browser.all(".layers tbody tr")) == 104
    assert browser.said() == []
