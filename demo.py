"""Stage 9: everything in a web page. Masks as a slider moves, names, tags, drawn or photographed, two runs, curves.

    pip install -r requirements-demo.txt && python demo.py [runs/NAME]

Reads:  a run of pretrain.py (default: the newest in runs/, else in weights/), and what was made of
        it: runs/NAME-lora, -tags, -seg, -det
Writes: gallery.safetensors of the recogniser, where somebody is enrolled or forgotten

The page is this machine's alone unless --host or --share opens it. Requests that another site's
page sends are refused. A picture that somebody drops is read as every stage reads it
(ingest/decode.py), in memory; nothing that a visitor sends names a file, and nothing starts a
command.
"""

if __name__ == "__main__":
    from common.command import starting

    starting()  # torch takes two seconds to load

import base64
import functools
import inspect
import io
import ipaddress
import os
import re
import shlex
import socket
import threading
from html import escape
from pathlib import Path
from types import SimpleNamespace
from unittest import mock
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image

import data
import maps
import mask as masking
import recognize
import segment
import tags
from common import classifier, detection, guidance, metrics, plots, segmenting
from common.checkpoints import about_model, load_teacher
from common.command import Parser, between, cli
from common.evaluate import hide, predict
from common.features import load_mae
from common.io import UserError, read_json
from common.train import autocast_of, pick_device, pick_dtype, seeded, set_malloc
from ingest import toon
from ingest.decode import decode, on_paper, open_image, reason
from ingest.scenes import outlined
from kernels.loss import FLOOR, patch_detail
from model import put_patches, to_pixels

FIRST_RUN = "runs/toon-nano-attn_high-0.75-s0"  # what README's first command makes on a CPU
DRAWN = 256  # side of a picture that the page draws itself
MOST_MB, MOST_MEGAPIXELS = 32, 25  # of a file that somebody drops
# What the page's own script posts to. By gradio's other posts anybody could call a function of the
# page by its name, or start ffmpeg.
POSTS = [f"/gradio_api/{name}" for name in ("queue/join", "upload", "cancel", "reset")]
# No function has a name for programs. One runs at a time, so that one picture is decoded at a time.
EVENT = {"api_visibility": "private", "concurrency_id": "page"}
LOCK = threading.Lock()  # of the gallery: two visitors may enrol at once
CSS = """
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); gap: 12px }
.figures figure { margin: 0 } .figures img { width: 100%; image-rendering: pixelated; border-radius: 6px }
.figures.wide { grid-template-columns: repeat(auto-fit, minmax(min(480px, 100%), 1fr)) }
.wide figure { max-width: 640px } .wide img { image-rendering: auto }
.bars { display: grid; grid-template-columns: max-content minmax(80px, 320px) max-content; gap: 4px 12px }
.bars div { background: var(--border-color-primary); border-radius: 4px; overflow: hidden }
.bars i { display: block; height: 100%; background: #0072B2 }
.table { overflow-x: auto } .table td { padding: 2px 12px }
"""


def parse_args():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "run",
        nargs="?",
        metavar="runs/NAME",
        help="of pretrain.py, or of what was made of it (default: the newest)",
    )
    add("--port", type=between(1, 65535, int), help="default: the first free one from 7860 on")
    add(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="0.0.0.0 opens the page to the network (default: to this machine alone)",
    )
    add("--share", action="store_true", help="a public address for three days, by gradio's server")
    add("--open", action="store_true", help="open the browser")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--dtype", default="auto", choices=["auto", "bf16", "fp32"], help="of the matrix products")
    return parser.parse_args()


# ---- which runs there are ------------------------------------------------------------------------


def newest(files):
    """Files -> the folders that they are in, the newest file's first."""
    return [str(path.parent) for path in sorted(files, key=lambda path: -path.stat().st_mtime)]


def encoders():
    """Runs of pretrain.py with a decoder, the newest first, and behind them those that ship."""

    def fills(path):
        return "decoder_dim" in about_model(path).get("config", {})

    found = (Path(home).glob("*/model.safetensors") for home in ("runs", "weights"))
    return [run for files in found for run in newest(filter(fills, files))]


