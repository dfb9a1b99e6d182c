"""tags.py and its network: words, masks, curriculum, shapes, arms, resume, answers, figures, bad input."""

import json
import math
import signal
import sys

import numpy as np
import pytest
import torch
from conftest import WORDS, call, refused
from safetensors import safe_open

import tags
from common import train
from common.command import LOCKS
from common.io import read_safetensors, save_safetensors
from model import ViT

V, L = 10, 8
QUICK = ["--epochs", 2, "--batch-size", 8, "--device", "cpu", "--dtype", "fp32"]


@pytest.fixture(scope="package")
def trained(tagged):
    """A run of the whole network."""
    call("tags.py", "encoder", "--data", "packed", "--out", "whole", *QUICK, cwd=tagged, check=0)
    return tagged / "whole"


def net_of(arm="mfdn", classes=3, seed=0):
    torch.manual_seed(seed)
    return tags.MFDN(ViT(32, 8, 32, 4, 2), classes, V, arm, L).eval()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- words ---------------------------------------------------------------------------------------


def test_words_stand_in_order_between_cls_and_sep():
    mask, pad, cls, sep = (V + x for x in (tags.MASK, tags.PAD, tags.CLS, tags.SEP))
    ids = torch.tensor([[7, 2, -1], [-1, -1, -1], [0, 9, 4]])
    assert tags.to_words(ids, V, L).tolist() == [
        [cls, 2, 7, sep, pad, pad, pad, pad],
        [cls, sep, *[pad] * 6],
        [cls, 0, 4, 9, sep, pad, pad, pad],
    ]
    assert tags.all_masked(V, L).tolist() == [[cls, *[mask] * 6, sep]]


def test_of_too_many_tags_a_random_subset_is_read_and_the_most_frequent_without_a_generator():
    ids = torch.arange(10).expand(500, 10)
    assert (tags.to_words(ids, V, L)[:, 1:-1] == torch.arange(6)).all()
    words = tags.to_words(ids, V, L, seeded())
    assert (words[:, 1:-1].diff(dim=1) > 0).all() and (words[:, -1] == V + tags.SEP).all()
    often = torch.bincount(words[:, 1:-1].flatten(), minlength=V) / 500
    assert (often - 0.6).abs().max() < 0.08


def test_hidden_tags_are_a_share_and_where_none_is_left_not_even_their_number_is_told():
    words = tags.to_words(torch.tensor([[1, 2, 3, 4]]).repeat(4000, 1), V, L)
    seen, hidden = tags.hide(words, V, 0.5, seeded())
    assert abs(hidden[:, 1:5].float().mean() - 0.5) < 0.02 and not hidden[:, [0, 5, 6, 7]].any()
    all_hidden = hidden.sum(1) == 4
    assert (
        seen[all_hidden] == tags.all_masked(V, L)
    ).all() and 0.04 < all_hidden.float().mean() < 0.09
    some = ~all_hidden
    assert (seen[some][hidden[some]] == V + tags.MASK).all() and (seen[some] == words[some])[
        ~hidden[some]
    ].all()
    blank, nothing = tags.hide(tags.to_words(torch.tensor([[-1]]), V, L), V, 0.0, seeded())
    assert (blank == tags.all_masked(V, L)).all() and not nothing.any()


def test_the_curriculum_rises_to_all_at_the_half_and_stays():
    share = [tags.curriculum(s, 100) for s in range(101)]
    assert share[0] == 0 and share[25] == pytest.approx(0.5) and share[50:] == [1.0] * 51
    assert share[10] == pytest.approx(
        1 - (1 + math.cos(2 * math.pi * 0.1)) / 2
    ) and share == sorted(share)


def test_many_hot_and_reach():
    ids = torch.tensor([[0, 3, -1], [-1, -1, -1], [9, 1, 2]])
    assert np.argwhere(tags.many_hot(ids, V)).tolist() == [
        [0, 0],
        [0, 3],
        [2, 1],
        [2, 2],
        [2, 9],
    ]
    assert np.argwhere(tags.many_hot(ids, 2)).tolist() == [[0, 0], [2, 1]]
    assert tags.reaches((ids >= 0).sum(1), 4).tolist() == pytest.approx([2 / 3, 2 / 3, 1 / 3, 0])


