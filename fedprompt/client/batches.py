"""What a group of clients trains on: every step's batches, planned beforehand and gathered on the model's device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fedprompt.client.examples import Examples, tensors, writable
from fedprompt.client.tasks import Task, Training, steps_of
from fedprompt.data.inputs import Inputs, gathered
from fedprompt.models.backbones.base import InputTensors, Tokens
from fedprompt.models.batch import Batch, groups_of
from fedprompt.models.heads.classifier import dropout_factors
from fedprompt.models.model import PromptedModel
from fedprompt.seeding import Stream, generator


def plan_batches(samples: int, epochs: float, batch_size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Indices of every step's batch: a fresh permutation per epoch, the last batch of an epoch as small as it falls."""
    steps = steps_of(samples, epochs, batch_size)
    batches: list[np.ndarray] = []
    while len(batches) < steps:
        order = rng.permutation(samples)
        batches += [order[start : start + batch_size] for start in range(0, samples, batch_size)]
    return batches[:steps]


class Feed:
    """The group's batches, step by step, from one set of arrays on the model's device."""

    def __init__(
        self, model: PromptedModel, tasks: Sequence[Task], data: Sequence[Examples], training: Training
    ) -> None:
        self._head, device = model.head, model.device
        plans = [
            plan_batches(len(d), t.epochs, training.batch_size, self._rng(training, Stream.BATCHES, t.client))
            for t, d in zip(tasks, data, strict=True)
        ]
        self.lengths = [len(plan) for plan in plans]
        self.steps = self.lengths[0]
        # how many clients still train at each step: they stand first
        self.active = [sum(length > step for length in self.lengths) for step in range(self.steps)]
        self._counts = [tuple(len(plan[step]) for plan in plans[:n]) for step, n in enumerate(self.active)]
        self._at, self._group, self._slot = self._all_batches(plans, [len(d) for d in data], device)
        self._per_epoch = np.array([steps_of(len(d), 1, training.batch_size) for d in data])
        self._opens = torch.from_numpy(np.arange(self.steps)[:, None] % self._per_epoch == 0).to(device)  # [steps, C]
        seeds = [self._rng(training, Stream.DROPOUT, t.client).integers(2**32) for t in tasks]
        self._seeds = torch.tensor(seeds, dtype=torch.int64, device=device)
        self._clients, self._training = [t.client for t in tasks], training
        self._data = Arrays(data, training.domain_classes, device)

    @cached_property
    def rngs(self) -> list[np.random.Generator]:
        """Each client's own generator for the whole round, made when a rule first asks for it."""
        return [self._rng(self._training, Stream.PERTURBATION, client) for client in self._clients]

    @staticmethod
    def _rng(training: Training, stream: Stream, client: int) -> np.random.Generator:
        return generator(training.seed, stream, training.round, client)

    def _all_batches(
        self, plans: Sequence[Sequence[np.ndarray]], samples: Sequence[int], device: torch.device
    ) -> Iterator[tuple[Tensor, ...]]:
        """Samples, groups and slots of each step's batch: cut from one table that goes to the device at once."""
        starts = np.cumsum([0, *samples])  # of the clients' samples, which lie one client after the other
        batches = [plan[step] + start for step, n in enumerate(self.active) for plan, start in zip(plans[:n], starts)]
        group, slot = groups_of(tuple(map(len, batches)), "cpu")  # groups counted through all steps
        sizes = [sum(counts) for counts in self._counts]
        group -= torch.from_numpy(np.cumsum([0, *self.active[:-1]]).repeat(sizes))
        table = torch.stack([torch.from_numpy(np.concatenate(batches)), group, slot]).to(device)
        return (column.split(sizes) for column in table)

    def opens_epoch(self, step: int) -> Tensor:
        """Which of the active clients are at the first batch of an epoch, bool [active]."""
        return self._opens[step, : self.active[step]]

    def end_epoch(self, step: int) -> list[int]:
        """Which of the active clients are at the last batch of an epoch."""
        return [i for i in range(self.active[step]) if (step + 1) % self._per_epoch[i] == 0]

    def batch(self, step: int) -> Batch:
        """The batches of all active clients at ``step``, as one."""
        counts, head, keep = self._counts[step], self._head, None
        if head.dropped:
            keep = dropout_factors(self._seeds[: len(counts)], step, max(counts), head.dropped, head.options.dropout)
        return self._data.batch(self._at[step], self._group[step], self._slot[step], counts, keep)


class Arrays:
    """Examples one after the other on the model's device, from which batches are gathered."""

    def __init__(self, parts: Sequence[Examples], domain_classes: np.ndarray | None, device: torch.device) -> None:
        inputs = [part.inputs for part in parts if part.inputs is not None]
        examples = Examples.concatenate([replace(part, inputs=None) for part in parts])

        def move(array: np.ndarray | None) -> Tensor | None:
            return None if array is None else torch.from_numpy(writable(array)).to(device)

        self._labels = torch.from_numpy(writable(examples.labels)).to(device)
        self._inputs = _Source(inputs, device) if len(inputs) == len(parts) else None
        tokens, self._query = move(examples.tokens), move(examples.query)
        self._tokens = None if tokens is None else Tokens(tokens, move(examples.token_mask))
        self._mask = None if domain_classes is None else move(domain_classes[examples.domains])

    def batch(self, at: Tensor, group: Tensor, slot: Tensor, counts: tuple[int, ...], keep: Tensor | None) -> Batch:
        """Gather samples ``at`` [M], each at place ``slot`` [M] of its ``group`` [M]; groups have ``counts`` samples.

        All three tensors are on the device already.
        """

        def pick(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.index_select(0, at)

        return Batch(
            counts=counts,
            group=group,
            slot=slot,
            labels=self._labels.index_select(0, at),
            mask=pick(self._mask),
            inputs=None if self._inputs is None else self._inputs.pick(at),
            tokens=None if self._tokens is None else self._tokens.index_select(at),
            query=pick(self._query),
            keep=keep,
        )


class _Source:
    """Inputs of several parts, one after the other: on a GPU as tensors, else where they lie, too large to copy."""

    def __init__(self, parts: Sequence[Inputs], device: torch.device) -> None:
        self._parts = parts
        self._on_gpu: InputTensors | None = None
        if device.type != "cpu":
            whole = gathered(parts, np.arange(sum(map(len, parts))))
            self._on_gpu = tuple(array.to(device) for array in tensors(whole))

    def pick(self, at: Tensor) -> InputTensors:
        """The inputs ``at`` [M], each array [M, ...]."""
        if self._on_gpu is not None:
            return tuple(array.index_select(0, at) for array in self._on_gpu)
        return tensors(gathered(self._parts, at.numpy()))
