"""The pictures of the web page: one for each width of a window."""

import shutil

import pytest
from conftest import ROOT, call
from PIL import Image

from lab import screenshots


@pytest.mark.slow
def test_a_picture_for_each_width(tmp_path):
    for package in ("gradio", "playwright"):
        pytest.importorskip(package)
    if not shutil.which("chromium"):
        pytest.skip("no chromium on this machine: apt install chromium")
    call("lab.screenshots", "--tab", "Pages", "--out", tmp_path, cwd=ROOT, check=0)
    pictures = [Image.open(tmp_path / name) for name in ("pages.png", "pages-390.png")]
    assert [picture.width for picture in pictures] == list(screenshots.WIDTHS)
