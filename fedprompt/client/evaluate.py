"""Scoring a state: predictions on examples, and the numbers that are reported of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedprompt.client.batches import Arrays
from fedprompt.client.examples import Examples
from fedprompt.models.batch import Batch, Output
from fedprompt.models.model import PromptedModel
from fedprompt.models.params import Params

NO_CLASS = -1  # predicted where a logit is not a number: never right
BATCHES_AT_ONCE = 4  # test batches that run through the backbone together; more take memory and are no faster


@dataclass(frozen=True)
class Predictions:
    """What a model said about n samples, in their order."""

    labels: np.ndarray  # int64 [n]
    predicted: np.ndarray  # int64 [n]; NO_CLASS where the model's answer was no number
    losses: np.ndarray  # float32 [n], cross-entropy
    selected: np.ndarray | None = None  # bool [P]: prompts of the pool that served any of the batches

    @staticmethod
    def concatenate(parts: Sequence[Predictions]) -> Predictions:
        """Put the predictions of several shards, made with the same params, one after the other."""
        columns = (np.concatenate([getattr(p, name) for p in parts]) for name in ("labels", "predicted", "losses"))
        selected = None if parts[0].selected is None else np.any([p.selected for p in parts], axis=0)
        return Predictions(*columns, selected)

    def take(self, indices: np.ndarray) -> Predictions:
        """Return the predictions at ``indices``."""
        return Predictions(self.labels[indices], self.predicted[indices], self.losses[indices], self.selected)

    @property
    def correct(self) -> np.ndarray:
        """Which samples were predicted right, bool [n]."""
        return self.labels == self.predicted

    @property
    def accuracy(self) -> float:
        """Share of samples that were predicted right; 0 of no samples."""
        return float(self.correct.mean()) if len(self.labels) else 0.0


@torch.no_grad()
def predict(
    model: PromptedModel,
    params: Params,
    examples: Examples,
    batch_size: int,
    domain_classes: np.ndarray | None = None,
) -> Predictions:
    """Predict examples with one set of params, in consecutive batches of ``batch_size``.

    With prompt selection by batch a prediction depends on its batch-mates, so the batches are part of the result.
    """
    predicted, losses, selected = [], [], []  # on the device until all are there: a GPU does not wait for the host
    for batch, output in _outputs(model, params, examples, batch_size, domain_classes):
        predicted.append(output.logits.argmax(1).masked_fill(output.logits.isnan().any(1), NO_CLASS))
        losses.append(F.cross_entropy(output.logits, batch.labels, reduction="none"))
        if output.selected is not None:
            selected.append(output.selected.any(0))
    used = torch.stack(selected).any(0).cpu().numpy() if selected else None
    return Predictions(examples.labels, torch.cat(predicted).cpu().numpy(), torch.cat(losses).cpu().numpy(), used)


@torch.no_grad()
def logits(model: PromptedModel, params: Params, examples: Examples, batch_size: int) -> Tensor:
    """Class scores [n, K] of examples, in the batches of ``predict``; every class is allowed."""
    outputs = _outputs(model, params, examples, batch_size, None)
    return torch.cat([output.logits for _, output in outputs])


def _outputs(
    model: PromptedModel, params: Params, examples: Examples, batch_size: int, domain_classes: np.ndarray | None
) -> Iterator[tuple[Batch, Output]]:
    """What the model says of consecutive batches, several of them at a time."""
    params = {name: value.to(model.device) for name, value in params.items()}
    data = Arrays([examples], domain_classes, model.device)
    for at in torch.arange(len(examples), device=model.device).split(batch_size * BATCHES_AT_ONCE):
        slot = torch.arange(len(at), device=at.device)
        counts = tuple(min(batch_size, len(at) - start) for start in range(0, len(at), batch_size))
        stacked = {name: value.expand(len(counts), *value.shape) for name, value in params.items()}
        batch = data.batch(at, slot // batch_size, slot % batch_size, counts, keep=None)
        yield batch, model.forward(stacked, batch)


def scores(predictions: Predictions, classes: int) -> dict[str, float | list[float | None]]:
    """Accuracy, balanced accuracy, macro F1, mean loss and per-class accuracy (None where a class has no sample)."""
    confusion = np.zeros((classes, classes + 1), dtype=np.int64)  # [true, predicted], NO_CLASS last
    np.add.at(confusion, (predictions.labels, predictions.predicted), 1)
    hits, true, said = np.diag(confusion), confusion.sum(1), confusion[:, :classes].sum(0)
    present = true > 0
    f1 = 2 * hits / np.maximum(true + said, 1)
    recall = hits / np.maximum(true, 1)
    return {
        "accuracy": float(hits.sum() / true.sum()),
        "balanced_accuracy": float(recall[present].mean()),
        "macro_f1": float(f1[true + said > 0].mean()),
        "loss": float(predictions.losses.mean()),
        "per_class": [float(r) if p else None for r, p in zip(recall, present, strict=True)],
    }


def client_scores(accuracies: Sequence[float], sizes: Sequence[int]) -> dict[str, float | list[float | None] | None]:
    """Mean accuracy over clients, over the worst tenth of them where each has 20 or more test samples, and all of them.

    Clients without any test sample (their classes are not in the test set) do not count and are None in the list.
    """
    scored = [(accuracy, size) for accuracy, size in zip(accuracies, sizes, strict=True) if size]
    each = [float(accuracy) if size else None for accuracy, size in zip(accuracies, sizes, strict=True)]
    if not scored:
        return {"mean_accuracy": None, "worst_decile_accuracy": None, "accuracies": each}
    ordered = np.sort([accuracy for accuracy, _ in scored])
    worst = float(ordered[: max(1, len(ordered) // 10)].mean()) if min(size for _, size in scored) >= 20 else None
    return {"mean_accuracy": float(ordered.mean()), "worst_decile_accuracy": worst, "accuracies": each}
