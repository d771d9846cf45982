"""A headless Chromium that opens pages from files. Without one, or without selenium, the tests that ask are skipped."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
HOW = "make browser-tools says how to get it"


def missing() -> str:
    """What of a browser is not here; "" where all is."""
    if importlib.util.find_spec("selenium") is None:
        return f"selenium is not installed: {HOW}"
    if not any(map(shutil.which, _BROWSERS)):
        return f"there is no Chromium: {HOW}"
    return "" if shutil.which("chromedriver") else f"there is no chromedriver: {HOW}"


@contextlib.contextmanager
def opened() -> Iterator[Any]:
    """selenium's driver of a browser of 1400 x 900 pixels, which is closed at the end."""
    if said := missing():
        pytest.skip(said)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = next(path for path in map(shutil.which, _BROWSERS) if path)
    for argument in ("--headless=new", "--disable-gpu", "--window-size=1400,900", "--no-first-run"):
        options.add_argument(argument)
    if os.getuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium's own does not work for root
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def show(driver: Any, path: Path) -> None:
    """Open a file and wait until its script is through."""
    from selenium.webdriver.support.ui import WebDriverWait

    driver.get(path.as_uri())
    WebDriverWait(driver, 30).until(lambda each: each.execute_script("return document.documentElement.dataset.ready"))
