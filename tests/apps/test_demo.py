"""The page: what each tab says of a picture, bad files, names with markup; and clicked through in a real browser."""

import io
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from conftest import ROOT, WORDS
from made import CPU
from PIL import Image

import mask as masking
from apps import demo, detect
from common import guidance
from common.train import UserError
from ingest import scenes

WHO = "akika"
CONTROLS = {"Recognise": [], "Tags": [0.1], "Drawn or photographed": [], "Pages": ["runs/a"]}


def drawing(who=WHO):
    return demo.drawing(who)


def mask_page(words="random", ratio=0.75, seed=0, picture=None, run="runs/a", other="grid"):
    return demo.answer("Mask", run, picture or drawing(), words, other, ratio, seed)


def other_page(tab, run="runs/a", picture=None):
    return demo.answer(tab, run, picture or drawing(), *CONTROLS[tab])


def own(path, size=(50, 40)):
    """A visitor's picture, of noise."""
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return demo.dropped(path)


# ---- the tabs ------------------------------------------------------------------------------------


SHOWN = {None, "view", *guidance.MAPS}  # what maps_of of apps/demo.py knows


@pytest.mark.parametrize(
    "strategy", [s for s in masking.STRATEGIES if masking.NEEDS.get(s) in SHOWN]
)
def test_every_strategy_is_shown_and_of_ones_own_picture_what_is_known(at, strategy, tmp_path):
    text = mask_page(strategy)
    assert f"{strategy} hides 12 of 16 patches" in text and text.count("<img") == 8
    assert f"--mask {strategy}" in text
    text = mask_page(strategy, picture=own(tmp_path / "mine.png"))
    assert ("not known" in text) == (strategy == "parts")


def test_a_strategy_of_ones_own_that_reads_pixels_is_on_the_page(at, bright):
    assert mask_page("bright:beta=9") != mask_page("bright:beta=-9")
    gradio = MagicMock()
    demo.controls_of(gradio, "Mask", None)
    assert "bright" in gradio.Dropdown.call_args.kwargs["choices"]


def test_sliders_change_what_is_hidden_and_two_strategies_of_one_seed_differ_in_nothing_else(at):
    assert mask_page(ratio=0.5).count("hides 8 of 16") == 2
    once = mask_page()
    assert once == mask_page() != mask_page(seed=1)
    assert mask_page("attn_high:beta=3") != mask_page("attn_low:beta=3")

    def shown(other):
        found = re.findall(r'<img src="(.*?)"', mask_page("random", other=other))
        return found[:2], found[2:4]  # what is hidden and predicted, by the first and by the other

    first, second = shown("random")
    assert first == second
    assert shown("grid")[0] == first != shown("grid")[1]


def test_who_it_is_and_what_is_drawn(at, tmp_path):
    said = other_page("Recognise")
    assert re.search("<h2>class|Nearest: class", said)
    assert "similarity" in said and "apps.recognize" in said
    visitors = own(tmp_path / "mine.png", (64, 64))
    text = other_page("Drawn or photographed", picture=visitors)
    assert text.count("<img") == 2 and "% drawn" in text


def test_tags_can_be_copied_and_are_fewer_over_a_higher_threshold(at):
    def words(least):
        text = demo.answer("Tags", "runs/a", drawing(), least)
        assert f"--threshold {least:g}" in text and "<h2>" not in text  # who it is says Recognise
        return re.findall(r"% (\w+)</div>", text), text

    some, text = words(0.0)
    assert f"<code>{', '.join(some)}</code><button" in text and len(some) == len(WORDS)
    few, text = words(0.9)
    assert set(few) < set(some) and (few or "No tag" in text)


def test_a_run_that_names_no_tags_is_not_taken_for_them(at, monkeypatch):
    about = {"tags": {"arm": "vilt"}}
    monkeypatch.setattr(demo, "about_model", lambda run: about if "runs/" in run else {})
    assert not demo.names_tags("runs/a-tags")


@pytest.mark.parametrize("threshold", [1.1, -1.1])
def test_a_picture_unlike_all_characters_is_said_to_be(at, monkeypatch, threshold):
    gallery = replace(demo.recognize.open_gallery("runs/a-lora"), threshold=threshold)
    monkeypatch.setattr(demo.recognize, "open_gallery", lambda run: gallery)
    said = demo.recognise_page("runs/a-lora", drawing())
    assert ("<h2>unknown</h2>" in said) == (threshold > 1)


def test_faces_of_a_page_are_shown_and_named(at, monkeypatch):
    faces = torch.tensor([[0.5, 0.25, 0.75, 0.5], [0.1, 0.1, 0.3, 0.3]])
    monkeypatch.setattr(detect, "detect", lambda net, view: [(faces, torch.tensor([0.9, 0.8]))])
    text = other_page("Pages")
    assert text.count("<img") == 3 and "runs/a-lora PICTURE --detect runs/a-det" in text
    monkeypatch.setattr(detect, "detect", lambda net, view: [(faces[:0], torch.zeros(0))])
    assert "0 faces" in other_page("Pages")


