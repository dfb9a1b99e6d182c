"""recognize.py: names, unknown characters, enrolment, verification, hostile files; its numbers against scikit-learn."""

import io
import json
import shutil
import sys
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import call, draw_folder, refused
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_curve

import data
import finetune_lora
import ingest.pictures
import recognize
from common import metrics
from common.classifier import pooled_of
from common.command import LOCKS
from common.io import UserError, read_safetensors, save_safetensors
from common.lora import save_encoder
from common.train import autocast_of
from ingest.decode import decode
from model import ViT

CPU = ("--device", "cpu", "--dtype", "fp32")
QUICK = ("--batch-size", 16, *CPU)


@pytest.fixture(scope="package")
def run(small, tmp_path_factory):
    """A recogniser of three colours, trained for seconds: (its folder, the folder of pictures it
    learned from).
    """
    base = tmp_path_factory.mktemp("recognise")
    torch.manual_seed(0)
    save_encoder(ViT(32, 8, 32, 2, 2), base / "encoder" / "model.safetensors", {})
    words = ["--data", small, "--method", "lora", "--epochs", 12, "--keep", 1, *QUICK]
    call("finetune_lora.py", base / "encoder", *words, "--out", base / "run", cwd=base, check=0)
    recognize.open_gallery(base / "run", "cpu", "fp32")
    return base / "run", small.parent / "images"


@pytest.fixture
def copy(run, tmp_path):
    """The same run, to be spoiled."""
    return shutil.copytree(run[0], tmp_path / "run")


def recognise(capsys, *words):
    """recognize.py in this process -> what it printed."""
    before, sys.argv = sys.argv, ["recognize.py", *map(str, words), *CPU]
    try:
        with LOCKS:
            recognize.main()
    finally:
        sys.argv = before
    return capsys.readouterr()


def rows_of(capsys, *words):
    return [json.loads(line) for line in recognise(capsys, *words, "--json").out.splitlines()]


# ---- numbers -------------------------------------------------------------------------------------


def test_rates_are_read_off_the_roc_curve():
    draws = torch.Generator().manual_seed(0)
    positive = ((torch.randn(300, generator=draws) + 1) * 4).round() / 4  # many ties
    negative = (torch.randn(2000, generator=draws) * 4).round() / 4
    for most in (0.001, 0.01, 0.1):
        accepted = [
            (positive >= cut).double().mean()
            for cut in negative
            if (negative >= cut).double().mean() <= most
        ]
        found = recognize.verification(positive, negative)[f"tpr_at_fpr_{100 * most:g}"]
        assert found >= 100 * max(accepted, default=0) - 1e-3
    false, true, _ = roc_curve(*metrics.truth_and_scores(positive, negative))
    error = metrics.equal_error_rate(positive, negative)
    assert np.interp(error, false, true) == pytest.approx(1 - error, abs=1e-9)


def test_detection_rate_is_what_its_words_say():
    draws = torch.Generator().manual_seed(0)
    known, unknown = torch.randn(200, generator=draws) + 1, torch.randn(100, generator=draws)
    right = torch.rand(200, generator=draws) < 0.8
    for far in (0.01, 0.1, 0.5):
        best = 0.0
        for bar in torch.cat([known, unknown]).tolist():
            if (unknown >= bar).float().mean() <= far:
                best = max(best, ((known >= bar) & right).float().mean().item())
        assert recognize.detection_rate(known, right, unknown, far) == pytest.approx(best, abs=1e-6)


def test_pairs_are_all_pairs_but_those_of_one_illustration():
    x, labels, groups = (
        torch.randn(7, 4),
        torch.tensor([0, 0, 0, 1, 1, 2, 2]),
        torch.tensor([0, 0, 1, 2, 3, 4, 4]),
    )
    same, other = metrics.pair_cosines(x, labels, groups)
    assert len(same) == 5 - 2 and len(other) == 21 - 5
    assert F.cosine_similarity(x[0], x[2], dim=0).item() == pytest.approx(same[0].item(), abs=1e-6)


# ---- the gallery: similarity, thresholds, its file -----------------------------------------------


