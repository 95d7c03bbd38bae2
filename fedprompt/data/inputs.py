"""What a sample is: ``Inputs``, n of what a backbone eats. Images here; texts bring a class of their own.

The rest of the code only takes samples by their indices, joins them, sends them and turns a batch into arrays. So a new
form (encoded files, token ids) is one class with these methods, and a backbone whose ``embed`` takes its arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from fedprompt.data.images import Handle

if TYPE_CHECKING:
    from typing_extensions import Self  # `typing` has it from Python 3.11 on

Index = np.ndarray | slice  # of integers


class Inputs(Protocol):
    """n samples of what a backbone eats. Taking some of them copies nothing; only ``arrays`` and ``copied`` do."""

    def __len__(self) -> int: ...

    def __getitem__(self, at: Index, /) -> Self:
        """The samples ``at``, none of them copied."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample, as far as all have the same; for messages and fingerprints."""

    def arrays(self) -> tuple[np.ndarray, ...]:
        """What the backbone's ``embed`` takes, each [n, ...], padded to one shape where samples differ."""

    def copied(self) -> Self:
        """The same samples and nothing else, in memory of their own."""

    def shared(self) -> Shared | None:
        """How another process of this host finds them; None where their memory was not made for that."""

    def hash_into(self, state: Hash) -> None:
        """Feed a digest with the samples' content, wherever they lie; ``shape`` is not in it."""

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """Put several of one class and shape one after the other."""


@runtime_checkable
class Shared(Protocol):
    """Inputs on their way to another process of this host."""

    def open(self) -> Inputs:
        """The inputs, none of them copied. Raises ``NotHere`` on another host."""


class Hash(Protocol):
    """What ``hashlib`` makes."""

    def update(self, data: bytes | memoryview, /) -> None: ...


@dataclass(frozen=True, eq=False)
class ImageInputs:
    """Images uint8 [N, H, W, 1 or 3], in memory or mapped; all of them, or those at ``indices`` (int [n])."""

    array: np.ndarray
    indices: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.array.ndim != 4 or self.array.shape[3] not in (1, 3) or self.array.dtype != np.uint8:
            raise ValueError(f"images must be uint8 [n, H, W, 1 or 3], not {self.array.dtype} {self.array.shape}")

    def __len__(self) -> int:
        return len(self.array if self.indices is None else self.indices)

    def __getitem__(self, at: Index, /) -> ImageInputs:
        """The images ``at``, none of them copied."""
        if self.indices is not None:
            return ImageInputs(self.array, self.indices[at])
        if isinstance(at, slice):
            return ImageInputs(self.array[at])
        return ImageInputs(self.array, at)

    @property
    def shape(self) -> tuple[int, ...]:
        """[H, W, channels]."""
        return self.array.shape[1:]

    def pixels(self) -> np.ndarray:
        """The images themselves, uint8 [n, H, W, channels]: a copy where they are picked by indices."""
        return self.array if self.indices is None else self.array[self.indices]

    def arrays(self) -> tuple[np.ndarray]:
        """``pixels`` alone."""
        return (self.pixels(),)

    def copied(self) -> ImageInputs:
        """The same images and nothing else, in memory of their own."""
        return ImageInputs(self.array.copy() if self.indices is None else self.array[self.indices])

    def shared(self) -> SharedImages | None:
        """Where another process of this host finds them; None for an array that ``images.empty`` did not make."""
        handle = Handle.of(self.array)
        if handle is None:
            return None
        return SharedImages(handle, np.arange(len(self)) if self.indices is None else self.indices)

    def hash_into(self, state: Hash) -> None:
        """Feed a digest with the pixels, image by image."""
        state.update(np.ascontiguousarray(self.pixels()).data)

    @classmethod
    def concatenate(cls, parts: Sequence[ImageInputs]) -> ImageInputs:
        """Put images of one size one after the other."""
        return cls(np.concatenate([part.pixels() for part in parts]))


@dataclass(frozen=True, eq=False)
class SharedImages:
    """``ImageInputs`` on their way to another process of this host."""

    handle: Handle
    indices: np.ndarray

    def open(self) -> ImageInputs:
        """The images, none of them copied. Raises NotHere on another host."""
        return ImageInputs(self.handle.open(), self.indices)


def gathered(parts: Sequence[Inputs], at: np.ndarray) -> Inputs:
    """The samples ``at`` (int [m]) of several parts that stand one after the other, in that order.

    Only these samples are copied, whatever the size of the parts.
    """
    if len(parts) == 1:
        return parts[0][at]
    part_of = np.searchsorted(np.cumsum([len(part) for part in parts]), at, side="right")
    starts = np.cumsum([0, *map(len, parts)])
    order = np.argsort(part_of, kind="stable")
    picked = [parts[i][at[part_of == i] - starts[i]] for i in np.unique(part_of)]
    joined: Inputs = type(picked[0]).concatenate(picked)
    return joined[np.argsort(order, kind="stable")]
