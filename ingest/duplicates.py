"""Near-duplicates: the same picture again, re-encoded, resized, recoloured, mirrored or with a little cut off.

There are three steps, and each leaves fewer pairs to the next, which costs more for a pair.

1. Perceptual hashes are the signs of the lowest frequencies, as pHash has them. They are taken of
   the picture and of windows of it, so that a crop of one meets a window of the other. Tables of
   short keys find pairs.
2. The hashes of a pair differ in few bits, and their frequencies agree.
3. The drawn lines lie on each other, by the correlation of edge strength in the best window. A
   recoloured copy has other colours and the same lines. Two pictures of one character do not.

Pairs of two labels are compared once more, before a line says that one label is probably wrong.

Pictures come as gray thumbnails u8 (n, 32, 32), 1 KB each, which may stay in a file. Memory holds
the hashes and their tables, some 250 bytes a picture (results/TRIED.md), and the work grows about as
n log n.
"""

import os
from collections import defaultdict
from itertools import product

import numpy as np
from PIL import Image

from ingest.decode import on_paper, open_image

SIDE, FREQUENCIES, FLIPS, TABLES = 32, 8, 3, 8
MOST = 2**26  # pictures
BITS = FREQUENCIES**2 - 1  # without the mean
MOST_BITS = 14  # of 63 that may differ; copies differ in up to 12, others in 31 on average
WAVES_ALIKE = 0.7  # cosine of the 63 whitened frequencies
LINES_ALIKE = 0.75  # correlation of edges that makes a copy
# Correlation of Laplacians that makes a sure one: 99 % of cropped copies and all others have more,
# and none of 59 pairs of drawn characters that are taken for copies.
DETAILS_ALIKE = 0.57
MIN_REFINE_CORR = 0.4  # correlation of edges that makes a window worth moving
FULL = np.array([0.0, 0.0, 1.0, 1.0])  # a window: top, left, height, width as shares of the picture
CROPS = [(s, y, x) for s in (0.95, 0.9) for y in (0, 0.5, 1) for x in (0, 0.5, 1)]
# Mirrored copies are found as whole pictures alone. With mirrored crops, too, 70 more pairs of the demo
# set would be joined, whose heads are symmetric (results/TRIED.md).
MIRRORED = [0, 1, 1, -1]  # it begins at the right, and goes to the left
WINDOWS = np.array([FULL, *([(1 - s) * y, (1 - s) * x, s, s] for s, y, x in CROPS), MIRRORED])


