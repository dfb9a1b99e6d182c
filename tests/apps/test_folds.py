"""apps/folds.py: who is held out of which fold, what is promised, and `apps.learn datasets/mine`."""

import re
import shutil
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import draw_folder, equal, refused, run_line, stopped
from made import CPU
from scipy.stats import ttest_1samp

import data
from apps import export, folds, recognize
from apps.collection import open_all
from apps.recognize import PROMISE
from common import metrics
from common.classifier import read_head
from common.door import read_json
from common.train import UserError, read_safetensors

LEARN = f"apps.learn datasets/packed --encoder runs/a {CPU}"
OUT = "runs/folds"


def drawn(sizes, count, per_group=1):
    """Labels of characters with so many pictures, groups, and what `draw_folds` says of them."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    groups = np.arange(len(labels)) // per_group
    return labels, groups, *folds.draw_folds(labels, groups, count)


@pytest.mark.parametrize("sizes", [[5] * 7, [2] * 5, [30, 2, 3], [4, 9, 6, 80]])
def test_each_character_is_left_out_once_and_each_picture_asked_by_a_network_that_knows_it(sizes):
    count = min(5, len(sizes))
    labels, _, of_character, of_picture = drawn(sizes, count)
    assert sorted(set(of_character)) == list(range(count))
    assert set(of_picture) <= set(range(count))
    assert (of_picture != of_character[labels]).all()
    for c, n in enumerate(sizes):
        dealt = np.bincount(of_picture[labels == c], minlength=count)
        assert dealt.max() - np.delete(dealt, of_character[c]).min() <= 1 and dealt.max() < n


def test_faces_of_one_illustration_are_asked_together():
    _, groups, _, of_picture = drawn([12, 12, 12], 3, per_group=4)
    for group in set(groups):
        assert len(set(of_picture[groups == group])) == 1


def test_a_fold_learns_neither_its_characters_nor_the_pictures_that_it_is_asked(small):
    every, classes = open_all(small)
    asked, unknown = [], []
    for fold in folds.deal(every, classes, small):
        fit, dev = fold.train, fold.dev
        assert not {*fit.index.tolist()} & {*dev.index.tolist(), *fold.left_out.tolist()}
        assert not {*every.labels[fold.left_out].tolist()} & {*fold.learned.tolist()}
        assert {*every.labels[fit.index].tolist()} == {*fold.learned.tolist()}
        # the numbers of the labels are those of the fold's own head
        assert torch.equal(fold.learned[dev.labels[dev.index]], every.labels[dev.index])
        asked += dev.index.tolist()
        unknown += fold.left_out.tolist()
    assert sorted(asked) == sorted(unknown) == sorted(every.index.tolist())


def test_the_interval_of_a_share_is_students_over_characters():
    labels = torch.arange(4).repeat_interleave(torch.tensor([40, 80, 20, 20]))
    shares = torch.tensor([0.75, 1.0, 0.5, 0.0])
    hits = torch.cat(
        [torch.arange(n) < s * n for s, n in zip(shares, (40, 80, 20, 20), strict=True)]
    )
    found = folds.share_of(hits, labels)
    interval = ttest_1samp(100 * shares.double().numpy(), 0).confidence_interval(0.95)
    reach = (interval.high - interval.low) / 2
    assert found["mean"] == pytest.approx(75)  # of the pictures
    assert found["low"] == pytest.approx(75 - reach)
    of_new = folds.share_of(hits, labels, of_new=True)
    assert of_new["mean"] == pytest.approx(56.25)  # over characters
    assert of_new["low"] == pytest.approx(max(0, 56.25 - 2**0.5 * reach))
    alike = folds.share_of(torch.ones(20).bool(), torch.arange(20) % 5)
    assert alike["low"] < 90 and alike["mean"] == alike["high"] == 100  # twenty are no proof


def some_answers(more):
    """What a fold may say of eight pictures of two characters, and of eight unknown ones."""
    index = torch.arange(8)
    both = {"labels": index % 2, "logits": torch.zeros(8, 2)}
    colours = torch.stack([index, index - 1], 1)
    said = both | {"similarity": 2.0 * index + 4 + more, "colours": colours + 2.0 + more}
    unknown = both | {"similarity": 2.0 * index + more, "colours": 1.0 * colours + more}
    numbers = dict.fromkeys([*folds.NUMBERS, *folds.CURVES], np.array([10.0, 20.0]))
    said |= {"index": index, "colours_right": index > 0}
    return said | {f"unknown_{name}": x for name, x in unknown.items()} | numbers


def test_the_scores_of_a_fold_are_compared_with_those_of_the_same_fold():
    """A machine of more characters gives larger scores, also to those that it does not know."""
    found = folds.together([some_answers(0), some_answers(4)])
    expected = 100 * metrics.auroc(torch.arange(2.0, 10.0), torch.arange(8.0))
    assert float(found["colours_auroc"]) == float(found["auroc"]) == pytest.approx(expected)
    assert len(found["labels"]) == 16


@pytest.mark.parametrize(("curve", "epoch"), [([50.0, 90, 88, 20], 3), ([10.0, 20, 30], 3)])
def test_the_latest_epoch_that_can_not_be_told_from_the_best_is_chosen(curve, epoch):
    assert folds.epoch_of(np.array(curve), 60) == epoch


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A home with a run that was measured by folds."""
    from made import home

    base = home(tmp_path_factory.mktemp("folds"))
    done = run_line(f"{LEARN} --epochs 3 --out {OUT}", base, check=0)
    return base, done.stdout


