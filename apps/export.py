"""Write an encoder or a run for other tools: timm, transformers, ONNX and more.

    python -m apps.export ENCODER --to mae|timm|hf|merged|peft|onnx|half|wd [--out FILE] [--image-size PX]

Reads:  ENCODER: runs/NAME, or a checkpoint that common/formats.py lists
Writes: into the folder of ENCODER, or to --out, with a card: FILE.md, or README.md in the folder
        mae     mae.safetensors, names of the public MAE, decoder included
        timm    timm.safetensors, the encoder for timm's VisionTransformer
        hf      hf/, a folder for transformers
        merged  merged.safetensors, an encoder with its adapter in it
        peft    peft/, the adapter of a run of finetune_lora.py, as the library peft reads it
        onnx    model.onnx, which runs without torch: an encoder, a recogniser or a tagger
        wd      wd/, a tagger or a recogniser for programs that load WD taggers
        half    half/, what stages read of a run of any stage, numbers in 16 bits

    B pictures   S side of a view   D width of the embedding   C characters   V tags
"""

import json
import logging
import re
import textwrap
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
from apps import tags
from apps.adapters import adapter_tensors, load_adapter, read_config, save_adapter
from apps.recognize import open_gallery
from common import checkpoints, metrics
from common.classifier import is_recogniser, read_head
from common.door import aside, require, save_csv
from common.formats import HF, QKV, as_convolution, of_decoder, renamed
from common.locks import reserve
from common.train import (
    Parser,
    UserError,
    between,
    cli,
    read_safetensors,
    save_json,
    save_safetensors,
    save_text,
)
from finetune_lora import load_classifier, lora_layers, merge_lora
from ingest.decode import PACKED
from kernels import MEAN, STD
from model import EPS

TENSORS = ("model", "head", "detector", "patches")  # the last: stage 1 of apps/segment.py
HF_SHAPE = {"hidden_size": "dim", "num_hidden_layers": "depth", "num_attention_heads": "heads"}
HF_RATIO = 0.75  # of transformers' ViTMAE where its configuration says nothing
KEEPS_SIZE = "--image-size {}: {} keeps the size that it learned at"
PIP = 'pip install -e ".[onnx]"'
PLAIN = re.compile(  # names of weights in MAE, timm and HF
    r"cls_token|mask_token|(decoder_)?pos_embed|"
    r"((decoder_)?blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])|"
    r"(decoder_)?norm|patch_embed\.proj|decoder_embed|decoder_pred)\.(weight|bias)"
)
OUT = "{out}"  # in a line that loads what was written: the path, which the writer does not know
READ = """
# pictures as it learned them: upright, of 8 bits a colour, on white paper
from PIL import Image, ImageOps
def read(path):
    img = ImageOps.exif_transpose(Image.open(path))
    if img.mode.startswith("I"):  # grays of 16 bits
        img = img.point(lambda x: x * (1 / 257) + 0.5).convert("L")
    img = img.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", img.size, "white"), img).convert("RGB")
"""  # of a card: other libraries keep what lies under transparent pixels, and how a phone was held


# ---- weights: encoders in public formats, adapters, runs -----------------------------------------


def public_weights(source, image_size, whole=True):
    """A checkpoint -> its weights under public names, and its facts. whole: with its decoder."""
    _, config, header = checkpoints.read_network(source)
    facts = {"decoder_depth": 0, "norm_eps": EPS} | header | config
    facts["image_size"] = image_size or facts["image_size"]
    if facts["norm_eps"] != EPS:
        print(f"note: LayerNorms have the epsilon {facts['norm_eps']:g}, which --to hf alone keeps")
    if facts["decoder_depth"]:
        model, _ = checkpoints.load_mae(source, image_size)
        facts["decoder_heads"] = model.config["decoder_heads"]
        beside = checkpoints.POOLER, checkpoints.STATS_HEAD  # which no public file has
        own = {k: w for k, w in model.state_dict().items() if not k.startswith(beside)}
        weights = as_convolution({k.partition(".")[2]: w for k, w in own.items()})
    else:  # SimMIM's linear decoder is nobody else's
        weights = as_convolution(checkpoints.load_encoder(source, image_size).state_dict())
    if not whole:
        weights = {name: w for name, w in weights.items() if not of_decoder(name)}
    # Where a weight has no place, some readers leave it out, and compute something else.
    odd = [name for name in weights if not PLAIN.fullmatch(name)]
    odd += [k for k, w in weights.items() if "fc1.weight" in k and len(w) != 4 * w.shape[1]]
    if odd:
        fix = "--to timm leaves out the decoder, --to onnx keeps any"
        raise UserError(f"{source}: {', '.join(odd[:3])} is not in MAE, timm and HF; {fix}")
    return weights, facts


