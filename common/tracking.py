"""--log tensorboard,wandb: numbers of log.jsonl, the run's configuration and its pictures, where others look at them.

Neither package is a requirement: it is imported when asked for.
"""

import argparse
import json
import os
from importlib.util import find_spec

import numpy as np

from common.io import open_picture


class TensorBoard:
    """Event files in the run's folder: tensorboard --logdir runs shows all runs."""

    def __init__(self, out, config):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(out)
        self.writer.add_text("config", f"```\n{json.dumps(config, indent=1, default=str)}\n```")

    def numbers(self, row, step):
        for name, value in row.items():
            self.writer.add_scalar(name, value, step)

    def pictures(self, paths, step):
        for path in paths:
            pixels = np.asarray(open_picture(path).convert("RGB"))
            self.writer.add_image(path.stem, pixels, step, dataformats="HWC")
        self.writer.close()


class Wandb:
    """A run of the project animask, in the run's folder and, unless WANDB_MODE=offline, at Weights
    & Biases.
    """

    def __init__(self, out, config):
        import wandb

        self.image = wandb.Image
        self.run = wandb.init(project="animask", name=out.name, dir=os.fspath(out), config=config)

    def numbers(self, row, step):
        self.run.log(row, step=step)

    def pictures(self, paths, step):
        self.run.log({path.stem: self.image(os.fspath(path)) for path in paths}, step=step)
        self.run.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": Wandb}


def known(text):
    """What --log says -> of TRACKERS, those named, if their packages are there."""
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in TRACKERS:
            choices = f"choose from {', '.join(TRACKERS)} (log.jsonl is always written)"
            raise argparse.ArgumentTypeError(f"{name} is unknown; {choices}")
        if not find_spec(name):
            raise argparse.ArgumentTypeError(
                f"{name} needs a package that is not installed: pip install {name}"
            )
    return [TRACKERS[name] for name in names]
