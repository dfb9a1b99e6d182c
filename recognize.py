"""Stage 5: name the character in a picture, or say that it is nobody known; enrol new ones; measure how well it does.

    python recognize.py runs/NAME IMAGE...                    files, folders, archives, or - for a list on stdin
    python recognize.py runs/NAME --enrol WHO IMAGE...        three to five pictures, and nothing is trained
    python recognize.py runs/NAME --verify --data datasets/X  the same person or not, and strangers

Reads:  runs/NAME/ head.safetensors, gallery.safetensors and what finetune_lora.py wrote beside them
Writes: gallery.safetensors (--enrol); recognize.json, roc.png (--verify); names go to standard output, a line a picture

The trained head names the characters that it learned. An enrolled one has no place in the head: it wins where its
centroid in the gallery is nearer (by cosine) than that of every trained character. Below the threshold that
finetune_lora.py calibrated a face is unknown.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
from common import metrics, plots
from common.classifier import load_classifier, load_gallery, pooled_of, save_gallery
from common.io import UserError, cli, save_json
from common.train import autocast_of, command, commit, machine, pick_device, pick_dtype
from ingest import pack, sources
from ingest.decode import decode

FEW, PAIRS_OF = 3, 4000  # pictures that an enrolment needs; images of which all pairs are compared, at most
RATES = (0.001, 0.01, 0.1)  # false positive, and false alarm rates that are reported


# fmt: off
def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", metavar="runs/NAME", help="what finetune_lora.py wrote")
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="file, folder, zip, tar, or - for a list of files")
    add = parser.add_argument
    add("--threshold", type=float, metavar="COSINE", help="below it a face is unknown (default: as calibrated)")
    add("--json", action="store_true", help="print a JSON object a picture")
    add("--nearest", type=int, default=3, metavar="N", help="gallery faces that are named beside each answer")
    add("--crop", choices=pack.CROPS, help="square that is looked at, as in data.py (default: as it was trained)")
    add("--enrol", metavar="WHO", help="add a character, or pictures of an enrolled one, to the gallery")
    add("--verify", action="store_true", help="measure verification and strangers on a packed set")
    add("--data", metavar="DIR", help="of --verify (default: what it was trained on)")
    add("--eval-on", default="val", choices=["val", "dev", "test", "train"], help="split of --verify")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--dtype", default="auto", choices=["auto", "bf16", "fp32"], help="of the matrix products")
    return parser.parse_intermixed_args()  # pictures may stand before and after flags
# fmt: on


def check(args):
    if args.verify and (args.images or args.enrol):
        raise UserError("--verify takes no pictures but a packed set: --data datasets/NAME")
    if not args.verify and not args.images:
        raise UserError("give pictures to name: files, folders, archives, or - for a list on standard input")
    if args.threshold is not None and not -1 <= args.threshold <= 1:
        raise UserError(f"--threshold {args.threshold} is a cosine and must lie between -1 and 1")
    if args.nearest < 0 or args.enrol is not None and not args.enrol.strip():
        raise UserError("--nearest must be 0 or more" if args.nearest < 0 else "--enrol needs a name")


# ---- pictures ------------------------------------------------------------------------------------------------------


def open_pictures(path):
    """One argument -> records and fetch, as ingest/sources.py has them; a single file is a picture."""
    file = Path(path)
    if path != "-" and file.is_file() and (sources.is_image(file.name) or not archive_or_list(file)):
        return [sources.Record(path, str(file.resolve()))], sources.fetch_files("/")
    return sources.find(path)[:2]


def archive_or_list(path):
    try:
        return sources.reader_of(path) is not None
    except UserError:
        return False


def pictures(args, header, problems):
    """Yield (key, u8 (size, size, 3)) of all that can be read, cut as in training; what can't is noted in problems."""
    size, margin = header["packed_size"], header.get("margin", 0.1)
    crop = args.crop or header.get("crop", "centre")
    look = lambda r, b: decode(b, size, False, r.box, crop, margin)["images"]  # noqa: E731
    for path in args.images:
        try:
            records, fetch = open_pictures(path)
            for record, row in pack.worked(records, fetch, look):
                if isinstance(row, Exception):
                    reason = re.sub(r" <.*?>", "", " ".join(str(row).split()))[:100] or type(row).__name__
                    problems.append((record.key, f"{record.key} is not a picture that can be read: {reason}"))
                else:
                    yield record.key, row
        except UserError as problem:  # a hostile or broken archive, a path that is not there
            problems.append((path, str(problem)))