def choose_run(name):
    """The run that the page is about: what was given, the encoder under it, or the newest; else the
    first command's.
    """
    if name is None:
        return next(iter(encoders()), FIRST_RUN)
    if not Path(name).is_dir():
        raise UserError(
            f"{name} is no run; python pretrain.py makes one, and python demo.py alone shows the newest"
        )
    if (Path(name) / "head.safetensors").exists():
        return classifier.head_of(name)["base"]
    if (found := Path(name) / "detector.safetensors").exists():
        return detection.header_of(found).get("base") or name.rstrip("/").removesuffix("-det")
    return about_model(name)["base"] if tags.is_tagger(name) else name


def made_of(run, file):
    """The newest run that was made of this one and has this file, or None; runs/a-b-det is that of
    runs/a-b.
    """
    others = tuple(f"{name}-" for name in encoders() if name.startswith(f"{run}-"))
    found = newest(Path(run).parent.glob(f"{Path(run).name}-*/{file}"))
    return next((made for made in found if not made.startswith(others)), None)


def recogniser_of(run):
    return made_of(run, "gallery.safetensors")


def tagger_of(run):
    return made_of(run, "selected_tags.csv")


def segmenter_of(run):
    return made_of(run, "patches.safetensors")


def detector_of(run):
    return made_of(run, "detector.safetensors")


def commands(run):
    """What makes a run where it is missing -> {tab: (words behind python, about how many
    minutes)}.
    """
    return {
        "Mask": (["pretrain.py", "--mask", "attn_high", "--ratio", "0.75", "--out", run], 5),
        "Recognise": (["finetune_lora.py", run, "--method", "lora"], 7),
        "Tags": (["tags.py", run], 4),
        "Drawn or photographed": (["segment.py", run], 15),
        "Pages": (["detect.py", run], 15),
    }


# ---- what is loaded, once ------------------------------------------------------------------------


MACHINE = SimpleNamespace(device=torch.device("cpu"))  # main may set others
MACHINE.autocast = autocast_of(MACHINE.device, torch.float32)


@functools.lru_cache(4)
def network(run):
    """A run of pretrain.py -> its MAE, with the pooler that it attends by, and its header."""
    net = load_mae(run)
    net.encoder.pooler = load_teacher(run)[0].pooler
    return net.to(MACHINE.device), about_model(run)


@functools.lru_cache(4)
def loaded(load, run):
    """load: of recognisers or of taggers -> the network on its device, its header."""
    net, header = load(run)
    return net.to(MACHINE.device), header


@functools.lru_cache(2)
def segmenter(run):
    return segmenting.load(run, MACHINE.device, MACHINE.autocast)


# ---- a picture: {"name", "bytes", "truth": planes of a drawing of ours} --------------------------


def drawing(who, number):
    """One of the demo set's cast as no data set has it; its foreground and parts are known."""
    person = next(person for person in toon.cast() if person["name"] == who)
    figure, file = (
        toon.draw(toon.unseen(person, number + 1, seed=1000)[number], DRAWN),
        io.BytesIO(),
    )
    Image.fromarray(figure["image"]).save(file, "PNG")
    return {
        "name": who,
        "bytes": file.getvalue(),
        "truth": {"fg": figure["fg"], "parts": figure["parts"]},
    }


def dropped(path):
    """A file that the page put into its upload folder -> a picture; UserError where it is none."""
    if path is None:
        raise UserError("drop the file of a picture")
    name, file = Path(path).name, Path(path).read_bytes()
    try:
        with open_image(file, 2**15) as (img, _):
            size = img.size
    except Exception as problem:  # Pillow raises what it likes
        raise UserError(f"{name} is not a picture that can be read: {reason(problem)}") from None
    if min(size) < 8:
        raise UserError(f"{name} has {size[0]}x{size[1]} pixels; give a picture of at least 8x8")
    return {"name": name, "bytes": file, "truth": None}


def view_of(picture, size):
    """-> u8 (1, size, size, 3) on the device: the centre square."""
    return torch.from_numpy(decode(picture["bytes"], size, False)["images"].copy())[None].to(
        MACHINE.device
    )