# ---- the network ---------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", tags.ARMS)
def test_every_arm_answers_in_its_shapes_and_learns_all_that_it_has(arm):
    net = net_of(arm)
    view = torch.randint(256, (5, 32, 32, 3), dtype=torch.uint8, generator=seeded())
    ids = torch.tensor([[1, 2], [3, -1], [-1, -1], [0, 9], [5, 6]])
    words = tags.to_words(ids, V, L)
    characters, said = tags.answers(net, view)
    told, nothing = tags.answers(net, view, ids)
    assert tags.answers(net, view, ask_tags=False)[1] is None
    assert nothing is None and (characters is None) == (arm == "bce")
    assert characters is None or characters.shape == told.shape == (5, 3)
    assert (said is not None) == (arm in tags.NAMES_TAGS)
    assert said is None or said.shape == (5, V) and (said >= 0).all() and (said <= 1).all()
    if characters is not None:
        assert torch.equal(characters, told) == (arm not in tags.READS_TAGS)
        torch.testing.assert_close(characters[2], told[2])  # of whom nothing is known, told or not
    if arm == "tags":
        assert torch.equal(characters, tags.answers(net, 255 - view)[0]), "it sees no picture"
    hidden = words < V if arm in tags.HIDES_TAGS else None
    outputs = net(*net.encoder.all_patches(view), words, hidden)
    sum(x.sum() for x in outputs if x is not None).backward()
    idle = {n for n, p in net.named_parameters() if p.grad is None}
    blind = ("encoder.cls_token", "encoder.patch_embed", "encoder.blocks.0", "encoder.blocks.1")
    assert all(n.startswith(blind) for n in idle) if arm == "tags" else not idle


def test_padding_is_never_read():
    net = net_of()
    ids = torch.tensor([[1, 2]])
    view = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    before, _ = tags.answers(net, view, ids)
    with torch.no_grad():
        net.language.embed.weight[V + tags.PAD] += 100
        net.language.pos_token[:, 4:] += 100  # behind CLS, two words, SEP
    assert torch.equal(before, tags.answers(net, view, ids)[0])


def test_probabilities_of_tags_are_sums_over_places_that_pictures_reach():
    net = net_of()
    net.reach.copy_(torch.tensor([1, 0.5, 0.25, 0, 0, 0]))
    view = torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8, generator=seeded())
    words = tags.all_masked(V, L).expand(2, -1)
    with torch.no_grad():
        _, logits = net(*net.encoder.all_patches(view), words, words == V + tags.MASK)
    p = logits.softmax(1).view(2, L - 2, V)
    torch.testing.assert_close(tags.answers(net, view)[1], p[:, 0] + p[:, 1] / 2 + p[:, 2] / 4)
    assert tags.answers(net, view)[1].sum(1).tolist() == pytest.approx([1.75, 1.75], abs=1e-5)


def test_a_configuration_of_the_size_of_vit_large_is_the_papers():
    """12 blocks for the picture and 12 for both, 4 of the decoder, 65 and 32 tokens, 25,404 tags,
    14,413 characters.
    """
    C, tags_, D = 14_413, 25_404, 1024
    with torch.device("meta"):
        net = tags.MFDN(ViT(128, 16, D, 24, 16), C, tags_, "mfdn", 32)
        patches, ids = torch.zeros(2, 64, 768), torch.zeros(2, 64, dtype=torch.long)
        words, hidden = torch.zeros(2, 32, dtype=torch.long), torch.ones(2, 32, dtype=torch.bool)
    assert (net.half, len(net.encoder.blocks) - net.half, len(net.decoder.blocks)) == (12, 12, 4)
    assert len(net.language.blocks) == 4 and net.encoder.pos_embed.shape == (1, 65, D)
    block = 12 * D * D + 13 * D  # qkv, proj, MLP; their biases and two norms
    decode = block + 4 * D * D + 6 * D  # cross-attention, its biases and a norm
    count = 24 * block + 2 * D + 769 * D + D  # encoder: blocks, last norm, patch embedding, CLS
    count += (
        4 * block + 2 * D + (tags_ + 4) * D + 32 * D + 2 * D
    )  # language, and the two kinds of tokens
    count += 4 * decode + 2 * D + (tags_ + C) * (D + 1)
    assert sum(p.numel() for p in net.parameters()) == count
    x = net.encoder.embed(patches, ids)
    assert net.language(words, None).shape == (2, 32, D) and x.shape == (2, 65, D)
    assert net.decoder(x[:, :32], x).shape == (2, 32, D) and hidden.shape == (2, 32)


# ---- the stage -----------------------------------------------------------------------------------


