"""Write an encoder for other tools: public MAE names, timm, transformers, or an adapter merged into its encoder.

    python export.py ENCODER --to mae|timm|hf|merged [--out FILE] [--image-size PX]

Reads:  ENCODER: runs/NAME (model.safetensors, or an adapter), or a checkpoint that common/formats.py lists
Writes: beside ENCODER, mae.safetensors (names of the public MAE, decoder included), timm.safetensors (the encoder, for
        vit_small_patch16_224 and kin), hf/ (a folder for transformers), or merged.safetensors (an encoder of ours, its
        adapter in it)
"""

import argparse
from pathlib import Path

import torch

from common import formats
from common.checkpoints import ENCODER, at_size, check_exactly, decoder_shape, load_merged, save_encoder
from common.formats import as_convolution, count_blocks, is_decoder, read_checkpoint, save_weights
from common.io import UserError, cli
from kernels.gather import MEAN, STD
from model import Decoder, ViT


def check_whole(weights, facts, path):
    """The weights are those of an encoder, or of an encoder and a decoder, with nothing missing or left over."""
    decoder = {k: w for k, w in weights.items() if is_decoder(k)}
    with torch.device("meta"):
        check_exactly(ViT(**{k: facts[k] for k in ENCODER}), {k: weights[k] for k in weights.keys() - decoder}, path)
        if decoder:
            width, depth = decoder_shape(weights)
            ours = Decoder(facts["image_size"] // facts["patch_size"], facts["patch_size"], facts["dim"], width, depth)
            del ours.stats_head  # never exported
            check_exactly(ours, decoder, path)


def timm_line(facts, path):
    """How timm makes this network and fills it."""
    kin = {192: "tiny", 384: "small", 768: "base", 1024: "large"}.get(facts["dim"], "small")
    numbers = {"img_size": facts["image_size"], "patch_size": facts["patch_size"], "embed_dim": facts["dim"],
               "depth": facts["depth"], "num_heads": facts["heads"], "num_classes": 0}  # fmt: skip
    numbers["pretrained_cfg_overlay"] = {"mean": MEAN, "std": STD, "input_size": (3, *2 * [facts["image_size"]])}
    words = ", ".join(f"{k}={v}" for k, v in numbers.items())
    return f'timm.create_model("vit_{kin}_patch16_224", {words}, checkpoint_path="{path}")'


def export(source, to, out=None, image_size=None):
    """Write an encoder in the format `to` -> (what was written, a line of Python that loads it)."""
    source = Path(source)
    out = Path(out or (source if source.is_dir() else source.parent) / ("hf" if to == "hf" else f"{to}.safetensors"))
    read, written = ({f.resolve(), f.resolve() / "model.safetensors"} for f in (source, out))
    if read & written:
        raise UserError(f"--out {out} is what is read: choose another")
    if to == "merged":
        encoder, _ = load_merged(source, image_size)
        save_encoder(encoder, out, {"merged": str(source)})
        return out, f"checkpoints.load_encoder({str(out)!r})"
    weights, facts = at_size(*read_checkpoint(source), image_size, source)
    if not count_blocks(weights, "decoder_blocks"):  # SimMIM's linear head is nobody else's
        weights = {k: w for k, w in weights.items() if not is_decoder(k)}
    check_whole(weights, facts, source)
    weights = as_convolution(weights)
    if to == "hf":
        return out, formats.save_hf(weights, facts, out)
    if facts["norm_eps"] != formats.EPS:
        print(f"note: its LayerNorms have an epsilon of {facts['norm_eps']:g}, which a {to} file can't say")
    save_weights({k: w for k, w in weights.items() if to == "mae" or not is_decoder(k)}, out)
    return out, timm_line(facts, out) if to == "timm" else f"safetensors.torch.load_file({str(out)!r})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("encoder", metavar="ENCODER", help="runs/NAME, or a checkpoint file")
    add("--to", required=True, choices=["mae", "timm", "hf", "merged"], help="the format")
    add("--out", metavar="FILE", help="where to (default: beside ENCODER; a folder for hf)")
    add("--image-size", type=int, metavar="PX", help="side of a view; positions are resized to it (default: as it is)")
    args = parser.parse_args()
    out, use = export(args.encoder, args.to, args.out, args.image_size)
    print(f"wrote    {out}\nload it  {use}")


if __name__ == "__main__":
    cli(main)