def in_batches(items, size):
    """Yield (keys, u8 (B, S, S, 3)) of at most `size` pictures."""
    keys, rows = [], []
    for key, row in items:
        keys.append(key)
        rows.append(row)
        if len(rows) == size:
            yield keys, torch.from_numpy(np.stack(rows))
            keys, rows = [], []
    if rows:
        yield keys, torch.from_numpy(np.stack(rows))


@torch.no_grad()
def look_at(net, images, S, autocast):
    """images u8 (B, ., ., 3) -> logits (B, C) and embeddings (B, D) on the CPU."""
    rows = {"images": images.numpy()}
    embeddings = net.neck(pooled_of(net, rows, torch.arange(len(images)), S, autocast).to(net.encoder.cls_token.device))
    return net.head(embeddings).cpu(), embeddings.cpu()


# ---- names ---------------------------------------------------------------------------------------------------------


def answers(keys, logits, embeddings, gallery, threshold, nearest):
    """-> a dict for each picture: who it is, how sure that is, and the gallery faces nearest to it."""
    unit, trained = F.normalize(embeddings), logits.shape[1]
    to_class, to_face = unit @ gallery["centroids"].T, unit @ gallery["unit"].T  # (B, classes), (B, faces)
    sure = (logits / gallery["temperature"]).softmax(1)
    cosine_sure = (to_class / gallery["cosine_temperature"]).softmax(1)
    rows = []
    for i, key in enumerate(keys):
        best = int(to_class[i].argmax())
        enrolled = best >= trained
        who = best if enrolled else int(logits[i].argmax())
        faces = [
            {
                "name": gallery["names"][gallery["labels"][j]],
                "picture": gallery["keys"][j],
                "cosine": round(to_face[i, j].item(), 4),
            }
            for j in to_face[i].topk(min(nearest, to_face.shape[1]))[1]
        ]
        known = to_class[i, best].item() >= threshold
        rows.append({"picture": key, "name": gallery["names"][who] if known else None, "known": known,
                     "confidence": round((cosine_sure if enrolled else sure)[i, who].item(), 4),
                     "cosine": round(to_class[i, best].item(), 4), "best_guess": gallery["names"][who],
                     "nearest": faces})  # fmt: skip
    return rows


def in_words(row, threshold):
    faces = ", ".join(f"{f['picture']} {f['cosine']:.2f}" for f in row["nearest"])
    who = (f"{row['name']}, confidence {row['confidence']:.0%}, cosine {row['cosine']:.2f}" if row["known"] else
           f"unknown (most like {row['best_guess']}, cosine {row['cosine']:.2f} under {threshold:.2f})")  # fmt: skip
    return f"{row['picture']}: {who}" + (f"; nearest: {faces}" if faces else "")


def recognise(args, net, header, gallery, autocast):
    threshold, problems, named = args.threshold, [], 0
    threshold = gallery["threshold"] if threshold is None else threshold
    found = pictures(args, header, problems)
    for keys, images in in_batches(found, data.CHUNK):
        logits, embeddings = look_at(net, images, header["image_size"], autocast)
        for row in answers(keys, logits, embeddings, gallery, threshold, args.nearest):
            print(json.dumps(row, ensure_ascii=False) if args.json else in_words(row, threshold), flush=True)
        named += len(keys)
    if not named:
        more = f" (and {len(problems) - 1} more like it)" if len(problems) > 1 else ""
        raise UserError(problems[0][1] + more if problems else "no picture was given")
    for key, problem in problems:
        print(f"skipped: {problem}", file=sys.stderr)
        if args.json:
            print(json.dumps({"picture": key, "error": problem}, ensure_ascii=False))


def enrol(args, net, header, gallery, autocast):
    """Add the embeddings of these pictures to the gallery, under one name."""
    who, names, problems = args.enrol.strip(), gallery["names"], []
    if who in header["classes"]:
        raise UserError(f"{who} was learned in training and is known already; enrol another name")
    new, keys = [], []
    for some, images in in_batches(pictures(args, header, problems), data.CHUNK):
        new.append(look_at(net, images, header["image_size"], autocast)[1])
        keys += some
    if problems:
        raise UserError(f"{problems[0][1]}; nobody was enrolled")
    if len(keys) < FEW and who not in names:
        raise UserError(f"{len(keys)} pictures are too few to know {who} by; give {FEW} to 5 different ones")
    names = names if who in names else [*names, who]
    embeddings = torch.cat([gallery["embeddings"], *new])
    labels = torch.cat([gallery["labels"], torch.full((len(keys),), names.index(who))])
    calibrated = ("threshold", "false_accept", "false_reject", "by", "temperature", "cosine_temperature")
    about = {k: gallery[k] for k in calibrated}
    save_gallery(Path(args.run) / "gallery.safetensors", embeddings, labels, names, gallery["keys"] + keys, about)
    count = int((labels == names.index(who)).sum())
    print(f"{who} is enrolled with {count} pictures; the gallery knows {len(names)} characters")