def test_after_the_folds_every_picture_teaches(learned):
    home, printed = learned
    every, classes = open_all(home / "datasets/packed")
    header = read_head(home / OUT)[1]
    assert header["classes"] == classes and header["split"] == "folds"
    row = read_json(home / OUT / "metrics-folds.json")
    assert row["evaluated_on"] == "folds" and sum(map(sum, row["confusion"])) == len(every.index)
    said = read_json(home / OUT / PROMISE)
    assert said["pictures"] == len(every.index)
    assert row["best_epoch"] == said["epoch"] <= 3
    assert "in short: of 100 new pictures" in printed and "pictures of strangers" in printed
    assert not re.search("Top-1|AUROC|macro|fold |epoch|SVM", printed)  # words of the field
    assert not [*(home / OUT).rglob("state.pt")]  # nothing would hold pictures back
    run_line(f"apps.recognize {OUT} images/class0/illust0_0.png {CPU}", home, check=0)
    tensors, header = read_safetensors(home / OUT / "gallery.safetensors")
    assert len(tensors["labels"]) == said["pictures"]
    numbers = header | {name: x.tolist() for name, x in tensors.items()}
    assert numbers.items() >= said["calibration"].items()


def test_pictures_of_strangers_are_no_character_and_are_compared_with(learned):
    home, _ = learned
    draw_folder(home / "nobody", 3, 9, seed=4)
    line = "data.py list.csv --size 32 --unknown nobody --out datasets/others"
    run_line(line, home, check=0)
    count = len(data.open_split(home / "datasets/others", "unknown")["labels"])
    line = LEARN.replace("packed", "others") + " --epochs 1 --out runs/others"
    run_line(line, home, check=0)
    told = run_line(f"apps.recognize runs/others images/class0 {CPU}", home, check=0).stderr
    assert f"of your {count} strangers are called unknown" in told
    assert len(recognize.open_gallery(home / "runs/others").strangers) == count > 20


def test_what_is_exported_compares_colours_too(learned):
    home, _ = learned
    images = np.array(data.open_split(home / "datasets/packed", "val")["images"][:5])
    graph, _ = export.graph_of(home / OUT)
    with torch.no_grad():
        found = graph(torch.from_numpy(images))
    net, _, autocast = recognize.open_network(home / OUT, "cpu", "fp32")
    gallery = recognize.open_gallery(home / OUT)
    assert gallery.colours > 0
    _, similarity, _, sure = gallery.decide(*recognize.embed(net, images, autocast))
    torch.testing.assert_close(found["similarity"], similarity, atol=1e-4, rtol=0)
    torch.testing.assert_close(found["confidence"], sure, atol=1e-4, rtol=0)


def test_a_run_that_learned_everything_is_not_measured_on_it(learned):
    home, _ = learned
    fix = refused(run_line(f"apps.unknown {OUT} {CPU}", home))
    assert "--data OTHER" in fix
    for folder in (OUT, f"{OUT}/folds/all"):
        assert "state.pt" in refused(
            run_line(f"finetune_lora.py --resume {folder} --split test", home)
        )
    assert "is finished" in run_line(f"{LEARN} --epochs 3 --out {OUT}", home, check=0).stdout
    assert "another command" in refused(run_line(f"{LEARN} --epochs 4 --out {OUT}", home))


