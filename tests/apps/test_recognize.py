"""apps/recognize.py and its gallery: similarity, thresholds, names and enrolment; numbers by hand."""

import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import call, draw_folder, json_of, run_line
from made import CPU

import data
import finetune_lora
import ingest.pictures
from apps import gallery, recognize
from apps.gallery import Gallery
from common import door
from common.classifier import pooled_of
from common.train import UserError, autocast_of, read_safetensors
from ingest import sources
from ingest.decode import decode
from ingest.pack import class_names
from ingest.tags import vocabulary

NAME = f"apps.recognize runs/a-lora {CPU}"
FACE = "images/class1/illust3_0.png"
GALLERY = "runs/a-lora/gallery.safetensors"


def rows_of(fresh, words):
    """The answers for the pictures of a line of words."""
    return json_of(f"{NAME} {words} --json", fresh)


def said(fresh, words):
    return run_line(f"{NAME} {words}", fresh, check=0)


# ---- similarity and thresholds -------------------------------------------------------------------


def raised(similar, strength, lift):
    """Similarities (n,) and best logits (n,): at most three standard deviations count, and 1 is most."""
    up = lift[1] * (strength - lift[0])
    return (similar + up.clip(-0.3, 0.3)).clip(max=1)


@pytest.fixture
def world():
    """Faces of five characters in a gallery, other faces of them, faces of nobody, and logits."""
    torch.manual_seed(0)
    centre, labels = torch.randn(5, 16), torch.arange(5).repeat_interleave(40)
    faces, known = (centre[labels] + 0.3 * torch.randn(200, 16) for _ in range(2))
    logits = F.normalize(known) @ F.normalize(centre).T
    unknown = centre[0] + 2 * torch.randn(1000, 16)
    found = SimpleNamespace(labels=labels, faces=faces, known=known, logits=logits)
    found.held_out = logits, known, labels
    found.of_unknown = F.normalize(unknown) @ F.normalize(centre).T, unknown
    found.gallery = Gallery(faces, labels, 5)
    found.unit = found.gallery.whitened(known)
    strength = logits.amax(1)
    usual, spread = strength.mean().item(), strength.std(correction=0).item()
    found.lift = [usual, gallery.LIFT / max(spread, usual / 10)]
    found.score = raised(found.gallery.best_similarity(known), strength, found.lift)
    return found


def test_whitening_is_the_inverse_of_the_covariance_within_characters(world):
    mean, matrix = gallery.whitening(world.faces, world.labels)
    rows = data.evenly_of_each(world.labels, gallery.WHITENED)
    assert [len(some) for some in rows] == [gallery.WHITENED] * 5
    groups = [world.faces[some] for some in rows]
    inside = [group - group.mean(0) for group in groups]
    within = sum(x.T @ x for x in inside).double() / (5 * gallery.WHITENED - 5)
    within += gallery.SHRINK * within.diagonal().mean() * torch.eye(16)
    torch.testing.assert_close((matrix @ matrix.T).double() @ within, torch.eye(16).double())
    torch.testing.assert_close(mean, torch.stack([group.mean(0) for group in groups]).mean(0))


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_similarity_is_the_mean_cosine_with_the_three_nearest_faces_of_a_character(world, weight):
    """And that of the nearest histograms of colours, by their weight."""
    colours = F.normalize(torch.rand(400, gallery.CELLS, generator=torch.manual_seed(1)))
    known = Gallery(torch.cat([world.faces, colours[:200]], 1), world.labels, 5, colours=0.5)
    torch.testing.assert_close(known.unit, world.gallery.unit)  # they leave the whitening alone
    known.colours = weight
    best = []
    for c in range(5):
        own = world.labels == c
        pairs = (world.unit, known.unit[own]), (colours[200:], colours[:200][own])
        near = [(x @ y.T).sort(1, descending=True)[0][:, :3].mean(1) for x, y in pairs]
        best.append((near[0] + weight * near[1]) / (1 + weight))
    found = known.best_similarity(torch.cat([world.known, colours[200:]], 1))
    torch.testing.assert_close(found, torch.stack(best).amax(0))


