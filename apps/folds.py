"""Cross-validation of a small collection, and then a network that learns every picture of it.

A collection of seven characters with twenty pictures each has no picture to spare: held-out ones
teach nothing, and fourteen of them say little. So FOLDS networks are trained, each without a part of
the pictures, and without some characters at all. Each picture is asked twice: once of a network that
learned its character by other pictures, and once of one that has never seen this character. The
first answers say how often names are right, and after how many epochs. Both together say which
similarity is too low for a name. Then one more network learns everything for so many epochs.

Each of these trainings is a run in a folder of its own, runs/NAME/folds/1, ... and runs/NAME/folds/all, with
a state.pt until all of them are finished. So where the command is stopped, the same command goes on.
apps/learn.py is the command.

    n pictures   m held-out ones   k of characters left out   C characters
"""

import argparse
import copy
import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

import data
import finetune_lora
from apps.collection import BY_FOLDS, open_all
from apps.gallery import Gallery, confidence, enrolled_threshold, fit_temperature, threshold_of
from apps.recognize import FACES, PROMISE, outputs_of
from apps.unknown import reliability
from common import metrics, readout, train
from common.features import Subset, relabelled
from common.groups import groups_of
from common.train import UserError, quoted, save_json

FOLDS = 5  # networks, or as many as there are characters
COLOURS = 1.0  # their weight in a similarity (results/TRIED.md)
# Of known pictures so many are less similar than the threshold, by networks that learned three quarters of
# what the last one does; of new pictures the last one refuses REFUSED of apps/gallery.py (results/TRIED.md).
REFUSED_HERE = 0.12
CURVES = "dev_top1", "dev_macro_f1"  # of held-out pictures, after each epoch
# flags that may differ where the same command goes on
OF_START = train.UNSAVED | {"out", "device", "command"}


# ---- who learns what -----------------------------------------------------------------------------


def draw_folds(labels, groups, count):
    """labels (n,) and groups (n,) -> the fold of each character, (C,), and of each picture, (n,).

    The network of a fold learns neither its characters nor its pictures. So the pictures of a
    character are dealt to the other folds, whose networks know it; whole groups at a time.
    """
    labels, groups = np.asarray(labels), np.asarray(groups)
    C = labels.max() + 1
    rng = np.random.default_rng(0)
    of_character = rng.permutation(C) % count
    of_picture = np.full(len(labels), -1)
    for c in range(C):
        # StratifiedGroupKFold of scikit-learn knows nothing of characters that are left out: it would deal
        # a fifth of their pictures to the very fold where nobody can name them.
        own = rng.permutation(np.unique(groups[(labels == c) & (of_picture < 0)]))
        first = rng.integers(count - 1)  # else each character would give fold 1 more than fold 5
        for i, group in enumerate(own):
            place = 1 + (first + i) % (count - 1)
            of_picture[groups == group] = (of_character[c] + place) % count
    return of_character, of_picture


@dataclass
class Fold:
    """The pictures of a fold. Their labels are those of its own head: places in `learned`."""

    train: Subset  # what its network learns
    dev: Subset  # other pictures of its characters
    left_out: torch.Tensor  # (k,): index in the split, of pictures of characters that it leaves out
    learned: torch.Tensor  # the numbers of its characters among all


def deal(every, classes, folder):
    """A Subset of all pictures -> its Folds; a UserError where the collection is too small for them."""
    count = min(FOLDS, len(classes))
    if count < 3:
        why = "one of three has to be left out, to see what a new character looks like"
        fix = f"python finetune_lora.py ENCODER --data {quoted(folder)} learns two"
        raise UserError(f"{folder} has {count} characters: {why}; {fix}")
    index, labels = every.index, every.labels[every.index]
    names = every.split["header"]["classes"]
    of_character, of_picture = draw_folds(labels, groups_of(every.split)[index], count)
    folds = []
    for number in range(count):
        held = torch.from_numpy(of_picture == number)
        left_out = torch.from_numpy(of_character == number)[labels]
        learned = labels[~held & ~left_out].unique()
        known = torch.isin(labels, learned)
        own = relabelled("all", every.split, [names.index(classes[c]) for c in learned])
        fit = replace(own, index=index[~held & known])
        dev = replace(own, index=index[held & known])
        folds.append(Fold(fit, dev, index[left_out], learned))
    if not all(len(fold.dev.index) and len(fold.learned) > 1 for fold in folds):
        fix = "give two illustrations or more of each character (copies are one)"
        raise UserError(f"a part of {folder} has too few pictures or characters; {fix}")
    return folds


# ---- the networks of the folds -------------------------------------------------------------------


