"""Reading image files: what any of Pillow's modes means as 8-bit RGB, and which files are refused.

Equal content gives equal pixels, whatever the mode: 16-bit values keep their high byte (as Pillow does for colours),
transparent pixels are laid on white, and of a file with several images the first one is read.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fedprompt.data.images import empty
from fedprompt.errors import InputError
from fedprompt.files import open_regular

SIDE = 256  # a user's own images: shorter side resized to this, then the centre square of this size
ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # by content; for EPS Pillow would start Ghostscript
MOST_PIXELS = 100_000_000  # of one image, 300 MB as RGB
LONGEST = 16 * SIDE  # longer images are cut before they are resized: 1 x 400,000 pixels would become 256 x 10^8

_OPAQUE = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
_TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF


@dataclass(frozen=True, eq=False)
class Picture:
    """An image file's content: pixels uint8 [H, W, 3], its own width and height, and whether more images follow."""

    pixels: np.ndarray
    size: tuple[int, int]
    more: bool


def read_image(path: Path, square: bool = False) -> np.ndarray:
    """Return an image file as uint8 [H, W, 3], with ``square`` turned as it says and brought to ``SIDE``.

    InputError if it is damaged, too large, or of a mode that has no meaning in 8 bits.
    """
    return read_picture(path, square).pixels


def read_picture(path: Path, square: bool) -> Picture:
    """Read an image file as ``read_image`` does, with its size and whether it holds more images than the first."""
    with open_regular(path) as file:
        try:
            with Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise InputError(f"{path}: has {image.width:,} x {image.height:,} pixels; allowed: images of at"
                                     f" most {MOST_PIXELS:,}")  # fmt: skip
                upright = _upright(image, square, path)
                pixels = np.asarray(_centre_square(upright) if square else upright)
                more = image.format != "MPO" and getattr(image, "is_animated", False)  # MPO: a photo and its preview
                return Picture(pixels, upright.size, more)
        except InputError:
            raise
        except UnidentifiedImageError:
            reason = f"none of the formats {', '.join(FORMATS)}"
        except Image.DecompressionBombError:
            reason = f"more than {MOST_PIXELS:,} pixels"
        except MemoryError:
            reason = "not enough memory for it"
        except Exception as error:  # Pillow's decoders raise whatever a damaged file makes them stumble over
            reason = " ".join(str(error).split()) or type(error).__name__
    raise InputError(f"{path}: no readable image, truncated, damaged or of another format ({reason})")


def rgb(image: Image.Image, square: bool = False) -> np.ndarray:
    """Return an opened image as uint8 [H, W, 3], as ``read_image`` does with a file; InputError as there."""
    upright = _upright(image, square, Path("image"))
    return np.asarray(_centre_square(upright) if square else upright)


def _upright(image: Image.Image, square: bool, path: Path) -> Image.Image:
    """The image in mode RGB, with ``square`` turned as it says."""
    return _rgb(ImageOps.exif_transpose(image) if square else image, image, path)


def read_pictures(paths: Sequence[Path], square: bool = False) -> tuple[np.ndarray, list[Picture]]:
    """Return image files as uint8 [n, H, W, 3], and what else is known of each (its pixels are a row of the array).

    All must have the first one's size (or ``square`` makes it so); InputError names the first file that has not.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # images beyond MOST_PIXELS are refused
        return _read_all(paths, square)


def _read_all(paths: Sequence[Path], square: bool) -> tuple[np.ndarray, list[Picture]]:
    first = read_image(paths[0], square)
    images = empty((len(paths), *first.shape))

    def fill(i: int) -> Picture:
        picture = read_picture(paths[i], square)
        if picture.pixels.shape != first.shape:
            raise InputError(f"{paths[i]}: {picture.size[0]}x{picture.size[1]} pixels where the data set has"
                             f" {first.shape[1]}x{first.shape[0]}")  # fmt: skip
        images[i] = picture.pixels
        return Picture(images[i], picture.size, picture.more)

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return images, list(pool.map(fill, range(len(paths))))


def read_images(paths: Sequence[Path], square: bool = False) -> np.ndarray:
    """Return image files as uint8 [n, H, W, 3], as ``read_pictures``."""
    return read_pictures(paths, square)[0]


def _rgb(image: Image.Image, source: Image.Image, path: Path) -> Image.Image:
    """Return ``image``, which was read from the file ``source``, in mode RGB; InputError if its mode has no meaning."""
    if image.mode.startswith("I;16") or (image.mode == "I" and source.format in ("PNG", "PPM")):
        return _from_sixteen_bits(image, source).convert("RGB")
    if image.mode not in (*_OPAQUE, *_TRANSPARENT):
        raise InputError(f"{path}: has pixels of mode '{image.mode}', whose black and white are not known; allowed:"
                         " images of 8 bits or of 16 bits without a sign")  # fmt: skip
    if image.mode not in _TRANSPARENT and "transparency" not in image.info:
        return image.convert("RGB")
    key = image.info.get("transparency")
    if isinstance(key, tuple):  # 16-bit colours have lost their low bytes by now
        image.info["transparency"] = tuple(value >> 8 if max(key) > 255 else value for value in key)
    layers = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), layers).convert("RGB")


def _from_sixteen_bits(image: Image.Image, source: Image.Image) -> Image.Image:
    """Return 16-bit grey values as mode L: their high byte, of 12-bit ones the upper 8 bits; transparent ones white."""
    values = np.asarray(image).astype(np.int64)
    tags = getattr(source, "tag_v2", {})
    grey = values >> (4 if tags.get(_BITS_PER_SAMPLE) == (12,) else 8)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 255 - grey
    grey[values == image.info.get("transparency", -1)] = 255
    return Image.fromarray(grey.astype(np.uint8))


def _centre_square(image: Image.Image) -> Image.Image:
    """Resize the shorter side to ``SIDE`` (bilinear) and crop the centre."""
    scale = SIDE / min(image.size)
    width, height = (max(SIDE, round(n * scale)) for n in image.size)
    left, top = (width - SIDE) // 2, (height - SIDE) // 2
    if max(width, height) > LONGEST:
        across, down = image.width / width, image.height / height
        return image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=(
            left * across, top * down, min((left + SIDE) * across, image.width), min((top + SIDE) * down, image.height)
        ))  # fmt: skip
    return image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + SIDE, top + SIDE))
