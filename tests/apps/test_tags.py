"""apps.tags and its network: words, masks, curriculum, shapes, arms, resume, answers, figures."""

import json
import math
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import WORDS, json_of, refused, run_line
from made import CPU, QUICK
from sklearn.metrics import average_precision_score, f1_score, precision_recall_curve

from apps import tags
from common.features import open_subsets
from common.train import read_log, seeded
from model import ViT

V, L = 10, 8
TRAIN = f"apps.tags runs/a --data datasets/packed {QUICK}"


def net_of(arm="mfdn", classes=3):
    torch.manual_seed(0)
    return tags.MFDN(ViT(32, 8, 32, 4, 2), classes, V, arm, L).eval()


VIEW = torch.randint(256, (5, 32, 32, 3), dtype=torch.uint8, generator=seeded(0))
IDS = torch.tensor([[1, 2], [3, -1], [-1, -1], [0, 9], [5, 6]])  # of the pictures of VIEW


# ---- words ---------------------------------------------------------------------------------------


def test_words_stand_in_order_between_cls_and_sep_and_of_too_many_a_subset():
    mask, pad, cls, sep = (V + x for x in (tags.MASK, tags.PAD, tags.CLS, tags.SEP))
    ids = torch.tensor([[7, 2, -1], [-1, -1, -1], [0, 9, 4]])
    assert tags.to_words(ids, V, L).tolist() == [
        [cls, 2, 7, sep, pad, pad, pad, pad],
        [cls, sep, *[pad] * 6],
        [cls, 0, 4, 9, sep, pad, pad, pad],
    ]
    assert tags.all_masked(V, L).tolist() == [[cls, *[mask] * 6, sep]]
    ids = torch.arange(10).expand(500, 10)  # too many: the most frequent, or a random subset
    assert (tags.to_words(ids, V, L)[:, 1:-1] == torch.arange(6)).all()
    words = tags.to_words(ids, V, L, seeded(0))
    assert (words[:, 1:-1].diff(dim=1) > 0).all() and (words[:, -1] == V + tags.SEP).all()
    often = torch.bincount(words[:, 1:-1].flatten(), minlength=V) / 500
    assert (often - 0.6).abs().max() < 0.08


def test_hidden_tags_are_a_share_and_where_none_is_left_not_even_their_number_is_told():
    words = tags.to_words(torch.tensor([[1, 2, 3, 4]]).repeat(4000, 1), V, L)
    seen, hidden = tags.hide(words, V, 0.5, seeded(0))
    assert abs(hidden[:, 1:5].float().mean() - 0.5) < 0.02 and not hidden[:, [0, 5, 6, 7]].any()
    gone = hidden.sum(1) == 4
    assert (seen[gone] == tags.all_masked(V, L)).all() and 0.04 < gone.float().mean() < 0.09
    assert (seen[~gone][hidden[~gone]] == V + tags.MASK).all()
    assert (seen[~gone] == words[~gone])[~hidden[~gone]].all()
    blank, nothing = tags.hide(tags.to_words(torch.tensor([[-1]]), V, L), V, 0.0, seeded(0))
    assert (blank == tags.all_masked(V, L)).all() and not nothing.any()


def test_the_curriculum_rises_to_all_at_the_half_and_stays():
    share = [tags.curriculum(s, 100) for s in range(101)]
    assert share[0] == 0 and share[25] == pytest.approx(0.5) and share[50:] == [1.0] * 51
    assert share[10] == pytest.approx(1 - (1 + math.cos(2 * math.pi * 0.1)) / 2)
    assert share == sorted(share)


def test_tags_are_many_hot_and_as_many_as_pictures_have():
    expected = torch.zeros(5, V)
    expected[[0, 0, 1, 3, 3, 4, 4], [1, 2, 3, 0, 9, 5, 6]] = 1
    assert (tags.many_hot(IDS, V) == expected.numpy()).all()
    assert np.argwhere(tags.many_hot(IDS, 2)).tolist() == [[0, 1], [3, 0]]
    assert tags.reaches((IDS >= 0).sum(1), 4).tolist() == pytest.approx([0.8, 0.6, 0, 0])


# ---- the network ---------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", tags.ARMS)
def test_every_arm_answers_in_its_shapes_and_learns_all_that_it_has(arm):
    net, words = net_of(arm), tags.to_words(IDS, V, L)
    characters, said = tags.answers(net, VIEW)
    told, nothing = tags.answers(net, VIEW, IDS)
    assert tags.answers(net, VIEW, ask_tags=False)[1] is nothing is None
    assert (said is not None) == (arm in tags.HIDES_TAGS)
    assert said is None or said.shape == (5, V) and (said >= 0).all() and (said <= 1).all()
    assert characters.shape == told.shape == (5, 3)
    assert torch.equal(characters, told) == (arm not in tags.READS_TAGS)
    torch.testing.assert_close(characters[2], told[2])  # of whom nothing is known, told or not
    hidden = words < V if arm in tags.HIDES_TAGS else None
    outputs = net(*net.encoder.all_patches(VIEW), words, hidden)
    sum(x.sum() for x in outputs if x is not None).backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None]


