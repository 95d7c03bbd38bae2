"""How fast is local training on the CPU? The fused, cached path against what one would write first with torch and timm.

The obvious way trains one client after the other: each image is resized with PIL whenever it is used, the query
features come from the whole frozen backbone at every step, prompts enter at the input, autograd does the rest. Both
ways see the same batches in the same order, and dropout is off: their losses show that they do the same work.

All are measured in turn on one thread, in seconds of processor time: other programs on the machine disturb that less
than they disturb the time that passes. So are float32 matrix products of the blocks' shapes, by torch.mm and by the
operator that the blocks use; the share of them that training reaches counts only what the mathematics needs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.turns import in_turn, ratio
from fedprompt.client.batches import plan_batches
from fedprompt.client.examples import Examples
from fedprompt.client.tasks import Task, Update
from fedprompt.config import parsing as config
from fedprompt.config.schema import Config
from fedprompt.data import Split
from fedprompt.models.linear import frozen_linear
from fedprompt.models.model import PromptedModel
from fedprompt.models.params import Params
from fedprompt.models.weights.named import create_backbone
from fedprompt.programs import program
from fedprompt.runtime.build import build_data, worker_parts
from fedprompt.runtime.worker import Worker
from fedprompt.seeding import Stream, generator

CLIENTS = 3  # one group of the default size
SIZES = ((56, 48), (224, 16))  # pixels, images per client
QUICK_SIZES = ((32, 16),)
QUICK = ("backbone.name=test_vit", "backbone.weights=random", "prompt.pool_size=6", "prompt.top_k=3")
BOTH = ("prompt.kind=pool", "local.epochs=1", "head.dropout=0", "partition.kind=iid", f"federation.clients={CLIENTS}")
FUSED, ROUGH, OBVIOUS = "fused, float32", "fused, bfloat16", "obvious"
MM, FROZEN = "torch.mm", "frozen_linear"


def raw_examples(split: Split) -> Examples:
    """Examples of which nothing has been computed yet."""
    return Examples(labels=split.labels, domains=split.domains, inputs=split.inputs)


class Group:
    """A few clients that train together, prepared; ``train`` is one round of them."""

    def __init__(self, images: int, *overrides: str) -> None:
        limit = round(images * CLIENTS / 0.9) + 10  # a tenth is held out for validation
        fixed = (f"data.limit={limit}", f"federation.cohort={CLIENTS}")
        self.settings: Config = config.load(None, [*BOTH, *fixed, *overrides])
        data = build_data(self.settings)
        self.worker = Worker(worker_parts(self.settings, data), threads=1)
        self.raw = [raw_examples(data.client(client)).take(np.arange(images)) for client in range(CLIENTS)]
        start = self.worker.facts().params
        self.tasks = [Task(client, start, self.settings.local.epochs) for client in range(CLIENTS)]
        begun = time.process_time()
        self.examples = [self.worker.prepare(examples, examples.inputs, True) for examples in self.raw]
        self.prepare_seconds = time.process_time() - begun
        # without kept tokens, every step needs the images
        self.inputs = [own.inputs for own in self.raw if self.examples[0].tokens is None]
        self.model: PromptedModel = self.worker._model

    def train(self) -> list[Update]:
        """Train all clients, as one batch."""
        return self.worker.train(0, self.tasks, *self.examples, *self.inputs)


class Obvious:
    """The same training as one would write it first: plain timm, torch modules and ``torch.optim``."""

    def __init__(self, group: Group) -> None:
        self.settings, self.tasks, self.raw = group.settings, group.tasks, group.raw
        backbone = group.settings.backbone
        self.vit = create_backbone(backbone.name, backbone.weights, backbone.image_size)
        mean, std = (self.vit.pretrained_cfg.get(name, (0.5, 0.5, 0.5)) for name in ("mean", "std"))
        self.mean, self.std = (torch.tensor(value).view(3, 1, 1) for value in (mean, std))

    def train(self) -> list[float]:
        """Train one client after the other and return their mean losses."""
        return [self._client(task, examples) for task, examples in zip(self.tasks, self.raw, strict=True)]

    def _client(self, task: Task, examples: Examples) -> float:
        local, seed = self.settings.local, self.settings.seed
        params = {name: value.clone().requires_grad_() for name, value in task.params.items()}
        rates = [
            {"params": [params[name]], "lr": local.lr if name.startswith("head.") else local.prompt_lr}
            for name in params
        ]
        optimizer = torch.optim.Adam(rates, betas=local.betas, eps=local.eps)
        rng, losses = generator(seed, Stream.BATCHES, 0, task.client), []
        for indices in plan_batches(len(examples), local.epochs, local.batch_size, rng):
            images = torch.stack([self._load(image) for image in examples.inputs[indices].pixels()])
            loss = self._loss(params, images, torch.from_numpy(examples.labels[indices]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return sum(losses) / len(losses)

    def _load(self, array: np.ndarray) -> Tensor:
        """One image uint8 [H, W, channels] as torchvision's usual transforms make it, [3, size, size]."""
        size = self.settings.backbone.image_size
        image = Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array).convert("RGB")
        pixels = np.array(image.resize((size, size), Image.Resampling.BILINEAR))
        return (torch.from_numpy(pixels).permute(2, 0, 1).float() / 255 - self.mean) / self.std

    def _loss(self, params: Params, images: Tensor, labels: Tensor) -> Tensor:
        prompt = self.settings.prompt
        with torch.no_grad():
            query = self.vit.forward_features(images)[:, 0]
        keys = F.normalize(params["pool"], dim=-1)
        similarity = F.normalize(query @ params["query_proj"].T, dim=-1) @ keys.T  # [B, P]
        votes = torch.bincount(similarity.topk(prompt.top_k).indices.flatten(), minlength=len(keys))
        chosen = votes.topk(prompt.top_k).indices
        tokens = self.vit._pos_embed(self.vit.patch_embed(images))
        prompts = params["pool"][chosen].expand(len(images), -1, -1)
        tokens = torch.cat([tokens[:, :1], prompts, tokens[:, 1:]], dim=1)
        feature = self.vit.norm(self.vit.blocks(self.vit.norm_pre(tokens)))[:, 0]
        hidden = F.linear(feature, params["head.1.weight"], params["head.1.bias"])
        logits = F.linear(hidden, params["head.2.weight"], params["head.2.bias"])
        penalty = prompt.similarity * similarity[:, chosen].sum(1).mean()
        return F.cross_entropy(logits, labels) + penalty


