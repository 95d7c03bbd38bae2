"""The hot loop: a group of clients trains together, because they share the frozen backbone.

Their batches are one batch for the backbone; prompts, heads and optimizer states are stacked [C, ...]. The gradient of
the summed losses is, row by row, each client's own gradient. Clients stand in order of their number of steps, longest
first, and leave from the end. One client is a group of one: there is no second code path.

From the first step to the last nothing is read back from the model's device and nothing is sent to it: data and all
steps' batches go there before, results come back after. So a GPU never waits for the host, nor the host for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fedprompt.client.batches import Feed
from fedprompt.client.examples import Examples
from fedprompt.client.rules.base import LocalRule, Slots
from fedprompt.client.tasks import Task, Training, Update, steps_of
from fedprompt.errors import OutOfBudget
from fedprompt.models.batch import Batch
from fedprompt.models.model import PromptedModel
from fedprompt.models.params import Params, row, stack, stack_present


def train_group(
    model: PromptedModel, tasks: Sequence[Task], data: Sequence[Examples], training: Training
) -> list[Update]:
    """Train a group of clients together and return their updates in the order of ``tasks``.

    Where the model is a service that refuses a client's request, that client (a service is asked by groups of one) ends
    with the steps that it has made; without any there is no update.
    """
    lengths = [steps_of(len(d), t.epochs, training.batch_size) for t, d in zip(tasks, data, strict=True)]
    order = sorted(range(len(tasks)), key=lambda i: (-lengths[i], i))
    updates = _train_sorted(model, [tasks[i] for i in order], [data[i] for i in order], training)
    if not updates:  # refused before the first step
        return []
    return [update for _, update in sorted(zip(order, updates, strict=True), key=lambda pair: pair[0])]


def _train_sorted(
    model: PromptedModel, tasks: Sequence[Task], data: Sequence[Examples], training: Training
) -> list[Update]:
    device = model.device
    feed = Feed(model, tasks, data, training)
    everything = stack([task.params for task in tasks], device)
    params = {name: value for name, value in everything.items() if training.trains(name)}
    fixed = {name: value for name, value in everything.items() if not training.trains(name)}
    sent, kept = (stack_present([getattr(task, of) for task in tasks], device) for of in ("sent", "kept"))
    slots = training.rule.start(params, sent, kept)
    left: list[tuple[Params, Params, Params]] = []  # stacked, of the clients that have left, the last ones first
    losses = torch.zeros(len(tasks), device=device)
    selected: Tensor | None = None
    ends: list[list[Params]] = [[] for _ in tasks]
    here, lengths = len(tasks), feed.lengths
    for step, active in enumerate(feed.active):
        if active < here:
            left.append(_leave(training.rule, params, slots, active, step))
            params, slots, fixed = _first(params, active), _first_slots(slots, active), _first(fixed, active)
            here = active
        oracle = GradientOracle(model, feed.batch(step), fixed, feed.opens_epoch(step), lambda: feed.rngs)
        try:
            params, slots, now = training.rule.step(params, slots, oracle)
        except OutOfBudget:
            if not step:
                return []
            lengths = [step] * len(tasks)
            break
        losses[:active] += now
        for i in feed.end_epoch(step) if training.keep_epochs else ():
            ends[i].append({name: value[i].clone() for name, value in params.items()})
        if oracle.selected is not None:
            if selected is None:
                selected = torch.zeros(len(tasks), oracle.selected.shape[1], dtype=torch.bool, device=device)
            selected[:active] |= oracle.selected
    left.append(_leave(training.rule, params, slots, 0, lengths[0]))
    totals = losses.tolist()
    selected = None if selected is None else selected.cpu()
    return [
        Update(
            client=task.client,
            samples=len(data[i]),
            steps=lengths[i],
            params={**task.params, **trained},
            selected=None if selected is None else selected[i].clone(),
            loss=totals[i] / lengths[i],
            reply=reply,
            kept=kept,
            epochs=tuple(ends[i]),
        )
        for i, (task, (trained, reply, kept)) in enumerate(zip(tasks, _each(left), strict=True))
    ]


def _leave(rule: LocalRule, params: Params, slots: Slots, stay: int, steps: int) -> tuple[Params, Params, Params]:
    """What the clients behind the first ``stay`` take away after ``steps`` steps: params, reply and kept, stacked."""
    reply, kept = rule.finish(params, slots, steps)
    # copies, which stay on the device for now: a view would hold on to the tensors of those who still train
    params, reply, kept = ({n: value[stay:].clone() for n, value in part.items()} for part in (params, reply, kept))
    return params, reply, kept


def _each(left: Sequence[tuple[Params, Params, Params]]) -> Iterator[tuple[Params, Params, Params]]:
    """What each client took away, on the CPU, the first client first."""
    for params, reply, kept in reversed(left):
        for i in range(len(next(iter(params.values())))):
            yield row(params, i), row(reply, i), row(kept, i)


class GradientOracle:
    """Losses and gradients of the current batches, for any rule (``client/rules/base.py``)."""

    def __init__(
        self,
        model: PromptedModel,
        batch: Batch,
        fixed: Params,
        opens_epoch: Tensor,
        rngs: Callable[[], Sequence[np.random.Generator]] = tuple,
    ) -> None:
        self._model, self._batch, self._fixed, self._rngs = model, batch, fixed, rngs
        self.opens_epoch = opens_epoch
        self.selected: Tensor | None = None  # bool [C, P], of the last question

    @property
    def rngs(self) -> Sequence[np.random.Generator]:
        """Each active client's own generator, for rules that draw."""
        return self._rngs()[: len(self._batch.counts)]

    def loss(self, params: Params) -> Tensor:
        """Each client's loss [C], without a gradient."""
        with torch.no_grad():
            losses, output = self._model.losses({**self._fixed, **params}, self._batch)
        self.selected = output.selected
        return losses

    def added(self, params: Params) -> tuple[Tensor | float, Params]:
        """Nothing is added to the loss."""
        return 0.0, {}

    def grad(self, params: Params) -> tuple[Tensor, Params]:
        """Each client's loss [C] and its gradient with respect to ``params``."""
        leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
        losses, output = self._model.losses({**self._fixed, **leaves}, self._batch)
        self.selected = output.selected
        grads = torch.autograd.grad(losses.sum(), list(leaves.values()))
        return losses.detach(), dict(zip(leaves, grads, strict=True))


def _first(params: Params, count: int) -> Params:
    return {name: value[:count] for name, value in params.items()}


def _first_slots(slots: Slots, count: int) -> Slots:
    return {name: _first(values, count) for name, values in slots.items()}
