"""Write an encoder or a run for other tools: public MAE names, timm, transformers, ONNX, and more.

    python export.py ENCODER --to mae|timm|hf|merged|onnx|half [--out FILE] [--image-size PX]

Reads:  ENCODER: runs/NAME (model.safetensors, or an adapter), or a checkpoint that
        common/formats.py lists; for onnx and half also a run of finetune_lora.py or tags.py, for
        half of detect.py
Writes: beside ENCODER, or to --out:
        mae     mae.safetensors, names of the public MAE, decoder included
        timm    timm.safetensors, the encoder for timm's VisionTransformer
        hf      hf/, a folder for transformers
        merged  merged.safetensors, an encoder of ours with its adapter in it
        onnx    model.onnx, an encoder, a recogniser with its gallery, or a tagger, without torch
        half    half/, what stages read of a run, numbers in 16 bits
        and a card, FILE.md or README.md in the folder: data, recipe, figures, limits, licence
"""

import contextlib
import json
import logging
import os
import shlex
import shutil
import warnings
from functools import partial
from pathlib import Path

import torch
from torch import nn

import data
import detect
import tags
from common import checkpoints
from common.classifier import read_head
from common.command import Parser, at_least, claim, cli, refuse_file, refuse_overwrite, working
from common.fields import SIDE, check_fields
from common.formats import EPS, QKV, encoder_of, hf_names, read_checkpoint
from common.io import (
    UserError,
    atomic,
    read_json,
    read_safetensors,
    save_json,
    save_safetensors,
    save_text,
)
from common.lora import fingerprint, load_merged, save_encoder
from finetune_lora import load_classifier
from kernels.gather import MEAN, STD
from model import Decoder, ViT
from recognize import decide, open_gallery

DEFAULTS = {"hf": "hf", "half": "half", "onnx": "model.onnx"}  # names; of others TO.safetensors
FOLDERS = ("hf", "half")
TENSORS = ("model", "pooler", "stats_head", "adapter_model", "head", "gallery", "detector")
BESIDE = ("adapter_config.json", "selected_tags.csv")  # of a run, copied as they are
PIP = "pip install -r requirements-onnx.txt"
OURS = ("datasets/toon", "datasets/scenes")  # drawn by the project's own program
KINDS = {  # by a flag that only its stage has: what a card says, and the task of model hubs
    "arm": ("Names the character and the tags of a drawing (`tags.py`).", "image-classification"),
    "boxes": ("Finds the faces on a page (`detect.py`).", "object-detection"),
    "method": (
        'Names the character in a drawing, or says "unknown" (`finetune_lora.py`).',
        "image-classification",
    ),
    "mask": (
        "A Vision Transformer, pre-trained by masked reconstruction (`pretrain.py`).",
        "image-feature-extraction",
    ),
}
RECIPE = (  # flags that a card shows
    "data model image_size patch_size mask ratio contrast arm method head pool boxes epochs "
    "batch_size blr lr seed"
)
FIGURES = {  # file of a run: numbers of it that a card shows, a key in a key after a point
    "probe.json": ("headline",),
    "metrics.json": (
        "top1",
        "macro_f1",
        "ap",
        "ap50",
        "end.without_top1",
        "tags.map",
        "tags_truth.map",
    ),
    "recognize.json": ("verification.roc_auc", "verification.eer"),
}
LIMITS = """It learned from pictures of one set, and was judged on pictures of that set alone. Faces
filled the frame there; a detector saw whole pages. Names, tags and boxes are guesses."""


# ---- encoders in public formats ------------------------------------------------------------------


def save_public(source, to, out, image_size):
    """Write a checkpoint's weights as mae, timm or hf -> a line of Python that loads them."""
    weights, facts = checkpoints.at_size(*read_checkpoint(source), image_size, source)
    if not facts["decoder_depth"]:  # SimMIM's linear head is nobody else's
        weights = encoder_of(weights)
    check_whole(weights, facts, source)
    weights = checkpoints.as_convolution(encoder_of(weights) if to == "timm" else weights)
    if to == "hf":
        return save_hf(weights, facts, out)
    if facts["norm_eps"] != EPS:
        print(f"note: the epsilon of its LayerNorms is {facts['norm_eps']:g}; a {to} file lacks it")
    save_safetensors(weights, out)
    return timm_line(facts, out) if to == "timm" else f"safetensors.torch.load_file({str(out)!r})"


