"""torchrun pretrain.py: two processes, views of their own, the same weights."""

import pytest
import torch
from conftest import equal, python

import pretrain
from common.train import read_log

WORDS = ["--device", "cpu", "--dtype", "fp32", "--model", "nano:image_size=32", "--batch-size", 16]
WORDS += ["--epochs", 2, "--mask", "learned:start=0"]
# what each process ends with is written by the process itself, whatever pretrain.py writes
NOTE = """
import os
import torch
import pretrain
from common.command import cli
plain = pretrain.finish
def finish(run, model, guide, *rest):
    parts = {"model": model, **guide.networks()}
    ends = {name: part.state_dict() for name, part in parts.items()}
    torch.save(ends | {"writes": run.writes}, "rank" + os.environ["RANK"] + ".pt")
    plain(run, model, guide, *rest)
pretrain.finish = finish
cli(pretrain.main)
"""


@pytest.mark.slow
def test_two_processes_end_with_the_same_weights(small, tmp_path):
    """The mean gradient moves both from the same start, and only the first one writes."""
    (tmp_path / "noted.py").write_text(NOTE)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    said = python(*torchrun, "noted.py", "--data", small, "--out", "run", *WORDS, cwd=tmp_path)
    one, two = (torch.load(tmp_path / f"rank{i}.pt", weights_only=True) for i in (0, 1))
    assert one["writes"] and not two["writes"] and said.count("wrote") == 1
    assert equal(one["model"], two["model"]) and equal(one["predictor"], two["predictor"])
    torch.manual_seed(0)
    start = pretrain.MAE(**pretrain.SIZES["nano"] | {"image_size": 32}, decoder_depth=1)
    assert not torch.equal(one["model"]["encoder.cls_token"], start.encoder.cls_token)
    assert max(row["step"] for row in read_log(tmp_path / "run" / "log.jsonl")) == 10
