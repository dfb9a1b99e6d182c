"""What the folders above a picture say: its split, its class, or nothing.

A layout is a pattern of folder levels from the outside, each of them split, class or - (it says
nothing):

    class            miku/1.png                          split/-/class    train/faces/miku/1.png
    split/class      train/miku/1.png, test/miku/2.png   -/class          faces/miku/1.png
    class/split      miku/train/1.png, miku/test/2.png   -                no labels

One rule decides what a level means. The first level of folders named like splits is the split. Of
the other levels, the one with the most names is the class, but `standing` goes before their number.
Pictures that do not fit are set aside. `described` says so in one line, and --layout overrules it.
"""

import re
from collections import Counter
from functools import cache

from common.door import shown
from common.train import UserError

ORDER = ("train", "dev", "val", "test")  # of the splits, wherever they are listed
VAL = ("val", "valid", "validation", "validate", "eval", "evaluation")
WORDS = dict.fromkeys(("train", "training"), "train") | dict.fromkeys(VAL, "val")
WORDS |= dict.fromkeys(("dev", "development"), "dev") | dict.fromkeys(("test", "testing"), "test")
# train_images, test-set, val2017, and obj_train_data of CVAT
THING = r"(?:data|dataset|set|split|images?|imgs?|pictures?|pics?|faces?|crops?)"
SPLIT = re.compile(rf"(?:obj_|{THING}[ _.-])?({'|'.join(WORDS)})(?:[ _.-]?{THING})?[ _.-]?\d*")
NUMBERED = re.compile(r"\d+_(\D.*)")  # 10_miku of kohya's scripts, 000_hatsune_miku of moeimouto


@cache
def split_of(name):
    """A folder's name -> the split that it stands for, or None: Training is train."""
    match = SPLIT.fullmatch(name.lower())
    return match and WORDS[match[1]]


# of folders and labels: pictures of characters that are not to be learned
NOBODY = ("unknown", "others")
VAGUE = ("misc", "miscellaneous", "other", "various", "random", "rest", "unsorted", "nobody")
VAGUE += ("none", "その他", "不明", "未分類", "未知", "其他", "기타")
UNNAMED = re.compile(r"group-\d{3,}")  # of apps/sort.py --group, until somebody names it
# of folders that sort somebody's pictures, or everybody's: by year, by what they show or how good
YEAR = r"(?:19|20)\d\d(?:\d\d|\d{4}|\D.*)?"
KINDS = "best|good|bad|old|new|raw|edited|originals?|official|fan ?art|full(?: ?body)?|portraits?|"
KINDS += "safe|sfw|nsfw|questionable|sensitive|explicit|general|r-?18|part|batch|fold|cropped"
KIND = re.compile(rf"{YEAR}|(?:{THING}|{KINDS})[ _.-]?\d*")


def shows_nobody(label):
    return label is not None and label.casefold() in NOBODY


def is_vague(label):
    """Does a folder's name say that nobody knows who is in it? misc, group-001."""
    return label.casefold() in VAGUE or bool(UNNAMED.fullmatch(label))


def is_kind(name):
    """Does a folder's name tell a year, a rating or the like? Then it is no character's: 2021, best."""
    return bool(KIND.fullmatch(name.casefold())) or is_vague(name)


def parse_layout(text):
    """split/-/class -> ("split", "-", "class"); levels at the end that say nothing are left out."""
    levels = text.lower().strip("/").split("/")
    twice = levels.count("split") > 1 or levels.count("class") > 1
    if twice or set(levels) - {"split", "class", "-"}:
        wanted = "folder levels from the outside: one split, one class, and - for those that say"
        raise UserError(f"--layout {text} must be {wanted} nothing, such as split/-/class")
    last = max((i for i, role in enumerate(levels, 1) if role != "-"), default=0)
    return tuple(levels[:last])


def are_numbered(names):
    return all(map(NUMBERED.fullmatch, names))