def test_the_threshold_balances_both_mistakes_and_temperature_is_found():
    torch.manual_seed(0)
    centre, labels = torch.randn(5, 16), torch.arange(5).repeat(40)

    def face(y, n):
        return centre[y] + 0.3 * torch.randn(n, 16)

    known, unknown = face(labels, 200), centre[0] + 2 * torch.randn(1000, 16)
    scores = torch.randn(20000, 5)
    drawn = torch.multinomial(scores.softmax(1), 1)[:, 0]
    assert recognize.fit_temperature(scores * 3, drawn) == pytest.approx(3, rel=0.1)
    logits = F.normalize(known) @ F.normalize(centre).T
    faces = face(labels, 200)
    found = recognize.calibrate(faces, labels, (logits, known, labels), unknown)
    made = recognize.make_gallery(faces, labels, 5) | found
    score = {
        n: recognize.best_similarity(recognize.compared(x, made), made)
        for n, x in (("known", known), ("unknown", unknown))
    }
    accepted = (score["unknown"] >= found["threshold"]).float().mean()
    rejected = score["known"] < found["threshold"]
    assert accepted.item() == pytest.approx(rejected.float().mean().item(), abs=0.01)
    assert rejected.float().mean() < 0.091
    balanced = recognize.balance(
        torch.tensor([0.3, 0.6, 0.7, 0.9]), torch.tensor([0.1, 0.2, 0.4, 0.65])
    )
    assert 0.4 < balanced < 0.61  # one of four is on the wrong side, either way
    who, _, margin, sure = recognize.decide(logits, known, made)
    assert (
        ((margin >= 0) == ~rejected).all()
        and (who == labels).float().mean() > 0.99
        and sure.mean() > 0.8
    )
    _, _, _, unsure = recognize.decide(F.normalize(unknown) @ F.normalize(centre).T, unknown, made)
    assert unsure.mean() < 0.5
    without = recognize.calibrate(faces, labels, (logits, known, labels))
    assert without["threshold"] < 1


def test_no_more_known_faces_are_rejected_than_promised_however_alike_unknown_ones_are():
    torch.manual_seed(0)
    centre, labels = torch.randn(5, 16), torch.arange(5).repeat(40)
    known, twins = (centre[labels] + 0.3 * torch.randn(200, 16) for _ in range(2))
    found = recognize.calibrate(known, labels, (known @ centre.T, twins, labels), twins[:50])
    made = recognize.make_gallery(known, labels, 5)
    score = recognize.best_similarity(recognize.compared(twins, made), made)
    assert (score < found["threshold"]).float().mean() < 0.091
    assert (score[:50] >= found["threshold"]).float().mean() > 0.5


def test_whitening_makes_what_faces_of_one_character_differ_in_count_less():
    torch.manual_seed(0)
    labels, centre = torch.arange(4).repeat(50), torch.randn(4, 8)
    pose = torch.zeros(200, 8)
    pose[:, 0] = 5 * torch.randn(200)  # says nothing of who it is
    faces = centre[labels] + 0.1 * torch.randn(200, 8) + pose
    mean, matrix = recognize.whitening(faces, labels)
    inside = torch.stack([((faces - mean) @ matrix)[labels == c].var(0) for c in range(4)]).mean(0)
    assert inside.max() / inside.min() < 200  # it was 2,500
    plain, white = (F.normalize(x) @ F.normalize(x).T for x in (faces, (faces - mean) @ matrix))
    alike = labels[:, None] == labels

    def gap(cosine):
        return cosine[alike].mean() - cosine[~alike].mean()

    assert gap(white) > gap(plain)


def test_a_missing_gallery_is_built_of_the_training_pictures(copy, small, capsys, monkeypatch):
    first = read_safetensors(copy / "gallery.safetensors")
    (copy / "gallery.safetensors").unlink()
    told = recognise(capsys, copy, small.parent / "images/class1/illust3_0.png")
    assert "faces of 3 characters" in told.err and "class1" in told.out
    tensors, header = read_safetensors(copy / "gallery.safetensors")
    assert header == first[1]
    assert all(torch.equal(tensors[name], first[0][name]) for name in tensors)
    net, _ = finetune_lora.load_classifier(copy)
    train, known = data.open_split(small, "train"), recognize.load_gallery(copy)
    rows = torch.tensor([train["header"]["keys"].index(key) for key in known["keys"]])
    autocast = autocast_of(torch.device("cpu"), torch.float32)
    pooled = pooled_of(net, train, rows, autocast, mirrored=True)
    torch.testing.assert_close(net.neck(pooled), known["embeddings"], atol=1e-4, rtol=1e-4)
    (copy / "gallery.safetensors").unlink()
    call("export.py", copy, "--to", "half", "--out", copy / "half", cwd=copy, check=0)
    assert (copy / "half" / "gallery.safetensors").exists()
    (copy / "gallery.safetensors").unlink()
    monkeypatch.setattr(recognize, "FACES", 3)
    assert recognize.open_gallery(copy)["labels"].bincount().tolist() == [3, 3, 3]


