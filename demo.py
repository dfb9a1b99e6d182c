"""Stage 9: a web page. It shows masks as a slider moves, names, tags, what is drawn, and faces.

    pip install -r requirements-demo.txt && python demo.py [runs/NAME]

Reads:  a run of pretrain.py (default: the newest in runs/, or one in weights/), and the runs that
        were made of it: runs/NAME-lora, -tags, -seg, -det
Writes: nothing

Only this machine can open the page, unless --host or --share allows others. The page refuses
requests that another site sends. A dropped picture is read as in every stage (ingest/decode.py),
in memory. Nothing that a visitor sends is used as the path of a file, and nothing starts a command.
"""

import base64
import functools
import io
import ipaddress
import os
import re
import socket
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image

import data
import detect
import maps
import mask as masking
import recognize
import segment
import tags
from common import guidance
from common.checkpoints import about_model, load_teacher
from common.command import Parser, between, cli, parse_keys
from common.evaluate import hide, predict
from common.io import UserError
from common.train import autocast_of, keep_freed_memory, pick_device, pick_dtype, seeded
from finetune_lora import load_classifier
from ingest import toon
from ingest.decode import decode, on_paper, open_image, reason
from ingest.scenes import outlined
from kernels.loss import FLOOR, patch_detail
from model import put_patches, to_pixels

FIRST_RUN = "runs/toon-mask-attn_high-ratio-0.75"  # the run of README's first command on a CPU
DRAWN, DRAWINGS = 256, 100  # side of a drawing that the page makes, and how many of each character
WHOLE = 1024  # longer side in pixels of a picture that is not cut to a square
MOST_MB, MOST_MEGAPIXELS = 32, 25  # of a file that a visitor drops
KEPT = 64  # drawings, and answers about them, that are computed once
QUEUE = 50  # waiting requests; one change of the picture makes five
# The only paths that the page's script and gradio's client post to. Gradio's other paths would
# call functions outside the queue, or start ffmpeg.
POSTS = [f"/gradio_api/{name}" for name in ("queue/join", "upload", "cancel", "reset")]
EVENT = {"concurrency_id": "page", "show_progress": "hidden"}  # one at a time: one decoded picture
PRIVATE = EVENT | {"api_visibility": "private"}  # no name for programs
MACHINE = SimpleNamespace(device=torch.device("cpu"))  # main may set another
MACHINE.autocast = autocast_of(MACHINE.device, torch.float32)
HEAD = "head.safetensors"
MADE = {  # tab: file of the run that it needs, the command that makes such a run, its minutes
    "Mask": (None, "pretrain.py --mask attn_high --ratio 0.75 --out {}", 5),
    "Recognise": (HEAD, "finetune_lora.py {} --method lora", 7),
    "Tags": ("selected_tags.csv", "tags.py {}", 4),
    "Drawn or photographed": ("seg*/model.safetensors", "segment.py {}", 15),
    "Pages": ("detector.safetensors", "detect.py {}", 15),
}
CSS = """
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); gap: 12px }
.figures figure { margin: 0 }
.figures img { width: 100%; image-rendering: pixelated; border-radius: 6px }
.figures.wide { grid-template-columns: repeat(auto-fit, minmax(min(480px, 100%), 1fr)) }
.wide figure { max-width: 640px } .wide img { image-rendering: auto }
.bars { display: grid; gap: 4px 12px }
.bars { grid-template-columns: max-content minmax(80px, 320px) max-content }
.bars div { background: var(--border-color-primary); border-radius: 4px; overflow: hidden }
.bars i { display: block; height: 100%; background: #0072B2 }
"""


def parse_args():
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("run", nargs="?", metavar="runs/NAME", help="a run of any stage (default: the newest)")
    add("--port", type=between(1, 65535, int), help="default: the first free one from 7860 on")
    add("--host", default="127.0.0.1", help="0.0.0.0 opens the page to the network")
    add("--share", action="store_true", help="a public address for three days, by gradio's server")
    add("--open", action="store_true", help="open the browser")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--dtype", default="auto", choices=["auto", "bf16", "fp32"], help="of matrix products")
    return parser.parse_args()


# ---- which runs there are ------------------------------------------------------------------------


def newest(files):
    """Files -> the folders that they are in, the newest file's first."""
    return [str(path.parent) for path in sorted(files, key=lambda path: -path.stat().st_mtime)]


