"""What surrounds every loop: flags that know who read them, the schedule, a run after a kill, two processes."""

import errno
import math
import mmap
import sys
from multiprocessing.spawn import get_preparation_data
from pathlib import Path

import pytest
import torch
from conftest import equal, python
from torch import nn

import pretrain
from common import train
from common.classifier import Classifier, make_optimizer
from common.train import (
    AT_END,
    Parser,
    UserError,
    parse_keys,
    run_name,
    set_defaults,
)
from model import MAE, SIZES, Pooler, ViT

CPU = torch.device("cpu")
CHOICES = {"lora": {"r": 8, "alpha": 1.5, "on": "qkv"}, "linear": {}}


def flags_of(*words):
    parser = Parser()
    parser.add_argument("--out", default="run")
    parser.add_argument("--resume")
    parser.add_argument("--log", default=())
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=0.1)
    return parser.parse_args(words)


def test_flags_are_given_or_saved_or_defaults(tmp_path, monkeypatch):
    flags = flags_of("--lr", "0.5", "--out", "x")
    set_defaults(flags, lr=1.0, batch_size=16)
    assert (flags.lr, flags.batch_size, run_name(flags, "toon")) == (0.5, 16, "toon-lr-0.5")
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    config = {"lr": 0.7, "out": "run", "batch_size": 4}
    torch.save({"format": train.FORMAT, "config": config}, "run/state.pt")
    flags = flags_of("--resume", "run")
    train.take_saved_flags(flags)
    set_defaults(flags, lr=1.0, batch_size=16)
    assert (flags.lr, flags.out, flags.batch_size) == (0.7, "run", 4)
    with pytest.raises(UserError, match="--lr"):
        train.take_saved_flags(flags_of("--resume", "run", "--lr", "1"))


def test_keys_of_a_name():
    keys = {"r": 4, "alpha": 1.5, "on": "q"}
    assert parse_keys("lora:r=4,on=q", CHOICES, "--x") == ("lora", keys)
    assert CHOICES["lora"]["r"] == 8, "the defaults have changed"
    assert parse_keys("a:on=0", {"a": {"on": True}}, "--x") == ("a", {"on": 0})
    assert parse_keys("a:on=0.5", {"a": {"on": None}}, "--x") == ("a", {"on": 0.5})
    with pytest.raises(UserError, match="--x"):
        parse_keys("lora:r=1.5", CHOICES, "--x")


def test_the_learning_rate_rises_on_a_line_and_falls_by_half_a_cosine_to_0():
    rates = [train.lr_at(step, 100, 7.3, 2.0) for step in range(101)]
    assert rates[:7] == pytest.approx([2 * (step + 1) / 7.3 for step in range(7)])
    assert max(rates) == 2 and rates[100] == pytest.approx(0, abs=1e-12)
    cosine = [1 + math.cos(math.pi * (step - 7.3) / 92.7) for step in range(8, 101)]
    assert rates[8:] == pytest.approx(cosine)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_biases_norms_and_tokens_are_not_decayed(stage):
    """Written by the names of the parameters: only matrices are decayed."""
    if stage == "pretrain":
        net = MAE(
            decoder_dim=32, decoder_depth=1, image_size=32, patch_size=8, dim=32, depth=2, heads=2
        )
        net.encoder.pooler = Pooler(32, 2)
        groups = train.make_optimizer(net, 1e-3, 0.05).param_groups
    else:
        net = Classifier(ViT(32, 8, 32, 2, 2), 3, "arcface")
        groups = make_optimizer(net, 1e-3, 1e-2, 0.05, 0.9).param_groups
    decay = {}
    for group in groups:
        decay |= {id(p): group["weight_decay"] for p in group["params"]}
    for name, p in net.named_parameters():
        plain = name.endswith((".bias", "_token")) or "norm" in name
        assert decay[id(p)] == (0 if plain else 0.05), name
    assert len(decay) == len(list(net.parameters()))


@pytest.mark.parametrize(
    "can, dtype", [("avx2", "fp32"), ("avx512_bf16", "bf16"), ("bf16", "fp32")]
)
def test_a_cpu_gets_bf16_where_it_has_units_for_it(monkeypatch, can, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {can: True})
    assert train.pick_dtype("auto", CPU)[0] == dtype
    assert train.pick_dtype("bf16", CPU)[0] == "bf16"


def steps(flags, until):
    """Train a small network to step `until` as a stage would, and stop there as a kill would."""
    torch.manual_seed(0)
    net = nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    run = train.Run(flags, {"model": net, "optimizer": optimizer}, 40, 10, CPU)
    run.resume_or_begin()
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


def test_a_killed_run_goes_on_with_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SAVE_EVERY", 0)
    whole, expected = steps(flags_of("--out", str(tmp_path / "whole")), 40)
    out = str(tmp_path / "run")
    killed, _ = steps(flags_of("--out", out), 23)
    killed.log(note="after the last checkpoint")
    AT_END.close()  # as the end of its process would
    run, net = steps(flags_of("--resume", out, "--out", out), 40)
    assert net.weight.equal(expected.weight) and net.bias.equal(expected.bias)
    rows = [train.read_log(folder / "log.jsonl") for folder in (whole.out, run.out)]
    assert [r["loss"] for r in rows[0]] == [r["loss"] for r in rows[1]]
    assert [r["step"] for r in rows[1]] == [10, 20, 30, 40]


def test_a_run_never_goes_on_with_a_loss_that_is_not_finite(tmp_path):
    run, _ = steps(flags_of("--out", str(tmp_path / "run")), 12)
    run.update(torch.tensor(float("nan")), torch.tensor(1.0))
    with pytest.raises(UserError, match="not finite at step 13"):
        run.log_step()


