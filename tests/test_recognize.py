"""recognize.py: names, unknown characters, enrolment, verification; its numbers against scikit-learn and by hand."""

import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import call, draw_folder, refused, run_line
from made import CPU, home
from sklearn.metrics import roc_auc_score, roc_curve

import data
import finetune_lora
import ingest.pictures
import recognize
from common import metrics
from common.classifier import pooled_of
from common.io import read_safetensors, save_safetensors
from common.lora import save_encoder
from common.train import autocast_of, seeded
from ingest.decode import decode
from model import ViT

NAME = f"recognize.py runs/a-lora {CPU}"
FACE = "images/class1/illust3_0.png"
GALLERY = "runs/a-lora/gallery.safetensors"


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A home of its own, which is the current folder."""
    monkeypatch.chdir(home(tmp_path))
    return tmp_path / "home"


def rows_of(base, words):
    """The answers for the pictures of a line of words."""
    return [json.loads(x) for x in said(base, f"{words} --json").stdout.splitlines()]


def said(base, words):
    return run_line(f"{NAME} {words}", base, check=0)


# ---- rates ---------------------------------------------------------------------------------------


def test_rates_are_read_off_the_roc_curve():
    draws = seeded(0)
    same = ((torch.randn(300, generator=draws) + 1) * 4).round() / 4  # many ties
    other = (torch.randn(2000, generator=draws) * 4).round() / 4
    row = recognize.verification(same, other)
    for most in (0.001, 0.01, 0.1):
        cuts = [cut for cut in other if (other >= cut).double().mean() <= most]
        accepted = [100 * (same >= cut).double().mean() for cut in cuts]
        assert row[f"tpr_at_fpr_{100 * most:g}"] >= max(accepted, default=0) - 1e-3
    false, true, _ = roc_curve(*metrics.truth_and_scores(same, other))
    error = metrics.equal_error_rate(same, other)
    assert np.interp(error, false, true) == pytest.approx(1 - error, abs=1e-9)
    assert (row["positive_pairs"], row["negative_pairs"]) == (300, 2000)


def test_detection_rate_is_what_its_words_say():
    draws = seeded(0)
    known, unknown = torch.randn(200, generator=draws) + 1, torch.randn(100, generator=draws)
    right = torch.rand(200, generator=draws) < 0.8
    for far in (0.01, 0.1, 0.5):
        cuts = [x for x in torch.cat([known, unknown]) if (unknown >= x).float().mean() <= far]
        best = max(((known >= cut) & right).float().mean().item() for cut in cuts)
        assert recognize.detection_rate(known, right, unknown, far) == pytest.approx(best, abs=1e-6)


def test_unknown_characters_are_counted_by_their_margins():
    draws = seeded(1)
    known, unknown = torch.randn(400, generator=draws) + 1, torch.randn(300, generator=draws)
    right, enrolled = torch.rand(2, 400, generator=draws) < 0.7
    row = recognize.open_set(known, right, enrolled, unknown)
    named = right & (known >= 0)
    at_5 = np.quantile(known.numpy(), 0.05)  # the field's operating point: 5 % of the known fail
    expected = {
        "known_rejected": (known < 0),
        "known_named_rightly": named,
        "enrolled_named_rightly": named[enrolled],
        "strangers_unknown": unknown < 0,
        "strangers_unknown_at_5": unknown < at_5,
    }
    for name, share in expected.items():
        assert row[name] == pytest.approx(100 * share.double().mean().item(), abs=1e-3), name
    truth = [1] * 400 + [0] * 300
    auc = roc_auc_score(truth, torch.cat([known, unknown]))
    assert row["auroc_unknown"] == pytest.approx(100 * auc, abs=1e-3)
    assert (row["known"], row["strangers"], row["enrolled"]) == (400, 300, int(enrolled.sum()))
    nobody = recognize.open_set(known, right, torch.zeros(400, dtype=torch.bool), unknown[:0])
    assert not nobody.keys() & {"enrolled_named_rightly", "strangers_unknown", "auroc_unknown"}


@pytest.mark.parametrize(
    ("known", "right", "unknown", "error"),
    [
        ([0.05, 0.95, 0.95, 0.95], [0, 1, 1, 0], [], 0.25 * 0.05 + 0.75 * (0.95 - 2 / 3)),
        # with weights: 1/4 of each known one, 1/2 of each unknown one
        ([0.05, 0.95, 0.95, 0.95], [0, 1, 1, 0], [0.95, 0.35], 0.4375),
        ([0.9, 0.9, np.nan], [1, 1, 0], [0.9] * 8, 0.5),  # 2/3 are right, and 1 is wrong
        ([1.0, 1, 1], [1, 1, 1], [0.0] * 5, 0),
    ],
)
def test_calibration_error_is_the_mean_gap_of_its_bins_where_half_are_unknown(
    known, right, unknown, error
):
    found = recognize.calibration_error(
        torch.tensor(known), torch.tensor(right).bool(), torch.tensor(unknown)
    )
    assert found == pytest.approx(100 * error, abs=1e-3)


# ---- similarity and thresholds -------------------------------------------------------------------


@pytest.fixture
def world():
    """Faces of five characters in a gallery, other faces of them, faces of nobody, and logits."""
    torch.manual_seed(0)
    centre, labels = torch.randn(5, 16), torch.arange(5).repeat(40)
    faces, known = (centre[labels] + 0.3 * torch.randn(200, 16) for _ in range(2))
    logits = F.normalize(known) @ F.normalize(centre).T
    unknown = centre[0] + 2 * torch.randn(1000, 16)
    gallery = recognize.make_gallery(faces, labels, 5)
    found = SimpleNamespace(labels=labels, faces=faces, known=known, unknown=unknown)
    found.gallery, found.held_out = gallery, (logits, known, labels)
    found.unit = recognize.compared(known, gallery)
    found.score = recognize.best_similarity(found.unit, gallery)
    return found


def accepted(threshold, faces, gallery):
    """The share of faces that are similar enough to somebody."""
    score = recognize.best_similarity(recognize.compared(faces, gallery), gallery)
    return (score >= threshold).float().mean().item()


def test_whitening_is_the_inverse_of_the_covariance_within_characters(world):
    mean, matrix = recognize.whitening(world.faces, world.labels)
    rows = recognize.evenly_of_each(world.labels, recognize.WHITENED)
    assert [len(some) for some in rows] == [recognize.WHITENED] * 5
    groups = [world.faces[some] for some in rows]
    inside = [group - group.mean(0) for group in groups]
    within = sum(x.T @ x for x in inside).double() / (5 * recognize.WHITENED - 5)
    within += recognize.SHRINK * within.diagonal().mean() * torch.eye(16)
    torch.testing.assert_close((matrix @ matrix.T).double() @ within, torch.eye(16).double())
    torch.testing.assert_close(mean, torch.stack([group.mean(0) for group in groups]).mean(0))


def test_similarity_is_the_mean_cosine_with_the_three_nearest_faces_of_a_character(world):
    unit, best = world.gallery["unit"], []
    for c in range(5):
        cosine = (world.unit @ unit[world.labels == c].T).sort(1, descending=True)[0]
        best.append(cosine[:, :3].mean(1))
    torch.testing.assert_close(world.score, torch.stack(best).amax(0))
    sums = torch.stack([unit[world.labels == c].sum(0) for c in range(5)])
    torch.testing.assert_close(world.gallery["means"], F.normalize(sums))


def test_the_threshold_rejects_as_many_known_faces_as_it_accepts_unknown_ones(world):
    found = recognize.calibrate(world.faces, world.labels, world.held_out, world.unknown)
    rejected = (world.score < found["threshold"]).float().mean().item()
    wrong = accepted(found["threshold"], world.unknown, world.gallery)
    assert wrong == pytest.approx(rejected, abs=0.01) and rejected < 0.091
    gallery, logits = world.gallery | found, world.held_out[0]
    who, _, margin, sure = recognize.decide(logits, world.known, gallery)
    assert (margin >= 0).float().mean() == pytest.approx(1 - rejected)
    assert (who == world.labels).float().mean() > 0.99 and sure.mean() > 0.8
    _, _, _, unsure = recognize.decide(logits.repeat(5, 1), world.unknown, gallery)
    assert unsure.mean() < 0.5
    low, high = torch.tensor([0.3, 0.6, 0.7, 0.9]), torch.tensor([0.1, 0.2, 0.4, 0.65])
    assert 0.4 < recognize.balance(low, high) < 0.61  # one of four is on the wrong side, either way


def test_no_more_known_faces_are_rejected_than_promised_however_alike_unknown_ones_are(world):
    twins = world.known[:50]
    found = recognize.calibrate(world.faces, world.labels, world.held_out, twins)
    rejected = (world.score < found["threshold"]).float().mean().item()
    assert rejected == pytest.approx(int(recognize.MOST_REJECTED * 200) / 200, abs=1e-6)


def test_known_faces_stand_for_unknown_ones_while_their_characters_are_left_out(world):
    labels, known = world.labels, world.known
    found = recognize.as_unknown(world.faces, labels, known, labels)
    for c in range(5):  # five folds of five characters: one is left out
        stay = labels != c
        gallery = recognize.make_gallery(world.faces[stay], labels[stay], 5)
        unit = recognize.compared(known[~stay], gallery)
        torch.testing.assert_close(found[~stay], recognize.best_similarity(unit, gallery))
    row = recognize.calibrate(world.faces, labels, world.held_out)
    assert row["threshold"] == pytest.approx(recognize.balance(world.score, found), abs=1e-6)


def test_five_percent_of_other_faces_pass_for_an_enrolled_character(world):
    threshold = recognize.enrolled_threshold(world.gallery, world.known, world.labels)
    passed = []
    for c in range(5):
        faces = world.gallery["unit"][world.labels == c]
        shots = faces[data.evenly_spaced(40, recognize.SHOTS)]
        cosine = world.unit @ F.normalize(shots.sum(0), dim=0)
        passed.append((cosine >= threshold)[world.labels != c])
    assert torch.cat(passed).float().mean().item() == pytest.approx(0.05, abs=0.002)


def test_an_enrolled_character_wins_where_its_mean_is_nearer_than_all_others(world):
    old, logits = world.labels < 4, world.held_out[0][:, :4]
    held_out = logits[old], world.known[old], world.labels[old]
    row = recognize.calibrate(world.faces[old], world.labels[old], held_out)
    gallery = recognize.make_gallery(world.faces, world.labels, 4) | row  # the fifth is enrolled
    unit = recognize.compared(world.known, gallery)
    to_mean = unit @ gallery["means"].T
    new = to_mean[:, 4] + recognize.HANDICAP > to_mean[:, :4].amax(1)
    assert 40 <= new.sum() < 200
    who, similarity, margin, sure = recognize.decide(logits, world.known, gallery)
    assert torch.equal(who == 4, new) and torch.equal(sure.isnan(), new)
    torch.testing.assert_close(similarity[new], to_mean[new, 4])
    torch.testing.assert_close(margin[new], to_mean[new, 4] - row["enrolled_threshold"])
    score = recognize.best_similarity(unit, gallery)[~new]
    torch.testing.assert_close(margin[~new], score - row["threshold"])
    p = (logits[~new] / row["temperature"]).softmax(1).amax(1)
    a, b = row["platt"]
    torch.testing.assert_close(sure[~new], p * (a * margin[~new] + b).sigmoid())


def test_confidences_are_fitted_to_what_was_drawn():
    torch.manual_seed(0)
    scores = torch.randn(20000, 5)
    drawn = torch.multinomial(scores.softmax(1), 1)[:, 0]
    assert recognize.fit_temperature(scores * 3, drawn) == pytest.approx(3, rel=0.1)
    a, b = recognize.fit_platt(torch.randn(9000) + 1, torch.randn(3000) - 1)  # log-odds: 2 x
    assert a == pytest.approx(2, rel=0.1) and b == pytest.approx(0, abs=0.15)


# ---- the gallery ---------------------------------------------------------------------------------


def test_a_missing_gallery_is_built_of_the_training_pictures(base, monkeypatch):
    first = read_safetensors(base / GALLERY)
    (base / GALLERY).unlink()
    told = said(base, FACE)
    assert "faces of 3 characters" in told.stderr and "class1" in told.stdout
    tensors, header = read_safetensors(base / GALLERY)
    assert header == first[1]
    assert all(torch.equal(tensors[name], first[0][name]) for name in tensors)
    net, _ = finetune_lora.load_classifier("runs/a-lora")
    train, known = (
        data.open_split("datasets/packed", "train"),
        recognize.load_gallery("runs/a-lora"),
    )
    rows = torch.tensor([train["header"]["keys"].index(key) for key in known["keys"]])
    autocast = autocast_of(torch.device("cpu"), torch.float32)
    pooled = pooled_of(net, train, rows, autocast, mirrored=True)
    torch.testing.assert_close(net.neck(pooled), known["embeddings"], atol=1e-4, rtol=1e-4)
    (base / GALLERY).unlink()
    monkeypatch.setattr(recognize, "FACES", 3)
    assert recognize.open_gallery("runs/a-lora")["labels"].bincount().tolist() == [3, 3, 3]


def test_a_gallery_is_of_this_run_and_its_data_or_refused(base):
    tensors, header = read_safetensors(base / "runs/a-lora/head.safetensors")

    def with_head(**changes):
        save_safetensors(tensors, base / "runs/a-lora/head.safetensors", header | changes)
        return refused(run_line(f"{NAME} {FACE}", base))

    about = read_safetensors(base / GALLERY)[1]
    nobody = torch.zeros(0, 32), torch.zeros(0).long(), about | {"keys": []}
    recognize.save_gallery(base / GALLERY, *nobody)
    assert "keys" in with_head()
    (base / GALLERY).unlink()
    assert "does not exist" in with_head(data="gone") and not (base / GALLERY).exists()
    torch.manual_seed(1)  # another encoder in the place of that which it was trained on
    save_encoder(ViT(32, 8, 32, 4, 2), base / "other/model.safetensors", {})
    assert "not the encoder" in with_head(base="other")


def test_who_is_enrolled_stays_when_a_run_is_judged_again(base):
    said(base, "--enrol new images/class0")
    before = (base / GALLERY).read_bytes()
    run_line("finetune_lora.py --resume runs/a-lora --split test", base, check=0)
    assert (base / "runs/a-lora/metrics-test.json").exists()
    assert (base / GALLERY).read_bytes() == before


def test_characters_that_are_left_out_stand_for_unknown_ones(base):
    words = f"--data datasets/packed --method linear --hold-out 1 --epochs 2 {CPU} --out runs/new"
    run_line(f"finetune_lora.py runs/a {words}", base, check=0)
    assert len(recognize.open_gallery("runs/new")["names"]) == 2


# ---- names ---------------------------------------------------------------------------------------


def test_it_names_files_folders_and_archives_and_tells_the_nearest_faces(base, monkeypatch):
    (row,) = rows_of(base, FACE)
    assert row["name"] == "class1" and row["known"] and 0.5 < row["confidence"] <= 1
    assert len(row["nearest"]) == 3 and row["nearest"][0]["name"] == "class1"
    assert row["similarity"] > row["threshold"]
    folder = rows_of(base, "images")
    right = [r["best_guess"] == r["picture"].split("/")[0] for r in folder]
    assert len(right) == 72 and np.mean(right) > 0.9
    shutil.make_archive(base / "faces", "zip", base / "images")
    assert [r["best_guess"] for r in rows_of(base, "faces.zip")] == [
        r["best_guess"] for r in folder
    ]
    assert said(base, FACE).stdout.split(": ")[1].startswith("class1, confidence")
    monkeypatch.setattr(sys, "stdin", iter([f"{FACE}\n", "images/class0/illust0_0.png\n"]))
    assert [r["name"] for r in rows_of(base, "- --threshold 1")] == [None] * 2
    text = said(base, f"{FACE} --threshold 1").stdout
    assert "unknown (unlike all known characters: similarity" in text and "threshold 1.00)" in text


def test_pictures_are_cut_as_those_it_learned_from(base, monkeypatch):
    cuts = []

    def noted(*words):
        cuts.append(words[4:])
        return decode(*words)

    monkeypatch.setattr(ingest.pictures, "decode", noted)
    said(base, FACE)
    net, header = finetune_lora.load_classifier("runs/a-lora")
    changed = net, header | {"crop": "figure", "margin": 0.3}
    monkeypatch.setattr(recognize, "load_classifier", lambda _: changed)
    said(base, FACE)
    assert cuts == [("centre", 0.1), ("figure", 0.3)]


def test_an_unreadable_picture_is_one_line_and_the_others_go_on(base):
    (base / "text.png").write_text("no picture")
    found = said(base, f"text.png no.png {FACE}")
    assert len(found.stdout.splitlines()) == 1 and len(found.stderr.splitlines()) == 2
    assert "text.png" in found.stderr and "no.png" in found.stderr


# ---- enrolment -----------------------------------------------------------------------------------


def test_a_new_character_is_known_from_few_pictures_without_training_and_can_be_forgotten(base):
    before = recognize.load_gallery("runs/a-lora")
    weights = (base / "runs/a-lora/head.safetensors").read_bytes()
    draw_folder(base / "new", 1, 8, seed=5)
    pictures = [str(path) for path in sorted((base / "new/class0").iterdir())]

    def enrol(name, *some):
        return call(*NAME.split(), "--enrol", name, *some, cwd=base, check=0).stdout

    assert "enrolled with 4 pictures" in enrol("Zoë", *pictures[:4])
    rows = rows_of(base, f"{' '.join(pictures[4:])} --threshold -1")
    assert np.mean([r["name"] == "Zoë" for r in rows]) >= 0.75
    assert rows[0]["nearest"][0]["name"] == "Zoë"
    assert rows[0]["confidence"] is None  # a similarity is no probability
    known = rows_of(base, "images/class1 --threshold -1")
    assert np.mean([r["name"] == "class1" for r in known]) > 0.9
    assert "enrolled with 5 pictures" in enrol("Zoe\u0308", pictures[5])  # the same name
    listed = run_line("recognize.py runs/a-lora --list", base, check=0).stdout
    assert "Zoë: enrolled, 5 pictures" in listed and "class0: learned in training" in listed
    enrol("Ann", *pictures[:3])
    run_line("recognize.py runs/a-lora --forget Zoë", base, check=0)
    assert recognize.load_gallery("runs/a-lora")["names"][-1] == "Ann"
    run_line("recognize.py runs/a-lora --forget Ann", base, check=0)
    after = recognize.load_gallery("runs/a-lora")
    assert after["names"] == before["names"] and after["keys"] == before["keys"]
    assert torch.equal(after["unit"], before["unit"])
    assert (base / "runs/a-lora/head.safetensors").read_bytes() == weights


# ---- verification --------------------------------------------------------------------------------


def pack_with(base, name, classes, seed):
    """datasets/NAME of new classes beside those of images/, by the names of the folders."""
    draw_folder(base / "drawn", len(classes), 20, seed=seed)
    for i, new in enumerate(classes):
        shutil.move(base / f"drawn/class{i}", base / name / new)
    run_line(f"data.py {name} --out datasets/{name} --size 32", base, check=0)


def verified(base, words, file):
    text = said(base, f"--verify {words}").stdout
    return text, json.loads((base / "runs/a-lora" / file).read_text())


def test_verification_and_unknown_characters(base):
    text, row = verified(base, "", "recognize.json")
    assert "ROC-AUC" in text and "no unknown characters in this set" in text and "{" not in text
    assert {"machine", "commit", "command"} <= set(row) and row["open_set"]["strangers"] == 0
    pairs = row["verification"]
    assert pairs["roc_auc"] > 80 and 0 <= pairs["eer"] < 30
    assert pairs["tpr_at_fpr_10"] >= pairs["tpr_at_fpr_0.1"]
    shutil.copytree(base / "images", base / "more")
    pack_with(base, "more", ["somebody"], seed=5)
    words, file = "--data datasets/more --split train", "more-train/recognize.json"
    text, row = verified(base, words, file)
    found = row["open_set"]
    assert found["known"] > 30 and found["strangers"] > 5 and 0 <= found["auroc_unknown"] <= 100
    assert f"{found['strangers_unknown']:.1f} % called unknown" in text
    assert "is there already" in refused(run_line(f"{NAME} --verify {words} --threshold .1", base))
    (base / "runs/a-lora" / file).unlink()
    said(base, "--enrol somebody more/somebody")
    found = verified(base, words, file)[1]["open_set"]  # known now, and counted apart
    assert found["strangers"] == 0 and "strangers_unknown" not in found
    assert found["enrolled"] > 5 and found["enrolled_named_rightly"] > 60


def test_unknown_characters_of_another_set_are_measured_against_the_own_pictures(base):
    pack_with(base, "others", ["x", "y"], seed=7)
    words, file = "--data datasets/others --split train", "others-train/recognize.json"
    text, row = verified(base, words, file)
    line = recognize.shared_names(["X"], "datasets/others", "train")
    assert line.startswith("0 of 2 names of datasets/others are") and ": there x, here X;" in line
    assert row["open_set"]["known"] > 10 and row["open_set"]["strangers"] > 20
    assert "pictures of unknown characters" in text and 0 <= row["calibration_error"] <= 100


def test_a_run_of_half_the_size_says_the_same(base):
    run_line("export.py runs/a-lora --to half --out half", base, check=0)
    tensors = [read_safetensors(path)[0] for path in base.glob("half/*.safetensors")]
    assert len(tensors) == 3
    for arrays in tensors:
        assert torch.float32 not in {x.dtype for x in arrays.values()}
    first = rows_of(base, "images")
    done = run_line(f"recognize.py half {CPU} images --json", base, check=0)
    second = [json.loads(line) for line in done.stdout.splitlines()]
    assert [x["best_guess"] for x in first] == [x["best_guess"] for x in second]
    apart = [abs(x["similarity"] - y["similarity"]) for x, y in zip(first, second, strict=True)]
    assert max(apart) < 5e-3
