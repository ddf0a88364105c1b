"""Headless Chromium, for the tests of the pages that a person looks at."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator:
    """Starts Chromium with an empty profile; skips where it is not there."""
    webdriver = pytest.importorskip("selenium.webdriver")
    places = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if not all(places):
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = places[0]
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "window-size=1200,900",
        f"user-data-dir={profile}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=places[1])
    driver = webdriver.Chrome(options=options, service=service)
    try:
        yield driver
    finally:
        driver.quit()


@contextlib.contextmanager
def phone(page) -> Iterator[None]:
    """Shows a page as a phone does, 390 pixels wide."""
    size = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        yield
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def find(page, selector: str) -> list:
    """The elements that a CSS selector finds."""
    return page.find_elements("css selector", selector)


def press(page, *names: str) -> None:
    """Presses keys, one after the other: ENTER, ARROW_LEFT."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    for name in names:
        ActionChains(page).send_keys(getattr(Keys, name)).perform()


def point_at(page, element) -> None:
    """Moves the mouse to an element."""
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(page).move_to_element(element).perform()


def wait(page, condition: str):
    """Waits until a script's expression is true."""
    from selenium.webdriver.support.ui import WebDriverWait

    script = f"return Boolean({condition})"
    return WebDriverWait(page, 5, 0.02).until(
        lambda page: page.execute_script(script)
    )
