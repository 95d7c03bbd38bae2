"""How fast is local training on a GPU? Images per second, model FLOP utilisation, and the ratio to the obvious way.

Rows: ViT-S/14 and ViT-B/32 at 224 pixels, 10 and 100 clients in one fused group, batches of 16, a prompt pool at the
input; blocks as they are, compiled, and compiled with a search for the fastest kernels. "unequal": clients of different
sizes, so that the batch shrinks as they finish. A row times whole calls of the cohort trainer, sending params
and images to the GPU and fetching the results included. Query features are computed before, once per image.

Utilisation = the backbone's operations per second over the rate of one large bf16 matrix product, measured in the same
program. Counted are products that the method needs: forward, and the gradient of the activations, no recomputation, of
the last block what the class token needs; neither head nor optimizer.

Weights are random and images are noise: that changes no speed. Needs torch, timm, numpy and pillow, and nothing else:

    python -m benchmarks.gpu [--json FILE] [--quick]
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks import obvious
from benchmarks.gpu_clock import matrix_products, matrix_rate, timed, waits_per_step
from fedprompt.client.examples import Examples, prepare
from fedprompt.client.rules.base import LocalOptions
from fedprompt.client.rules.registry import make_rule
from fedprompt.client.tasks import Task, Training
from fedprompt.client.train import train_group
from fedprompt.data.inputs import ImageInputs
from fedprompt.errors import InputError
from fedprompt.models.backbones.compiled import compile_blocks
from fedprompt.models.backbones.vit import ViT
from fedprompt.models.heads.classifier import HeadOptions
from fedprompt.models.kinds import PromptOptions
from fedprompt.models.model import PromptedModel, torch_device
from fedprompt.models.weights.named import create_backbone
from fedprompt.programs import check_json

CLASSES, BATCH, PROMPTS, NATIVE = 100, 16, 10, 32  # NATIVE: pixels of the images before they are resized
EAGER, COMPILED, AUTOTUNED = "as it is", "compiled", "autotuned"
MODES = {COMPILED: "default", AUTOTUNED: "max-autotune-no-cudagraphs"}
LAST_START = 420  # seconds after which no further row is begun: the whole ends within ten minutes


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    models: tuple[tuple[str, int], ...]  # timm's name, pixels
    cohorts: tuple[int, int]
    images: int  # of a client
    epochs: int
    repeats: int
    obvious_clients: int
    matrix: int  # rows and columns of the product that utilisation is measured by


FULL = Size((("vit_small_patch14_dinov2", 224), ("vit_base_patch32_224", 224)), (10, 100), 160, 2, 5, 2, 8192)
QUICK = Size((("test_vit", 32),), (2, 3), 32, 1, 2, 1, 256)


@dataclass(frozen=True)
class Row:
    """One way of training one cohort on one backbone, and what came out."""

    model: str
    pixels: int
    clients: int
    way: str = EAGER
    unequal: bool = False
    first_seconds: float | None = None  # the first run, compiling included
    seconds: list[float] = field(default_factory=list)
    images_per_second: float | None = None
    utilisation: float | None = None
    ratio_to_obvious: dict[str, float] = field(default_factory=dict)  # by the obvious way's precision
    waits_per_step: float | None = None  # times that the host waits for the GPU within a step
    peak_gib: float | None = None
    error: str | None = None


def main(json_path: Path | None, quick: bool = False) -> None:
    """Print a row per backbone, cohort and way; under ten minutes on an H200.

    ``quick`` takes a tiny backbone, also on a CPU, which shows only that everything works. Raises InputError where
    there is no GPU and ``quick`` is not asked for.
    """
    device, begun = torch_device(), time.monotonic()
    if device.type != "cuda" and not quick:
        raise InputError("benchmarks.gpu: torch finds no CUDA GPU; allowed: a machine with one, or --quick on any")
    size = QUICK if quick else FULL
    low = torch.bfloat16 if device.type == "cuda" else None
    rate = matrix_rate(size.matrix, low or torch.float32, device)
    facts = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "precision": str(low or torch.float32).removeprefix("torch."),
        "matrix_tflops": rate / 1e12,
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "weights": "random",
        "quick": quick,
    }
    print(f"{facts['device']}, torch {torch.__version__}; random weights, noise for images: for speed only")
    print(f"{facts['precision']} matrix product {size.matrix}³: {rate / 1e12:.4g} TFLOP/s")
    slow = {name: _obvious(name, pixels, size, low, device) for name, pixels in size.models}
    print(f"{'backbone, clients':<34}{'way':<20}{'images/s':>10}{'utilisation':>13}{'times obvious':>32}{'peak':>11}")
    prepared: dict[str, list[Examples]] = {}
    rows = []
    for row in _plan(size, compiled=device.type == "cuda"):
        if time.monotonic() - begun > LAST_START:
            row = replace(row, error=f"left out: {LAST_START} s were over")
        else:
            row = _guarded(row, lambda row: _measure(row, size, prepared, rate, slow[row.model], low, device))
        rows.append(row)
        print(_line(row), flush=True)
    print(f"{time.monotonic() - begun:.0f} s")
    if json_path is not None:
        result = {**facts, "obvious": slow, "rows": [asdict(row) for row in rows], "total": time.monotonic() - begun}
        json_path.write_text(json.dumps(result, indent=1) + "\n")


def flops_per_image(backbone: ViT, prompts: int) -> float:
    """Operations of the backbone's products for one training image with ``prompts`` prompts at the input.

    Per token a block multiplies by 4 D² + 2 D H weights, and attention with T tokens takes 4 T D more; backwards the
    activations' gradient takes the former once and the latter twice. The last block makes keys and values of all
    tokens, the rest for the class token alone. The patch embedding has no backward pass.
    """
    width, tokens = backbone.width, backbone.tokens_per_sample + prompts
    hidden = backbone.vit.blocks[0].mlp.fc1.out_features
    linear, attention = 2 * (4 * width**2 + 2 * width * hidden), 4 * tokens * width
    one = 2 * linear + 3 * attention  # a token in a block, forwards and backwards
    keys_and_values = 2 * 2 * 2 * width**2
    last = one + (tokens - 1) * keys_and_values
    patches = backbone.vit.patch_embed.num_patches * 2 * 3 * backbone.vit.patch_embed.patch_size[0] ** 2 * width
    return (backbone.depth - 1) * tokens * one + last + patches


def _obvious(name: str, pixels: int, size: Size, low: torch.dtype | None, device: torch.device) -> dict[str, float]:
    """Images per second of the obvious way, in float32 without TF32 (torch's default) and in ``low``."""
    vit = create_backbone(name, "random", pixels).to(device)
    images, labels = _images(0, size.images)
    clients = [obvious.Files(obvious.encode(images), labels)] * size.obvious_clients
    speeds = {}
    for precision in dict.fromkeys((None, low)):
        times: list[obvious.Seconds] = []

        def epoch(precision: torch.dtype | None = precision, times: list[obvious.Seconds] = times) -> None:
            how = {"image_size": pixels, "batch_size": BATCH, "epochs": 1, "autocast": precision}
            times.append(obvious.train(vit, clients, CLASSES, **how))

        with matrix_products("highest"):
            _, *seconds = timed(epoch, size.repeats, device)
        label = str(precision or torch.float32).removeprefix("torch.")
        speeds[label] = size.obvious_clients * size.images / median(seconds)
        share = median(t.images / t.total for t in times[1:])
        print(f"{name}, {pixels} px, the obvious way in {label}: {speeds[label]:.1f} images/s ({share:.0%} of it PIL)")
    return speeds


def _plan(size: Size, compiled: bool) -> list[Row]:
    """The rows, the most wanted first; compiled ones only where they mean something."""
    few, many = size.cohorts
    kinds = [(few, EAGER, False), (many, EAGER, False)]
    late = []
    if compiled:
        kinds += [(few, COMPILED, False), (many, COMPILED, False), (many, COMPILED, True)]
        late = [(many, AUTOTUNED, False)]
    return [Row(name, pixels, *kind) for part in (kinds, late) for name, pixels in size.models for kind in part]


def _guarded(row: Row, measure: Callable[[Row], Row]) -> Row:
    """The measured row, or one that says why there is none: other rows are worth having all the same."""
    try:
        return measure(row)
    except torch.cuda.OutOfMemoryError:
        why = "out of memory"
    except Exception as error:  # whatever compiling may raise, from torch, triton or the C compiler
        if row.way == EAGER:
            raise
        why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return replace(row, error=why)


def _measure(
    row: Row,
    size: Size,
    prepared: dict[str, list[Examples]],
    rate: float,
    slow: dict[str, float],
    low: torch.dtype | None,
    device: torch.device,
) -> Row:
    if device.type == "cuda":
        gc.collect()  # what earlier rows still hold
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = _model(row, low, device)
    if row.model not in prepared:
        raw = [_images(client, size.images) for client in range(max(size.cohorts))]
        examples = [Examples(labels, np.zeros_like(labels), ImageInputs(images)) for images, labels in raw]
        prepared[row.model] = [prepare(model, own, keep_tokens=False) for own in examples]
    if row.way != EAGER:
        torch.compiler.reset()  # every row compiles for its own sizes, as a process of its own would
        compile_blocks(model.backbone, mode=MODES[row.way])
    data = prepared[row.model][: row.clients]
    if row.unequal:
        sizes = np.random.default_rng(0).integers(size.images // 2, size.images + 1, row.clients)
        data = [own.take(np.arange(n)) for own, n in zip(data, sizes, strict=True)]
    start = model.init(np.random.default_rng(0))
    training = Training(make_rule(LocalOptions()), BATCH, lambda name: True, seed=0, round=0)

    def train(epochs: int = size.epochs) -> None:
        train_group(model, [Task(client, start, epochs) for client in range(row.clients)], data, training)

    with matrix_products("high"):
        first, *seconds = timed(train, size.repeats, device)
        waits = waits_per_step(train, -(-size.images // BATCH)) if device.type == "cuda" and row.way == EAGER else None
    speed = size.epochs * sum(map(len, data)) / median(seconds)
    return replace(
        row,
        first_seconds=first,
        seconds=seconds,
        images_per_second=speed,
        utilisation=speed * flops_per_image(model.backbone, PROMPTS) / rate,
        ratio_to_obvious={precision: speed / images for precision, images in slow.items()},
        waits_per_step=waits,
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
    )


def _model(row: Row, low: torch.dtype | None, device: torch.device) -> PromptedModel:
    vit = create_backbone(row.model, "random", row.pixels)
    backbone = ViT(vit, row.pixels, device=device, autocast=low)
    return PromptedModel(backbone, PromptOptions("pool", top_k=PROMPTS), HeadOptions(), CLASSES)


def _images(client: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(client)
    return rng.integers(0, 256, (count, NATIVE, NATIVE, 3), dtype=np.uint8), rng.integers(0, CLASSES, count)


def _line(row: Row) -> str:
    way = row.way + (", unequal" if row.unequal else "")
    name = f"{row.model}, {row.clients}"
    if row.error is not None:
        return f"{name:<34}{way:<20}{row.error}"
    ratios = ", ".join(f"{ratio:.1f} ({precision})" for precision, ratio in row.ratio_to_obvious.items())
    peak = "" if row.peak_gib is None else f"{row.peak_gib:.1f} GiB"
    line = f"{name:<34}{way:<20}{row.images_per_second:>10.1f}{row.utilisation:>13.1%}{ratios:>32}{peak:>11}"
    return line if row.waits_per_step is None else f"{line}  host waits per step: {row.waits_per_step:g}"


def _arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="Write the numbers here too.")
    parser.add_argument("--quick", action="store_true", help="A smaller version that shows that it works.")
    return parser.parse_args(given)


if __name__ == "__main__":
    arguments = _arguments()
    try:
        check_json(arguments.json)
        main(arguments.json, quick=arguments.quick)
    except InputError as error:
        print(f"fedprompt: {error}", file=sys.stderr)
        sys.exit(2)
