"""A picture of the web page (apps/demo.py) in a browser, as wide as a window, or as a telephone.

    pip install -e ".[demo]" playwright && python -m lab.screenshots
    python -m lab.screenshots --tab Pages --width 390 --out shots

Reads:  a run, as apps/demo.py does (default: weights/toon)
Writes: OUT/mask.png, or that of another tab (default OUT: docs/page)
"""

import contextlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

from apps.demo import TABS
from common.train import Parser, UserError, between, cli

HEIGHT = 900  # of a window in pixels; a picture is as high as the page
WAIT = 60_000  # for an answer of the page, in milliseconds


def parse_args():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("run", nargs="?", default="weights/toon", help="as for apps.demo (default: weights/toon)")
    add("--tab", default="Mask", choices=TABS)
    add("--width", type=between(200, 4000, int), default=1280, metavar="PX", help="of the window")
    add("--out", type=Path, default=Path("docs/page"), metavar="DIR")
    return parser.parse_args()


def open_browser(play):
    """The system's chromium, or the one that playwright has downloaded."""
    try:
        path = shutil.which("chromium") or shutil.which("google-chrome")
        return play.chromium.launch(executable_path=path, args=["--no-sandbox"])
    except Exception:  # playwright's own kinds, of many lines
        raise UserError(
            "no browser starts: apt install chromium, or playwright install chromium"
        ) from None


@contextlib.contextmanager
def served(run):
    """The address of the page, while it is served."""
    words = [sys.executable, "-m", "apps.demo", run]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        try:
            address = re.search(r"http://\S+?:\d+", server.stdout.readline())
            if not address:
                raise UserError("the page did not start, for the reason above")
            yield address.group()
        finally:
            server.terminate()


def main():
    args = parse_args()
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise UserError("playwright is missing: pip install playwright") from None
    args.out.mkdir(parents=True, exist_ok=True)
    name = args.tab.split()[0].lower()
    with served(args.run) as address, sync_playwright() as play:
        page = open_browser(play).new_page(viewport={"width": args.width, "height": HEIGHT})
        page.goto(address)
        page.get_by_role("tab", name=args.tab).first.click()
        page.wait_for_selector(f"#{name} code", timeout=WAIT)
        page.wait_for_timeout(1000)  # the layout follows
        page.screenshot(path=args.out / f"{name}.png", full_page=True)
        print(f"wrote    {args.out}/{name}.png")


if __name__ == "__main__":
    cli(main)
