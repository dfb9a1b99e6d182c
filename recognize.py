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

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
from common import metrics
from common.classifier import load_classifier, load_gallery, pooled_of, predict, save_gallery
from common.command import Parser, at_least, between, cli, command
from common.features import groups_of
from common.io import UserError, save_json
from common.train import autocast_of, commit, machine, pick_device, pick_dtype
from ingest import pack, sources
from ingest.decode import decode, reason

FEW, PAIRS_OF = 3, 4000  # pictures that an enrolment needs; images of which all pairs are compared, at most
FALSE_RATES = (0.001, 0.01, 0.1)  # of false positives, and of false alarms, that are reported


def parse_args():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("run", metavar="runs/NAME", help="what finetune_lora.py wrote")
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="file, folder, zip, tar, or - for a list of files")
    add = parser.add_argument
    add("--threshold", type=between(-1, 1), metavar="COSINE", help="a face below it is unknown (default: calibrated)")
    add("--json", action="store_true", help="print a JSON object a picture")
    add("--nearest", type=at_least(0), default=3, metavar="N", help="gallery faces that are named beside each answer")
    add("--crop", choices=pack.CROPS, help="the square that is used, as in data.py (default: as it was trained)")
    add("--enrol", metavar="WHO", help="add a character, or pictures of an enrolled one, to the gallery")
    add("--verify", action="store_true", help="measure verification and strangers on a packed set")
    add("--data", metavar="DIR", help="of --verify (default: what it was trained on)")
    add("--eval-on", default="val", choices=["val", "dev", "test", "train"], help="split of --verify")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--dtype", default="auto", choices=["auto", "bf16", "fp32"], help="of the matrix products")
    return parser.parse_intermixed_args()  # pictures may stand before and after flags


def is_picture(path):
    """A file that is no archive and no list is taken for a picture, whatever its name."""
    try:
        return path.is_file() and (sources.is_image(path.name) or not sources.reader_of(path))
    except UserError:
        return True


def pictures(args, header, problems):
    """Yield (key, u8 (size, size, 3)) of all that can be read, cut as in training; what can't is noted in problems."""
    size, margin = header["packed_size"], header.get("margin", 0.1)
    crop = args.crop or header.get("crop", "centre")
    work = lambda r, b: decode(b, size, False, r.box, crop, margin)["images"]  # noqa: E731
    for path in args.images:
        try:
            if path != "-" and is_picture(Path(path)):
                records, fetch = [sources.Record(path, str(Path(path).resolve()))], sources.fetch_files
            else:
                records, fetch, _ = sources.find(path, layout="-")
            for record, row in pack.decode_records(records, fetch, work):
                if isinstance(row, Exception):
                    problems.append((record.key, f"{record.key} is not a picture that can be read: {reason(row)}"))
                else:
                    yield record.key, row
        except UserError as problem:  # a hostile or broken archive, a path that is not there
            problems.append((path, str(problem)))


def predictions(args, net, header, autocast, problems):
    """Yield (keys, logits (B, C), embeddings (B, D)) of the pictures, in batches."""
    items = pictures(args, header, problems)
    while some := list(itertools.islice(items, data.CHUNK)):
        keys, images = zip(*some, strict=True)
        pooled = pooled_of(net, {"images": np.stack(images)}, torch.arange(len(keys)), header["image_size"], autocast)
        yield list(keys), *predict(net, pooled)


def answers(keys, logits, embeddings, gallery, threshold, nearest):
    """-> a dict for each picture: who it is, how sure that is, and the gallery faces nearest to it."""
    unit, trained = F.normalize(embeddings), logits.shape[1]
    to_class, to_face = unit @ gallery["centroids"].T, unit @ gallery["unit"].T  # (B, classes), (B, faces)
    confidence = (logits / gallery["temperature"]).softmax(1)
    by_cosine = (to_class / gallery["cosine_temperature"]).softmax(1)
    rows = []
    for i, key in enumerate(keys):
        cosine, best = (x.item() for x in to_class[i].max(0))
        who, sure = (best, by_cosine) if best >= trained else (int(logits[i].argmax()), confidence)
        name, known = gallery["names"][who], cosine >= threshold
        faces = [{"name": gallery["names"][gallery["labels"][j]], "picture": gallery["keys"][j],
                  "cosine": round(to_face[i, j].item(), 4)}
                 for j in to_face[i].topk(min(nearest, to_face.shape[1]))[1]]  # fmt: skip
        rows.append({"picture": key, "name": name if known else None, "known": known,
                     "confidence": round(sure[i, who].item(), 4), "cosine": round(cosine, 4), "best_guess": name,
                     "nearest": faces})  # fmt: skip
    return rows


def in_words(row, threshold):
    faces = ", ".join(f"{f['picture']} {f['cosine']:.2f}" for f in row["nearest"])
    who = (f"{row['name']}, confidence {row['confidence']:.0%}, cosine {row['cosine']:.2f}" if row["known"] else
           f"unknown (most like {row['best_guess']}, cosine {row['cosine']:.2f} under {threshold:.2f})")  # fmt: skip
    return f"{row['picture']}: {who}" + (f"; nearest: {faces}" if faces else "")