def check_whole(weights, facts, path):
    """The weights are an encoder, or an encoder and a decoder, with nothing missing or left over."""
    encoder, side = encoder_of(weights), facts["image_size"] // facts["patch_size"]
    with torch.device("meta"):
        net = ViT(**{k: facts[k] for k in checkpoints.ENCODER})
        checkpoints.load_exactly(net, encoder, path, assign=True)
        decoder = {k: weights[k] for k in weights.keys() - encoder}
        if decoder:
            names = ("patch_size", "dim", "decoder_dim", "decoder_depth")
            net = Decoder(side, *(facts[k] for k in names))
            del net.stats_head  # never exported
            checkpoints.load_exactly(net, decoder, path, assign=True)


def save_hf(weights, facts, folder):
    """Write a folder for ViTMAEForPreTraining, or for ViTModel where there is no decoder.

    weights: ours, with a convolution. Its norm_pix_loss has no floor under a patch's standard
    deviation, ours has (kernels/loss.py): the loss differs by that.
    """
    size, depth = facts["image_size"], facts["decoder_depth"]
    network = "ViTMAEForPreTraining" if depth else "ViTModel"
    config = {
        "model_type": "vit_mae" if depth else "vit",
        "architectures": [network],
        "image_size": size,
        "patch_size": facts["patch_size"],
        "hidden_size": facts["dim"],
        "intermediate_size": 4 * facts["dim"],
        "num_hidden_layers": facts["depth"],
        "num_attention_heads": facts["heads"],
        "num_channels": 3,
        "hidden_act": "gelu",
        "layer_norm_eps": facts["norm_eps"],
        "qkv_bias": True,
    }
    if depth:
        config |= {
            "decoder_hidden_size": facts["decoder_dim"],
            "decoder_intermediate_size": 4 * facts["decoder_dim"],
            "decoder_num_hidden_layers": depth,
            "decoder_num_attention_heads": facts["decoder_heads"],
            "mask_ratio": 0.75,
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
        apart = ".attn.qkv." in name  # q, k and v are three layers there
        names = [name.replace("attn.qkv", part) for part in QKV] if apart else [name]
        renamed |= {table[n]: x.clone() for n, x in zip(names, w.chunk(len(names)), strict=True)}
    save_safetensors(renamed, folder / "model.safetensors")
    save_json(config, folder / "config.json", 2)
    save_json(pixels, folder / "preprocessor_config.json", 2)
    return f"transformers.{network}.from_pretrained({str(folder)!r})"


def timm_line(facts, path):
    """How timm makes this network and loads it."""
    size = facts["image_size"]
    pixels = {"mean": MEAN, "std": STD, "input_size": (3, size, size)}
    return (
        f'timm.create_model("vit_small_patch16_224", img_size={size}, '
        f"patch_size={facts['patch_size']}, embed_dim={facts['dim']}, depth={facts['depth']}, "
        f"num_heads={facts['heads']}, num_classes=0, pretrained_cfg_overlay={pixels}, "
        f'checkpoint_path="{path}")'
    )


# ---- runs of ours --------------------------------------------------------------------------------


def save_merged(source, out, image_size):
    """Write an encoder with its adapter in it."""
    encoder, _ = load_merged(source, image_size)
    save_encoder(encoder, out, {"merged": str(source)})
    return f"common.checkpoints.load_encoder({str(out)!r})"


def save_half(source, out):
    """Write what stages read of a run into the folder `out`, its numbers in 16 bits."""
    if (source / "head.safetensors").exists():
        open_gallery(source)  # the copy does without the data set
    files = [source / f"{name}.safetensors" for name in TENSORS]
    files = [file for file in files if file.exists()]
    if not {"model", "head", "detector"} & {file.stem for file in files}:
        raise UserError(
            f"{source} is no run, and --to half takes one; --to mae writes a file of any checkpoint"
        )
    for file in files:
        tensors, header = read_safetensors(file)
        check_fields(header, {"image_size?": SIDE}, file, "make the run again")
        if "fingerprint" in header and (out / "model.safetensors").exists():
            encoder, _ = checkpoints.load_encoder(out, header.get("image_size"))  # rounded by now
            header["fingerprint"] = fingerprint(encoder)
        half = {k: x.half() if x.is_floating_point() else x for k, x in tensors.items()}
        save_safetensors(half, out / file.name, header or None)
    for name in BESIDE:
        if (source / name).exists():
            save_text((source / name).read_text(), out / name)
    return f"give {out} wherever a stage asks for a run"


# ---- ONNX: one file that runs without torch ------------------------------------------------------


class Graph(nn.Module):
    """images u8 (B, packed, packed, 3), squares as data.py packs them -> the tensors of `answer`.

    answer(net, view): a function of whole views u8 (B, S, S, 3); outputs: names of its tensors.
    """

    def __init__(self, net, answer, outputs, side, packed):
        super().__init__()
        self.net, self.answer, self.outputs, self.side = net, answer, outputs, side
        self.example = torch.zeros(2, packed, packed, 3, dtype=torch.uint8)

    def forward(self, images):
        view = data.view_images(images, *data.full_boxes(images.shape[0]), self.side)
        return self.answer(self.net, view)


def encode(encoder, view):
    """-> tokens (B, 1+N, D), the CLS token first."""
    return (encoder.features(view),)


def recognise(net, view, gallery):
    """-> who (B,), similarity, threshold, confidence (B,) and embedding (B, D), as recognize.py.

    who counts the names in the file. The character is unknown where its similarity is under its
    threshold. confidence is nan of an enrolled character.
    """
    both = [net.pooled(*net.encoder.all_patches(x)) for x in (view, view.flip(2))]
    embedding = net.neck(torch.stack(both).mean(0))
    who, similarity, margin, sure = decide(net.head(embedding), embedding, gallery)
    return who, similarity, similarity - margin, sure, embedding


def tag(net, view):
    """-> probabilities of characters (B, C), where the arm names them, and of tags (B, V)."""
    characters, probabilities = tags.answers(net, view)
    found = () if characters is None else (characters.softmax(1),)
    return (*found, probabilities)


def graph_of(source, image_size=None):
    """A run or a checkpoint -> (Graph, what a reader of its file has to know)."""
    recogniser = (Path(source) / "head.safetensors").exists()
    if not recogniser and not tags.is_tagger(source):
        encoder, size = checkpoints.load_encoder(source, image_size)
        graph = Graph(encoder, encode, ("tokens",), size, size)
        return graph.eval(), {"is": "encoder", "side": size}
    if image_size:
        raise UserError(f"--image-size {image_size}: {source} keeps the size that it learned at")
    if recogniser:
        net, header = load_classifier(source)
        gallery = open_gallery(source)
        answer = partial(recognise, gallery=gallery)
        outputs = ("who", "similarity", "threshold", "confidence", "embedding")
        about = {"is": "recogniser", "names": gallery["names"], "learned": gallery["learned"]}
    else:
        net, header = tags.load_tagger(source)
        if net.arm not in tags.NAMES_TAGS:
            raise UserError(f"{source} is a run of --arm {net.arm}, which names no tags")
        answer = tag
        outputs = ("tags",) if net.arm == "bce" else ("characters", "tags")
        about = {"is": "tagger", "names": header["classes"]}
        about |= {"tags": header["words"], "thresholds": header["thresholds"]}
    about |= {"side": header["packed_size"], "crop": header["crop"]}
    graph = Graph(net, answer, outputs, header["image_size"], header["packed_size"])
    return graph.eval(), about


def save_onnx(graph, about, out):
    """Write what graph_of gave, if onnxruntime's answers are torch's -> how it is loaded."""
    onnxruntime = library()
    seed = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, *graph.example.shape[1:]), dtype=torch.uint8, generator=seed)
    with torch.no_grad():
        expected = graph(images)  # before tracing: constants that kernels keep are made here
    program = traced(graph)
    program.model.metadata_props["animask"] = json.dumps(about, ensure_ascii=False)
    with atomic(out) as temporary:
        program.save(str(temporary), external_data=False)
        session = onnxruntime.InferenceSession(str(temporary))
        found = map(torch.from_numpy, session.run(None, {"images": images.numpy()}))
        for x, y in zip(found, expected, strict=True):
            if not torch.allclose(x, y, atol=1e-4, equal_nan=True):
                raise UserError(f"onnxruntime's answers are not torch's; try newer ones: {PIP}")
    return f"onnxruntime.InferenceSession({str(out)!r})"


