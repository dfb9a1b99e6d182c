"""Stage 9: a web page. It shows masks as a slider moves, names, tags, what is drawn, and faces.

    pip install -e ".[demo]" && python -m apps.demo [runs/NAME]

Reads:  a run of any stage (default: the newest encoder in runs/, or one in weights/), and what was
        made of the same encoder: runs/NAME-lora, -tags, -seg, -det; else what ships in weights/
Writes: nothing but the gallery of a recogniser that has none yet

Only this machine can open the page, unless --host or --share allows others, and gradio lets no other
site read it. Nothing that a visitor sends is the path of a file or starts a command.

    N patches of a picture   H, W its sides
"""

import base64
import contextlib
import functools
import inspect
import io
import itertools
import os
import signal
import tempfile
from collections import namedtuple
from html import escape
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

import data
import mask as masking
from apps import detect, maps, masks, recognize, segment, tags
from apps.captions import readable
from apps.pictures import demo_note
from common import guidance
from common.checkpoints import about_model, load_mae, place_of
from common.classifier import is_recogniser
from common.door import require
from common.evaluate import filled_in, psnr
from common.train import AT_END, Parser, UserError, between, cli, open_machine, read_header, seeded
from finetune_lora import load_classifier
from ingest import scenes, toon
from ingest.decode import decode, on_paper, open_image, open_picture, reason

CAST = {person["name"]: person for person in toon.cast()}
# Of the first of the cast the number of a drawing, and of a page with several faces. They are chosen
# by eye, without a look at the answers: by chance, some drawings are gray and some pages empty.
NUMBERS = (0, 5, 11, 14, 2, 7, 12, 13, 5, 0, 12), (27, 12, 43, 16, 8, 21, 4, 46, 10, 38, 23)
CHOSEN = dict(zip(CAST, zip(*NUMBERS, strict=True), strict=False))
DRAWN = 384  # side of a drawing
WHOLE = 1024  # longer side in pixels of a picture that is not cut to a square
MOST_MB, MOST_MEGAPIXELS = 32, 25  # of a file that a visitor drops
HEAD = """# AniMask
Choose a drawing, or drop a picture of your own, and see what networks make of it. A click on a result
saves it."""
QUEUE = 50  # waiting requests
LEAST = 0.15  # probability of a tag that is shown at first
MEANING = {  # of the maps
    "attention": "yellow is used most",
    "foreground": "yellow is figure",
    "parts": "colours are named below",
}
EVENT = {"concurrency_id": "page", "show_progress": "hidden"}  # one at a time: one decoded picture
LATEST = EVENT | {"trigger_mode": "always_last"}  # of many moves of a slider the last one counts
MACHINE = SimpleNamespace(device=torch.device("cpu"), autocast=contextlib.nullcontext)  # see main
MACHINE.given = "runs/NAME"  # the run that the user named
CSS = """
div.block .html-container { padding: 0 }
#drawings .grid-wrap { min-height: 0 }
#drawings .grid-container { grid: auto / repeat(12, minmax(0, 1fr)) }
#drawings button { height: auto; aspect-ratio: 1 }
#file .wrap { min-height: 0; flex-direction: row; gap: 8px; font-size: 1em }
#file .icon-wrap { display: none }
.figures { display: grid; grid-template-columns: repeat(4, 1fr); gap: 12px; margin: 8px 0 }
.figures figure { margin: 0 }
.figures a { display: block; padding: 0; cursor: pointer }
.figures img { width: 100%; border-radius: 6px }
.pixels img { image-rendering: pixelated }
.large { grid-template-columns: repeat(auto-fit, minmax(180px, 420px)) }
.page figure:first-child { grid-area: span 2 / span 2 }
.bars { columns: 240px; margin-bottom: 8px }
.bars div { margin-bottom: 4px; padding: 2px 8px; border-radius: 4px; background: linear-gradient(
    90deg, #f976 var(--share), #8882 var(--share)) }
.legend span { margin-right: 12px; white-space: nowrap }
.legend i { display: inline-block; width: 1em; height: 1em; margin-right: 4px }
.copyable button { margin-left: 8px; padding: 0 8px; font-size: small }
@media (max-width: 700px) {
    .figures { grid-template-columns: 1fr 1fr }
    #drawings .grid-container { grid: auto / repeat(6, minmax(0, 1fr)) }
}
"""
SAVE = "this.href = this.firstChild.src"  # the picture in a link
COPY = "navigator.clipboard.writeText(this.previousSibling.innerText)"
COPY += ".then(() => this.innerText = 'copied')"
SERVER = {"quiet": True, "prevent_thread_lock": True, "ssr_mode": False, "footer_links": []}
SERVER |= {"css": CSS, "max_file_size": MOST_MB * 2**20}
# A file in memory. drawn: it is the chosen drawing of the character `name`, and no visitor's.
Picture = namedtuple("Picture", "name bytes drawn")


