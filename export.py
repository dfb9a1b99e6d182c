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

import json
import logging
import shlex
import warnings
from pathlib import Path

import torch
from torch import nn

import data
import tags
from common import detection
from common.checkpoints import (
    ENCODER,
    as_convolution,
    at_size,
    flags_of,
    load_encoder,
    load_exactly,
)
from common.classifier import decide, head_of, load_classifier, load_gallery
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
PIP, MOST = (
    "pip install -r requirements-onnx.txt",
    3 * 2**29,
)  # bytes of weights in a file: 2 GB would be too many
LIBRARY = {"hf": "transformers", "timm": "timm", "onnx": "onnx"}  # of the others pytorch
OURS = ("datasets/toon", "datasets/scenes")  # drawn by ingest/toon.py: nobody else's pictures
SHOWN = (
    "data",
    "model",
    "image_size",
    "patch_size",
    "mask",
    "ratio",
    "contrast",
    "arm",
    "method",
    "head",
    "pool",
    "boxes",
    "epochs",
    "batch_size",
    "blr",
    "lr",
    "seed",
)
KINDS = {  # by a flag that only its stage has
    "arm": "Names the character and the tags of a drawing, from the picture alone (MFDN; `tags.py`).",
    "boxes": "Says where the faces are on a page (`detect.py`).",
    "method": 'Names the character in a drawing, or says "unknown" (`finetune_lora.py`).',
    "mask": "A Vision Transformer, pre-trained by masked reconstruction (`pretrain.py`); its tokens are features of a "
    "picture and of its patches.",
}
TASKS = {
    "arm": "image-classification",
    "method": "image-classification",
    "boxes": "object-detection",
}  # of hubs
LIMITS = """It learned from pictures of faces that fill the frame, and was judged on such pictures alone. A name is a
guess, so is a tag, and a confidence is right on average at best. Who drew a picture was not asked, and is not named."""
OF_PAGES = """It learned from pages of one set, and was judged on such pages alone. Foreheads under hair, and faces
behind bubbles and other figures, are guessed. Pages of other hands need boxes of their own: `data.py PATH --detect`."""


# ---- formats --------------------------------------------------------------------------------


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


# ---- ONNX: one file that runs without torch --------------------------------------------------


class Graph(nn.Module):
    """What all three have in common: pictures of one side in, a whole view of another side for the
    encoder.
    """

    def __init__(self, encoder, packed):
        super().__init__()
        self.encoder, self.side = encoder, encoder.side * encoder.patch_size
        self.example = torch.zeros(2, packed, packed, 3, dtype=torch.uint8)

    def view(self, images):
        return data.view_images(images, *data.full_boxes(images.shape[0]), self.side)


class EncoderGraph(Graph):
    """images -> tokens (B, 1+N, D), the CLS token first."""

    outputs = ("tokens",)

    def forward(self, images):
        return (self.encoder.features(self.view(images)),)


class RecogniserGraph(Graph):
    """images -> who (B,), similarity, threshold, confidence (B,) and embedding (B, D), as
    recognize.py finds them.

    who counts the names in `about`; the character is unknown where its similarity is under its
    threshold. confidence is nan of an enrolled character.
    """

    outputs = ("who", "similarity", "threshold", "confidence", "embedding")

    def __init__(self, net, header, gallery):
        super().__init__(net.encoder, header["packed_size"])
        self.net, self.gallery = net, gallery

    def forward(self, images):
        view = self.view(images)
        both = [self.net.pooled(*self.encoder.all_patches(x)) for x in (view, view.flip(2))]
        embedding = self.net.neck(torch.stack(both).mean(0))
        who, similarity, margin, sure = decide(self.net.head(embedding), embedding, self.gallery)
        return who, similarity, similarity - margin, sure, embedding


class TaggerGraph(Graph):
    """images -> probabilities of characters (B, C), where the arm names them, and of tags (B, V)."""

    def __init__(self, net, header):
        super().__init__(net.encoder, header["packed_size"])
        self.net = net
        self.outputs = ("tags",) if net.arm == "bce" else ("characters", "tags")

    def forward(self, images):
        characters, probabilities = tags.answers(self.net, self.view(images))
        return (probabilities,) if characters is None else (characters.softmax(1), probabilities)


