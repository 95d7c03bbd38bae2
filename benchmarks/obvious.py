"""The obvious way to train clients on a prompt pool: what one writes first, as a measure for anything faster.

Clients train one after the other, each in batches of its own. Images lie encoded in memory; in every epoch PIL decodes
each anew and resizes it to the backbone's input, in the training loop. The query feature of every image comes from a
pass through the whole backbone in every step. Blocks, optimizer and precision are timm's and torch's own defaults.
The local task is that of PFPT (Weng et al. 2024): k of P prompts by votes of the batch, an MLP head, Adam.
"""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

POOL_SIZE, TOP_K, HIDDEN, SIMILARITY = 20, 10, 512, 0.01


@dataclass(frozen=True)
class Files:
    """One client's images as PNG files in memory, and their labels int64 [n]."""

    images: Sequence[bytes]
    labels: np.ndarray


@dataclass(frozen=True)
class Seconds:
    """How long clients trained, and how much of that PIL took."""

    total: float
    images: float


def encode(images: np.ndarray) -> list[bytes]:
    """Write uint8 images [n, H, W, 3] as PNG files in memory."""
    files = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        files.append(file.getvalue())
    return files


def train(
    vit: nn.Module,
    clients: Sequence[Files],
    classes: int,
    *,
    image_size: int,
    batch_size: int,
    epochs: int,
    autocast: torch.dtype | None = None,
) -> Seconds:
    """Train each client from a fresh start on the frozen ``vit``, on the device where that is."""
    begun, in_images = time.perf_counter(), 0.0
    for files in clients:
        in_images += _train_client(PooledViT(vit, classes), files, image_size, batch_size, epochs, autocast)
    return Seconds(time.perf_counter() - begun, in_images)


class PooledViT(nn.Module):
    """A timm ViT with a pool of prompts, the projection of its query, and a head."""

    def __init__(self, vit: nn.Module, classes: int) -> None:
        super().__init__()
        width = vit.embed_dim
        self.vit = vit
        self.pool = nn.Parameter(torch.empty(POOL_SIZE, width).uniform_(-0.05, 0.05))
        self.query_proj = nn.Linear(width, width, bias=False)
        self.head = nn.Sequential(nn.Linear(width, HIDDEN), nn.Dropout(0.5), nn.Linear(HIDDEN, classes))
        self.to(next(vit.parameters()).device)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Class scores [B, K] and the mean summed similarity of the prompts that serve the batch."""
        with torch.no_grad():
            query = self.vit.forward_features(images)[:, 0]
        similarity = F.normalize(self.query_proj(query), dim=-1) @ F.normalize(self.pool, dim=-1).T  # [B, P]
        votes = torch.bincount(similarity.topk(TOP_K, dim=1).indices.flatten(), minlength=POOL_SIZE)
        chosen = votes.topk(TOP_K).indices
        prompts = self.pool[chosen].expand(len(images), -1, -1)
        tokens = self.vit.norm_pre(self.vit._pos_embed(self.vit.patch_embed(images)))
        tokens = torch.cat([tokens[:, :1], prompts, tokens[:, 1:]], dim=1)
        feature = self.vit.norm(self.vit.blocks(tokens))[:, 0]
        return self.head(feature), similarity[:, chosen].sum(1).mean()


def _train_client(
    model: PooledViT, files: Files, image_size: int, batch_size: int, epochs: int, autocast: torch.dtype | None
) -> float:
    """Train one client, and return the seconds that its images took."""
    device = model.pool.device
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 5e-4, (0.9, 0.98), 1e-6)
    in_images, loss_sum = 0.0, 0.0
    for _ in range(epochs):
        for batch in torch.randperm(len(files.labels)).split(batch_size):
            begun = time.perf_counter()
            images = torch.stack([_decode(files.images[i], image_size, model.vit.pretrained_cfg) for i in batch])
            in_images += time.perf_counter() - begun
            labels = torch.from_numpy(files.labels)[batch].to(device)
            with _precision(device, autocast):
                logits, similarity = model(images.to(device))
                loss = F.cross_entropy(logits, labels) + SIMILARITY * similarity
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum += loss.item()
    return in_images


def _decode(file: bytes, size: int, config: dict) -> Tensor:
    image = Image.open(io.BytesIO(file)).convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    return (values - mean) / std


def _precision(device: torch.device, autocast: torch.dtype | None) -> AbstractContextManager:
    return nullcontext() if autocast is None else torch.autocast(device.type, dtype=autocast)
