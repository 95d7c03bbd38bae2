"""One linear layer."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from fedprompt.models.batch import Batch
from fedprompt.models.heads.classifier import Head, init_layers, layer
from fedprompt.models.heads.registry import head
from fedprompt.models.params import Params


@head("linear", "Linear(width, classes)")
class LinearHead(Head):
    """Params ``head.1.weight`` and ``head.1.bias``."""

    def init(self, inputs: int, classes: int, rng: np.random.Generator) -> Params:
        return init_layers([inputs, classes], rng)

    def scores(self, params: Params, features: Tensor, batch: Batch) -> Tensor:
        return batch.unpadded(layer(params, 1, batch.padded(features)))
