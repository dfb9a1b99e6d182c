"""Files that would keep a program busy for minutes, or take gigabytes, and files that only look so."""

import bz2
import gzip
import io
import lzma
import os
import struct
import sys
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from apps.segment import overlay
from common.train import UserError
from ingest import decode, files, pack, pictures, sources


def saved(kind, size=(40, 40), **more):
    file = io.BytesIO()
    Image.new("RGB", size, (200, 30, 60)).save(file, kind, **more)
    return file.getvalue()


def with_scans(more, between=b""):
    """A progressive JPEG whose last scan comes again and again."""
    data = saved("JPEG", progressive=True)
    scan = data[data.rfind(b"\xff\xda") : -2]
    return data[:-2] + (between + scan) * more + data[-2:]


def chunk(name, data=b""):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def with_parts(kind, count):
    """A picture with so many parts that say nothing, before its pixels."""
    data = saved(kind)
    place, part = {
        "PNG": (33, chunk(b"abCd")),
        "JPEG": (2, b"\xff\xe1\0\2"),
        "GIF": (data.find(b"\x2c"), b"\x21\xfe\1c\0"),
    }[kind]
    return data[:place] + part * count + data[place:]


BUSY = {  # a file: may it be read?
    "scans.jpg": (with_scans(200), False),
    "scans_behind_comments.jpg": (with_scans(200, b"\xff\xfe\0\4\xff\xd9"), False),
    "scans_behind_fill.jpg": (with_scans(200, b"\xff\1\xff\xff"), False),
    "many_comments.jpg": (with_scans(1, b"\xff\xfe\0\2" * 2000), False),
    "progressive.jpg": (with_scans(0), True),
    "markers_in_a_comment.jpg": (saved("JPEG", comment=b"\xff\xda\0\2" * 500), True),
    "a_video_behind.jpg": (saved("JPEG") + b"\xff\xda\0\2" * 500, True),
    **{f"parts.{kind}": (with_parts(kind, 20_000), False) for kind in ("PNG", "JPEG", "GIF")},
    **{f"few_parts.{kind}": (with_parts(kind, 50), True) for kind in ("PNG", "JPEG", "GIF")},
}


@pytest.mark.parametrize("name", BUSY)
def test_what_a_picture_costs_is_counted_before_it_is_decoded(name):
    data, fine = BUSY[name]
    if fine:
        assert decode.decode(data, 16, False)["images"].shape == (16, 16, 3)
    else:
        with pytest.raises(ValueError):
            decode.decode(data, 16, False)


def test_scans_count_by_the_pixels_that_they_go_over(monkeypatch):
    data = with_scans(20)
    decode.decode(data, 16, False)
    monkeypatch.setattr(decode, "MOST_WORK", 10 * 40 * 40)
    with pytest.raises(ValueError, match="times over"):
        decode.decode(data, 16, False)


@pytest.mark.parametrize("kind", ["WEBP", "PNG"])
def test_decoders_that_keep_copies_may_open_fewer_pixels(monkeypatch, kind):
    monkeypatch.setattr(decode, "MOST_PIXELS", {"WEBP": 1000})
    if kind == "WEBP":
        with pytest.raises(ValueError, match="too many for WEBP"):
            decode.open_picture(saved(kind))
    else:
        decode.open_picture(saved(kind))


def test_deep_grays_are_the_same_in_bands_of_rows():
    deep = np.random.default_rng(0).integers(0, 65536, (150, 9)).astype(np.uint16)
    got = np.array(decode.eight_bits(Image.fromarray(deep)))
    assert (got == np.uint8(255 * np.clip(np.float32(deep) / 65535, 0, 1) + 0.5)).all()
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


def header(name, size):
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


def member(name, data):
    return header(name, len(data)) + data + bytes(-len(data) % 512)


@pytest.mark.parametrize("form", PACKED)
def test_a_tar_is_unpacked_as_far_as_pictures_can_shrink(tmp_path, monkeypatch, form):
    monkeypatch.setattr(files, "most_unpacked", lambda path: 2**16 + 100 * os.path.getsize(path))
    good = member("a/1.png", saved("PNG"))
    (tmp_path / "good").write_bytes(PACKED[form](good + bytes(1024)))
    records, fetch, _ = sources.find(tmp_path / "good")
    assert [load() for _, load in fetch(records)] == [saved("PNG")]
    if form != "tar":
        for name, more in {
            "large": header("b.png", 2**22) + bytes(2**22),
            "many": b"".join(header(f"{i}.png", 0) for i in range(1000)),
        }.items():
            path = tmp_path / name
            path.write_bytes(PACKED[form](good + more + bytes(1024)))
            with pytest.raises(UserError, match="far more than its size"):
                sources.find(path)


def test_a_zip_whose_members_share_their_bytes_is_refused(tmp_path):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.png", bytes(2**20))
    data = file.getvalue()
    start, end = data.find(b"PK\1\2"), data.find(b"PK\5\6")
    entries = data[start:end] * 900
    tail = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 900, 900, len(entries), start, 0)
    path = tmp_path / "shared.zip"
    path.write_bytes(data[:start] + entries + tail)
    with pytest.raises(UserError, match="far more than it has"):
        sources.find(path)


# ---- tables, and the disk ------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["path,label,label", "file,class,Label", "path,x1,x1,y1,x2,y2"])
def test_a_table_with_two_columns_for_one_thing_is_refused(tmp_path, line):
    (tmp_path / "list.csv").write_text(f"{line}\na.png" + ",1" * line.count(",") + "\n")
    (tmp_path / "a.png").write_bytes(saved("PNG"))
    with pytest.raises(UserError, match="two columns for"):
        sources.find(tmp_path / "list.csv")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count blocks in other ways")
def test_thumbnails_have_their_room_on_the_disk_before_they_are_mapped(tmp_path, monkeypatch):
    """A map of a file with holes ends the process where the disk is full."""
    room = []

    def memmap(file, *args, **kwargs):
        room.append(512 * os.fstat(file.fileno()).st_blocks)
        return np.zeros(kwargs["shape"], np.uint8)

    monkeypatch.setattr(pack.np, "memmap", memmap)
    records = [sources.Record(str(i), i) for i in range(100)]
    data = saved("PNG")
    pack.near_duplicates(records, lambda some: ((r, lambda: data) for r in some), "group", tmp_path)
    assert room[0] >= 100 * 32 * 32
