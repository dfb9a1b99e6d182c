"""Words to learn from: which of a source's tags make the vocabulary, and those of a picture as a padded list of ids.

A list takes as much room as the longest one, whatever the vocabulary: 25,000 words cost no more
than 25.
"""

import re
import sys
import zlib
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np

from common.fields import is_name
from ingest.files import nfc
from ingest.layouts import NUMBERED

MOST = 256  # tags of a picture; of more the rarest are left out
NONE = -1  # fills a list up
LEAST = 2  # pictures of train that have a tag: nothing is learned from one
KEPT = 0.5  # of the demo set: share of a picture's tags that it gets
WITHOUT = 0.1  # of the demo set: share of pictures that get none


def word(text):
    """One spelling, and one place in memory, per word."""
    return sys.intern(nfc(str(text)))


def words_of(text):
    """ "solo, brown hair" -> solo, brown_hair: at commas where there are commas, else at spaces."""
    parts = text.split(",") if "," in text else text.split()
    return tuple(word("_".join(part.split())) for part in parts if part.strip())


def with_caption(record, root):
    """The record, with the tags in x.txt beside x.png, in a numbered folder of kohya's scripts."""
    path = Path(root, record.place).with_suffix(".txt")
    if not (NUMBERED.fullmatch(path.parent.name) and path.is_file()):
        return record
    return record._replace(tags=words_of(path.read_text("utf-8-sig", "replace")))


def is_emoticon(tag):
    """:d, ^_^, o_o, xd: ASCII with a sign that draws a face, and no two letters in a row."""
    if tag.lower() in ("xd", "x3"):
        return True
    drawn = len(tag) > 1 and tag.isascii() and re.search(r"[:;=^<>_@|/\\()]", tag)
    return bool(drawn) and not re.search("[a-z0-9]{2}", tag.lower())


def vocabulary(records):
    """Records -> (words of train, the most frequent first, lines of what was left out)."""
    lists = [r.tags for r in records if r.split == "train" and r.tags]
    count = Counter(chain.from_iterable(map(set, lists)))
    gone = {
        "no names": [t for t in count if not is_name(t)],
        "emoticons": [t for t in count if is_emoticon(t)],
        f"on fewer than {LEAST} pictures": [t for t, n in count.items() if n < LEAST],
    }
    words = set(count).difference(*gone.values())
    told = [f"{len(tags)} {why}" for why, tags in gone.items() if tags]
    notes = [f"tags: {len(words)} of {len(count)} are learned; {', '.join(told)}"] if told else []
    return sorted(words, key=lambda t: (-count[t], t)), notes


def as_ids(tags, column, room):
    """Tags, {word: id} -> i32 (room,): ids from small to large, then NONE."""
    ids = sorted(column[t] for t in set(tags) if t in column)[:room]
    return np.array(ids + [NONE] * (room - len(ids)), np.int32)


def thinned(record):
    """Some of a picture's tags, the same each time: what a person may have filed it under."""
    rng = np.random.default_rng(zlib.crc32(record.key.encode()))
    kept = rng.random(len(record.tags)) < KEPT
    if rng.random() < WITHOUT:
        return ()
    return tuple(t for t, k in zip(record.tags, kept, strict=True) if k)


def add_planes(words, records, dims, stream, thin=False):
    """dims and stream(records) with a plane "tags", i32 (T,); thin: and "all_tags", the truth.

    T is the longest list of ids that a picture of the set has.
    """
    column = {t: i for i, t in enumerate(words)}
    room = min(MOST, max((sum(t in column for t in set(r.tags)) for r in records), default=0))
    if not room:
        return dims, stream

    def tagged(some):
        for r, row in stream(some):
            if not isinstance(row, Exception):
                row["tags"] = as_ids(thinned(r) if thin else r.tags, column, room)
                row |= {"all_tags": as_ids(r.tags, column, room)} if thin else {}
            yield r, row

    return dims | {p: (room,) for p in ("tags", "all_tags")[: 1 + thin]}, tagged