def graph_of(source, image_size=None):
    """A run or a checkpoint -> (Graph, about): a recogniser, a tagger, or an encoder, by what is in
    the folder.
    """
    if (Path(source) / "head.safetensors").exists():
        net, header = load_classifier(source)
        gallery = load_gallery(source)
        graph = RecogniserGraph(net, header, gallery)
        about = {"is": "recogniser", "names": gallery["names"], "learned": gallery["learned"]}
    elif tags.is_tagger(source):
        net, header = tags.load_tagger(source)
        if net.arm not in tags.NAMES_TAGS:
            raise UserError(
                f"{source} is a run of --arm {net.arm}, which names no tags; give one of --arm mfdn"
            )
        graph = TaggerGraph(net, header)
        about = {"is": "tagger", "names": header["classes"]}
        about |= {"tags": header["words"], "thresholds": header["thresholds"]}
    else:
        encoder, size = load_encoder(source, image_size)
        return EncoderGraph(encoder, size).eval(), {"is": "encoder", "side": size}
    if image_size:
        raise UserError(
            f"--image-size {image_size}: {source} is a {about['is']} and keeps the size that it learned at"
        )
    return graph.eval(), about | {
        "side": header["packed_size"],
        "crop": header["crop"],
    }


def save_onnx(graph, about, out):
    """Write what graph_of gave to out, if onnxruntime says what torch says -> a line of Python that
    loads it.
    """
    onnxruntime = library()
    if (size := sum(w.numel() * w.element_size() for w in graph.parameters())) > MOST:
        raise UserError(
            f"{size / 2**30:.1f} GB of weights are more than the {MOST / 2**30:.1f} GB of an ONNX file"
        )
    seed = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, *graph.example.shape[1:]), dtype=torch.uint8, generator=seed)
    with torch.no_grad():
        expected = graph(
            images
        )  # before it is traced: constants that kernels keep are made outside of that
    program = traced(graph)
    program.model.metadata_props["animask"] = json.dumps(about, ensure_ascii=False)
    with atomic(out) as temporary:
        program.save(str(temporary), external_data=False)
        found = onnxruntime.InferenceSession(str(temporary)).run(None, {"images": images.numpy()})
        pairs = zip(map(torch.from_numpy, found), expected, strict=True)
        if not all(torch.allclose(x, y, atol=1e-4, equal_nan=True) for x, y in pairs):
            raise UserError(
                f"onnxruntime's answers are not torch's: nothing was written; try newer ones: {PIP}"
            )
    return f"onnxruntime.InferenceSession({str(out)!r})"


def library():
    """onnxruntime, where all three that are needed are there."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as missing:
        raise UserError(f"--to onnx needs {missing.name}: {PIP}") from None
    return onnxruntime


def traced(graph):
    """The ONNX program of a graph, for any number of pictures; what the exporter says on the way is
    left out.
    """
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return torch.onnx.export(
            graph,
            (graph.example,),
            dynamo=True,
            input_names=["images"],
            verbose=False,
            output_names=list(graph.outputs),
            dynamic_shapes={"images": {0: torch.export.Dim("B")}},
        )


# ---- the card --------------------------------------------------------------------------------


def card_file(out, to):
    """README.md in a folder, as hubs read it, else the file's own name with .md."""
    return out / "README.md" if to in ("hf", "half") else out.with_suffix(".md")


