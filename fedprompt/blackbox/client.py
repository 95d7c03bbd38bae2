"""What a client has in the model's place: its own prompt generator, and a service to ask.

It answers what local training and prediction ask of a ``PromptedModel``, but for gradients: there are none.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.blackbox.service import Request, Service
from fedprompt.models.backbones.vit import to_pixels
from fedprompt.models.batch import Batch, Output
from fedprompt.models.generator import init_generator, prompted
from fedprompt.models.heads.classifier import HeadOptions
from fedprompt.models.heads.registry import make_head
from fedprompt.models.params import Params


@dataclass(frozen=True)
class ImageOptions:
    """How a client makes an image for the service: the size that it takes, and the size and strength of the prompt."""

    image_size: int
    crop: float
    channels: int
    strength: float


class ServedModel:
    """Prompted images go to ``service``; its scores are all that comes back. ``asking`` says who it is that asks."""

    device = torch.device("cpu")

    def __init__(self, service: Service, options: ImageOptions) -> None:
        self._service, self._options = service, options
        self.head = make_head(HeadOptions(kind="prototypes"))
        self._client, self._request, self._number = 0, (0,), 0

    def asking(self, client: int, request: Request) -> ServedModel:
        """The same for one client (or ``EVALUATION``), whose requests will be called (*request, 0), (*request, 1), …"""
        mine = copy.copy(self)
        mine._client, mine._request, mine._number = client, request, 0
        return mine

    def init(self, rng: np.random.Generator) -> Params:
        """Draw the generator's params at their start."""
        return init_generator(rng, self._options.channels)

    @torch.no_grad()
    def forward(self, params: Params, batch: Batch) -> Output:
        """Class scores [M, K] for stacked params {name: [G, ...]}; classes that a sample cannot have score -inf."""
        (raw,) = batch.given
        pixels = to_pixels(raw, self._options.image_size, self._options.crop)
        images = prompted(params, pixels, batch, self._options.strength)
        request = (*self._request, self._number)
        self._number += 1
        scores = torch.from_numpy(np.array(self._service.scores(self._client, images.numpy(), request)))
        if batch.mask is not None:
            scores = scores.masked_fill(~batch.mask, float("-inf"))
        return Output(scores, scores.new_zeros(len(batch.counts)), None)

    def losses(self, params: Params, batch: Batch) -> tuple[Tensor, Output]:
        """Each group's loss [G]: mean cross-entropy over its samples."""
        output = self.forward(params, batch)
        return batch.group_mean(F.cross_entropy(output.logits, batch.labels, reduction="none")), output
