"""Stage 5: name the character in a picture, or say that it is nobody known; enrol new ones; measure how well it does.

    python recognize.py runs/NAME IMAGE...                    files, folders, archives, or - for a \\
        list on stdin
    python recognize.py runs/NAME IMAGE --tags runs/TAGS      and what it shows, by a run of tags.py
    python recognize.py runs/NAME PAGE --detect runs/DET      everybody on a page, by a run of \\
        detect.py
    python recognize.py runs/NAME --enrol WHO IMAGE...        three to five pictures, and nothing \\
        is trained
    python recognize.py runs/NAME --list                      who is known; --forget WHO takes an \\
        enrolment back
    python recognize.py runs/NAME --verify --data datasets/X  the same person or not, and strangers

Reads:  runs/NAME/ head.safetensors, gallery.safetensors and what finetune_lora.py wrote beside them
Writes: gallery.safetensors (--enrol, --forget); recognize.json, roc.png (--verify; of other data,
or of another split
        than val, in runs/NAME/DATA-SPLIT/); names go to standard output, a line a picture

The trained head names the characters that it learned. An enrolled one has no place in the head: it
wins where the mean of its faces is nearer than that of every learned one. Below a threshold that
finetune_lora.py calibrated a face is unknown (common/gallery.py, `decide`). A picture and its
mirror image are looked at, and their mean is used.
"""

if __name__ == "__main__":
    from common.command import starting

    starting()  # torch takes two seconds to load

import contextlib
import itertools
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import tags
from common import metrics
from common.classifier import head_of, pooled_of, predict
from common.command import Parser, at_least, between, claim, cli, command, drawing, refuse_idle
from common.features import results_folder
from common.fields import refuse_odd_name, shown
from common.gallery import compared, decide, load_gallery, save_gallery
from common.io import UserError, lock_beside, locked, save_json
from common.train import autocast_of, commit, machine, pick_device, pick_dtype
from finetune_lora import load_classifier
from ingest import pack, sources
from ingest.pictures import pictures, tell_problems, whole_pictures

FEW, PAIRS_OF = (
    3,
    4000,
)  # pictures that an enrolment needs; images of which all pairs are compared, at most
SAME = 0.9999  # cosine of two embeddings of one picture, perhaps in another format
FLAGS = {  # of each task
    "name": "threshold json nearest tags detect crop device dtype",
    "enrol": "enrol crop device dtype",
    "forget": "forget",
    "list": "list json",
    "verify": "verify data split threshold json device dtype",
}
FALSE_RATES = (0.001, 0.01, 0.1)  # of false positives, and of false alarms, that are reported


def parse_args():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("run", metavar="runs/NAME", help="what finetune_lora.py wrote")
    parser.add_argument(
        "images",
        nargs="*",
        metavar="IMAGE",
        help="file, folder, zip, tar, or - for a list of files",
    )
    add = parser.add_argument
    add(
        "--threshold",
        type=between(-1, 1),
        metavar="COSINE",
        help="a face below it is unknown (default: calibrated)",
    )
    add("--json", action="store_true", help="print a JSON object a picture (--verify, --list: one)")
    add(
        "--nearest",
        type=at_least(0),
        default=3,
        metavar="N",
        help="gallery faces that are named beside each answer",
    )
    add("--tags", metavar="RUN", help="runs/NAME of tags.py: say what else each picture shows")
    add(
        "--detect",
        metavar="RUN",
        help="runs/NAME of detect.py: name each face that it finds, from left to right",
    )
    add(
        "--crop",
        choices=pack.CROPS,
        help="the square that is used, as in data.py (default: as it was trained)",
    )
    add(
        "--enrol",
        metavar="WHO",
        help="add a character, or pictures of an enrolled one, to the gallery",
    )
    add("--forget", metavar="WHO", help="take an enrolled character out of the gallery")
    add("--list", action="store_true", help="say who is known, and by how many pictures")
    add("--verify", action="store_true", help="measure verification and strangers on a packed set")
    add("--data", metavar="DIR", help="of --verify (default: what it was trained on)")
    add(
        "--split",
        default="val",
        choices=["val", "dev", "test", "train"],
        help="split of --verify",
    )
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--dtype", default="auto", choices=["auto", "bf16", "fp32"], help="of the matrix products")
    return parser.parse_intermixed_args()  # pictures may stand before and after flags