def resampling(size):
    """The filter that makes of a picture in one step what `data.read_view` makes of it for an encoder.

    It resizes to PACKED pixels by BICUBIC, and then to fewer by a triangle, which decides. As features of
    weights/toon have it, BILINEAR has a cosine of 0.9999 with our own reading, and BICUBIC of 0.998.
    """
    return Image.Resampling.BICUBIC if size >= PACKED else Image.Resampling.BILINEAR


def square_of(size, by):
    """For a card: what cuts out a picture's centre and resizes it, where no library does."""
    return f'np.array(ImageOps.fit(read("a.png"), ({size}, {size}), Image.Resampling.{by.name}))'


def save_mae(source, out, image_size):
    """Write the weights alone: such a file tells neither norm_pix nor a floor."""
    weights, facts = public_weights(source, image_size)
    save_safetensors(weights, out)
    size = facts["image_size"]
    return f"""safetensors.torch.load_file({OUT})
{READ}view = {square_of(size, resampling(size))} / 255
pixels = ((view - {MEAN}) / {STD}).transpose(2, 0, 1)  # (3, S, S)"""


def save_timm(source, out, image_size):
    weights, facts = public_weights(source, image_size, whole=False)
    save_safetensors(weights, out)
    size = facts["image_size"]
    pixels = {"mean": MEAN, "std": STD, "input_size": (3, size, size)}
    # The whole centre square: timm's ViTs cut off a tenth of it (crop_pct 0.9).
    pixels |= {"crop_pct": 1.0, "crop_mode": "center"}
    pixels["interpolation"] = resampling(size).name.lower()
    shape = f"img_size={size}, patch_size={facts['patch_size']}, embed_dim={facts['dim']}, "
    shape += f"depth={facts['depth']}, num_heads={facts['heads']}, num_classes=0"
    shape += f", pretrained_cfg_overlay={pixels}"
    return f"""net = timm.create_model("vit_small_patch16_224", {shape}, checkpoint_path={OUT})
{READ}transform = timm.data.create_transform(**timm.data.resolve_data_config({{}}, model=net))
pixels = transform(read("a.png"))[None]"""


