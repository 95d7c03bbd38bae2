"""What a data set is to the rest of the project: inputs, and their labels and domains as plain arrays."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fedprompt.data.inputs import ImageInputs, Inputs


@dataclass(frozen=True, eq=False)
class Split:
    """n inputs, their labels int64 [n] and domains int64 [n] (zeros: one domain)."""

    inputs: Inputs
    labels: np.ndarray
    domains: np.ndarray

    def __post_init__(self) -> None:
        for name in ("labels", "domains"):
            array = getattr(self, name)
            if array.shape != (len(self.inputs),) or array.dtype != np.int64:
                raise ValueError(f"{name} must be int64 [{len(self.inputs)}], not {array.dtype} {array.shape}")

    @classmethod
    def of(cls, images: np.ndarray, labels: np.ndarray, domains: np.ndarray | None = None) -> Split:
        """Make a split from images [n, H, W] or [n, H, W, channels] and integer labels [n]; no domains: all zero."""
        images = images[..., None] if images.ndim == 3 else images
        labels = np.asarray(labels, dtype=np.int64)
        domains = np.zeros_like(labels) if domains is None else np.asarray(domains, dtype=np.int64)
        return cls(ImageInputs(np.ascontiguousarray(images)), labels, domains)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> Split:
        """Return contiguous copies of the samples at ``indices`` (int [m]), in that order."""
        indices = np.asarray(indices, dtype=np.int64)
        return Split(self.inputs[indices].copied(), self.labels[indices], self.domains[indices])


@dataclass(frozen=True, eq=False)
class View:
    """The samples ``indices`` (int64 [n]) of a split, in that order; its inputs stay where they are until taken."""

    split: Split
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    @cached_property
    def labels(self) -> np.ndarray:
        """Labels, int64 [n]."""
        labels: np.ndarray = self.split.labels[self.indices]
        return labels

    @cached_property
    def domains(self) -> np.ndarray:
        """Domains, int64 [n]."""
        domains: np.ndarray = self.split.domains[self.indices]
        return domains

    def inputs(self, indices: np.ndarray) -> Inputs:
        """The inputs at ``indices`` (int [m]) of this view, none of them copied."""
        return self.split.inputs[self.indices[indices]]

    def take(self, indices: np.ndarray) -> Split:
        """Return copies of the samples at ``indices`` (int [m]) of this view, in that order."""
        return self.split.take(self.indices[indices])


@dataclass(frozen=True, eq=False)
class Dataset:
    """A named training and test set.

    ``domain_classes`` (bool [domains, classes]) says which classes a sample of a domain may have; logits are masked
    by it. None: every domain has all classes. ``notes`` are lines for the user, such as what was not read. ``pixels``:
    median width and height of the image files, where they have been brought to another size.
    """

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]
    domain_names: tuple[str, ...] = ("all",)
    domain_classes: np.ndarray | None = None
    notes: tuple[str, ...] = ()
    pixels: tuple[int, int] | None = None