def without_number(name):
    match = NUMBERED.fullmatch(name)
    return match[1] if match else name


# ---- finding the pattern -------------------------------------------------------------------------


def understand(dirs, layout=None):
    """Folders of each picture, [["train", "miku"], ...] -> rows as of `read`; read as what; doubts;
    a question, or None, that the user has to answer by a --layout.

    Where most classes have a number before their name, it is left out: kohya's scripts count
    repeats, AnimeFace Character (moeimouto) its classes. Doubts are lines, of which there may be none.
    """
    if layout is not None:
        return read(dirs, layout), "/".join(layout) or "pictures only", [], None
    at = split_level(dirs)
    inside = labelled(dirs, at)
    levels = class_levels(inside, at)
    shared = [k for k in shared_levels(inside) if k != at]
    chosen = next(iter(levels), max(shared, default=None))  # where all are wrappers, the last one
    pattern = pattern_of(chosen, at)
    rows, what = read(dirs, pattern), "/".join(pattern) or "pictures only"
    labels = {row[1] for row in rows if row} - {None}
    if 2 * sum(label != without_number(label) for label in labels) > len(labels):
        what += ", the numbers before names left out"
        rows = [row and (row[0], row[1] and without_number(row[1])) for row in rows]
    return rows, what, *doubts(inside, at, levels)


def pattern_of(chosen, at):
    """The levels of the class and of the split, or None -> ("split", "-", "class")."""
    roles = {chosen: "class", at: "split"}
    deepest = max((k for k in roles if k is not None), default=-1)
    return tuple(roles.get(k, "-") for k in range(deepest + 1))


def split_level(dirs):
    """-> the first level with splits, or None."""
    for k in shared_levels(dirs):
        splits = {split_of(d[k]) for d in dirs if len(d) > k}
        if None not in splits or "train" in splits or {"val", "test"} <= splits:
            return k
    return None


def shared_levels(dirs):
    """-> the numbers of the levels that at least half of the pictures have."""
    deepest = max(map(len, dirs), default=0)
    return [k for k in range(deepest) if 2 * sum(len(d) > k for d in dirs) >= len(dirs)]


def splits_with_folders(dirs, at):
    """The splits, named at this level, that hold folders: one of pictures only has no labels."""
    return {split_of(d[at]) for d in dirs if len(d) > at + 1}


def labelled(dirs, at):
    """Those in a split that holds folders."""
    if at is None:
        return dirs
    inside = [d for d in dirs if len(d) > at and split_of(d[at])]
    deep = splits_with_folders(inside, at)
    return [d for d in inside if split_of(d[at]) in deep] or inside


def class_levels(dirs, at):
    """-> {level that may be the class: (its standing, how many names)}, the likeliest first.

    A level whose folders stand alone in the folder above is a wrapper, but for kohya's 10_miku.
    """
    shared, order, rank = shared_levels(dirs), {}, None
    for k in range(max(map(len, dirs), default=0)):
        if k == at or not (k in shared or rank == ABOVE):  # few pictures may lie below numbers
            continue
        deep = {tuple(d[: k + 1]) for d in dirs if len(d) > k}
        names = {d[-1] for d in deep}
        rank = standing(names, holds_pictures(dirs, k, at))
        if are_numbered(names) or len(deep) > len({d[:-1] for d in deep}):
            order[k] = (rank, len(names))
    return dict(sorted(order.items(), key=lambda item: item[1], reverse=True))


def holds_pictures(dirs, k, at):
    """Do at least half of the pictures of a level, and in half of its folders, lie there or in splits?"""
    last = k + 1 + (at == k + 1)
    inside = [d[k] for d in dirs if k < len(d) <= last]
    below = [d[k] for d in dirs if len(d) > k]
    return 2 * len(inside) >= len(below) and 2 * len({*inside}) >= len({*below})


SORTS, ABOVE, NAMES, NUMBERS = range(4)  # what a level's folders may be; characters are the last


