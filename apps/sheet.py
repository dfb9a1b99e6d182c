"""A page for the browser: pictures that were sorted or cut out, the least sure first.

It is one file without scripts. It links to the pictures, which lie beside it or below, and holds small
copies of the known pictures that these are compared with.
"""

import base64
import contextlib
import io
import os
from html import escape
from typing import NamedTuple
from urllib.parse import quote

from PIL import Image

import data
from common.door import shown
from common.features import place_of_learned
from common.train import UserError, atomic
from ingest.pictures import pictures

SIDE = 112  # pixels of a picture on the page
MARGIN = 0.2  # room around a box, by its longer side
PAGE = """<!doctype html>
<html><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: #d0d0d0; --soft: #666 }}
@media (prefers-color-scheme: dark) {{ :root {{ --line: #484848; --soft: #a8a8a8 }} }}
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 1rem; max-width: 90rem }}
h2 {{ margin: 1.5rem 0 .5rem; overflow-wrap: anywhere }}
nav a {{ margin-right: .8rem }}
section {{ display: grid; gap: .7rem; grid-template-columns: repeat(auto-fill, minmax(15.8rem, 1fr)) }}
figure {{ margin: 0; padding: .5rem; border: 1px solid var(--line); border-radius: .4rem;
  content-visibility: auto; contain-intrinsic-size: auto 13rem }}
figcaption {{ font-size: 13px; overflow-wrap: anywhere }}
small {{ display: block; font-size: 12px; color: var(--soft) }}
.two {{ display: flex; gap: .4rem; margin-bottom: .3rem }}
.two > * {{ width: {side}px; height: {side}px; overflow: hidden; flex: none }}
.two img {{ width: 100%; height: 100%; object-fit: contain }}
.two img.face {{ object-fit: none; max-width: none; transform-origin: 0 0 }}
{known}
</style></head><body>
<h1>{title}</h1>
<p>{advice}</p>
<nav>{links}</nav>
{sections}
</body></html>
"""


class Entry(NamedTuple):
    """A picture on the page."""

    file: str  # its path from the page's folder
    sure: float  # the less, the earlier
    words: str  # what is said of it
    near: str = ""  # key of the known picture that is most similar to it
    box: tuple = ()  # x1, y1, x2, y2 in pixels: what is shown of it


def write_sheet(path, title, advice, sections, known=None):
    """Write the page. sections: {heading: its entries}; known: {key: u8 (S, S, 3)}, as far as there are any."""
    number = {key: i for i, key in enumerate(known or {})}
    rules = [f".k{i} {{ background: url({as_uri(known[key])}) }}" for key, i in number.items()]
    links, parts = [], []
    for i, (heading, entries) in enumerate(sections.items()):
        heading = f"{text(heading)} ({len(entries)})"
        links.append(f'<a href="#s{i}">{heading}</a>')
        cards = "\n".join(card(entry, number) for entry in sorted(entries, key=lambda e: e.sure))
        parts.append(f'<h2 id="s{i}">{heading}</h2>\n<section>\n{cards}\n</section>')
    page = PAGE.format(
        title=text(title),
        advice=text(advice),
        side=SIDE,
        known="\n".join(rules),
        links="\n".join(links),
        sections="\n".join(parts),
    )
    with atomic(path) as temporary:
        temporary.write_text(page, "utf-8")


def card(entry, number):
    """-> the HTML of an entry; number: {key of a known picture: its number on the page}."""
    href = quote(os.fsencode(entry.file))
    image = f'<img loading="lazy" src="{href}" alt=""{cut_to(entry.box)}>'
    here = f'<a href="{href}">{image}</a>'
    words = f"{text(entry.words)}<small>{text(os.path.basename(entry.file))}</small>"
    if entry.near in number:
        here += f'<div class="k{number[entry.near]}"></div>'
    if entry.near:
        words += f"<small>nearest known picture: {text(entry.near)}</small>"
    return f'<figure><div class="two">{here}</div><figcaption>{words}</figcaption></figure>'


def cut_to(box):
    """-> the attributes with which a browser shows nothing of a picture but this box, and some room."""
    if not box:
        return ""
    x1, y1, x2, y2 = box
    side = (1 + 2 * MARGIN) * max(x2 - x1, y2 - y1, 1)
    left, top = (x1 + x2 - side) / 2, (y1 + y2 - side) / 2
    size = f"width: {side:.0f}px; height: {side:.0f}px"
    place = f"object-position: {-left:.0f}px {-top:.0f}px; transform: scale({SIDE / side:.4f})"
    return f' class="face" style="{size}; {place}"'


def text(words):
    """As HTML shows it, whatever it is."""
    return escape(shown(words))


def as_uri(picture):
    """u8 (S, S, 3) -> a small JPEG that stands in the page itself."""
    file = io.BytesIO()
    Image.fromarray(picture).resize((SIDE, SIDE)).save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def known_pictures(keys, header, run):
    """Keys of a gallery -> {key: u8 (S, S, 3)} of those whose picture is still there.

    header: of the run's head. What it learned is in its data set, what was added later is a file.
    """
    found = {}
    with contextlib.suppress(UserError):  # the set was packed anew
        folder = place_of_learned(header, run)
        # Without a digest, as in older files, another set of this name may have other pictures.
        for name in data.splits_in(folder) if header.get("digest") else ():
            split = data.open_split(folder, name)
            for i, key in enumerate(split["header"]["keys"]):
                if key in keys:
                    found[key] = split["images"][i]
    files = [key for key in keys if key not in found and os.path.isfile(key)]
    with contextlib.suppress(UserError):  # there is none, or none can be read
        found |= dict(pictures(files, SIDE, header["crop"], header["margin"], []))
    return found
