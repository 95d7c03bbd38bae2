"""Features of the frozen backbone, remembered from one run to the next in the same process: for sweeps."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import fields

import numpy as np

from fedprompt.client.examples import Examples
from fedprompt.config.schema import Config


class FeatureMemory:
    """Prepared examples by what they were made of, the least recently used ones forgotten beyond ``megabytes``."""

    def __init__(self, megabytes: float) -> None:
        self._room = megabytes * 2**20
        self._known: OrderedDict[str, Examples] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, config: Config, what: str, raw: Examples, prepare: Callable[[], Examples]) -> Examples:
        """What ``prepare`` makes of ``raw`` (``what`` says which features) under this configuration, made only once."""
        key = _key(config, what, raw)
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
        made = prepare()
        with self._lock:
            self._known[key] = made
            while sum(map(_size, self._known.values())) > self._room and len(self._known) > 1:
                self._known.popitem(last=False)
        return made


def _key(config: Config, what: str, raw: Examples) -> str:
    """A digest of all that prepared examples depend on."""
    runtime = config.runtime
    settings = (config.backbone, runtime.precision, runtime.compile, runtime.cpus_per_worker, what)
    digest = hashlib.sha256(repr(settings).encode())
    if raw.inputs is not None:
        digest.update(f"{type(raw.inputs).__name__} {raw.inputs.shape} {len(raw)}".encode())
        raw.inputs.hash_into(digest)
    for array in (raw.labels, raw.domains):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _size(examples: Examples) -> int:
    held = (getattr(examples, f.name) for f in fields(examples))
    return sum(array.nbytes for array in held if isinstance(array, np.ndarray))
