"""Helpers of the tests of pages in a browser: counting pixels, waiting, contrast."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

DEADLINE = 60_000  # milliseconds: other work may have the cores
ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'{{ 7*7 }}"


def find_browser() -> str | None:
    debian = Path("/usr/bin/chromium")
    if debian.exists():
        return str(debian)
    names = ("google-chrome", "google-chrome-stable", "chromium", "chromium-browser")
    return next((found for name in names if (found := shutil.which(name))), None)


# A copy is read, because reading the page's own canvas makes Chromium warn on the console.
MEASURE = """([id, k]) => {
  const from = document.querySelector(`#${id} canvas`);
  const found = {inked: 0, faint: 0, coloured: 0, height: 0};
  if (!from) return found;
  const copy = Object.assign(document.createElement('canvas'), {width: from.width, height: from.height});
  const pen = copy.getContext('2d', {willReadFrequently: true});
  pen.drawImage(from, 0, 0);
  const d = pen.getImageData(0, 0, copy.width, copy.height).data;
  const hex = getComputedStyle(document.documentElement).getPropertyValue(`--c${k}`).trim();
  const [r, g, b] = [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16));
  let [top, bottom] = [Infinity, -Infinity];
  for (let i = 0; i < d.length; i += 4) {
    found.inked += d[i + 3] > 0;
    found.faint += d[i + 3] > 25 && d[i + 3] < 45;
    if (d[i] !== r || d[i + 1] !== g || d[i + 2] !== b || d[i + 3] !== 255) continue;
    found.coloured += 1;
    const y = Math.floor(i / 4 / copy.width);
    [top, bottom] = [Math.min(top, y), Math.max(bottom, y)];
  }
  found.height = Math.max(0, bottom - top);
  return found;
}"""


def measure(page: Any, chart: str, index: int = 0) -> SimpleNamespace:
    """Count the pixels of a chart: all, those of faint bands, and those in the colour of one method."""
    return SimpleNamespace(**page.evaluate(MEASURE, [chart, index]))


def count_ink(page: Any, chart: str) -> int:
    return measure(page, chart).inked


def count_coloured(page: Any, chart: str, index: int) -> int:
    return measure(page, chart, index).coloured


def wait_for(page: Any, expression: str) -> None:
    """Wait until an expression is true on the page.

    Playwright's own `wait_for_function` polls with `eval`, which the policy of the page forbids.
    """
    end = time.monotonic() + DEADLINE / 1000
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"still not true: {expression}"
        page.wait_for_timeout(20)


def parse_rgb(text: str) -> list[float]:
    if text.startswith("#"):
        return [int(text[i : i + 2], 16) for i in (1, 3, 5)]
    return [float(part) for part in re.findall(r"[\d.]+", text)[:3]]


def compute_contrast(one: str, other: str) -> float:
    """Compute the contrast ratio of WCAG 2."""

    def luminance(colour: str) -> float:
        parts = [c / 255 for c in parse_rgb(colour)]
        r, g, b = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)
