"""Several data sets as one federation of several domains."""

from __future__ import annotations

import numpy as np
from PIL import Image

from fedprompt.data.dataset import Dataset, Split
from fedprompt.data.images import empty
from fedprompt.data.inputs import ImageInputs
from fedprompt.errors import InputError


def join(datasets: list[Dataset]) -> Dataset:
    """Join data sets: labels and domains shifted, class names ``name/class``, images of one size.

    Images are stretched (bilinear) to the largest height and width of all, grey ones repeated over three channels if
    any data set has colours. ``domain_classes`` is block-diagonal: a sample can only be of its own data set's classes.
    Raises InputError for anything but images.
    """
    others = [d.name for d in datasets if not isinstance(d.train.inputs, ImageInputs)]
    if others:
        raise InputError(f"data.name: '{others[0]}' is joined with others and has no images; allowed: sets of images")
    shapes = np.array([d.train.inputs.shape for d in datasets])
    height, width, channels = (int(n) for n in shapes.max(axis=0))
    class_starts = np.cumsum([0, *(len(d.class_names) for d in datasets)])
    domain_starts = np.cumsum([0, *(len(d.domain_names) for d in datasets)])
    allowed = np.zeros((domain_starts[-1], class_starts[-1]), dtype=bool)
    for i, d in enumerate(datasets):
        block = True if d.domain_classes is None else d.domain_classes
        allowed[domain_starts[i] : domain_starts[i + 1], class_starts[i] : class_starts[i + 1]] = block

    def joined(part: str) -> Split:
        splits = [getattr(d, part) for d in datasets]
        images = empty((sum(map(len, splits)), height, width, channels))
        for split, room in zip(splits, np.split(images, np.cumsum([len(split) for split in splits])[:-1])):
            room[:] = fit(split.inputs.pixels(), height, width, channels)
        return Split(
            ImageInputs(images),
            np.concatenate([split.labels + start for split, start in zip(splits, class_starts)]),
            np.concatenate([split.domains + start for split, start in zip(splits, domain_starts)]),
        )

    return Dataset(
        name="+".join(d.name for d in datasets),
        train=joined("train"),
        test=joined("test"),
        class_names=tuple(f"{d.name}/{name}" for d in datasets for name in d.class_names),
        domain_names=tuple(
            d.name if len(d.domain_names) == 1 else f"{d.name}/{name}" for d in datasets for name in d.domain_names
        ),
        domain_classes=allowed,
        notes=tuple(f"{d.name}: {note}" for d in datasets for note in d.notes),
    )


def fit(images: np.ndarray, height: int, width: int, channels: int) -> np.ndarray:
    """Return uint8 images [n, h, w, c] as [n, height, width, channels]; c is 1 or ``channels``."""
    if images.shape[1:3] != (height, width):
        resized = np.empty((len(images), height, width, images.shape[3]), dtype=np.uint8)
        for target, image in zip(resized, images):
            picture = Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image)
            target[:] = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR)).reshape(target.shape)
        images = resized
    return images if images.shape[3] == channels else np.repeat(images, channels, axis=3)
