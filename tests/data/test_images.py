"""The bad-input table of the images: what is refused, in which words, and what is let through."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from llava_moslora.data import images
from llava_moslora.data.images import check_image, load_image
from llava_moslora.errors import Refusal

NOISE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    Image.fromarray(NOISE).save(folder / "deep" / "ok.png")
    return folder


def test_a_good_image(root):
    image = load_image("deep/ok.png", root)
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), NOISE)
    assert check_image("deep/ok.png", root) == (60, 40)
    assert load_image("deep/../deep/./ok.png", root).size == (60, 40)


@pytest.mark.parametrize("name", ["vg:1.png", "scan-2024-01-01T10:30:00.png", "C:x.png", "data:1.png", "vg:a/1.png"])
def test_a_name_with_a_colon_is_no_url(root, name):
    (root / name).parent.mkdir(exist_ok=True)
    Image.fromarray(NOISE).save(root / name)
    assert load_image(name, root).size == check_image(name, root) == (60, 40)


def png_header(width: int, height: int, colour: int = 2) -> bytes:
    """A PNG that claims a size, in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


NAMES = [
    # I1: an image that is missing
    (
        "I1",
        "nope.png",
        r"\[I-MISSING\] .*nope.png:record 3 id=x:image: there is no such image; .*check --image_folder",
    ),
    ("I1", "deep/ok.png/x", r"\[I-MISSING\]"),
    # I12: a name that leads out of the image folder
    ("I12", "/etc/passwd", r"\[I-PATH\] .*an absolute path outside --image_folder; found /etc/passwd"),
    ("I12", "../../x", r"\[I-PATH\] .*leads out of the image folder"),
    ("I12", "deep/../../x", r"\[I-PATH\] .*leads out of the image folder"),
    ("I12", "..\\..\\x", r"\[I-PATH\] .*relative name with forward slashes"),
    ("I12", "C:\\x.png", r"\[I-PATH\]"),
    ("I12", "a\0b", r"\[I-PATH\]"),
    ("I12", "x" * 5000, r"\[I-PATH\] .*not a valid file name"),
    # I14: a folder, pipe or device
    ("I14", "deep", r"\[I-FILE\] .*not a regular file; found d"),
    # I15: a URL
    ("I15", "http://host/x.png", r"\[I-PATH\] .*never from a URL; found http://host/x.png; fix: download"),
    ("I15", "file:///etc/passwd", r"\[I-PATH\] .*never from a URL"),
    ("I15", "data:image/png;base64,AAAA", r"\[I-PATH\] .*never from a URL"),
    ("I15", "S3://bucket/x.png", r"\[I-PATH\] .*never from a URL"),
    ("I15", "data:,AA;,", r"\[I-MISSING\]"),
    ("I15", "vg:nope.png", r"\[I-MISSING\] .*there is no such image; found vg:nope.png"),
    ("I15", "//host/share/x.png", r"\[I-PATH\] .*never from a URL"),
    # I16: control characters in a name
    ("I16", "no\nsuch\x1b[31m\u202egnp.png", r"\[I-MISSING\] .*no\\nsuch\\x1b\[31m\\u202egnp.png"),
]


@pytest.mark.parametrize(("case", "name", "message"), NAMES)
@pytest.mark.parametrize("function", [load_image, check_image])
def test_refused_names(root, function, case, name, message):
    with pytest.raises(Refusal, match=message) as refusal:
        function(name, root, record=3, record_id="x")
    assert (refusal.value.record, refusal.value.exit_status) == (3, 2)
    assert str(refusal.value).isprintable()