def recognise(args, net, header, gallery, autocast):
    """Print who is in each picture; those that can't be read are named on stderr."""
    problems, count = [], 0
    for keys, logits, embeddings in predictions(args, net, header, autocast, problems):
        for row in answers(keys, logits, embeddings, gallery, args.threshold, args.nearest):
            print(json.dumps(row, ensure_ascii=False) if args.json else in_words(row, args.threshold), flush=True)
        count += len(keys)
    if not count:
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
    found = list(predictions(args, net, header, autocast, problems))
    new = [key for keys, _, _ in found for key in keys]
    if problems:
        raise UserError(f"{problems[0][1]}; nobody was enrolled")
    if len(new) < FEW and who not in names:
        raise UserError(f"{len(new)} pictures are too few to know {who} by; give {FEW} to 5 different ones")
    names = names if who in names else [*names, who]
    embeddings = torch.cat([gallery["embeddings"], *(x for _, _, x in found)])
    labels = torch.cat([gallery["labels"], torch.full((len(new),), names.index(who))])
    calibrated = ("threshold", "false_accept", "false_reject", "by", "temperature", "cosine_temperature")
    about = {k: gallery[k] for k in calibrated}
    save_gallery(Path(args.run) / "gallery.safetensors", embeddings, labels, names, gallery["keys"] + new, about)
    count = int((labels == names.index(who)).sum())
    print(f"{who} is enrolled with {count} pictures; the gallery knows {len(names)} characters")


def percent(shares):
    return {k: round(100 * float(share), 3) for k, share in shares.items()}


def verification(same, other):
    """Cosines of all pairs of pictures, of one character and of two: can they be told apart? -> figures in percent."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    if len(same) == 0 or len(other) == 0:
        raise UserError("verification needs two characters or more, and one with two illustrations or more")
    shares = {f"tpr_at_fpr_{100 * r:g}": metrics.tpr_at_fpr(same, other, r) for r in FALSE_RATES}
    pairs = metrics.truth_and_scores(same, other)
    shares |= {"roc_auc": roc_auc_score(*pairs), "eer": metrics.equal_error_rate(same, other),
               "average_precision": average_precision_score(*pairs)}  # fmt: skip
    return percent(shares) | {"positive_pairs": len(same), "negative_pairs": len(other)}


def open_set(known, right, strangers, threshold):
    """Cosine to the nearest character: of known faces (and whether they are named rightly), and of strangers."""
    from sklearn.metrics import roc_auc_score

    counts = {"known": len(known), "strangers": len(strangers), "threshold": threshold}
    shares = {"false_accept_at_threshold": (strangers >= threshold).float().mean().item(),
              "known_rejected_at_threshold": (known < threshold).float().mean().item()}  # fmt: skip
    shares |= {f"dir_at_far_{100 * r:g}": metrics.detection_rate(known, right, strangers, r) for r in FALSE_RATES}
    auroc = roc_auc_score(*metrics.truth_and_scores(known, strangers))
    return percent({"auroc_unknown": auroc}) | counts | percent(shares)


def verify(args, net, header, gallery, autocast):
    """recognize.json and roc.png: do two faces show one character, and who is unknown? By the same embeddings."""
    from common import plots  # matplotlib takes half a second to load

    folder = data.open_or_pack(args.data or header["data"])
    split = data.open_split(folder, args.eval_on)
    if not data.has_labels(split):
        raise UserError(f"{folder} has no labels on all pictures of {args.eval_on}: nothing to verify by")
    rows = data.evenly_spaced(len(split["images"]), PAIRS_OF)
    logits, embeddings = predict(net, pooled_of(net, split, rows, header["image_size"], autocast, "faces"))
    pairs = metrics.pair_cosines(embeddings, split["labels"][rows], groups_of(split)[rows])
    row = {"run": str(args.run), "data": str(folder), "split": args.eval_on, "verification": verification(*pairs)}
    ids = {name: i for i, name in enumerate(header["classes"])}
    own = torch.tensor([ids.get(name, -1) for name in split["header"]["classes"]])[split["labels"][rows]]
    cosine, known = (F.normalize(embeddings) @ gallery["centroids"].T).amax(1), own >= 0
    strangers = (cosine[known], cosine[~known]) if known.any() and (~known).any() else None
    if strangers:
        right = logits[known].argmax(1) == own[known]
        row["open_set"] = open_set(cosine[known], right, cosine[~known], args.threshold)
    row |= {"command": command(), "machine": machine(net.encoder.cls_token.device), "commit": commit()}
    plots.plot_verification(Path(args.run) / "roc.png", pairs, strangers, f"{Path(args.run).name} on {folder.name}")
    save_json(row, Path(args.run) / "recognize.json")
    print(json.dumps({k: row[k] for k in ("verification", "open_set") if k in row}, indent=1))
    if not strangers:
        print("no strangers in this set: finetune_lora.py --hold-out 4 leaves four characters out of training")
    print(f"wrote {args.run}/recognize.json, roc.png")


def main():
    args = parse_args()
    if args.verify and (args.images or args.enrol):
        raise UserError("--verify takes no pictures but a packed set: --data datasets/NAME")
    if not args.verify and not args.images:
        raise UserError("give pictures to name: files, folders, archives, or - for a list on standard input")
    if args.enrol is not None and not args.enrol.strip():
        raise UserError("--enrol needs a name")
    device = pick_device(args.device)
    dtype, _ = pick_dtype(args.dtype, device)
    net, header = load_classifier(args.run)
    gallery = load_gallery(args.run)
    args.threshold = gallery["threshold"] if args.threshold is None else args.threshold
    task = verify if args.verify else enrol if args.enrol else recognise
    task(args, net.to(device), header, gallery, autocast_of(device, dtype))


if __name__ == "__main__":
    cli(main)
