"""What surrounds every loop: flags that know whether they were read, and a run that goes on after a kill."""

import pytest
import torch

from common import train
from common.command import LOCKS, Flags, Parser, UserError, parse_keys

CPU = torch.device("cpu")
CHOICES = {"lora": {"r": 8, "alpha": 1.5, "on": "qkv"}, "linear": {}}


def flags_of(*words):
    parser = Parser()
    parser.add_argument("--out", default="run")
    parser.add_argument("--resume")
    parser.add_argument("--log", default=())
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=0.1)
    return Flags(parser, words)


# ---- flags ---------------------------------------------------------------------------------------


def test_a_flag_that_nobody_read_is_refused():
    flags = flags_of("--lr", "0.5", "--batch-size", "2")
    assert flags.lr == 0.5
    with pytest.raises(UserError, match="--batch-size has no effect"):
        flags.refuse_unread()
    assert flags.batch_size == 2
    flags.refuse_unread()


def test_defaults_fill_only_what_was_not_given():
    flags = flags_of("--lr", "0.5")
    flags.fill(lr=1.0, batch_size=16)
    assert (flags.lr, flags.batch_size) == (0.5, 16)


def test_a_run_is_named_by_the_flags_that_were_given():
    assert flags_of("--lr", "0.5", "--out", "x").name("toon") == "toon-lr-0.5"


def test_a_resumed_run_takes_its_saved_flags():
    flags = flags_of("--resume", "run")
    flags.take_saved({"lr": 0.7, "out": "run"})
    flags.fill(lr=1.0, batch_size=16)
    assert (flags.lr, flags.resume, flags.batch_size) == (0.7, "run", 16)
    with pytest.raises(UserError, match="--lr has no effect beside --resume"):
        flags_of("--resume", "run", "--lr", "1").take_saved({"lr": 0.7})


def test_keys_of_a_name():
    assert parse_keys("lora:r=4,on=q", CHOICES, "--x") == (
        "lora",
        {"r": 4, "alpha": 1.5, "on": "q"},
    )
    assert parse_keys("linear", CHOICES, "--x") == ("linear", {})
    assert CHOICES["lora"]["r"] == 8


@pytest.mark.parametrize(
    "text", ["pca", "lora:q=1", "lora:r=a", "lora:r=1.5", "lora:alpha=nan", "linear:r=1"]
)
def test_keys_that_are_unknown_or_no_numbers(text):
    with pytest.raises(UserError, match="--x"):
        parse_keys(text, CHOICES, "--x")


# ---- a run ---------------------------------------------------------------------------------------


def steps(flags, until):
    """Train a small network to step `until` as a stage would, and stop there as a kill would."""
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    run = train.Run(flags, {"model": net, "optimizer": optimizer}, 40, 10, CPU)
    while run.step < until:
        x = torch.randn(4, 3, generator=train.seeded(0, run.step))
        loss = net(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.update(loss, loss.detach())
        if run.logs_now:
            run.log_step()
            run.save_if_due()
    return run, net


def test_a_killed_run_goes_on_with_the_same_bits(tmp_path):
    whole, expected = steps(flags_of("--out", str(tmp_path / "whole")), 40)
    out = str(tmp_path / "run")
    killed, _ = steps(flags_of("--out", out), 23)
    killed.log(note="after the last checkpoint")
    LOCKS.close()  # as the end of its process would
    again = flags_of("--resume", out, "--out", out)
    run, net = steps(again, 40)
    assert net.weight.equal(expected.weight) and net.bias.equal(expected.bias)
    rows = [train.read_log(folder / "log.jsonl") for folder in (whole.out, run.out)]
    assert [r["loss"] for r in rows[0]] == [r["loss"] for r in rows[1]]


def test_what_is_there_is_left_alone(tmp_path):
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(UserError, match="metrics.json is there already"):
        steps(flags_of("--out", str(tmp_path)), 1)


def test_a_loss_that_is_not_finite_names_its_step(tmp_path):
    run, _ = steps(flags_of("--out", str(tmp_path / "run")), 12)
    run.update(torch.tensor(float("nan")), torch.tensor(1.0))
    with pytest.raises(UserError, match="not finite at step 13"):
        run.log_step()