# I13: a symbolic link out of the image folder
def test_links(root, tmp_path):
    outside = tmp_path / "outside.png"
    outside.write_bytes((root / "deep/ok.png").read_bytes())
    (root / "out.png").symlink_to(outside)
    (root / "in.png").symlink_to(root / "deep/ok.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    (tmp_path / "alias").symlink_to(root)
    with pytest.raises(Refusal, match=r"\[I-PATH\] .*a symbolic link leads out .*--follow_image_links"):
        load_image("out.png", root)
    with pytest.raises(Refusal, match=r"\[I-"):
        load_image("loop.png", root)
    assert load_image("out.png", root, follow_links=True).size == (60, 40)
    assert load_image("in.png", root).size == (60, 40)
    assert load_image("deep/ok.png", tmp_path / "alias").size == (60, 40)


# I12: a name that leads out of the image folder
def test_an_absolute_name(root, tmp_path, monkeypatch):
    """Of an image inside the folder, however the two are written; the rules of links are those of relative names."""
    (tmp_path / "outside.png").write_bytes((root / "deep/ok.png").read_bytes())
    (root / "out.png").symlink_to(tmp_path / "outside.png")
    (tmp_path / "alias").symlink_to(root)
    monkeypatch.chdir(tmp_path)
    for folder in (root, "images", "alias", tmp_path / "alias"):
        for name in (root / "deep/ok.png", tmp_path / "alias/deep/ok.png", f"{root}/deep/../deep/ok.png"):
            assert load_image(str(name), folder).size == check_image(str(name), folder) == (60, 40)
    with pytest.raises(Refusal, match=r"nope.png:image: there is no such image"):
        check_image(str(root / "nope.png"), root)
    with pytest.raises(Refusal, match=r"\[I-PATH\] .*a symbolic link leads out .*--follow_image_links"):
        check_image(str(root / "out.png"), root)
    assert check_image(str(root / "out.png"), root, follow_links=True) == (60, 40)
    for name in (tmp_path / "outside.png", f"{root}/../outside.png", f"{root}s/x.png"):
        for follow in (True, False):
            with pytest.raises(Refusal, match=r"\[I-PATH\] image: an absolute path outside --image_folder; found "):
                check_image(str(name), root, follow_links=follow)


# I14: a folder, pipe or device (opening a pipe would block for ever)
def test_special_files(root):
    os.mkfifo(root / "pipe.png")
    with pytest.raises(Refusal, match=r"\[I-FILE\] .*not a regular file; found p"):
        load_image("pipe.png", root)
    with pytest.raises(Refusal, match=r"\[I-FILE\] .*found c"):
        load_image("null", "/dev")


def encoded(kind: str, image: Image.Image | None = None, **options: object) -> bytes:
    import io

    buffer = io.BytesIO()
    (image or Image.fromarray(NOISE)).save(buffer, kind, **options)
    return buffer.getvalue()


FILES = [
    # I2: an empty file, a text or an SVG
    ("I2", b"", r"\[I-FORMAT\] .*the file is empty"),
    ("I2", b"hello", r"\[I-FORMAT\] .*not an image in a known format; .*expected JPEG \| PNG \| WEBP"),
    ("I2", b"<svg xmlns='http://www.w3.org/2000/svg'/>", r"\[I-FORMAT\] .*not an image"),
    # I3: a truncated image
    ("I3", encoded("JPEG")[:-200], r"\[I-DECODE\] .*the image is damaged; found image file is truncated"),
    ("I3", encoded("PNG")[:-200], r"\[I-DECODE\] .*the image is damaged"),
    ("I3", encoded("JPEG")[:30], r"\[I-DECODE\] .*the image is truncated or damaged; fix: copy or download it again$"),
    ("I3", encoded("JPEG")[:300], r"\[I-DECODE\] .*the image is truncated or damaged; fix: copy or download it again$"),
    ("I3", encoded("WEBP")[:-200], r"\[I-DECODE\] .*the image is "),
    # I6: floating-point or 32-bit pixels
    ("I6", encoded("TIFF", Image.fromarray(NOISE[..., 0].astype(np.float32))), r"\[I-MODE\] .*floating-point pixels"),
    ("I6", encoded("TIFF", Image.fromarray(NOISE[..., 0].astype(np.int32))), r"\[I-MODE\] .*32-bit integer pixels"),
    # I9: 169 megapixels in a small file
    ("I9", png_header(13000, 13000), r"\[I-SIZE\] .*found 13000×13000 = 169 MP; expected at most 50 MP"),
    # I10: 400 megapixels
    ("I10", png_header(20000, 20000), r"\[I-SIZE\] .*too large"),
    # I11: an extreme aspect ratio
    (
        "I11",
        png_header(20000, 1),
        r"\[I-SHAPE\] .*the image is too narrow; found 20000×1; expected sides no more than 1:200",
    ),
    ("I11", png_header(1, 201), r"\[I-SHAPE\]"),
    # I17: a file format outside the allowed ones
    ("I17", encoded("EPS"), r"\[I-FORMAT\] .*not an image in a known format"),
    ("I17", encoded("PDF"), r"\[I-FORMAT\]"),
    ("I17", encoded("ICO"), r"\[I-FORMAT\]"),
    ("I17", b"SIMPLE  =                    T" + b" " * 2850, r"\[I-FORMAT\]"),  # FITS
]


@pytest.mark.parametrize(("case", "content", "message"), FILES)
@pytest.mark.filterwarnings("error")  # Pillow only warns of a decompression bomb
def test_refused_files(root, case, content, message):
    (root / "bad.png").write_bytes(content)
    with pytest.raises(Refusal, match=message):
        load_image("bad.png", root, record=3, record_id="x")
    if case not in ("I3",):  # the header alone shows it
        with pytest.raises(Refusal, match=message):
            check_image("bad.png", root)


GREY = Image.fromarray(NOISE[..., 0])
MODES = [
    ("L", GREY, (0, 0), [NOISE[0, 0, 0]] * 3),
    ("1", Image.new("1", (4, 4), 1), (0, 0), [255, 255, 255]),
    ("P", Image.new("RGB", (4, 4), (255, 0, 0)).convert("P"), (0, 0), [255, 0, 0]),
    ("RGBA, opaque", Image.new("RGBA", (4, 4), (9, 8, 7, 255)), (0, 0), [9, 8, 7]),
    ("RGBA, transparent: white", Image.new("RGBA", (4, 4), (9, 8, 7, 0)), (0, 0), [255, 255, 255]),
    ("LA, half", Image.new("LA", (4, 4), (0, 51)), (0, 0), [204, 204, 204]),
]


# I4: CMYK, grey, palette and alpha
@pytest.mark.parametrize(("mode", "image", "at", "colour"), MODES)
def test_modes(root, mode, image, at, colour):
    image.save(root / "mode.png")
    loaded = load_image("mode.png", root)
    assert loaded.mode == "RGB"
    assert list(loaded.getpixel(at)) == colour


# I4: CMYK, grey, palette and alpha
def test_palette_transparency_shows_white(root):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((0, 0), 0)
    image.save(root / "p.png", transparency=0)
    loaded = load_image("p.png", root)
    assert loaded.getpixel((0, 0)) == (255, 255, 255)
    assert loaded.getpixel((1, 1)) == (40, 50, 60)


# I4: CMYK, grey, palette and alpha
def test_cmyk(root):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(root / "c.jpg", quality=100)
    red, green, blue = load_image("c.jpg", root).getpixel((4, 4))
    assert red > 250
    assert green < 5
    assert blue < 5


# I5: 16-bit grey (Pillow's convert("RGB") clips nearly everything to white)
def test_sixteen_bit_grey_is_scaled(root):
    values = np.array([[0, 257, 25700, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(root / "deep.png")
    assert np.asarray(load_image("deep.png", root))[0].tolist() == [[v] * 3 for v in (0, 1, 100, 255)]


# I7: an animation
def test_first_frame_of_an_animation(root, caplog, monkeypatch):
    monkeypatch.setattr(images, "_animated_seen", False)
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for name in ("a.gif", "a.webp", "a.png"):
        options = {"lossless": True} if name.endswith("webp") else {}
        frames[0].save(root / name, save_all=True, append_images=frames[1:], **options)
        assert load_image(name, root).getpixel((0, 0)) == (255, 0, 0)
    assert caplog.text.count("animation") == 2  # both in the one warning
    assert len(caplog.records) == 1


# I8: an EXIF orientation
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(root, orientation):
    how = Image.Transpose
    undo = {2: how.FLIP_LEFT_RIGHT, 3: how.ROTATE_180, 4: how.FLIP_TOP_BOTTOM, 5: how.TRANSPOSE, 6: how.ROTATE_90,
            7: how.TRANSVERSE, 8: how.ROTATE_270}  # fmt: skip
    upright = Image.fromarray(NOISE)
    stored = upright if orientation == 1 else upright.transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(root / "o.png", exif=exif)
    assert np.array_equal(np.asarray(load_image("o.png", root)), NOISE)


# I17: a file format outside the allowed ones
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_allowed_formats_whatever_their_name(root, kind):
    (root / "x.dat").write_bytes(encoded(kind))
    assert load_image("x.dat", root).size == (60, 40)
