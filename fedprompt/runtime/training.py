"""A cohort's part in a round: who answers, in which groups they train, and what of it can be aggregated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedprompt.algorithms.base import State
from fedprompt.client.tasks import Task, Update, steps_of
from fedprompt.config.schema import Config
from fedprompt.data import FederatedData
from fedprompt.errors import RunFailed
from fedprompt.models.params import is_finite, size_in_bytes
from fedprompt.runtime.attendance import attendance
from fedprompt.runtime.checked import CheckedMethod
from fedprompt.runtime.pool import Pool


class Training:
    """Trains cohorts on a pool."""

    def __init__(self, config: Config, algorithm: CheckedMethod, data: FederatedData, pool: Pool) -> None:
        self._config, self._algorithm, self._data, self._pool = config, algorithm, data, pool

    def train(self, state: State, round: int, cohort: Sequence[int]) -> tuple[list[Update], dict[str, Any]]:
        """The finite updates of a cohort in ascending order of clients, and what a record tells of the round.

        Clients that do not answer are sent their part, and train nothing. Raises RunFailed where too many diverge.
        """
        epochs = self._algorithm.epochs(self._config.local.epochs)
        steps = {client: self._steps(client, epochs) for client in cohort}
        there = attendance(self._config.federation, self._config.seed, round, steps)
        tasks = [self._algorithm.task(state, client, epochs) for client in cohort]
        size = self._config.runtime.group_size if self._pool.facts.fusable else 1
        groups = grouped([task for task in tasks if task.client in there.present], steps, size)
        trained = self._pool.train(round, groups) if groups else []
        updates = sorted((update for done in trained for update in done), key=lambda update: update.client)
        finite = [update for update in updates if is_finite({**update.params, **update.reply})]
        left_out = sorted({update.client for update in updates} - {update.client for update in finite})
        if len(left_out) > self._config.federation.max_lost * len(there.present):
            raise RunFailed(self._diverged(round, left_out, len(there.present)))
        absent = {"dropped": there.dropped, "late": there.late, "left_out": left_out}
        if self._config.is_blackbox:
            made = {update.client: update.steps for update in updates}
            absent["out_of_budget"] = [client for client in there.present if made.get(client, 0) < steps[client]]
        return finite, {**absent, "communication": self._communication(tasks, updates)}

    def _diverged(self, round: int, clients: Sequence[int], answered: int) -> str:
        return (
            f"round {round}: the params of clients {list(clients)}, {len(clients)} of {answered} that answered, became "
            f"infinite or not a number ({self._algorithm.rates}); "
            f"allowed by federation.max_lost: a share of {self._config.federation.max_lost:g}"
        )

    def _steps(self, client: int, epochs: float) -> int:
        return steps_of(int(self._data.sizes[client]), epochs, self._config.local.batch_size)

    def _communication(self, tasks: Sequence[Task], updates: Sequence[Update]) -> dict[str, int]:
        """Bytes of the tensors that travel: to all, and from those who answer, even where that turns out useless."""
        answers = {client: update for update in updates for client in update.clients}
        none = Update(client=-1, samples=0, steps=0, params={}, selected=None, loss=math.nan)
        pairs = [self._algorithm.travelling(task, answers.get(task.client, none)) for task in tasks]
        down, up = (sum(size_in_bytes(pair[way]) for pair in pairs) for way in (0, 1))
        return {"up_bytes": up, "down_bytes": down}


def grouped(tasks: Sequence[Task], steps: Mapping[int, int], size: int) -> list[list[Task]]:
    """Cut a cohort into groups of at most ``size``, fixed by the configuration and not by the workers.

    Longest first, each client joins the group with the fewest steps so far that has room; groups come back with
    the most work first, so that workers end at about the same time.
    """
    count = math.ceil(len(tasks) / size)
    groups: list[list[Task]] = [[] for _ in range(count)]
    for task in sorted(tasks, key=lambda task: (-steps[task.client], task.client)):
        open_ones = [group for group in groups if len(group) < math.ceil(len(tasks) / count)]
        min(open_ones, key=lambda group: sum(steps[t.client] for t in group)).append(task)
    return sorted((g for g in groups if g), key=lambda group: -sum(steps[task.client] for task in group))


def mean_loss(updates: Sequence[Update]) -> float | None:
    """Clients' mean losses by their samples; None where no update came."""
    return sum(u.loss * u.samples for u in updates) / sum(u.samples for u in updates) if updates else None


def warnings_of(updates: Sequence[Update], told: Mapping[str, Any]) -> list[str]:
    """What a user should read about the updates of a round; ``told``: what ``train`` tells of it."""
    lines = [f"left out clients {told['left_out']}: their params are not finite"] if told["left_out"] else []
    if told.get("out_of_budget"):
        lines.append(f"clients {told['out_of_budget']} have used up their queries")
    return lines if updates else [*lines, "no update came: the state stays as it was"]