def test_a_gallery_is_built_of_the_data_that_the_run_learned_from_or_not_at_all(copy, tmp_path):
    (copy / "gallery.safetensors").unlink()
    tensors, header = read_safetensors(copy / "head.safetensors")
    for data_set, word in ((tmp_path / "gone", "does not exist"), (copy, "no split")):
        save_safetensors(tensors, copy / "head.safetensors", header | {"data": str(data_set)})
        assert word in refused(call("recognize.py", copy, "--list", cwd=tmp_path))
        assert not (copy / "gallery.safetensors").exists()


def test_who_is_enrolled_stays_when_a_run_is_judged_again(copy, run, small, tmp_path):
    pictures = sorted((draw_folder(tmp_path / "new", 1, 8, seed=5) / "class0").iterdir())
    call("recognize.py", copy, "--enrol", "new", *pictures[:3], cwd=tmp_path, check=0)
    before = (copy / "gallery.safetensors").read_bytes()
    call("finetune_lora.py", "--resume", copy, "--split", "test", cwd=tmp_path, check=0)
    assert (copy / "metrics-test.json").exists()
    assert (copy / "gallery.safetensors").read_bytes() == before


def test_characters_that_are_left_out_stand_for_unknown_ones(run, small, tmp_path):
    words = [run[0].parent / "encoder", "--data", small, "--method", "linear", "--hold-out", 1]
    words += ["--epochs", 2, *CPU, "--out", tmp_path / "run"]
    call("finetune_lora.py", *words, cwd=tmp_path, check=0)
    known = recognize.open_gallery(tmp_path / "run")
    assert len(known["names"]) == 2


# ---- names ---------------------------------------------------------------------------------------


def test_it_names_files_folders_and_archives_and_tells_the_nearest_faces(run, capsys, tmp_path):
    out, pictures = run
    row = rows_of(capsys, out, pictures / "class1" / "illust3_0.png")[0]
    assert row["name"] == "class1" and row["known"] and 0.5 < row["confidence"] <= 1
    assert len(row["nearest"]) == 3 and row["nearest"][0]["name"] == "class1"
    assert row["similarity"] > row["threshold"]
    folder = rows_of(capsys, out, pictures)
    assert (
        len(folder) == 120
        and np.mean([r["best_guess"] == r["picture"].split("/")[0] for r in folder]) > 0.9
    )
    archive = shutil.make_archive(tmp_path / "faces", "zip", pictures)
    zipped = rows_of(capsys, out, archive)
    assert [r["best_guess"] for r in zipped] == [r["best_guess"] for r in folder]
    text = recognise(capsys, out, pictures / "class1" / "illust3_0.png").out
    assert text.splitlines()[0].split(": ")[1].startswith("class1, confidence")


def test_pictures_are_cut_as_those_it_learned_from(run, copy, capsys, monkeypatch):
    cuts = []
    monkeypatch.setattr(
        ingest.pictures, "decode", lambda *args: cuts.append(args[4:]) or decode(*args)
    )
    picture = run[1] / "class1" / "illust3_0.png"
    recognise(capsys, copy, picture)
    net, header = finetune_lora.load_classifier(copy)
    assert (header["crop"], header["margin"]) == ("centre", 0.1)
    monkeypatch.setattr(
        recognize, "load_classifier", lambda *_: (net, header | {"crop": "figure", "margin": 0.3})
    )
    recognise(capsys, copy, picture)
    assert cuts == [("centre", 0.1), ("figure", 0.3)]


def test_standard_input_and_what_is_unknown(run, capsys, monkeypatch):
    out, pictures = run
    lines = "".join(f"{pictures}/class2/illust{i}_0.png\n" for i in range(3))
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    rows = rows_of(capsys, out, "-", "--threshold", 1)
    assert (
        len(rows) == 3
        and not any(r["known"] for r in rows)
        and all(r["name"] is None for r in rows)
    )
    text = recognise(capsys, out, pictures / "class2" / "illust0_0.png", "--threshold", 1).out
    assert "unknown (unlike all known characters: similarity" in text and "threshold 1.00)" in text