def library():
    """onnxruntime, where all three packages that are needed are there."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as missing:
        raise UserError(f"--to onnx needs {missing.name}: {PIP}") from None
    return onnxruntime


def traced(graph):
    """The ONNX program of a graph, for any number of pictures, without the exporter's notes."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return torch.onnx.export(
            graph,
            (graph.example,),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=list(graph.outputs),
            dynamic_shapes={"images": {0: torch.export.Dim("B")}},
        )


# ---- the card ------------------------------------------------------------------------------------


def card_file(out, to):
    """README.md in a folder, as model hubs read it, else the file's own name with .md."""
    return out / "README.md" if to in FOLDERS else out.with_suffix(".md")


def write_card(source, to, path, use):
    """Write the card of what was made from `source`; use: the line that loads it."""
    flags = flags_of_run(source)
    elsewhere = ("A Vision Transformer from elsewhere.", "image-feature-extraction")
    kind = next((kind for kind in KINDS if kind in flags), None)
    text, task = KINDS.get(kind, elsewhere)
    ours = flags.get("data") in OURS
    licence = "MIT. The project's own program drew the pictures that it learned from."
    if not ours:
        where = flags.get("data", "not known here")
        licence = f"The code is MIT. The licence of its pictures ({where}) holds for the weights."
    library = to if to in ("timm", "onnx") else "transformers" if to == "hf" else "pytorch"
    recipe = [f"| {k} | `{flags[k]}` |" for k in RECIPE.split() if flags.get(k) is not None]
    parts = {
        "How to load it": f"    {use}",
        "What it learned from, and how": "\n".join(["| flag | value |", "|---|---|", *recipe]),
        "How good it is": "\n".join(figures(source)) or "Nothing was measured.",
        "Limits": LIMITS if kind else "Not known here.",
        "Licence": licence,
    }
    head = [
        f"license: {'mit' if ours else 'other'}",
        f"library_name: {library}",
        f"pipeline_tag: {task}",
        "tags: [masked-autoencoder, vision-transformer, anime]",
    ]
    body = [f"## {title}\n\n{part}\n" for title, part in parts.items()]
    lines = ["---", *head, "---\n", f"# {source.name}\n", f"{text} Written by export.py.\n", *body]
    save_text("\n".join(lines), path)