def flags_in(flags, folder, **changes):
    """The flags of a training in its own folder, which goes on there if it was stopped."""
    resume = str(folder) if (folder / "state.pt").exists() else None
    return argparse.Namespace(**vars(flags) | {"out": str(folder), "resume": resume} | changes)


def train_fold(flags, folder, encoder, fold, whole):
    """Train without the pictures of a fold -> its Task and its run. whole: the Task of all pictures."""
    # As many steps as when everything is learned, of smaller batches. With fewer, it would learn less,
    # and known pictures would seem less similar than they will be.
    steps = len(whole.train.index) // flags.batch_size
    flags = flags_in(flags, folder, batch_size=max(2, len(fold.train.index) // steps))
    classes = [whole.classes[c] for c in fold.learned]
    sets = fold.train, fold.dev, None
    own = copy.deepcopy(encoder)
    task = finetune_lora.build_task(flags, own, sets, classes, whole.device, whole.autocast)
    # A frozen encoder reads each picture once, and not once for each fold.
    task.features = whole.features
    # Pictures that choose an epoch can't measure it, so each fold keeps its last one.
    run, _ = finetune_lora.finetune(flags, task, flags.epochs)
    return task, run


@torch.no_grad()
def answers_of(task, fold, whole, folds):
    """What the network of one of `folds` says of pictures that it was not taught -> a dict.

    index, labels (m,), logits (m, C), similarity (m,), unit (m, D) of held-out pictures of its
    characters; a logit of a character that it did not learn is -inf. colours (m,): how sure the
    control is, an SVM on colours. The same of the characters that it left out, as unknown_index and so
    on. others_similarity: of `others`, a split and an index of pictures that show nobody. Also numbers:
    the threshold of enrolled ones, and Top-1 in percent of pictures in gray and of two controls.
    """
    outputs = partial(outputs_of, task.net.eval(), task.train.split, autocast=task.autocast)
    index = task.train.index
    of_each = data.evenly_of_each(task.train.labels[index], FACES)
    index = index[torch.cat(of_each)]
    faces, numbers = outputs(index)[1], task.train.labels[index]
    place = torch.cat([torch.arange(len(own)) for own in of_each])  # among a character's faces

    def gallery_of(some):
        return Gallery(faces[some], numbers[some], len(fold.learned), colours=COLOURS)

    gallery = gallery_of(slice(None))
    # In the end every picture is learned, and is one more that a face can be similar to: of known
    # characters by the part that this fold has not seen, of unknown ones also by its characters. So
    # how much similarity grows with such a part is measured here, and added.
    fewer = (place + 1) % (folds - 1) > 0
    smaller = [gallery_of(fewer)]
    smaller_yet = [gallery_of(fewer & (numbers % folds != part)) for part in range(folds)]
    colour_scores = histogram_scorer(task.train)

    def answers(asked, galleries):
        some, embeddings = outputs(asked)
        logits = torch.full((len(asked), len(whole.classes)), -torch.inf)
        logits[:, fold.learned] = some
        said = {
            "index": asked,
            "labels": whole.train.labels[asked],
            "logits": logits,
            "similarity": grown(embeddings, gallery, galleries),
            "colours": colour_scores(asked),
        }
        return said, embeddings

    said, embeddings = answers(fold.dev.index, smaller)
    of_unknown, _ = answers(fold.left_out, smaller_yet)
    said |= {f"unknown_{name}": x for name, x in of_unknown.items()}
    labels = fold.dev.labels[fold.dev.index]
    gray, _ = finetune_lora.predict(task, metrics.in_gray(fold.dev))
    return said | {
        "colours_right": said["colours"].argmax(1) == labels,
        "enrolled_threshold": enrolled_threshold(gallery, embeddings, labels),
        "colourless_top1": 100 * readout.topk(gray, labels, 1),
        "histograms_top1": 100 * readout.topk(said["colours"], labels, 1),
        # Its penalty is chosen by the pictures that judge it, so this control is a little too good.
        "thumbnails_top1": metrics.thumbnail_top1(task.train, fold.dev, fold.dev),
    }


def grown(embeddings, gallery, smaller):
    """(n, D) -> (n,): similarities as they will be in a gallery that is larger by a step.

    smaller: galleries that lack as much as this one will gain.
    """
    now = gallery.best_similarity(embeddings)
    before = torch.stack([less.best_similarity(embeddings) for less in smaller]).mean(0)
    return now + (now - before).mean()


def histogram_scorer(images):
    """An SVM on histograms of colours, its cost fixed -> a function of an index (m,): scores (m, C), 0 on a border."""
    [fit] = metrics.histogram_svms(images, metrics.COSTS[1:2])

    def scores(index):
        x = metrics.features_of(metrics.histograms, images, index)
        distance = torch.from_numpy(fit.decision_function(x))
        # Of two characters scikit-learn gives one number: above 0 it is the second.
        return distance if distance.ndim > 1 else torch.stack([-distance, distance], 1)

    return scores


def ask_folds(flags, encoder, whole, home):
    """Train the folds, or read the networks that are finished -> a list of `answers_of`, with curves."""
    folds = deal(whole.train, whole.classes, flags.data)
    answers = []
    for i, fold in enumerate(folds):
        others = sorted({*range(len(whole.classes))} - {*fold.learned.tolist()})
        unseen = ", ".join(whole.classes[c] for c in others)
        print(
            f"round    {i + 1} of {len(folds) + 1}: learns all but {unseen}; is that called unknown?"
        )
        task, run = train_fold(flags, home / str(i + 1), encoder, fold, whole)
        said = answers_of(task, fold, whole, len(folds))
        rows = train.read_log(run.log_path)
        said |= {name: np.array([row[name] for row in rows if name in row]) for name in CURVES}
        answers.append(said)
        if run.stop:  # while the answers were made
            run.save_if_due()
    return answers


# ---- what follows from their answers -------------------------------------------------------------

OF_PICTURES = ("index", "labels", "logits", "similarity", "colours_right")
OF_PICTURES += ("unknown_labels", "unknown_logits", "unknown_similarity")
NUMBERS = ("auroc", "colours_auroc", "enrolled_threshold")
NUMBERS += ("colourless_top1", "thumbnails_top1", "histograms_top1")


def together(answers):
    """A list of `ask_folds` -> one dict: what all of them say, and the means of their numbers."""
    for fold in answers:
        # Each fold by itself, because scores of two networks, or of two machines, differ in scale.
        fold["auroc"] = 100 * metrics.auroc(fold["similarity"], fold["unknown_similarity"])
        colours = (fold[name].amax(1) for name in ("colours", "unknown_colours"))
        fold["colours_auroc"] = 100 * metrics.auroc(*colours)
    found = {name: torch.cat([fold[name] for fold in answers]) for name in OF_PICTURES}
    for name in (*NUMBERS, *CURVES):
        found[name] = np.mean([fold[name] for fold in answers], axis=0)
    return found


def epoch_of(curve, pictures):
    """Macro-F1 after each epoch, (epochs,) -> the latest epoch within a standard error of the best, as `Best`."""
    best = curve.max()
    return int(np.flatnonzero(curve >= best - metrics.standard_error(best, pictures))[-1]) + 1


def calibration(found):
    """`together` -> what a gallery needs beside its faces (apps/gallery.py)."""
    return {
        "temperature": fit_temperature(found["logits"], found["labels"]),
        "enrolled_threshold": float(found["enrolled_threshold"]),
        # The head's logits have no part in these similarities: those of a network that learned few
        # pictures say less of unknown characters than colours do, and mixed in they made it worse.
        "lift": [0.0, 0.0],
        "colours": COLOURS,
        "refused": REFUSED_HERE,
        "held_known": found["similarity"].tolist(),
        "held_unknown": found["unknown_similarity"].tolist(),
    }


def share_of(hits, labels, of_new=False):
    """Which pictures (n,) of characters (n,) do it: their share -> {"mean", "low", "high"}, in percent.

    Of the pictures of these characters, or of_new: the mean over characters, because others will have
    other numbers of pictures. The faces of one are alike in how they are judged, so the interval is
    Student's, over characters. Where all of them agree it would have no width, so its standard error
    is at least `least_error`.
    """
    from scipy.stats import t as student

    shares = np.array([hits[labels == c].double().mean().item() for c in labels.unique()])
    C, n = len(shares), len(hits)
    mean = shares.mean() if of_new else hits.double().mean().item()
    error = max(shares.std(ddof=1) / C**0.5 if C > 1 else 0.5, metrics.least_error(mean, n))
    if of_new:  # it is to hold for as many other characters, which differ as much as these
        error *= 2**0.5
    reach = student.ppf(0.975, max(1, C - 1)) * error
    low, high = max(0, mean - reach), min(1, mean + reach)
    return {"mean": 100 * mean, "low": 100 * low, "high": 100 * high}


def promise(found, sizes, groups):
    """What to expect, by `together`, the pictures of each character (C,) and groups (n,), in percent.

    It is asked at the threshold that refuses as many known pictures of the folds as the last network
    will refuse of new ones.
    """
    known, unknown = found["similarity"], found["unknown_similarity"]
    fitted = threshold_of(known, unknown)
    margin, unknown_margin = known - fitted["threshold"], unknown - fitted["threshold"]
    right = found["logits"].argmax(1) == found["labels"]
    scale = fit_temperature(found["logits"], found["labels"]), fitted["platt"]
    sure = confidence(found["logits"], margin, *scale)
    unsure = confidence(found["unknown_logits"], unknown_margin, *scale)
    more = 100.0 * (found["colours_right"].double() - right.double()).numpy()
    row = {
        "characters": len(sizes),
        "pictures": int(sizes.sum()),
        "names_right": share_of(right & (margin >= 0), found["labels"]),
        "known_unknown": share_of(margin < 0, found["labels"]),
        "unknown": share_of(unknown_margin < 0, found["unknown_labels"], of_new=True),
        "auroc": float(found["auroc"]),
        "colours_auroc": float(found["colours_auroc"]),
        "colours_more": metrics.bootstrap(more[None], groups),
    }
    return row | reliability(sure, right, unsure)


def promised(row):
    """promise.json -> what is printed, in lines."""
    named, new, colours = row["names_right"], row["unknown"], row["colours_more"]
    lines = [
        "in short: of 100 new pictures of your characters, about {mean:.0f} get the right name "
        "({low:.0f} to {high:.0f})".format(**named),
        f"          of 100 pictures of strangers, about {100 - new['mean']:.0f} get a wrong one "
        f"({100 - new['high']:.0f} to {100 - new['low']:.0f}), and the others are called unknown",
    ]
    if colours["low"] > 0:  # better, and not by chance
        lines += [
            "note: colours alone give {mean:.0f} more of 100 pictures the right name ({low:.0f} to "
            "{high:.0f}), so what was learned here is not worth its time".format(**colours)
        ]
    return lines


# ---- all of it -----------------------------------------------------------------------------------


def check_begun(flags, home):
    """A UserError where the trainings in a run's folder were begun by other flags, or of other pictures."""
    path = home / "flags.json"
    ours = {name: value for name, value in vars(flags).items() if name not in OF_START}
    ours = json.loads(json.dumps(ours))  # tuples are lists in a file
    if path.exists() and json.loads(path.read_text()) != ours:
        raise UserError(
            f"{flags.out} was begun by another command, or of other pictures; choose another --out"
        )
    save_json(ours, path)


def learn_all(words):
    """Cross-validate a collection, then learn every picture of it; words: flags of finetune_lora.py."""
    flags = finetune_lora.parse_flags(words)
    flags.split, flags.again = BY_FOLDS, flags.command
    out = Path(flags.out)
    home = (out / PROMISE).parent
    device, autocast, machine = train.open_machine(flags)
    encoder = finetune_lora.open_encoder(flags)
    every, classes = open_all(flags.data)
    finetune_lora.settle_steps(flags, len(every.index))
    check_begun(flags, home)
    after = f"next: python -m apps.sort {quoted(out)} FOLDER --out SORTED"
    if (out / f"metrics-{BY_FOLDS}.json").exists():
        return print(f"run      {out} is finished; {after}")
    sets = every, None, None
    own = copy.deepcopy(encoder)  # the folds begin with the encoder as it is
    whole = finetune_lora.build_task(flags, own, sets, classes, device, autocast)
    sizes = whole.sizes()
    names = every.split["header"]["classes"]
    print(
        f"{machine}\n"
        f"data     {flags.data}: {sizes.sum()} pictures of {len(classes)} of {len(names)} characters, "
        f"at least {sizes.min()} of each\n"
        f"run      {out}: {flags.method} of {flags.encoder}"
    )

    # 1. ask networks that lack a part of the pictures
    answers = ask_folds(flags, encoder, whole, home)
    found = together(answers)
    epoch = epoch_of(found["dev_macro_f1"], len(found["labels"]))
    groups = groups_of(every.split)[found["index"]]
    row = promise(found, sizes, groups) | {"folds": len(answers), "epoch": epoch}
    row |= {"calibration": calibration(found), "command": flags.command, "commit": train.commit()}
    save_json(row, out / PROMISE)

    # 2. learn all of them
    last = len(answers) + 1
    print(f"round    {last} of {last}: every picture is learned, {epoch} times")
    run, _ = finetune_lora.finetune(flags_in(flags, home / "all"), whole, epoch)
    for i, curve in enumerate(zip(*(found[name].tolist() for name in CURVES), strict=True), 1):
        run.log(epoch=i, **dict(zip(CURVES, curve, strict=True)))

    # 3. write what they said, and the network
    scores = finetune_lora.scores(found["logits"], found["labels"], groups, sizes)
    scores |= {name: float(found[name]) for name in NUMBERS if name.endswith("_top1")}
    finetune_lora.write_network(flags, whole, run)
    finetune_lora.write_results(flags, whole, run, epoch, scores)
    print("\n".join(promised(row)))
    print(f"wrote    {out}/; more numbers are in {out / PROMISE}")
    print(after)
    for path in home.glob("*/state.pt"):  # it would go on as a run that holds pictures back
        path.unlink()
