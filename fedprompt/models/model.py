"""Backbone, trainable kind and head put together: params and a batch in, class scores out."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.errors import InputError
from fedprompt.models.backbones.base import Backbone
from fedprompt.models.batch import Batch, Output
from fedprompt.models.heads.classifier import HeadOptions
from fedprompt.models.heads.registry import make_head
from fedprompt.models.kinds import PromptOptions, make_kind
from fedprompt.models.params import HEAD, Params


class PromptedModel:
    """A frozen backbone with what is trained on it. Holds no trained tensor itself: those are ``Params`` from outside.

    ``prototypes`` [K, width] are for a head that wants them; for the width see ``head_width``.

    Raises InputError when kind or head do not go with this backbone (``make_kind``, ``head_width``).
    """

    def __init__(
        self,
        backbone: Backbone,
        prompt: PromptOptions,
        head: HeadOptions,
        classes: int,
        prototypes: Tensor | None = None,
    ) -> None:
        self._inputs = head_width(backbone, head)
        self.backbone, self.classes = backbone, classes
        self.device = backbone.device
        self.head = make_head(head, prototypes)
        self.kind = make_kind(backbone, prompt)

    def init(self, rng: np.random.Generator) -> Params:
        """Draw all params at their start: the head first, so that it starts alike under every kind."""
        head = self.head.init(self._inputs, self.classes, rng)
        if strange := [name for name in head if not name.startswith(HEAD)]:
            found = self.head.options.kind
            raise InputError(f"head.kind: '{found}' has params '{strange[0]}'; allowed: names that begin with '{HEAD}'")
        return {**self.kind.init(rng), **head}

    def forward(self, params: Params, batch: Batch) -> Output:
        """Class scores [M, K] for stacked params {name: [G, ...]}; classes that a sample cannot have score -inf."""
        features, penalty, selected = self.kind.features(params, batch)
        features = head_inputs(self.backbone, self.head.options, features)
        logits = self.head.scores(params, features, batch)
        if batch.mask is not None:
            logits = logits.masked_fill(~batch.mask, float("-inf"))
        return Output(logits, penalty, selected)

    def losses(self, params: Params, batch: Batch) -> tuple[Tensor, Output]:
        """Each group's loss [G]: mean cross-entropy over its samples plus the kind's penalty."""
        output = self.forward(params, batch)
        entropy = F.cross_entropy(output.logits, batch.labels, reduction="none")
        return batch.group_mean(entropy) + output.penalty, output


def head_width(backbone: Backbone, head: HeadOptions) -> int:
    """The width of what the head reads: features, or what the backbone's own head makes of them (``head.input``).

    Raises InputError where the head is to read logits of a backbone that has no head of its own.
    """
    if head.input == "logits" and not backbone.classes:
        raise InputError(
            "head.input: 'logits', but these weights (backbone.weights) have no classifier; allowed: features"
        )
    return backbone.classes if head.input == "logits" else backbone.width


def head_inputs(backbone: Backbone, head: HeadOptions, features: Tensor) -> Tensor:
    """What the head reads of features [M, D]: [M, ``head_width``]."""
    return backbone.logits(features) if head.input == "logits" else features


def torch_device(name: str = "auto") -> torch.device:
    """The device to compute on: the first GPU where there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
