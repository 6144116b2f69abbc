"""The system's Chromium, driven by Playwright, for tests of pages."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def chromium() -> Iterator[Any]:
    """A headless browser, closed at the end. Without one, the test is skipped."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("neither Chromium nor Chrome is installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        # The browser's sandbox doesn't run as root. The pages are our own.
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()