def test_the_threshold_rejects_as_many_known_faces_as_it_accepts_unknown_ones(world):
    row = gallery.calibrate(world.faces, world.labels, world.held_out)
    assert row["lift"] == pytest.approx(world.lift)
    torch.testing.assert_close(row["held_known"], world.score)
    unknown = torch.cat([row["held_unknown"], row["held_unknown"] - 0.2])
    found = replace(world.gallery, **row | {"held_unknown": unknown}).settled()
    rejected = (world.score < found.threshold).float().mean().item()
    accepted = (unknown >= found.threshold).float().mean().item()
    assert accepted == pytest.approx(rejected, abs=0.01) and rejected < 0.091
    who, _, _, sure = found.decide(world.logits, world.known)
    assert (who == world.labels).float().mean() > 0.99 and sure.mean() > 0.8
    low, high = torch.tensor([0.3, 0.6, 0.7, 0.9]), torch.tensor([0.1, 0.2, 0.4, 0.65])
    assert 0.4 < gallery.balance(low, high) < 0.61  # one of four is on the wrong side, either way
    found = gallery.threshold_of(
        world.score, world.score
    )  # no more are rejected, however alike they are
    rejected = (world.score < found["threshold"]).float().mean().item()
    assert rejected == pytest.approx(int(gallery.REFUSED * 200) / 200, abs=1e-6)


@pytest.fixture
def plain(world):
    """A gallery of five characters that was measured by held-out faces."""
    row = gallery.calibrate(world.faces, world.labels, world.held_out)
    names, keys = list("abcde"), [str(i) for i in range(200)]
    return replace(world.gallery, names=names, keys=keys, **row).settled()


def test_what_looks_like_strangers_is_less_similar(world, plain):
    strangers = world.of_unknown[1][:60]
    found = plain.with_strangers(strangers[:40]).with_strangers(strangers[20:])
    assert len(found.strangers) == 60  # each once
    away = gallery.AWAY * 60 / (60 + gallery.MANY)  # the more they are, the more they count
    unit = found.whitened(strangers)
    others = unit @ unit.T - 2 * torch.eye(60)  # each apart from itself
    for pictures, cosines in (
        (world.known, found.whitened(world.known) @ unit.T),
        (strangers, others),
    ):
        nearest = cosines.sort(1, descending=True)[0][:, :3].mean(1)
        expected = plain.best_similarity(pictures) - away * nearest
        torch.testing.assert_close(found.best_similarity(pictures, apart=True), expected)


def test_strangers_move_the_threshold_and_one_who_is_known_after_all_is_none(world, plain):
    odd = 2 * F.normalize(torch.randn(16), dim=0)
    faces = 0.8 * world.known[torch.randperm(200)[:80]] + odd + 0.3 * torch.randn(80, 16)

    def unknown(some, pictures):
        return (some.best_similarity(pictures) < some.threshold).float().mean().item()

    found = plain.with_strangers(faces[:40])
    assert unknown(found, faces[40:]) > unknown(plain, faces[40:]) + 0.3
    assert unknown(found, world.known) < 0.15
    enrolled, _ = found.enrol("Zoe", list("vwxyz"), faces[:5])
    assert len(enrolled.strangers) == 35
    again = enrolled.with_strangers(faces[:40])
    assert len(again.strangers) == 40 and again.names == list("abcde")


def test_known_faces_stand_for_unknown_ones_while_their_characters_are_left_out(world):
    labels, known = world.labels, world.known
    found = gallery.as_unknown(replace(world.gallery, lift=world.lift), world.held_out)
    for c in range(5):  # five folds of five characters: one is left out
        stay = labels != c
        less = Gallery(world.faces[stay], labels[stay], 5)
        strength = world.logits[~stay][:, torch.arange(5) != c].amax(1)
        similar = raised(less.best_similarity(known[~stay]), strength, world.lift)
        torch.testing.assert_close(found[~stay], similar)
    row = gallery.calibrate(world.faces, labels, world.held_out)
    torch.testing.assert_close(row["held_unknown"], found)


def test_five_percent_of_other_faces_pass_for_an_enrolled_character(world):
    threshold = gallery.enrolled_threshold(world.gallery, world.known, world.labels)
    passed = []
    for c in range(5):
        faces = world.gallery.unit[world.labels == c]
        shots = faces[data.evenly_spaced(40, gallery.SHOTS)]
        cosine = world.unit @ F.normalize(shots.sum(0), dim=0)
        passed.append((cosine >= threshold)[world.labels != c])
    assert torch.cat(passed).float().mean().item() == pytest.approx(0.05, abs=0.002)


