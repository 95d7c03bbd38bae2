"""From a configuration to the objects that a run is made of. The one place that hands sections to the rooms below."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fedprompt.algorithms import registry
from fedprompt.algorithms.base import Algorithm, Setting
from fedprompt.blackbox.client import ImageOptions, ServedModel
from fedprompt.blackbox.http import HttpService
from fedprompt.blackbox.service import Scorer, Service
from fedprompt.client.rules.base import LocalOptions, ZerothOptions
from fedprompt.config.schema import Config
from fedprompt.data import Dataset, FederatedData, PartitionOptions, Split, federate, load
from fedprompt.errors import InputError
from fedprompt.models.backbones.compiled import compile_blocks
from fedprompt.models.backbones.vit import Backbone
from fedprompt.models.heads.classifier import HeadOptions
from fedprompt.models.heads.prototypes import class_means, read_embeddings
from fedprompt.models.heads.registry import HEADS
from fedprompt.models.kinds import PromptOptions
from fedprompt.models.model import PromptedModel, torch_device
from fedprompt.models.weights.named import create_backbone


def build_data(config: Config) -> FederatedData:
    """Load the data set and make its federated view; for a pooled method one client then gets all training data."""
    federated = divided_data(config)
    if registry.get(config.algorithm.name).pooled:
        return replace(federated, clients=(np.arange(len(federated.train)),))
    return federated


def divided_data(config: Config) -> FederatedData:
    """Load the data set and make its federated view, in which every client has its own share under any method."""
    data, partition = config.data, config.partition
    options = partition.model_dump(exclude={"kind", "imbalance_factor"})
    dataset = load(data.name, data.root)
    federated = federate(
        dataset,
        clients=config.federation.clients,
        kind=partition.kind,
        options=PartitionOptions(**options),
        validation=data.validation,
        limit=data.limit,
        imbalance_factor=partition.imbalance_factor,
        seed=config.seed,
        shots=config.public_shots,
    )
    return replace(federated, notes=(*federated.notes, *_reduction(dataset, config.backbone.image_size)))


def _reduction(dataset: Dataset, image_size: int) -> list[str]:
    """Say in a line that images lose most of their pixels, where the shorter side shrinks to less than half."""
    height, width = dataset.train.images.shape[1:3]
    width, height = dataset.pixels or (width, height)
    if min(width, height) <= 2 * image_size:
        return []
    return [
        f"images of {width} x {height} pixels are reduced to {image_size} x {image_size} (backbone.image_size; "
        "a larger one sees more, and takes longer)"
    ]


def build_algorithm(config: Config) -> Algorithm:
    """Make the method that ``algorithm.name`` gives, with its settings."""
    cls = registry.get(config.algorithm.name)
    setting = Setting(
        clients=config.federation.clients,
        cohort=config.federation.cohort,
        top_k=config.prompt.top_k,
        pool_size=config.prompt.pool_size,
        rank=config.prompt.rank,
        personal_head=config.head.personal,
        constants=("query_proj",) if config.prompt.query == "frozen" else (),
    )
    return cls(cls.Settings.model_validate(config.algorithm.settings), setting)


def build_model(config: Config, classes: int, public: Split | None = None) -> PromptedModel:
    """Load the frozen backbone onto this process's device and put kind and head on it.

    ``public``: the images that prototypes are made of or prompts drawn like, where either is so.
    """
    backbone, wants = build_backbone(config), HEADS.get(config.head.kind).thing.wants_prototypes
    prototypes = build_prototypes(config, backbone, classes, public) if wants else None
    prompt = PromptOptions(**config.prompt.model_dump(), public=None if public is None else public.images)
    return PromptedModel(backbone, prompt, head_options(config), classes, prototypes)


def head_options(config: Config) -> HeadOptions:
    """Settings of the classifier."""
    return HeadOptions(**config.head.model_dump(exclude={"personal", "shots", "embeddings"}))


def build_scorer(config: Config, classes: int, public: Split | None) -> Scorer:
    """The model that a service hides; in float32 unless told otherwise, for its clients live on small differences."""
    precision = "float32" if config.runtime.precision == "auto" else config.runtime.precision
    runtime = config.runtime.model_copy(update={"precision": precision})
    backbone = build_backbone(config.model_copy(update={"runtime": runtime}))
    return Scorer(backbone, build_prototypes(config, backbone, classes, public), config.head.scale)


def build_prototypes(config: Config, backbone: Backbone, classes: int, public: Split | None) -> Tensor:
    """Class prototypes [K, D]: from the file that the configuration names, else means of public images' features."""
    if config.head.embeddings is not None:
        return read_embeddings(config.head.embeddings, classes, backbone.width).to(backbone.device)
    features = backbone.features(torch.from_numpy(public.images))
    return class_means(features, torch.from_numpy(public.labels).to(features.device), classes)


def build_remote(config: Config, classes: int) -> HttpService:
    """The service at ``blackbox.address``; InputError where there is none, or one for something else.

    A run is known there by a digest of all that does not change when it is resumed.
    """
    tree = config.model_dump(
        mode="json", exclude={"runtime": True, "tracking": True, "federation": {"rounds", "max_lost"}}
    )
    run = hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]
    service = HttpService(config.blackbox.address, run)
    service.check(classes, config.backbone.image_size, config.federation.clients)
    return service


def build_served(config: Config, service: Service) -> ServedModel:
    """What a client has in the model's place: no backbone is loaded for it."""
    backbone, prompt = config.backbone, config.prompt
    return ServedModel(service, ImageOptions(backbone.image_size, backbone.crop, prompt.channels, prompt.strength))


def build_backbone(config: Config) -> Backbone:
    """Load the frozen backbone onto this process's device.

    Raises InputError where blocks are to be compiled and there is no GPU.
    """
    device = torch_device()
    if config.runtime.compile and device.type != "cuda":
        raise InputError("runtime.compile: true needs a GPU, and torch finds none here; allowed: false")
    autocast = _autocast(config.runtime.precision, device)
    # on a CPU in bfloat16 and with few tokens, the backward pass of fused attention costs more than plain products
    torch.backends.cuda.enable_flash_sdp(device.type == "cuda" or autocast is None)
    backbone = Backbone(
        create_backbone(config.backbone.name, config.backbone.weights, config.backbone.image_size),
        config.backbone.image_size,
        crop=config.backbone.crop,
        device=device,
        autocast=autocast,
    )
    if config.runtime.compile:
        compile_blocks(backbone)
    return backbone


def features_of(config: Config, split: Split) -> np.ndarray:
    """Class features float32 [n, D] of a split's images, by the frozen backbone without prompts."""
    return build_backbone(config).features(torch.from_numpy(split.images)).float().cpu().numpy()


def local_options(config: Config) -> LocalOptions:
    """Settings of the local optimizer."""
    gains = ZerothOptions(**config.blackbox.model_dump(exclude={"budget", "address"}))
    return LocalOptions(**config.local.model_dump(exclude={"epochs", "batch_size"}), zeroth=gains)


def _autocast(precision: str, device: torch.device) -> torch.dtype | None:
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return torch.bfloat16 if precision == "bfloat16" else None