def test_a_run_writes_what_it_says(trained):
    found = {p.name for p in trained.iterdir()}
    assert {
        "state.pt",
        "model.safetensors",
        "metrics.json",
        "log.jsonl",
    } == found
    row = json.loads((trained / "metrics.json").read_text())
    assert (
        row["half"].keys()
        == row["end"].keys()
        == {f"{k}_top{n}" for k in ("with", "without") for n in (1, 5)}
    )
    assert row["tags"].keys() == {"map", "micro_f1", "macro_f1", "error", "error_top", "ap"}
    assert len(row["tags"]["ap"]) == 5 and "tags_truth" not in row
    log = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [r["hidden"] for r in log if "hidden" in r][-1] == 1.0 and row["dev"].keys() > row[
        "end"
    ].keys()
    assert [r["epoch"] for r in log if "dev_with_top1" in r] == [1, 2]
    with safe_open(trained / "model.safetensors", "pt") as file:
        header = json.loads(file.metadata()["animask"])
    assert (
        header["words"] == sorted(WORDS, key=header["words"].index)
        and len(header["thresholds"]) == 5
    )


@pytest.mark.parametrize("arm", [a for a in tags.ARMS if a != "mfdn"])
def test_every_arm_trains(tagged, arm):
    words = ["encoder", "--data", "packed", "--out", f"arm-{arm}", "--arm", arm]
    done = call("tags.py", *words, *QUICK, cwd=tagged, check=0)
    row = json.loads((tagged / f"arm-{arm}" / "metrics.json").read_text())
    assert ("tags" in row) == (arm in tags.NAMES_TAGS) and ("mAP" in done.stdout) == (
        arm in tags.NAMES_TAGS
    )
    log = (tagged / f"arm-{arm}" / "log.jsonl").read_text()
    assert ('"hidden"' in log) == (arm in tags.HIDES_TAGS)
    if arm == "tags":
        assert "sees no picture" in refused(call("tags.py", f"arm-{arm}", "images", cwd=tagged))
    assert ("without_top1" in row["end"]) == (arm != "bce") and ("with_top1" in row["end"]) == (
        arm in tags.READS_TAGS
    )


def test_it_learns_the_colours_and_their_names(tagged):
    call(
        "tags.py",
        "encoder",
        "--data",
        "packed",
        "--out",
        "long",
        "--epochs",
        40,
        *QUICK[2:],
        cwd=tagged,
        check=0,
    )
    row = json.loads((tagged / "long" / "metrics.json").read_text())
    assert row["end"]["without_top1"] > 80, row["end"]  # a third by guessing
    ap = dict(
        zip(json.loads(read_header(tagged / "long"))["words"], row["tags"]["ap"], strict=True)
    )
    assert min(ap[colour] for colour in WORDS[:3]) > 70, ap


def read_header(run):
    with safe_open(run / "model.safetensors", "pt") as file:
        return file.metadata()["animask"]


def test_a_run_that_was_stopped_ends_with_the_same_bits(tagged, trained, monkeypatch):
    update = train.Run.update

    def update_and_stop(run, *numbers):
        update(run, *numbers)
        if run.step == 5:  # in the second epoch
            run.stop.append(signal.SIGTERM)

    monkeypatch.setattr(train.Run, "update", update_and_stop)
    words = ["encoder", "--data", "packed", "--out", "stopped", *QUICK]
    monkeypatch.chdir(tagged)
    monkeypatch.setattr(sys, "argv", ["tags.py", *map(str, words)])
    with pytest.raises(SystemExit):
        tags.main()
    LOCKS.close()  # as the end of its process would
    assert torch.load(tagged / "stopped" / "state.pt", weights_only=True)["step"] == 5
    call("tags.py", "--resume", "stopped", cwd=tagged, check=0)
    one, two = (
        torch.load(tagged / run / "state.pt", weights_only=True) for run in ("whole", "stopped")
    )
    assert one["step"] == two["step"] and one["config"]["half"] == two["config"]["half"]
    assert all(torch.equal(one["model"][k], two["model"][k]) for k in one["model"])
    call("tags.py", "--resume", "stopped", "--split", "test", cwd=tagged, check=0)
    assert "end" in json.loads((tagged / "stopped" / "metrics-test.json").read_text())


# ---- use -----------------------------------------------------------------------------------------


def test_pictures_get_a_name_and_tags(tagged, trained):
    picture = sorted((tagged / "images").rglob("*.png"))[0]
    done = call("tags.py", "whole", picture, "--json", "--threshold", 0, cwd=tagged, check=0)
    row = json.loads(done.stdout)
    assert row["name"].startswith("class") and 0 <= row["confidence"] <= 1 and len(row["tags"]) == 5
    assert list(row["tags"].values()) == sorted(row["tags"].values(), reverse=True)
    line = call("tags.py", "whole", picture, cwd=tagged, check=0).stdout
    assert line.startswith(f"{picture}: class")