def save_hf(source, folder, image_size):
    """Write a folder for ViTMAEForPreTraining (its norm_pix_loss has no floor), else for ViTModel."""
    weights, facts = public_weights(source, image_size)
    size, depth = facts["image_size"], facts["decoder_depth"]
    network = "ViTMAEForPreTraining" if depth else "ViTModel"
    config = {
        "model_type": "vit_mae" if depth else "vit",
        "architectures": [network],
        "image_size": size,
        "patch_size": facts["patch_size"],
        "layer_norm_eps": facts["norm_eps"],
    }
    for stack in ("", "decoder_") if depth else ("",):
        config |= {stack + theirs: facts[stack + ours] for theirs, ours in HF_SHAPE.items()}
        config[f"{stack}intermediate_size"] = 4 * facts[f"{stack}dim"]
    if depth:
        # transformers keeps a key that it does not know. Here, `formats.facts_beside` reads it again.
        config |= {"norm_pix_loss": facts["norm_pix"], "norm_pix_floor": facts["floor"]}
    pixels = {
        # DINOv2's, which cuts out the centre. ViT's would squash a tall picture to a square.
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,  # gray, palettes; what is transparent becomes white
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": resampling(size),
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }
    theirs = {}
    for name, w in weights.items():
        names = [name.replace("attn.qkv", part) for part in QKV] if ".qkv." in name else [name]
        for part, x in zip(names, w.chunk(len(names)), strict=True):
            hf = renamed(part, HF)
            theirs[hf if hf.startswith("decoder.") else f"vit.{hf}"] = x.clone()
    save_safetensors(theirs, folder / "model.safetensors")
    save_json(config, folder / "config.json", 2)
    save_json(pixels, folder / "preprocessor_config.json", 2)
    use = f"transformers.{network}.from_pretrained({OUT})"
    # Given a path, transformers drops what says that pixels are transparent.
    pictures = f"""{READ}processor = transformers.AutoImageProcessor.from_pretrained({OUT})
pixels = processor(read("a.png"), return_tensors="pt").pixel_values"""
    if not depth:
        return f"{use}\n{pictures}"
    patches = (size // facts["patch_size"]) ** 2
    return f"""{use}
# it hides {HF_RATIO:.0%} of the patches, in random order; features of all patches in their order:
net = transformers.ViTMAEModel.from_pretrained({OUT}, mask_ratio=0.0)
tokens = net(pixels, noise=torch.arange({patches}.0)[None]).last_hidden_state  # one picture
{pictures}"""


@torch.no_grad()
def save_merged(source, out, image_size):
    """Write the encoder of a run with LoRA, or of a folder of peft, with W + scale B A in place of W."""
    if is_recogniser(source):
        encoder = load_classifier(source)[0].encoder
    else:
        base = read_config(source).get("base_model_name_or_path")
        size = image_size or adapter_tensors(source)[1].get("image_size")
        encoder = checkpoints.load_encoder(checkpoints.place_of(base, source), size)
        load_adapter(encoder, source)
    merge_lora(encoder)
    notes = {"merged": str(source), "origin": flags_of_run(source)}
    checkpoints.save_network(encoder, out, notes, "encoder.")
    return f"common.checkpoints.load_encoder({OUT})"


def save_peft(source, folder, image_size):
    """Write the adapter of a run of finetune_lora.py for peft, whose formula is W + alpha/r B A."""
    net, header = load_classifier(source)
    factors = {f"encoder.{name}.{factor}" for name in lora_layers(net.encoder) for factor in "AB"}
    learned = {name for name in read_head(source)[0] if name.startswith("encoder.")}
    if not factors or learned != factors:
        raise UserError(f"{source} has no plain LoRA, which --to peft holds; try --to merged")
    notes = {name: header[name] for name in ("fingerprint", "image_size")}
    save_adapter(net.encoder, notes, folder, header["base"])
    return f"peft.PeftModel.from_pretrained(encoder, {OUT})"


def save_half(source, out, image_size):
    """Write what stages read of a run into the folder `out`, its numbers in 16 bits."""
    if image_size:
        raise UserError(KEEPS_SIZE.format(image_size, source))
    files = [checkpoints.file_of(source, f"{name}.safetensors") for name in TENSORS]
    there = {file.stem: file for file in files if file.exists()}
    if not there.keys() & {"model", "head", "detector"}:
        raise UserError(f"{source} is no run, and --to half takes one; --to mae takes a checkpoint")
    for file in there.values():
        tensors, header = read_safetensors(file)
        if "fingerprint" in header and (out / "model.safetensors").exists():
            encoder = checkpoints.load_encoder(out, header.get("image_size"))  # rounded by now
            header["fingerprint"] = checkpoints.fingerprint(encoder)
        half = {k: x.half() if x.is_floating_point() else x for k, x in tensors.items()}
        save_safetensors(half, out / file.name, header or None)
    if is_recogniser(source):
        # With its gallery, the copy does without the data set. A run that may only be read keeps none.
        gallery = open_gallery(source)
        for name in ("embeddings", "strangers", "held_known", "held_unknown"):
            x = getattr(gallery, name)
            setattr(gallery, name, None if x is None else x.half())
        gallery.save(out)
    return f"give {OUT} wherever a stage asks for a run"


# ---- ONNX: one file that runs without torch ------------------------------------------------------


class Graph(nn.Module):
    """images u8 (B, packed, packed, 3) -> {name: tensor}, the answer(net, views u8 (B, side, side, 3))."""

    def __init__(self, net, answer, side, packed):
        super().__init__()
        self.net, self.answer, self.side = net, answer, side
        self.example = torch.zeros(2, packed, packed, 3, dtype=torch.uint8)

    def forward(self, images):
        view = data.view_images(images, *data.full_boxes(images.shape[0]), self.side)
        return self.answer(self.net, view)


def recognise(net, view, gallery):
    """-> who (B,), a place in `names`; similarity, threshold, confidence (B,); embedding (B, D)."""
    both = [net.pooled(*net.encoder.all_patches(x)) for x in (view, view.flip(2))]
    embedding = net.neck(torch.stack(both).mean(0))
    seen = torch.cat([embedding, metrics.histograms(view)], 1) if gallery.colours else embedding
    who, similarity, margin, sure = gallery.decide(net.head(embedding), seen)
    answers = {"who": who, "similarity": similarity, "threshold": similarity - margin}
    return answers | {"confidence": sure, "embedding": embedding}


def tag(net, view):
    """-> probabilities of characters (B, C), and of tags (B, V)."""
    characters, probabilities = tags.answers(net, view)
    return {"characters": characters.softmax(1), "tags": probabilities}


def graph_of(source, image_size=None):
    """A run or a checkpoint -> (Graph, what a reader of its file has to know)."""
    if not is_recogniser(source) and not tags.is_tagger(source):
        encoder = checkpoints.load_encoder(source, image_size)
        side = encoder.image_size
        graph = Graph(encoder, lambda net, view: {"tokens": net.features(view)}, side, side)
        return graph.eval(), {"is": "encoder", "side": side}
    if image_size:
        raise UserError(KEEPS_SIZE.format(image_size, source))
    if is_recogniser(source):
        net, header = load_classifier(source)
        gallery = open_gallery(source)
        answer = partial(recognise, gallery=gallery)
        notes = {"is": "recogniser", "names": gallery.names, "learned": gallery.learned}
    else:
        net, header = tags.load_tagger(source)
        answer = tag
        if net.arm not in tags.HIDES_TAGS:
            raise UserError(f"{source} is a run of --arm {net.arm}, which names no tags")
        notes = {"is": "tagger", "names": header["classes"], "tags": header["words"]}
        notes |= {name: header[name] for name in ("thresholds", "least_confidence")}
    notes |= {"side": header["packed_size"], "crop": header["crop"]}
    return Graph(net, answer, header["image_size"], header["packed_size"]).eval(), notes


@torch.no_grad()
def write_onnx(graph, notes, out):
    """Write a graph as ONNX, if onnxruntime's answers are torch's."""
    require("onnx", "onnx", "onnxscript", "onnxruntime")
    import onnxruntime

    images = torch.randint(256, (3, *graph.example.shape[1:])).to(graph.example.dtype)
    expected = graph(images)  # before the export: kernels keep constants of their first call
    options = {"input_names": ["images"], "output_names": list(expected)}
    options["dynamic_shapes"] = {"images": {0: torch.export.Dim("B")}}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(graph, (graph.example,), verbose=False, **options)
    program.model.metadata_props["animask"] = json.dumps(notes, ensure_ascii=False)
    program.save(str(out), external_data=False)
    # If it can't run this, write x.shape[0] and not len(x) in the network: that becomes a constant.
    answers = onnxruntime.InferenceSession(str(out)).run(None, {"images": images.numpy()})
    for x, y in zip(answers, expected.values(), strict=True):
        if not torch.allclose(torch.from_numpy(x), y, atol=1e-4, equal_nan=True):
            raise UserError(f"onnxruntime's answers are not torch's; try newer ones: {PIP}")


def save_onnx(source, out, image_size=None):
    """Write a run or a checkpoint as ONNX."""
    graph, notes = graph_of(source, image_size)
    write_onnx(graph, notes, out)
    use = f"onnxruntime.InferenceSession({OUT})"
    if notes.get("crop") == "figure":
        return f"{use}  # its pictures are squares around the figure, which no library cuts"
    by = resampling(notes["side"]) if notes["is"] == "encoder" else Image.Resampling.BICUBIC
    return f"{use}\n{READ}images = {square_of(notes['side'], by)}[None]"


# ---- the contract of WD taggers: model.onnx and selected_tags.csv --------------------------------

WD_SIDE = 448  # of their pictures; some programs know no other
GENERAL, CHARACTER = 0, 4  # categories of tags, by Danbooru's numbers
RATING = 9
RATINGS = ("general", "sensitive", "questionable", "explicit")


class WDGraph(nn.Module):
    """pictures float32 (B, 448, 448, 3), 0 to 255, BGR -> {"output": probabilities (B, rows)}.

    graph: a `Graph` of a tagger or a recogniser of so many names. order: the places among the tags of
    ratings and tags, row for row; the place behind the last tag is 0 for every picture.
    """

    def __init__(self, graph, order, names):
        super().__init__()
        self.inner = graph
        self.order, self.names = order, names
        self.register_buffer("resize", pillow_matrix(WD_SIDE, graph.example.shape[1]))
        self.example = torch.zeros(2, WD_SIDE, WD_SIDE, 3)

    def forward(self, images):
        x = images.flip(3).permute(0, 3, 1, 2)  # (B, RGB, H, W)
        for _ in range(2):  # along W, then along H; Pillow rounds after each
            x = (x @ self.resize).round().clamp(0, 255).mT
        answers = self.inner(x.permute(0, 2, 3, 1).to(torch.uint8))
        if "who" in answers:
            tags, characters = x.new_zeros(x.shape[0], 0), name_alone(answers, self.names)
        else:
            tags, characters = answers["tags"], answers["characters"]
        return {"output": torch.cat([F.pad(tags, (0, 1))[:, self.order], characters], 1)}


def pillow_matrix(n_in, n_out):
    """(n_in, n_out): a line of a picture times this is Pillow's resized line, BICUBIC."""
    lines = Image.fromarray(np.eye(n_in, dtype=np.float32))
    resized = lines.resize((n_out, n_in), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized))