def test_padding_is_never_read():
    net, ids = net_of(), torch.tensor([[1, 2]])
    before, _ = tags.answers(net, VIEW[:1], ids)
    with torch.no_grad():
        net.language.embed.weight[V + tags.PAD] += 100
        net.language.pos_token[:, 4:] += 100  # behind CLS, two words, SEP
    assert torch.equal(before, tags.answers(net, VIEW[:1], ids)[0])


def test_probabilities_of_tags_are_sums_over_places_that_pictures_reach():
    net, view = net_of(), VIEW[:2]
    net.reach.copy_(torch.tensor([1, 0.5, 0.25, 0, 0, 0]))
    words = tags.all_masked(V, L).expand(2, -1)
    with torch.no_grad():
        _, logits = net(*net.encoder.all_patches(view), words, words == V + tags.MASK)
    p = logits.softmax(1).view(2, L - 2, V)
    torch.testing.assert_close(tags.answers(net, view)[1], p[:, 0] + p[:, 1] / 2 + p[:, 2] / 4)


def test_the_two_losses_are_means_of_characters_and_of_hidden_places():
    net, words = net_of(), tags.to_words(IDS[:2], V, L)
    patches, places = net.encoder.all_patches(VIEW[:2])
    inputs, targets = (patches, places, words, words < V), words[words < V]
    characters, found = net(*inputs)
    character_loss, tag_loss = tags.losses(net, inputs, targets, torch.tensor([0, 2]))
    log_p = characters.log_softmax(1)
    assert character_loss.item() == pytest.approx(-(log_p[0, 0] + log_p[1, 2]).item() / 2)
    expected = -found.log_softmax(1)[torch.arange(3), targets].mean()
    assert tag_loss.item() == pytest.approx(expected.item(), rel=1e-5)


# ---- the stage, and how tags are judged ----------------------------------------------------------


def results_of(run):
    """metrics.json and log.jsonl of a run."""
    return json.loads((run / "metrics.json").read_text()), read_log(run / "log.jsonl")


def test_a_run_writes_what_it_says(base):
    row, log = results_of(base / "runs/a-tags")
    tops = {"with_top1", "with_top5", "without_top1", "without_top5"}
    assert row["half"].keys() == row["end"].keys() == tops < row["dev"].keys()
    assert row["tags"].keys() == {"map", "micro_f1", "macro_f1", "error", "error_top", "ap"}
    assert [r["hidden"] for r in log if "hidden" in r][-1] == 1.0
    assert [r["epoch"] for r in log if "dev_with_top1" in r] == [1, 2]
    header = tags.load_tagger(base / "runs/a-tags")[1]
    assert set(header["words"]) == set(WORDS) and len(header["thresholds"]) == 5


@pytest.mark.parametrize("arm", [arm for arm in tags.ARMS if arm != "mfdn"])
def test_every_arm_trains_and_is_used(base, arm):
    done = run_line(f"{TRAIN} --arm {arm} --out runs/{arm}", base, check=0)
    row, log = results_of(base / "runs" / arm)
    names_tags = arm in tags.HIDES_TAGS
    assert ("tags" in row) == ("mAP" in done.stdout) == names_tags
    assert any("hidden" in r for r in log) == names_tags
    assert "without_top1" in row["end"]
    assert ("with_top1" in row["end"]) == (arm in tags.READS_TAGS)
    asked = f"apps.tags runs/{arm} images/class0 {CPU}"
    done = run_line(f"{asked} --threshold .3", base)
    assert (done.returncode == 0) == names_tags
    if not names_tags:
        exported = run_line(f"apps.export runs/{arm} --to onnx", base)
        assert f"--arm {arm}" in refused(exported)


def test_it_learns_the_colours_and_their_names(base):
    words = f"--epochs 12 --batch-size 8 {CPU} --out runs/long"
    run_line(f"apps.tags runs/a --data datasets/packed {words}", base, check=0)
    (row, _), header = results_of(base / "runs/long"), tags.load_tagger(base / "runs/long")[1]
    assert row["end"]["without_top1"] > 80, row["end"]  # a third by guessing
    ap = dict(zip(header["words"], row["tags"]["ap"], strict=True))
    assert min(ap[colour] for colour in WORDS[:3]) > 50, ap  # a third by guessing