def some_found(colours):
    """What five folds may say of 40 pictures of four characters: one of each is called unknown."""
    labels = torch.arange(40) % 4
    logits = 5 * F.one_hot(labels, 4).float()
    logits[:4] = logits[:4].roll(1, 1)  # a wrong name each
    similarity = torch.full((40,), 0.9)
    similarity[4:7] = 0.1  # and three that are unlike all, which is 7.5 %
    found = {"logits": logits, "labels": labels, "similarity": similarity}
    found |= {f"unknown_{name}": x for name, x in found.items()}
    right = torch.arange(40) >= 40 - colours
    return found | {"auroc": 50.0, "colours_auroc": 50.0, "colours_right": right}


def test_a_picture_that_is_called_unknown_has_no_right_name():
    row = folds.promise(some_found(0), torch.full((4,), 10), np.arange(40))
    assert row["names_right"]["mean"] == pytest.approx(100 * 33 / 40)
    assert row["known_unknown"]["mean"] == pytest.approx(7.5)
    assert row["unknown"]["mean"] == pytest.approx(7.5)


@pytest.mark.parametrize("colours", [0, 36, 40])
def test_what_to_expect_is_said_plainly_and_colours_speak_where_they_are_better(colours):
    row = folds.promise(some_found(colours), torch.full((4,), 10), np.arange(40))
    said = "\n".join(folds.promised(row))
    assert re.search(r"about 82 get the right name \(\d+ to \d+\)\n", said)
    assert re.search(r"of strangers, about \d+ get a wrong one \(\d+ to 100\)", said)
    assert ("colours alone" in said) == (colours == 40)


def test_a_stopped_command_goes_on_in_the_middle_of_a_fold(learned):
    """And ends as if it had never been stopped."""
    home, _ = learned
    line = f"{LEARN} --epochs 3 --out runs/again"
    with stopped(3):
        done = run_line(line, home, check=128 + signal.SIGTERM)
    assert "go on with: python -m apps.learn datasets/packed" in done.stdout
    run_line(line, home, check=0)
    rows = [read_json(home / out / "metrics-folds.json") for out in (OUT, "runs/again")]
    assert rows[0]["right"] == rows[1]["right"]
    heads = [read_head(home / out)[0] for out in (OUT, "runs/again")]
    assert equal(*heads)


def test_a_stop_after_the_last_step_of_a_fold_is_heard_and_the_fold_stays_as_it_is(
    learned, monkeypatch
):
    home, _ = learned
    answers_of = folds.answers_of

    def asked(*words):
        signal.raise_signal(signal.SIGTERM)
        return answers_of(*words)

    line = f"{LEARN} --epochs 1 --out runs/stopped"
    with monkeypatch.context() as patch:
        patch.setattr(folds, "answers_of", asked)
        run_line(line, home, check=128 + signal.SIGTERM)
    (state,) = (home / "runs/stopped/folds").glob("*/state.pt")
    assert state.parent.name == "1"
    log = (state.parent / "log.jsonl").read_text()
    run_line(line, home, check=0)
    assert (state.parent / "log.jsonl").read_text() == log


def test_a_collection_that_is_too_small_is_refused(learned):
    home, _ = learned
    for name in ("class0", "class1"):
        shutil.copytree(home / "images" / name, home / "two" / name)
    run_line("data.py two --out datasets/two --size 32", home, check=0)
    line = f"apps.learn datasets/two --encoder runs/a {CPU} --epochs 1 --out runs/two"
    why = refused(run_line(line, home))
    assert "left out" in why and "finetune_lora.py ENCODER --data datasets/two" in why
    every, classes = open_all(home / "datasets/packed")
    every.split["header"]["groups"] = [classes[c] for c in every.split["labels"]]  # one each
    with pytest.raises(UserError, match="too few pictures or characters"):
        folds.deal(every, classes, "datasets/packed")


def test_what_has_learned_already_is_corrected(learned):
    home, _ = learned
    assert "OUT" in refused(run_line(f"apps.learn {OUT} {CPU}", home))
    refused(run_line(f"apps.learn {OUT} out --epochs 3 {CPU}", home))
