"""Personalization: clients go on tuning for themselves, and every model on the way is scored twice.

L. Collins, S. Wu, S. Oh, K. C. Sim: Profit: Benchmarking Personalization and Robustness Trade-off in Federated Prompt
Tuning. 2023, arXiv 2310.04627. With w what client t is sent, and w_t(e) the same after e epochs of its own:

    personalization   accuracy of w_t(e) on the client's own test data
    robustness        accuracy of w_t(e) on a part of the global test set, the same for all clients
    pull              the loss gets μ/2 ‖w_t − w‖² (``algorithms/fedprox.py``)
    interpolation     (1 − λ) w + λ w_t(e) is scored as well
    averaging         (w_t(1) + … + w_t(e)) / e is scored as well: the mean of a trajectory's points, as in Izmailov et
                      al., Averaging Weights Leads to Wider Optima and Better Generalization, UAI 2018, arXiv 1803.05407
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from fedprompt.client.evaluate import predict
from fedprompt.client.examples import Examples
from fedprompt.client.tasks import Task, Training
from fedprompt.client.train import train_group
from fedprompt.models.model import PromptedModel
from fedprompt.models.params import HEAD, Params, weighted_mean

Trains = Literal["prompt", "prompt+head", "head"]


@dataclass(frozen=True)
class Tuning:
    """How every client goes on tuning, for how long, and which models besides its own are scored."""

    optimizer: str
    lr: float
    epochs: int
    trains: Trains
    pull: float = 0.0  # μ
    interpolation: tuple[float, ...] = ()  # λ
    averaging: bool = False
    constants: tuple[str, ...] = ()  # names of tensors that nobody tunes

    def moves(self, name: str) -> bool:
        """Whether the tensor called ``name`` is tuned; ``prompt`` stands for all but the head."""
        if name in self.constants:
            return False
        return ("head" if name.startswith(HEAD) else "prompt") in self.trains.split("+")


@dataclass(frozen=True)
class Scores:
    """One model on some samples; None where there are no samples."""

    accuracy: float | None
    loss: float | None


@dataclass(frozen=True)
class Point:
    """One of a client's models: after ``epoch`` epochs, ``share`` (λ) of the way from what was sent."""

    client: int
    epoch: int
    share: float
    averaged: bool  # the mean of the models at the ends of epochs, not the last of them
    personal: Scores
    robust: Scores


def tune_group(
    model: PromptedModel,
    tasks: Sequence[Task],
    data: Sequence[Examples],
    training: Training,
    tuning: Tuning,
) -> list[Point]:
    """Tune a group of n clients together, and score what each of them has been sent, and then has, after every epoch.

    ``data``: the clients' n training sets, their n test sets, and the samples on which robustness is measured.
    """
    train, tests, robust = data[: len(tasks)], data[len(tasks) : -1], data[-1]
    ends: list[tuple[Params, ...]] = [() for _ in tasks]
    if tuning.epochs:
        ends = [update.epochs for update in train_group(model, tasks, train, training)]

    def scored(params: Params, examples: Examples) -> Scores:
        if not len(examples):
            return Scores(None, None)
        said = predict(model, params, examples, training.batch_size, training.domain_classes)
        return Scores(said.accuracy, float(said.losses.mean()))

    points = []
    for task, test, of_client in zip(tasks, tests, ends, strict=True):
        start = scored(task.params, test), scored(task.params, robust)
        for epoch, share, averaged, params in models_on_the_way(task.params, of_client, tuning):
            both = start if params is task.params else (scored(params, test), scored(params, robust))
            points.append(Point(task.client, epoch, share, averaged, *both))
    return points


def models_on_the_way(
    sent: Params, ends: Sequence[Params], tuning: Tuning
) -> Iterator[tuple[int, float, bool, Params]]:
    """Epoch, λ, whether averaged, and params of every model that is scored; λ = 1, the client's own, is always there.

    ``ends`` are the tuned tensors after each epoch. At epoch 0 and at λ = 0 the params are ``sent`` itself.
    """
    sent_tuned = {name: value for name, value in sent.items() if tuning.moves(name)}
    for epoch in range(len(ends) + 1):
        for share in sorted({*tuning.interpolation, 1.0}):
            yield epoch, share, False, _between(sent, sent_tuned, ends[epoch - 1], share) if epoch else sent
        if tuning.averaging:
            yield epoch, 1.0, True, {**sent, **_mean(ends[:epoch])} if epoch else sent


def _between(sent: Params, sent_tuned: Params, own: Params, share: float) -> Params:
    if share == 0:
        return sent
    return {**sent, **{name: torch.lerp(value.to(own[name]), own[name], share) for name, value in sent_tuned.items()}}


def _mean(ends: Sequence[Params]) -> Params:
    return weighted_mean([{n: value.cpu() for n, value in end.items()} for end in ends], [1.0] * len(ends))
