"""Who goes where: groups that no split may tear apart, copies that are dropped, and the deal into train, val and test.

Plain functions on the records of ingest/sources.py. The same records and the same seed give the
same splits.
"""

import hashlib
import random
import re
from collections import Counter, defaultdict
from pathlib import Path

from common.groups import hold_apart, numbered
from common.train import UserError
from ingest import duplicates
from ingest.layouts import ORDER, counted, shows_nobody

# ---- groups and copies ---------------------------------------------------------------------------


def name_of_group(record, pattern):
    """The first group of the REGEX in the file's stem, else what the source says, else the key."""
    match = pattern and re.search(pattern, Path(record.key).stem)
    return (match and match[min(1, match.re.groups)]) or record.group or record.key


def join_groups(records, pattern, pairs):
    """Groups by name, pairs (i, j) of near-duplicates -> records, each with its whole group's name."""
    if pattern and not any(re.search(pattern, Path(r.key).stem) for r in records):
        name = Path(records[0].key).stem
        raise UserError(f"--group-by {pattern} matches none of the names, such as {name}")
    names = [name_of_group(r, pattern) for r in records]
    first = {}
    named = [(first.setdefault(name, i), i) for i, name in enumerate(names)]
    roots = duplicates.join(len(records), named + pairs)
    return [r._replace(group=names[root]) for r, root in zip(records, roots, strict=True)]


def copies_to_drop(records, pairs, within):
    """Of near-duplicates the first in the order of ORDER stays -> indices of those to drop.

    Those of other splits than the first: what train holds is no test. within: all but one, which is
    a labelled one where there is one in that split.
    """
    ranks = [(*ORDER, None).index(r.split) for r in records]
    roots = duplicates.join(len(records), pairs)
    first = {}
    nameless = [r.label is None or shows_nobody(r.label) for r in records]
    for i in sorted(range(len(records)), key=lambda i: (ranks[i], nameless[i])):
        first.setdefault(roots[i], i)
    kept = [first[root] for root in roots]
    return {i for i, k in enumerate(kept) if ranks[i] != ranks[k] or (within and i != k)}


def without_copies(records, pattern, pairs, dedupe):
    """-> the records with their groups, copies dropped as --dedupe says, and notes."""
    gone = set() if dedupe == "keep" else copies_to_drop(records, pairs, dedupe == "drop")
    count = Counter(records[i].split for i in gone)
    places = [f"{count[s]} from {s}" for s in ORDER if count[s]]
    fix = "--dedupe keep keeps them, as published"
    line = f"{len(gone)} copies dropped: {', '.join(places) or 'one of each group stays'}; {fix}"
    grouped = join_groups(records, pattern, [] if dedupe == "drop" else pairs)
    left = [r for i, r in enumerate(grouped) if i not in gone]
    refuse_gone(records, left, "images of {} are copies of others", fix)
    return left, [line] * bool(gone) + crossing(left)


def crossing(records):
    """A line where the source's own splits tear a group apart: it stays torn."""
    splits = defaultdict(set)
    for r in records:
        splits[r.group].add(r.split)
    torn = [group for group, own in splits.items() if len(own) > 1]
    what = "groups cross the splits that the source gives, and stay as published"
    return counted(torn, what, "a score then counts pictures that were learned from")


def refuse_gone(before, after, why, fix):
    """Stop where nothing is left of a split that the source gives."""
    for split in (s for s in ORDER if s not in {r.split for r in after}):
        if n := sum(r.split == split for r in before):
            raise UserError(f"all {n} {why.format(split)}, and nothing would be left of it; {fix}")


# ---- the deal ------------------------------------------------------------------------------------


