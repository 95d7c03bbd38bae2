"""The runs that a service knows: a bounded number of them, each with a ledger of its own."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from fedprompt.blackbox.service import EVALUATION, Ledger
from fedprompt.errors import InputError

WITHOUT_BUDGET = 64  # runs that are known where nobody has a budget


@dataclass(frozen=True)
class Limits:
    """What may be asked of a service: ``budget`` queries by each of ``clients`` in each of ``runs`` runs.

    ``evaluation`` is the budget of each run for scoring states, where clients have a budget.
    """

    clients: int
    budget: int | None
    evaluation: int
    runs: int


class Runs:
    """Ledgers by the names of runs.

    With a budget, the first ``limits.runs`` names are all that there will ever be: a ledger that made room for another
    one would give its clients a new budget. Without one there is nothing to evade, and the run that has been silent
    longest makes room.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._ledgers: OrderedDict[str, Ledger] = OrderedDict()  # the one that was asked last is last

    @property
    def have_budgets(self) -> bool:
        """Whether clients have budgets."""
        return self._limits.budget is not None

    def check(self, run: str, *clients: int) -> None:
        """Raise InputError where there is no room for the run, or one of these is no client of the federation."""
        limits = self._limits
        if limits.budget is not None and run not in self._ledgers and len(self._ledgers) == limits.runs:
            raise InputError(
                f"run {run}: one more than the {limits.runs} that this service gives a budget to; allowed: "
                "`fedprompt serve --runs N` with a larger N"
            )
        for client in clients:
            if not EVALUATION <= client < limits.clients:
                raise InputError(
                    f"client {client}: not in the federation that is served; allowed: 0 to {limits.clients - 1} "
                    f"(federation.clients), and {EVALUATION} for evaluation"
                )

    def ledger(self, run: str) -> Ledger:
        """The run's ledger, made when the run is new; InputError where there is no room for one more."""
        self.check(run)
        if run not in self._ledgers:
            if self._limits.budget is None and len(self._ledgers) == WITHOUT_BUDGET:
                self._ledgers.popitem(last=False)
            evaluation = None if self._limits.budget is None else self._limits.evaluation
            self._ledgers[run] = Ledger(self._limits.budget, evaluation)
        self._ledgers.move_to_end(run)
        return self._ledgers[run]

    def counts(self, run: str) -> dict[int, int]:
        """Queries so far by client; empty for a run that is not known, which does not become known by this."""
        return self._ledgers[run].counts() if run in self._ledgers else {}