def test_a_recogniser_of_the_demo_set_alone_says_so(run, copy, capsys):
    picture = run[1] / "class0" / "illust0_0.png"
    assert "demo set" not in recognise(capsys, copy, picture).err
    tensors, header = read_safetensors(copy / "head.safetensors")
    save_safetensors(tensors, copy / "head.safetensors", header | {"data": "datasets/toon"})
    found = recognise(capsys, copy, picture, picture, "--json")
    assert found.err.count("demo set") == 1
    assert [json.loads(line)["best_guess"] for line in found.out.splitlines()] == ["class0"] * 2


def test_an_unreadable_picture_is_one_line_and_the_others_go_on(run, capsys, tmp_path):
    out, pictures = run
    (tmp_path / "text.png").write_text("no picture")
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as z:
        z.writestr("../evil.png", b"x")
    good = pictures / "class0" / "illust0_0.png"
    bad = [tmp_path / name for name in ("text.png", "bomb.png", "evil.zip", "no.png")]
    found = recognise(capsys, out, *bad, good)
    assert len(found.out.splitlines()) == 1 and len(found.err.splitlines()) == 4
    assert all(word in found.err for word in ("text.png", "bomb.png", "leads out of it", "no.png"))
    done = call("recognize.py", out, *bad[:2], cwd=tmp_path)
    assert "text.png" in refused(done) and done.stdout == ""


# ---- enrolment -----------------------------------------------------------------------------------


def test_a_new_character_is_known_from_three_pictures_without_training(run, copy, capsys, tmp_path):
    weights = (copy / "head.safetensors").read_bytes()
    new = draw_folder(tmp_path / "new", 1, 8, seed=5) / "class0"
    pictures = sorted(new.iterdir())
    told = recognise(capsys, copy, "--enrol", "stranger", *pictures[:4]).out
    assert "enrolled with 4 pictures" in told
    rows = rows_of(capsys, copy, *pictures[4:], "--threshold", -1)
    assert (
        np.mean([r["name"] == "stranger" for r in rows]) >= 0.75
        and rows[0]["nearest"][0]["name"] == "stranger"
    )
    assert rows[0]["confidence"] is None  # a similarity is no probability
    known = rows_of(capsys, copy, run[1] / "class1", "--threshold", -1)
    assert np.mean([r["name"] == "class1" for r in known]) > 0.9
    told = recognise(capsys, copy, "--enrol", "stranger", pictures[5]).out
    assert "enrolled with 5 pictures" in told
    assert (copy / "head.safetensors").read_bytes() == weights


def test_an_enrolment_can_be_added_to_and_taken_back(run, copy, capsys, tmp_path):
    before = recognize.load_gallery(copy)
    pictures = sorted((draw_folder(tmp_path / "new", 1, 8, seed=5) / "class0").iterdir())
    with pytest.raises(UserError, match="2 pictures of Zoë are too few"):
        recognise(capsys, copy, "--enrol", "Zoë", *pictures[:2])
    told = recognise(capsys, copy, "--enrol", "Zoë", *pictures[:2], pictures[3]).out
    assert "enrolled with 3 pictures" in told
    told = recognise(capsys, copy, "--enrol", "Zoe\u0308", *pictures[4:6]).out
    assert "enrolled with 5 pictures" in told
    told = call("recognize.py", copy, "--list", cwd=tmp_path, check=0).stdout
    assert "Zoë: enrolled, 5 pictures" in told
    assert "not enrolled" in refused(call("recognize.py", copy, "--forget", "nobody", cwd=tmp_path))
    done = call("recognize.py", copy, "--forget", "class1", cwd=tmp_path)
    assert "learned in training" in refused(done)
    done = call("recognize.py", copy, "--forget", "Zoë", cwd=tmp_path, check=0)
    assert "forgotten" in done.stdout
    after = recognize.load_gallery(copy)
    assert after["names"] == before["names"] and after["keys"] == before["keys"]
    assert torch.equal(after["unit"], before["unit"])


