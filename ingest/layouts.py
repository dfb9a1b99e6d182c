"""What the folders above a picture say: its split, its class, or nothing.

A layout is a pattern of folder levels from the outside, each of them split, class or - (it says
nothing):

    class            miku/1.png                          split/-/class    train/faces/miku/1.png
    split/class      train/miku/1.png, test/miku/2.png   -/class          faces/miku/1.png
    class/split      miku/train/1.png, miku/test/2.png   -                no labels

`detect` finds the pattern. It looks through wrappers, which are folders that stand alone at their
level, and leaves a few stray pictures aside. What can be read in two ways is refused: labels that
are lost in silence are found too late.
"""

import re
from collections import Counter, defaultdict

from common.io import UserError

ORDER = ("train", "dev", "val", "test")  # of the splits, wherever they are listed
WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "validate": "val",
    "eval": "val",
    "evaluation": "val",
    "dev": "dev",
    "development": "dev",
    "test": "test",
    "testing": "test",
}
# train_images, test-set, val2017
THING = r"(?:data|dataset|set|split|images?|imgs?|pictures?|pics?|faces?|crops?)"
SPLIT = re.compile(rf"(?:{THING}[ _.-])?({'|'.join(WORDS)})(?:[ _.-]?{THING})?[ _.-]?\d*")
FEW = 3  # pictures, or 5 % of them, may lie astray


def split_of(name):
    """A folder's name -> the split that it usually stands for, or None: train_set and Training are
    train.
    """
    found = SPLIT.fullmatch(name.lower())
    return found and WORDS[found[1]]


def parse_layout(text):
    """split/-/class -> ("split", "-", "class"); levels at the end that say nothing are left out."""
    levels = text.lower().strip("/").split("/")
    if (
        set(levels) - {"split", "class", "-"}
        or levels.count("split") > 1
        or levels.count("class") > 1
    ):
        raise UserError(
            f"--layout {text} must be folder levels from the outside: one split, one class, and - for "
            "those that say nothing, such as split/-/class"
        )
    return stripped(levels)


def stripped(levels):
    """Without the levels at the end that say nothing."""
    last = max((i for i, role in enumerate(levels, 1) if role != "-"), default=0)
    return tuple(levels[:last])


class Ambiguous(UserError):
    """Folders that can be read in two ways; patterns: the two, the likelier one last."""

    def __init__(self, *patterns):
        super().__init__("ambiguous")
        self.patterns = [stripped(p) for p in patterns]


def few(k, n):
    return k <= max(FEW, 0.05 * n) and 2 * k < n


# ---- finding the pattern -------------------------------------------------------------------------


def detect(dirs):
    """The folders above each picture, [["train", "miku"], ...] -> the pattern, such as ("split",
    "class").

    Level by level. `left` holds, of the pictures not astray, their split and the folders that are
    still to be read.
    """
    pattern, left = (), [("", d) for d in dirs]
    while any(d for _, d in left):
        if not few(sum(not d for _, d in left), len(dirs)):  # many pictures beside folders
            raise Ambiguous(pattern, (*pattern, "class"))
        left = [(s, d) for s, d in left if d]
        roles = roles_of(left, "split" not in pattern, len(dirs), pattern)
        pattern += roles
        if "class" in roles:
            break
        left = [(split_of(d[0]) if roles == ("split",) else s, d[1:]) for s, d in left]
        if roles == ("split",):  # a split of pictures only has no labels, whatever the others have
            deep = {s for s, d in left if d}
            left = [(s, d) for s, d in left if s in deep]
    return pattern


def roles_of(left, may_split, n, pattern):
    """What the first folder of each picture says -> its role; and of class/split the two."""
    below = [(s, d) for s, d in left if len(d) > 1]
    found = {split_of(d[0]) for _, d in left} if may_split else {None}
    if None not in found:
        return ("split",)
    if "train" in found or {"val", "test"} <= found:  # folders of another kind lie beside train/
        deep = any(split_of(d[0]) for _, d in below)
        raise Ambiguous((*pattern, "class"), (*pattern, "split", "class")[: None if deep else -1])
    if few(len(below), n):
        return ("class",)
    alone = defaultdict(set)
    for s, d in left:
        alone[s].add(d[0])
    if all(len(names) == 1 for names in alone.values()):  # a wrapper; each split may have its own
        return ("-",)
    found = {split_of(d[1]) for _, d in below} if may_split else {None}
    if None not in found and few(len(left) - len(below), n):
        return ("class", "split")
    if "train" in found:
        raise Ambiguous((*pattern, "class"), (*pattern, "class", "split"))
    if not alike_inside(below):
        raise Ambiguous((*pattern, "class"), (*pattern, "-", "class"))
    return ("class",)


def alike_inside(below):
    """Do the folders of the first level share the names of their sub-folders, or have one each?
    Then they are classes.

    miku/2019, rin/2019, not genshin/hutao, genshin/venti, honkai/kiana. Many names in few folders
    are no years.
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
    """-> (split, label) of each picture, or None: its folders do not reach as deep as the pattern,
    or name no split.

    A picture in a split that holds no folder at all has no label.
    """
    at = pattern.index("split") if "split" in pattern else None
    tops = [split_of(d[at]) if at is not None and len(d) > at else None for d in dirs]
    with_folders = {
        top for top, d in zip(tops, dirs, strict=True) if at is not None and len(d) > at + 1
    }
    rows = []
    for top, d in zip(tops, dirs, strict=True):
        said = dict(zip(pattern, d, strict=False))
        if at is not None and top is None:
            rows.append(None)
        elif len(d) >= len(pattern):
            rows.append((top, said.get("class")))
        else:
            rows.append((top, None) if top and top not in with_folders else None)
    return rows


def taken_for(what, rows):
    """rows of (split, label) -> read as split/class: train, test; 38 classes (A, B, C, ...)."""
    splits, labels = ({row[i] for row in rows} - {None} for i in (0, 1))
    names, without = sorted(labels), sum(label is None for _, label in rows)
    classes = f"{len(names)} class{'es' * (len(names) != 1)} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"
    parts = [
        ", ".join(s for s in ORDER if s in splits),
        classes if names else "no labels",
        f"{without} pictures without a label" if names and without else "",
    ]
    return f"{what}: {'; '.join(filter(None, parts))}"


def two_ways(dirs, patterns):
    """The readings of an ambiguous layout, in words."""
    told = []
    for pattern in patterns:
        rows = read(dirs, pattern)
        aside = sum(row is None for row in rows)
        flag = "/".join(pattern) or "-"
        told.append(
            taken_for(f"--layout {flag}", [row for row in rows if row])
            + f"; {aside} pictures set aside" * bool(aside)
        )
    return " | ".join(told)
