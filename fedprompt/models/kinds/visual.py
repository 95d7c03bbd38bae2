"""The kind ``visual``: a picture added to the image's pixels; the backbone sees it from the outside alone."""

from __future__ import annotations

import numpy as np

from fedprompt.errors import InputError
from fedprompt.models.backbones.base import Backbone, ImageBackbone
from fedprompt.models.backbones.vit import to_pixels
from fedprompt.models.batch import Batch
from fedprompt.models.generator import init_generator, prompted
from fedprompt.models.kinds.base import Features, PromptOptions, no_penalty
from fedprompt.models.kinds.registry import kind
from fedprompt.models.params import Params


@kind("visual", "a picture that a small network adds to each image", head="prototypes", source="Oh et al., CVPR 2023")
class VisualPrompt:
    """``visual.*``: the generator of a prompt in the image (``models/generator.py``), trained through the backbone.

    The white box: a client has the backbone and its gradients. The black box is ``blackbox/client.py``.
    """

    layer = 0
    needs_query = False
    fusable = True

    def __init__(self, backbone: Backbone, options: PromptOptions) -> None:
        if not isinstance(backbone, ImageBackbone):
            raise InputError(
                "prompt.kind: 'visual' is added to images, and this backbone (backbone.name) takes none; allowed: "
                "none, prompt, deep, pool, adapter, lora, full"
            )
        self.backbone, self.options = backbone, options

    def init(self, rng: np.random.Generator) -> Params:
        return init_generator(rng, self.options.channels)

    def features(self, params: Params, batch: Batch) -> Features:
        (images,) = batch.given
        pixels = to_pixels(images.to(self.backbone.device), self.backbone.image_size, self.backbone.crop)
        pixels = prompted(params, pixels, batch, self.options.strength)
        features = self.backbone.features_from(self.backbone.embed_pixels(pixels), 0)
        return features, no_penalty(batch, features), None