def test_accuracies_with_tags_are_of_pictures_whose_tags_are_known(base, monkeypatch):
    """By a network that is right where it is told the tags, and always wrong where it is not."""
    (*_, images), _ = open_subsets(base / "datasets/packed", "val", 0)
    right = torch.nn.functional.one_hot(images.labels[images.index], 3).float()

    def told(net, view, ids, ask):
        return (right if ids is not None else -right), None

    monkeypatch.setattr(tags, "answers", told)
    cpu = torch.device("cpu")
    task = SimpleNamespace(net=net_of(), arm="mfdn", side=32, device=cpu, autocast=nullcontext)
    expected = {"with_top1": 100, "with_top5": 100, "without_top1": 0, "without_top5": 100}
    assert tags.accuracies(task, images) == expected


def test_a_name_is_unknown_where_nine_of_a_hundred_known_faces_are_as_unsure(monkeypatch):
    sure = torch.linspace(0.5, 0.99, 100)
    logits = torch.stack([sure.logit(), torch.zeros(100)], 1)
    monkeypatch.setattr(tags, "whole_answers", lambda *_: (logits, None))
    task = SimpleNamespace(dev=SimpleNamespace(index=None))
    least = tags.least_confidence(task)
    assert (sure < least).sum() == 9 and least == pytest.approx(sure[9].item())


def test_pictures_get_a_name_and_tags(base):
    asked = f"apps.tags runs/a-tags images/class0/illust0_0.png {CPU}"
    (row,) = json_of(f"{asked} --json --threshold 0", base)
    assert row["best_guess"].startswith("class") and 0 <= row["confidence"] <= 1
    assert list(row["tags"].values()) == sorted(row["tags"].values(), reverse=True)
    assert len(row["tags"]) == 5
    least = tags.load_tagger(base / "runs/a-tags")[1]["least_confidence"]
    known = row["confidence"] >= least
    assert row["name"] == (row["best_guess"] if known else None)
    assert f": {'' if known else 'unknown, or '}class" in run_line(asked, base, check=0).stdout
    header = {"thresholds": [0.3, 0.6, 0.2], "words": ["a", "b", "c"]}
    some = torch.tensor([0.3, 0.5, 0.9])
    assert list(tags.named(some, header).items()) == [("c", 0.9), ("a", 0.3)]
    assert [*tags.named(some, header, 0.4)] == ["c", "b"]


def assert_best_f1(truth, scores, threshold):
    """No other threshold has a higher F1, as scikit-learn computes it."""
    precision, recall, _ = precision_recall_curve(truth, scores)
    best = np.max(2 * precision * recall / np.maximum(precision + recall, 1e-12))
    assert f1_score(truth, scores >= threshold) == pytest.approx(best)


def test_thresholds_are_the_best_for_f1_and_a_rare_tag_has_that_of_all_together():
    rng = np.random.default_rng(0)
    truth = rng.random((200, 6)) < 0.3
    truth[:, 5] = np.arange(200) < tags.FEWEST - 1
    scores = np.round(rng.random((200, 6)) * 0.5 + truth * 0.3, 2)  # with ties
    assert_best_f1(truth.ravel(), scores.ravel(), tags.fit_thresholds(scores, truth)[5])
    truth[tags.FEWEST, 5] = True  # frequent enough now
    for t, threshold in enumerate(tags.fit_thresholds(scores, truth)):
        assert_best_f1(truth[:, t], scores[:, t], threshold)


def test_numbers_of_tags_are_scikit_learns():
    rng = np.random.default_rng(1)
    truth = rng.random((100, 30)) < np.linspace(0.05, 0.4, 30)
    truth[:, 3] = False
    scores = rng.random((100, 30))
    row, said = tags.judge(scores, truth, np.full(30, 0.6)), scores >= 0.6
    there = [t for t in range(30) if t != 3]
    ap = [average_precision_score(truth[:, t], scores[:, t]) for t in there]
    top = np.argsort(-truth.sum(0), kind="stable")[:25]
    expected = {
        "micro_f1": f1_score(truth, said, average="micro"),
        "macro_f1": f1_score(truth[:, there], said[:, there], average="macro"),
        "error": (said != truth).mean(),
        "error_top": (said != truth)[:, top].mean(),
        "map": np.mean(ap),
    }
    for name, share in expected.items():
        assert row[name] == pytest.approx(100 * share, abs=1e-3), name
    assert row["ap"][3] is None
    assert [row["ap"][t] for t in there] == pytest.approx([100 * x for x in ap], abs=0.01)
