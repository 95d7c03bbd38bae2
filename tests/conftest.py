"""What many tests share: a tiny random ViT, models on it, and small random examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedprompt import registry
from fedprompt.client.examples import Examples
from fedprompt.data.inputs import ImageInputs
from fedprompt.models.backbones.base import Tokens
from fedprompt.models.backbones.vit import ViT
from fedprompt.models.batch import Batch, groups_of
from fedprompt.models.heads.classifier import HeadOptions
from fedprompt.models.kinds import PromptOptions
from fedprompt.models.model import PromptedModel
from fedprompt.models.weights.timm_import import import_timm
from studies import many_runs

# Files whose tests take minutes, because they start many processes.
LONG = {
    *("test_readme", "test_cluster", "test_files", "test_sweep", "test_ray", "test_blackbox_ray"),
    *("test_fault_benchmark", "test_faults"),
}
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the long files, so that no process is left alone with one at the end."""
    items.sort(key=lambda item: item.path.stem not in LONG)


class Here(Executor):
    """Runs what is submitted in this process, at once."""

    def submit(self, function: Callable, /, *args, **kwargs) -> Future:
        future = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


@pytest.fixture
def many_runs_here(monkeypatch) -> None:
    """Let benchmarks of many runs do them in this process: each of theirs would take seconds to import torch."""
    monkeypatch.setattr(many_runs, "one_per_core", Here)


@pytest.fixture
def registries(monkeypatch) -> Iterator[None]:
    """Afterwards nothing is registered that was not before, and plugins are as if never loaded."""
    for type in registry.TYPES:
        registry.registry_of(type).names()
    before = registry.snapshot()
    monkeypatch.setattr(registry, "_PLUGINS", registry._Plugins(are_loaded=True))
    yield
    registry.restore(before)


@pytest.fixture(scope="session")
def make_vit() -> Callable[..., nn.Module]:
    """Make a ViT of 28 px, patch 7 (17 tokens), width 32, 3 blocks, 4 heads.

    timm's own start is so small that blocks hardly change their input, so noise makes every tensor matter.
    """

    def make(seed: int = 0, **changes) -> nn.Module:
        size = {"img_size": 28, "patch_size": 7, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 0}
        vit = import_timm().models.vision_transformer.VisionTransformer(**{**size, **changes}).eval()
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weights in vit.parameters():
                start = torch.ones_like(weights) if weights.ndim == 1 and weights.mean() > 0.5 else 0
                weights.copy_(start + 0.15 * torch.randn(weights.shape, generator=noise))
        vit.pretrained_cfg = {"mean": MEAN, "std": STD}
        return vit

    return make


@pytest.fixture(scope="session")
def backbone(make_vit) -> ViT:
    """The tiny ViT as the frozen backbone."""
    return ViT(make_vit(), 28)


@pytest.fixture(scope="session")
def make_model(backbone) -> Callable[..., PromptedModel]:
    """Make a model on the tiny backbone; 5 classes, 4 prompts (a pool of 6, of which 3 serve), narrow head."""

    def make(kind: str = "prompt", *, classes: int = 5, head: HeadOptions | None = None, **prompt) -> PromptedModel:
        small = {"length": 4, "pool_size": 6, "top_k": 3}
        head = head or HeadOptions(hidden=16)
        return PromptedModel(backbone, PromptOptions(kind=kind, **{**small, **prompt}), head, classes)

    return make


@pytest.fixture(scope="session")
def make_examples() -> Callable[..., Examples]:
    """Make n random grey (or colour) images of 4 x 4 even fields, with random labels."""

    def make(n: int, seed: int = 0, *, size: int = 28, channels: int = 1, classes: int = 5) -> Examples:
        rng = np.random.default_rng([n, seed])
        fields = rng.integers(0, 256, (n, 4, 4, channels), dtype=np.uint8)
        images = fields.repeat(size // 4, axis=1).repeat(size // 4, axis=2)
        return Examples(rng.integers(0, classes, n), np.zeros(n, dtype=np.int64), ImageInputs(images))

    return make


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., Batch]:
    """Make a batch of groups of the given sizes out of what the test gives it; images and tokens may be tensors."""

    def make(
        counts: Sequence[int], images: Tensor | None = None, tokens: Tokens | Tensor | None = None, **given: Tensor
    ) -> Batch:
        group, slot = groups_of(tuple(counts), "cpu")
        absent = {**dict.fromkeys(("mask", "query", "keep")), "inputs": None if images is None else (images,)}
        absent["tokens"] = Tokens(tokens) if isinstance(tokens, Tensor) else tokens
        labels = torch.zeros(sum(counts), dtype=torch.int64)
        return Batch(counts=tuple(counts), group=group, slot=slot, **{"labels": labels, **absent, **given})

    return make


@pytest.fixture(scope="module")
def small_cluster() -> Iterator[None]:
    """A Ray of two CPUs, to which this process is connected."""
    pytest.importorskip("ray")
    from fedprompt.runtime.ray.clusters import own_cluster

    with own_cluster(num_cpus=2):
        yield
