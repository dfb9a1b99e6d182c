"""Captions: PICTURE.txt beside each picture, as kohya's scripts read them (python -m apps.tags --captions).

A caption is the words of --prepend, the character, and the tags. What somebody has written before stays.
"""

import itertools
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

from common.classifier import read_head
from common.door import reading
from common.locks import lock_beside, locked
from common.train import UserError, progress, refuse_useless, save_text
from ingest.pictures import demo_note, picture_files, tell_problems
from ingest.tags import SEPARATOR, are_numbers, captions_of, is_emoticon, unescaped

GAP = rf"(\s|{SEPARATOR.pattern})+"  # between two tags
OF_SENTENCES = {"a", "an", "the", "of", "in", "on", "with", "and", "is"}  # no tags


def refuse_demo(trained_on, flags):
    """What a network of the demo set says of other pictures is a guess, which no caption should have.

    trained_on: {network: the data set that it learned from}.
    """
    guessing = [name for name, folder in trained_on.items() if demo_note(folder)]
    if guessing and not flags.anyway:
        fix = "train on your own pictures and captions, or give a recogniser of yours alone"
        fix += " (python -m apps.tags runs/NAME-lora FOLDER --captions); --anyway writes them"
        raise UserError(
            f"{guessing[0]} knows the demo set alone, so captions would be guesses; {fix}"
        )
    if not guessing:
        refuse_useless(flags.given & {"anyway"}, "on a network that learned from other pictures")


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
    refuse_demo(trained_on, flags)
    without = {plain(word) for word in words_of(flags.without)}
    first = written(words_of(flags.prepend), flags.escape)
    files = caption_files(flags.pictures, flags.append)
    problems, done = [], []
    names = recognised(flags, files, problems) if flags.names else {}
    if answers is None:
        rows = ({"picture": file} for file in names)
    else:
        problems = []  # the same ones come again
        rows = answers(files, problems)
    for row in progress(rows, "captions", len(files)):
        if flags.names:
            row["name"] = names.get(row["picture"])
        words, name = (
            written([x for x in caption_words(some) if plain(x) not in without], flags.escape)
            for some in (row, {"name": row.get("name")})
        )
        # Like words of --prepend, the character stands before an old caption.
        done.append(add_caption(files[row["picture"]], words, [*first, *name]))
    tell_problems(problems, learned_from)
    print(f"wrote {sum(done)} captions beside {len(done)} pictures")
    if flags.names:
        known = sum(name is not None for name in names.values())
        note = "a picture of somebody unknown may have got a wrong one"
        print(f"{flags.names} gave a name to {known} of them; {note}")


def words_of(text):
    """ "solo, long hair" -> its words."""
    return [word.strip() for word in SEPARATOR.split(text) if word.strip()]


def plain(word):
    """What two spellings of a tag have in common: "Long_Hair" and "long hair"; \\( and (."""
    return unescaped(word).replace("_", " ").casefold()


def readable(tag):
    """A tag with spaces for underscores, but for emoticons such as >_<."""
    return tag if is_emoticon(tag) else tag.replace("_", " ")


def written(words, escape):
    """Words as a caption has them; escape: \\( for (, which a prompt would take for a weight."""
    return [re.sub(r"(?<!\\)([()])", r"\\\1", word) for word in words] if escape else words


def caption_words(row):
    """A row with name and tags -> the words: the character where it is likely, tags by probability."""
    names = [row["name"]] if row.get("name") else []
    return [readable(tag) for tag in [*names, *row.get("tags", {})]]


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
        with reading(file, "caption in UTF-8", "save it as UTF-8"):
            text = file.read_text("utf-8-sig", "strict" if append else "replace")
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
    old = ""
    with locked(lock_beside(file), wait=True):  # another process may write the same caption
        if file.exists():
            with reading(file, "caption in UTF-8", "save it as UTF-8"):
                old = re.sub(f"^{GAP}|{GAP}$", "", file.read_text("utf-8-sig"))
        if is_spaced(old):
            there, join, space = old.split(), " ", "_"
        else:
            there, join, space = words_of(old), ", ", " "
        known = set(map(plain, there))
        every = {}  # by what its spellings have in common, and the first of them
        for word in [*first, *words]:
            every.setdefault(plain(word), word)
        new = [word for key, word in every.items() if key not in known]
        if new:
            before = [word.replace(" ", space) for word in new if word in first]
            behind = [word.replace(" ", space) for word in new if word not in first]
            # Words of `first` with which the caption begins stay where they are: a trigger word.
            ours = set(map(plain, first))
            head, tail = [*itertools.takewhile(lambda word: plain(word) in ours, there)], old
            for word in head:
                tail = re.sub(f"^{GAP}", "", tail.removeprefix(word))
            save_text(join.join(filter(None, [*head, *before, tail, *behind])), file)
    return bool(new)


def is_spaced(caption):
    """1girl long_hair solo: tags between spaces, as boorus have them, and no sentence."""
    words = caption.casefold().split()
    spaced = len(words) > 1 and "_" in caption and not SEPARATOR.search(caption)
    return spaced and not {*words} & OF_SENTENCES
