"""Two linear layers with dropout between them, as in PFPT's published study."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from fedprompt.models.batch import Batch
from fedprompt.models.heads.classifier import Head, init_layers, layer
from fedprompt.models.heads.registry import head
from fedprompt.models.params import Params


@head("mlp", "Linear(width, head.hidden), Dropout, Linear(head.hidden, classes)")
class MLP(Head):
    """Params ``head.1.*`` and ``head.2.*``: Linear(D, hidden) → Dropout → Linear(hidden, K)."""

    @property
    def dropped(self) -> int:
        """The hidden units, unless ``head.dropout`` is 0."""
        return self.options.hidden if self.options.dropout else 0

    def init(self, inputs: int, classes: int, rng: np.random.Generator) -> Params:
        return init_layers([inputs, self.options.hidden, classes], rng)

    def scores(self, params: Params, features: Tensor, batch: Batch) -> Tensor:
        x = layer(params, 1, batch.padded(features))
        return batch.unpadded(layer(params, 2, x if batch.keep is None else x * batch.keep))