def check(args):
    """-> the task: "name", or one of its flags. What does not go together, or is not used, is
    refused.
    """
    tasks = [
        name
        for name in ("verify", "enrol", "forget", "list")
        if getattr(args, name) not in (None, False)
    ]
    if len(tasks) > 1:
        raise UserError(f"--{tasks[0]} and --{tasks[1]} are two tasks; give one of them")
    task = (tasks or ["name"])[0]
    if task in ("name", "enrol") and not args.images:
        raise UserError("give pictures: files, folders, archives; or -, a list on standard input")
    if task not in ("name", "enrol") and args.images:
        more = "; it measures on a packed set: --data datasets/NAME" if task == "verify" else ""
        raise UserError(f"--{task} takes no pictures, such as {args.images[0]}{more}")
    for who in ("enrol", "forget"):
        if getattr(args, who) is not None and not getattr(args, who).strip():
            raise UserError(f"--{who} needs a name")
    refuse_idle(args.given - set(FLAGS[task].split()), f"when the task is to {task}")
    if args.detect:
        refuse_idle(args.given & {"crop"}, "with --detect, which cuts out faces")
    return task


def predictions(args, net, header, autocast, problems, blank=None):
    """Yield (keys, u8 images (B, ., ., 3), logits (B, C), embeddings (B, D)) of the pictures, in
    batches.

    blank: a list that gets the pages on which --detect finds no face.
    """
    crop = args.crop or header["crop"]
    items = pictures(args.images, header["packed_size"], crop, header["margin"], problems)
    if args.detect:
        items = faces(args, header["packed_size"], problems, blank)
    while some := list(itertools.islice(items, data.CHUNK)):
        keys, images = zip(*some, strict=True)
        images = np.stack(images)
        yield list(keys), torch.from_numpy(images), *embed(net, images, autocast)


def faces(args, size, problems, blank):
    """Yield (picture and box, u8 (size, size, 3)) of every face that --detect finds; a page without
    one is said.
    """
    import detect

    net, about = detect.load(args.detect)
    net.to(pick_device(args.device))
    for key, picture in whole_pictures(args.images, problems):
        boxes, _ = detect.faces_of(net, picture, about["page"], about["threshold"])
        if not len(boxes):
            blank.append(key)
            print(f"{shown(key)}: no face was found", file=sys.stderr)
        for box in boxes.tolist():
            where = ",".join(str(round(x)) for x in box)
            yield f"{key}[{where}]", detect.cut_out(picture, box, detect.MARGIN, size)


def embed(net, images, autocast):
    """Squares u8 (B, ., ., 3) in NumPy, as the recogniser learned them -> logits (B, C), embeddings
    (B, D).
    """
    rows = torch.arange(len(images))
    return predict(net, pooled_of(net, {"images": images}, rows, autocast, mirrored=True))


def answers(keys, logits, embeddings, gallery, nearest):
    """-> a dict for each picture: who it is, how sure that is, and the gallery faces nearest to it."""
    to_face, rows = compared(embeddings, gallery) @ gallery["unit"].T, []  # (B, faces)
    for i, (who, similarity, margin, sure) in enumerate(
        zip(*decide(logits, embeddings, gallery), strict=True)
    ):
        name, known = gallery["names"][who], bool(margin >= 0)
        faces = [
            {
                "name": gallery["names"][gallery["labels"][j]],
                "picture": gallery["keys"][j],
                "similarity": round(to_face[i, j].item(), 4),
            }
            for j in to_face[i].topk(min(nearest, to_face.shape[1]))[1]
        ]
        rows.append(
            {
                "picture": keys[i],
                "name": name if known else None,
                "known": known,
                "confidence": None if sure.isnan() else round(sure.item(), 4),
                "similarity": round(similarity.item(), 4),
                "threshold": round((similarity - margin).item(), 4),
                "best_guess": name,
                "nearest": faces,
            }
        )
    return rows


