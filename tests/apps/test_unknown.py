"""apps/unknown.py: rates and recognize.json; numbers against scikit-learn, by hand."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import draw_folder, refused, run_line
from made import CPU, PACKED
from sklearn.metrics import roc_auc_score

import data
from apps import recognize
from apps.unknown import detection_rate, measure, open_set, reliability, verification
from common import metrics
from common.checkpoints import place_of
from common.train import read_safetensors, seeded

MEASURE = f"apps.unknown runs/a-lora {CPU}"


# ---- rates ---------------------------------------------------------------------------------------


def margins(known=400, unknown=300):
    """Random margins of known and unknown characters, with ties; which names of known ones are true."""
    draws = seeded(1)
    same = ((torch.randn(known, generator=draws) + 1) * 4).round() / 4
    other = (torch.randn(unknown, generator=draws) * 4).round() / 4
    return same, torch.rand(known, generator=draws) < 0.8, other


def test_rates_of_pairs_are_read_off_the_roc_curve():
    same, _, other = margins(300, 2000)
    row = verification(same, other)
    for most in (0.001, 0.01, 0.1):
        cuts = [cut for cut in other if (other >= cut).double().mean() <= most]
        accepted = [100 * (same >= cut).double().mean() for cut in cuts]
        assert row[f"tpr_at_fpr_{100 * most:g}"] >= max(accepted, default=0) - 1e-3
    pairs = metrics.truth_and_scores(same, other)
    assert row["roc_auc"] == pytest.approx(100 * roc_auc_score(*pairs), abs=1e-3)
    assert (row["positive_pairs"], row["negative_pairs"]) == (300, 2000)


def test_unknown_characters_are_counted_by_their_margins():
    known, right, unknown = margins()
    enrolled = torch.arange(400) % 3 == 0
    row = open_set(known, right, enrolled, unknown)
    named = right & (known >= 0)
    at_5 = np.quantile(known.numpy(), 0.05)  # the field's operating point: 5 % of the known fail
    expected = {
        "known_rejected": known < 0,
        "known_named_rightly": named,
        "enrolled_named_rightly": named[enrolled],
        "strangers_unknown": unknown < 0,
        "strangers_unknown_at_5": unknown < at_5,
    }
    for name, share in expected.items():
        assert row[name] == pytest.approx(100 * share.double().mean().item(), abs=1e-3), name
    auc = roc_auc_score(*metrics.truth_and_scores(known, unknown))
    assert row["auroc_unknown"] == pytest.approx(100 * auc, abs=1e-3)
    assert (row["known"], row["strangers"], row["enrolled"]) == (400, 300, 134)
    nobody = open_set(known, right, enrolled & False, unknown[:0])
    assert not nobody.keys() & {"enrolled_named_rightly", "strangers_unknown", "auroc_unknown"}
    for far in (0.01, 0.1, 0.5):  # the share of unknown ones that pass
        cuts = [cut for cut in unknown if (unknown > cut).double().mean() <= far]
        best = max(((known > cut) & right).double().mean().item() for cut in cuts)
        assert detection_rate(known, right, unknown, far) == pytest.approx(best, abs=1e-6)


def test_a_picture_without_a_label_may_show_anybody():
    labels, true = torch.tensor([0, 1, 2, -1]), torch.tensor([0, 1, -1, -1])
    unit = F.normalize(torch.randn(4, 8, generator=seeded(0)), dim=1)
    scores = dict(margin=torch.tensor([0.3, 0.2, -0.1, 0.4]), right=true >= 0, sure=torch.rand(4))
    asked = SimpleNamespace(labels=labels, true=true, unit=unit, groups=np.arange(4), **scores)
    asked.colours = unit
    assert measure(asked, asked, 2)["open_set"]["strangers"] == 1
    asked.labels, asked.true = (
        labels * 0 - 1,
        true * 0 - 1,
    )  # nothing has a label: all are strangers
    own = SimpleNamespace(**vars(asked) | {"true": true})
    assert measure(asked, own, 2)["open_set"]["strangers"] == 4


def test_a_set_is_found_where_pictures_are_and_not_where_a_network_has_its_name(fresh, monkeypatch):
    monkeypatch.chdir(fresh)
    (fresh / "runs/toon-of-mine").mkdir()
    (fresh / "runs/toon-of-mine/model.safetensors").write_bytes(b"a network")
    assert place_of("datasets/toon-of-mine", "runs/a") == Path("datasets/toon-of-mine")
    shutil.copytree(fresh / "datasets/packed", fresh / "moved/datasets/toon-of-mine")
    shutil.copytree(fresh / "runs/a", fresh / "moved/runs/a")
    found = place_of("datasets/toon-of-mine", "moved/runs/a")
    assert found.samefile("moved/datasets/toon-of-mine")


def test_a_set_that_was_packed_anew_does_not_measure_what_learned_the_old_one(fresh):
    shutil.move(fresh / "datasets/packed", fresh / "datasets/old")
    shutil.copytree(fresh / "datasets/other", fresh / "datasets/packed")  # dealt by another seed
    assert "packed anew" in refused(run_line(MEASURE, fresh))
    assert "packed anew" in refused(run_line(f"{MEASURE} --data datasets/packed", fresh))
    run_line(f"{MEASURE} --data datasets/old", fresh, check=0)
    (fresh / "runs/a-lora/gallery.safetensors").unlink()
    assert "packed anew" in refused(run_line(f"apps.recognize runs/a-lora images {CPU}", fresh))


@pytest.mark.parametrize(
    ("known", "right", "unknown", "error"),
    [
        ([0.05, 0.95, 0.95, 0.95], [0, 1, 1, 0], [], 0.25 * 0.05 + 0.75 * (0.95 - 2 / 3)),
        # with weights: 1/4 of each known one, 1/2 of each unknown one
        ([0.05, 0.95, 0.95, 0.95], [0, 1, 1, 0], [0.95, 0.35], 0.4375),
        ([0.9, 0.9, np.nan], [1, 1, 0], [0.9] * 8, 0.5),  # 2/3 are right, and 1 is wrong
        ([1.0, 1, 1], [1, 1, 1], [0.0] * 5, 0),
        ([0.95, 0.05], [0, 1], [], 0.95),  # too sure and not sure enough do not cancel
    ],
)
def test_calibration_error_is_the_mean_gap_of_its_bins(known, right, unknown, error):
    """Known and unknown characters weigh the same."""
    right = torch.tensor(right).bool()
    row = reliability(torch.tensor(known), right, torch.tensor(unknown))
    assert row["calibration_error"] == pytest.approx(100 * error, abs=1e-3)


def test_names_that_are_sure_are_right_as_often_where_half_are_unknown():
    known, right = torch.tensor([0.9, 0.8, 0.95, 0.2]), torch.tensor([1, 1, 0, 1]).bool()
    row = reliability(known, right, torch.tensor([0.85, 0.1]))
    assert row["right_when_sure"] == pytest.approx(100 * (2 / 4) / (3 / 4 + 1 / 2))
    assert reliability(known / 2, right, torch.zeros(2))["right_when_sure"] is None


# ---- pictures of nobody -------------------------------------------------------------------------


def test_pictures_of_nobody_decide_the_threshold(fresh):
    """They look like the known characters, and are no copies of their pictures."""
    draw_folder(fresh / "nobody", 3, 8)  # the colours of the classes; some are copies, and left out
    run_line(f"data.py list.csv --unknown nobody --out datasets/with {PACKED}", fresh, check=0)
    shutil.copy(fresh / "datasets/with/unknown.safetensors", fresh / "datasets/packed")
    count = len(data.open_split("datasets/packed", "unknown")["labels"])
    gallery = fresh / "runs/a-lora/gallery.safetensors"
    _, before = read_safetensors(gallery)
    gallery.unlink()
    done = run_line(f"apps.recognize runs/a-lora {CPU} images/class0", fresh, check=0)
    assert count > 10 and f"of your {count} strangers are called unknown" in done.stderr
    _, after = read_safetensors(gallery)
    assert after["threshold"] != before["threshold"]
    assert after["names"] == before["names"]


def test_characters_that_were_held_out_set_no_threshold(fresh):
    """They are there to be asked, so the threshold is that of the learned ones alone."""
    words = f"{CPU} --data datasets/packed --split val --method linear --epochs 1 --hold-out 1"
    run_line(f"finetune_lora.py runs/a {words} --out runs/less", fresh, check=0)
    gallery = recognize.open_gallery("runs/less", "cpu", "fp32")
    assert len(gallery.strangers) == 0 and len(gallery.names) == 2


# ---- recognize.json ------------------------------------------------------------------------------


def verified(fresh, words, folder):
    """What is printed, and recognize.json."""
    text = run_line(f"{MEASURE} {words}", fresh, check=0).stdout
    return text, json.loads((fresh / "runs/a-lora" / folder / "recognize.json").read_text())


def pack_with(fresh, name, classes):
    """datasets/NAME of new classes beside those of NAME/, by the names of the folders."""
    draw_folder(fresh / "drawn", len(classes), 20, seed=5)
    for i, new in enumerate(classes):
        shutil.move(fresh / f"drawn/class{i}", fresh / name / new)
    run_line(f"data.py {name} --out datasets/{name} --size 32", fresh, check=0)
    return f"--data datasets/{name} --split train", f"{name}-train"


def test_unknown_characters_are_measured_and_counted_apart_once_enrolled(fresh):
    shutil.copytree(fresh / "images", fresh / "more")
    place = pack_with(fresh, "more", ["somebody"])
    text, row = verified(fresh, *place)
    found = row["open_set"]
    assert found["known"] > 30 and found["strangers"] > 5 and 0 <= found["auroc_unknown"] <= 100
    assert f"{found['strangers_unknown']:.1f} % called unknown" in text
    assert "is there already" in refused(run_line(f"{MEASURE} {place[0]}", fresh))
    (fresh / "runs/a-lora" / place[1] / "recognize.json").unlink()
    enrol = f"apps.recognize runs/a-lora {CPU} --enrol somebody more/somebody"
    run_line(enrol, fresh, check=0)
    found = verified(fresh, *place)[1]["open_set"]
    assert found["strangers"] == 0 and "strangers_unknown" not in found
    assert found["enrolled"] > 5 and found["enrolled_named_rightly"] > 60
    line = "data.py images --out datasets/figures --size 32 --crop figure"
    run_line(line, fresh, check=0)
    told = run_line(f"{MEASURE} --data datasets/figures --split train", fresh, check=0).stderr
    assert "was packed by --crop figure" in told and "--crop centre" in told
    _, row = verified(fresh, *pack_with(fresh, "others", ["x", "y"]))  # of no known character
    assert row["open_set"]["known"] > 10 and row["open_set"]["strangers"] > 20
    assert 0 <= row["calibration_error"] <= 100