def cut_as(picture, header):
    """The square that a recogniser or a tagger would take -> u8 (1, ., ., 3)."""
    found = decode(
        picture["bytes"], header["packed_size"], False, None, header["crop"], header["margin"]
    )
    return found["images"][None].copy()


# ---- HTML: pictures, bars, tables ----------------------------------------------------------------


def png(pixels):
    """u8 (H, W, 3), or a map (g, g), parts by number, other maps in viridis -> the address of an
    <img>.
    """
    pixels = torch.as_tensor(np.array(pixels) if isinstance(pixels, np.ndarray) else pixels).cpu()
    file = io.BytesIO()
    Image.fromarray(pixels.numpy() if pixels.dim() == 3 else plots.coloured(pixels[None])[0]).save(
        file, "PNG"
    )
    return address(file.getvalue())


def address(file):
    return f"data:image/png;base64,{base64.b64encode(file).decode()}"


def figures(items, kind=""):
    """[(caption, address)] side by side, as many as the screen has room for."""
    cells = (
        f'<figure><img src="{src}" alt="{escape(name)}"><figcaption>{escape(name)}</figcaption></figure>'
        for name, src in items
    )
    return f'<div class="figures {kind}">{"".join(cells)}</div>'


def bars(shares):
    """{name: 0 to 1} -> a bar each."""
    cells = (
        f'<span>{escape(name)}</span><div><i style="width: {x:.1%}"></i></div><span>{x:.0%}</span>'
        for name, x in shares.items()
    )
    return f'<div class="bars">{"".join(cells)}</div>'


def same_as(words):
    """The command that does what is seen."""
    return f"<p><code>python {escape(words)}</code></p>"


def answer(work):
    """A function of a tab: its mistakes are sentences in the page."""

    @functools.wraps(work)
    def page(*args):
        try:
            with torch.inference_mode():
                return work(*args)
        except UserError as problem:
            return f"<p>{escape(str(problem))}</p>"

    return page


def missing(tab, run):
    """UserError that says which command makes the run."""
    words, minutes = commands(run)[tab]
    raise UserError(
        f"There is no run for this yet. This command makes one in about {minutes} minutes: "
        f"python {shlex.join(words)}"
    )


# ---- tabs: what each says of the picture ---------------------------------------------------------


def attention_of(run, encoder, view, header):
    """(1, N): by its pooler, or by its CLS token through all blocks; and how, in words."""
    source = guidance.default_source(header.get("run", {}), run)
    with MACHINE.autocast():
        scores = (
            encoder.patch_attention(view, "rollout" if source == "outlier" else source)
            .float()
            .mean(1)
        )
    return scores, "attention" if source != "outlier" else "attention, which nothing trained"


def known_scores(picture, view, side):
    """Foreground (1, N) and parts (1, N, P): the truth of a drawing, else foreground by colours
    alone.
    """
    planes = picture["truth"] or {"fg": (255 * maps.coarse(view)[0]).byte().cpu().numpy()}
    whole = (torch.zeros(1, dtype=torch.long), *data.full_boxes(1))
    return {
        need: guidance.crop_map(need, plane[None], *whole, side, view.device, len(toon.PARTS))
        for need, plane in planes.items()
    }


def measured(net, view, need):
    """What a strategy reads that no map tells: {need: (1, N)} of detail and difficulty, {} of
    others.
    """
    if need == "detail":
        return {
            need: patch_detail(view, net.encoder.all_patches(view)[1], net.config["patch_size"])
        }
    return {need: maps.difficulty(net, view, MACHINE.autocast)} if need == "difficulty" else {}


def filled_in(net, header, view, ids_keep, ids_mask):
    """The network's prediction in the hidden patches -> u8 (1, S, S, 3), and its PSNR there in dB."""
    pred, stats = predict(
        net, view, ids_keep, ids_mask, MACHINE.autocast, header.get("floor", FLOOR)
    )
    pixels = to_pixels(pred, stats if header.get("norm_pix", True) else None)
    pasted = put_patches(view, ids_mask, pixels)
    where = put_patches(torch.zeros_like(view), ids_mask, torch.full_like(pixels, 255))[..., 0] > 0
    return pasted, metrics.psnr(pasted, view, where).item()