def in_words(row):
    faces = ", ".join(f"{shown(f['picture'])} {f['similarity']:.2f}" for f in row["nearest"])
    sure = "enrolled" if row["confidence"] is None else f"confidence {row['confidence']:.0%}"
    like = f"similarity {row['similarity']:.2f}"
    who = (
        f"{row['name']}, {sure}, {like}"
        if row["known"]
        else f"unknown (most like {row['best_guess']}, {like} under {row['threshold']:.2f})"
    )
    words = tags.in_words(row.get("tags", {}))
    return (
        f"{shown(row['picture'])}: {who}"
        + (f"; nearest: {faces}" if faces else "")
        + (f"; tags: {words}" if words else "")
    )


def tagger(run, own, device, autocast):
    """runs/NAME of tags.py -> a function from images u8 (B, ., ., 3) to what is added to each
    answer, {"tags": ...}.

    own: the header of the recogniser, whose pictures it gets.
    """
    net, header = tags.load_tagger(run)
    if other := [k for k in ("packed_size", "crop", "margin") if header[k] != own[k]]:
        raise UserError(
            f"--tags {run} learned from pictures of another {other[0]} ({header[other[0]]}, here "
            f"{own[other[0]]}); train both on one data set"
        )
    if net.arm not in tags.NAMES_TAGS:
        raise UserError(
            f"--tags {run} is a run of --arm {net.arm}, which names no tags; give one of --arm mfdn"
        )
    net.to(device)

    def shown(images):
        view = data.view_images(
            images.to(device), *data.full_boxes(len(images)), header["image_size"]
        )
        with autocast():
            _, found = tags.answers(net, view)
        return [{"tags": tags.named(row.cpu(), header)} for row in found]

    return shown


def recognise(args, net, header, gallery, autocast):
    """Print who is in each picture; those that can't be read are named on stderr."""
    problems, blank, count, unknown = [], [], 0, 0
    shown = tagger(args.tags, header, net.encoder.cls_token.device, autocast) if args.tags else None
    for keys, images, logits, embeddings in predictions(
        args, net, header, autocast, problems, blank
    ):
        rows = answers(keys, logits, embeddings, gallery, args.nearest)
        for row, more in zip(rows, shown(images) if shown else [{}] * len(rows), strict=True):
            row |= more
            print(json.dumps(row, ensure_ascii=False) if args.json else in_words(row), flush=True)
            unknown += not row["known"]
        count += len(keys)
    tell_problems(problems, count + len(blank), args.json)
    if unknown and not args.json:
        print(
            f"next: python recognize.py {shlex.quote(args.run)} --enrol WHO PICTURES makes somebody new known",
            file=sys.stderr,
        )


# ---- the gallery: who is known -------------------------------------------------------------------


def apart(embeddings, known):
    """Which rows of embeddings (n, D) show a picture that is neither among known (m, D) nor in an
    earlier row: (n,).
    """
    unit, known = F.normalize(embeddings), F.normalize(known)
    again = (
        (unit @ known.T > SAME).any(1) if len(known) else torch.zeros(len(unit), dtype=torch.bool)
    )
    return ~(again | (torch.tril(unit @ unit.T, -1) > SAME).any(1))


def enrol(args, net, header, autocast):
    """Add these pictures to the gallery, under one name."""
    who, problems = new_name(args.enrol, header), []
    found = list(predictions(args, net, header, autocast, problems))
    if problems:
        raise UserError(f"{problems[0][1]}; nobody was enrolled")
    keys, embeddings = (
        [key for some, *_ in found for key in some],
        torch.cat([x for *_, x in found]),
    )
    print(add_faces(args.run, who, keys, embeddings))
    print(
        f"next: python recognize.py {shlex.quote(args.run)} PICTURE, or --forget {shlex.quote(who)}"
    )


def new_name(text, header):
    """A name as it is stored; UserError where training has taught it."""
    who = sources.nfc(text.strip())
    refuse_odd_name(who, "the name", "give another")
    if who in header["classes"]:
        raise UserError(f"{who} was learned in training and is known already; enrol another name")
    return who


