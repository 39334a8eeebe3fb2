"""Open a page in Chromium and print, as JSON, what a reader would meet: python browse.py PAGE SCREENSHOTS.

A process of its own, as the tests' block on sockets would stop Playwright's event loop.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, sync_playwright

WIDTHS = (360, 1200)
LOOK = r"""
() => {
  // Any CSS colour as red, green, blue, alpha: drawn, so that the browser does the reading.
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = colour => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3])).concat([1]);
  const behind = element => {
    const layers = [];
    for (let one = element; one; one = one.parentElement) layers.push(rgba(getComputedStyle(one).backgroundColor));
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]);
  };
  const luminance = colour => {
    const linear = c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
    const [r, g, b] = colour.slice(0, 3).map(c => linear(c / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const contrast = (a, b) => {
    const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
    return (high + .05) / (low + .05);
  };
  let worst = {contrast: 21, text: ""}, texts = 0;
  for (const element of document.body.querySelectorAll("*")) {
    const own = [...element.childNodes].filter(n => n.nodeType === 3).map(n => n.data.trim()).join("");
    if (!own || !element.getClientRects().length) continue;
    const style = getComputedStyle(element), background = behind(element);
    const svg = element instanceof SVGElement;
    const found = contrast(over(rgba(svg ? style.fill : style.color), background), background);
    texts += 1;
    if (found < worst.contrast) worst = {contrast: found, text: own.slice(0, 60)};
  }
  const levels = [...document.querySelectorAll("h1, h2, h3, h4")].map(h => Number(h.tagName[1]));
  return {
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    sections: [...document.querySelectorAll("section")].filter(s => s.offsetHeight > 40).map(s => s.id),
    background: behind(document.body),
    texts, worst, levels,
    unscoped: [...document.querySelectorAll("th:not([scope])")].length,
    unnamed: [...document.querySelectorAll("svg")].filter(s => !s.closest("[aria-label]")).length,
    small: [...document.querySelectorAll("svg text")].filter(t => t.getBoundingClientRect().height < 11).length,
    outside: [...document.querySelectorAll("svg text, svg circle")].filter(
      t => t.getBoundingClientRect().right > document.documentElement.clientWidth || t.getBoundingClientRect().left < 0
    ).length,
  };
}
"""


def look(browser: Browser, page: Path, *, scheme: str, width: int, folder: Path) -> dict[str, Any]:
    """What the page is at one width in one colour scheme."""
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)  # type: ignore[arg-type]
    tab = context.new_page()
    complaints: list[str] = []
    requests: list[str] = []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(page.as_uri())
    screenshot = folder / f"{scheme}-{width}.png"
    tab.screenshot(path=screenshot, full_page=True)
    found = tab.evaluate(LOOK)
    context.close()
    told = {"complaints": complaints, "requests": requests, "screenshot": str(screenshot)}
    return {"scheme": scheme, "width": width, **told, **found}


def main(page: Path, folder: Path) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        looks = [
            look(browser, page, scheme=scheme, width=width, folder=folder)
            for scheme in ("light", "dark")
            for width in WIDTHS
        ]
        browser.close()
    print(json.dumps(looks))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]))
