"""What a tracker is: it is told of a run's start, of every round and of the end, and writes that down somewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fedprompt.config.schema import Config
from fedprompt.tracking.drawn import Drawings
from fedprompt.tracking.metrics import Record


class Tracker:
    """A tracker that writes nothing; subclasses register with ``@tracker(name, about)`` and override what they need.

    It lives in the driver's process, which on Ray may be another machine's. What its functions raise ends the run with
    one line that names the tracker; the rounds before stay.

    Args:
        output: the run's folder.
        config: the whole configuration.
        resume_round: the last round that counts, where a run is resumed; ``None`` for a new one.
    """

    def __init__(self, output: Path, config: Config, resume_round: int | None) -> None:
        self.output, self.config, self.resume_round = output, config, resume_round
        self.drawings = Drawings(output)  # the run's figures; trackers of one run share them

    def start(self, class_counts: np.ndarray, class_names: Sequence[str], config_text: str) -> None:
        """Be told of the partition, training samples per client and class [N, K], and the configuration as YAML."""

    def round(self, record: Record, prompts: Mapping[str, Tensor]) -> None:
        """Be told of a round: its line of ``metrics.jsonl``, and the prompts {"prompt", "deep" or "pool": [..., D]}."""

    def finish(self, result: Mapping[str, Any]) -> None:
        """Be told of the end of the last round: the content of ``result.json``."""

    def close(self) -> None:
        """Let go of files and connections, after the last round or when a run stops early."""