def thumbnail(data):
    """Bytes of an image file -> gray u8 (32, 32), JPEGs are decoded at a fraction of their size."""
    with open_image(data, 2 * SIDE) as (img, _):
        img = img.resize((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=2.0)
    return np.asarray(on_paper(img).convert("L"))  # the copy may have been flattened


def join(n, pairs):
    """Pairs (i, j) of 0..n-1 that belong together -> n roots, the smallest of each group."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    i, j = np.reshape(pairs, (-1, 2)).astype(int).T
    _, group = connected_components(coo_array((np.ones(len(i)), (i, j)), (n, n)), directed=False)
    first = np.unique(group, return_index=True)[1]
    return first[group].tolist()


def resampling(start, length):
    """(m,) start and length in shares -> weights (m, 32, 32), a row for each output pixel."""
    centre = start[:, None] * SIDE + (np.arange(SIDE) + 0.5) * length[:, None] - 0.5
    weight = np.maximum(0, 1 - np.abs(np.arange(SIDE) - centre[:, :, None]))
    return np.float32(weight / weight.sum(2, keepdims=True))


def edges(pictures):
    """(m, 32, 32) -> (m, 1024): square root of the gradient's length, mean 0 and norm 1."""
    dy, dx = np.gradient(pictures.astype(np.float32), axis=(1, 2))
    return unit(np.sqrt(np.hypot(dy, dx)))


def details(pictures):
    """(m, 32, 32) -> (m, 1024): the Laplacian, which has a sign where edges have none, as `edges`."""
    p = np.pad(pictures.astype(np.float32), ((0, 0), (1, 1), (1, 1)), "edge")
    sides = p[:, 2:, 1:-1] + p[:, :-2, 1:-1] + p[:, 1:-1, 2:] + p[:, 1:-1, :-2]
    return unit(sides - 4 * p[:, 1:-1, 1:-1])


def unit(e):
    """(m, 32, 32) -> (m, 1024), each with mean 0 and norm 1."""
    e = e.reshape(len(e), SIDE * SIDE)
    e = e - e.mean(1, keepdims=True)
    return e / np.maximum(np.linalg.norm(e, axis=1, keepdims=True), 1e-6)


def frequencies(thumbs, window):
    """(m, 32, 32) -> the lowest cosine coefficients of a window, (m, 63), median 0."""
    i = np.arange(SIDE) + 0.5
    basis = np.float32(np.cos(np.pi / SIDE * i * np.arange(FREQUENCIES)[:, None]))  # DCT-II
    rows, columns = (basis @ resampling(window[None, a], window[None, a + 2])[0] for a in (0, 1))
    whitening = np.hypot(*np.indices((FREQUENCIES, FREQUENCIES)))
    c = (rows @ thumbs.astype(np.float32) @ columns.T) * whitening
    c = c.reshape(len(thumbs), FREQUENCIES**2)[:, 1:]
    c -= np.median(c, 1, keepdims=True)
    return np.float32(c / np.maximum(np.linalg.norm(c, axis=1, keepdims=True), 1e-6))


def packed(signs):
    """bool (m, up to 63) -> i64 (m)."""
    return signs @ (1 << np.arange(signs.shape[1], dtype=np.int64))


def keys_of(c, bits):
    """(m, 63) -> keys (m, 8): a table's bits, with the FLIPS least certain flipped every way."""
    unsure = np.argsort(np.abs(c[:, bits]), axis=1, kind="stable")[:, :FLIPS]
    ways = np.array([[w >> k & 1 for k in range(FLIPS)] for w in range(2**FLIPS)])
    return packed(c[:, bits] > 0)[:, None] ^ ((1 << unsure.astype(np.int64)) @ ways.T)


def tables(hashes):
    """Yield (bits of the hash that a table uses, its sorted keys (n), their pictures (n)).

    The more pictures, the longer the key, so that few share one.
    """
    length = int(np.clip(np.ceil(np.log2(max(len(hashes), 2))) + 3, 12, 24))
    for t in range(TABLES):
        bits = np.sort(np.random.default_rng(t).permutation(BITS)[:length])
        key = np.zeros(len(hashes), np.uint32)
        for place, bit in enumerate(bits):
            key |= (hashes >> bit & 1).astype(np.uint32) << np.uint32(place)
        order = np.argsort(key, kind="stable").astype(np.uint32)
        yield bits, key[order], order


def matches(key, ask, most):
    """Where sorted keys (n) equal those of `ask` (m, ways) -> positions, rows of ask."""
    first = np.searchsorted(key, ask)
    last = np.searchsorted(key, ask, "right")
    row, way = np.nonzero(last > first)
    count = np.minimum(last - first, most)[row, way]
    first = first[row, way]
    before = np.repeat(np.cumsum(count) - count, count)
    step = np.arange(count.sum()) - before  # 0, 1, .. of each key
    return np.repeat(first, count) + step, np.repeat(row, count)


def lookup(c, built, hashes, most):
    """Frequencies (m, 63) -> i, j: picture i and row j have hashes of few differing bits."""
    ask = packed(c > 0)
    codes = []
    for bits, key, order in built:
        at, j = matches(key, keys_of(c, bits).astype(np.uint32), most)
        i = order[at].astype(np.int64)
        differing = np.unpackbits((hashes[i] ^ ask[j])[:, None].view(np.uint8), axis=1).sum(1)
        codes.append((i * MOST + j)[differing <= MOST_BITS])
    return np.divmod(np.unique(np.concatenate(codes)), MOST)


def candidates(thumbs, most=16, size=4096):
    """Yield rows (i, j, w, cosine): picture i looks like window w of picture j, after step 2.

    For each `size` pictures j only their best windows stay. At most `most` pictures of one key are
    looked at: pictures almost blank share it by the thousand.
    """
    starts = range(0, len(thumbs), size)
    parts = (frequencies(thumbs[at : at + size], FULL) > 0 for at in starts)
    hashes = np.concatenate([packed(part) for part in parts])
    built = list(tables(hashes))
    for start in starts:
        rows = []
        some = np.array(thumbs[start : start + size])
        for w, window in enumerate(WINDOWS):
            c = frequencies(some, window)
            i, j = lookup(c, built, hashes, most)
            cosine = (frequencies(thumbs[i], FULL) * c[j]).sum(1)
            near = (cosine > WAVES_ALIKE) & (i != j + start)
            rows.append(np.stack([i, j + start, np.full(len(i), w), cosine], 1)[near])
        yield best_window(np.concatenate(rows))


def best_window(rows):
    """Rows (i, j, w, cosine) -> of each pair, either way round, the row with the highest cosine."""
    rows = rows[np.lexsort((rows[:, 2], rows[:, 0], -rows[:, 3]))]
    pair = np.sort(rows[:, :2], 1)
    _, first = np.unique(pair[:, 0] * MOST + pair[:, 1], return_index=True)
    return rows[first]


def alike(thumbs, i, j, windows, lines=edges):
    """Correlation (m) of the lines of pictures i with those of windows of pictures j."""
    rows, columns = (resampling(windows[:, a], windows[:, a + 2]) for a in (0, 1))
    crops = rows @ thumbs[j].astype(np.float32) @ columns.transpose(0, 2, 1)
    return (lines(thumbs[i]) * lines(crops)).sum(1)


def fitted(thumbs, i, j, windows, lines=edges):
    """Move the sides of windows while the lines fit better -> the best correlation."""
    corners = np.c_[windows[:, :2], windows[:, :2] + windows[:, 2:]]
    best = alike(thumbs, i, j, windows, lines)
    for step, edge, way in product((0.04, 0.02, 0.02, 0.01, 0.01), range(4), (-1, 1)):
        moved = corners.copy()
        moved[:, edge] = np.clip(moved[:, edge] + way * step, 0, 1)
        score = alike(thumbs, i, j, np.c_[moved[:, :2], moved[:, 2:] - moved[:, :2]], lines)
        corners[score > best] = moved[score > best]
        best = np.maximum(best, score)
    return best


def pairs(thumbs):
    """Thumbnails u8 (n, 32, 32) -> sorted pairs (i, j), i < j. Blank pictures are left out."""
    if not len(thumbs):
        return []
    joined = set()
    rows = best_window(np.concatenate(list(candidates(thumbs))))[:, :3].astype(int)
    for start in range(0, len(rows), 2048):
        i, j, w = rows[start : start + 2048].T
        score = alike(thumbs, i, j, WINDOWS[w])
        # a better window may still lift these
        near = np.nonzero((score > MIN_REFINE_CORR) & (score <= LINES_ALIKE))[0]
        score[near] = fitted(thumbs, i[near], j[near], WINDOWS[w[near]])
        same = score > LINES_ALIKE
        joined |= set(map(tuple, np.sort(np.stack([i[same], j[same]], 1), 1).tolist()))
    return sorted(joined)


def judge(thumbs, records, pairs):
    """-> {pair of two labels: do its details lie on each other, too?}. A pair takes some 3 ms."""
    mixed = [(i, j) for i, j in pairs if records[i].label != records[j].label]
    found = {}
    for start in range(0, len(mixed), 64):
        some = mixed[start : start + 64]
        both = [way for i, j in some for way in ((i, j), (j, i))]  # either may be a crop
        i, j = np.repeat(both, len(WINDOWS), 0).T
        windows = np.tile(WINDOWS, (len(both), 1))
        score = alike(thumbs, i, j, windows, details).reshape(len(some), -1)
        best = score.argmax(1) + np.arange(len(some)) * score.shape[1]
        score = fitted(thumbs, i[best], j[best], windows[best], details)
        found |= dict(zip(some, (score > DETAILS_ALIKE).tolist(), strict=True))
    return found


def report(records, pairs, judged, most=3):
    """Lines for the user: how many groups, and the largest of them by name."""
    groups = defaultdict(list)
    roots = join(len(records), pairs)
    for root, record in zip(roots, records, strict=True):
        groups[root].append(record)
    order = sorted((g for g in groups if len(groups[g]) > 1), key=lambda g: -len(groups[g]))
    if not order:
        return []
    mixed = {}  # of each group of several classes a pair, which is sure if any is
    for pair in sorted(judged, key=judged.get, reverse=True):
        mixed.setdefault(roots[pair[0]], pair)
    mixed = [mixed[root] for root in order if root in mixed]
    several = ""
    for sure, why in ((True, "so one label is probably wrong"), (False, "but may only be alike")):
        named = [f"{records[i].key} = {records[j].key}" for i, j in mixed if judged[i, j] == sure]
        if named:
            several += f"; {len(named)} hold several classes, {why} ({', '.join(named[:most])})"
    if any(records[i].key.count("/") > 1 for i, _ in mixed):
        several += ", and if another level of folders is the class, --layout says so"
    first = ", ".join(f"{len(groups[g])} x {groups[g][0].key}" for g in order[:most])
    count = f"{len(order)} groups of {sum(len(groups[g]) for g in order)} images"
    return [f"near-duplicates: {count}{several}; {first}; duplicates.csv lists all pairs"]


def rows(records, pairs, kept, root):
    """Rows of duplicates.csv, one for each pair: both paths and labels, and which of the two left the set.

    Those of two labels come first, because one of the two may be wrong. kept: the records that stay;
    root: the folder of the source.
    """
    stay = {record.key for record in kept}
    table = []
    for i, j in sorted(pairs, key=lambda pair: records[pair[0]].label == records[pair[1]].label):
        row, gone = {}, []
        for name, record in (("picture", records[i]), ("copy", records[j])):
            row[name] = path_of(record, root)
            row[f"label of {name}"] = record.label or ""
            gone += [name] * (record.key not in stay)
        table.append(row | {"left out": " and ".join(gone)})
    return table


def path_of(record, root):
    """The path of a record's picture; inside an archive its name there."""
    path = os.path.join(root, str(record.place))
    return path if os.path.exists(path) else record.key
