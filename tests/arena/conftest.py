"""A real browser for the tests of pages, because only a browser can say whether a page works."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from browsing import DEADLINE, find_browser, wait_for


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = find_browser()
    if path is None:
        pytest.skip("no Chromium or Chrome on this machine")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"],
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Open a page, and check at the end that it logged nothing and loaded nothing."""
    visits = []

    def _open(path: Path, **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        context.set_default_timeout(DEADLINE)
        page = context.new_page()
        seen = SimpleNamespace(context=context, url=path.as_uri(), requests=[], troubles=[])
        visits.append(seen)
        page.on("request", lambda request: seen.requests.append(request.url))
        page.on("websocket", lambda socket: seen.requests.append(socket.url))
        page.on("console", lambda message: seen.troubles.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: seen.troubles.append(str(error)))
        page.on("dialog", lambda dialog: (seen.troubles.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.goto(seen.url)
        wait_for(page, "document.documentElement.dataset.ready === 'true'")
        return page

    yield _open
    for seen in visits:
        seen.context.close()
        assert seen.troubles == []
        assert seen.requests == [seen.url]