def draw_mask(strategy, scores, N, ratio, wanted, t, seed):
    """scores {need: (1, N) or (1, N, P)} -> ids_keep, ids_mask, and which of the wanted parameters
    the strategy has.
    """
    K, takes = masking.kept(N, ratio), inspect.signature(masking.STRATEGIES[strategy]).parameters
    params = {name: x for name, x in wanted.items() if name in takes}
    noise = masking.gumbel_noise(1, N, seeded(int(seed))).to(MACHINE.device)
    priority = masking.STRATEGIES[strategy](scores | {"masked": N - K}, noise, t, **params)
    return *masking.sample(priority, K), params


@answer
def mask_page(run, picture, strategy, ratio, beta, hint, t, seed):
    """What the strategy hides of the picture, and what the network predicts there."""
    if not Path(run).is_dir():
        missing("Mask", run)
    net, header = network(run)
    view, g, need = (
        view_of(picture, net.config["image_size"]),
        net.encoder.side,
        masking.NEEDS.get(strategy),
    )
    attention, how = attention_of(run, net.encoder, view, header)
    known = {"attn": attention} | known_scores(picture, view, g)
    scores = known | measured(net, view, need)
    if need and need not in scores:
        raise UserError(
            f"the {need} of a picture of your own are not known: choose a drawing, or another strategy"
        )
    ids_keep, ids_mask, params = draw_mask(
        strategy, scores, g * g, ratio, {"beta": beta, "hint": hint}, t, seed
    )
    pasted, decibel = filled_in(net, header, view, ids_keep, ids_mask)
    names = {"attn": how, "fg": "foreground"}
    shown = [
        (names.get(need, need), x.argmax(2) if x.dim() == 3 else x) for need, x in known.items()
    ]
    items = [
        ("picture", view[0]),
        *((name, x.view(g, g)) for name, x in shown),
        (
            f"seen: {ids_keep.shape[1]} of {g * g} patches",
            hide(view, ids_mask, net.config["patch_size"])[0],
        ),
        (f"predicted, {decibel:.1f} dB", pasted[0]),
    ]
    words = strategy + "".join(
        f"{',' if i else ':'}{k}={x:g}" for i, (k, x) in enumerate(params.items())
    )
    return figures((name, png(x)) for name, x in items) + same_as(
        f"pretrain.py --mask {words} --ratio {ratio:g}"
    )


@answer
def compare_page(run, picture, other, ratio, seed):
    """Attention and prediction of two runs, the same patches hidden."""
    found = []
    for name in (run, other):
        if not name or not Path(name).is_dir():
            raise UserError("choose two runs of pretrain.py; there is nothing to compare yet")
        net, header = network(name)
        view, g = view_of(picture, net.config["image_size"]), net.encoder.side
        ids_keep, ids_mask, _ = draw_mask("random", {}, g * g, ratio, {}, 1.0, seed)
        pasted, decibel = filled_in(net, header, view, ids_keep, ids_mask)
        attention, how = attention_of(name, net.encoder, view, header)
        items = [
            (how, attention.view(g, g)),
            ("seen", hide(view, ids_mask, net.config["patch_size"])[0]),
            (f"predicted, {decibel:.1f} dB", pasted[0]),
        ]
        found.append(
            f"<h3>{escape(Path(name).name)}</h3>" + figures((name, png(x)) for name, x in items)
        )
    return "".join(found) + same_as(f"probe.py {shlex.quote(run)} {shlex.quote(other)}")


@answer
def recognise_page(run, picture):
    """Who it is, how sure that is, and the faces of the gallery that are nearest."""
    name = recogniser_of(run) or missing("Recognise", run)
    net, header = loaded(classifier.load_classifier, name)
    gallery, image = classifier.load_gallery(name), cut_as(picture, header)
    logits, embeddings = recognize.embed(net, header, image, MACHINE.autocast)
    row = recognize.answers([picture["name"]], logits, embeddings, gallery, 3)[0]
    who = escape(row["name"] or f"unknown, most like {row['best_guess']}")
    sure = {} if row["confidence"] is None else {"confidence": row["confidence"]}
    faces = [
        (f"{f['name']}, {f['similarity']:.2f}", face_of(header["data"], f["picture"]))
        for f in row["nearest"]
    ]
    shown = figures(
        [("what is looked at", png(image[0])), *((name, src) for name, src in faces if src)]
    )
    like = {"similarity": max(0.0, row["similarity"]), "threshold": max(0.0, row["threshold"])}
    return f"<h2>{who}</h2>" + bars(sure | like) + shown + same_as(f"recognize.py {name} PICTURE")


