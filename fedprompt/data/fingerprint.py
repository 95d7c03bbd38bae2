"""What identifies a data set: names, counts, and digests of labels and images, so that changed data is noticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedprompt.data.dataset import Dataset, Split
from fedprompt.data.inputs import Inputs

Fingerprint = dict[str, Any]  # plain values, as they stand in a checkpoint

SPLITS = ("train", "test")
SAMPLE_BYTES = 2**26  # of a split's images, at most: a tenth of a second; smaller splits are read whole
SHOWN = 3  # names in one line


def fingerprint(dataset: Dataset) -> Fingerprint:
    """Describe a data set before anything is left out of it; equal data sets have equal fingerprints everywhere.

    ``classes`` and ``domains`` are their names, ``train`` and ``test`` hold ``images`` (their number), ``shape``
    [H, W, channels], ``per_class`` counts and the digests ``labels`` (domains included) and ``content``. ``digest`` is
    that of all this. The folder that the files lie in plays no role.
    """
    found: Fingerprint = {"classes": list(dataset.class_names), "domains": list(dataset.domain_names)}
    for name in SPLITS:
        split: Split = getattr(dataset, name)
        found[name] = {
            "images": len(split),
            "shape": [int(size) for size in split.inputs.shape],
            "per_class": np.bincount(split.labels, minlength=len(dataset.class_names)).tolist(),
            "labels": _digest(split.labels, split.domains),
            "content": _content(split.inputs),
        }
    allowed = dataset.domain_classes
    found["domain_classes"] = None if allowed is None else _digest(np.asarray(allowed, dtype=bool))
    found["digest"] = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]
    return found


def summary(found: Fingerprint) -> dict[str, Any]:
    """What result.json tells of the data: the digest, and how many classes, domains and images there are."""
    counts = {name: len(found[name]) for name in ("classes", "domains")}
    return {"digest": found["digest"], **counts, **{name: found[name]["images"] for name in SPLITS}}


def change(before: Fingerprint, now: Fingerprint) -> str | None:
    """What differs between two data sets, the most telling thing first; None where nothing does."""
    if before == now:
        return None
    for name in ("classes", "domains"):
        if before[name] != now[name]:
            return _renamed(name, before[name], now[name])
    for name in SPLITS:
        if (told := _split_change(name, before[name], now[name], now["classes"])) is not None:
            return told
    return "which classes a domain has"


def _renamed(what: str, before: Sequence[str], now: Sequence[str]) -> str:
    gone = [name for name in before if name not in set(now)]
    new = [name for name in now if name not in set(before)]
    if not gone and not new:
        return f"the order of its {what}"
    told = [f"{verb} {_listed(names)}" for verb, names in (("without", gone), ("with the new", new)) if names]
    return f"its {what} ({len(before)} then, {len(now)} now: {', '.join(told)})"


def _split_change(name: str, before: dict[str, Any], now: dict[str, Any], classes: Sequence[str]) -> str | None:
    if before["per_class"] != now["per_class"]:
        counts = zip(classes, before["per_class"], now["per_class"], strict=True)
        differ = [f"'{label}' {then} then, {here} now" for label, then, here in counts if then != here]
        more = f" and {len(differ) - SHOWN} more classes" if len(differ) > SHOWN else ""
        images = f"{before['images']} images then, {now['images']} now"
        return f"its {name} split ({images}: {'; '.join(differ[:SHOWN])}{more})"
    if before["shape"] != now["shape"]:
        shapes = ("x".join(map(str, shape)) for shape in (before["shape"], now["shape"]))
        return "the size of its images in the {} split ({} then, {} now)".format(name, *shapes)
    for key, told in (("labels", "labels"), ("content", "content of the images")):
        if before[key] != now[key]:
            return f"the {told} in its {name} split"
    return None


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(f"'{name}'" for name in names[:SHOWN]) + more


def _digest(*arrays: np.ndarray) -> str:
    state = hashlib.sha256()
    for array in arrays:
        state.update(np.ascontiguousarray(array).data)
    return state.hexdigest()[:16]


def _content(inputs: Inputs) -> str:
    """Digest of all samples, or of evenly spaced ones up to ``SAMPLE_BYTES``."""
    each = max(1, int(np.prod(inputs.shape)))
    count = min(len(inputs), max(1, SAMPLE_BYTES // each))
    chosen = inputs if count == len(inputs) else inputs[np.linspace(0, len(inputs) - 1, count).astype(np.int64)]
    state = hashlib.sha256()
    chosen.hash_into(state)
    return state.hexdigest()[:16]
