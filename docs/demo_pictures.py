"""Takes the pictures of docs/demo.md: docs/images/demo.png and docs/images/demo-phone.png.

    translution demo --no-open --port 8080 &
    python docs/demo_pictures.py [http://127.0.0.1:8080]

It needs playwright and a chromium of the system.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

IMAGES = Path(__file__).parent / "images"
SIZES = {"demo": (1280, 900), "demo-phone": (390, 844)}
SEVEN = (0.25, 0.2), (0.75, 0.2), (0.6, 0.45), (0.45, 0.8)  # points (x, y) of a line


def take(url: str) -> None:
    """Take both pictures of the page at an address."""
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, (width, height) in SIZES.items():
            page = browser.new_page(viewport={"width": width, "height": height})
            page.goto(url)
            expect(page.locator("[data-said]").first).to_be_visible()
            status = page.locator('[data-name="answers"]')
            if name == "demo":
                page.get_by_role("button", name="All positions").click()
                expect(status).to_contain_text("at all 441 positions", timeout=60_000)
            else:
                box = page.get_by_role("img", name="Square to draw").bounding_box()
                assert box is not None
                for i, (x, y) in enumerate(SEVEN):
                    page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
                    if i == 0:
                        page.mouse.down()
                page.mouse.up()
                expect(status).to_contain_text("drawn digit")
            page.screenshot(path=IMAGES / f"{name}.png", full_page=name == "demo")
        browser.close()


if __name__ == "__main__":
    take(sys.argv[1] if sys.argv[1:] else "http://127.0.0.1:8080")