def deal(rows, shares, seed):
    """Deal rows of (class, group) into shares {split: fraction} -> [split], groups whole.

    Groups come in a seeded random order, large ones first; each goes where its classes lack most.
    """
    members = defaultdict(list)
    owed = Counter()
    for i, (label, group) in enumerate(rows):
        members[group].append(i)
        for split, share in shares.items():
            owed[split, label] += share
    order = sorted(members)
    random.Random(seed).shuffle(order)
    split_of = [None] * len(rows)
    for group in sorted(order, key=lambda g: -len(members[g])):
        classes = Counter(rows[i][0] for i in members[group])
        split = max(shares, key=lambda s: sum(n * owed[s, c] for c, n in classes.items()))
        for i in members[group]:
            split_of[i] = split
        for c, n in classes.items():
            owed[split, c] -= n
    return split_of


def assign_splits(given, rows, shares, dev, seed):
    """Given splits stay, what has none beside them is train; else rows of (class, group) are dealt.

    A missing val, and dev, are taken out of train.
    """
    splits = [s or "train" for s in given] if any(given) else deal(rows, shares, seed)
    if shares["val"] and "val" not in splits:
        two = {"train": 1 - shares["val"], "val": shares["val"]}
        dealt = iter(deal(train_of(rows, splits), two, seed))
        splits = [next(dealt) if s == "train" else s for s in splits]
    if dev and "train" in splits and "dev" not in splits:
        labels, groups = zip(*[map(str, row) for row in train_of(rows, splits)], strict=True)
        apart = iter(hold_apart(numbered(groups), labels, dev, seed))
        splits = ["dev" if s == "train" and next(apart) else s for s in splits]
    return splits


def bytes_of(name):
    """The bytes of a file's name, which may be no text at all."""
    return name.encode("utf-8", "surrogateescape")


def train_of(rows, splits):
    return [row for row, split in zip(rows, splits, strict=True) if split == "train"]


def hold_out_test(splits, groups, share):
    """A source that gives no test: this share of its val becomes one, whole groups by their hash."""
    if "test" in splits:
        return splits
    digests = [hashlib.sha256(bytes_of(str(group))).digest() for group in groups]
    low = [int.from_bytes(digest[:4], "big") < share * 2**32 for digest in digests]
    return ["test" if s == "val" and x else s for s, x in zip(splits, low, strict=True)]


# ---- classes -------------------------------------------------------------------------------------


def large_enough(records, least):
    """Records of classes with at least `least` images, and a note on the rest; least 0 keeps all.

    Pictures of nobody are no class, and stay.
    """
    count = Counter(r.label for r in records if not shows_nobody(r.label))
    small = {label for label, n in count.items() if label is None or n < least}
    kept = [r for r in records if not least or r.label not in small]
    if not kept:
        most = max((n for label, n in count.items() if label is not None), default=0)
        largest = f"the largest class has {most} images"
        raise UserError(f"--min-per-class {least} leaves nothing: {largest}")
    why = f"images of {{}} have no class of {least} or more"
    refuse_gone(records, kept, why, "give a smaller --min-per-class")
    lost = len(small - {None})
    gone = len(records) - len(kept)
    note = f"{gone} images left out: {lost} classes have fewer than {least}"
    return kept, [note] if gone else []


def long_tailed(records, tail, least=5):
    """Records of train left out until class sizes follow rank^-tail, at least `least`; and a note.

    The largest class stays whole. Of the others the first in the order of their digests stay, the
    same on every machine. Other splits stay whole: they ask for each character as often as before.
    """
    of = defaultdict(list)
    for r in sorted(records, key=lambda r: hashlib.blake2b(bytes_of(r.key)).digest()):
        if r.split == "train" and r.label is not None:
            of[r.label].append(r.key)
    ranked = sorted(of, key=lambda label: (-len(of[label]), label))
    gone = set()
    for rank, label in enumerate(ranked, 1):
        room = max(least, round(len(of[ranked[0]]) * rank**-tail))
        gone.update(of[label][room:])
    note = f"{len(gone)} training images left out: class sizes follow rank^-{tail:g}"
    return [r for r in records if r.key not in gone], [note] if gone else []
