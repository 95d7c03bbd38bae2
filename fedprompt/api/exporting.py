"""``fedprompt export``: a run's model as plain files, which load without fedprompt.

trained.safetensors    the tensors that were trained: prompts, head (and class prototypes where they take its place)
backbone.safetensors   the frozen backbone's weights, by timm's names
model.json             how both go together: backbone, prompts, head, preprocessing, names of the classes
config.yaml            the complete configuration of the run
README.md              a model card: data, method, rounds, accuracy
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from fedprompt.api.models import Model
from fedprompt.errors import InputError
from fedprompt.models.backbones.vit import ViT
from fedprompt.runtime.folders.folders import check_free, mark
from fedprompt.tracking.files import write_atomic

FILES = ("trained.safetensors", "backbone.safetensors", "model.json", "config.yaml", "README.md")
FORMAT = 1
Record = dict[str, Any]


def write(model: Model, records: Sequence[Record], result: Record | None, output: Path) -> None:
    """Write a model into the folder ``output``, with what its run's metrics.jsonl and result.json say of it.

    Raises InputError where it cannot be exported, or a file of the user's is in the way.
    """
    output.mkdir(parents=True, exist_ok=True)
    check_free(output, "export", FILES)
    mark(output, "export", FILES)
    save_file({name: value.cpu().contiguous() for name, value in _trained(model).items()}, output / FILES[0])
    save_file({name: value.cpu().contiguous() for name, value in _backbone(model).items()}, output / FILES[1])
    write_atomic(output / "model.json", (json.dumps(description(model), indent=2) + "\n").encode())
    write_atomic(output / "config.yaml", model.config.to_yaml().encode())
    write_atomic(output / "README.md", card(model, records, result).encode())


def _trained(model: Model) -> dict[str, Any]:
    prototypes = model.inner.head.prototypes
    return model.params if prototypes is None else {**model.params, "prototypes": prototypes}


def _backbone(model: Model) -> dict[str, Any]:
    return dict(_backbone_of(model).vit.state_dict())


def _backbone_of(model: Model) -> ViT:
    backbone = model.inner.backbone
    if not isinstance(backbone, ViT):
        raise InputError(
            f"backbone.name: '{model.config.backbone.name}' is no timm model and cannot be exported; allowed: timm's"
        )
    return backbone


def description(model: Model) -> dict[str, Any]:
    """What a program must know to put the tensors together; plain values."""
    config, backbone = model.config, _backbone_of(model)
    return {
        "format": FORMAT,
        "classes": list(model.classes),
        "backbone": {
            "name": config.backbone.name,
            "library": "timm",
            "image_size": config.backbone.image_size,
            "classifier": backbone.vit.num_classes,
        },
        "preprocessing": {
            "values": "uint8 / 255",
            "resize": round(config.backbone.image_size / config.backbone.crop),
            "interpolation": "bilinear, antialiased where it shrinks",
            "centre_crop": config.backbone.image_size,
            "mean": backbone.mean,
            "std": backbone.std,
        },
        "prompt": config.prompt.model_dump(mode="json"),
        "head": config.head.model_dump(mode="json"),
        "batch_size": config.local.batch_size,
        "round": model.round,
        "client": model.client,
    }


def card(model: Model, records: Sequence[Record], result: Record | None) -> str:
    """A model card in Markdown."""
    config = model.config
    scores = {record["round"]: record for record in records}.get(model.round, {}).get("test")
    whose = "global model" if model.client is None else f"personal model of client {model.client}"
    facts = [
        ("method", config.algorithm.name),
        ("data", config.data.name),
        ("partition", _partition(config)),
        ("clients", f"{config.federation.clients}, {config.federation.cohort} per round"),
        ("rounds", f"{model.round} of {config.federation.rounds}"),
        ("backbone", f"{config.backbone.name} ({config.backbone.weights}), frozen"),
        ("trained", f"prompt.kind {config.prompt.kind}, head.kind {config.head.kind}"),
        ("seed", str(config.seed)),
    ]
    if scores is not None and model.client is None:
        facts.append(("test accuracy", f"{scores['accuracy']:.1%} in round {model.round}"))
    if result is not None:
        facts.append(("data digest", result["data"]["digest"]))
    lines = [f"| {name} | {value} |" for name, value in facts]
    return "\n".join(
        [
            f"# {config.algorithm.name} on {config.data.name}: {whose}",
            "",
            "Trained by federated prompt tuning with fedprompt.",
            "",
            "| | |",
            "| --- | --- |",
            *lines,
            "",
            f"Classes: {', '.join(model.classes)}.",
            "",
            "`model.json` says how `trained.safetensors` and `backbone.safetensors` go together. fedprompt's",
            "`examples/load_export.py` does that in plain torch and timm. The licences of the backbone's weights and",
            "of the data still hold: check both before you publish this model.",
            "",
        ]
    )


def _partition(config: Any) -> str:
    kind = config.partition.kind
    return f"{kind}, alpha {config.partition.alpha:g}" if kind in ("dirichlet", "quantity") else kind
