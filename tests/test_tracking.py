"""What --log tensorboard,wandb writes is read back. wandb is offline."""

import json
import struct
import sys

import pytest
from conftest import call, refused

from common.train import read_log

STEP = ["--device", "cpu", "--model", "nano:image_size=32", "--epochs", 1, "--batch-size", 16]
STEP += ["--mask", "random"]


@pytest.fixture(scope="module")
def run(small, tmp_path_factory):
    """A run that was logged to both."""
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    pytest.importorskip("wandb", reason="pip install wandb")
    base = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        words = [
            "pretrain.py",
            "--data",
            small,
            "--out",
            base / "run",
            "--log",
            "tensorboard,wandb",
            *STEP,
        ]
        call(*words, cwd=base, check=0)
        sys.modules["wandb"].finish()  # as the end of its process would
    return base / "run"


def losses(run):
    return {row["step"]: row["loss"] for row in read_log(run / "log.jsonl") if "loss" in row}


def test_tensorboard_shows_the_log(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run))
    found.Reload()
    read = {event.step: event.value for event in found.Scalars("loss")}
    assert losses(run) and read == pytest.approx(losses(run), rel=1e-6)
    assert {"lr", "grad_norm", "knn"} <= set(found.Tags()["scalars"])


def records(path):
    """Bytes of each record of a log in LevelDB's format: blocks of 32 KiB; pieces with checksum,
    length and kind.
    """
    raw, at, record = path.read_bytes(), 7, b""  # behind the file's name
    while at + 7 <= len(raw):
        if -at % 2**15 < 7:  # too small for a piece
            at += -at % 2**15
        _, length, kind = struct.unpack_from("<IHB", raw, at)
        record += raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def test_wandb_offline_keeps_the_same_to_be_sent_later(run):
    from wandb.proto import wandb_internal_pb2

    read, config = {}, {}
    for record in map(
        wandb_internal_pb2.Record.FromString,
        records(next(run.glob("wandb/offline-run-*/run-*.wandb"))),
    ):
        config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        row = {
            item.key or item.nested_key[0]: json.loads(item.value_json)
            for item in record.history.item
        }
        read |= {row["_step"]: row["loss"]} if "loss" in row else {}
    assert read == pytest.approx(losses(run)) and config["mask"] == "random"


def test_an_unknown_place_is_refused(small, tmp_path):
    words = ["pretrain.py", "--data", small, "--out", tmp_path / "run", "--log", "mlflow", *STEP]
    line = refused(call(*words, cwd=tmp_path))
    assert all(word in line for word in ("--log mlflow", "tensorboard", "wandb"))


def test_a_slip_in_a_flag_leaves_a_finished_run_as_it_is(run, small):
    before = {path: path.stat().st_mtime_ns for path in run.iterdir()}
    for words in (("--log", "mlflow"), ("--data", ""), ("--mask=",)):
        line = refused(
            call(
                "pretrain.py",
                "--data",
                small,
                "--out",
                run,
                *STEP,
                *words,
                cwd=run.parent,
            )
        )
        assert words[0].rstrip("=") in line
    assert {path: path.stat().st_mtime_ns for path in run.iterdir()} == before