def parse_args():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("run", nargs="?", metavar="runs/NAME", help="of any stage (default: the newest encoder)")
    add("--port", type=between(1, 65535, int), help="default: the first free one from 7860 on")
    add("--host", default="127.0.0.1", help="0.0.0.0 opens the page to the network")
    add("--share", action="store_true", help="a public address for three days, by gradio's server")
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--dtype", default="auto", choices=["auto", "bf16", "fp32"], help="of matrix products")
    return parser.parse_args()


# ---- runs, each network loaded once --------------------------------------------------------------


def ships(run):
    """Is it one of weights/, a folder of the program?"""
    return Path(run).parent.name == "weights"


def newest(folder):
    """The runs in a folder, that of the newest file first; weights/ is found from every folder."""
    if folder == "weights":
        folder = place_of(folder, folder)
    files = sorted(Path(folder).glob("*/*.safetensors"), key=lambda path: -path.stat().st_mtime)
    return [*dict.fromkeys(str(path.parent) for path in files)]


def has_decoder(run):
    return "decoder_dim" in about_model(run).get("config", {})


def base_of(run):
    """The encoder that a run was made of, as its file says, or None."""
    for stem in ("head", "detector", "model"):
        with contextlib.suppress(UserError):  # most runs have one of these files
            header = read_header(Path(run, f"{stem}.safetensors"))
            base = header.get("base") or header.get("run", {}).get("encoder")
            return str(place_of(base, run)) if base else None


def choose_run(name):
    """The given run of pretrain.py, or the one that the given run was made of; or the newest."""
    encoders = filter(has_decoder, newest("runs") + newest("weights"))
    name = name or next(encoders, "runs/NAME")
    name = str(place_of(name, name))
    if not Path(name).is_dir():
        raise UserError(f"{name} is no run; python pretrain.py makes one")
    if has_decoder(name):
        return name
    base = base_of(name)  # what ships may name a digest, and a detector may come from a detector
    known = base and os.path.exists(base) and not detect.is_detector(base)
    return base if known else next(encoders, name)


def networks(run):
    """What a visitor can choose: the run that the page begins with, the two newest, what ships."""
    own = itertools.islice(filter(has_decoder, newest("runs")), 2)
    return [*dict.fromkeys([run, *own, *filter(has_decoder, newest("weights"))])]


def names_tags(run):
    """Did a run of apps/tags.py learn to name tags, and not characters alone?"""
    return about_model(run).get("tags", {}).get("arm") in tags.HIDES_TAGS


def made_of(run, fits):
    """The first that fits: this run, the given one, the newest made of this, one that ships."""
    folders = dict.fromkeys(["runs", str(Path(run).parent)])  # one's own first
    near = [name for folder in folders for name in newest(folder)]
    here = os.path.realpath(run)
    made = (name for name in near if (base := base_of(name)) and os.path.realpath(base) == here)
    for name in itertools.chain([run, MACHINE.given], made, newest("weights")):
        if fits(name):
            return name
    raise UserError("neither runs/ nor weights/ has a network for this tab")


