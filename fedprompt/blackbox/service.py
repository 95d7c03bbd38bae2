"""The black box: a frozen backbone with class prototypes, which answers images with class scores.

What is public is all there is: no parameters, no gradients, no features. Every image of a request is a query. A request
is its client, its number and its images: one that is repeated, because its asker died over the answer, counts once, and
the same number with other images is another request.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.errors import InputError, OutOfBudget
from fedprompt.models.backbones.base import ImageBackbone
from fedprompt.models.heads.classifier import HeadOptions
from fedprompt.models.heads.prototypes import prototype_scores
from fedprompt.models.model import head_inputs

EVALUATION = -1  # who asks when a state is scored: counted apart from the clients
REMEMBERED = 2**17  # newest requests that a ledger knows again, of all clients together
Request = tuple[int, ...]  # the number of a client's request: the round's, then others


class Service(Protocol):
    """What a client knows of the model."""

    def scores(self, client: int, images: np.ndarray, request: Request) -> np.ndarray:
        """Log-probabilities float32 [n, K] of images float32 [n, 3, S, S] from 0 to 1, at the model's own size S.

        Raises OutOfBudget where these n queries are more than the client has left. Images that are not finite are not
        counted, and their scores are no numbers.
        """

    def counts(self) -> dict[int, int]:
        """Queries so far by client; those that score a state under ``EVALUATION``."""

    def model_bytes(self) -> int:
        """How large the model is that nobody has to be sent."""

    def resume(self, counts: Mapping[int, int]) -> None:
        """Go on from the counts of an earlier part of the same run."""


class Ledger:
    """Queries by client, within a budget for each, and one for ``evaluation``; may be used from several threads."""

    def __init__(self, budget: int | None = None, evaluation: int | None = None) -> None:
        self._budget, self._evaluation = budget, evaluation
        self._counts: dict[int, int] = {}
        self._seen: OrderedDict[tuple[int, Request, bytes], None] = OrderedDict()  # requests, the newest last
        self._lock = threading.Lock()

    def admit(self, client: int, images: int, request: Request, content: bytes) -> None:
        """Count a request of so many images, whose digest is ``content``, once.

        Counts nothing and raises OutOfBudget where the client's budget ends, InputError where that of evaluation does:
        a run that lacks a client's answers goes on, one that cannot be scored does not.
        """
        key = (client, request, content)
        with self._lock:
            if key in self._seen:
                self._seen.move_to_end(key)
                return
            asked = self._counts.get(client, 0)
            self._check_budget(client, asked, images)
            self._counts[client] = asked + images
            self._seen[key] = None
            if len(self._seen) > REMEMBERED:
                self._seen.popitem(last=False)

    def counts(self) -> dict[int, int]:
        """Queries so far by client."""
        with self._lock:
            return dict(self._counts)

    def resume(self, counts: Mapping[int, int]) -> None:
        """Go on from the counts of an earlier part of the same run: no count becomes less by this."""
        with self._lock:
            for client, count in counts.items():
                self._counts[client] = max(count, self._counts.get(client, 0))

    def _check_budget(self, client: int, asked: int, images: int) -> None:
        if client == EVALUATION:
            if self._evaluation is not None and asked + images > self._evaluation:
                raise InputError(
                    f"evaluation has asked {asked:,} queries; allowed: {self._evaluation:,}, as many as the rounds of "
                    "the configuration that is served can need (federation.rounds, federation.eval_every)"
                )
        elif self._budget is not None and asked + images > self._budget:
            raise OutOfBudget(
                f"client {client} has asked {asked:,} of its {self._budget:,} queries; {images:,} more are refused "
                "(blackbox.budget)"
            )


def digest(images: np.ndarray) -> bytes:
    """What identifies the content of a request: equal for equal images alone."""
    return hashlib.blake2b(np.ascontiguousarray(images).data.cast("B"), digest_size=32).digest()


def is_answerable(images: np.ndarray) -> bool:
    """Whether all pixels are numbers; those of a client whose training diverged are not, and nobody is asked."""
    return bool(np.isfinite(images).all())


def no_scores(images: np.ndarray, classes: int) -> np.ndarray:
    """The scores [n, K] of images that are no numbers: not numbers either."""
    return np.full((len(images), classes), np.nan, np.float32)


class Scorer:
    """The frozen model behind a service: prompted images in, log-probabilities out."""

    def __init__(self, backbone: ImageBackbone, prototypes: Tensor, head: HeadOptions) -> None:
        self._backbone, self._prototypes, self._head = backbone, prototypes, head

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Log-probabilities float32 [n, K] of images float32 [n, 3, S, S]."""
        pixels = torch.from_numpy(np.ascontiguousarray(images)).to(self._backbone.device)
        features = self._backbone.features_from(self._backbone.embed_pixels(pixels), 0)
        read = head_inputs(self._backbone, self._head, features)
        return F.log_softmax(prototype_scores(read, self._prototypes, self._head.scale), dim=1).cpu().numpy()

    @property
    def classes(self) -> int:
        """How many classes K there are."""
        return len(self._prototypes)

    @property
    def bytes(self) -> int:
        """Size of the model's weights."""
        return self._backbone.bytes


class LocalService:
    """The service in this process: every request is computed in its asker's own thread."""

    def __init__(self, scorer: Scorer, ledger: Ledger) -> None:
        self._scorer, self._ledger = scorer, ledger

    def scores(self, client: int, images: np.ndarray, request: Request) -> np.ndarray:
        """Count, then answer."""
        if not is_answerable(images):
            return no_scores(images, self._scorer.classes)
        self._ledger.admit(client, len(images), request, digest(images))
        return self._scorer(images)

    def counts(self) -> dict[int, int]:
        """Queries so far by client."""
        return self._ledger.counts()

    def model_bytes(self) -> int:
        """Size of the model's weights."""
        return self._scorer.bytes

    def resume(self, counts: Mapping[int, int]) -> None:
        """Go on from the counts of an earlier part of the same run."""
        self._ledger.resume(counts)