def name_alone(answers, characters):
    """-> (B, characters): the confidence at the name; 1 of an enrolled one, 0 of unknown pictures."""
    known = answers["similarity"] >= answers["threshold"]
    sure = torch.where(known, answers["confidence"].nan_to_num(1.0), 0.0)
    return sure[:, None] * F.one_hot(answers["who"], characters)


def save_wd(source, folder, image_size=None):
    """Write model.onnx and selected_tags.csv, its rows in the order of the probabilities."""
    graph, notes = graph_of(source, image_size)
    if notes["is"] == "encoder":
        raise UserError(f"{source} names nothing; give a run of apps/tags.py or finetune_lora.py")
    if notes.get("crop") == "figure":
        print(f"note: {source} learned from figures, and such programs give whole pictures")
    tags = notes.get("tags", [])
    names = notes["names"]
    # Readers take the first four outputs for the ratings, whatever selected_tags.csv says. Without
    # these rows, each tag would get the probability of the fourth one after it.
    places = {tag: i for i, tag in enumerate(tags)}
    general = [tag for tag in tags if tag not in RATINGS]
    order = [places.get(tag, len(tags)) for tag in (*RATINGS, *general)]
    rows = [(tag, RATING) for tag in RATINGS] + [(tag, GENERAL) for tag in general]
    rows += [(name, CHARACTER) for name in names]
    folder.mkdir()
    write_onnx(WDGraph(graph, order, len(names)).eval(), notes, folder / "model.onnx")
    columns = "tag_id", "name", "category", "count"
    lines = [dict(zip(columns, (i, *row, 0), strict=True)) for i, row in enumerate(rows)]
    save_csv(lines, folder / "selected_tags.csv", columns)
    return f"give model.onnx and selected_tags.csv in {OUT} to a program that loads WD taggers"


