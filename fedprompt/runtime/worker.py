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
from fedprompt.data import Split
from fedprompt.data.inputs import Inputs, Shared
from fedprompt.models.model import PromptedModel
from fedprompt.models.params import Params, size_in_bytes
from fedprompt.runtime.build import WorkerParts
from fedprompt.runtime.checked import calling, is_foreign
from fedprompt.seeding import Stream, generator

Sent = Inputs | Shared  # how inputs come to a worker


@dataclass(frozen=True)
class Facts:
    """What the driver must know of the model without holding it."""

    params: Params  # at their start
    full_model_bytes: int
    fusable: bool  # whether clients can train as one batch
    prepared: str  # what is prepared of every sample: the same text, the same features
    needs_query: bool  # whether the sample's feature is prepared
    needs_inputs: bool  # whether every step needs the inputs, unless tokens are kept
    token_bytes: int  # per sample at most, if tokens before block `prompt.layer` are kept


class Worker:
    """A frozen backbone and the methods that use it. Keeps nothing of any client from one call to the next.

    With a ``service`` there is no backbone: the model is asked, and each of its clients trains alone. Class prototypes
    are made of ``public`` samples, and prompts may be drawn like their tokens.
    """

    def __init__(
        self,
        parts: WorkerParts,
        threads: int,
        public: Split | None = None,
        service: Service | None = None,
    ) -> None:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("high")  # TF32 where a GPU has it
        self._parts, self._public, self._service = parts, public, service
        self._algorithm = parts.algorithm

    @cached_property
    def _model(self) -> PromptedModel:
        """Made when first asked for: as a Ray actor, only a method can fail in a way that tells the user why."""
        return self._parts.make_model(self._public)

    @cached_property
    def _served(self) -> ServedModel:
        """What is there in the model's place where it is a service."""
        return self._parts.make_served(self._service)

    def facts(self) -> Facts:
        """The params at their start, and sizes; InputError where something does not go together."""
        make_rule(self._parts.options)
        rng = generator(self._parts.seed, Stream.INIT)
        if self._service is not None:
            return _facts_of_served(self._served.init(rng), self._service)
        model = self._model
        params = model.init(rng)
        head = sum(value.numel() * 4 for name, value in params.items() if name.startswith("head."))
        kind = model.kind
        return Facts(
            params=params,
            full_model_bytes=model.backbone.bytes + head,
            fusable=kind.fusable and model.backbone.fusable,
            prepared=f"tokens before block {kind.layer}, query {kind.needs_query}",
            needs_query=kind.needs_query,
            needs_inputs=kind.layer < model.backbone.depth,
            token_bytes=token_bytes(model),
        )

    def prepare(self, examples: Examples, inputs: Sent, keep_tokens: bool) -> Examples:
        """Compute what the frozen backbone says about the inputs of examples; they are not in what it returns."""
        return replace(prepare(self._model, replace(examples, inputs=_here(inputs)), keep_tokens), inputs=None)

    def train(self, round: int, tasks: Sequence[Task], *data: Examples | Sent) -> list[Update]:
        """Train a group of clients together.

        ``data`` are prepared examples in the order of ``tasks`` and then, where every step needs them, their inputs.
        Returns what the method's ``aggregate`` needs of their updates, which may be their mean.
        """
        with calling(self._algorithm, "rule"):
            rule = self._algorithm.rule(self._parts.options, round)
        training = self._training(round, rule, self._algorithm.trains)
        model = self._model if self._service is None else self._served.asking(tasks[0].client, (round,))
        examples = _with_inputs(data, len(tasks))
        # Another package's rule is its method's; what fails in training with a rule of ours is no method's fault.
        with calling(self._algorithm, "training by its rule") if is_foreign(self._algorithm) else nullcontext():
            updates = train_group(model, tasks, examples, training)
        with calling(self._algorithm, "summarize"):
            return self._algorithm.summarize(updates)

    def personalize(self, tuning: Tuning, round: int, tasks: Sequence[Task], *data: Examples | Sent) -> list[Point]:
        """Let a group of clients go on tuning for themselves, each from its task's params, and score it on the way.

        ``data`` are prepared examples, as ``tune_group`` wants them, then, where every step needs them, their inputs.
        """
        options = replace(self._parts.options, optimizer=tuning.optimizer, lr=tuning.lr, prompt_lr=None)
        # with mu, and nothing that is personal: all that is tuned is pulled to what was sent
        pulled = FedProx(FedProxSettings(mu=tuning.pull), Setting(clients=1, cohort=1))
        tuning = replace(tuning, constants=self._algorithm.setting.constants)
        training = self._training(round, pulled.rule(options, round), tuning.moves)
        examples = _with_inputs(data, 2 * len(tasks) + 1)
        return tune_group(self._model, tasks, examples, replace(training, keep_epochs=True), tuning)

    def _training(self, round: int, rule: LocalRule, trains: Callable[[str], bool]) -> Training:
        return Training(
            rule=sharpness_aware(rule, self._parts.options.rho),
            batch_size=self._parts.batch_size,
            trains=trains,
            seed=self._parts.seed,
            round=round,
            domain_classes=self._parts.domain_classes,
        )

    def predict(
        self, params: Params, examples: Examples, inputs: Sent | None = None, request: Request = (0,)
    ) -> Predictions:
        """Predict a shard in its fixed batches; ``inputs`` where every step needs them.

        ``request`` is what a service is to call it: its own in every evaluation, the same when the call is repeated.
        """
        examples = replace(examples, inputs=_here(inputs))
        model = self._model if self._service is None else self._served.asking(EVALUATION, request)
        return predict(model, params, examples, self._parts.batch_size, self._parts.domain_classes)

    def predict_client(
        self,
        params: Params,
        indices: np.ndarray,
        inputs: Sent | None,
        *shards: Examples,
        request: Request = (0,),
    ) -> Predictions:
        """Predict the samples ``indices`` of a split, given as its shards, with a client's own params.

        ``inputs`` are those of ``indices``, where every step needs them.
        """
        return self.predict(params, take_from_shards(shards, indices), inputs, request)


def _facts_of_served(params: Params, service: Service) -> Facts:
    """One client after the other, with inputs in every step and nothing prepared."""
    size = service.model_bytes() + size_in_bytes(params)
    return Facts(params, size, fusable=False, prepared="", needs_query=False, needs_inputs=True, token_bytes=0)


def _with_inputs(data: Sequence[Examples | Sent], count: int) -> list[Examples]:
    """The first ``count`` of ``data``, examples, with the inputs that follow them, where they follow."""
    examples, inputs = data[:count], data[count:]
    if not inputs:
        return list(examples)
    return [replace(own, inputs=_here(theirs)) for own, theirs in zip(examples, inputs, strict=True)]


def _here(inputs: Sent | None) -> Inputs | None:
    return inputs.open() if isinstance(inputs, Shared) else inputs


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