@contextlib.contextmanager
def gallery_to_change(run):
    """with gallery_to_change(run) as gallery: as it is now; who else changes it waits until the end."""
    with locked(lock_beside(Path(run) / "gallery.safetensors"), wait=True):
        yield load_gallery(run)


def add_faces(run, who, keys, embeddings):
    """Put embeddings (n, D) of pictures `keys` into the run's gallery -> what is said of it; a
    picture counts once.
    """
    with gallery_to_change(run) as gallery:
        return with_faces(run, who, keys, embeddings, gallery)


def with_faces(run, who, keys, embeddings, gallery):
    """What `add_faces` does, in a gallery that nobody else changes."""
    names = gallery["names"]
    own = gallery["labels"] == (names.index(who) if who in names else -1)
    new = apart(embeddings, gallery["embeddings"][own])
    added = int(new.sum())
    if twice := len(new) - added:
        print(f"{twice} of {len(new)} pictures are there already, and count once")
    if added + int(own.sum()) < FEW:
        raise UserError(f"{added} different pictures of {who} are too few; give {FEW} to 5")
    names = names if who in names else [*names, who]
    labels = torch.cat([gallery["labels"], torch.full((added,), names.index(who))])
    keys = gallery["keys"] + [key for key, is_new in zip(keys, new, strict=True) if is_new]
    replace_gallery(
        run, torch.cat([gallery["embeddings"], embeddings[new]]), labels, names, keys, gallery
    )
    count = int((labels == names.index(who)).sum())
    return f"{who} is enrolled with {count} pictures; the gallery knows {len(names)} characters"


def take_out(run, who, header):
    """Take an enrolled character and its pictures out of the run's gallery -> what is said of it."""
    who = sources.nfc(who.strip())
    if who in header["classes"]:
        raise UserError(f"{who} was learned in training; only enrolled characters can be forgotten")
    with gallery_to_change(run) as gallery:
        return without_faces(run, who, gallery)


def without_faces(run, who, gallery):
    """What `take_out` does, in a gallery that nobody else changes."""
    names = gallery["names"]
    if who not in names:
        raise UserError(f"{who} is not enrolled; --list says who is")
    k = names.index(who)
    stay = gallery["labels"] != k
    labels = gallery["labels"][stay]
    keys = [key for key, stays in zip(gallery["keys"], stay, strict=True) if stays]
    replace_gallery(
        run,
        gallery["embeddings"][stay],
        labels - (labels > k).long(),
        names[:k] + names[k + 1 :],
        keys,
        gallery,
    )
    return f"{who} is forgotten, with {int((~stay).sum())} pictures; the gallery knows {len(names) - 1} characters"


def replace_gallery(run, embeddings, labels, names, keys, old):
    """Write the gallery of a run again; what was calibrated stays."""
    about = old | {"names": names, "keys": keys}
    save_gallery(Path(run) / "gallery.safetensors", embeddings, labels, about)


def list_known(args, header, gallery):
    """Print who is known, a line each."""
    counts = torch.bincount(gallery["labels"], minlength=len(gallery["names"])).tolist()
    rows = [
        {"name": name, "pictures": n, "learned": name in header["classes"]}
        for name, n in zip(gallery["names"], counts, strict=True)
    ]
    if args.json:
        return print(json.dumps(rows, ensure_ascii=False))
    for row in rows:
        print(
            f"{row['name']}: {'learned in training' if row['learned'] else 'enrolled'}, {row['pictures']} pictures"
        )


# ---- measured: the same character or not, and strangers ------------------------------------------


def percent(shares):
    return {k: round(100 * float(share), 3) for k, share in shares.items()}