def flags_of_run(source):
    """The flags of a run of any stage, {} of other files."""
    head, detector = source / "head.safetensors", source / "detector.safetensors"
    if detector.exists():
        return detect.load(source)[1].get("run") or {}
    if not head.exists():
        return checkpoints.flags_of(source)
    header = read_head(source)[1]
    return {k: header[k] for k in ("data", "method")} | header["config"]


def figures(source):
    """Lines with the numbers that were measured, each with its command, from the files of a run."""
    folder, lines = source if source.is_dir() else source.parent, []
    for name, keys in FIGURES.items():
        try:
            row = read_json(folder / name, ["command"])
        except UserError:  # not measured, or not by us
            continue
        found = []
        for key in keys:
            value = row
            for part in key.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            if isinstance(value, float):
                found.append(f"{key} {value:.4g}")
        split = row.get("evaluated_on", row.get("split", "val"))
        lines.append(f"- {', '.join(found)}, {split} of {row.get('data')}: `{row['command']}`")
    return lines


# ---- the command ---------------------------------------------------------------------------------


def target(source, to, out=None):
    """-> where an export goes, and what must not be there yet."""
    name = DEFAULTS.get(to, f"{to}.safetensors")
    out = Path(out or (source if source.is_dir() else source.parent) / name)
    if out.resolve() in (source.resolve(), checkpoints.model_file(source).resolve()):
        raise UserError(f"--out {out} is what is read: choose another")
    if out.is_dir() and to not in FOLDERS:
        raise UserError(f"--out {out} is a folder, and --to {to} writes a file; give {out}/{name}")
    refuse_file(out.parent)
    return out, [out] if to in FOLDERS else [out, card_file(out, to)]


@contextlib.contextmanager
def whole(out, to):
    """with whole(out, to) as path: what is written there is `out` at the end; a folder by rename."""
    if to not in FOLDERS:
        yield out
        return
    folder = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(folder, ignore_errors=True)  # of an export that was killed
    folder.mkdir(parents=True)
    try:
        yield folder
        os.rename(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def export(source, to, out=None, image_size=None):
    """Write `source` in the format `to`, and its card -> what was written, how it is loaded."""
    source = Path(source)
    out, files = target(source, to, out)
    refuse_overwrite(files)
    if to == "onnx":
        library()  # what is missing is said before anything is loaded
    with whole(out, to) as path:
        if to == "half":
            use = save_half(source, path)
        elif to == "onnx":
            use = save_onnx(*graph_of(source, image_size), path)
        elif to == "merged":
            use = save_merged(source, path, image_size)
        else:
            use = save_public(source, to, path, image_size)
        use = use.replace(str(path), str(out))
        write_card(source, to, card_file(path, to), use)
    return out, use


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("encoder", type=Path, metavar="ENCODER", help="runs/NAME, or a checkpoint file")
    formats = ["mae", "timm", "hf", "merged", "onnx", "half"]
    add("--to", required=True, choices=formats, help="the format")
    add("--out", metavar="FILE", help="where to (default: beside ENCODER); hf, half: a folder")
    add("--image-size", type=at_least(1), metavar="PX", help="side of a view (default: as it is)")
    args = parser.parse_args()
    claim(target(args.encoder, args.to, args.out)[1])
    with working("exporting"):
        out, use = export(args.encoder, args.to, args.out, args.image_size)
    print(f"wrote    {out}, {card_file(out, args.to).name}\nload it  {use}")
    if args.to == "merged":
        print(f"next: python probe.py {shlex.quote(str(out))} --data DIR")


if __name__ == "__main__":
    cli(main)