@functools.lru_cache(8)
def loaded(load, run):
    """load: of any stage -> the network on its device, its header."""
    net, header = load(run)
    return net.to(MACHINE.device), header


# ---- pictures and HTML ---------------------------------------------------------------------------


@functools.lru_cache(64)
def figure_of(who, number):
    """A drawing of a character that is in no data set, with its true foreground and parts."""
    return toon.draw(toon.unseen(CAST[who], number + 1, seed=1000)[number], DRAWN)


def chosen_figure(who):
    return figure_of(who, CHOSEN[who][0])


def on_photo(who):
    """The chosen drawing in front of a photograph by vultilion (CC BY 2.0), u8 (DRAWN, DRAWN, 3)."""
    from sklearn.datasets import load_sample_image

    photo = load_sample_image("flower.jpg")[:DRAWN, :DRAWN].astype(np.float32)
    figure = chosen_figure(who)
    share = figure["fg"][..., None] / 255
    return np.uint8(photo + share * (figure["image"] - photo))


@functools.lru_cache(64)
def page_of(who):
    """The chosen page with this character and others on it, u8 (512, 512, 3)."""
    people = [CAST[name] for name in sorted(CAST, key=lambda name: name != who)[:6]]
    return scenes.draw({"people": people, "seed": (1000, CHOSEN[who][1])}, 512)["image"]


def drawing(who):
    return Picture(who, png_file(chosen_figure(who)["image"]), True)


def dropped(path):
    """A file in gradio's upload folder -> Picture; UserError if it is no picture, or too large."""
    name = Path(path).name
    file = Path(path).read_bytes()
    try:
        with open_picture(file) as img:  # no pixel is decoded yet
            megapixels = img.width * img.height / 1e6
        if megapixels > MOST_MEGAPIXELS:
            most = f"save a copy of at most {MOST_MEGAPIXELS}"
            raise ValueError(f"it has {megapixels:.0f} megapixels; {most}")
        with open_image(file, 2**15) as (img, _):
            if min(img.size) < 8:
                raise ValueError("it has a side of fewer than 8 pixels")
    except Exception as problem:  # Pillow raises many kinds
        raise UserError(f"{name} can't be taken: {reason(problem)}") from None
    return Picture(name, file, False)


def square_of(picture, size, crop="centre", margin=0.1):
    """The square that a network reads, u8 (1, size, size, 3)."""
    return decode(picture.bytes, size, False, None, crop, margin)["images"][None].copy()


def whole_of(picture, shown):
    """A visitor's uncut picture, u8 (H, W, 3), longer side at most WHOLE; or shown(who)."""
    if picture.drawn:
        return shown(picture.name)
    with open_image(picture.bytes, WHOLE) as (img, _):
        img.thumbnail((WHOLE, WHOLE))
        return np.array(on_paper(img))


