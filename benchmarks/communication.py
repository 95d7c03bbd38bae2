"""Bytes that one client sends and receives in a round, per method, next to what full fine-tuning would send.

Summaries of the PFPT study (Weng et al., NeurIPS 2024) credit it with 92 % less communication; here the figure is
computed from the tensors that travel: a client really makes one local step on one image (only shapes matter, so the
weights are random), and what its task and its update carry is counted. PFPT's pool is counted at its first size.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd

from fedprompt.client.examples import Examples, prepare
from fedprompt.client.tasks import Training
from fedprompt.client.train import train_group
from fedprompt.config.parsing import load
from fedprompt.config.schema import Config
from fedprompt.data.inputs import ImageInputs
from fedprompt.models.model import PromptedModel
from fedprompt.models.params import size_in_bytes
from fedprompt.programs import program
from fedprompt.runtime.build import build_algorithm, build_model, local_options
from fedprompt.seeding import Stream, generator
from studies.comparison.contestants import HEADLINE, ONCE, WHOLE, Overrides

# name: (overrides, classes)
SETTINGS: dict[str, tuple[Overrides, int]] = {
    "the demo: ViT-S/14, prompts before block 10, 10 classes": ((), 10),
    "the study: ViT-B/32 at 224 px, prompts at the input, 100 classes": (
        ("backbone.name=vit_base_patch32_224", "backbone.image_size=224", "prompt.layer=0"),
        100,
    ),
}
WITHOUT_TRAFFIC = ("local", "centralized")


def main(json_path: Path | None, quick: bool = False) -> None:
    """Count and print; ``quick`` leaves out all but the headline methods of the demo's setting."""
    tables = {}
    for title, (overrides, classes) in list(SETTINGS.items())[: 1 if quick else None]:
        rows = list(_rows(overrides, classes, quick))
        tables[title] = rows
        click.echo(f"{title}: bytes per client and round")
        click.echo(pd.DataFrame(rows).assign(saved=lambda t: t.saved.map("{:.2%}".format)).to_string(index=False))
    if json_path is not None:
        json_path.write_text(json.dumps(tables, indent=1) + "\n")


def _rows(setting: Overrides, classes: int, quick: bool) -> Iterator[dict[str, Any]]:
    methods = HEADLINE if quick else {**HEADLINE, **ONCE, **WHOLE}
    full = _travelling(("algorithm.name=fedavg", "prompt.kind=full", *setting), classes)
    for name, (makes, _) in methods.items():
        if name not in WITHOUT_TRAFFIC:
            down, up = _travelling((*makes, *setting), classes)
            yield {"method": name, "down": down, "up": up, "saved": 1 - (down + up) / sum(full)}


def _travelling(overrides: Sequence[str], classes: int) -> tuple[int, int]:
    """Bytes (down to, up from) one client that really makes a step."""
    config = load(None, [*overrides, "backbone.weights=random"])
    model, algorithm = build_model(config, classes), build_algorithm(config)
    state = algorithm.init(model.init(generator(0, Stream.INIT)), generator(0, Stream.INIT, 0, 1))
    task = algorithm.task(state, client=0, epochs=1)
    rule = algorithm.rule(local_options(config), 1)
    (update,) = train_group(model, [task], [_one_image(model, config)], Training(rule, 16, algorithm.trains, 0, 1))
    down, up = algorithm.travelling(task, update)
    return size_in_bytes(down), size_in_bytes(up)


def _one_image(model: PromptedModel, config: Config) -> Examples:
    size = config.backbone.image_size
    image = np.zeros((1, size, size, 3), dtype=np.uint8)
    raw = Examples(np.zeros(1, np.int64), np.zeros(1, np.int64), ImageInputs(image))
    return prepare(model, raw, keep_tokens=True)


if __name__ == "__main__":
    program(main)
