"""Stage 5, measured: does a recogniser notice that it has never seen a character?

    python -m apps.unknown runs/NAME                measures pairs of faces and unknown characters
    python -m apps.unknown runs/NAME --data OTHER   on another data set, such as one with new characters

Reads:  runs/NAME/ of finetune_lora.py with its gallery (apps/recognize.py); datasets/NAME
Writes: runs/NAME/ recognize.json (of other data or splits in runs/NAME/DATA-SPLIT/)
        the gallery where it is missing

It compares answers with the labels of a data set. How many faces of unknown characters are called
unknown, and how many of known ones? Can pairs of faces that show the same character be told from
other pairs (verification)? Do the groups of apps/sort.py --group agree with the characters, and is a
name as often right as its confidence says? For unknown characters the set has to contain some, so
give --data OTHER, or fine-tune with --hold-out.

A run that learned every picture of its set can't be measured on it. apps/learn.py did so before, by
cross-validation. For more, give --data OTHER with new pictures of the characters
that it knows, and of others: a set of others alone has no known faces to compare them with.

    n, m, k faces   D width of an embedding
"""

import contextlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import data
from apps.collection import BY_FOLDS
from apps.gallery import CELLS
from apps.groups import alike, likeness, pair_f1
from apps.recognize import PROMISE, open_recogniser, outputs_of, parser_of
from common import metrics
from common.checkpoints import place_of
from common.features import check_learned, place_of_learned, results_folder
from common.groups import groups_of
from common.locks import reserve
from common.train import UserError, cli, command, commit, machine, save_json

RADII = np.arange(0.05, 1, 0.05)  # cosine distances that `as_ccip` tries as eps of DBSCAN
PAIRS_OF = 4000  # images at most, because all pairs are compared
SURE = 0.8  # confidence of the names that `reliability` counts apart
FALSE_RATES = 0.001, 0.01, 0.1  # of false positives and false alarms that are reported


