"""Captions: PICTURE.txt beside each picture, as kohya's scripts read them (python -m apps.tags --captions).

A caption is the words of --prepend, the character, and the tags. What somebody has written before stays.
"""

import itertools
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

from apps.pictures import demo_note, tell_problems
from common.classifier import read_head
from common.door import reading
from common.train import UserError, progress, save_text
from ingest.pictures import picture_files
from ingest.tags import SEPARATOR, are_numbers, captions_of, is_emoticon, unescaped

GAP = rf"(\s|{SEPARATOR.pattern})+"  # between two tags
OF_SENTENCES = {"a", "an", "the", "of", "in", "on", "with", "and", "is"}  # no tags


def refuse_demo(trained_on):
    """What a network of the demo set says of other pictures is a guess, which no caption should have.

    trained_on: {network: the data set that it learned from}.
    """
    fix = "train on your own pictures and captions, or give a recogniser of yours alone"
    fix += " (python -m apps.tags runs/NAME-lora FOLDER --captions)"
    for name, folder in trained_on.items():
        if demo_note(folder):
            why = "knows the demo set alone, so captions would be guesses"
            raise UserError(f"{name} {why}; {fix}")


def recognised(flags, files, problems):
    """-> {file: its character by the run of --names, None where it is unknown}."""
    from apps import recognize

    settings = {"run": flags.names, "device": flags.device, "dtype": flags.dtype}
    settings |= {"threshold": None, "detect": None, "images": list(files)}
    args = SimpleNamespace(**settings)
    rows = recognize.all_answers(args, *recognize.open_recogniser(args), problems)
    return {row["picture"]: row["name"] for row in progress(rows, "names", len(files))}


def write_captions(flags, answers=None, learned_from=None):
    """Write a caption beside each picture: words of --prepend, the character, its tags.

    answers: a function of files and a list of problems -> a row with name and tags of each. Without it,
    a caption has the name alone. The character is that of --names, where it is given: the network of
    the tags knows others. learned_from: the data set of that network.
    """
    trained_on = {} if answers is None else {flags.encoder: learned_from}
    if flags.names:
        trained_on[flags.names] = read_head(flags.names)[1]["data"]
    refuse_demo(trained_on)
    files = caption_files(flags.pictures, flags.append)
    names, problems = {}, []
    if flags.names:
        names = recognised(flags, files, problems)
        rows = [{"picture": file} for file in names]
    if answers is not None:
        problems = []  # the same ones come again
        rows = answers(files, problems)
    without = {plain(word) for word in words_of(flags.without)}
    done = []
    for row in progress(rows, "captions", len(files)):
        file = row["picture"]
        name = names.get(file) if flags.names else row["name"]
        of_name = words_for(filter(None, [name]), without)
        # Like words of --prepend, the character stands before an old caption.
        first = [*words_of(flags.prepend), *of_name]
        words = words_for(row.get("tags", {}), without)
        if flags.escape:
            first, words = map(escaped, first), map(escaped, words)
        done.append(add_caption(files[file], [*words], [*first]))
    tell_problems(problems, learned_from)
    print(f"wrote {sum(done)} captions beside {len(done)} pictures")
    if flags.names:
        known = sum(name is not None for name in names.values())
        note = "a picture of somebody unknown may have got a wrong one"
        print(f"{flags.names} gave a name to {known} of them; {note}")


# ---- words ---------------------------------------------------------------------------------------


def words_of(text):
    """ "solo, long hair" -> its words."""
    return [word.strip() for word in SEPARATOR.split(text) if word.strip()]


def plain(word):
    """What two spellings of a tag have in common: "Long_Hair" and "long hair"; \\( and (."""
    return unescaped(word).replace("_", " ").casefold()


def readable(tag):
    """A tag with spaces for underscores, but for emoticons such as >_<."""
    return tag if is_emoticon(tag) else tag.replace("_", " ")


def words_for(tags, without):
    """Tags as a caption has them, without those whose `plain` form is in `without`."""
    words = map(readable, tags)
    return [word for word in words if plain(word) not in without]


def escaped(word):
    """\\( for (, which a prompt would take for a weight."""
    return re.sub(r"(?<!\\)([()])", r"\\\1", word)


def is_spaced(caption):
    """1girl long_hair solo: tags between spaces, as boorus have them, and no sentence."""
    words = caption.casefold().split()
    spaced = len(words) > 1 and "_" in caption and not SEPARATOR.search(caption)
    return spaced and not {*words} & OF_SENTENCES


# ---- files ---------------------------------------------------------------------------------------


def caption_files(paths, append):
    """-> {picture: caption file} of the pictures at paths. Captions that are there are refused."""
    caption_of = {}
    for path in paths:
        files = [str(file) for file in picture_files(path).values()]
        captions = captions_of(files)
        caption_of |= {x: captions.get(x, Path(x).with_suffix(".txt")) for x in files}
    if not caption_of:
        raise UserError(f"no picture was found in {', '.join(paths)}")
    twice = [file for file, n in Counter(caption_of.values()).items() if n > 1]
    if twice:
        raise UserError(f"{twice[0]} would be the caption of two pictures; rename one of them")
    there = sorted(file for file in caption_of.values() if file.exists())
    boxes = []
    for file in there:  # now, and not in the middle of the work
        text = read_caption(file, "strict" if append else "replace")
        boxes += [file] * are_numbers(text.split())
    if boxes:
        why = "hold numbers alone, as boxes of YOLO do; move them elsewhere first"
        raise UserError(f"{len(boxes)} texts beside pictures {why}, the first: {boxes[0]}")
    if there and not append:
        fix = "--append keeps what they say and adds new tags"
        raise UserError(f"{len(there)} captions are there already, such as {there[0]}; {fix}")
    return caption_of


def add_caption(file, words, first=()):
    """Write `first` before a caption, and words behind it, where it lacks them -> was there anything to write?"""
    old = read_caption(file) if file.exists() else ""
    old = re.sub(f"^{GAP}|{GAP}$", "", old)
    there, join, space = words_of(old), ", ", " "
    if is_spaced(old):
        there, join, space = old.split(), " ", "_"
    new = {}  # by what the spellings of a word have in common: the first of them
    for word in [*first, *words]:
        new.setdefault(plain(word), word)
    for word in there:
        new.pop(plain(word), None)
    before = [word.replace(" ", space) for word in new.values() if word in first]
    behind = [word.replace(" ", space) for word in new.values() if word not in first]
    # Words of `first` with which the caption begins stay where they are: a trigger word.
    ours = set(map(plain, first))
    head, tail = [*itertools.takewhile(lambda word: plain(word) in ours, there)], old
    for word in head:
        tail = re.sub(f"^{GAP}", "", tail.removeprefix(word))
    if new:
        save_text(join.join(filter(None, [*head, *before, tail, *behind])), file)
    return bool(new)


def read_caption(file, errors="strict"):
    with reading(file, "caption in UTF-8", "save it as UTF-8"):
        return file.read_text("utf-8-sig", errors)