def test_the_same_command_begins_again_or_goes_on_and_never_over_an_ended_run(tmp_path, capsys):
    """An edit of a student that crashes in step 3 costs nothing; a saved step is kept."""
    out = str(tmp_path / "run")
    steps(flags_of("--out", out), 3)
    run, _ = steps(flags_of("--out", out), 20)
    assert [row["step"] for row in train.read_log(run.log_path)] == [10, 20]
    run.save()
    run, net = steps(flags_of("--out", out), 40)
    assert "goes on  with step 20" in capsys.readouterr().out
    assert net.weight.equal(steps(flags_of("--out", str(tmp_path / "whole")), 40)[1].weight)
    with pytest.raises(UserError, match="begun otherwise.*--resume"):
        steps(flags_of("--out", out, "--lr", "0.2"), 3)
    run.save()
    with pytest.raises(UserError, match="has ended"):
        steps(flags_of("--out", out), 40)


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    """torch.save fails half-way with an error of its own."""
    run, _ = steps(flags_of("--out", str(tmp_path / "run")), 10)
    run.save()
    before = run.path.read_bytes()

    def half(state, file):
        file.write_bytes(before[:100])
        raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(RuntimeError):
        run.save()
    assert run.path.read_bytes() == before


def test_a_row_comes_every_tenth_step_and_before_each_evaluation(tmp_path):
    flags = flags_of("--out", str(tmp_path / "run"))
    for flags.eval_every, due in ((1, [3, 6, 9, 10, 12, 14]), (2, [6, 10, 12, 14]), (9, [10, 14])):
        run = train.Run(flags, {}, 14, 3, CPU)
        rows = []
        for run.step in range(1, 15):
            rows += [run.step] * run.logs_now
        assert rows == due


def test_the_cost_of_a_step_is_read_off_the_log(tmp_path):
    rows = [{"images_per_s": s, "memory_mb": m, "loss": 1} for s, m in ((50, 7), (100, 9), (80, 8))]
    (tmp_path / "log.jsonl").write_text("\n".join(map(str, rows)).replace("'", '"') + '\n{"cut')
    found = train.cost_of_steps(tmp_path / "log.jsonl", 16)
    assert found == {"step_ms": 200, "peak_memory_mb": 9}


WORDS = ["--device", "cpu", "--dtype", "fp32", "--model", "nano:image_size=32", "--batch-size", 16]
WORDS += ["--epochs", 2, "--mask", "learned:start=0"]
# what each process ends with is written by the process itself, whatever pretrain.py writes
NOTE = """
import os
import torch
import pretrain
from common.train import cli
plain = pretrain.train.Run.save_if_due
def save_if_due(run):
    if run.step == run.total:
        ends = {name: run.parts[name].state_dict() for name in ("model", "guide")}
        torch.save(ends | {"writes": run.writes}, "rank" + os.environ["RANK"] + ".pt")
    plain(run)
pretrain.train.Run.save_if_due = save_if_due
cli(pretrain.main)
"""


# what torchrun tells a process of one
STARTED = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_ADDR="x", MASTER_PORT=1)


def test_one_process_of_torchrun_is_alone(monkeypatch):
    for name, value in STARTED.items():
        monkeypatch.setenv(name, str(value))
    assert pretrain.start_processes(CPU) == (0, 1, CPU)
    assert not pretrain.distributed.is_initialized()


@pytest.mark.slow
def test_two_processes_end_with_the_same_weights(small, tmp_path):
    """The mean gradient moves both from the same start, and only the first one writes."""
    (tmp_path / "noted.py").write_text(NOTE)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    said = python(*torchrun, "noted.py", "--data", small, "--out", "run", *WORDS, cwd=tmp_path)
    one, two = (torch.load(tmp_path / f"rank{i}.pt", weights_only=True) for i in (0, 1))
    assert one["writes"] and not two["writes"] and said.count("wrote") == 1
    assert equal(one["model"], two["model"]) and equal(one["guide"], two["guide"])
    torch.manual_seed(0)
    start = MAE(**SIZES["nano"] | {"image_size": 32})
    assert not torch.equal(one["model"]["encoder.cls_token"], start.encoder.cls_token)
    assert max(row["step"] for row in train.read_log(tmp_path / "run" / "log.jsonl")) == 10


def test_a_disk_without_shared_maps_is_read_by_private_ones(tmp_path, monkeypatch):
    """Mounts of a network and FUSE may refuse the first kind: ENODEV."""
    path = tmp_path / "x.safetensors"
    train.save_safetensors({"x": torch.arange(6).view(2, 3)}, path, {"n": 1})
    plain = mmap.mmap

    def private(*args, access, **options):
        if access != mmap.ACCESS_COPY:
            raise OSError(errno.ENODEV, "No such device")
        return plain(*args, access=access, **options)

    monkeypatch.setattr(mmap, "mmap", private)
    found = train.open_tensors(path)
    assert found["header"] == {"n": 1} and found["x"].tolist() == [[0, 1, 2], [3, 4, 5]]
    found["x"][:] = 7
    assert train.read_safetensors(path)[0]["x"].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"\xff" * 40, b"\x02" + bytes(7) + b"[]", bytes(100)]
)
def test_a_file_that_holds_no_tensors_is_one_line(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match="file of tensors"):
        train.read_safetensors(path)


def test_a_module_without_a_spec_can_start_processes(monkeypatch):
    """As __main__ is in a notebook from the second %run on."""
    monkeypatch.delattr(sys.modules["__main__"], "__spec__")
    train.cli(lambda: get_preparation_data("a process"))