def test_nothing_given_is_ignored(run, copy, tmp_path):
    picture = run[1] / "class1" / "illust3_0.png"
    for words in (
        (picture, "--data", "x"),
        (picture, "--split", "dev"),
        ("--verify", picture),
        ("--verify", "--detect", "x"),
        ("--verify", "--list"),
        ("--list", picture),
        ("--list", "--device", "cpu"),
        ("--list", "--json"),
        ("--forget", "class1", "--json"),
        ("--forget", " "),
        ("--enrol", "x", picture, "--threshold", 0.5),
        ("--enrol", "x", picture, "--json"),
    ):
        refused(call("recognize.py", copy, *words, cwd=tmp_path))


def test_a_bad_enrolment_changes_nothing(run, copy, capsys, tmp_path):
    before = (copy / "gallery.safetensors").read_bytes()
    good = sorted((run[1] / "class0").iterdir())[:3]
    (tmp_path / "text.png").write_text("no picture")
    for who, pictures, told in (
        ("class0", good, "known already"),
        ("new", good[:2], "too few"),
        (" ", good, "no name"),
        ("new", [*good, tmp_path / "text.png"], "nobody was enrolled"),
    ):
        with pytest.raises(UserError, match=told):
            recognise(capsys, copy, "--enrol", who, *pictures)
    assert (copy / "gallery.safetensors").read_bytes() == before


# ---- verification --------------------------------------------------------------------------------


def test_verification_and_unknown_characters(copy, small, capsys, tmp_path):
    told = recognise(capsys, copy, "--verify").out
    assert "ROC-AUC" in told and "no unknown characters in this set" in told and "{" not in told
    row = json.loads((copy / "recognize.json").read_text())
    assert {"machine", "commit", "command"} <= set(row) and row["open_set"]["strangers"] == 0
    pairs = row["verification"]
    assert (
        pairs["roc_auc"] > 80
        and 0 <= pairs["eer"] < 30
        and pairs["tpr_at_fpr_10"] >= pairs["tpr_at_fpr_0.1"]
    )
    # a set with a character that it never saw
    pictures = draw_folder(tmp_path / "pictures", 3, 20)
    shutil.copytree(draw_folder(tmp_path / "new", 1, 20, seed=5) / "class0", pictures / "somebody")
    call("data.py", pictures, "--out", tmp_path / "packed", "--size", 32, cwd=tmp_path, check=0)
    words = ("--verify", "--data", tmp_path / "packed", "--split", "train")
    told = recognise(capsys, copy, *words).out
    row = json.loads((copy / "packed-train" / "recognize.json").read_text())["open_set"]
    assert row["known"] > 30 and row["strangers"] > 5 and 0 <= row["auroc_unknown"] <= 100
    assert row["dir_at_far_10"] >= row["dir_at_far_0.1"]
    assert f"{row['strangers_unknown']:.1f} % called unknown" in told
    with pytest.raises(UserError, match="is there already"):
        recognise(capsys, copy, *words, "--threshold", 0.1)  # another result under the same name
    (copy / "packed-train" / "recognize.json").unlink()
    assert json.loads(recognise(capsys, copy, *words, "--json").out)["open_set"] == row
    (copy / "packed-train" / "recognize.json").unlink()
    # once enrolled, the same character is known, and counted apart
    somebody = sorted((pictures / "somebody").iterdir())[:5]
    recognise(capsys, copy, "--enrol", "somebody", *somebody)
    recognise(capsys, copy, *words)
    row = json.loads((copy / "packed-train" / "recognize.json").read_text())["open_set"]
    assert row["strangers"] == 0 and "strangers_unknown" not in row and row["enrolled"] > 5
    assert row["enrolled_named_rightly"] > 60


def test_unknown_characters_of_another_set_are_measured_against_the_own_pictures(
    copy, capsys, tmp_path
):
    pictures = draw_folder(tmp_path / "pictures", 2, 20, seed=7)
    for c in range(2):
        (pictures / f"class{c}").rename(pictures / f"other{c}")
    call("data.py", pictures, "--out", tmp_path / "others", "--size", 32, cwd=tmp_path, check=0)
    told = recognise(
        capsys, copy, "--verify", "--data", tmp_path / "others", "--split", "train"
    ).out
    row = json.loads((copy / "others-train" / "recognize.json").read_text())
    assert row["open_set"]["known"] > 10 and row["open_set"]["strangers"] > 20
    assert "pictures of unknown characters" in told and 0 <= row["calibration_error"] <= 100
    assert f"confidence: {row['calibration_error']:.1f} points" in told