def parse_args():
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--data", metavar="DIR", help="a data set (default: what it was trained on)")
    add("--split", default="val", choices=["val", "dev", "test", "train"], help="of the data set")
    add("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


# ---- measured: the same character or not, and unknown characters ---------------------------------


def faces_of(net, gallery, folder, name, autocast):
    """Pictures of a packed split -> a namespace: the truth, and what `Gallery.decide` returns.

    unit     (n, D), whitened; colours (n, CELLS), their histograms
    labels   (n,), the set's, -1 of pictures without one; groups (n,)
    true     (n,), numbers of characters in the gallery, -1 of an unknown one
    right    (n,), is the name true?
    margin   (n,), and sure, as `decide`
    """
    split = data.open_split(folder, name)
    indices = data.evenly_spaced(len(split["images"]), PAIRS_OF)
    logits, embeddings = outputs_of(net, split, indices, autocast, f"faces of {folder}")
    ids = {who: i for i, who in enumerate(gallery.names)}
    known = [ids.get(who, -1) for who in split["header"]["classes"]]
    labels = split["labels"][indices]
    groups = groups_of(split)[indices]
    true = torch.tensor([*known, -1])[labels]  # the last: without a label
    who, _, margin, sure = gallery.decide(logits, embeddings)
    return SimpleNamespace(
        unit=gallery.whitened(embeddings),
        colours=embeddings[:, -CELLS:],
        labels=labels,
        groups=groups,
        true=true,
        right=who == true,
        margin=margin,
        sure=sure,
    )


def verification(same, other):
    """Cosines of pairs of one character (n,) and of two (m,): can they be told apart? In percent."""
    from sklearn.metrics import average_precision_score, roc_curve

    pairs = metrics.truth_and_scores(same, other)
    false, true, _ = roc_curve(*pairs, drop_intermediate=False)
    shares = {f"tpr_at_fpr_{100 * rate:g}": true[false <= rate].max() for rate in FALSE_RATES}
    shares["roc_auc"] = metrics.auroc(same, other)
    shares["eer"] = metrics.equal_error_rate(same, other)
    shares["average_precision"] = average_precision_score(*pairs)
    counts = {"positive_pairs": len(same), "negative_pairs": len(other)}
    return {name: round(100 * float(share), 3) for name, share in shares.items()} | counts


def open_set(known, right, enrolled, unknown):
    """Which pictures show unknown characters? In percent, of margins over the threshold.

    Margins of known (n,) and unknown (m,) ones; right (n,): is the name true; enrolled (n,): is it enrolled?
    """
    counts = {"known": len(known), "strangers": len(unknown), "enrolled": int(enrolled.sum())}
    named = (right & (known >= 0)).double()
    shares = {
        "top1": right.double().mean(),
        "known_rejected": (known < 0).double().mean(),
        "known_named_rightly": named.mean(),
    }
    if enrolled.any() and not enrolled.all():
        shares["enrolled_named_rightly"] = named[enrolled].mean()
    if len(unknown):
        for rate in FALSE_RATES:
            shares[f"dir_at_far_{100 * rate:g}"] = detection_rate(known, right, unknown, rate)
        shares["auroc_unknown"] = metrics.auroc(known, unknown)
        shares["strangers_unknown"] = (unknown < 0).double().mean()
        at_5 = known.quantile(0.05)  # the threshold that 5 % of the known fail
        shares["strangers_unknown_at_5"] = (unknown < at_5).double().mean()
    return {name: round(100 * float(share), 3) for name, share in shares.items()} | counts


def detection_rate(known, right, unknown, far):
    """Detection and identification rate at a false alarm rate of at most far < 1 (Phillips et al. 2011).

    Scores of known (n,) and unknown (m,) faces; right (n,): is the best name of a known one true?
    """
    allowed = int(far * len(unknown) + 1e-9)  # unknown faces that may get a name
    threshold = unknown.sort(descending=True).values[allowed]
    return ((known > threshold) & right).double().mean().item()


def reliability(known, is_right, unknown):
    """How true are confidences? In percent, where half of all pictures are unknown.

    known (n,), unknown (m,); is_right (n,), of the names of known ones. Those of enrolled ones have
    no confidence (nan).
    calibration_error: mean gap of confidence and accuracy in equal bins (Guo et al. 2017,
    arXiv:1706.04599). right_when_sure: of names with a confidence of SURE or more; None without any.
    """
    sure = torch.cat([known, unknown])
    right = F.pad(is_right.double(), (0, len(unknown)))
    weights = torch.cat([torch.ones(len(x)).double() / len(x) for x in (known, unknown)])
    there = ~sure.isnan()
    sure, right, weights = (x[there] for x in (sure, right, weights))
    bins = 10
    place = (sure * bins).long().clamp(0, bins - 1)
    gaps = torch.bincount(place, weights * (sure.double() - right))
    error = gaps.abs().sum() / weights.sum()
    good = ((known >= SURE) & is_right).double().mean()
    named = (known >= SURE).double().mean() + (unknown >= SURE).double().mean()
    share = round(100 * (good / named).item(), 3) if named else None
    return {"calibration_error": round(100 * error.item(), 3), "right_when_sure": share}


def grouping(pairs, labels):
    """`likeness` (n, n) of faces of characters (n,): do groups as of apps/sort.py --group agree with the truth?"""
    from sklearn.metrics import adjusted_rand_score

    groups = alike(pairs)
    scores = {
        "pair_f1": pair_f1(groups, labels),
        "adjusted_rand": 100 * adjusted_rand_score(labels, groups),
    }
    scores |= as_ccip(pairs, labels)
    return {name: round(float(value), 3) for name, value in scores.items()}


def as_ccip(cosines, labels):
    """The two measures of CCIP (huggingface.co/deepghs/ccip), in percent, of `likeness` (n, n) and labels (n,).

    F1 of the pairs that show one character, and the adjusted Rand index of DBSCAN's groups of two
    faces or more. Threshold and eps are the best ones for these very faces, so both are upper bounds.
    """
    from sklearn.cluster import DBSCAN
    from sklearn.metrics import adjusted_rand_score, precision_recall_curve

    one, two = torch.triu_indices(len(labels), len(labels), 1)
    precision, recall, _ = precision_recall_curve(labels[one] == labels[two], cosines[one, two])
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-9)
    distances = (1 - cosines).clamp(min=0).numpy()
    indices = []
    for eps in RADII:
        groups = DBSCAN(eps=eps, min_samples=2, metric="precomputed").fit_predict(distances)
        indices.append(adjusted_rand_score(labels, groups))
    return {"ccip_f1": 100 * f1.max(), "ccip_adjusted_rand": 100 * max(indices)}


