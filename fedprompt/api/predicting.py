"""``fedprompt predict``: what a run's model says of image files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedprompt.api.models import Model
from fedprompt.data.sources.listing import is_clutter
from fedprompt.data.sources.pictures import ENDINGS, read_image
from fedprompt.errors import InputError

AT_ONCE = 256  # files that are in memory together


@dataclass(frozen=True)
class Prediction:
    """A file, the most probable class, and its probability."""

    file: str
    label: str
    probability: float

    def as_json(self) -> str:
        """The prediction as a line of JSON."""
        return json.dumps({"file": self.file, "label": self.label, "probability": round(self.probability, 6)})


def image_files(paths: Sequence[Path]) -> list[Path]:
    """The files that are given, and the images in folders and all folders below, sorted.

    Raises InputError where a path is not there, or a folder holds no image.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            below = (file for file in sorted(path.rglob("*")) if file.suffix.lower() in ENDINGS and file.is_file())
            found = [file for file in below if not any(map(is_clutter, file.relative_to(path).parts))]
            if not found:
                raise InputError(f"{path}: no image in it or below; allowed: files that end in {', '.join(ENDINGS)}")
            files += found
        elif not path.exists():
            raise InputError(f"{path}: no such file or folder; allowed: images, and folders of images")
        else:
            files.append(path)
    return files


def predictions(model: Model, files: Sequence[Path], refused: Callable[[str], None]) -> Iterator[Prediction]:
    """Predict files in their order; ``refused`` is told, in one line, of each that is no readable image."""
    square = model.config.data.name == "folder"
    for start in range(0, len(files), AT_ONCE):
        names: list[str] = []
        images: list[np.ndarray] = []
        for file in files[start : start + AT_ONCE]:
            try:
                images.append(read_image(file, square))
            except InputError as error:
                refused(str(error))
            else:
                names.append(str(file))
        labels, probabilities = model.predict(images)
        for name, label, shares in zip(names, labels, probabilities, strict=True):
            yield Prediction(name, label, float(shares.max()))
