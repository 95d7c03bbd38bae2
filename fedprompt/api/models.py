"""A trained model as a torch module: images in, class names and probabilities out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fedprompt.algorithms.base import Algorithm
from fedprompt.client.evaluate import logits
from fedprompt.client.examples import Examples
from fedprompt.config.schema import Config
from fedprompt.data.inputs import ImageInputs
from fedprompt.data.sources.pictures import read_image, rgb
from fedprompt.errors import InputError, RunFailed, shown
from fedprompt.models.model import PromptedModel
from fedprompt.models.params import HEAD, Params
from fedprompt.runtime.build import build_algorithm, build_model, divided_data
from fedprompt.runtime.checkpoints.file import Checkpoint
from fedprompt.runtime.checkpoints.resuming import check_config, check_state, digests
from fedprompt.runtime.pool import public_split

Images = np.ndarray | Tensor | Sequence[Any]


class Model(nn.Module):
    """A frozen backbone with the prompts and the head of one round.

    ``classes`` are the names of the K classes, ``round`` is when it was trained, ``client`` whose it is (None: the
    global model). Trained tensors are buffers; ``params`` has them by their names.
    """

    def __init__(self, model: PromptedModel, params: Params, config: Config, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.inner, self.config, self.round = model, config, checkpoint.round
        self.client: int | None = None
        self.classes: tuple[str, ...] = tuple(checkpoint.origin.data["classes"]) if checkpoint.origin else ()
        for name, value in params.items():
            self.register_buffer(name.replace(".", "/"), value.to(model.device))
        self.eval()

    @property
    def params(self) -> Params:
        """The trained tensors by name."""
        return {name.replace("/", "."): value for name, value in self.named_buffers(recurse=False)}

    @torch.no_grad()
    def forward(self, images: Tensor | np.ndarray) -> Tensor:
        """Class scores [n, K] of uint8 images [n, H, W, 1 or 3], in batches of ``local.batch_size``.

        Where prompts of a pool are selected by batch, an image's scores depend on its batch, as in the run's own
        evaluation.
        """
        pixels = np.ascontiguousarray(images.cpu().numpy() if isinstance(images, Tensor) else images)
        none = np.zeros(len(pixels), dtype=np.int64)
        return logits(self.inner, self.params, Examples(none, none, ImageInputs(pixels)), self.config.local.batch_size)

    def predict(self, images: Images) -> tuple[list[str], np.ndarray]:
        """Class names and probabilities float32 [n, K] of images.

        Args:
            images: a uint8 array [n, H, W] or [n, H, W, 1 or 3], or a list of arrays, PIL images and paths of files.

        Every class is allowed, also where the data set joins several domains whose classes differ.
        Raises InputError for what is no image, RunFailed where the model's answer is no number.
        """
        arrays = _as_arrays(images, square=self.config.data.name == "folder")
        if not arrays:
            return [], np.zeros((0, len(self.classes)), dtype=np.float32)
        scores: list[Tensor | None] = [None] * len(arrays)
        for shape in dict.fromkeys(array.shape for array in arrays):  # images of one size go through together
            places = [i for i, array in enumerate(arrays) if array.shape == shape]
            for place, row in zip(places, self.forward(np.stack([arrays[i] for i in places])), strict=True):
                scores[place] = row
        probabilities = torch.stack([row for row in scores if row is not None]).softmax(1).cpu().numpy()
        if not np.isfinite(probabilities).all():
            raise RunFailed(f"the model of round {self.round} has diverged: its answers are no numbers")
        return [self.classes[i] for i in probabilities.argmax(1)], probabilities


def model_of(config: Config, checkpoint: Checkpoint, client: int | None) -> Model:
    """Put a checkpoint's global model, or a client's personal one, on the backbone that the run was made with.

    Raises InputError where configuration and checkpoint differ, or there is no such model.
    """
    if checkpoint.origin is None:
        raise InputError("round: the checkpoint is of version 0.1, which kept no names of classes; allowed: newer runs")
    check_config(checkpoint, config, digests(config), f"the checkpoint of round {checkpoint.round}")
    algorithm = build_algorithm(config)
    params = _params_of(config, algorithm, checkpoint, client)
    classes = len(checkpoint.origin.data["classes"])
    public = public_split(divided_data(config)) if config.public_shots else None
    model = build_model(config, classes, public)
    check_state(checkpoint, algorithm, params, config, f"the checkpoint of round {checkpoint.round}")
    made = Model(model, params, config, checkpoint)
    made.client = client
    return made


def _params_of(config: Config, algorithm: Algorithm, checkpoint: Checkpoint, client: int | None) -> Params:
    """The params that are scored: the global ones, or what a client starts its next round from."""
    state, name = checkpoint.state, config.algorithm.name
    personal = [tensor for tensor in state.params if algorithm.is_personal(tensor)]
    if client is None:
        heads_only = all(tensor.startswith(HEAD) for tensor in personal)
        if algorithm.averaged_model or (heads_only and len(personal) < len(state.params)):
            return state.params
        raise InputError(f"client: '{name}' trains a model per client and no global one; allowed: {_clients(config)}")
    if type(client) is not int or not 0 <= client < config.federation.clients:
        raise InputError(f"client: found {shown(client)}; allowed: {_clients(config)}, or None for the global model")
    if not personal:
        raise InputError(
            f"client: {client}, but '{name}' has one model for all clients; allowed: None, or a run with "
            "head.personal = true or a personal method"
        )
    return algorithm.broadcast(state, client)


def _clients(config: Config) -> str:
    return f"0 to {config.federation.clients - 1}"


def _as_arrays(images: Images, square: bool) -> list[np.ndarray]:
    """Each image as uint8 [H, W, 1 or 3]."""
    if isinstance(images, Tensor):
        images = images.cpu().numpy()
    if isinstance(images, (str, os.PathLike, Image.Image)):
        images = [images]
    return [_as_array(image, square) for image in images]


def _as_array(image: Any, square: bool) -> np.ndarray:
    if isinstance(image, (str, os.PathLike)):
        return read_image(Path(image), square)
    if isinstance(image, Image.Image):
        return rgb(image, square)
    array = np.asarray(image.cpu() if isinstance(image, Tensor) else image)
    array = array[..., None] if array.ndim == 2 else array
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] not in (1, 3) or not array.size:
        raise InputError(
            f"images: found an array of {array.dtype} {list(array.shape)}; allowed: uint8 [H, W] or [H, W, 1 or 3]"
        )
    return array