def write_card(source, to, out, use):
    """Write the card of `out`, which was made from `source`; use: the line that loads it."""
    flags = flags_of_run(Path(source))
    kind = next((kind for kind in KINDS if kind in flags), None)
    ours = flags.get("data") in OURS
    head = [
        f"license: {'mit' if ours else 'other'}",
        f"library_name: {LIBRARY.get(to, 'pytorch')}",
        f"pipeline_tag: {TASKS.get(kind, 'image-feature-extraction')}",
        "tags: [masked-autoencoder, vision-transformer, anime]",
    ]
    parts = {
        "How to load it": f"    {use}",
        "What it learned from, and how": recipe(flags),
        "How good it is": figures(Path(source)),
        "Limits": "Not known here." if kind is None else OF_PAGES if kind == "boxes" else LIMITS,
        "Licence": "MIT. The pictures that it learned from were drawn by the project's own program."
        if ours
        else f"The code is MIT. The weights bear what the pictures bear that they learned from "
        f"({flags.get('data', 'not known here')}): ask before you pass them on.",
    }
    text = KINDS.get(
        kind, "A Vision Transformer from elsewhere, in another format; its own card says more."
    )
    body = "\n\n".join(f"## {title}\n\n{part}" for title, part in parts.items())
    lines = [
        "---",
        *head,
        "---",
        "",
        f"# {Path(source).name}",
        "",
        text,
        "Written by AniMask's export.py.",
        "",
        body,
    ]
    save_text("\n".join([*lines, ""]), card_file(out, to))


def flags_of_run(source):
    """The flags of pretrain.py or tags.py, of detect.py, of finetune_lora.py where it has a head;
    else {}.
    """
    head, detector = source / "head.safetensors", source / "detector.safetensors"
    if detector.exists():
        return detection.header_of(detector).get("run") or {}
    if not head.exists():
        return flags_of(source)
    header = head_of(source)
    return {k: header[k] for k in ("data", "method")} | header["config"]


def recipe(flags):
    """A table of the flags that matter."""
    rows = [f"| {k} | `{flags[k]}` |" for k in SHOWN if flags.get(k) is not None]
    return "\n".join(["| flag | value |", "|---|---|", *rows]) if rows else "Not known here."


def figures(source):
    """What was measured of it, each with its command; read from the files beside the weights."""
    folder, found = source if source.is_dir() else source.parent, []
    for name, say in READ.items():
        try:
            row = read_json(folder / name)
            found.append(f"- {say(row)}: `{row['command']}`")
        except (
            UserError,
            OSError,
            KeyError,
            TypeError,
            StopIteration,
        ):  # not measured, or not by us
            continue
    return "\n".join(found) or "Nothing was measured."


def of_probe(row):
    best = max(x["logistic"]["top1"] for name, x in row["rows"].items() if name.startswith("thumb"))
    return (
        f"frozen, with a linear classifier on {row['pool']}, Top-1 {row['headline']:.1%} on {row['split']} of "
        f"{row['data']} (thumbnails: {best:.1%})"
    )


def of_stress(row):
    psnr = next(
        r["psnr"] for r in row["reconstruction"] if (r["strategy"], r["ratio"]) == ("random", 0.75)
    )
    return f"PSNR {psnr:.1f} dB of hidden pixels, three quarters hidden at random, {row['split']} of {row['data']}"


def of_metrics(row):
    where = f"on {row['evaluated_on']} of {row['data']}"
    if "top1" in row:
        return f"Top-1 {row['top1']:.1f} %, macro-F1 {row['macro_f1']:.1f} % {where}"
    if "ap" in row:
        return f"AP {row['ap']:.1f}, AP50 {row['ap50']:.1f}, AP75 {row['ap75']:.1f} % {where}"
    best = row.get("tags_truth") or row["tags"]
    return f"Top-1 {row['end']['without_top1']:.1f} %, mAP of tags {best['map']:.1f} %, from the picture alone, {where}"


def of_pairs(row):
    pairs = row["verification"]
    return f"the same character or not, ROC-AUC {pairs['roc_auc']:.1f} %, equal error rate {pairs['eer']:.1f} %"


READ = {
    "stress.json": of_stress,
    "probe.json": of_probe,
    "metrics.json": of_metrics,
    "recognize.json": of_pairs,
}


# ---- the command ------------------------------------------------------------------------------


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
        return out, save_onnx(*graph_of(source, image_size), out)
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
