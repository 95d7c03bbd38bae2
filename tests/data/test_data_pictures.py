"""Image files of every mode that Pillow knows: equal content gives equal pixels, or one line says what is wrong."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, TiffImagePlugin
from special_files import SPECIAL, make_special

from fedprompt.data.sources.pictures import SIDE, read_image, read_images
from fedprompt.errors import InputError

GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
COLOUR = np.stack([GREY, GREY.T, 255 - GREY], axis=2)
OPAQUE = np.full((8, 8), 255, dtype=np.uint8)


def grey_twins():
    """File name, image and what to save it with, of one and the same grey picture."""
    wide = GREY.astype(np.uint16) * 257
    image = Image.fromarray(GREY)
    palette = image.convert("P")
    alpha = Image.fromarray(np.dstack([GREY, OPAQUE]), "LA")
    white_is_zero = TiffImagePlugin.ImageFileDirectory_v2()
    white_is_zero[262] = 0
    return {
        "L": ("a.png", image, {}),
        "P": ("a.png", palette, {}),
        "GIF": ("a.gif", image, {}),
        "LA": ("a.png", alpha, {}),
        "LA TIFF": ("a.tiff", alpha, {}),
        "RGB": ("a.bmp", image.convert("RGB"), {}),
        "RGBX": ("a.tiff", image.convert("RGBX"), {}),
        "RGBA": ("a.webp", image.convert("RGBA"), {"lossless": True}),
        "16-bit PNG": ("a.png", Image.fromarray(wide), {}),
        "16-bit TIFF": ("a.tiff", Image.fromarray(wide), {}),
        "16-bit TIFF of the other byte order": ("a.tif", Image.fromarray(wide.astype(">u2")), {}),
        "16-bit PGM": ("a.pgm", Image.fromarray(wide), {}),
        "16-bit TIFF, white is zero": ("a.tiff", Image.fromarray(65535 - wide), {"tiffinfo": white_is_zero}),
        "shouted": ("A.PNG", image, {}),
        "another ending": ("a.jpg", image, {"format": "PNG"}),
    }


@pytest.mark.parametrize("twin", grey_twins())
def test_equal_content_gives_equal_pixels(tmp_path, twin):
    name, image, how = grey_twins()[twin]
    image.save(tmp_path / name, **how)
    np.testing.assert_array_equal(read_image(tmp_path / name), GREY[:, :, None].repeat(3, axis=2))


def png(bits, colour_type, rows, extra=b""):
    """A PNG file written by hand, as Pillow writes none of 16-bit colours."""

    def chunk(kind, content):
        body = kind + content
        return len(content).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    header = (8).to_bytes(4, "big") * 2 + bytes([bits, colour_type, 0, 0, 0])
    content = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", content) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("colour_type", "layers"),
    [(0, [GREY]), (2, [GREY] * 3), (4, [GREY, OPAQUE]), (6, [GREY, GREY, GREY, OPAQUE])],
    ids=["grey", "RGB", "LA", "RGBA"],
)
@pytest.mark.parametrize("bits", [8, 16])
def test_png_of_16_bits_equals_its_twin_of_8(tmp_path, colour_type, layers, bits):
    pixels = np.stack(layers, axis=2)
    pixels = (pixels.astype(np.uint16) * 257).astype(">u2") if bits == 16 else pixels
    (tmp_path / "a.png").write_bytes(png(bits, colour_type, pixels))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), GREY[:, :, None].repeat(3, axis=2))


def _in_mode(image, mode):
    if mode != "LAB":
        return image.convert(mode)
    spaces = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
    return ImageCms.profileToProfile(image, *spaces, outputMode="LAB")


def test_colours_of_every_colour_mode(tmp_path):
    image = Image.fromarray(COLOUR)
    for name, twin in {"a.png": image, "b.tiff": image.convert("CMYK"), "c.webp": image.convert("RGBA")}.items():
        twin.save(tmp_path / name, **({"lossless": True} if name == "c.webp" else {}))
        np.testing.assert_array_equal(read_image(tmp_path / name), COLOUR)
    for name, mode in {"d.jpg": "CMYK", "e.jpg": "YCbCr", "f.tiff": "LAB", "g.tiff": "YCbCr"}.items():
        flat = Image.new("RGB", (8, 8), (200, 120, 40))
        # Pillow 12.2 cannot read the uncompressed YCbCr TIFF that it writes.
        _in_mode(flat, mode).save(tmp_path / name, **({"compression": "tiff_lzw"} if name == "g.tiff" else {}))
        assert np.abs(read_image(tmp_path / name).astype(int) - (200, 120, 40)).max() < 6, name


def test_transparent_pixels_are_laid_on_white_whatever_hides_below_them(tmp_path):
    alpha = np.where(GREY > 100, 255, 0).astype(np.uint8)
    wanted = np.where(alpha[:, :, None] == 255, COLOUR, 255)
    for hidden in (0, 90):
        layers = np.dstack([np.where(alpha[:, :, None] == 255, COLOUR, hidden), alpha])
        for name in ("a.png", "a.tiff"):
            Image.fromarray(layers.astype(np.uint8)).save(tmp_path / name)
            np.testing.assert_array_equal(read_image(tmp_path / name), wanted)
    palette = Image.fromarray(GREY).convert("P")
    palette.save(tmp_path / "b.png", transparency=8)
    palette.save(tmp_path / "b.gif", transparency=8)
    Image.fromarray(GREY).save(tmp_path / "c.png", transparency=8)
    Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / "d.png", transparency=8 * 257)
    for name in ("b.png", "b.gif", "c.png", "d.png"):
        np.testing.assert_array_equal(read_image(tmp_path / name)[:, :, 0], np.where(GREY == 8, 255, GREY), name)


@pytest.mark.parametrize(
    ("name", "pixels", "mode"),
    [("a.tiff", GREY.astype(np.float32), "F"), ("a.tiff", GREY.astype(np.int32), "I"), ("a.pfm", None, "F")],
)
def test_pixels_whose_black_and_white_are_unknown_are_refused_by_their_mode(tmp_path, name, pixels, mode):
    if pixels is None:
        (tmp_path / name).write_bytes(b"Pf\n8 8\n-1.0\n" + GREY.astype(np.float32).tobytes())
    else:
        Image.fromarray(pixels).save(tmp_path / name)
    with pytest.raises(InputError, match=f"{name}: has pixels of mode '{mode}'"):
        read_image(tmp_path / name)


def test_of_several_images_in_a_file_the_first_is_read(tmp_path):
    first, second = Image.fromarray(GREY), Image.fromarray(255 - GREY)
    for name in ("a.gif", "a.tiff", "a.png", "a.webp"):
        how = {"lossless": True} if name == "a.webp" else {}
        first.save(tmp_path / name, save_all=True, append_images=[second], **how)
        np.testing.assert_array_equal(read_image(tmp_path / name)[:, :, 0], GREY, name)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(/tmp/never) (w) file\nshowpage\n"


@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize("content", [b"", b"\x89PNG", POSTSCRIPT, b"<svg/>", b"BM" + bytes(60), b"II*\0" + bytes(90)])
def test_every_file_that_is_not_read_has_a_reason(tmp_path, monkeypatch, content, square):
    monkeypatch.setattr("subprocess.Popen", None)  # Ghostscript would be started with it
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.png: no readable image.*\(\w.*\)$"):
        read_image(tmp_path / "a.png", square)


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_regular_file_is_refused(tmp_path, kind):
    make_special(kind, tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a\.png: (is|cannot be read)"):
        read_image(tmp_path / "a.png", square=True)


@pytest.mark.filterwarnings("error")
def test_a_header_that_promises_too_many_pixels_is_refused_unread(tmp_path):
    for size in (11_000, 40_000):
        content = io.BytesIO()
        Image.new("1", (size, size)).save(content, "PNG")
        (tmp_path / "a.png").write_bytes(content.getvalue()[:2000])
        with pytest.raises(InputError, match=r"a\.png: .*100,000,000"):
            read_images([tmp_path / "a.png"], square=True)


@pytest.mark.parametrize("shape", [(1, 50_000), (50_000, 1), (3, 20_000)])
def test_a_strip_is_cut_before_it_is_enlarged(tmp_path, monkeypatch, shape):
    width, height = shape
    ramp = np.arange(width * height).reshape(height, width) * 255 // (width * height)
    Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / "a.png")
    made = []
    resize = Image.Image.resize

    def watched(self, size, *how, **more):
        made.append(size)
        return resize(self, size, *how, **more)

    monkeypatch.setattr(Image.Image, "resize", watched)
    pixels = read_image(tmp_path / "a.png", square=True)
    assert made == [(SIDE, SIDE)]
    assert pixels.shape == (SIDE, SIDE, 3)
    assert np.abs(pixels.astype(int) - 127).max() <= 1  # the middle of the ramp