def test_an_enrolled_character_wins_where_its_mean_is_nearer_than_all_others(world):
    old, logits = world.labels < 4, world.logits[:, :4]
    held_out = logits[old], world.known[old], world.labels[old]
    row = gallery.calibrate(world.faces[old], world.labels[old], held_out)
    known = Gallery(world.faces, world.labels, 4, **row).settled()  # the fifth is enrolled
    sums = torch.stack([known.unit[world.labels == c].sum(0) for c in range(5)])
    to_mean = known.whitened(world.known) @ F.normalize(sums).T
    handicap = gallery.HANDICAP * gallery.SHOTS / 40  # its mean is of 40 faces
    new = to_mean[:, 4] + handicap > to_mean[:, :4].amax(1)
    assert 40 <= new.sum() < 200
    who, similarity, margin, sure = known.decide(logits, world.known)
    assert torch.equal(who == 4, new) and torch.equal(sure.isnan(), new)
    torch.testing.assert_close(similarity[new], to_mean[new, 4])
    torch.testing.assert_close(margin[new], to_mean[new, 4] - row["enrolled_threshold"])
    score = raised(known.best_similarity(world.known), logits.amax(1), row["lift"])[~new]
    torch.testing.assert_close(margin[~new], score - known.threshold)
    p = (logits[~new] / row["temperature"]).softmax(1).amax(1)
    a, b = known.platt
    torch.testing.assert_close(sure[~new], p * (a * margin[~new] + b).sigmoid())


def test_added_faces_of_learned_characters_raise_the_threshold_by_what_others_gain(world):
    order = torch.arange(200).view(5, 40).T.flatten()  # each of the five, in turn
    faces, labels = world.faces[order], world.labels[order]
    known = Gallery(faces, labels, 5, trained=120)
    gain = []
    for i in range(120, 200):
        best = []
        for count in (120, 200):
            cosines = known.unit[:count] @ known.unit[i]
            others = [cosines[labels[:count] == c] for c in range(5) if c != labels[i]]
            best.append(max(x.sort(descending=True)[0][:3].mean() for x in others))
        gain.append(best[1] - best[0])
    assert Gallery(faces[:120], labels[:120], 5).growth() == 0
    assert known.growth() == pytest.approx(sum(gain).item() / 80, abs=1e-6)
    # If one character alone has added faces, they gain nothing, so the others' learned faces are asked.
    more = torch.cat([faces[:120], world.faces[:40]])
    one = Gallery(more, torch.cat([labels[:120], labels.new_zeros(40)]), 5, trained=120)
    assert 0 < one.growth() < known.growth()
    row = gallery.calibrate(faces[:120], labels[:120], world.held_out)
    found = replace(known, **row).settled()
    # the added faces, each without itself, beside those that were held out
    alone = found.unit[120:] @ found.unit.T - 2 * F.one_hot(torch.arange(120, 200), 200)
    nearest = [alone[:, labels == c].sort(1, descending=True)[0][:, :3].mean(1) for c in range(5)]
    scores = torch.cat([row["held_known"] + known.growth(), torch.stack(nearest, 1).amax(1)])
    share = (200 * gallery.REFUSED + 80 * gallery.OF_ADDED) / 280
    expected = gallery.threshold_of(scores, row["held_unknown"] + known.growth(), share)
    assert found.threshold == pytest.approx(expected["threshold"], abs=1e-5)
    logits = world.logits.clone()
    logits[:50] = logits[:50].roll(1, 1)  # the head is wrong, and added faces say so
    who, similarity, margin, sure = found.decide(logits, world.known)
    torch.testing.assert_close(margin, similarity - found.threshold)
    changed = who != logits.argmax(1)
    assert 0 < changed.sum() <= 50 and torch.equal(sure.isnan(), changed)


def test_confidences_are_fitted_to_what_was_drawn():
    torch.manual_seed(0)
    scores = torch.randn(20000, 5)
    drawn = torch.multinomial(scores.softmax(1), 1)[:, 0]
    assert gallery.fit_temperature(scores * 3, drawn) == pytest.approx(3, rel=0.1)
    sure = 20 * torch.eye(5)  # five pictures, all right
    assert gallery.fit_temperature(sure, torch.arange(5)) > 1  # but no proof
    a, b = gallery.fit_platt(torch.randn(9000) + 1, torch.randn(3000) - 1)  # log-odds: 2 x
    assert a == pytest.approx(2, rel=0.1) and b == pytest.approx(0, abs=0.15)


# ---- the gallery ---------------------------------------------------------------------------------


