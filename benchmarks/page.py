"""How fast is the page, and does it grow? python -m benchmarks.page runs/NAME

Starts demo.py and visits it with the system's chromium, by playwright: seconds until the page is
served, until a browser that never saw it has drawn it, and from then until its first answer;
milliseconds from a move of a slider to the new picture; memory over pictures dropped by two
visitors at once. Into runs/bench/bench_page.csv (--out results: into git).
"""

import contextlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import torch
from PIL import Image

from benchmarks import OUT, ROOT, about, status_mb
from common.command import Parser, at_least, claim, cli
from common.io import UserError
from experiments.tables import save_csv

SAYS = "([where, words]) => document.querySelector(where).innerText.includes(words)"
SAYS_NOT = "([where, words]) => !document.querySelector(where).innerText.includes(words)"


def browser_of(play):
    if not (chromium := shutil.which("chromium")):
        raise UserError("no chromium on this machine: apt install chromium")
    return play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])


@contextlib.contextmanager
def server(words, **where):
    """demo.py with these words -> its process, its address."""
    process = subprocess.Popen(
        [sys.executable, ROOT / "demo.py", *words], stdout=subprocess.PIPE, text=True, **where
    )
    try:
        yield process, re.search(r"http://\S+?:\d+", process.stdout.readline()).group()
    finally:
        process.terminate()
        process.wait()


def visit(browser, address):
    page = browser.new_page()
    page.goto(address)
    page.wait_for_selector("#ratio")
    return page


def slide(page, moves):
    """Milliseconds of each move: the ratio is changed until the answer tells of another number of
    patches.
    """
    found, box = [], page.locator("#ratio input[type=number]")
    for k in range(moves):
        before = re.search(r"seen: \d+ of", page.locator("#mask").inner_text()).group()
        start_time = time.perf_counter()
        box.fill(str((0.5, 0.75)[k % 2]))
        box.press("Enter")
        page.wait_for_function(SAYS_NOT, arg=["#mask", before], polling=5)
        found.append(1000 * (time.perf_counter() - start_time))
    return found


def drop(pages, folder, number):
    """Each visitor drops a picture at the same time; all are shown theirs when it returns."""
    for k, page in enumerate(pages):
        path = folder / f"{number}-{k}.png"
        Image.effect_noise((200, 300), 60 + number).save(path)
        if number:
            remove = page.locator("#file").get_by_label("Remove")
            page.locator("#file button[aria-label=Clear]").or_(remove).first.click()
        page.locator("#file input[type=file]").set_input_files(path)
    for k, page in enumerate(pages):
        page.wait_for_function(SAYS, arg=["#picture", f"{number}-{k}.png"])


def measure(run, moves, drops):
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise UserError("benchmarks.page needs playwright: pip install playwright") from None
    with sync_playwright() as play, tempfile.TemporaryDirectory() as folder:
        browser, start_time = browser_of(play), time.perf_counter()
        with server([run]) as (process, address):
            urllib.request.urlopen(address).read()
            served = time.perf_counter() - start_time
            page = visit(browser, address)
            drawn = time.perf_counter() - start_time
            page.wait_for_selector("#mask img")
            answer = time.perf_counter() - start_time - drawn
            times = slide(page, moves + 2)[2:]
            pages, memory = [page, visit(browser, address)], []
            for number in range(2 * drops):  # the first half fills caches and heaps
                drop(pages, Path(folder), number)
                memory.append(status_mb("VmRSS", process.pid))
    return {
        "run": run,
        "served_s": round(served, 2),
        "drawn_s": round(drawn, 2),
        "first_answer_s": round(answer, 2),
        "slider_ms": round(statistics.median(times), 1),
        "visitors": len(pages),
        "pictures": len(pages) * drops,
        "memory_mb": round(memory[drops - 1]),
        "grown_mb": round(memory[-1] - memory[drops - 1]),
    }


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("run", metavar="RUN", help="runs/NAME of pretrain.py")
    add("--moves", type=at_least(1), default=30, help="of the slider (default: 30)")
    add(
        "--drops",
        type=at_least(1),
        default=25,
        help="pictures of each of two visitors (default: 25)",
    )
    add(
        "--out",
        type=Path,
        default=OUT,
        metavar="DIR",
        help="folder of the table (default: runs/bench)",
    )
    args = parser.parse_args()
    claim([args.out / "bench_page.csv"])
    row = measure(args.run, args.moves, args.drops) | about(torch.device("cpu"))
    print(", ".join(f"{k} {v}" for k, v in row.items()))
    save_csv(args.out / "bench_page.csv", [row])


if __name__ == "__main__":
    cli(main)
