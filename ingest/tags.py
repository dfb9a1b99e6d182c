"""Words to learn from: which of a source's tags make the vocabulary, and those of a picture as a padded list of ids.

A list takes as much room as the longest one, whatever the vocabulary: 25,000 words cost no more
than 25.
"""

import math
import re
import sys
import zlib
from collections import Counter
from itertools import chain
from pathlib import Path, PurePath

import numpy as np

from common.door import is_name
from ingest.files import nfc
from ingest.layouts import counted, first

MOST = 256  # tags of a picture; of more the rarest are left out
NONE = -1  # fills a list up
LEAST = 2  # pictures of train that have a tag: nothing is learned from one
KEPT = 0.5  # of the demo set: share of a picture's tags that it gets
WITHOUT = 0.1  # of the demo set: share of pictures that get none
CAPTIONS = (".txt", ".caption")  # suffixes of texts beside pictures; the first counts most
SEPARATOR = re.compile(r"[,，、\n]")  # of tags; the wide ones are of Chinese and Japanese keyboards
NUMBER = re.compile(r"[-+.\de]+")


def word(text):
    """One spelling, and one place in memory, per word."""
    return sys.intern(nfc(str(text)))


def words_of(text):
    """ "solo, brown hair" -> solo, brown_hair: at commas and ends of lines, else at spaces."""
    parts = SEPARATOR.split(text.strip())
    parts = parts if len(parts) > 1 else text.split()
    return tuple(word("_".join(part.split())) for part in parts if part.strip())


def are_numbers(words):
    """Is it no caption, but boxes as YOLO writes them?"""
    return bool(words) and all(map(NUMBER.fullmatch, words))


def unescaped(text):
    """miku \\(cosplay\\) -> miku (cosplay): in a prompt, bare brackets would be weights."""
    return re.sub(r"\\([()\[\]])", r"\1", text)


# ---- captions: a text beside a picture -----------------------------------------------------------


def captions_of(places, root=""):
    """Paths of pictures below root -> {path: its caption}: x.txt, x.caption or x.png.txt of x.png."""
    beside = {}
    for folder in {PurePath(place).parent for place in places}:
        for file in Path(root, folder).iterdir():
            if file.suffix.lower() in CAPTIONS and file.is_file():
                beside.setdefault(folder / file.stem, []).append(file)
    captions = {}
    for place in places:
        own = beside.get(PurePath(place).with_suffix("")) or beside.get(PurePath(place))
        if own:
            captions[place] = min(own, key=lambda file: CAPTIONS.index(file.suffix.lower()))
    return captions


def with_captions(records, root):
    """Records with the tags of their captions, and lines on how many, and on texts that are none."""
    captions = captions_of([r.place for r in records], root)
    updated, tagged, boxes, unread = [], [], [], []
    for r in records:
        words = ()
        if r.place in captions:
            try:
                words = words_of(unescaped(captions[r.place].read_text("utf-8-sig")))
            except UnicodeDecodeError:
                unread.append(r.key)
        if are_numbers(words):
            boxes.append(r.key)
        elif words:
            tagged.append(r.key)
            r = r._replace(tags=words)
        updated.append(r)
    notes = counted(tagged, f"of {len(records)} pictures have a caption")
    notes += counted(boxes, "captions are numbers", "--detect reads boxes")
    notes += counted(unread, "captions are not in UTF-8", "save them so")
    return updated, notes


# ---- names among tags ----------------------------------------------------------------------------


def bare(name):
    """What spellings of a name have in common: its words in any order, without a series in brackets."""
    plain = unescaped(name).casefold().removeprefix("character:")  # Hydrus writes it
    plain = re.sub(r"[\s_]*\([^()]*\)$", "", plain) or plain
    return frozenset(re.split(r"[\s_-]+", plain))


def without_names(records):
    """Records whose tags are no name of a class, and a line: who reads one would know the answer."""
    names = {bare(label) for label in {r.label for r in records} - {None}}
    gone = {tag for tag in set(chain.from_iterable(r.tags for r in records)) if bare(tag) in names}
    if not gone:
        return records, []
    kept = [r._replace(tags=tuple(t for t in r.tags if t not in gone)) for r in records]
    count = sum(old.tags != new.tags for old, new in zip(records, kept, strict=True))
    line = f"tags: names of classes are left out of those of {count} pictures ({first(gone)})"
    return kept, [line]


def is_emoticon(tag):
    """:d, ^_^, o_o, xd: ASCII with a sign that draws a face, and no two letters in a row."""
    if tag.lower() in ("xd", "x3"):
        return True
    drawn = len(tag) > 1 and tag.isascii() and re.search(r"[:;=^<>_@|/\\()]", tag)
    return bool(drawn) and not re.search("[a-z0-9]{2}", tag.lower())


def importance(sets, count):
    """How much each tag tells, by TF-IDF: (sum of 1/k) * log(C/c), {tag: number}.

    sets: the tags of each of C pictures; c = count[tag] of these have a tag, beside others so that k are
    there (Yi et al. 2023, equation 1). A tag of every picture tells nothing.
    """
    shares = dict.fromkeys(count, 0.0)
    for tags in sets:
        for tag in tags:
            shares[tag] += 1 / len(tags)
    return {tag: shares[tag] * math.log(len(sets) / count[tag]) for tag in count}


def vocabulary(records, least=0):
    """Records -> (words of train, the most frequent first, lines of what was left out).

    least: tags whose importance is smaller are left out; the paper's is .2.
    """
    sets = [set(r.tags) for r in records if r.split == "train" and r.tags]
    count = Counter(chain.from_iterable(sets))
    tells = importance(sets, count)
    gone = {
        "no names": [t for t in count if not is_name(t)],
        "emoticons": [t for t in count if is_emoticon(t)],
        f"on fewer than {LEAST} pictures": [t for t, n in count.items() if n < LEAST],
        f"of an importance below {least:g}": [t for t in count if tells[t] < least],
    }
    words = set(count).difference(*gone.values())
    reasons = ", ".join(f"{len(tags)} {why}" for why, tags in gone.items() if tags)
    notes = [f"tags: {len(words)} of {len(count)} are learned; {reasons}"] if reasons else []
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
