"""What one worker can do, in this process or as a Ray actor: prepare features, train a group, predict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from fedprompt.algorithms.base import Setting
from fedprompt.algorithms.fedprox import FedProx, FedProxSettings
from fedprompt.blackbox.client import ServedModel
from fedprompt.blackbox.service import EVALUATION, Request, Service
from fedprompt.client.evaluate import Predictions, predict
from fedprompt.client.examples import Examples, prepare, token_bytes
from fedprompt.client.personal import Point, Tuning, tune_group
from fedprompt.client.rules.base import LocalRule
from fedprompt.client.rules.registry import make_rule
from fedprompt.client.rules.sam import sharpness_aware
from fedprompt.client.tasks import Task, Training, Update
from fedprompt.client.train import train_group
from fedprompt.config.schema import Config
from fedprompt.data import Split
from fedprompt.data.images import Images, SharedRows
from fedprompt.models.model import PromptedModel
from fedprompt.models.params import Params, size_in_bytes
from fedprompt.runtime.build import build_algorithm, build_model, build_served, local_options
from fedprompt.runtime.checked import calling, is_foreign
from fedprompt.seeding import Stream, generator

Sent = Images | SharedRows  # how images come to a worker


@dataclass(frozen=True)
class Facts:
    """What the driver must know of the model without holding it."""

    params: Params  # at their start
    full_model_bytes: int
    fusable: bool  # whether clients can train as one batch
    prepared: str  # what is prepared of every image: the same text, the same features
    needs_query: bool  # whether the image's class feature is prepared
    needs_images: bool  # whether every step needs the images, unless tokens are kept
    token_bytes: int  # per image, if tokens before block `prompt.layer` are kept


class Worker:
    """A frozen backbone and the methods that use it. Keeps nothing of any client from one call to the next.

    With a ``service`` there is no backbone: the model is asked, and each of its clients trains alone. Class prototypes
    are made of ``public`` images, and prompts may be drawn like their tokens.
    """

    def __init__(
        self,
        config: Config,
        classes: int,
        domain_classes: np.ndarray | None,
        threads: int,
        public: Split | None = None,
        service: Service | None = None,
    ):
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("high")  # TF32 where a GPU has it
        self._config, self._domain_classes = config, domain_classes
        self._classes, self._public, self._service = classes, public, service
        self._algorithm = build_algorithm(config)

    @cached_property
    def _model(self) -> PromptedModel:
        """Made when first asked for: as a Ray actor, only a method can fail in a way that tells the user why."""
        return build_model(self._config, self._classes, self._public)

    @cached_property
    def _served(self) -> ServedModel:
        """What is there in the model's place where it is a service."""
        return build_served(self._config, self._service)

    def facts(self) -> Facts:
        """The params at their start, and sizes; InputError where something does not go together."""
        make_rule(local_options(self._config))
        rng = generator(self._config.seed, Stream.INIT)
        if self._service is not None:
            return _facts_of_served(self._served.init(rng), self._service)
        model = self._model
        params = model.init(rng)
        head = sum(value.numel() * 4 for name, value in params.items() if name.startswith("head."))
        kind = model.kind
        return Facts(
            params=params,
            full_model_bytes=model.backbone.bytes + head,
            fusable=kind.fusable,
            prepared=f"tokens before block {kind.layer}, query {kind.needs_query}",
            needs_query=kind.needs_query,
            needs_images=kind.layer < model.backbone.depth,
            token_bytes=token_bytes(model),
        )

    def prepare(self, examples: Examples, images: Sent, keep_tokens: bool) -> Examples:
        """Compute what the frozen backbone says about the images of examples; they are not in what it returns."""
        return replace(prepare(self._model, replace(examples, images=_here(images)), keep_tokens), images=None)

    def train(self, round: int, tasks: Sequence[Task], *data: Examples | Sent) -> list[Update]:
        """Train a group of clients together.

        ``data`` are prepared examples in the order of ``tasks`` and then, where every step needs them, their images.
        Returns what the method's ``aggregate`` needs of their updates, which may be their mean.
        """
        with calling(self._algorithm, "rule"):
            rule = self._algorithm.rule(local_options(self._config), round)
        training = self._training(round, rule, self._algorithm.trains)
        model = self._model if self._service is None else self._served.asking(tasks[0].client, (round,))
        examples = _with_images(data, len(tasks))
        # Another package's rule is its method's; what fails in training with a rule of ours is no method's fault.
        with calling(self._algorithm, "training by its rule") if is_foreign(self._algorithm) else nullcontext():
            updates = train_group(model, tasks, examples, training)
        with calling(self._algorithm, "summarize"):
            return self._algorithm.summarize(updates)

    def personalize(self, tuning: Tuning, round: int, tasks: Sequence[Task], *data: Examples | Sent) -> list[Point]:
        """Let a group of clients go on tuning for themselves, each from its task's params, and score it on the way.

        ``data`` are prepared examples, as ``tune_group`` wants them, then, where every step needs them, their images.
        """
        options = local_options(self._config)
        options = replace(options, optimizer=tuning.optimizer, lr=tuning.lr, prompt_lr=None)
        # with mu, and nothing that is personal: all that is tuned is pulled to what was sent
        pulled = FedProx(FedProxSettings(mu=tuning.pull), Setting(clients=1, cohort=1))
        tuning = replace(tuning, constants=self._algorithm.setting.constants)
        training = self._training(round, pulled.rule(options, round), tuning.moves)
        examples = _with_images(data, 2 * len(tasks) + 1)
        return tune_group(self._model, tasks, examples, replace(training, keep_epochs=True), tuning)

    def _training(self, round: int, rule: LocalRule, trains: Callable[[str], bool]) -> Training:
        return Training(
            rule=sharpness_aware(rule, self._config.local.rho),
            batch_size=self._config.local.batch_size,
            trains=trains,
            seed=self._config.seed,
            round=round,
            domain_classes=self._domain_classes,
        )

    def predict(
        self, params: Params, examples: Examples, images: Sent | None = None, request: Request = (0,)
    ) -> Predictions:
        """Predict a shard in its fixed batches; ``images`` where every step needs them.

        ``request`` is what a service is to call it: its own in every evaluation, the same when the call is repeated.
        """
        examples = replace(examples, images=_here(images))
        model = self._model if self._service is None else self._served.asking(EVALUATION, request)
        return predict(model, params, examples, self._config.local.batch_size, self._domain_classes)

    def predict_client(
        self,
        params: Params,
        indices: np.ndarray,
        images: Sent | None,
        *shards: Examples,
        request: Request = (0,),
    ) -> Predictions:
        """Predict the samples ``indices`` of a split, given as its shards, with a client's own params.

        ``images`` are those of ``indices``, where every step needs them.
        """
        return self.predict(params, take_from_shards(shards, indices), images, request)


