"""On a GPU that is there: every stage runs, a step waits for nothing, and --compile changes no result.

Where there is none, these tests are skipped, and say so.
"""

import pytest
import torch
from conftest import run_line
from made import NANO

import data
from common import train
from kernels import patches

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
TRAIN = f"pretrain.py --data datasets/packed --model {NANO} --batch-size 16 --epochs 2"
TUNE = (
    "finetune_lora.py runs/a --split val --batch-size 4 --epochs 2"  # with steps that log nothing
)
SEGMENT = "apps.segment runs/a --data datasets/frames --pixel-steps 1 --epochs 2"
DETECT = (
    "apps.detect runs/a --data datasets/scenes --method lora --view 48 --batch-size 8 --epochs 2"
)
STAGES = {
    "attn_high": f"{TRAIN} --mask attn_high:start=0 --out runs/attn",
    "fg_heavy": f"{TRAIN} --mask fg_heavy --out runs/fg",
    "learned": f"{TRAIN} --mask learned --out runs/learned",
    "simmim": f"{TRAIN.replace('decoder_dim=32', 'simmim=1')} --out runs/simmim",
    "maps": "apps.maps --data datasets/packed --map attn --run runs/a --out maps/gpu",
    "probe": "probe.py runs/a",
    "linear": f"{TUNE} --method linear --out runs/linear",
    "lora": f"{TUNE} --method lora --out runs/lora",
    "full": f"{TUNE} --method full --out runs/full",
    "recognize": "apps.recognize runs/a-lora images/class0/illust0_0.png",
    "verify": "apps.unknown runs/a-lora",
    "tags": "apps.tags runs/a --data datasets/packed --epochs 2 --out runs/tags",
    "segment": f"{SEGMENT} --out runs/cut",
    "detect": f"{DETECT} --out runs/faces",
}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_runs_on_the_gpu(name, at):
    run_line(f"{STAGES[name]} --device cuda", at, check=0)


@pytest.mark.parametrize("name", ["attn_high", "lora", "full", "tags", "detect"])
def test_a_step_waits_for_nothing(name, at, monkeypatch):
    """From the second update on, a wait of the host is an error, but for the steps that log.

    Both kinds of steps, with a second view and without, are compiled by then, which waits.
    """
    update = train.Run.update

    def noted(run, loss, norm):
        torch.cuda.set_sync_debug_mode("default")
        update(run, loss, norm)
        waits = run.logs_now or run.step < 2
        torch.cuda.set_sync_debug_mode("default" if waits else "error")

    monkeypatch.setattr(train.Run, "update", noted)
    words = STAGES[name].replace("--out runs/", "--out runs/waits-")
    try:
        run_line(f"{words} --device cuda", at, check=0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_ten_compiled_steps_are_ten_plain_ones(at, monkeypatch):
    """Graphs are recorded by the third step, and replayed after it."""
    update = train.Run.update
    losses = {}

    def noted(run, loss, norm):
        losses[run.config["compile"]].append(loss.item())
        update(run, loss, norm)

    monkeypatch.setattr(train.Run, "update", noted)
    for flag, compiled in (("--compile", True), ("--no-compile", False)):
        monkeypatch.setattr(patches, "IMPL", "auto")
        losses[compiled] = []
        line = f"{TRAIN} --epochs 8 --eval-every 8 --dtype fp32 --device cuda {flag}"
        run_line(f"{line} --out runs/run{flag}", at, check=0)
    assert len(losses[True]) >= 10
    assert losses[True][:10] == pytest.approx(losses[False][:10], rel=1e-3)


def test_pictures_that_the_card_has_no_room_for_arrive_whole(at):
    images = data.open_split("datasets/packed", "train")["images"]
    order = data.epoch_order(len(images), 0, 0)
    for index, batch in data.batches(images, order, 4, torch.device("cuda")):
        assert torch.equal(batch.cpu(), torch.from_numpy(images[index.numpy()]))