def png_file(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def figures(items, kind=""):
    """[(caption, u8 (H, W, 3))] in a grid. A click on a picture saves it."""
    cells = ""
    for name, pixels in items:
        source = f"data:image/png;base64,{base64.b64encode(png_file(np.asarray(pixels))).decode()}"
        image = f'<a download="animask.png" onclick="{SAVE}"><img src="{source}" alt=""></a>'
        cells += f"<figure>{image}{element('figcaption', name)}</figure>"
    return f'<div class="figures {kind}">{cells}</div>'


def bars(shares):
    """{name: 0 to 1} -> a bar for each."""
    row = '<div style="--share: {0:.0%}">{0:.0%} {1}</div>'
    rows = (row.format(x, escape(name)) for name, x in shares.items())
    return f'<div class="bars">{"".join(rows)}</div>'


def copyable(text):
    """Text with a button that copies it."""
    return f'<p class="copyable">{element("code", text)}<button onclick="{COPY}">copy</button></p>'


def element(name, text):
    """Text in an HTML element; its markup stays text."""
    return f"<{name}>{escape(str(text))}</{name}>"


def note_on(picture, header):
    """A sentence where a visitor's picture meets a network that learned from a demo set alone."""
    note = demo_note(header.get("data") or header.get("run", {}).get("data"))
    return element("p", f"This network was {note}.") if note and not picture.drawn else ""


# ---- the tabs ------------------------------------------------------------------------------------


def maps_of(net, picture, view):
    """{name: (1, N), or (1, N, parts)}: maps of a picture. Those of a drawing are the true ones.

    The view is with them, for strategies that read its pixels.
    """
    place = torch.zeros(1, dtype=torch.long), *data.full_boxes(1), net.encoder.side
    source = "rollout" if net.encoder.pooler is None else "pooler"
    with MACHINE.autocast():
        scores = {"attn": net.encoder.patch_attention(view, source).float().mean(1)}
    if not picture.drawn:
        fg = (255 * maps.coarse(view.cpu())[0]).byte().numpy()  # Metal lacks the pooling
    else:
        figure = chosen_figure(picture.name)
        fg = figure["fg"]
        scores["parts"] = guidance.crop_map(figure["parts"][None], *place, len(toon.PARTS))
    scores["fg"] = guidance.crop_map(fg[None], *place)
    return {"view": view} | {name: score.to(view.device) for name, score in scores.items()}


def draw_mask(words, scores, N, ratio, seed):
    """words: a strategy with its keys; scores {score: (1, N) or (1, N, parts)} -> ids_keep, ids_mask.

    They are those of the end of a run, t = 1.
    """
    strategy = masks.parse_strategy(words or "")
    score = masks.score_of(words)
    if score == "parts" and score not in scores:
        raise UserError("the parts of this picture are not known: choose a drawing or another mask")
    if score not in (None, *scores):
        raise UserError(f"the page can't compute {score}: add it to maps_of in apps/demo.py")
    K = masking.kept(N, ratio)
    noise = masking.gumbel_noise(1, N, seeded(int(seed))).to(MACHINE.device)
    return masking.sample(strategy(scores, noise, 1.0, N - K), K)


def mask_page(run, picture, first, second, ratio, seed):
    """The network predicts the dark patches from the others. Drag the hidden share, or choose two
    strategies: both get the same seed, so that only what they hide differs.
    """
    net, target = loaded(load_mae, run)
    view = torch.from_numpy(square_of(picture, net.config["image_size"])).to(MACHINE.device)
    N = net.encoder.side**2
    scores = maps_of(net, picture, view)
    items = []
    for words in (first, second):
        ids_keep, ids_mask = draw_mask(words, scores, N, ratio, seed)
        pasted, where = filled_in(net, target, view, ids_keep, ids_mask, MACHINE.autocast)
        dark = torch.where(where[..., None], 0.2 * view + 20, view).byte()
        items.append((f"{words} hides {ids_mask.shape[1]} of {N} patches", dark[0].cpu()))
        decibels = psnr(pasted, view, where).item()
        items.append((f"predicted: {decibels:.1f} dB (more is closer)", pasted[0].cpu()))
    size = view.shape[1]
    items.append((f"what the network reads: {size} x {size} pixels", view[0].cpu()))
    for name, levels in guidance.as_pictures(scores).items():
        items.append((f"{name}: {MEANING[name]}", masks.coloured(levels.cpu())[0]))
    text = figures(items, "pixels") + (legend() if "parts" in scores else "")
    text += element("p", "To train a network with the first mask:")
    return text + copyable(f"python pretrain.py --mask {first} --ratio {ratio:g}")


def legend():
    """The colours of the parts, as HTML."""
    text = "<span>Parts:</span>"
    colours = masks.coloured(torch.arange(len(toon.PARTS))[None, None])[0, 0].tolist()
    for name, colour in zip(toon.PARTS, colours, strict=True):
        text += f'<span><i style="background: rgb{(*colour,)}"></i>{name}</span>'
    return f'<p class="legend">{text}</p>'


def recognise_page(run, picture):
    """Who is this? The network names a character, or says that it knows none like this. Beside the
    picture are others to compare. Try other drawings, and a picture of your own.
    """
    net, header = loaded(load_classifier, run)
    image = square_of(picture, header["packed_size"], header["crop"], header["margin"])
    outputs = recognize.embed(net, image, MACHINE.autocast)
    row = recognize.answers([picture.name], *outputs, recognize.open_gallery(run), 3)[0]
    text = element("h2", row["name"] or "unknown")
    if not row["known"]:
        text += element("p", f"Unlike all known characters. Nearest: {row['best_guess']}.")
    shares = {f"similarity (unknown under {row['threshold']:.0%})": max(0.0, row["similarity"])}
    if row["confidence"] is not None:
        shares["confidence"] = row["confidence"]
    faces = [(f"the picture: {picture.name}", image[0])]
    with contextlib.suppress(UserError):  # the data set that it learned from may be gone
        folder = place_of(header["data"], run)
        # By folds, pictures of all splits are learned.
        splits = [data.open_split(folder, name) for name in data.splits_in(folder)]
        for near, split in itertools.product(row["nearest"], splits):
            keys = split["header"]["keys"]
            if near["picture"] in keys:
                face = split["images"][keys.index(near["picture"])]
                faces.append((f"{near['name']}, {near['similarity']:.2f}", face))
    if row["best_guess"] in CAST:
        for i in range(1, 5 - len(faces)):
            face = figure_of(row["best_guess"], 100 - i)["image"]
            faces.append((f"a drawing of {row['best_guess']}", face))
    text += note_on(picture, header) + bars(shares) + figures(faces)
    return text + copyable(f"python -m apps.recognize {run} PICTURE")


def tags_page(run, picture, least):
    """Which words describe the picture? The longer a bar, the surer the network is of the word.
    Try several drawings, and look for a word that is wrong.
    """
    net, header = loaded(tags.load_tagger, run)
    square = square_of(picture, header["packed_size"], header["crop"], header["margin"])
    some = [("", square[0])]
    row = tags.answer_rows(net, header, some, least, MACHINE.autocast, len(header["words"]))[0]
    words = {readable(word): sure for word, sure in row["tags"].items()}
    text = copyable(", ".join(words)) if words else element("p", "No tag is as probable as that.")
    text = note_on(picture, header) + text + bars(words)
    return text + copyable(f"python -m apps.tags {run} PICTURE --threshold {least:g}")


def segment_page(run, picture):
    """Which pixels are drawn, and which are photographed? Here, the drawing stands in front of a
    photograph (vultilion, CC BY 2.0). Dark and blurred parts are hard. Try a picture of your own, too.
    """
    net, header = loaded(segment.load, run)
    pixels = whole_of(picture, on_photo)
    drawn = segment.mask_of(net, pixels, header["image_size"], MACHINE.autocast)
    orange = segment.overlay(pixels, drawn > 0.5)
    items = [("the picture", pixels), ("orange: this looks photographed", orange)]
    text = note_on(picture, header) + bars({"drawn": float(drawn.mean())}) + figures(items, "large")
    return text + copyable(f"python -m apps.segment {run} PICTURE --out masks")


def pages_page(run, picture, network):
    """Where are faces on a page, and whose are they? Here, each drawing is a page with several figures.
    Try other drawings, and look for a face that is missed; or drop a page of your own.
    """
    net, about = loaded(detect.load, run)
    who = made_of(network, is_recogniser)
    known, header = loaded(load_classifier, who)
    pixels = whole_of(picture, page_of)
    with MACHINE.autocast():
        boxes, _ = detect.faces_of(net, pixels, about["page"], about["threshold"])
    cut = [detect.cut_out(pixels, box, header["packed_size"]) for box in boxes.tolist()]
    items = [(f"{len(cut)} faces", scenes.outlined(pixels, boxes))]
    if cut:
        outputs = recognize.embed(known, np.stack(cut), MACHINE.autocast)
        rows = recognize.answers(range(len(cut)), *outputs, recognize.open_gallery(who), 0)
        items += [(row["name"] or "unknown", face) for row, face in zip(rows, cut, strict=True)]
    text = note_on(picture, about) or note_on(picture, header)
    command = f"python -m apps.recognize {who} PICTURE --detect {run}"
    return text + figures(items, "page") + copyable(command)


# ---- the page ------------------------------------------------------------------------------------

TABS = {  # its function, and the runs that it takes
    "Mask": (mask_page, has_decoder),
    "Recognise": (recognise_page, is_recogniser),
    "Tags": (tags_page, names_tags),
    "Drawn or photographed": (segment_page, segment.is_segmenter),
    "Pages": (pages_page, detect.is_detector),
}
MAKE = {  # the command that makes such a run of a visitor's FOLDER, and what lies in that
    "Mask": ("pretrain.py --data FOLDER", "pictures"),
    "Recognise": ("-m apps.learn FOLDER --encoder {}", "a folder for each character"),
    "Tags": ("-m apps.tags {} --data FOLDER", "pictures that have tags"),
    "Drawn or photographed": ("-m apps.segment {} --data FOLDER", "drawn/ and photographed/"),
    "Pages": ("-m apps.detect weights/toon-det --data FOLDER", "pages that have boxes"),
}


def answer(tab, network, picture, *controls):
    """What a tab says of a picture, as HTML: its answer and a command, or one sentence."""
    work, fits = TABS[tab]
    command, content = MAKE[tab]
    make = element("p", f"This command makes your own from a FOLDER with {content}:")
    make += copyable(f"python {command.format(network)}")
    try:
        run = made_of(network, fits)
        with torch.inference_mode():
            text = work(run, picture, *controls)
    except (UserError, ValueError) as problem:  # ValueError: a number that is too large
        return element("p", problem)
    if ships(run) and run not in (network, MACHINE.given):
        text += element("p", f"Here you see {run}, which ships with AniMask.") + make
    return text


def controls_of(gr, tab, network):
    """What the function of a tab reads beside the picture, as components of gradio."""
    if tab == "Tags":
        return [gr.Slider(0.02, 0.9, LEAST, step=0.01, label="least probability", elem_id="least")]
    if tab == "Pages":
        return [network]
    if tab != "Mask":
        return []
    known = [name for name in masking.PARAMS if masking.NEEDS.get(name) != "difficulty"]
    own = {"choices": known, "allow_custom_value": True}
    with gr.Row():
        first = gr.Dropdown(value="attn_high", label="hide by", info="or attn_high:beta=2", **own)
        second = gr.Dropdown(value="random", label="compared with", info="the same seed", **own)
        seed = gr.Slider(0, 99, 0, step=1, label="seed", info="of the noise")
        # Last and wide, so that on a narrow screen it lies above the pictures that it changes.
        wide = {"min_width": 240, "elem_id": "ratio"}
        ratio = gr.Slider(0.1, 0.95, 0.75, step=0.05, label="hidden share", **wide)
    return [first, second, ratio, seed]


def build(gr, run):
    """The page, a gradio.Blocks, that begins with one run of pretrain.py."""
    names = [*CHOSEN]
    tiles = [chosen_figure(name)["image"] for name in names]
    still = {"allow_preview": False, "interactive": False, "buttons": [], "show_label": False}
    most = f"your own, up to {MOST_MB} MB, {MOST_MEGAPIXELS} megapixels"
    other = "for another: python -m apps.demo runs/NAME"
    outs, controls = {}, {}
    with gr.Blocks(title="AniMask", analytics_enabled=False, delete_cache=(600, 600)) as page:
        gr.Markdown(HEAD)
        picture, own = gr.State(drawing(names[0])), gr.State()  # what is seen; what was dropped
        seen = gr.State(next(iter(TABS)))
        with gr.Row():
            with gr.Column(scale=3):
                shown = gr.Gallery(tiles, columns=12, selected_index=0, elem_id="drawings", **still)
            with gr.Column():
                file = gr.File(label=most, height=90, elem_id="file")
                said = gr.HTML(elem_id="said")
        network = gr.Radio(networks(run), value=run, label="network", info=other, elem_id="network")
        with gr.Tabs(overflow_behavior="wrap") as tabs:
            for tab, (work, _) in TABS.items():
                with gr.Tab(tab):
                    gr.Markdown(inspect.getdoc(work))
                    controls[tab] = controls_of(gr, tab, network)
                    outs[tab] = gr.HTML(elem_id=tab.split()[0].lower())

        @shown.select(inputs=own, outputs=picture, **EVENT)
        def clicked(own, event: gr.SelectData):
            return own if event.index == len(names) else drawing(names[event.index])

        taken = [picture, own, shown, said, file]

        @file.upload(inputs=file, outputs=taken, api_name="picture", **EVENT)
        def uploaded(path):
            try:
                new = dropped(path)
            except UserError as problem:
                return {said: element("p", problem), file: None}
            # It is the last tile, and the file is cleared, so that another one can replace it.
            gallery = gr.Gallery([*tiles, square_of(new, DRAWN)[0]], selected_index=len(tiles))
            return {picture: new, own: new, shown: gallery, said: "", file: None}

        @tabs.select(outputs=seen, **EVENT)
        def turned(event: gr.SelectData):
            return event.value

        asked = {network}.union(*controls.values())
        triggers = [page.load, seen.change, picture.change, *(x.input for x in asked)]

        @gr.on(triggers, inputs={seen, picture, *asked}, outputs=[*outs.values()], **LATEST)
        def answered(values):
            """Of the tab that is seen alone: the others are computed when somebody looks at them."""
            tab = values[seen]
            given = [values[control] for control in controls[tab]]
            return {outs[tab]: answer(tab, values[network], values[picture], *given)}

    return page.queue(max_size=QUEUE, api_open=False)  # no call passes the queue by


def main():
    args = parse_args()
    Image.MAX_IMAGE_PIXELS = None  # `dropped` has a bound of its own
    torch.set_num_threads(1)  # for one small picture, a second thread costs more than it computes
    run = choose_run(args.run)
    MACHINE.given = args.run or run
    MACHINE.device, MACHINE.autocast, _ = open_machine(args)
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    # What visitors drop goes when the page does, also where a system ends it, and not control-C.
    uploads = AT_END.enter_context(tempfile.TemporaryDirectory(prefix="animask-page-"))
    os.environ["GRADIO_TEMP_DIR"] = uploads
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    require("demo", "gradio")
    import gradio as gr

    page = build(gr, run)
    settings = {"server_name": args.host, "server_port": args.port, "share": args.share}
    theme = gr.themes.Default(font="system-ui", font_mono="monospace")  # no font is fetched
    # What is asked first is loaded before anybody can ask: Metal is for one thread at a time.
    answer("Mask", run, drawing(next(iter(CHOSEN))), "attn_high", "random", 0.75, 0)
    try:
        _, local, public = page.launch(theme=theme, **settings, **SERVER)
    except OSError:
        where = f"--port {args.port or 7860} of --host {args.host}"
        raise UserError(f"{where} is in use or not this machine's; choose others") from None
    print(f"page     {public or local}; control-C ends it", flush=True)
    page.block_thread()


if __name__ == "__main__":
    cli(main)