def _facts_of_served(params: Params, service: Service) -> Facts:
    """One client after the other, with images in every step and nothing prepared."""
    size = service.model_bytes() + size_in_bytes(params)
    return Facts(params, size, fusable=False, prepared="", needs_query=False, needs_images=True, token_bytes=0)


def _with_images(data: Sequence[Examples | Sent], count: int) -> list[Examples]:
    """The first ``count`` of ``data``, examples, with the images that follow them, where they follow."""
    examples, images = data[:count], data[count:]
    if not images:
        return list(examples)
    return [replace(own, images=_here(theirs)) for own, theirs in zip(examples, images, strict=True)]


def _here(images: Sent | None) -> Images | None:
    return images.open() if isinstance(images, SharedRows) else images


def take_from_shards(shards: Sequence[Examples], indices: np.ndarray) -> Examples:
    """Pick samples by their place in the concatenation of ``shards``, in the order of ``indices``."""
    starts = np.cumsum([0, *(len(shard) for shard in shards)])
    order = np.argsort(indices, kind="stable")
    parts = [
        shard.take(inside - start)
        for shard, start in zip(shards, starts[:-1], strict=True)
        if len(inside := indices[order][(indices[order] >= start) & (indices[order] < start + len(shard))])
    ]
    return Examples.concatenate(parts).take(np.argsort(order, kind="stable"))