@functools.lru_cache(256)
def face_of(folder, key):
    """A picture of the gallery by its key, where the set that it came from is still there; None
    else.
    """
    if not (Path(folder) / "train.safetensors").exists():
        return None
    split = data.open_split(folder, "train")
    keys = split["header"].get("keys", [])
    return png(np.array(split["images"][keys.index(key)])) if key in keys else None


def enrolled(run):
    """Names that recognize.py --enrol or the page added."""
    gallery = (
        classifier.load_gallery(name)
        if (name := recogniser_of(run))
        else {"names": [], "learned": 0}
    )
    return gallery["names"][gallery["learned"] :]


@answer
def enrol_page(run, who, files):
    """Add a character to the gallery -> what happened, in a sentence."""
    name = recogniser_of(run) or missing("Recognise", run)
    if not (who or "").strip():
        raise UserError("give the character a name")
    net, header = loaded(classifier.load_classifier, name)
    who = recognize.new_name(who, header)
    pictures = [dropped(path) for path in files or []]
    if not pictures:
        raise UserError(f"give {recognize.FEW} to 5 pictures of {who}")
    images = np.concatenate([cut_as(picture, header) for picture in pictures])
    with LOCK:
        keys, (_, embeddings) = (
            [x["name"] for x in pictures],
            recognize.embed(net, header, images, MACHINE.autocast),
        )
        said = recognize.add_faces(name, who, keys, embeddings)
    return f"<p>{escape(said)}</p>"


@answer
def forget_page(run, who):
    """Take an enrolled character out again -> what happened, in a sentence."""
    name = recogniser_of(run) or missing("Recognise", run)
    with LOCK:
        _, header = loaded(classifier.load_classifier, name)
        said = recognize.take_out(name, who or "", header)
    return f"<p>{escape(said)}</p>"


@answer
def tags_page(run, picture):
    """The character and the tags that the picture alone tells."""
    name = tagger_of(run) or missing("Tags", run)
    net, header = loaded(tags.load_tagger, name)
    view = data.view_images(
        torch.from_numpy(cut_as(picture, header)).to(MACHINE.device),
        *data.full_boxes(1),
        header["image_size"],
    )
    with MACHINE.autocast():
        logits, found = tags.answers(net, view)
    said = bars(tags.named(found[0].float().cpu(), header)) if found is not None else ""
    if logits is not None:
        sure, who = logits[0].float().softmax(0).max(0)
        said = f"<h2>{escape(header['classes'][who])}, {sure:.0%}</h2>" + said
    return said + same_as(f"tags.py {name} PICTURE")


def whole_of(picture):
    """A picture that somebody dropped -> u8 (H, W, 3), uncut, its longer side 1024 px at most."""
    with open_image(picture["bytes"], 1024) as (img, _):
        shown = on_paper(img)
        shown.thumbnail((1024, 1024))
        return np.array(shown)


@answer
def segment_page(run, picture, mixed=False):
    """What of the picture is drawn; what is photographed is orange. mixed: it is known to hold
    both.
    """
    name = segmenter_of(run) or missing("Drawn or photographed", run)
    masks_of, side, squared = segmenter(name)
    pixels = whole_of(picture)
    mask = segment.mask_of(pixels, masks_of, side, squared, MACHINE.device, mixed)
    laid_over = segmenting.overlay(
        torch.from_numpy(pixels)[None], torch.from_numpy(mask > 0.5)[None]
    )[0]
    items = [("picture", png(pixels)), ("what is photographed, in orange", png(laid_over))]
    command = same_as(f"segment.py {name} PICTURE --out masks{' --mixed' * mixed}")
    return bars({"drawn": float(mask.mean())}) + figures(items, "wide") + command


