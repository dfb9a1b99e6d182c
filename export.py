"""Write an encoder for other tools: public MAE names, timm, transformers, ONNX, an adapter merged, a run at half size.

    python export.py ENCODER --to mae|timm|hf|merged|onnx|half [--out FILE] [--image-size PX]

Reads:  ENCODER: runs/NAME (model.safetensors, or an adapter), or a checkpoint that
        common/formats.py lists; for onnx and half also a run of finetune_lora.py with its head and
        gallery, or of tags.py; for half of detect.py
Writes: beside ENCODER, mae.safetensors (names of the public MAE, decoder included),
timm.safetensors (the encoder, for
        vit_small_patch16_224 and kin), hf/ (a folder for transformers), merged.safetensors (an
        encoder of ours, its
        adapter in it), model.onnx (an encoder, a recogniser with its gallery, a tagger: pictures
        in, answers out), or
        half/ (what stages read of a run, numbers in 16 bits); beside it a card, FILE.md or
        README.md in the folder:
        data, recipe, figures, limits, licence
"""

if __name__ == "__main__":
    from common.command import starting

    starting()  # torch takes two seconds to load

import shlex
from pathlib import Path

import torch

from common.card import card_file, write_card
from common.checkpoints import ENCODER, as_convolution, at_size, load_encoder, load_exactly
from common.command import Parser, at_least, claim, cli, refuse_file, refuse_overwrite, working
from common.fields import SIDE, check_fields
from common.formats import EPS, QKV, encoder_of, hf_names, read_checkpoint
from common.graphs import graph_of, library, save_onnx
from common.io import UserError, read_safetensors, save_json, save_safetensors, save_text
from common.lora import fingerprint, load_merged, save_encoder
from finetune_lora import load_classifier
from kernels.gather import MEAN, STD
from model import Decoder, ViT

HF_FILES = (
    "model.safetensors",
    "config.json",
    "preprocessor_config.json",
)  # that transformers reads
TENSORS = (
    "model",
    "pooler",
    "stats_head",
    "adapter_model",
    "head",
    "gallery",
    "detector",
)  # that stages read
BESIDE = ("adapter_config.json", "selected_tags.csv")


def check_whole(weights, facts, path):
    """The weights are those of an encoder, or of an encoder and a decoder, with nothing missing or
    left over.
    """
    encoder, side = encoder_of(weights), facts["image_size"] // facts["patch_size"]
    with torch.device("meta"):
        load_exactly(ViT(**{k: facts[k] for k in ENCODER}), encoder, path, assign=True)
        if decoder := {k: weights[k] for k in weights.keys() - encoder}:
            ours = Decoder(
                side, *(facts[k] for k in ("patch_size", "dim", "decoder_dim", "decoder_depth"))
            )
            del ours.stats_head  # never exported
            load_exactly(ours, decoder, path, assign=True)


def save_hf(weights, facts, folder):
    """Write a folder for ViTMAEForPreTraining, or for ViTModel where there is no decoder -> how to
    load it.

    weights: ours, with a convolution. Its norm_pix_loss has no floor under a patch's std, ours has
    (kernels/loss.py): the loss differs by that.
    """
    size, dim, width, depth = (
        facts[k] for k in ("image_size", "dim", "decoder_dim", "decoder_depth")
    )
    network = "ViTMAEForPreTraining" if depth else "ViTModel"
    config = {
        "model_type": "vit_mae" if depth else "vit",
        "hidden_size": dim,
        "architectures": [network],
        "patch_size": facts["patch_size"],
        "image_size": size,
        "num_channels": 3,
        "num_hidden_layers": facts["depth"],
        "num_attention_heads": facts["heads"],
        "intermediate_size": 4 * dim,
        "hidden_act": "gelu",
        "layer_norm_eps": facts["norm_eps"],
        "qkv_bias": True,
    }
    if depth:
        config |= {
            "decoder_hidden_size": width,
            "decoder_num_hidden_layers": depth,
            "mask_ratio": 0.75,
            "decoder_num_attention_heads": facts["decoder_heads"],
            "decoder_intermediate_size": 4 * width,
            "norm_pix_loss": facts.get("norm_pix", False),
        }
    pixels = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }
    table, renamed = hf_names(facts["depth"], depth), {}
    for name, w in weights.items():
        names = (
            [name.replace("attn.qkv", matrix) for matrix in QKV] if ".attn.qkv." in name else [name]
        )
        renamed |= {table[n]: x.clone() for n, x in zip(names, w.chunk(len(names)), strict=True)}
    save_safetensors(renamed, folder / "model.safetensors")
    save_json(config, folder / "config.json", 2)
    save_json(pixels, folder / "preprocessor_config.json", 2)
    return f"transformers.{network}.from_pretrained({str(folder)!r})"