@pytest.mark.parametrize("tab", CONTROLS)
def test_without_a_run_of_ones_own_the_weights_that_ship_answer_and_say_so(
    tab, at, tmp_path, monkeypatch
):
    """From every folder; and of a visitor's picture, that they guess."""
    assert "ships" not in other_page(tab)
    monkeypatch.chdir(tmp_path)
    assert demo.choose_run(None) == demo.choose_run("weights/toon") == str(ROOT / "weights/toon")
    text = other_page(tab, "runs/none")
    assert "weights/toon-" in text and "ships" in text and "demo set alone" not in text
    assert demo.MAKE[tab][0].format("runs/none") in text and "FOLDER" in text
    visitors = own(tmp_path / "mine.png")
    assert "demo set alone" in other_page(tab, "runs/none", visitors)
    assert demo.note_on(visitors, {"data": "datasets/mine"}) == ""


def test_markup_in_a_name_stays_text(tmp_path):
    picture = own(tmp_path / "<b>me.png")
    shown = demo.figures([(picture.name, demo.square_of(picture, 8)[0])])
    assert "&lt;b&gt;me.png" in shown and "<b>" not in shown
    assert "<b>" not in demo.bars({"<b>me": 0.5}) + demo.element("p", "<b>me")


@pytest.mark.parametrize("bad", [b"GIF89a no", b"", "half"])
def test_a_bad_file_is_a_sentence_with_its_name(tmp_path, bad):
    good = own(tmp_path / "good.png").bytes
    path = tmp_path / "bad.png"
    path.write_bytes(good[: len(good) // 2] if bad == "half" else bad)
    with pytest.raises(UserError, match="bad.png can't be taken"):
        demo.dropped(path)


def test_a_large_picture_is_refused_with_its_size_and_the_limit(tmp_path, recwarn):
    Image.new("1", (7000, 4000)).save(tmp_path / "page.png")
    with pytest.raises(UserError, match="28 megapixels.*at most 25"):
        demo.dropped(tmp_path / "page.png")
    assert not recwarn.list


def test_a_bad_strategy_is_a_sentence(at):
    for bad in ("nothing", "attn_high:x=1", "attn_high:shuffle=1", None):
        assert "<img" not in mask_page(bad) and "<p>" in mask_page(bad)


def test_every_page_that_is_offered_has_faces(monkeypatch):
    small = []
    draw = scenes.draw
    monkeypatch.setattr(scenes, "draw", lambda item, _: small.append(draw(item, 128)) or small[-1])
    for who in demo.CHOSEN:
        demo.page_of.__wrapped__(who)
    assert min(len(page["names"]) for page in small) >= 2


def test_looking_writes_nothing(at):
    before = sorted((str(p), p.stat().st_mtime_ns) for p in Path("runs").rglob("*"))
    for tab in CONTROLS:
        other_page(tab)
        other_page(tab, "runs/none")
    mask_page()
    assert before == sorted((str(p), p.stat().st_mtime_ns) for p in Path("runs").rglob("*"))


def test_the_newest_run_is_chosen_and_the_encoder_under_a_recogniser(at, tmp_path, monkeypatch):
    base_of = demo.base_of
    assert demo.choose_run(None) == demo.choose_run("runs/a") == "runs/a"
    for made in ("runs/a-lora", "runs/a-tags/", "runs/a-seg", "runs/a-det"):
        assert demo.choose_run(made) == "runs/a"
    assert demo.made_of("runs/a", demo.is_recogniser) == "runs/a-lora"
    monkeypatch.setattr(demo, "base_of", lambda run: "d4df7a6c05a8")  # a digest, as of what ships
    assert demo.choose_run("runs/a-det") == "runs/a"
    monkeypatch.setattr(demo, "base_of", base_of)
    shutil.copytree("runs/a-lora", tmp_path / "names")
    monkeypatch.setattr(demo.MACHINE, "given", str(tmp_path / "names"))
    assert demo.choose_run(tmp_path / "names") == "runs/a"  # as its file says
    assert demo.made_of("runs/a", demo.is_recogniser) == str(tmp_path / "names")
    assert demo.made_of("runs/a", detect.is_detector) == "runs/a-det"
    shutil.copytree("runs/a", tmp_path / "weights" / "b")
    monkeypatch.chdir(tmp_path)
    assert demo.choose_run(None) == "weights/b"
    shutil.copytree("weights/b", "runs/c")
    os.utime("runs/c/model.safetensors", (0, 0))  # older, and one's own
    assert demo.choose_run(None) == "runs/c"
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "runs" / "broken" / "model.safetensors").write_bytes(b"no network")
    assert demo.networks("runs/c") == ["runs/c", "weights/b"]  # one's own beside what ships
    monkeypatch.setattr(demo.MACHINE, "given", "runs/c")
    with pytest.raises(UserError, match="neither runs/ nor weights/"):
        demo.made_of("runs/c", demo.is_recogniser)


# ---- who may ask, and the page in a browser ------------------------------------------------------


@pytest.fixture(scope="module")
def address(base, tmp_path_factory):
    """apps/demo.py, started as a user would -> its address. It leaves no file that was dropped."""
    uploads = tmp_path_factory.mktemp("uploads")
    pytest.importorskip("gradio", reason="pip install -e '.[demo]'")
    words = [sys.executable, "-m", "apps.demo", *CPU.split()]
    env = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(uploads)}
    server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=base, env=env)
    try:
        yield re.search(r"http://\S+?:\d+", server.stdout.readline()).group()
    finally:
        server.terminate()
        server.wait()
        assert not [*uploads.rglob("*.png")]


