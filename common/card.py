"""The card beside exported weights: what they learned from, how, how good they are, how they are loaded.

It has the layout that model hubs read: a head of `key: value` lines, then text.
"""

from pathlib import Path

from common.checkpoints import flags_of
from common.classifier import head_of
from common.io import UserError, read_header, read_json, save_text

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
        return read_header(detector)[1].get("run") or {}
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