def test_a_confidence_is_judged_where_half_are_unknown():
    known, right = torch.tensor([0.9, 0.9, torch.nan]), torch.tensor([True, True, False])
    # weights: 2/3, right, and 1, wrong
    unknown = torch.full((8,), 0.9)
    assert recognize.calibration_error(known, right, unknown) == pytest.approx(50)
    everybody = torch.ones(3, dtype=torch.bool)
    assert recognize.calibration_error(torch.ones(3), everybody, torch.zeros(5)) == 0


def test_calibration_error_is_the_mean_gap_of_its_bins():
    sure, right = torch.tensor([0.05, 0.95, 0.95, 0.95]), torch.tensor([False, True, True, False])
    error = recognize.calibration_error(sure, right, torch.empty(0))
    assert error == pytest.approx(100 * (0.25 * 0.05 + 0.75 * (0.95 - 2 / 3)), abs=1e-3)
    error = recognize.calibration_error(sure, right, torch.tensor([0.95, 0.35]))  # weights 1/4, 1/2
    gaps = 0.25 * 0.05, abs(0.75 * 0.95 + 0.5 * 0.95 - 0.5), 0.5 * 0.35
    assert error == pytest.approx(100 * sum(gaps) / 2, abs=1e-3)


# ---- bad runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_of_half_the_size_says_the_same(run, small, tmp_path, capsys, method):
    whole, half = run[0], tmp_path / "half"
    if method == "full":
        whole = tmp_path / "full"
        words = [run[0].parent / "encoder", "--data", small, "--method", "full", "--keep", 0.25]
        words += ["--epochs", 2, *QUICK, "--out", whole]
        call("finetune_lora.py", *words, cwd=tmp_path, check=0)
    recognize.open_gallery(whole, "cpu", "fp32")
    call("export.py", whole, "--to", "half", "--out", half, cwd=tmp_path, check=0)
    files = {path.stem: path for path in half.glob("*.safetensors")}
    assert files.keys() == {"head", "gallery", "adapter_model" if method == "lora" else "model"}
    assert all(
        x.dtype != torch.float32 for file in files.values() for x in load_file(file).values()
    )
    first, second = (rows_of(capsys, folder, run[1]) for folder in (whole, half))
    assert [x["name"] for x in first] == [x["name"] for x in second]
    assert (
        max(abs(x["similarity"] - y["similarity"]) for x, y in zip(first, second, strict=True))
        < 5e-3
    )
    assert "half is there" in refused(
        call("export.py", whole, "--to", "half", "--out", half, cwd=tmp_path)
    )
    assert "is no run" in refused(call("export.py", run[1], "--to", "half", cwd=tmp_path))


def test_spoiled_runs_are_one_line(run, copy, capsys, tmp_path):
    picture = run[1] / "class0" / "illust0_0.png"

    def line(*words):
        with pytest.raises(UserError) as problem:
            recognise(capsys, *words)
        assert "\n" not in str(problem.value)
        return str(problem.value)

    def spoiled(name):
        shutil.rmtree(copy)
        shutil.copytree(run[0], copy)
        return copy / name

    assert "finetune_lora.py" in line(tmp_path / "nothing", picture)
    assert "give pictures" in line(copy) and "--threshold" in line(copy, picture, "--threshold", 2)
    about = read_safetensors(copy / "gallery.safetensors")[1]
    nobody = torch.zeros(0, 32), torch.zeros(0).long(), about | {"keys": []}
    recognize.save_gallery(copy / "gallery.safetensors", *nobody)
    assert "keys" in line(copy, picture)
    spoiled("head.safetensors").write_bytes(b"\x80\x04cos\nsystem\n(S'echo the pickle ran'\ntR.")
    assert "not a whole file" in line(copy, picture)
    adapter = json.loads(spoiled("adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(adapter | {"lora_alpha": "3"}))
    assert "lora_alpha" in line(copy, picture)
    torch.manual_seed(1)  # the encoder was trained on since
    save_encoder(ViT(32, 8, 32, 2, 2), spoiled("base") / "model.safetensors", {})
    tensors, header = read_safetensors(copy / "head.safetensors")
    save_file(
        tensors,
        copy / "head.safetensors",
        {"animask": json.dumps(header | {"base": str(copy / "base")})},
    )
    assert "not the encoder" in line(copy, picture)
    assert "the pickle ran" not in capsys.readouterr().out
