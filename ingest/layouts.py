"""What the folders above a picture say: its split, its class, or nothing.

A layout is a pattern of folder levels from the outside, each of them split, class or - (it says
nothing):

    class            miku/1.png                          split/-/class    train/faces/miku/1.png
    split/class      train/miku/1.png, test/miku/2.png   -/class          faces/miku/1.png
    class/split      miku/train/1.png, miku/test/2.png   -                no labels

`detect` decides, level by level: a level that is split names is a split; folders that stand alone
at their level are wrappers; of two levels of names the inner one is the class. Pictures that do not
fit are set aside. `told` says so in one line, and names the other reading where there is one.
"""

import re
from collections import Counter, defaultdict

from common.io import UserError

ORDER = ("train", "dev", "val", "test")  # of the splits, wherever they are listed
VAL = ("val", "valid", "validation", "validate", "eval", "evaluation")
WORDS = dict.fromkeys(("train", "training"), "train") | dict.fromkeys(VAL, "val")
WORDS |= dict.fromkeys(("dev", "development"), "dev") | dict.fromkeys(("test", "testing"), "test")
# train_images, test-set, val2017
THING = r"(?:data|dataset|set|split|images?|imgs?|pictures?|pics?|faces?|crops?)"
SPLIT = re.compile(rf"(?:{THING}[ _.-])?({'|'.join(WORDS)})(?:[ _.-]?{THING})?[ _.-]?\d*")
FEW = 3  # pictures, or 5 % of them, may lie astray


def split_of(name):
    """A folder's name -> the split that it stands for, or None: Training is train."""
    found = SPLIT.fullmatch(name.lower())
    return found and WORDS[found[1]]


def parse_layout(text):
    """split/-/class -> ("split", "-", "class"); levels at the end that say nothing are left out."""
    levels = text.lower().strip("/").split("/")
    twice = levels.count("split") > 1 or levels.count("class") > 1
    if twice or set(levels) - {"split", "class", "-"}:
        wanted = "folder levels from the outside: one split, one class, and - for those that say"
        raise UserError(f"--layout {text} must be {wanted} nothing, such as split/-/class")
    last = max((i for i, role in enumerate(levels, 1) if role != "-"), default=0)
    return tuple(levels[:last])


def few(k, n):
    return k <= max(FEW, 0.05 * n) and 2 * k < n


# ---- finding the pattern -------------------------------------------------------------------------


def detect(dirs):
    """Folders of each picture, [["train", "miku"], ...] -> the pattern; and another, or None.

    The other is one that somebody may have meant. `left` holds, of the pictures not astray, their
    split and the folders still to be read.
    """
    pattern, other = (), None
    left = [("", d) for d in dirs]
    while any(d for _, d in left) and "class" not in pattern:
        flat = sum(not d for _, d in left)
        if 2 * flat > len(left):  # most pictures lie at this level
            return pattern, (*pattern, "class")
        if not few(flat, len(dirs)):
            other = pattern
        left = [(s, d) for s, d in left if d]
        roles, doubt = roles_of(left, "split" not in pattern, len(dirs))
        other = (*pattern, *doubt) if doubt else other
        pattern += roles
        if roles == ("split",):
            left = [(split_of(d[0]), d) for _, d in left if split_of(d[0])]
            # a split of pictures only has no labels, whatever the others have
            deep = {s for s, d in left if len(d) > 1}
            left = [(s, d) for s, d in left if s in deep]
        left = [(s, d[1:]) for s, d in left]
    return pattern, other


def roles_of(left, may_split, n):
    """What the first folders of all pictures say -> their roles, and others if in doubt."""
    below = [(s, d) for s, d in left if len(d) > 1]
    first = {split_of(d[0]) for _, d in left} if may_split else {None}
    second = {split_of(d[1]) for _, d in below} if may_split else {None}
    if None not in first:
        return ("split",), None
    if is_split(first):  # folders of another kind lie beside train/, and are set aside
        return ("split",), ("class",)
    if few(len(below), n):
        return ("class",), None
    alone = defaultdict(set)
    for s, d in left:
        alone[s].add(d[0])
    if all(len(names) == 1 for names in alone.values()):  # a wrapper; each split may have its own
        return ("-",), None
    if None not in second and few(len(left) - len(below), n):
        return ("class", "split"), None
    if "train" in second:
        return ("class", "split"), ("class",)
    if not alike_inside(below):  # a series above its characters
        return ("-",), ("class",)
    return ("class",), None


def is_split(found):
    return "train" in found or {"val", "test"} <= found


def alike_inside(below):
    """Are the first folders classes: do they share the names of what is inside, or have one each?

    miku/2019, rin/2019, not genshin/hutao, honkai/kiana. Many names in few folders are no years.
    """
    inside = defaultdict(set)
    for _, d in below:
        inside[d[0]].add(d[1])
    count = Counter(name for names in inside.values() for name in names)
    shared = sum(k for k in count.values() if k > 1)
    one_each = max(map(len, inside.values())) == 1
    return one_each or (2 * shared > sum(count.values()) and len(count) <= 2 * len(inside))


# ---- reading by it -------------------------------------------------------------------------------


def read(dirs, pattern):
    """-> (split, label) of each picture, or None, if its folders do not fit the pattern.

    A picture in a split that holds no folder at all has no label.
    """
    at = pattern.index("split") if "split" in pattern else None
    tops = [split_of(d[at]) if at is not None and len(d) > at else None for d in dirs]
    deep = {top for top, d in zip(tops, dirs, strict=True) if at is not None and len(d) > at + 1}
    rows = []
    for top, d in zip(tops, dirs, strict=True):
        said = dict(zip(pattern, d, strict=False))
        if at is not None and top is None:
            rows.append(None)
        elif len(d) >= len(pattern):
            rows.append((top, said.get("class")))
        else:
            rows.append((top, None) if top and top not in deep else None)
    return rows


def told(what, rows, names=(), other=None):
    """ "read as split/class: train, test; 38 classes (A, B, C, ...); 2 pictures set aside (x.png)".

    rows of (split, label) or None; names: of the pictures; other: see `detect`.
    """
    kept = [row for row in rows if row]
    splits, labels = ({row[i] for row in kept} - {None} for i in (0, 1))
    without = sum(label is None for _, label in kept)
    parts = [", ".join(s for s in ORDER if s in splits)] if splits else []
    parts += [f"{counted(len(labels), 'class', 'es')} ({first(labels)})" if labels else "no labels"]
    if labels and without:
        parts += [f"{without} pictures without a label"]
    if aside := [name for name, row in zip(names, rows, strict=False) if row is None]:
        parts += [f"{len(aside)} pictures set aside ({first(aside, 2)})"]
    if other is not None:
        parts += [f"--layout {'/'.join(other) or '-'} reads these folders another way"]
    return f"read as {what}: {'; '.join(parts)}"


def counted(n, word, plural="s"):
    return f"{n} {word}{plural * (n != 1)}"


def first(names, most=3):
    """The first of them in order, as words."""
    return ", ".join(sorted(names)[:most]) + ", ..." * (len(names) > most)