def encoders():
    """Runs of pretrain.py with a decoder: the newest first, then those in weights/."""

    def has_decoder(path):
        return "decoder_dim" in about_model(path).get("config", {})

    found = []
    for home in ("runs", "weights"):
        found += newest(filter(has_decoder, Path(home).glob("*/model.safetensors")))
    return found


def choose_run(name):
    """The given run of pretrain.py, or the one that the given run was made of; or the newest."""
    known = encoders()
    if name is None:
        return next(iter(known), FIRST_RUN)
    if not Path(name).is_dir():
        raise UserError(f"{name} is no run; python pretrain.py makes one")
    name = str(Path(name))
    bases = [run for run in known if name.startswith(f"{run}-") and name not in known]
    return max(bases, key=len, default=name)


def made_of(run, file):
    """The newest run made of this one that has the file, or None; runs/a-b-det is of runs/a-b.

    file: its name, or with the end of the folder's name, as in seg*/model.safetensors.
    """
    others = tuple(f"{name}-" for name in encoders() if name.startswith(f"{run}-"))
    pattern = file if "/" in file else f"*/{file}"
    found = newest(Path(run).parent.glob(f"{Path(run).name}-{pattern}"))
    return next((made for made in found if not made.startswith(others)), None)


def recogniser_of(run):
    return made_of(run, HEAD)


def run_for(tab, run):
    """The run that this tab asks; UserError with the command that makes it."""
    file, command, minutes = MADE[tab]
    found = made_of(run, file) if file else run
    if found is None or not Path(found).is_dir():
        raise UserError(
            "There is no run for this tab yet. This command makes one in about "
            f"{minutes} minutes: python {command.format(run)}"
        )
    return found


# ---- networks, each loaded once ------------------------------------------------------------------


@functools.lru_cache(4)
def network(run):
    """A run of pretrain.py -> its MAE with the pooler of its teacher, its header."""
    net = maps.load_mae(run)
    net.encoder.pooler = load_teacher(run)[0].pooler
    return net.to(MACHINE.device), about_model(run)


@functools.lru_cache(4)
def loaded(load, run):
    """load: of recognisers, taggers or detectors -> the network on its device, its header."""
    net, header = load(run)
    return net.to(MACHINE.device), header


@functools.lru_cache(2)
def segmenter(run):
    net, header = segment.load(run)
    return net.to(MACHINE.device), header["image_size"]


# ---- pictures ------------------------------------------------------------------------------------


class Picture(NamedTuple):
    """A file in memory. number: which drawing of the character `name`; None: from a visitor."""

    name: str
    bytes: bytes
    number: int | None


@functools.lru_cache(KEPT)
def figure_of(who, number):
    """A drawing of a character that is in no data set, with its true foreground and parts."""
    person = next(person for person in toon.cast() if person["name"] == who)
    return toon.draw(toon.unseen(person, number + 1, seed=1000)[number], DRAWN)


@functools.lru_cache(KEPT)
def drawing(who, number):
    if not 0 <= number < DRAWINGS:
        raise UserError(f"there is no drawing {number}; choose 0 to {DRAWINGS - 1}")
    return Picture(who, png_file(figure_of(who, number)["image"]), number)


def dropped(path):
    """A file in gradio's upload folder -> Picture; UserError if it is no picture."""
    if path is None:
        raise UserError("drop the file of a picture")
    name, file = Path(path).name, Path(path).read_bytes()
    try:
        with open_image(file, 2**15) as (img, _):
            size = img.size
    except Exception as problem:  # Pillow raises many kinds
        raise UserError(f"{name} is not a picture that can be read: {reason(problem)}") from None
    if min(size) < 8:
        raise UserError(f"{name} has {size[0]}x{size[1]} pixels; give a picture of at least 8x8")
    return Picture(name, file, None)


def view_of(picture, size):
    """The centre square, u8 (1, size, size, 3), on the device."""
    pixels = decode(picture.bytes, size, False)["images"].copy()
    return torch.from_numpy(pixels)[None].to(MACHINE.device)


def cut_as(picture, header):
    """The square that a recogniser or a tagger reads, u8 (1, S, S, 3)."""
    how = None, header["crop"], header["margin"]
    return decode(picture.bytes, header["packed_size"], False, *how)["images"][None].copy()


def whole_of(picture):
    """The uncut picture, u8 (H, W, 3), its longer side at most WHOLE pixels."""
    with open_image(picture.bytes, WHOLE) as (img, _):
        paper = on_paper(img)
        paper.thumbnail((WHOLE, WHOLE))
        return np.array(paper)