def verification(same, other):
    """Cosines of all pairs of pictures, of one character and of two: can they be told apart? ->
    figures in percent.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    if len(same) == 0 or len(other) == 0:
        raise UserError("verification needs two characters, and one with two illustrations")
    shares = {f"tpr_at_fpr_{100 * r:g}": tpr_at_fpr(same, other, r) for r in FALSE_RATES}
    pairs = metrics.truth_and_scores(same, other)
    shares |= {
        "roc_auc": roc_auc_score(*pairs),
        "eer": metrics.equal_error_rate(same, other),
        "average_precision": average_precision_score(*pairs),
    }
    return percent(shares) | {"positive_pairs": len(same), "negative_pairs": len(other)}


def open_set(known, right, enrolled, strangers):
    """Margins over the threshold of known faces (n,) and strangers (m,): who is unknown? -> figures
    in percent.

    right (n,): is the name theirs, were they not rejected? enrolled (n,): is it a character that
    was never trained on?
    """
    from sklearn.metrics import roc_auc_score

    counts = {"known": len(known), "strangers": len(strangers), "enrolled": int(enrolled.sum())}
    mean, named = lambda x: x.double().mean().item(), right & (known >= 0)
    shares = {"known_rejected": mean(known < 0), "known_named_rightly": mean(named)}
    if enrolled.any() and not enrolled.all():
        shares |= {
            "enrolled_named_rightly": mean(named[enrolled]),
            "learned_named_rightly": mean(named[~enrolled]),
        }
    if len(strangers):
        shares |= {
            f"dir_at_far_{100 * r:g}": detection_rate(known, right, strangers, r)
            for r in FALSE_RATES
        }
        auroc = roc_auc_score(*metrics.truth_and_scores(known, strangers))
        shares |= {
            "auroc_unknown": auroc,
            "strangers_unknown": mean(strangers < 0),
            "strangers_unknown_at_5": mean(strangers < known.quantile(0.05)),
        }
    return percent(shares) | counts


def reliability(known, right, strangers):
    """Confidences of known faces (n,), which are right (n,), and of strangers (m,) -> the error in
    percent.

    Either kind counts a half, as the confidence takes it; an enrolled name has none (nan), and is
    left out.
    """
    sure = torch.cat([known, strangers])
    right = torch.cat([right, torch.zeros(len(strangers), dtype=torch.bool)])
    weights = torch.cat([torch.full((len(x),), 1 / len(x)) for x in (known, strangers)])
    there = ~sure.isnan()
    error = calibration_error(sure[there], right[there], weights[there])
    return round(100 * error, 3)


def table(row):
    """-> lines: what --verify found."""
    v, o, at = row.get("verification"), row.get("open_set"), [f"{100 * r:g}" for r in FALSE_RATES]
    lines = [f"{row['data']}, {row['split']}"]
    if v:
        accepts = " / ".join(f"{v[f'tpr_at_fpr_{r}']:.1f}" for r in at)
        lines += [
            "the same character or not",
            f"  ROC-AUC {v['roc_auc']:.1f} %, equal error rate {v['eer']:.1f} %, "
            f"average precision {v['average_precision']:.1f} %",
            f"  right pairs accepted {accepts} % where {' / '.join(at)} % of the wrong ones are "
            f"({v['positive_pairs']:,} and {v['negative_pairs']:,} pairs)",
        ]
    if o:
        shares = f"{o['known_named_rightly']:.1f} % named rightly, {o['known_rejected']:.1f} % called unknown"
        lines += [f"{o['known']:,} pictures of known characters", f"  {shares}"]
    if o and "enrolled_named_rightly" in o:
        lines.append(
            f"  named rightly: {o['enrolled_named_rightly']:.1f} % of the {o['enrolled']:,} of enrolled ones, "
            f"{o['learned_named_rightly']:.1f} % of the others"
        )
    if not o or not o["strangers"]:
        return lines + [
            "no strangers in this set: --data OTHER with other characters measures them; finetune_lora.py "
            "--hold-out 4 leaves four out of training"
        ]
    named = " / ".join(f"{o[f'dir_at_far_{r}']:.1f}" for r in at)
    if "calibration_error" in row:
        lines.append(
            f"confidences are {row['calibration_error']:.1f} points off in the mean, where half are strangers"
        )
    return lines + [
        f"{o['strangers']:,} pictures of strangers",
        f"  {o['strangers_unknown']:.1f} % called unknown"
        f" ({o['strangers_unknown_at_5']:.1f} % where 5 % of the known were)",
        f"  {named} % of the known named rightly where {' / '.join(at)} % of the strangers get a name; known against "
        f"strangers: ROC-AUC {o['auroc_unknown']:.1f} %",
    ]


def faces_of(args, net, gallery, folder, name, autocast):
    """Pictures of a packed split -> split, rows, embeddings, which known character each shows (-1: a stranger), who it
    is taken for, the margin of that, and the confidence."""
    split = data.open_split(folder, name)
    rows = data.evenly_spaced(len(split["images"]), PAIRS_OF)
    pooled = pooled_of(net, split, rows, autocast, f"faces of {folder}", mirrored=True)
    logits, embeddings = predict(net, pooled)
    ids = {who: i for i, who in enumerate(gallery["names"])}
    own = torch.tensor(
        [*(ids.get(who, -1) for who in split["header"]["classes"]), -1]
    )  # the last: without a label
    who, _, margin, sure = decide(logits, embeddings, gallery)
    return split, rows, embeddings, own[split["labels"][rows]], who, margin, sure


def verify(args, net, header, gallery, autocast):
    """recognize.json and roc.png: do two faces show one character, and who is unknown? By the same
    embeddings.

    Where --data shows strangers alone, the known faces are those of the data that it was trained
    on.
    """
    folder = Path(data.open_or_pack(args.data or header["data"]))
    home = results_folder(args.run, folder, args.split, header["data"])
    claim([home / "recognize.json"], fix="choose another --data or --split")
    found = faces_of(args, net, gallery, folder, args.split, autocast)
    split, rows, embeddings, own, who, margin, sure = found
    row = {
        "run": str(args.run),
        "data": str(folder),
        "split": args.split,
        "threshold": gallery["threshold"],
    }
    unit, labels = compared(embeddings, gallery), split["labels"][rows]
    pairs, strangers = (
        metrics.pair_cosines(unit, labels, data.groups_of(split)[rows]),
        margin[own < 0],
    )
    sure_of_strangers = sure[own < 0]
    if min(map(len, pairs)) and data.has_labels(split):
        row["verification"] = verification(*pairs)
    if not (own >= 0).any() and Path(header["data"]).exists():
        *_, own, who, margin, sure = faces_of(args, net, gallery, header["data"], "val", autocast)
        row["known_of"] = header["data"]
    known = own >= 0
    if known.any():
        row["open_set"] = open_set(
            margin[known], (who == own)[known], own[known] >= gallery["learned"], strangers
        )
    learned = known & (own < gallery["learned"])
    if learned.any() and len(strangers):
        row["calibration_error"] = reliability(
            sure[learned], (who == own)[learned], sure_of_strangers
        )
    if not {"verification", "open_set"} & row.keys():
        raise UserError(
            f"{folder} has neither two labelled characters in {args.split}, nor strangers to measure"
        )
    row |= {
        "command": command(),
        "machine": machine(net.encoder.cls_token.device),
        "commit": commit(),
    }
    save_json(row, home / "recognize.json")
    title, both = f"{Path(args.run).name} on {folder.name}", (margin[known], strangers)
    with drawing("roc.png"):
        plot_verification(
            home / "roc.png",
            pairs if "verification" in row else None,
            both if min(map(len, both)) else None,
            title,
        )
    print(json.dumps(row, ensure_ascii=False) if args.json else "\n".join(table(row)))
    print(f"wrote {home}/recognize.json, roc.png", file=sys.stderr)


# ---- rates, and the picture of --verify ----------------------------------------------------------


def tpr_at_fpr(positive, negative, most):
    """The largest true positive rate at a false positive rate of at most `most`."""
    from sklearn.metrics import roc_curve

    pairs = metrics.truth_and_scores(positive, negative)
    false, true, _ = roc_curve(*pairs, drop_intermediate=False)
    return true[false <= most].max()


def detection_rate(known, right, unknown, far):
    """Detection and identification rate at a false alarm rate of at most far.

    known (n,) scores of known faces, right (n,) whether the best name is theirs, unknown (m,)
    scores of unknown characters (Phillips et al. 2011, chapter 21).
    """
    allowed = int(far * len(unknown) + 1e-9)  # unknown faces that may get a name
    threshold = float("-inf")
    if allowed < len(unknown):
        threshold = unknown.sort(descending=True).values[allowed]
    return ((known > threshold) & right).double().mean().item()


def calibration_error(sure, right, weights, bins=10):
    """Expected calibration error, in [0, 1], of confidences in equal bins: (n,) each.

    The mean distance of the confidence and the share of right names (Guo et al. 2017,
    arXiv:1706.04599, equation 3).
    """
    place = (sure * bins).long().clamp(0, bins - 1)
    weights = (weights / weights.sum()).double()
    error = 0
    for b in range(bins):
        w = weights * (place == b)
        total = w.sum().item()
        if total > 0:
            confidence, accuracy = (w * sure).sum().item() / total, (w * right).sum().item() / total
            error += total * abs(confidence - accuracy)
    return error


def plot_verification(path, pairs, faces, title):
    """ROC and precision-recall curves, and histograms of scores; a kind that is None is left out.

    pairs: cosines of one character and of two; faces: margins of known and of unknown characters.
    """
    from sklearn.metrics import precision_recall_curve, roc_curve

    from common import plots  # matplotlib takes half a second to load

    kinds = []
    if pairs:
        labels = ("same", "different")
        kinds.append(("two faces: same character?", plots.BLUE, pairs, labels, "similarity"))
    if faces:
        labels = ("known", "unknown")
        kinds.append(("one face: is it known?", plots.ORANGE, faces, labels, "margin"))
    n = 2 + len(kinds)
    with plots.panels(path, title, 1, n, (3.5 * n, 3.5)) as axes:
        for axis, (name, colour, scores, labels, what) in zip(axes[2:], kinds, strict=True):
            truth_and_scores = metrics.truth_and_scores(*scores)
            false, true, _ = roc_curve(*truth_and_scores)
            axes[0].plot(100 * false, 100 * true, color=colour, label=name)
            precision, recall, _ = precision_recall_curve(*truth_and_scores)
            axes[1].plot(100 * recall, 100 * precision, color=colour)
            bins = np.linspace(-1, 1, 61)
            for x, label, shade in zip(scores, labels, (plots.BLUE, plots.ORANGE), strict=True):
                axis.hist(x.numpy(), bins, density=True, histtype="step", color=shade, label=label)
            axis.set(title=name.split(":")[0].capitalize(), xlim=(-1, 1))
            axis.set(xlabel=what, ylabel="density")
            axis.legend(fontsize=8)
        axes[0].set(title="ROC", xlim=(0.01, 100), ylim=(0, 100), xscale="log")
        axes[0].set(xlabel="false positive rate, %", ylabel="true positive rate, %")
        axes[0].xaxis.set_major_formatter("{x:g}")  # the one of a log axis writes formulas
        axes[0].legend(fontsize=8, loc="upper left")
        axes[1].set(title="Precision and recall", xlim=(0, 100), ylim=(0, 100))
        axes[1].set(xlabel="recall, %", ylabel="precision, %")


def main():
    args = parse_args()
    task = check(args)
    gallery = load_gallery(args.run)
    if task in ("forget", "list"):
        header = head_of(args.run)
        if task == "list":
            return list_known(args, header, gallery)
        return print(take_out(args.run, args.forget, header))
    net, header = load_classifier(args.run)
    device = pick_device(args.device)
    dtype, _ = pick_dtype(args.dtype, device)
    if args.threshold is not None:  # of those that were learned; that of the enrolled moves with it
        gallery["enrolled_threshold"] += args.threshold - gallery["threshold"]
        gallery["threshold"] = args.threshold
    autocast = autocast_of(device, dtype)
    if task == "enrol":
        return enrol(args, net.to(device), header, autocast)
    work = verify if task == "verify" else recognise
    work(args, net.to(device), header, gallery, autocast)


if __name__ == "__main__":
    cli(main)