BAD = {
    "no tags": (["encoder", "--data", "plain", *QUICK], "has no tags"),
    "a run of ours to train": (["whole", "--data", "packed", *QUICK], "is a run of tags.py"),
    "an encoder asked": (["encoder", "images"], "tags.py ENCODER"),
    "no picture": (["whole", "list.txt"], "is not a picture that can be read"),
    "thresholds of none": (["blind", "images", "--threshold", 0.3], "--threshold has no effect"),
    "a split of other tags": (
        ["encoder", "--data", "mixed", *QUICK],
        "val has other tags than train",
    ),
    "an older packing": (["encoder", "--data", "older", *QUICK], "not int32"),
    "a split without a tag": (["encoder", "--data", "empty", *QUICK], "val has no tags"),
    "a flag of training": (["whole", "images", "--arm", "vilt"], "--arm has no effect"),
    "a flag of use": (
        ["encoder", "--data", "packed", "--out", "no", "--json", *QUICK],
        "--json has no effect",
    ),
    "a key of another arm": (
        ["encoder", "--data", "packed", "--arm", "mfdn:share=.3"],
        "--arm mfdn has no key 'share'",
    ),
    "views of no picture": (
        ["encoder", "--data", "packed", "--out", "no", "--arm", "tags", "--min-crop", 0.3, *QUICK],
        "--min-crop has no effect",
    ),
    "an encoder that is known": (["encoder", "--resume", "whole"], "--resume RUN"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(tagged, trained, case):
    words, why = BAD[case]
    if not (tagged / "plain").exists():
        spoil_sets(tagged)
        call("data.py", "images", "--out", "plain", "--size", 32, cwd=tagged, check=0)
        (tagged / "list.txt").write_text("hello\nyou\n")
        call(
            "tags.py",
            "encoder",
            "--data",
            "packed",
            "--out",
            "blind",
            "--arm",
            "image",
            *QUICK,
            cwd=tagged,
            check=0,
        )
    assert why in refused(call("tags.py", *words, cwd=tagged))


def spoil_sets(base):
    """Packed sets that are wrong in one way each."""
    changes = {
        "mixed": lambda split, t, h: (
            (t, h | {"tags": h["tags"][::-1]}) if split == "val" else (t, h)
        ),
        "older": lambda _, t, h: (t | {"tags": (t["tags"] >= 0).to(torch.uint8)}, h),
        "empty": lambda split, t, h: (
            (t | {"tags": t["tags"] * 0 - 1}, h) if split == "val" else (t, h)
        ),
    }
    for name, change in changes.items():
        (base / name).mkdir()
        for path in (base / "packed").glob("*.safetensors"):
            tensors, header = change(path.stem, *read_safetensors(path))
            save_safetensors(tensors, base / name / path.name, header)


# ---- what a tag costs -----------------------------------------------------


# ---- how tags are judged -------------------------------------------------------------------------


def test_thresholds_are_the_best_for_f1():
    from sklearn.metrics import f1_score

    rng = np.random.default_rng(0)
    truth = rng.random((200, 6)) < 0.3
    scores = np.round(rng.random((200, 6)) * 0.5 + truth * 0.3, 2)  # with ties
    found = tags.fit_thresholds(scores, truth)
    for t in range(6):
        best = max(f1_score(truth[:, t], scores[:, t] >= x) for x in np.unique(scores[:, t]))
        assert f1_score(truth[:, t], scores[:, t] >= found[t]) == pytest.approx(best)


def test_numbers_of_tags_are_scikit_learns():
    from sklearn.metrics import f1_score

    rng = np.random.default_rng(1)
    truth = rng.random((100, 30)) < 0.2
    truth[:, 3] = False
    scores = rng.random((100, 30))
    row, said = tags.judge(scores, truth, np.full(30, 0.6)), scores >= 0.6
    there = [t for t in range(30) if t != 3]
    assert row["micro_f1"] == pytest.approx(100 * f1_score(truth, said, average="micro"), abs=1e-3)
    assert row["macro_f1"] == pytest.approx(
        100 * f1_score(truth[:, there], said[:, there], average="macro"), abs=1e-3
    )
    assert (
        row["error"] == pytest.approx(100 * (said != truth).mean(), abs=1e-3)
        and row["ap"][3] is None
    )
    top = np.argsort(-truth.sum(0), kind="stable")[:25]
    assert row["error_top"] == pytest.approx(100 * (said != truth)[:, top].mean(), abs=1e-3)