# ---- the card and the command --------------------------------------------------------------------

FORMATS = {  # --to: what writes it, the name of the file or folder, the library that reads it
    "mae": (save_mae, "mae.safetensors", "pytorch"),
    "timm": (save_timm, "timm.safetensors", "timm"),
    "hf": (save_hf, "hf", "transformers"),
    "merged": (save_merged, "merged.safetensors", "pytorch"),
    "peft": (save_peft, "peft", "peft"),
    "onnx": (save_onnx, "model.onnx", "onnx"),
    "wd": (save_wd, "wd", "onnx"),
    "half": (save_half, "half", "pytorch"),
}
MADE_BY = ("data", "mask", "epochs", "seed", "command")  # flags of the encoder under an adapter
OURS = {"datasets/toon", "datasets/scenes"}  # pictures that the project's own program drew
RESULTS = ("probe.json", "metrics.json", "metrics-folds.json", "recognize.json")
NUMBERS = ("headline", "top1", "without_top1", "macro_f1", "ap", "ap50", "map", "miou")
NUMBERS += ("roc_auc", "eer")  # of these files, as far as one has them


def sets_behind(source, later=()):
    """The data sets behind a run, with those of the encoders that it and they began from.

    later: the runs that began from this one; a run that comes twice was replaced by another one.
    """
    if not checkpoints.place_of(source, source).exists() or source.resolve() in later:
        return ["not known here"]
    flags = flags_of_run(source)
    sets = [flags.get("data", "not known here")]
    if before := flags.get("encoder") or flags.get("init"):
        sets += sets_behind(checkpoints.place_of(before, source), (*later, source.resolve()))
    return list(dict.fromkeys(sets))


