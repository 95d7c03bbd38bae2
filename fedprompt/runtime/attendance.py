"""Clients that do not answer: some drop out of a round, some are too slow for its deadline.

Only the driver draws, from the run's seed, the round and the client: so the same clients are absent whoever trains the
others, and after a resume. The absent are sent the params, compute nothing here and send nothing back; what they keep
stays as it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from fedprompt.config.schema import FederationSection
from fedprompt.seeding import Stream, generator

LONGEST = 600.0  # logarithm of a slowness: any deadline is over by then, and e^710 overflows


@dataclass(frozen=True)
class Attendance:
    """A cohort, divided; each part in ascending order."""

    present: list[int]
    dropped: list[int]  # never answered
    late: list[int]  # would have answered after the deadline


def attendance(federation: FederationSection, seed: int, round: int, steps: Mapping[int, int]) -> Attendance:
    """Divide a cohort, given as {client: local steps}, by ``federation.dropout`` and ``federation.deadline``.

    A client takes steps × slowness, with a slowness of its own for the whole run: log-normal with median 1 and
    ``speed_spread`` as the standard deviation of its logarithm. The deadline is in multiples of the cohort's median.
    Slowness is counted from the cohort's median, so that no spread makes a time overflow.
    """
    cohort = sorted(steps)
    dropped = [c for c in cohort if generator(seed, Stream.ABSENCE, round, c).random() < federation.dropout]
    late = []
    if federation.deadline is not None and cohort:
        logs = {c: log_slowness(seed, c, federation.speed_spread) for c in cohort}
        middle = median(logs.values())
        times = {c: steps[c] * math.exp(min(log - middle, LONGEST)) for c, log in logs.items()}
        end = federation.deadline * median(times.values())
        late = [c for c in cohort if times[c] > end and c not in dropped]
    return Attendance([c for c in cohort if c not in dropped and c not in late], dropped, late)


def log_slowness(seed: int, client: int, spread: float) -> float:
    """Logarithm of the time that a client takes for one local step, where the median client takes 1."""
    return spread * generator(seed, Stream.SLOWNESS, 0, client).standard_normal()
