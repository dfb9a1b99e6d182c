"""LoRA adapters as the `peft` library writes and reads them: adapter_model.safetensors, adapter_config.json.

A run of finetune_lora.py needs none of this: all that it has trained is in its head.safetensors. Here is
the way to peft and back. An adapter belongs to the one encoder that it was trained on, which a
fingerprint names.
"""

import re
from pathlib import Path

import torch
from torch import nn

from common.checkpoints import fingerprint
from common.door import check_fields, is_text, number, one_of, read_json, short
from common.train import UserError, read_safetensors, save_json, save_safetensors
from finetune_lora import LoRA, lora_layers

ADAPTER = "adapter_model.safetensors", "adapter_config.json"
TENSOR = "base_model.model.{}.lora_{}.weight"  # peft's name for a layer's A or B
ALPHA = number(1e-6)
CONFIG = {  # fields of adapter_config.json: plain LoRA of an unchanged encoder
    "peft_type": one_of("LORA"),
    "base_model_name_or_path?": is_text,
    "lora_alpha": ALPHA,
    "alpha_pattern?": {},
    "use_rslora?": one_of(True, False),
    "bias?": one_of("none"),
    "use_dora?": one_of(False),
    "fan_in_fan_out?": one_of(False),
    "modules_to_save?": one_of([]),
    # Other starts, as PiSSA's, change the encoder, too.
    "init_lora_weights?": one_of(True, False, "gaussian", "eva", "orthogonal", "mica"),
}
REMEDY = "python finetune_lora.py ENCODER --method lora makes one"
PLAIN = (
    "only a plain LoRA fits here; peft's "
    "save_pretrained(NEW, path_initial_model_for_weight_conversion=UNTRAINED) makes one"
)


def save_adapter(encoder, notes, folder, base):
    """Write the LoRA layers of an encoder; `base` is the file or run of that encoder.

    It is peft's formula, W + alpha/r B A. If you have changed `LoRA`, peft would compute something else.
    Layers have the same names, ranks and scales in every block. peft has one rank and one alpha;
    those of other layers are patterns. notes: "fingerprint" and "image_size" of the encoder.
    """
    tensors = {}
    ranks, alphas = {}, {}
    for name, lora in lora_layers(encoder).items():
        A, B = lora.factors()
        tensors |= {TENSOR.format(name, "A"): A, TENSOR.format(name, "B"): B}
        layer = re.sub(r"^blocks\.\d+\.", "", name)
        ranks[layer] = len(A)
        alphas[layer] = lora.scale * len(A)
    least = min(ranks, key=ranks.get)
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base)}
    config |= {"target_modules": sorted(ranks), "r": ranks[least]}
    config["rank_pattern"] = {k: v for k, v in ranks.items() if v != ranks[least]}
    config["lora_alpha"] = alphas[least]
    config["alpha_pattern"] = {k: v for k, v in alphas.items() if v != alphas[least]}
    save_safetensors(tensors, Path(folder) / ADAPTER[0], notes)
    save_json(config, Path(folder) / ADAPTER[1], 2)


def read_config(folder):
    """-> adapter_config.json of a folder, a dict. Other kinds of LoRA than plain ones and ours are refused."""
    path, about = (Path(folder) / name for name in ADAPTER)
    if not path.exists() or not about.exists():
        raise UserError(f"{folder} has no adapter: that is {' and '.join(ADAPTER)}")
    config = read_json(about, fix=REMEDY)
    check_fields(config, CONFIG, about, PLAIN)
    return config


def adapter_tensors(folder):
    """-> the tensors of an adapter, {name: tensor fp32}, and our header or {}."""
    tensors, header = read_safetensors(Path(folder) / ADAPTER[0], REMEDY)
    return {name: w.float() for name, w in tensors.items()}, header


def check_base(folder, header, encoder):
    """A UserError if the adapter of a folder was trained on another encoder."""
    if header and header["fingerprint"] != fingerprint(encoder):
        base = read_config(folder).get("base_model_name_or_path")
        its = short(header["fingerprint"])
        ours = f"this encoder's is {fingerprint(encoder)}"
        raise UserError(f"the adapter in {folder} is for {base}, fingerprint {its}; {ours}")


def pairs_of(tensors, path):
    """The tensors of a plain LoRA -> {layer: [A, B]}."""
    layers = {re.sub(r"^base_model\.model\.|\.lora_[AB]\.weight$", "", k) for k in tensors}
    pairs = {}
    for layer in sorted(layers):
        names = [TENSOR.format(layer, factor) for factor in "AB"]
        if missing := [name for name in names if name not in tensors]:
            raise UserError(f"{path} is no LoRA of a ViT; missing: {', '.join(missing)}; {REMEDY}")
        pairs[layer] = [tensors[name] for name in names]
    return pairs


def alphas_of(names, config, path):
    """{layer: alpha}: that of the first pattern of adapter_config.json that fits the layer's name.

    A pattern is the end of a name. As a regular expression, as in peft, it may take for ever.
    """
    alphas = dict.fromkeys(names, config["lora_alpha"])
    for key, alpha in reversed((config.get("alpha_pattern") or {}).items()):
        end = "." + key.removeprefix("^").replace("\\.", ".")
        fitting = [name for name in names if f".{name}".endswith(end)]
        if not fitting or not ALPHA(alpha):
            raise UserError(f"{path}: {short(key)} fits no layer, or is no alpha; {REMEDY}")
        alphas |= dict.fromkeys(fitting, alpha)
    return alphas


def read_adapter(folder, encoder):
    """The adapter of a folder, ours or one that peft made -> {layer: (A (r, in), B (out, r), scale)}.

    One that was trained on another encoder, or does not fit this one, is a UserError.
    """
    config = read_config(folder)
    tensors, header = adapter_tensors(folder)
    pairs = pairs_of(tensors, Path(folder) / ADAPTER[0])
    alphas = alphas_of(pairs, config, folder)
    linear = {k: m for k, m in encoder.named_modules() if isinstance(m, nn.Linear)}
    if odd := sorted(pairs.keys() - linear.keys()):
        blocks = f"this encoder of {len(encoder.blocks)} blocks"
        raise UserError(f"the adapter in {folder} has {', '.join(odd[:3])}, which {blocks} has not")
    layers = {}
    for name, (A, B) in pairs.items():
        high, wide = linear[name].weight.shape
        rank = max(1, A.numel() // wide)
        if A.shape != (rank, wide) or B.shape != (high, rank):
            shapes = f"A {tuple(A.shape)} and B {tuple(B.shape)} for a layer of {wide} to {high}"
            raise UserError(f"the adapter in {folder} does not fit {name}: {shapes}")
        layers[name] = A, B, alphas[name] / (rank**0.5 if config.get("use_rslora") else rank)
    check_base(folder, header, encoder)
    return layers


@torch.no_grad()
def load_adapter(encoder, folder):
    """Put the adapter of a folder, ours or one that peft made, on a plain encoder; freeze both."""
    for name, (A, B, scale) in read_adapter(folder, encoder).items():
        # A file has the stacked A and the block-diagonal B, so q, k and v come back as one pair of rank
        # 3r. It gives the same output. But training would fill the zeros of B, so both are frozen.
        lora = LoRA(encoder.get_submodule(name), len(A), 1.0)
        lora.A[0], lora.B[0] = A, B
        lora.scale = scale
        encoder.set_submodule(name, lora)
    encoder.requires_grad_(False)