def timm_line(facts, path):
    """How timm makes this network and fills it."""
    size, kin = (
        facts["image_size"],
        {192: "tiny", 768: "base", 1024: "large"}.get(facts["dim"], "small"),
    )
    pixels = {"mean": MEAN, "std": STD, "input_size": (3, size, size)}
    return (
        f'timm.create_model("vit_{kin}_patch16_224", img_size={size}, patch_size={facts["patch_size"]}, '
        f"embed_dim={facts['dim']}, depth={facts['depth']}, num_heads={facts['heads']}, num_classes=0, "
        f'pretrained_cfg_overlay={pixels}, checkpoint_path="{path}")'
    )


def save_half(source, out):
    """What stages read of a run, into the folder `out`, its numbers in 16 bits -> how it is used."""
    for name in [
        f"{name}.safetensors" for name in TENSORS if (source / f"{name}.safetensors").exists()
    ]:
        tensors, header = read_safetensors(source / name)
        check_fields(header, {"image_size?": SIDE}, source / name, "make the run again")
        if (
            "fingerprint" in header and (out / "model.safetensors").exists()
        ):  # a whole network, rounded by now
            header["fingerprint"] = fingerprint(load_encoder(out, header.get("image_size"))[0])
        half = {k: x.half() if x.is_floating_point() else x for k, x in tensors.items()}
        save_safetensors(half, out / name, header or None)
    for name in [name for name in BESIDE if (source / name).exists()]:
        save_text((source / name).read_text(), out / name)
    return f"give {out} wherever a stage asks for a run"


def target(source, to, out=None):
    """-> where an export goes, and every file that it writes."""
    source = Path(source)
    name = {"hf": "hf", "half": "half", "onnx": "model.onnx"}.get(to, f"{to}.safetensors")
    out = Path(out or (source if source.is_dir() else source.parent) / name)
    read, written = ({f.resolve(), f.resolve() / "model.safetensors"} for f in (source, out))
    if read & written:
        raise UserError(f"--out {out} is what is read: choose another")
    names = {"hf": HF_FILES, "half": (*(f"{name}.safetensors" for name in TENSORS), *BESIDE)}
    files = [out / name for name in names[to]] if to in names else [out]
    refuse_file(files[0].parent)
    if to not in names and out.is_dir():
        raise UserError(
            f"--out {out} is a folder, and --to {to} writes a file; give --out {out}/{name}"
        )
    return out, [*files, card_file(out, to)]


def export(source, to, out=None, image_size=None):
    """Write an encoder in the format `to` -> (what was written, a line of Python that loads it)."""
    source, (out, files) = Path(source), target(source, to, out)
    refuse_overwrite(files)
    if to == "half":
        if not any(
            (source / f"{name}.safetensors").exists() for name in ("model", "head", "detector")
        ):
            raise UserError(
                f"{source} is no run, and --to half takes one; --to mae writes a file of any checkpoint"
            )
        return out, save_half(source, out)
    if to == "onnx":
        library()  # what is missing is said before anything is loaded
        return out, save_onnx(*graph_of(source, load_classifier, image_size), out)
    if to == "merged":
        encoder, _ = load_merged(source, image_size)
        save_encoder(encoder, out, {"merged": str(source)})
        return out, f"common.checkpoints.load_encoder({str(out)!r})"
    weights, facts = at_size(*read_checkpoint(source), image_size, source)
    if not facts["decoder_depth"]:  # SimMIM's linear head is nobody else's
        weights = encoder_of(weights)
    check_whole(weights, facts, source)
    weights = as_convolution(encoder_of(weights) if to == "timm" else weights)
    if to == "hf":
        return out, save_hf(weights, facts, out)
    if facts["norm_eps"] != EPS:
        print(
            f"note: its LayerNorms have an epsilon of {facts['norm_eps']:g}, which a {to} file can't say"
        )
    save_safetensors(weights, out)
    return out, timm_line(
        facts, out
    ) if to == "timm" else f"safetensors.torch.load_file({str(out)!r})"


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("encoder", metavar="ENCODER", help="runs/NAME, or a checkpoint file")
    add(
        "--to",
        required=True,
        choices=["mae", "timm", "hf", "merged", "onnx", "half"],
        help="the format",
    )
    add(
        "--out", metavar="FILE", help="where to (default: beside ENCODER; a folder for hf and half)"
    )
    add(
        "--image-size",
        type=at_least(1),
        metavar="PX",
        help="side of a view; positions are resized to it (default: as it is)",
    )
    args = parser.parse_args()
    claim(target(args.encoder, args.to, args.out)[1])
    with working("exporting"):
        out, use = export(args.encoder, args.to, args.out, args.image_size)
        write_card(args.encoder, args.to, out, use)
    print(f"wrote    {out}, {card_file(out, args.to).name}\nload it  {use}")
    if args.to == "merged":
        print(f"next: python probe.py {shlex.quote(str(out))} --data DIR")


if __name__ == "__main__":
    cli(main)