# ---- how far to trust it -------------------------------------------------------------------------------------------


def verification(embeddings, labels, groups):
    """All pairs of pictures: is it the same character? -> numbers in percent, and the scores for the curves."""
    same, other = metrics.pair_cosines(embeddings, labels, groups)
    if len(same) == 0 or len(other) == 0:
        raise UserError("verification needs two characters or more, and one with two illustrations or more")
    row = {f"tpr_at_fpr_{100 * r:g}": round(100 * metrics.tpr_at_fpr(same, other, r), 3) for r in RATES}
    row |= {"roc_auc": round(100 * metrics.roc_auc(same, other), 3),
            "eer": round(100 * metrics.equal_error_rate(same, other), 3),
            "average_precision": round(100 * metrics.ranked_precision(same, other), 3),
            "positive_pairs": len(same), "negative_pairs": len(other)}  # fmt: skip
    return row, (same, other)


def open_set(known, right, strangers, threshold):
    """Cosine to the nearest character: of known faces (and whether they are named rightly), and of strangers."""
    row = {"auroc_unknown": round(100 * metrics.roc_auc(known, strangers), 3), "known": len(known),
           "strangers": len(strangers), "threshold": threshold,
           "false_accept_at_threshold": round(100 * (strangers >= threshold).float().mean().item(), 3),
           "known_rejected_at_threshold": round(100 * (known < threshold).float().mean().item(), 3)}  # fmt: skip
    for rate in RATES:
        row[f"dir_at_far_{100 * rate:g}"] = round(100 * metrics.detection_rate(known, right, strangers, rate), 3)
    return row


def verify(args, net, header, gallery, autocast, device):
    """recognize.json and roc.png: the same embeddings, asked whether two faces are one person, and who is unknown."""
    folder = data.open_or_pack(args.data or header["data"])
    split = data.open_split(folder, args.eval_on)
    if not data.has_labels(split):
        raise UserError(f"{folder} has no labels on all pictures of {args.eval_on}: nothing to verify by")
    rows = torch.linspace(0, len(split["images"]) - 1, min(PAIRS_OF, len(split["images"]))).long()
    pooled = pooled_of(net, split, rows, header["image_size"], autocast, "faces")
    with torch.no_grad():
        embeddings = net.neck(pooled.to(device))
        logits, embeddings = net.head(embeddings).cpu(), embeddings.cpu()
    groups = np.array(split["header"]["groups"] or split["header"]["keys"])[rows.numpy()]
    groups = torch.from_numpy(np.unique(groups, return_inverse=True)[1])
    pairs, curves = verification(embeddings, split["labels"][rows], groups)
    ids = {name: i for i, name in enumerate(header["classes"])}
    own = torch.tensor([ids.get(name, -1) for name in split["header"]["classes"]])[split["labels"][rows]]
    cosine = (F.normalize(embeddings) @ gallery["centroids"].T).amax(1)
    known, row = own >= 0, {"run": str(args.run), "data": str(folder), "split": args.eval_on, "verification": pairs}
    if known.any() and (~known).any():
        right = logits[known].argmax(1) == own[known]
        threshold = gallery["threshold"] if args.threshold is None else args.threshold
        row["open_set"] = open_set(cosine[known], right, cosine[~known], threshold)
    row |= {"command": command(), "machine": machine(device), "commit": commit()}
    strangers = (cosine[known], cosine[~known]) if "open_set" in row else None
    plots.trust(Path(args.run) / "roc.png", curves, strangers, f"{Path(args.run).name} on {folder.name}")
    save_json(row, Path(args.run) / "recognize.json")
    print(json.dumps({k: row[k] for k in ("verification", "open_set") if k in row}, indent=1))
    if "open_set" not in row:
        print("no strangers in this set: finetune_lora.py --hold-out 4 leaves four characters out of training")
    print(f"wrote {args.run}/recognize.json, roc.png")


def main():
    args = parse_args()
    check(args)
    device = pick_device(args.device)
    dtype, _ = pick_dtype(args.dtype, device)
    autocast = autocast_of(device, dtype)
    net, header = load_classifier(args.run)
    net.to(device)
    gallery = load_gallery(args.run)
    if args.verify:
        verify(args, net, header, gallery, autocast, device)
    else:
        (enrol if args.enrol else recognise)(args, net, header, gallery, autocast)


if __name__ == "__main__":
    cli(main)
