"""Every command that the pages give, one a line, to be run by hand after files have moved.

python tests/house/commands.py            prints them, each with its page
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
COMMAND = re.compile(r"(?:python|torchrun|bash) (?:-m )?[\w./-]+[^\n`#|]*")


def pages():
    """README, the pages of docs, the tour, the exercises and the cards of weights."""
    found = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), ROOT / "docs/tour.ipynb"]
    found.append(ROOT / "exercises/README.md")
    return [*found, *sorted(ROOT.glob("weights/*/README.md"))]


def text_of(page):
    """A page, or what a person reads of a notebook."""
    if page.suffix != ".ipynb":
        return page.read_text()
    return "\n".join("".join(cell["source"]) for cell in json.loads(page.read_text())["cells"])


def commands(text):
    """The commands of a page, in their order; a line that ends in a backslash goes on."""
    return [found.strip().rstrip(".,;") for found in COMMAND.findall(text.replace("\\\n", " "))]


if __name__ == "__main__":
    for page in pages():
        for command in commands(text_of(page)):
            print(f"{page.relative_to(ROOT)}: {command}")