@answer
def pages_page(run, picture):
    """Where faces are, and who they are where there is a recogniser."""
    name, who = detector_of(run) or missing("Pages", run), recogniser_of(run)
    net, about = loaded(detection.load, name)
    pixels = whole_of(picture)
    with MACHINE.autocast():
        boxes, scores = detection.faces_of(net, pixels, about["page"], about["threshold"])
    known, header = loaded(classifier.load_classifier, who) if who else (None, {})
    cut = [
        detection.cut_out(pixels, box, detection.MARGIN, header.get("packed_size"))
        for box in boxes.tolist()
    ]
    names = [f"score {score:.2f}" for score in scores.tolist()]
    if who and cut:
        found = recognize.embed(known, header, np.stack(cut), MACHINE.autocast)
        rows = recognize.answers(names, *found, classifier.load_gallery(who), 0)
        names = [row["name"] or "unknown" for row in rows]
    shown = outlined(pixels, boxes.numpy() / np.array([pixels.shape[1], pixels.shape[0]] * 2))
    faces = figures((name, png(x)) for name, x in zip(names, cut, strict=True))
    command = (
        f"recognize.py {who} PICTURE --detect {name}"
        if who
        else f"detect.py {name} PICTURE --out found"
    )
    return figures([(f"{len(cut)} faces", png(shown))], "wide") + faces + same_as(command)


@answer
def learn_page(run, picture):
    """Curves, what the encoder knows beside its controls, and who is mistaken for whom."""
    home, made = Path(run), recogniser_of(run)
    pictures = [
        ("pre-training", home / "curves.png"),
        ("hidden at random, and predicted", home / "recon.png"),
    ]
    pictures += (
        [(f"who {Path(made).name} mistakes for whom", Path(made) / "confusion.png")] if made else []
    )
    found = [(name, address(path.read_bytes())) for name, path in pictures if path.exists()]
    if not found:
        missing("Mask", run)
    return (
        probe_table(home / "probe.json")
        + figures(found, "wide")
        + same_as(f"probe.py {shlex.quote(run)}")
    )


def probe_table(path):
    """Top-1 of what probe.py found, as a table of HTML; the command that makes it where there is
    none.
    """
    if not path.exists():
        return f"<p>python probe.py {escape(str(path.parent))} adds a table of what the encoder knows.</p>"
    rows = read_json(path, ["rows"])["rows"]
    kinds = list(
        dict.fromkeys(kind for row in rows.values() for kind, x in row.items() if "top1" in x)
    )

    def top1(row, kind):
        return f"{row[kind]['top1']:.1%}" if kind in row else ""

    head = "".join(f"<th>{escape(kind)}</th>" for kind in kinds)
    body = "".join(
        f"<tr><td>{escape(name)}</td>"
        + "".join(f"<td>{top1(row, kind)}</td>" for kind in kinds)
        + "</tr>"
        for name, row in rows.items()
    )
    return f'<div class="table"><table><tr><th>Top-1</th>{head}</tr>{body}</table></div>'


# ---- who may ask ---------------------------------------------------------------------------------


