"""Images in Ray's object store, for as long as there is room for them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

import numpy as np
import ray


class ImageStore:
    """References to images: put when they are asked for, the least recently asked for let go beyond ``room`` bytes.

    What is let go stays in the object store as long as someone else holds the reference, and is put again when it is
    asked for again.
    """

    def __init__(self, room: float) -> None:
        self._room, self._held = room, 0
        self._known: OrderedDict[Hashable, tuple[ray.ObjectRef, int]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], np.ndarray]) -> ray.ObjectRef:
        """The reference to the images of ``key``, which ``make`` copies where they are not in the store."""
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key][0]
        images = make()
        while self._known and self._held + images.nbytes > self._room:
            _, (_, size) = self._known.popitem(last=False)
            self._held -= size
        reference = ray.put(images)
        if images.nbytes <= self._room:
            self._known[key] = reference, images.nbytes
            self._held += images.nbytes
        return reference
