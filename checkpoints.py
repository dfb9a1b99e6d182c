"""Networks in files: public names and shapes, the configuration in the header."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from model import ViT
from plumbing import UserError, save_safetensors


def public_weights(model):
    """MAE -> {public name: tensor}: the patch embedding as a convolution (D, 3, p, p), the picture head left out."""
    weights = {name.split(".", 1)[1]: w.detach() for name, w in model.state_dict().items() if "stats_head" not in name}
    p, kernel = model.config["patch_size"], weights["patch_embed.proj.weight"]
    weights["patch_embed.proj.weight"] = kernel.view(-1, p, p, 3).permute(0, 3, 1, 2).contiguous()
    return weights


def own_weights(weights):
    """Public weights -> ours: the patch embedding's (D, 3, p, p) becomes the matrix (D, p*p*3)."""
    kernel = weights["patch_embed.proj.weight"]
    return weights | {"patch_embed.proj.weight": kernel.permute(0, 2, 3, 1).flatten(1).contiguous()}


def save_model(model, path, about):
    """Write the weights for everybody else; `about` (a plain dict: run, step, data) joins the header."""
    header = {"animask": json.dumps({"config": model.config, **about})}
    save_safetensors({k: v.cpu().contiguous() for k, v in public_weights(model).items()}, path, header)


def load_encoder(path):
    """runs/NAME, or a model.safetensors that `save_model` wrote -> the ViT in eval mode, and its image size."""
    path = Path(path)
    path = path / "model.safetensors" if path.is_dir() else path
    if not path.exists():
        raise UserError(f"no encoder at {path}: python pretrain.py --out {path.parent} makes one")
    try:
        with safe_open(path, "pt") as f:
            c = json.loads((f.metadata() or {})["animask"])["config"]
            weights = own_weights({name: f.get_tensor(name) for name in f.keys()})  # noqa: SIM118 (a file, not a dict)
    except (SafetensorError, OSError, KeyError, ValueError) as problem:
        raise UserError(
            f"{path} is not a whole AniMask model ({problem}); give a folder runs/NAME of pretrain.py"
        ) from None
    encoder = ViT(c["image_size"], c["patch_size"], c["dim"], c["depth"], c["heads"])
    load_exactly(encoder, {k: w for k, w in weights.items() if not is_decoder(k)}, path)
    return encoder.eval(), c["image_size"]


def is_decoder(name):
    return name.startswith("decoder_") or name == "mask_token"


def load_exactly(module, weights, path):
    """Load weights into module; anything missing, left over or of another shape is an error that names it."""
    own = module.state_dict()
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [f"{k} {tuple(weights[k].shape)} against {tuple(own[k].shape)}" for k in own.keys() & weights.keys()
              if weights[k].shape != own[k].shape]  # fmt: skip
    if missing or extra or shapes:
        some = [
            f"{what}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
            for what, names in (("missing", missing), ("left over", extra), ("other shape", shapes))
            if names
        ]
        raise UserError(f"{path} does not fit this model; " + "; ".join(some))  # fmt: skip
    module.load_state_dict(weights)