def needed_operations(model: PromptedModel, images: int, prompts: int) -> float:
    """Floating-point operations of the blocks for one pass over images with prompts at the input.

    Forward and the gradient of the activations; of the last block the class token only; of the first block's queries,
    keys and values the gradient at the prompts only.
    """
    width, tokens = model.backbone.width, model.backbone.tokens_per_sample + prompts
    hidden = model.backbone.vit.blocks[0].mlp.fc1.out_features
    per_token = 2 * width * (width + 2 * hidden)  # after attention
    project = 2 * width * width  # one of query, key, value
    whole = 2 * tokens * (3 * project + per_token) + 12 * tokens**2 * width
    last = 2 * (2 * tokens * project + project + per_token) + 12 * tokens * width
    spared = 3 * (tokens - prompts) * project
    return float(images * ((model.backbone.depth - 1) * whole + last - spared))


def main(json_path: Path | None, quick: bool = False) -> None:
    """Print times, ratios and the share of the matrix-product rate; ``quick`` shows on a tiny ViT that it works."""
    rows = [
        _compare(size, images, turns=1 if quick else 5, overrides=QUICK if quick else ())
        for size, images in (QUICK_SIZES if quick else SIZES)
    ]
    if json_path is not None:
        json_path.write_text(json.dumps({"threads": 1, "clients": CLIENTS, "sizes": rows}, indent=1) + "\n")


def _compare(size: int, images: int, turns: int, overrides: Sequence[str]) -> dict[str, Any]:
    common = (f"backbone.image_size={size}", "prompt.layer=0", *overrides)
    exact = Group(images, "runtime.precision=float32", *common)
    rough = Group(images, "runtime.precision=bfloat16", *common)
    obvious = Obvious(exact)
    prompts = exact.settings.prompt.top_k
    width, hidden = exact.model.backbone.width, exact.model.backbone.vit.blocks[0].mlp.fc1.out_features
    rows = CLIENTS * exact.settings.local.batch_size * (exact.model.backbone.tokens_per_sample + prompts)
    x, weight = torch.randn(rows, width), torch.randn(hidden, width)
    repeats = max(1, round(2e10 / (2 * rows * width * hidden)))  # about a fifth of a second
    torch.backends.cuda.enable_flash_sdp(True)
    ways: dict[str, Callable[[], Any]] = {
        FUSED: exact.train,
        OBVIOUS: obvious.train,
        ROUGH: lambda: _without_flash(rough.train),
        MM: lambda: [x @ weight.T for _ in range(repeats)][-1],
        FROZEN: lambda: [frozen_linear(x, weight, None) for _ in range(repeats)][-1],
    }
    times, results = in_turn(ways, turns, time.process_time)
    losses = {FUSED: [u.loss for u in results[FUSED]], OBVIOUS: results[OBVIOUS]}
    product = 2 * rows * width * hidden * repeats / 1e9
    rates = {name: median(product / s for s in times[name]) for name in (MM, FROZEN)}
    needed = needed_operations(exact.model, CLIENTS * images, prompts) / 1e9
    row = {
        "image_size": size,
        "images": CLIENTS * images,
        "speed_ratio": ratio(times[OBVIOUS], times[FUSED]),
        "bfloat16_ratio": ratio(times[OBVIOUS], times[ROUGH]),
        "matrix_product_gflops": rates,
        "needed_gflop": needed,
        "share": {name: needed / product * ratio(times[name], times[FUSED]) for name in rates},
        "mean_loss": {name: sum(values) / len(values) for name, values in losses.items()},
        "prepare_seconds": exact.prepare_seconds,
        "seconds": {name: times[name] for name in (FUSED, OBVIOUS, ROUGH)},
    }
    _tell(row)
    return row


def _without_flash(way: Callable[[], Any]) -> Any:
    """Call with the setting of torch, one for the whole process, that ``build_model`` makes for bfloat16 on a CPU."""
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        return way()
    finally:
        torch.backends.cuda.enable_flash_sdp(True)


def _tell(row: dict[str, Any]) -> None:
    size, images = row["image_size"], row["images"]
    click.echo(f"{size} px, {images} images of {CLIENTS} clients, prompts at the input, one thread")
    for name, seconds in row["seconds"].items():
        click.echo(f"  {name:<18}{median(seconds):8.2f} s{images / median(seconds):9.1f} images/s")
    losses = ", ".join(f"{name} {loss:.4f}" for name, loss in row["mean_loss"].items())
    click.echo(f"  mean loss: {losses}; preparing the query features once: {row['prepare_seconds']:.2f} s")
    click.echo(f"  {row['speed_ratio']:.2f} times as fast as the obvious way; in bfloat16 {row['bfloat16_ratio']:.2f}")
    for name, rate in row["matrix_product_gflops"].items():
        click.echo(f"  {name}: {rate:.0f} Gflop/s, of which training reaches {row['share'][name]:.0%}")


if __name__ == "__main__":
    program(main)