def standing(names, hold_pictures):
    """Mostly years and the like, 01_vocaloid above folders, names, or 10_miku above pictures."""
    if 2 * sum(map(is_kind, names)) > len(names):
        return SORTS
    if are_numbered(names):
        return NUMBERS if hold_pictures else ABOVE
    return NAMES


def doubts(dirs, at, levels):
    """-> lines where another level may be the class, and a question or None.

    Folders of two levels may cross: miku/2021 beside rin/2021 are years of characters, safe/miku
    beside explicit/miku are characters of ratings. Characters below their series hardly do. Where
    more than half of the deeper folders cross, and nothing but their number makes them the class,
    only who made the folders can tell.
    """
    chosen, *others = levels or [None]
    lines, asked = [], []
    for k in others:
        offer = offered(dirs, k, at)
        pairs = {(d[min(k, chosen)], d[max(k, chosen)]) for d in dirs if len(d) > max(k, chosen)}
        below = Counter(name for _, name in pairs)
        twice = {name for name in below if below[name] > 1}
        if twice:
            cross = f"{first(twice)} lie below several folders, so the class may be another level"
            lines.append(f"{cross}: {offer}")
        elif levels[k][0] < NAMES:
            line = "one level of folders is not taken for characters"
            lines.append(f"{line}: {offer}")
        crossing = sum(below[name] for name in twice)
        if k < chosen and levels[k][0] >= NAMES and 2 * crossing > len(pairs):
            asked.append(offer)
    if not asked:
        return lines, None
    choices = "; ".join([*asked, offered(dirs, chosen, at), "--layout - learns no labels"])
    return lines, f"folders of two levels cross, so say which are the characters: {choices}"


def offered(dirs, k, at):
    """ "--layout class learns 2 (miku, rin)": the flag that makes a level the class."""
    names = {d[k] for d in dirs if len(d) > k}
    return f"--layout {'/'.join(pattern_of(k, at))} learns {len(names)} ({first(names)})"


# ---- reading by it -------------------------------------------------------------------------------


def read(dirs, pattern):
    """-> (split, label) of each picture, or None, if its folders do not fit the pattern.

    A picture in a split that holds no folder at all has no label.
    """
    splits = "split" in pattern
    deep = splits_with_folders(dirs, pattern.index("split")) if splits else ()
    rows = []
    for d in dirs:
        said = dict(zip(pattern, d, strict=False))
        split = split_of(said.get("split", ""))
        whole = len(d) >= len(pattern) or (split and split not in deep)
        fits = whole and (split or not splits)
        rows.append((split, said.get("class")) if fits else None)
    return rows


def described(what, rows, aside=()):
    """ "read as split/class: train, test; 38 classes (A, B, C, ...); 2 pictures set aside (x.png)".

    rows: (split, label) of each picture; aside: names of those that have none.
    """
    splits = {split for split, _ in rows}
    labels = {label for _, label in rows} - {None}
    parts = [", ".join(s for s in ORDER if s in splits)] if any(splits) else []
    count = f"{len(labels)} class{'es' * (len(labels) != 1)} ({first(labels)})"
    parts.append(count if labels else "no labels")
    without = sum(label is None for _, label in rows)
    if labels and without:
        parts.append(f"{without} pictures without a label")
    if aside:
        parts.append(f"{len(aside)} pictures set aside ({first(aside, 2)})")
        parts.append("--layout reads folders in another way")
    return f"read as {what}: {'; '.join(parts)}"


def first(names, most=3):
    """The first of them in order, as words."""
    return ", ".join(sorted(names)[:most]) + ", ..." * (len(names) > most)


def counted(names, what, fix=None):
    """ "3 boxes are empty, the first: a.png; draw them again" in a list, which is empty without names."""
    if not names:
        return []
    line = f"{len(names)} {what}, the first: {names[0]}"
    return [shown(f"{line}; {fix}" if fix else line)]