def upload(client, file):
    return client.post("/gradio_api/upload", files={"files": ("mine.png", file)})


def show(client, path):
    """Ask the page to show a file of this machine -> what it answers."""
    calls = client.get("/config").json()["dependencies"]
    number = next(call["id"] for call in calls if call["api_name"] == "picture")
    data = [{"path": str(path), "meta": {"_type": "gradio.FileData"}}]
    body = {"data": data, "fn_index": number, "session_hash": "me"}
    assert client.post("/gradio_api/queue/join", json=body).status_code == 200
    return client.get("/gradio_api/queue/data?session_hash=me").text


@pytest.mark.slow
def test_the_server_refuses_other_sites_and_files_of_this_machine_and_huge_pictures(address, base):
    httpx = pytest.importorskip("httpx")
    allowed = "access-control-allow-origin"  # without it, a browser keeps an answer from a site
    with httpx.Client(base_url=address, timeout=60) as client:
        assert client.get("/").status_code == 200
        for site in ("http://evil.example", "null"):
            ask = {"Origin": site, "Access-Control-Request-Method": "POST"}
            assert allowed not in client.options("/gradio_api/queue/join", headers=ask).headers
            assert allowed not in client.get("/config", headers={"Origin": site}).headers
        body = {"data": [None, None]}
        assert client.post("/gradio_api/run/picture", json=body).status_code in (403, 404)
        for path in (base / "runs/a/model.safetensors", ROOT / "apps/demo.py", "/etc/passwd"):
            assert client.get(f"/gradio_api/file={path}").status_code in (403, 404)
        assert '"success":false' in show(client, ROOT / "apps/demo.py")
        for side, refused in ((4990, False), (5100, True)):
            file = io.BytesIO()
            Image.new("1", (side, side)).save(file, "PNG")
            answer = show(client, upload(client, file.getvalue()).json()[0])
            assert '"success":true' in answer and ("26 megapixels" in answer) == refused
        assert upload(client, bytes(demo.MOST_MB * 2**20 + 1)).status_code == 413


@pytest.fixture(scope="module")
def page(address):
    """The page in chromium, and the addresses that it asked for."""
    browsers = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("no chromium on this machine: apt install chromium")
    with browsers.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.asked = []
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(address)
        page.wait_for_selector("#mask img")
        yield page


def says(page, where, words, seconds=20):
    """Wait until these words are seen there."""
    end = time.time() + seconds
    while words not in (text := page.locator(where).inner_text()):
        assert time.time() < end, text
        time.sleep(0.1)


@pytest.mark.slow
def test_the_page_in_a_browser(page, tmp_path):
    tabs = {"Recognise": "similarity", "Tags": "apps.tags", "Drawn": "apps.segment"}
    tabs |= {"Pages": "--detect runs/a-det", "Mask": "pretrain.py --mask"}
    for name, words in tabs.items():
        assert name == "Mask" or not page.locator(f"#{name.lower()} code").count()  # not yet
        page.get_by_role("tab", name=name).first.click()
        says(page, f"#{name.lower()}", words)
    page.locator("#ratio input[type=number]").fill("0.5")
    page.locator("#ratio input[type=number]").press("Enter")
    says(page, "#mask", "8 of 16")
    page.get_by_role("radio", name="weights/toon").click()
    says(page, "#mask", "72 of 144")
    page.get_by_role("tab", name="Recognise").first.click()
    page.locator("#drawings button.thumbnail-item").nth(2).click()
    says(page, "#recognise", f"the picture: {[*demo.CHOSEN][2]}")
    for name in ("one.png", "two.png"):  # the second replaces the first
        own(tmp_path / name)
        page.locator("#file input[type=file]").set_input_files(tmp_path / name)
        says(page, "#recognise", f"the picture: {name}")
        assert page.locator("#drawings button.thumbnail-item").count() == len(demo.CHOSEN) + 1
    (tmp_path / "none.png").write_bytes(b"no picture")
    page.locator("#file input[type=file]").set_input_files(tmp_path / "none.png")
    says(page, "#said", "none.png can't be taken")
    says(page, "#recognise", "the picture: two.png")
    with page.expect_download() as saved:
        page.locator("#recognise img").first.click()
    assert Image.open(saved.value.path()).size == (128, 128)
    others = [x for x in page.asked if not x.startswith(("http://127.0.0.1", "data:", "blob:"))]
    assert not others, "the page asks for things from elsewhere"
