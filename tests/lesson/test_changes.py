"""What a student changes works to the end: it trains, is read back, probed, fine-tuned and exported.

Each change is made in a copy of the code, and the stages run there one after the other.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import draw_folder

from common.door import read_json

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs/change.md").read_text()
INIT = "    def __init__(self, image_size, patch_size, dim, depth, heads, norm_eps=EPS):"
CHANGES = {  # name: [(file, old text, new text)]
    "registers": [
        ("model.py", INIT, INIT.replace("heads,", "heads, registers=4,")),
        (
            "model.py",
            "        self.pooler = None",
            "        self.register_token = nn.Parameter(0.02 * torch.randn(1, registers, dim))\n"
            "        self.pooler = None",
        ),
        (
            "model.py",
            "        outputs = []\n        for block in self.blocks[begin:end]:\n",
            "        outputs, N = [], x.shape[1]\n"
            "        x = torch.cat([x, self.register_token.expand(len(x), -1, -1).to(x.dtype)], 1)\n"
            "        for block in self.blocks[begin:end]:\n",
        ),
        ("model.py", "outputs.append(x)", "outputs.append(x[:, :N])"),
        ("model.py", "outputs if every else x\n", "outputs if every else x[:, :N]\n"),
    ],
    "layer scale": [
        (
            "model.py",
            "        self.mlp = MLP(dim, MLP_RATIO * dim)\n",
            "        self.mlp = MLP(dim, MLP_RATIO * dim)\n"
            "        self.ls1 = nn.ParameterDict({'gamma': torch.full((dim,), 0.1)})\n"
            "        self.ls2 = nn.ParameterDict({'gamma': torch.full((dim,), 0.1)})\n",
        ),
        ("model.py", "+ self.attn(", "+ self.ls1['gamma'] * self.attn("),
        ("model.py", "x + self.mlp(", "x + self.ls2['gamma'] * self.mlp("),
    ],
    "swiglu": [
        (
            "model.py",
            "        self.fc1 = nn.Linear(dim, hidden)\n        self.fc2 = nn.Linear(hidden, dim)\n",
            "        hidden = 2 * hidden // 3\n"
            "        self.fc1 = nn.Linear(dim, 2 * hidden)\n"
            "        self.fc2 = nn.Linear(hidden, dim)\n",
        ),
        (
            "model.py",
            "        return self.fc2(F.gelu(self.fc1(x)))",
            "        gate, value = self.fc1(x).chunk(2, -1)\n"
            "        return self.fc2(F.silu(gate) * value)",
        ),
    ],
    "learned positions": [
        (
            "model.py",
            'self.register_buffer("pos_embed", sincos_positions(dim, self.side))',
            "self.pos_embed = nn.Parameter(sincos_positions(dim, self.side))",
        ),
    ],
    "a decoder with an argument": [
        ("model.py", "decoder_heads=None, **vit):", "decoder_heads=None, decoder_skip=1, **vit):"),
        (
            "model.py",
            '            "decoder_heads": decoder_heads,\n',
            '            "decoder_heads": decoder_heads,\n            "decoder_skip": decoder_skip,\n',
        ),
    ],
    "a neck of its own": [
        (
            "common/classifier.py",
            "nn.BatchNorm1d(dim, 1e-6, affine=False)",
            "nn.LayerNorm(dim)",
        )
    ],
    "plain SGD": [
        (
            "common/train.py",
            "torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)",
            "torch.optim.SGD(groups, lr=lr)",
        )
    ],
    "DoRA": [
        (
            "finetune_lora.py",
            "def lora_layers(encoder):",
            "CODE OF THE PAGE\n\n\ndef lora_layers(encoder):",
        ),
        ("finetune_lora.py", "block.set_submodule(name, LoRA(", "block.set_submodule(name, DoRA("),
    ],
    "BitFit": [
        (
            "finetune_lora.py",
            "    for block in encoder.blocks:\n"
            "        for name, chunks in LAYERS.items():\n"
            "            layer = block.get_submodule(name)\n"
            "            block.set_submodule(name, LoRA(layer, r, alpha or 2 * r, chunks))\n",
            "    for name, w in encoder.named_parameters():\n"
            "        w.requires_grad_(name.endswith('bias'))\n",
        )
    ],
    "LoRA+": [
        (
            "common/classifier.py",
            "            peak = lr * layer_decay ** (depth + 1 - level_of(name, depth))\n",
            "            peak = lr * layer_decay ** (depth + 1 - level_of(name, depth))\n"
            '            peak *= 16 if name.endswith(".B") else 1\n',
        ),
    ],
}
# Changes that do not meet are made together. Public formats hold a plain ViT alone, and these are none:
NOT_PLAIN = (["registers"], ["layer scale", "swiglu"])
PLAIN = (
    ["learned positions", "a decoder with an argument", "a neck of its own", "plain SGD"],
    ["DoRA", "LoRA+"],
    ["BitFit"],
)
TINY = "--device cpu --dtype fp32 --batch-size 8 --epochs 2"
NANO = "nano:dim=32,depth=2,heads=2,image_size=32,decoder_dim=32"
STAGES = (
    f"pretrain --data images --model {NANO} --mask attn_high:start=0.5 --out runs/a {TINY}",
    "probe runs/a --device cpu --dtype fp32 --headline",
    f"finetune_lora runs/a --split val --method lora:r=2 --out runs/lora {TINY}",
    f"finetune_lora runs/a --split val --method full --out runs/full {TINY}",
    "apps.recognize runs/lora images/class0 --device cpu --dtype fp32",
    "apps.export runs/lora --to merged",
)


def changed_copy(folder, names):
    """The code with changes, and pictures beside it."""
    for room in ("common", "kernels", "ingest", "apps"):
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    dora = re.search(r"```python\n(class DoRA.*?)```", DOCS, re.DOTALL)[1].rstrip()
    for name in names:
        for file, old, new in CHANGES[name]:
            text = (folder / file).read_text()
            assert text.count(old) == 1, (file, old)
            (folder / file).write_text(text.replace(old, new.replace("CODE OF THE PAGE", dora)))
    draw_folder(folder / "images", classes=3, each=16)


DRIVER = """
import importlib, sys
import common.plots
from common.train import cli

common.plots.image_grid = common.plots.curves = lambda *_, **__: None  # they take a third
for line in sys.argv[1:]:
    sys.argv = line.split()
    cli(importlib.import_module(sys.argv[0]).main)
"""


def run(folder, *lines):
    """Commands in the folder, in one process, until one fails -> (exit status, output)."""
    command = [sys.executable, "-c", DRIVER, *lines]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("names", [*NOT_PLAIN, *PLAIN], ids=", ".join)
def test_a_change_works_to_the_end(tmp_path, names):
    changed_copy(tmp_path, names)
    plain = names in PLAIN
    lines = [*STAGES, "apps.export runs/a --to timm"]
    status, said = run(tmp_path, *lines)
    assert status == (0 if plain else 2), said[-3000:]
    assert read_json(tmp_path / "runs/lora/metrics.json")["top1"] > 0
    # What is no plain ViT is refused by name, before a file is there.
    assert (tmp_path / "runs/a/timm.safetensors").exists() == plain
    assert plain or said.strip().splitlines()[-1].startswith("error: runs/a")
