"""From a configuration to the objects that a run is made of. The one place that hands sections to the rooms below.

Whoever starts a run makes its data and its method here; a pool makes its workers' parts, and a black box's scorer. What
they start gets these ready and does not come back.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fedprompt.algorithms import registry
from fedprompt.algorithms.base import Algorithm, Setting
from fedprompt.blackbox.client import ImageOptions, ServedModel
from fedprompt.blackbox.http import HttpService
from fedprompt.blackbox.service import Scorer, Service
from fedprompt.client.examples import tensors
from fedprompt.client.rules.base import LocalOptions, ZerothOptions
from fedprompt.config.schema import Config
from fedprompt.data import Dataset, FederatedData, PartitionOptions, Split, federate, load
from fedprompt.data.inputs import ImageInputs
from fedprompt.errors import InputError
from fedprompt.models.backbones.base import Backbone, ImageBackbone, features_of
from fedprompt.models.backbones.compiled import compile_blocks
from fedprompt.models.heads.classifier import HeadOptions
from fedprompt.models.heads.prototypes import class_means, read_embeddings
from fedprompt.models.heads.registry import HEADS
from fedprompt.models.kinds import PromptOptions, make_kind
from fedprompt.models.model import PromptedModel, head_inputs, head_width, torch_device
from fedprompt.models.weights.named import load_backbone


@dataclass(frozen=True)
class WorkerParts:
    """What every worker of a run is made of: plain data, and functions that make the model where the worker is.

    A worker can be sent it, for instance as a Ray actor's argument.
    """

    algorithm: Algorithm
    options: LocalOptions
    batch_size: int
    seed: int
    domain_classes: np.ndarray | None  # classes that each domain has, bool [domains, K]
    make_model: Callable[[Split | None], PromptedModel]  # of the public images
    make_served: Callable[[Service], ServedModel]


def worker_parts(config: Config, data: FederatedData) -> WorkerParts:
    """Make what the workers of a run share."""
    return WorkerParts(
        algorithm=build_algorithm(config),
        options=local_options(config),
        batch_size=config.local.batch_size,
        seed=config.seed,
        domain_classes=data.domain_classes,
        make_model=partial(build_model, config, len(data.class_names)),
        make_served=partial(build_served, config),
    )


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
    if not isinstance(dataset.train.inputs, ImageInputs):
        return []
    height, width, _ = dataset.train.inputs.shape
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

    ``public``: the samples that prototypes are made of or prompts drawn like, where either is so.
    """
    backbone, wants = build_backbone(config), HEADS.get(config.head.kind).thing.wants_prototypes
    prototypes = build_prototypes(config, backbone, classes, public) if wants else None
    prompt = prompt_options(config, public)
    return PromptedModel(backbone, prompt, head_options(config), classes, prototypes)


def prompt_options(config: Config, public: Split | None = None) -> PromptOptions:
    """Settings of what is trained beside the head."""
    return PromptOptions(**config.prompt.model_dump(), public=None if public is None else public.inputs.arrays())


def head_options(config: Config) -> HeadOptions:
    """Settings of the classifier."""
    return HeadOptions(**config.head.model_dump(exclude={"personal", "shots", "embeddings"}))


def build_scorer(config: Config, classes: int, public: Split | None) -> Scorer:
    """The model that a service hides; in float32 unless told otherwise, for its clients live on small differences."""
    precision = "float32" if config.runtime.precision == "auto" else config.runtime.precision
    runtime = config.runtime.model_copy(update={"precision": precision})
    backbone = build_backbone(config.model_copy(update={"runtime": runtime}))
    if not isinstance(backbone, ImageBackbone):
        raise InputError(
            f"backbone.name: '{config.backbone.name}' takes no images, and a service is asked with "
            "images; allowed: one that takes them"
        )
    return Scorer(backbone, build_prototypes(config, backbone, classes, public), head_options(config))


def build_prototypes(config: Config, backbone: Backbone, classes: int, public: Split | None) -> Tensor:
    """Class prototypes [K, width]: from the file that the configuration names, else means over public samples.

    They lie where the head reads (``head.input``): among features, or in the space of the backbone's own head, which of
    CLIP is the joint space of images and texts.
    """
    head = head_options(config)
    width = head_width(backbone, head)
    if config.head.embeddings is not None:
        return read_embeddings(config.head.embeddings, classes, width, _other_width(backbone, head)).to(backbone.device)
    assert public is not None, "config.public_shots is positive for prototypes without a file"
    with torch.no_grad():
        read = head_inputs(backbone, head, features_of(backbone, tensors(public.inputs)))
    return class_means(read, torch.from_numpy(public.labels).to(read.device), classes)


def _other_width(backbone: Backbone, head: HeadOptions) -> str:
    """What embeddings of the other width would need, for a message: those of texts lie in the joint space."""
    if head.input == "logits":
        return f"; head.input=features reads {backbone.width}"
    return f"; head.input=logits reads {backbone.classes}" if backbone.classes else ""


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
    backbone = _load(config, device, autocast)
    if config.runtime.compile:
        compile_blocks(backbone)
    return backbone


def outline_backbone(config: Config) -> Backbone:
    """The backbone without memory for its weights (on torch's meta device), of which no file is read.

    Raises InputError where the kind does not go with it.
    """
    backbone = _load(config, torch.device("meta"), None)
    make_kind(backbone, prompt_options(config))
    return backbone


def _load(config: Config, device: torch.device, autocast: torch.dtype | None) -> Backbone:
    section = config.backbone
    return load_backbone(
        section.name, section.weights, section.image_size, crop=section.crop, device=device, autocast=autocast
    )


def frozen_features(config: Config, split: Split) -> np.ndarray:
    """Features float32 [n, D] of a split's samples, by the frozen backbone without prompts."""
    return features_of(build_backbone(config), tensors(split.inputs)).float().cpu().numpy()


def local_options(config: Config) -> LocalOptions:
    """Settings of the local optimizer."""
    gains = ZerothOptions(**config.blackbox.model_dump(exclude={"budget", "address"}))
    return LocalOptions(**config.local.model_dump(exclude={"epochs", "batch_size"}), zeroth=gains)


def _autocast(precision: str, device: torch.device) -> torch.dtype | None:
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return torch.bfloat16 if precision == "bfloat16" else None
