"""A method whose answers are checked, so that a mistake is one line that names the method, in the round it is made.

What its functions raise, an answer that no federation can use, and a state that is no longer finite come out as
MethodFailed. Nothing of it reaches a checkpoint: the last good state stays.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from torch import Tensor

from fedprompt.algorithms.base import Algorithm, Metrics, State
from fedprompt.client.tasks import Task, Update
from fedprompt.config.schema import Config
from fedprompt.errors import InputError, RunFailed
from fedprompt.failure import DETAILS, raised
from fedprompt.models.params import Params
from fedprompt.runtime import answers

RATES = ("lr", "mu")  # ends of the names of settings that are rates, or the weight of a pull


class MethodFailed(RunFailed):
    """A method cannot go on: one line that names it; ``details``: a traceback, where there is one."""

    def __init__(self, line: str, details: str = "") -> None:
        super().__init__(line)
        self.details = details


@contextmanager
def calling(algorithm: Algorithm, function: str) -> Iterator[None]:
    """Let what a method's function raises come out as MethodFailed; InputError and RunFailed speak for themselves."""
    try:
        yield
    except (InputError, RunFailed):
        raise
    except Exception as error:
        raise MethodFailed(f"{_who(algorithm)}: {function} raised {raised(error)}", traceback.format_exc()) from error


@contextmanager
def in_round(round: int, folder: Path) -> Iterator[None]:
    """Name the round of what is raised as MethodFailed, and the file in ``folder`` that has the traceback."""
    try:
        yield
    except MethodFailed as error:
        failed = getattr(error, "cause", None) or error  # from a worker it comes with a RayTaskError around it
        line = f"round {round}: {failed}"
        if failed.details:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / DETAILS).write_text(failed.details, encoding="utf-8")
            line += f"; all of it in {folder / DETAILS}"
        raise RunFailed(line) from error


class CheckedMethod:
    """What a federation asks of its method.

    ``start``: the params at their start, whose names, types and shapes the state's always have. ``clients``: how many
    clients hold data.
    """

    def __init__(self, algorithm: Algorithm, config: Config, start: Params, clients: int) -> None:
        self.unchecked, self._config, self._start, self._clients = algorithm, config, start, clients
        self.averaged_model, self.is_personal = algorithm.averaged_model, algorithm.is_personal

    @property
    def rates(self) -> str:
        """The keys that make numbers overflow where they are too large, with their values: the method's own first."""
        own, local = dict(self.unchecked.settings), self._config.local
        large = {f"algorithm.{name}": value for name, value in own.items() if name.endswith(RATES)}
        large |= {"local.lr": local.lr, "local.prompt_lr": local.prompt_lr}
        return ", ".join(f"{key} = {value:g}" for key, value in large.items())

    def init(self, rng: np.random.Generator) -> State:
        """The state before the first round."""
        with calling(self.unchecked, "init"):
            state = self.unchecked.init(self._start, rng)
        return self._checked("init", state, State(self._start))

    def cohort(self, state: State, round: int, rng: np.random.Generator) -> list[int]:
        """The clients of a round, as plain numbers; there may be none."""
        with calling(self.unchecked, "cohort"):
            chosen = list(self.unchecked.cohort(state, round, rng))
        self._demand("cohort", answers.fault_of_cohort(chosen, self._clients))
        return [int(client) for client in chosen]

    def epochs(self, epochs: int) -> float:
        """Local epochs of a round."""
        with calling(self.unchecked, "epochs"):
            answer = self.unchecked.epochs(epochs)
        self._demand("epochs", answers.fault_of_epochs(answer))
        return answer

    def broadcast(self, state: State, client: int) -> Params:
        """What a client starts from."""
        with calling(self.unchecked, "broadcast"):
            params = self.unchecked.broadcast(state, client)
        self._demand("broadcast", answers.fault_of_params(params, state.params))
        return params

    def task(self, state: State, client: int, epochs: float) -> Task:
        """One client's work in a round."""
        with calling(self.unchecked, "broadcast or send"):
            task = self.unchecked.task(state, client, epochs)
        self._demand("broadcast", answers.fault_of_params(task.params, state.params))
        self._demand("send", answers.fault_of_tensors(task.sent))
        return task

    def travelling(self, task: Task, update: Update) -> tuple[Params, Params]:
        """Tensors that one client's part in a round sends over the network."""
        with calling(self.unchecked, "travels or trains"):
            return self.unchecked.travelling(task, update)

    def aggregate(self, state: State, updates: Sequence[Update], rng: np.random.Generator) -> tuple[State, Metrics]:
        """The next state, complete and finite, and metrics."""
        try:
            with calling(self.unchecked, "aggregate"):
                after, metrics = self.unchecked.aggregate(state, updates, rng)
        except MethodFailed as error:
            if isinstance(error.__cause__, (FloatingPointError, OverflowError)):
                raise self._not_finite(str(error.__cause__)) from error
            raise
        self._demand("aggregate", answers.fault_of_metrics(metrics))
        metrics = {
            name: value.item() if isinstance(value, (Tensor, np.number)) else value for name, value in metrics.items()
        }
        return self._checked("aggregate", after, state), metrics

    def after_test(self, state: State, selected: np.ndarray | None) -> State:
        """The state that has been told which prompts served the test set."""
        with calling(self.unchecked, "after_test"):
            after = self.unchecked.after_test(state, selected)
        return self._checked("after_test", after, state)

    def warnings(self, metrics: Metrics) -> list[str]:
        """Lines that a user should read about a round in which something was aggregated."""
        with calling(self.unchecked, "warnings"):
            lines = self.unchecked.warnings(metrics)
        self._demand("warnings", answers.fault_of_lines(lines))
        return list(lines)

    def _checked(self, function: str, state: State, before: State) -> State:
        algorithm = self.unchecked
        self._demand(function, answers.fault_of_state(state, before, algorithm.resizes, algorithm.setting.clients))
        if name := answers.not_finite(state, before):
            raise self._not_finite(name)
        return state

    def _demand(self, function: str, fault: str) -> None:
        if fault:
            raise MethodFailed(f"{_who(self.unchecked)}: what {function} returned cannot be used: {fault}")

    def _not_finite(self, what: str) -> MethodFailed:
        """The line about numbers that left the range of a float."""
        return MethodFailed(
            f"{_who(self.unchecked)}: the server's state is no longer finite ({what}); probably too large: "
            f"{self.rates}; the state before this round is kept"
        )


def _who(algorithm: Algorithm) -> str:
    cls = type(algorithm)
    return f"method '{cls.name}'" + (f" ({cls.__module__}.{cls.__qualname__})" if is_foreign(algorithm) else "")


def is_foreign(algorithm: Algorithm) -> bool:
    """Whether a method comes from another package, or a notebook."""
    return not type(algorithm).__module__.startswith("fedprompt.")