def test_a_missing_gallery_is_built_of_the_training_pictures(fresh, monkeypatch):
    first, about = read_safetensors(fresh / GALLERY)
    (fresh / GALLERY).unlink()
    assert "faces of 3 characters" in said(fresh, FACE).stderr
    tensors, header = read_safetensors(fresh / GALLERY)
    assert header == about and all(torch.equal(tensors[name], first[name]) for name in tensors)
    net, _ = finetune_lora.load_classifier("runs/a-lora")
    train = data.open_split("datasets/packed", "train")
    rows = torch.tensor([train["header"]["keys"].index(key) for key in header["keys"]])
    autocast = autocast_of(torch.device("cpu"), "fp32")
    expected = net.neck(pooled_of(net, train, rows, autocast, mirrored=True))
    torch.testing.assert_close(tensors["embeddings"], expected, atol=1e-4, rtol=1e-4)
    (fresh / GALLERY).unlink()
    monkeypatch.setattr(recognize, "FACES", 3)
    assert recognize.open_gallery("runs/a-lora").labels.bincount().tolist() == [3, 3, 3]


# ---- names and enrolment -------------------------------------------------------------------------


def test_it_names_files_folders_and_archives_and_tells_the_nearest_faces(fresh, monkeypatch):
    (row,) = rows_of(fresh, FACE)
    assert row["name"] == "class1" and row["known"] and 0.5 < row["confidence"] <= 1
    assert [face["name"] for face in row["nearest"]] == ["class1"] * 3
    assert row["similarity"] > row["threshold"]
    guesses = [(r["picture"].split("/")[0], r["best_guess"]) for r in rows_of(fresh, "images")]
    assert len(guesses) == 72 and np.mean([true == guess for true, guess in guesses]) > 0.9
    shutil.make_archive(fresh / "faces", "zip", fresh / "images")
    assert [r["best_guess"] for r in rows_of(fresh, "faces.zip")] == [x for _, x in guesses]
    monkeypatch.setattr(sys, "stdin", iter([f"{FACE}\n", "images/class0/illust0_0.png\n"]))
    assert [r["name"] for r in rows_of(fresh, "- --threshold 2")] == [None] * 2
    (fresh / "text.png").write_text("no picture")
    found = said(fresh, f"text.png no.png {FACE}")  # the others go on
    assert "text.png" in found.stderr and "no.png" in found.stderr
    assert found.stdout.split(": ")[1].startswith("class1, confidence")
    assert "unknown (unlike all known" in said(fresh, f"{FACE} --threshold 2").stdout


def test_pictures_are_cut_as_those_it_learned_from(fresh, monkeypatch):
    cuts = []

    def noted(*words):
        cuts.append(words[4:])
        return decode(*words)

    monkeypatch.setattr(ingest.pictures, "decode", noted)
    said(fresh, FACE)
    net, header = finetune_lora.load_classifier("runs/a-lora")
    changed = net, header | {"crop": "figure", "margin": 0.3}
    monkeypatch.setattr(recognize, "load_classifier", lambda _: changed)
    said(fresh, FACE)
    assert cuts == [("centre", 0.1), ("figure", 0.3)]


def test_a_run_of_half_the_size_says_the_same(fresh):
    run_line("apps.export runs/a-lora --to half --out half", fresh, check=0)
    for path in fresh.glob("half/*.safetensors"):
        assert torch.float32 not in {x.dtype for x in read_safetensors(path)[0].values()}
    others = json_of(f"apps.recognize half {CPU} images --json", fresh)
    for whole, half in zip(rows_of(fresh, "images"), others, strict=True):
        assert whole["best_guess"] == half["best_guess"]
        assert whole["similarity"] == pytest.approx(half["similarity"], abs=5e-3)


ENROLLED = (  # who, which pictures of a newcomer, what is told, added pictures of each afterwards
    ("Zoë", (0, 4), "Zoë is enrolled with 4 pictures; 4 characters are known", {"Zoë": 4}),
    ("Bob", (0, 4), "was added as Zoë; it is Bob now", {"Bob": 4}),  # by mistake
    ("Zoë", (0, 4), "was added as Bob; it is Zoë now", {"Zoë": 4}),
    ("Zoë", (0, 2), "enrolled with 4 pictures", {"Zoë": 4}),  # each counts once
    ("Zoe\u0308", (5, 6), "enrolled with 5 pictures", {"Zoë": 5}),  # the same name
    ("Ann", (6, 9), "Ann is enrolled with 3 pictures", {"Zoë": 5, "Ann": 3}),
    ("Zoë", None, "Zoë is forgotten; the gallery knows 4", {"Ann": 3}),
    (
        "class2",
        (0, 4),
        "class2 has 16 pictures, 4 of them new",
        {"Ann": 3, "class2": 4},
    ),
    ("class2", None, "known from training alone; 4 added", {"Ann": 3}),
    ("Bea", "class1", "was learned as class1; it stays there, too", {"Ann": 3, "Bea": 24}),
    ("Bea", None, "Bea is forgotten", {"Ann": 3}),
    ("Ann", None, "Ann is forgotten; the gallery knows 3", {}),
)


