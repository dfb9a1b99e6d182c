"""Files of LoRA adapters, as the `peft` library reads and writes them; files of encoders.

An adapter is adapter_model.safetensors and adapter_config.json. It belongs to the one encoder that
it was trained on, which a fingerprint names. The method itself is in finetune_lora.py. If it is
changed there, so that it is no plain LoRA any more, its files hold what was trained under the names
that it has there, and peft refuses them.
"""

import hashlib
import re
from pathlib import Path

from torch import nn

from common.checkpoints import as_convolution, epsilon_of, of_fixed_picture
from common.fields import (
    BOUNDS,
    SIDE,
    TEXT,
    check_fields,
    check_finite,
    number,
    one_of,
    short,
    whole,
)
from common.io import UserError, read_json, read_safetensors, save_json, save_safetensors

ADAPTER = "adapter_model.safetensors", "adapter_config.json"
TENSOR = "base_model.model.{}.lora_{}.weight"  # peft's name for a layer's A or B
ALPHA = number(1e-6)
OWN = "ANIMASK"  # in place of LORA, in adapter_config.json of an adapter that peft can't read
CONFIG = {  # fields of adapter_config.json: plain LoRA of an unchanged encoder
    "peft_type": one_of("LORA"),
    "base_model_name_or_path?": TEXT,
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
NOTES = {"fingerprint": TEXT, "image_size": SIDE}  # our header of the tensors
REMEDY = "python finetune_lora.py ENCODER --method lora makes one"
PLAIN = (
    "only a plain LoRA fits here; peft's "
    "save_pretrained(NEW, path_initial_model_for_weight_conversion=UNTRAINED) makes one"
)


def save_encoder(encoder, path, notes):
    """Write an encoder without a decoder; `notes` join the header."""
    config = encoder.config | {"norm_eps": epsilon_of(encoder)}
    notes = {"config": config, "fixed_picture": of_fixed_picture(encoder), **notes}
    save_safetensors(as_convolution(encoder.state_dict()), path, notes)


def fingerprint(encoder):
    """12 hex digits of the weights of an encoder that has no adapter."""
    digest = hashlib.sha256()
    for name, weight in sorted(encoder.state_dict().items()):
        # Positions are resized with the picture: at another image size it is still the same encoder.
        # Where they learn, all other weights do, too, and tell two encoders apart.
        if name != "pos_embed":
            digest.update(name.encode() + weight.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def save_adapter(layers, notes, folder, base):
    """Write {layer: (A (r, in), B (out, r), scale)}; `base` is the file or run of the encoder.

    Layers have the same names, ranks and scales in every block. peft has one rank and one alpha;
    those of other layers are patterns. notes: "fingerprint" and "image_size" of the encoder.
    """
    tensors = {}
    ranks, alphas = {}, {}
    for name, (A, B, scale) in layers.items():
        tensors |= {TENSOR.format(name, "A"): A, TENSOR.format(name, "B"): B}
        layer = re.sub(r"^blocks\.\d+\.", "", name)
        ranks[layer] = len(A)
        alphas[layer] = scale * len(A)
    least = min(ranks, key=ranks.get)
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base)}
    config |= {"target_modules": sorted(ranks), "r": ranks[least]}
    config["rank_pattern"] = {k: v for k, v in ranks.items() if v != ranks[least]}
    config["lora_alpha"] = alphas[least]
    config["alpha_pattern"] = {k: v for k, v in alphas.items() if v != alphas[least]}
    save_safetensors(tensors, Path(folder) / ADAPTER[0], notes)
    save_json(config, Path(folder) / ADAPTER[1], 2)


def save_own_adapter(tensors, keys, notes, folder, base):
    """Write an adapter that is no plain LoRA: {name in the encoder: tensor}, and keys of --method."""
    config = {"peft_type": OWN, "base_model_name_or_path": str(base), "keys": keys}
    save_safetensors(tensors, Path(folder) / ADAPTER[0], notes)
    save_json(config, Path(folder) / ADAPTER[1], 2)


def read_config(folder):
    """-> adapter_config.json of a folder, a dict. Other kinds of LoRA than plain ones and ours are refused."""
    path, about = (Path(folder) / name for name in ADAPTER)
    if not path.exists() or not about.exists():
        raise UserError(f"{folder} has no adapter: that is {' and '.join(ADAPTER)}")
    config = read_json(about, fix=REMEDY)
    keys = {"r?": whole(*BOUNDS["r"]), "alpha?": number(*BOUNDS["alpha"])}
    own = {"peft_type": one_of(OWN), "base_model_name_or_path": TEXT, "keys": keys}
    check_fields(config, own if config.get("peft_type") == OWN else CONFIG, about, PLAIN)
    return config


def adapter_tensors(folder):
    """-> the tensors of an adapter, {name: tensor fp32}, and our header or {}."""
    path = Path(folder) / ADAPTER[0]
    tensors, header = read_safetensors(path, REMEDY)
    check_fields(header, NOTES if header else {}, path, REMEDY)
    check_finite(tensors, path)
    return {name: w.float() for name, w in tensors.items()}, header


def check_base(folder, header, encoder):
    """A UserError if the adapter of a folder was trained on another encoder."""
    if header and header["fingerprint"] != fingerprint(encoder):
        base = read_config(folder).get("base_model_name_or_path")
        its = short(header["fingerprint"])
        ours = f"this encoder's is {fingerprint(encoder)}"
        raise UserError(f"the adapter in {folder} is for {base}, fingerprint {its}; {ours}")


def read_own_adapter(folder, encoder):
    """What `save_own_adapter` wrote for this encoder -> tensors, keys; None for a plain LoRA."""
    config = read_config(folder)
    if config["peft_type"] != OWN:
        return None
    tensors, header = adapter_tensors(folder)
    check_base(folder, header, encoder)
    return tensors, config["keys"]


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
