"""A run in TensorBoard: scalars in tidy groups, histograms of prompts, figures, text and the projector."""

from __future__ import annotations

import io
import threading
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tensorboard.plugins.projector import ProjectorConfig, visualize_embeddings
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from fedprompt.tracking.files import write_atomic
from fedprompt.tracking.metrics import Record
from fedprompt.tracking.plots import pixels

BINS = 64


class TensorBoard:
    """Writes one event file into ``folder``.

    Args:
        folder: event files of an earlier run in it are deleted, unless the run is resumed.
        resume_round: last round that counts; TensorBoard hides what earlier event files say of later rounds.
    """

    def __init__(self, folder: Path, resume_round: int | None = None):
        _hush_writing_threads()
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        if resume_round is None:
            for old in self._folder.glob("events.out.tfevents.*"):
                old.unlink()
        self._writer = SummaryWriter(str(folder), purge_step=None if resume_round is None else resume_round + 1)

    def scalars(self, record: Record) -> None:
        """Write all numbers of a round's record (None is left out), its per-class accuracy and its warnings."""
        round = record["round"]
        for tag, value in scalar_tags(record).items():
            self._writer.add_scalar(tag, value, round)
        for split in ("validation", "test"):
            classes = [value for value in record.get(split, {}).get("per_class") or [] if value is not None]
            if classes:
                self._histogram(f"per_class_accuracy/{split}", torch.tensor(classes), round)
        if record.get("warnings"):
            self.text("warnings", "\n\n".join(record["warnings"]), round)

    def prompts(self, round: int, prompts: Mapping[str, Tensor]) -> None:
        """Write a histogram of each tensor's finite values."""
        for name, values in prompts.items():
            self._histogram(f"prompts/{name}", values, round)

    def figure(self, tag: str, figure: Figure, round: int) -> None:
        """Write a figure as an image."""
        self._writer.add_image(tag, pixels(figure), round, dataformats="HWC")

    def text(self, tag: str, text: str, round: int) -> None:
        """Write Markdown text."""
        self._writer.add_text(tag, text, round)

    def projector(self, pools: Mapping[int, np.ndarray]) -> None:
        """Show the prompts of all given rounds, {round: [P, D]}, as one embedding labelled by round and prompt."""
        rows = np.concatenate(list(pools.values()))
        tensors = io.StringIO()
        np.savetxt(tensors, rows, fmt="%.5g", delimiter="\t")
        labels = [f"{round}\t{prompt}" for round, pool in pools.items() for prompt in range(len(pool))]
        (self._folder / "projector").mkdir(exist_ok=True)
        write_atomic(self._folder / "projector" / "tensors.tsv", tensors.getvalue().encode())
        write_atomic(self._folder / "projector" / "metadata.tsv", "\n".join(["round\tprompt", *labels, ""]).encode())
        config = ProjectorConfig()
        config.embeddings.add(
            tensor_name="prompts", tensor_path="projector/tensors.tsv", metadata_path="projector/metadata.tsv"
        )
        visualize_embeddings(str(self._folder), config)

    def flush(self) -> None:
        """Make everything visible to a reader."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()

    def _histogram(self, tag: str, values: Tensor, round: int) -> None:
        values = values.detach().to("cpu", torch.float64)
        values = values[values.isfinite()]
        if len(values):
            self._writer.add_histogram(tag, values, round, bins=BINS)


@cache
def _hush_writing_threads() -> None:
    """Let no thread of an event file print why it died: whoever next uses the file gets the same ``OSError``."""
    others = threading.excepthook

    def hook(died: threading.ExceptHookArgs) -> None:
        if not (isinstance(died.exc_value, OSError) and type(died.thread).__module__.startswith("tensorboard.")):
            others(died)

    threading.excepthook = hook


def scalar_tags(record: Record) -> dict[str, float]:
    """Return {tag: number}: ``accuracy/test``, ``loss/train``, ``pool/size``, ``matching/drift``, ``seconds/train``."""
    tags: dict[str, float] = {}
    for section, values in record.items():
        if isinstance(values, Mapping):
            tags |= {_tag(section, name): value for name, value in values.items() if isinstance(value, (int, float))}
    return tags


def _tag(section: str, name: str) -> str:
    if section in ("train", "validation", "test"):
        return f"{name}/{section}"
    if section == "aggregate":
        return "pool/size" if name == "pool_size" else f"matching/{name}"
    return f"{section}/{name}"
