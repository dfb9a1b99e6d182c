"""Bad input of the lesson's stages: one line with the value, exit status 2, and nothing is written."""

import shutil

import pytest
from conftest import call, refused

CPU = "--device cpu --dtype fp32"
PRE = f"pretrain.py --data packed --out new {CPU} --epochs 1 --batch-size 8"
TUNE = f"finetune_lora.py encoder --data packed --out new {CPU} --epochs 1 --batch-size 8"
PROBE = f"probe.py encoder --data packed {CPU}"
TABLE = (  # the command, and a word of its message
    (f"{PRE} --mask middle", "--mask middle is unknown"),
    (f"{PRE} --mask attn_high:betta=1", "no key 'betta'"),
    (f"{PRE} --mask attn_high:beta=wide", "'wide' must be a number"),
    (f"{PRE} --ratio 1.5", "--ratio 1.5"),
    (f"{PRE} --ratio .99999", "--ratio .99999"),
    (f"{PRE} --contrast 1", "pooler, cls, none"),
    (f"{PRE} --contrast none:weight=1", "no key 'weight'"),
    (f"{PRE} --model nano:simmim=1 --contrast pooler", "SimMIM"),
    (f"{PRE} --model huge", "--model huge is unknown"),
    (f"{PRE} --model nano:image_size=30", "30"),
    (f"{PRE} --model nano:heads=5", "heads"),
    (f"{PRE} --teacher nowhere --mask attn_high", "nowhere"),
    (f"{PRE} --teacher nowhere", "--teacher has no effect here"),
    (f"{PRE} --maps truth", "--maps has no effect here"),
    (f"{PRE} --attention cls", "--attention has no effect here"),
    (f"{PRE} --init encoder", "--init encoder"),
    (f"{PRE} --device tpu", "--device tpu"),
    (f"{PRE} --flat-weight nan", "--flat-weight nan"),
    (f"{PRE} --seed -1", "--seed -1"),
    (f"{PRE} --data=", "--data gives no"),
    (f"{PRE} --log mlflow", "mlflow"),
    (f"{PRE} --data nowhere", "nowhere"),
    ("pretrain.py --resume nowhere", "nowhere"),
    ("pretrain.py --resume encoder", "state.pt"),
    (f"{TUNE} --method adapters", "--method adapters is unknown"),
    (f"{TUNE} --method linear:r=8", "no key 'r'"),
    (f"{TUNE} --method lora:r=0", "rank"),
    (f"{TUNE} --head arcface:margin=x", "'x' must be a number"),
    (f"{TUNE} --head sphere", "--head sphere is unknown"),
    (f"{TUNE} --unfreeze-every 2", "--unfreeze-every has no effect here"),
    (f"{TUNE} --method linear --lr .1", "--lr has no effect here"),
    (f"{TUNE} --hold-out 2", "--hold-out 2"),
    (f"{TUNE} --split dev", "dev"),
    ("finetune_lora.py nowhere", "nowhere"),
    (f"{PROBE} --split dev", "dev"),
    (f"{PROBE} --out x", "--out has no effect here"),
    (f"{PROBE} --threshold 101", "--threshold 101"),
    (f"{PROBE} --pool grid", "--pool"),
    ("probe.py nowhere", "nowhere"),
    ("probe.py encoder", "--data"),
)


@pytest.fixture(scope="module")
def base(small, run, tmp_path_factory):
    base = tmp_path_factory.mktemp("refusals")
    shutil.copytree(small, base / "packed")
    shutil.copytree(run, base / "encoder")
    return base


@pytest.mark.parametrize("command, word", TABLE)
def test_bad_input_is_one_line(base, command, word):
    line = refused(call(*command.split(), cwd=base))
    assert word in line, line
    assert not any(p.name != ".lock" for p in (base / "new").rglob("*")), "something was written"