def card_of(source, library, use):
    """The card of what was made from `source`; use: the line that loads it."""
    flags = flags_of_run(source)
    pictures = sets_behind(source)
    table = "\n".join(f"| {k} | `{value}` |" for k, value in flags.items() if value is not None)
    lines = "\n".join(measured(checkpoints.model_file(source).parent)) or "Nothing was measured."
    return f"""---
license: {"mit" if {*pictures} <= OURS else "other"}
library_name: {library}
tags: [masked-autoencoder, vision-transformer, anime]
---

# {source.name}

Written by apps/export.py of AniMask. This loads it:

{textwrap.indent(use, "    ")}

| flag of its training | value |
|---|---|
{table}

{lines}

Limits: it was judged on pictures like those that it learned from. Names, tags and boxes are guesses.
The code is MIT. The licence of its pictures ({", ".join(pictures)}) holds for the weights.
"""


def flags_of_run(source):
    """The flags of a run of any stage, {} of other files."""
    if is_recogniser(source):
        header = read_head(source)[1]
        before = checkpoints.flags_of(checkpoints.place_of(header["base"], source))
        flags = {"encoder": header["base"], **header["config"]}
        flags |= {"data": header["data"], "method": header["method"]}
        return flags | {f"{k} of its encoder": before[k] for k in MADE_BY if k in before}
    detector = checkpoints.about_model(checkpoints.file_of(source, "detector.safetensors"))
    header = detector or checkpoints.about_model(source)
    flags = header.get("run") or header.get("origin", {})
    return flags | ({"encoder": header["base"]} if "base" in header else {})


def measured(folder):
    """Yield a line for each file of results of a run: its numbers, and the command behind them."""
    for path in [folder / name for name in RESULTS if (folder / name).exists()]:
        row = json.loads(path.read_text())
        row |= row.get("verification", {}) | row.get("tags", {}) | row.get("end", {})
        row |= row.get("pixels", {}).get(row.get("evaluated_on"), {}).get("mixed", {})
        numbers = [f"{k} {row[k]:.4g}" for k in NUMBERS if isinstance(row.get(k), float)]
        if numbers:
            where = f"{row.get('evaluated_on', row.get('split'))} of {row['data']}"
            yield f"- {', '.join(numbers)}, {where}: `{row['command']}`"


def export(source, to, out=None, image_size=None):
    """Write `source` as `to`, and its card, whole or not at all -> what was written, how it is loaded."""
    source = Path(source)
    write, name, library = FORMATS[to]
    out = Path(out or (source.parent if source.is_file() else source) / name)
    card = out.parent / f"{out.stem}.md" if Path(name).suffix else out / "README.md"
    if card == out:
        raise UserError(f"--out {out} would be the card, too; choose another name")
    reserve([out, card])
    with aside(out) as made:
        use = write(source, made, image_size).replace(OUT, repr(str(out)))
        save_text(card_of(source, library, use), made.parent / card.relative_to(out.parent))
    return out, use


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("encoder", type=Path, metavar="ENCODER", help="runs/NAME, or a checkpoint file")
    add("--to", required=True, choices=list(FORMATS), help="the format")
    add("--out", metavar="FILE", help="where to (default: its folder); hf, wd, half: a folder")
    add("--image-size", type=between(8, 4096, int), metavar="PX", help="side of a view (its own)")
    args = parser.parse_args()
    out, use = export(args.encoder, args.to, args.out, args.image_size)
    print(f"wrote    {out}, and its card\nload it  {use.partition(READ)[0]}".rstrip())


if __name__ == "__main__":
    cli(main)