# ---- HTML ----------------------------------------------------------------------------------------


def png_file(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def png(pixels):
    """u8 (H, W, 3), or a map (g, g) that gets colours -> the address of an <img>."""
    pixels = torch.as_tensor(pixels.copy() if isinstance(pixels, np.ndarray) else pixels).cpu()
    shown = pixels.numpy() if pixels.dim() == 3 else maps.coloured(pixels[None])[0]
    return f"data:image/png;base64,{base64.b64encode(png_file(shown)).decode()}"


def figures(items, kind=""):
    """[(caption, address)] in a grid."""
    cells = ""
    for name, src in items:
        name = escape(name)
        cells += f'<figure><img src="{src}" alt="{name}"><figcaption>{name}</figcaption></figure>'
    return f'<div class="figures {kind}">{cells}</div>'


def bars(shares):
    """{name: 0 to 1} -> a bar for each."""
    cells = ""
    for name, x in shares.items():
        bar = f'<div><i style="width: {x:.1%}"></i></div>'
        cells += f"<span>{escape(name)}</span>{bar}<span>{x:.0%}</span>"
    return f'<div class="bars">{cells}</div>'


def same_as(words):
    """The command that computes what is shown."""
    return f"<p><code>python {escape(words)}</code></p>"


def sentence(text):
    return f"<p>{escape(str(text))}</p>"


def answer(work):
    """A function of a tab: its UserErrors become sentences on the page."""

    @functools.wraps(work)
    def page(*args):
        try:
            with torch.inference_mode():
                return work(*args)
        except UserError as problem:
            return sentence(problem)

    return page


# ---- the tab Mask --------------------------------------------------------------------------------


def attention_of(encoder, view):
    """Attention to each patch (1, N): of the pooler, or of the CLS token through all blocks."""
    source = "rollout" if encoder.pooler is None else "pooler"
    with MACHINE.autocast():
        return encoder.patch_attention(view, source).float().mean(1)


def known_maps(picture, view, side):
    """{"fg": (1, N), "parts": (1, N, P)}: true ones of a drawing; else foreground from colours."""
    if picture.number is None:
        planes = {"fg": (255 * maps.coarse(view)[0]).byte().cpu().numpy()}
    else:
        figure = figure_of(picture.name, picture.number)
        planes = {need: figure[need] for need in ("fg", "parts")}
    place = torch.zeros(1, dtype=torch.long), *data.full_boxes(1), side
    scores = {"fg": guidance.crop_map(planes["fg"][None], *place)}
    if "parts" in planes:
        scores["parts"] = guidance.crop_parts(planes["parts"][None], *place, len(toon.PARTS))
    return {need: score.to(view.device) for need, score in scores.items()}


def computed(net, view, need):
    """{need: (1, N)} for the needs detail and difficulty, {} for others."""
    if need == "detail":
        ids = net.encoder.all_patches(view)[1]
        return {need: patch_detail(view, ids, net.config["patch_size"])}
    return {need: maps.difficulty(net, view, MACHINE.autocast)} if need == "difficulty" else {}


def parsed(words):
    """ "attn_high:beta=2" -> ("attn_high", {"beta": 2.0}); UserError for what is unknown."""
    strategy, params = parse_keys(words or "", masking.PARAMS, "mask")
    if params.pop("shuffle", 0):
        raise UserError("shuffle takes the map of another picture; the page has only one")
    return strategy, params


def draw_mask(words, scores, N, ratio, t, seed):
    """words: a strategy with its keys; scores {need: (1, N) or (1, N, P)} -> ids_keep, ids_mask."""
    strategy, params = parsed(words)
    try:
        K = masking.kept(N, ratio)
    except ValueError as problem:
        raise UserError(problem) from None
    noise = masking.gumbel_noise(1, N, seeded(int(seed))).to(MACHINE.device)
    priority = masking.STRATEGIES[strategy](scores, noise, t, N - K, **params)
    return masking.sample(priority, K)


def psnr(a, b, where):
    """Peak signal-to-noise ratio in dB, (n,), of u8 pictures a, b (n, S, S, 3) where (n, S, S) is true.

    10 log10(255^2 / mean squared error); nan where no pixel is true.
    """
    a, b, where = a.cpu(), b.cpu(), where.cpu()  # Metal has no float64
    error = (a.double() - b.double()).square().mean(3)
    return 10 * torch.log10(255**2 * where.sum((1, 2)) / (error * where).sum((1, 2)))


def filled_in(net, header, view, ids_keep, ids_mask):
    """View with predicted patches where it was hidden, u8 (1, S, S, 3), and their PSNR in dB."""
    floor = header.get("floor", FLOOR)
    pred, stats = predict(net, view, ids_keep, ids_mask, MACHINE.autocast, floor)
    pixels = to_pixels(pred, stats if header.get("norm_pix", True) else None)
    pasted = put_patches(view, ids_mask, pixels)
    white = torch.full_like(pixels, 255)
    where = put_patches(torch.zeros_like(view), ids_mask, white)[..., 0] > 0
    return pasted, psnr(pasted, view, where).item()


@answer
def mask_page(run, picture, words, ratio, t, seed):
    """Maps of the picture, what the strategy hides, and what the network predicts there."""
    strategy, _ = parsed(words)
    net, header = network(run_for("Mask", run))
    view, g = view_of(picture, net.config["image_size"]), net.encoder.side
    known = {"attn": attention_of(net.encoder, view)} | known_maps(picture, view, g)
    need = masking.NEEDS.get(strategy)
    scores = known | computed(net, view, need)
    if need and need not in scores:
        raise UserError(f"{need} of this picture are not known: choose a drawing")
    ids_keep, ids_mask = draw_mask(words, scores, g * g, ratio, t, seed)
    pasted, decibel = filled_in(net, header, view, ids_keep, ids_mask)
    seen = hide(view, ids_mask, net.config["patch_size"])[0]
    names = {"attn": "attention", "fg": "foreground", "parts": "parts"}
    items = [("picture", png(view[0]))]
    for need, x in known.items():
        levels = x.argmax(2) if x.dim() == 3 else x
        items.append((names[need], png(levels.view(g, g))))
    items.append((f"seen: {ids_keep.shape[1]} of {g * g} patches", png(seen)))
    items.append((f"predicted, {decibel:.1f} dB", png(pasted[0])))
    return figures(items) + same_as(f"pretrain.py --mask {words} --ratio {ratio:g}")


# ---- the tab Recognise ---------------------------------------------------------------------------


@answer
def recognise_page(run, picture):
    """The character, how sure that is, and the nearest faces of the gallery."""
    name = run_for("Recognise", run)
    net, header = loaded(load_classifier, name)
    gallery, image = recognize.open_gallery(name), cut_as(picture, header)
    logits, embeddings = recognize.embed(net, image, MACHINE.autocast)
    row = recognize.answers([picture.name], logits, embeddings, gallery, 3)[0]
    faces = [("input", png(image[0]))]
    for near in row["nearest"]:
        src = face_of(header["data"], near["picture"])
        if src:
            faces.append((f"{near['name']}, {near['similarity']:.2f}", src))
    sure = {key: row[key] for key in ("confidence", "similarity", "threshold")}
    sure = {key: max(0.0, x) for key, x in sure.items() if x is not None}
    who = escape(row["name"] or f"unknown, most like {row['best_guess']}")
    return f"<h2>{who}</h2>" + bars(sure) + figures(faces) + same_as(f"recognize.py {name} PICTURE")


@functools.lru_cache(256)
def face_of(folder, key):
    """Address of a picture of the gallery, or None if its data set is gone."""
    if not (Path(folder) / "train.safetensors").exists():
        return None
    split = data.open_split(folder, "train")
    keys = split["header"].get("keys", [])
    return png(np.array(split["images"][keys.index(key)])) if key in keys else None


# ---- the tabs Tags, Drawn or photographed, Pages -------------------------------------------------


@answer
def tags_page(run, picture):
    """The character and the tags, from the picture alone."""
    name = run_for("Tags", run)
    net, header = loaded(tags.load_tagger, name)
    square = torch.from_numpy(cut_as(picture, header)).to(MACHINE.device)
    with MACHINE.autocast():
        view = data.view_images(square, *data.full_boxes(1), header["image_size"])
        logits, found = tags.answers(net, view)
    text = ""
    if logits is not None:
        sure, who = logits[0].float().softmax(0).max(0)
        text += f"<h2>{escape(header['classes'][who])}, {sure:.0%}</h2>"
    if found is not None:
        text += bars(tags.named(found[0].float().cpu(), header))
    return text + same_as(f"tags.py {name} PICTURE")


@answer
def segment_page(run, picture):
    """Drawn pixels, and photographed ones in orange."""
    name = run_for("Drawn or photographed", run)
    net, side = segmenter(name)
    pixels = whole_of(picture)
    drawn = segment.mask_of(net, pixels, side, MACHINE.autocast)
    image, where = torch.from_numpy(pixels)[None], torch.from_numpy(drawn > 0.5)[None]
    orange = segment.overlay(image, where)[0]
    items = [("picture", png(pixels)), ("photographed pixels in orange", png(orange))]
    command = same_as(f"segment.py {name} PICTURE --out masks")
    return bars({"drawn": float(drawn.mean())}) + figures(items, "wide") + command


@answer
def pages_page(run, picture):
    """Where faces are, and who they are if there is a recogniser."""
    name, who = run_for("Pages", run), recogniser_of(run)
    net, about = loaded(detect.load, name)
    known, header = loaded(load_classifier, who) if who else (None, {})
    pixels, size = whole_of(picture), header.get("packed_size")
    with MACHINE.autocast():
        boxes, scores = detect.faces_of(net, pixels, about["page"], about["threshold"])
    cut = [detect.cut_out(pixels, box, detect.MARGIN, size) for box in boxes.tolist()]
    names = [f"score {score:.2f}" for score in scores.tolist()]
    command = f"detect.py {name} PICTURE --out found"
    if who:
        command = f"recognize.py {who} PICTURE --detect {name}"
    if who and cut:
        found = recognize.embed(known, np.stack(cut), MACHINE.autocast)
        rows = recognize.answers(names, *found, recognize.open_gallery(who), 0)
        names = [row["name"] or "unknown" for row in rows]
    H, W = pixels.shape[:2]
    marked = outlined(pixels, boxes.numpy() / np.array([W, H, W, H]))
    faces = [(name, png(x)) for name, x in zip(names, cut, strict=True)]
    page = figures([(f"{len(cut)} faces", png(marked))], "wide")
    return page + figures(faces) + same_as(command)


# ---- who may ask ---------------------------------------------------------------------------------


def is_own(host, names):
    """Is this Host header this machine's? Numeric addresses are: DNS can't rebind them."""
    name = re.sub(r":\d*$", "", host)
    try:
        return bool(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
        return name in names


def refusal(method, path, headers, names):
    """headers {lower-case name: value} -> (status, sentence), or None if the request is allowed."""
    host, origin = headers.get("host", ""), headers.get("origin")
    if not is_own(host, names):
        return 403, "The page has another address: use the one that demo.py printed, or --host"
    if origin is not None and origin.partition("://")[2] != host:
        return 403, "Another site's page sent this request"
    if method == "POST" and path.rstrip("/") not in POSTS:
        return 404, "The page has no such function"
    return None


class Gate:
    """ASGI middleware: it answers the requests that `refusal` refuses. names: of this machine."""

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
        status, text = refused
        kind = [(b"content-type", b"text/plain; charset=utf-8")]
        await send({"type": "http.response.start", "status": status, "headers": kind})
        await send({"type": "http.response.body", "body": text.encode()})


# ---- the page ------------------------------------------------------------------------------------


def chosen(make, before):
    """The picture that make() gives, how it is shown, ""; or what was there, and a sentence."""
    try:
        picture, text = make(), ""
    except UserError as problem:
        picture, text = before, sentence(problem)
    small = decode(picture.bytes, 160, False)["images"]
    return picture, figures([(picture.name, png(small))]), text


def drawn(who, number, before):
    return chosen(lambda: drawing(who, int(number)), before)


def taken(path, before):
    return chosen(lambda: dropped(path), before)


def stamp_of(run):
    """Files of the run and of those made of it, with their times: it changes when one of them does."""
    files = Path(run).parent.glob(f"{Path(run).name}*/*.safetensors")
    return tuple(sorted((str(path), path.stat().st_mtime_ns) for path in files))


@functools.lru_cache(KEPT)
def remembered(work, stamp, *asked):
    return work(*asked)


def once(work, run, picture, *controls):
    """A tab's answer. Answers about the page's own drawings are computed once."""
    if picture.number is None:
        return work(run, picture, *controls)
    return remembered(work, stamp_of(run), run, picture, *controls)


def mask_controls(gr):
    words = gr.Dropdown(
        list(masking.STRATEGIES),
        value="attn_high",
        label="strategy",
        info="or type its keys: attn_high:beta=2",
        allow_custom_value=True,
        elem_id="strategy",
    )
    ratio = gr.Slider(
        0.1, 0.95, 0.75, step=0.05, label="ratio", info="hidden share", elem_id="ratio"
    )
    t = gr.Slider(0, 1, 1, step=0.05, label="time", info="0 start, 1 end of a run")
    seed = gr.Slider(0, 99, 0, step=1, label="seed", info="of the noise")
    return [words, ratio, t, seed]


def picture_row(gr, picture):
    """Where a visitor chooses a picture -> the HTML that shows it, after its events are set."""
    with gr.Row():
        with gr.Column(scale=0, min_width=200):
            seen = gr.HTML(elem_id="picture")
        with gr.Column(min_width=240):
            names = [person["name"] for person in toon.cast()]
            who = gr.Dropdown(names, value=names[0], label="a drawing of", elem_id="who")
            number = gr.Slider(0, DRAWINGS - 1, 0, step=1, label="which drawing", elem_id="number")
        with gr.Column(min_width=240):
            file = gr.File(label="or your own picture", height=140, elem_id="file")
            gr.Markdown(f"At most {MOST_MB} MB and {MOST_MEGAPIXELS} megapixels.")
            told = gr.HTML(elem_id="said")
    asked, shown = [who, number, picture], [picture, seen, told]
    named = EVENT | {"trigger_mode": "always_last"}
    gr.on([who.input, number.input], drawn, asked, shown, api_name="drawing", **named)
    file.upload(taken, [file, picture], shown, api_name="picture", **EVENT)
    return seen, (drawn, asked, shown)


def build(gr, run):
    """The page, a gradio.Blocks, of one run of pretrain.py."""
    pages = {
        "Mask": (mask_page, "Patches are hidden, and the network predicts them from the rest."),
        "Recognise": (recognise_page, 'The character, or "unknown", and the nearest faces.'),
        "Tags": (tags_page, "What the picture shows, from the picture alone."),
        "Drawn or photographed": (segment_page, "Photographed pixels are orange."),
        "Pages": (pages_page, "Where faces are, and who they are."),
    }
    with gr.Blocks(title="AniMask", analytics_enabled=False, delete_cache=(600, 600)) as page:
        gr.Markdown(f"# AniMask\nOne picture, and what networks trained on drawings say: `{run}`")
        picture = gr.State(drawing(toon.cast()[0]["name"], 0))
        seen, at_start = picture_row(gr, picture)
        for name, (work, text) in pages.items():
            with gr.Tab(name):
                gr.Markdown(text)
                with gr.Row():
                    inputs = mask_controls(gr) if work is mask_page else []
                short = name.split()[0].lower()
                out = gr.HTML(elem_id=short)
            ask, asked = functools.partial(once, work, run), [picture, *inputs]
            triggers = [seen.change, *(x.input for x in inputs)]
            named = EVENT | {"trigger_mode": "always_last", "api_name": short}
            gr.on(triggers, ask, asked, out, **named)
        page.load(*at_start, **PRIVATE)
    return page.queue(max_size=QUEUE)


def library():
    """gradio, with its telemetry off."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    try:
        # Gradio looks up its own sources to write type stubs, which is half of its import time.
        with mock.patch("inspect.getfile", side_effect=OSError):
            import gradio
    except ImportError:
        raise UserError("demo.py needs gradio: pip install -r requirements-demo.txt") from None
    return gradio


def serve(gr, args, run):
    """Start the server in its own threads -> the page, its address."""
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
        theme=gr.themes.Default(font="system-ui", font_mono="monospace"),  # no font is fetched
    )
    if public:
        names.add(urlsplit(public).netloc)
    return page, public or local


def main():
    args = parse_args()
    keep_freed_memory(heaps=1)  # otherwise each thread of the server keeps its own
    Image.MAX_IMAGE_PIXELS = MOST_MEGAPIXELS * 10**6  # Pillow refuses more before decoding
    run, MACHINE.device = choose_run(args.run), pick_device(args.device)
    MACHINE.autocast = autocast_of(MACHINE.device, pick_dtype(args.dtype, MACHINE.device)[0])
    page, address = serve(library(), args, run)
    print(f"page     {address}; control-C ends it", flush=True)
    first = drawing(toon.cast()[0]["name"], 0)
    once(mask_page, run, first, "attn_high", 0.75, 1, 0)  # loads what is asked first
    page.block_thread()


if __name__ == "__main__":
    cli(main)
