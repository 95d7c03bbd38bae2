"""The kind ``full``: every weight of the backbone is trained, and travels."""

from __future__ import annotations

import threading

import numpy as np
from torch import nn
from torch.func import functional_call

from fedprompt.models.backbones.base import Backbone
from fedprompt.models.batch import Batch
from fedprompt.models.kinds.base import Features, PromptOptions, no_penalty
from fedprompt.models.kinds.registry import kind
from fedprompt.models.params import Params


@kind("full", "every weight of the backbone", rates={"adam": (5e-4, 3e-5), "sgd": (0.01, 1e-3)})
class FullFineTuning:
    """``backbone.{name}``: all weights of the backbone but its own head, starting at the pretrained values.

    The frozen backbone stays as it is: it only lends its structure. A batch runs with one set of weights, so clients
    train one after the other.
    """

    layer = 0
    needs_query = False
    fusable = False

    def __init__(self, backbone: Backbone, options: PromptOptions) -> None:
        self.backbone = backbone
        self._names = list(backbone.weights())
        self._of_thread = threading.local()

    def init(self, rng: np.random.Generator) -> Params:
        """Copy the pretrained weights; nothing is drawn."""
        weights = self.backbone.weights()
        return {f"backbone.{name}": weights[name].detach().to("cpu", copy=True) for name in self._names}

    def features(self, params: Params, batch: Batch) -> Features:
        """Compute the features of the batch's inputs with row 0 of the stacked params, whatever their group.

        In training there is one group; in evaluation all rows are the same params, expanded. Raises ValueError when
        there are several groups with rows of their own.
        """
        stacked = {name: params[f"backbone.{name}"] for name in self._names}
        if len(batch.counts) > 1 and any(value.stride(0) for value in stacked.values()):
            raise ValueError("prompt.kind 'full' takes one client at a time: its params are not fusable")
        weights = {f"module.{name}": value[0] for name, value in stacked.items()}
        features = functional_call(self._module(), weights, batch.given)
        return features, no_penalty(batch, features), None

    def _module(self) -> nn.Module:
        """This thread's own module: functional_call puts weights into it and takes them out again."""
        if not hasattr(self._of_thread, "module"):
            self._of_thread.module = self.backbone.hollow()
        module: nn.Module = self._of_thread.module
        return module
