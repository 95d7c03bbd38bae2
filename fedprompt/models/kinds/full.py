"""The kind ``full``: every weight of the backbone is trained, and travels."""

from __future__ import annotations

import copy
import threading

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedprompt.models.backbones.vit import CLASSIFIER, Backbone
from fedprompt.models.batch import Batch
from fedprompt.models.kinds.base import Features, PromptOptions, no_penalty
from fedprompt.models.kinds.registry import kind
from fedprompt.models.params import Params


@kind("full", "every weight of the backbone", rates={"adam": (5e-4, 3e-5), "sgd": (0.01, 1e-3)})
class FullFineTuning:
    """``backbone.{name}``: all weights of the ViT but its own classifier, starting at the pretrained values.

    The frozen backbone stays as it is: it only lends its structure. A batch runs with one set of weights, so clients
    train one after the other.
    """

    layer = 0
    needs_query = False
    fusable = False

    def __init__(self, backbone: Backbone, options: PromptOptions) -> None:
        self.backbone = backbone
        self._names = [name for name, _ in backbone.vit.named_parameters() if not name.startswith(CLASSIFIER)]
        self._of_thread = threading.local()

    def init(self, rng: np.random.Generator) -> Params:
        """Copy the pretrained weights; nothing is drawn."""
        weights = dict(self.backbone.vit.named_parameters())
        return {f"backbone.{name}": weights[name].detach().to("cpu", copy=True) for name in self._names}

    def features(self, params: Params, batch: Batch) -> Features:
        """Compute the class features of the batch's images with row 0 of the stacked params, whatever their group.

        In training there is one group; in evaluation all rows are the same params, expanded. Raises ValueError when
        there are several groups with rows of their own.
        """
        stacked = {name: params[f"backbone.{name}"] for name in self._names}
        if len(batch.counts) > 1 and any(value.stride(0) for value in stacked.values()):
            raise ValueError("prompt.kind 'full' takes one client at a time: its params are not fusable")
        weights = {f"vit.{name}": value[0] for name, value in stacked.items()}
        features = functional_call(self._module(), weights, (batch.images,))
        return features, no_penalty(batch, features), None

    def _module(self) -> _ClassFeature:
        """This thread's own module: functional_call puts weights into it and takes them out again."""
        if not hasattr(self._of_thread, "module"):
            self._of_thread.module = _ClassFeature(self.backbone)
        return self._of_thread.module


class _ClassFeature(nn.Module):
    """Images to class features h(x) as one module without weights: a weight that is not given fails loudly."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        hollow = {id(w): nn.Parameter(torch.empty_like(w, device="meta"), False) for w in backbone.vit.parameters()}
        self.vit = copy.deepcopy(backbone.vit, hollow)
        self._backbone = copy.copy(backbone)
        self._backbone.vit = self.vit

    def forward(self, images: Tensor) -> Tensor:
        return self._backbone.class_feature(self._backbone.embed(images), 0)