def is_own(host, names):
    """Is this Host header this machine's? An address in numbers is: DNS can't rebind it."""
    name = re.sub(r":\d*$", "", host)
    try:
        return bool(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
        return name in names


def refusal(method, path, headers, names):
    """headers: {name: value} in small letters -> (status, sentence), or None where it is answered."""
    host, origin = headers.get("host", ""), headers.get("origin")
    if not is_own(host, names):
        return (
            403,
            "The page has another address: see what demo.py printed, or start it with --host",
        )
    if origin is not None and origin.partition("://")[2] != host:
        return 403, "Another site's page sent this request"
    if method == "POST" and path.rstrip("/") not in POSTS:
        return 404, "The page has no such function"
    return None


class Gate:
    """An ASGI middleware: answers what `refusal` refuses. names: those that this machine has."""

    def __init__(self, app, names):
        self.app, self.names = app, names

    async def __call__(self, scope, receive, send):
        refused = None
        if scope["type"] == "http":
            headers = {
                k.decode("latin-1"): v.decode("latin-1").lower() for k, v in scope["headers"]
            }
            refused = refusal(scope["method"], scope["path"], headers, self.names)
        if refused is None:
            await self.app(scope, receive, send)
            return
        status, sentence = refused
        text = [(b"content-type", b"text/plain; charset=utf-8")]
        await send({"type": "http.response.start", "status": status, "headers": text})
        await send({"type": "http.response.body", "body": sentence.encode()})


# ---- the page ------------------------------------------------------------------------------------


def drawn(who, number):
    """-> the state, how it is shown, nothing to complain of."""
    picture = drawing(who, int(number))
    return picture, shown(picture), ""


def taken(path, before):
    """What somebody dropped, or what was there before and a sentence."""
    try:
        picture = dropped(path)
        return picture, shown(picture), ""
    except UserError as problem:
        return before, shown(before), f"<p>{escape(str(problem))}</p>"


def shown(picture):
    return figures([(picture["name"], png(decode(picture["bytes"], 160, False)["images"]))])


def tab_of(gr, name, text, controls, page, below=list):
    """A tab: a sentence, controls, what `page` says, more below; functions make them.

    -> page, its inputs behind the picture, where its answer goes, events after which it is asked
    again.
    """
    with gr.Tab(name):
        gr.Markdown(text)
        with gr.Row():
            inputs = controls()
        out = gr.HTML(elem_id=name.split()[0].lower())
        events = below()
    return page, inputs, out, events


def mask_controls(gr):
    strategies = list(masking.STRATEGIES)
    return [
        gr.Dropdown(strategies, value="attn_high", label="strategy", elem_id="strategy"),
        gr.Slider(
            0.1, 0.95, 0.75, step=0.05, label="ratio", info="share that is hidden", elem_id="ratio"
        ),
        gr.Slider(-3, 3, 0.5, step=0.1, label="beta", info="how much the map decides"),
        gr.Slider(0, 0.5, 0.1, step=0.05, label="hint", info="share of it that is shown"),
        gr.Slider(0, 1, 1, step=0.05, label="time", info="0 start, 1 end of a run"),
        gr.Slider(0, 99, 0, step=1, label="seed", info="of the noise"),
    ]


def compare_controls(gr, run):
    others = encoders()
    return [
        gr.Dropdown(
            others, value=others[-1] if others else None, label="beside it", elem_id="other"
        ),
        gr.Slider(0.1, 0.95, 0.75, step=0.05, label="ratio", info="share that is hidden"),
        gr.Slider(0, 99, 0, step=1, label="seed", info="of the noise"),
    ]


def enrol_controls(gr, run):
    """Rows under the answer: add a character, take one out; returns what has to be done when one
    was.
    """
    with gr.Row():
        who = gr.Textbox(label="name of somebody new", elem_id="new")
        files = gr.File(
            file_count="multiple", label="three to five pictures", height=120, elem_id="faces"
        )
        add = gr.Button("Enrol", elem_id="enrol")
    with gr.Row():
        known = gr.Dropdown(enrolled(run), label="who was enrolled", elem_id="known")
        forget = gr.Button("Forget", elem_id="forget")
    told = gr.HTML(elem_id="told")
    done = [
        add.click(functools.partial(enrol_page, run), [who, files], told, **EVENT),
        forget.click(functools.partial(forget_page, run), [known], told, **EVENT),
    ]
    for event in done:
        event.then(lambda: gr.Dropdown(enrolled(run), value=None), None, known, **EVENT)
    return done


def build(gr, run):
    """The page of gradio, `gr`, about one run of pretrain.py."""
    private = EVENT | {"show_progress": "hidden"}

    def bound(page):
        return functools.partial(page, run)

    with gr.Blocks(title="AniMask", analytics_enabled=False, delete_cache=(600, 600)) as page:
        gr.Markdown(
            f"# AniMask\nOne picture, and what networks make of it that learned from drawings: `{run}`"
        )
        picture = gr.State(drawing(toon.cast()[0]["name"], 0))
        with gr.Row():
            with gr.Column(scale=0, min_width=200):
                seen = gr.HTML(elem_id="picture")
            with gr.Column(min_width=240):
                who = gr.Dropdown(
                    [x["name"] for x in toon.cast()], label="a drawing of", elem_id="who"
                )
                number = gr.Slider(0, 99, 0, step=1, label="which drawing", elem_id="number")
            with gr.Column(min_width=240):
                file = gr.File(label="or a picture of your own", height=140, elem_id="file")
                gr.Markdown(f"It may have {MOST_MB} MB and {MOST_MEGAPIXELS} megapixels.")
                said = gr.HTML(elem_id="said")
        tabs = [
            tab_of(
                gr,
                "Mask",
                "Patches are hidden, and the network predicts them from the rest.",
                lambda: mask_controls(gr),
                bound(mask_page),
            ),
            tab_of(
                gr,
                "Recognise",
                'Which character it is, or "unknown"; and the faces that are nearest.',
                list,
                bound(recognise_page),
                lambda: enrol_controls(gr, run),
            ),
            tab_of(
                gr,
                "Tags",
                "What the picture shows, from the picture alone.",
                list,
                bound(tags_page),
            ),
            tab_of(
                gr,
                "Drawn or photographed",
                "Which pixels are drawn; what is photographed is orange.",
                lambda: [gr.Checkbox(label="it holds both", elem_id="both")],
                bound(segment_page),
            ),
            tab_of(
                gr,
                "Pages",
                "Where faces are, and who they are.",
                list,
                bound(pages_page),
            ),
            tab_of(
                gr,
                "Compare",
                "Two runs, the same patches hidden.",
                lambda: compare_controls(gr, run),
                bound(compare_page),
            ),
            tab_of(
                gr,
                "Learn",
                "How the run learned, and what it knows.",
                list,
                bound(learn_page),
            ),
        ]
        where = [picture, seen, said]
        changes = [
            gr.on(
                [who.input, number.input],
                drawn,
                [who, number],
                where,
                trigger_mode="always_last",
                **private,
            ),
            file.upload(taken, [file, picture], where, **private),
            page.load(drawn, [who, number], where, **private),
        ]
        for work, inputs, out, events in tabs:
            for event in [*changes, *events]:
                event.then(work, [picture, *inputs], out, **private)
            if inputs:
                gr.on(
                    [x.input for x in inputs],
                    work,
                    [picture, *inputs],
                    out,
                    trigger_mode="always_last",
                    **private,
                )
    return page


def library():
    """gradio, told to send nothing home."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    try:
        with mock.patch(
            "inspect.getfile", side_effect=OSError
        ):  # half its time: stubs of its own are written anew
            import gradio
    except ImportError:
        raise UserError("demo.py needs gradio: pip install -r requirements-demo.txt") from None
    return gradio


def serve(gr, args, run):
    """Start the server in threads of its own -> the page, its address."""
    from starlette.middleware import Middleware  # comes with gradio

    names = {"localhost", socket.gethostname().lower(), args.host.lower()}
    page = build(gr, run)
    _, local, public = page.launch(
        server_name=args.host,
        server_port=args.port,
        share=args.share,
        inbrowser=args.open,
        quiet=True,
        css=CSS,
        prevent_thread_lock=True,
        max_file_size=MOST_MB * 2**20,
        footer_links=[],
        ssr_mode=False,
        app_kwargs={"middleware": [Middleware(Gate, names)]},
        # fonts of the system: nothing is fetched
        theme=gr.themes.Default(
            font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ),
    )
    if public:
        names.add(urlsplit(public).netloc)
    return page, public or local


def main():
    args = parse_args()
    set_malloc(arena_max=1)  # else each of the server's threads keeps a heap of its own
    Image.MAX_IMAGE_PIXELS = MOST_MEGAPIXELS * 10**6  # Pillow refuses more, undecoded
    run, MACHINE.device = choose_run(args.run), pick_device(args.device)
    MACHINE.autocast = autocast_of(MACHINE.device, pick_dtype(args.dtype, MACHINE.device)[0])
    page, address = serve(library(), args, run)
    print(f"page     {address}; control-C ends it", flush=True)
    mask_page(
        run, drawing(toon.cast()[0]["name"], 0), "attn_high", 0.75, 0.5, 0.1, 1.0, 0
    )  # loads what is asked first
    page.block_thread()


if __name__ == "__main__":
    cli(main)
