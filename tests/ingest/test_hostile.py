"""Files that would take gigabytes, and files that only look so."""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from apps.segment import overlay
from common.train import UserError
from ingest import decode, files, pictures, sources


def saved(kind, size=(40, 40), **more):
    file = io.BytesIO()
    Image.new("RGB", size, (200, 30, 60)).save(file, kind, **more)
    return file.getvalue()


def test_deep_grays_keep_their_range():
    deep = np.random.default_rng(0).integers(0, 65536, (150, 9)).astype(np.uint16)
    got = np.array(decode.eight_bits(Image.fromarray(deep)))
    assert (got == np.uint8(255 * (np.float32(deep) / 65535) + 0.5)).all()
    dark = Image.fromarray(np.full((4, 4), 200, np.uint16))
    assert np.array(decode.eight_bits(dark)).max() == 1  # 200 of 65535
    shares = np.full((4, 4), 0.5, np.float32)
    shares[0, 0] = np.nan
    assert np.unique(decode.eight_bits(Image.fromarray(shares))).tolist() == [0, 128]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF"])
def test_a_large_picture_is_reduced_where_it_stays_whole_and_that_is_told(
    tmp_path, monkeypatch, capsys, kind
):
    path = tmp_path / f"a.{kind.lower()}"
    path.write_bytes(saved(kind, (80, 40)))
    [(_, picture)] = pictures.whole_pictures([str(path)], [])
    assert picture.shape == (40, 80, 3) and not capsys.readouterr().err
    monkeypatch.setattr(decode, "MOST_WHOLE", 40 * 20)
    [(_, picture)] = pictures.whole_pictures([str(path)], [])
    assert picture.shape == (20, 40, 3) and "40 x 20" in capsys.readouterr().err


def test_an_overlay_has_the_picture_and_its_tint():
    random = np.random.default_rng(0)
    picture = random.integers(0, 256, (20, 30, 3), np.uint8)
    mask = random.random((20, 30)) > 0.5
    tinted = 0.35 * np.float32(picture) + 0.65 * np.float32([230, 159, 0])
    assert (overlay(picture, mask) == np.where(mask[..., None], picture, tinted).round()).all()


# ---- archives ------------------------------------------------------------------------------------

PACKED = {"tar": bytes, "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
PACKED["lzma"] = lambda data: lzma.compress(data, lzma.FORMAT_ALONE)


def write_archive(path, form, contents):
    if form == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in contents.items():
                archive.writestr(name, data)
        return
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    path.write_bytes(PACKED[form](file.getvalue()))


@pytest.mark.parametrize("form", [*PACKED, "zip"])
def test_an_archive_is_unpacked_as_far_as_pictures_can_shrink(tmp_path, monkeypatch, form):
    monkeypatch.setattr(files, "ROOM", 2**16)
    write_archive(tmp_path / "good", form, {"a/1.png": saved("PNG")})
    records, fetch, _ = sources.find(tmp_path / "good")
    assert [load() for _, load in fetch(records)] == [saved("PNG")]
    write_archive(tmp_path / "large", form, {"a.png": saved("PNG"), "b.png": bytes(2**22)})
    if form == "tar":
        assert len(sources.find(tmp_path / "large")[0]) == 2
    else:
        with pytest.raises(UserError, match="unpacks to more than .* MB; unpack it yourself"):
            sources.find(tmp_path / "large")