def measure(asked, own, learned):
    """Two of `faces_of` -> what recognize.json says of them, as far as there is any.

    asked: of the set that is measured; pairs are of its labelled pictures. own: of a set
    with known characters. learned: by the head.
    """
    row = {}
    labelled = asked.labels >= 0
    faces = asked.unit[labelled], asked.labels[labelled], asked.groups[labelled]
    pairs = metrics.pair_cosines(*faces)
    if all(map(len, pairs)):
        row["verification"] = verification(*pairs)
    # A picture without a label may show anybody. Only where none has one, all are taken for unknown.
    is_unknown = (asked.true < 0) & (labelled | ~labelled.any())
    unknown = asked.margin[is_unknown]
    known = own.true >= 0
    enrolled = own.true >= learned
    to_group = is_unknown & labelled
    labels = asked.labels[to_group]
    if 1 < len(labels.unique()) < len(labels):  # else no two faces belong together, or all of them
        pairs = likeness(asked.unit[to_group], asked.colours[to_group])
        row["groups"] = grouping(pairs, labels)
    if known.any():
        row["open_set"] = open_set(own.margin[known], own.right[known], enrolled[known], unknown)
    of_head = known & ~enrolled
    if of_head.any() and len(unknown):
        row |= reliability(own.sure[of_head], own.right[of_head], asked.sure[is_unknown])
    return row


def cut_of(header):
    """How a set was cut, as --crop says it."""
    margin = f":margin={header['margin']:g}" if header.get("crop") == "figure" else ""
    return f"{header.get('crop')}{margin}"


def measure_run(args, net, header, gallery, autocast):
    """Write recognize.json. Of a set without known characters, those of the run's report are compared."""
    learned = place_of(header["data"], args.run)
    by_folds = header["split"] == BY_FOLDS
    folder = Path(data.open_or_pack(args.data or learned))
    if folder.resolve() == learned.resolve():
        if by_folds:
            fix = f"{args.run}/{PROMISE} says what was measured before; give --data OTHER"
            raise UserError(f"{args.run} learned every picture of {folder}; {fix}")
        check_learned(header, args.run, folder)
    home = results_folder(args.run, folder, args.split, learned)
    reserve([home / "recognize.json"], fix="choose another --data or --split")
    asked_cut, own_cut = cut_of(data.open_split(folder, args.split)["header"]), cut_of(header)
    if asked_cut != own_cut:
        fix = f"{args.run} learned from --crop {own_cut}: pack it so"
        print(f"note: {folder} was packed by --crop {asked_cut}, and {fix}", file=sys.stderr)
    asked = own = faces_of(net, gallery, folder, args.split, autocast)
    if (asked.true < 0).all() and data.splits_in(learned) and not by_folds:
        try:
            place = place_of_learned(header, args.run)
            own = faces_of(net, gallery, place, header["split"], autocast)
        except UserError as problem:
            print(f"note: no known characters are compared: {problem}", file=sys.stderr)
    measured = measure(asked, own, gallery.learned)
    if not measured:
        raise UserError(f"{folder} has no two labelled characters in {args.split} to measure")
    row = {
        "run": str(args.run),
        "data": str(folder),
        "split": args.split,
        "threshold": gallery.threshold,
        **measured,
        "command": command(),
        "commit": commit(),
        "machine": machine(net.encoder.cls_token.device),
    }
    save_json(row, home / "recognize.json")
    print(json.dumps(row, ensure_ascii=False) if args.json else "\n".join(table(row)))
    print(f"wrote {home}/recognize.json", file=sys.stderr)


LINES = (  # printed, from the numbers of recognize.json; a line whose number is missing is left out
    "{data}, {split}",
    "pairs of the same character or not: AUROC {roc_auc:.1f} %, equal error rate {eer:.1f} %",
    "{known:,} pictures of known characters: "
    "{known_named_rightly:.1f} % named correctly, {known_rejected:.1f} % called unknown",
    "{enrolled:,} of them of enrolled ones: {enrolled_named_rightly:.1f} % named correctly",
    "{strangers:,} pictures of unknown characters: {strangers_unknown:.1f} % called unknown, "
    "AUROC against known ones {auroc_unknown:.1f} %",
    "faces of unknown characters in groups: pair F1 {pair_f1:.1f} %, "
    "adjusted Rand index {adjusted_rand:.1f} %",
    "by CCIP's measures, at the best threshold for these faces: pair F1 {ccip_f1:.1f} %, "
    "adjusted Rand index {ccip_adjusted_rand:.1f} %",
    "calibration error of the confidence: {calibration_error:.1f} points",
    "right, of names with a confidence of 80 % or more: {right_when_sure:.1f} %",
    "no unknown characters in this set; --data OTHER, or finetune_lora.py --hold-out 4, has some",
)


def table(row):
    """recognize.json -> the lines that are printed."""
    numbers = row | row.get("verification", {}) | row.get("open_set", {}) | row.get("groups", {})
    lines = []
    for line in LINES if numbers.get("strangers") == 0 else LINES[:-1]:
        with contextlib.suppress(KeyError, TypeError):  # missing, or None
            lines.append(line.format_map(numbers))
    return lines


def main():
    args = parse_args()
    measure_run(args, *open_recogniser(args))


if __name__ == "__main__":
    cli(main)