def test_pictures_are_added_and_forgotten_and_each_has_one_name(fresh):
    before = Gallery.load("runs/a-lora")
    draw_folder(fresh / "new", 1, 9, seed=5)
    pictures = sorted((fresh / "new/class0").iterdir())
    for who, some, words, added in ENROLLED:
        command = [*NAME.split(), "--enrol", who]
        if some is None:
            command = ["apps.recognize", "runs/a-lora", "--forget", who]
        elif some == "class1":
            command += [fresh / "images/class1"]
        else:
            command += pictures[slice(*some)]
        told = call(*command, cwd=fresh, check=0).stdout
        assert words in told and ("get another name now" in told) == (some is not None)
        after = Gallery.load("runs/a-lora")
        names = [after.names[label] for label in after.labels[after.trained :]]
        assert {name: names.count(name) for name in names} == added
        assert torch.equal(after.labels[: after.trained], before.labels)
    assert after.keys == before.keys and torch.equal(after.unit, before.unit)


@pytest.mark.parametrize("name", ["Zoë", "class2"])
def test_a_character_is_known_by_its_added_pictures(fresh, name):
    draw_folder(fresh / "new", 1, 8, seed=5)
    pictures = [str(path) for path in sorted((fresh / "new/class0").iterdir())]
    call(*NAME.split(), "--enrol", name, *pictures[:4], cwd=fresh, check=0)
    rows = rows_of(fresh, f"{' '.join(pictures[4:])} --threshold -1")
    assert np.mean([row["name"] == name for row in rows]) >= 0.75
    assert rows[0]["nearest"][0]["name"] == name
    assert rows[0]["confidence"] is None  # a similarity is no probability
    text = said(fresh, f"{pictures[4]} --threshold -1").stdout
    assert f": {name}, by added pictures, similarity" in text
    known = rows_of(fresh, "images/class1 --threshold -1")
    assert np.mean([r["name"] == "class1" for r in known]) > 0.9
    listed = run_line("apps.recognize runs/a-lora --list", fresh, check=0).stdout
    how = {"Zoë": "enrolled, 4", "class2": "learned in training, 16"}[name]
    assert f"{name}: {how} pictures" in listed and "class0: learned in training" in listed


def test_a_threshold_moves_no_confidence(fresh):
    rows = []
    for words in ("", "--threshold 1", "--threshold -1"):
        answers = rows_of(fresh, f"images/class0 {words}")
        rows.append([row["confidence"] for row in answers])
    assert rows[0] == pytest.approx(rows[1], abs=1e-3) == rows[2]


@pytest.mark.parametrize("name", ["", "a\nb", "a\0b", "\x1b[2J", "x" * 101, "\u202eb", "\ud800"])
def test_what_is_no_name_is_neither_packed_nor_enrolled(name):
    with pytest.raises(UserError, match="printable"):
        recognize.enrol(SimpleNamespace(enrol=name), None, {"classes": []}, None)
    with pytest.raises(UserError, match="printable"):
        class_names([sources.Record("a", "a", name)])
    records = [sources.Record("a", "a", "b", split="train", tags=(name, "hat"))] * 3
    assert vocabulary(records)[0] == ["hat"]
    assert door.is_name("初音\u3000ミク $_$") and door.shown("a\x1b\n") == "a\\x1b\\n"


@pytest.mark.parametrize("value", [0.0, 2.66, -1.2, 1.5e-4])
def test_a_head_that_is_equally_sure_of_all_pictures_lifts_none(value):
    logits = torch.full((20, 3), value)
    logits[::2] += 1e-6  # rounding
    lift = gallery.lift_of(logits)
    asked = gallery.lifted(torch.tensor([0.2, 0.9]), torch.tensor([50.0, -50.0]), lift)
    assert torch.equal(asked, torch.tensor([0.2, 0.9]))
