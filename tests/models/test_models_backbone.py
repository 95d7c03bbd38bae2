"""The backbone's pieces put together are timm's own forward pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fedprompt.models.backbones.base import Tokens
from fedprompt.models.backbones.blocks import is_plain
from fedprompt.models.backbones.vit import ViT


def timm_feature(vit, x):
    """Class token of timm's whole forward pass for normalised images x [M, 3, H, W]."""
    with torch.no_grad():
        return vit.forward_head(vit.forward_features(x), pre_logits=True)


def prepared(images: np.ndarray, resized: int, cut: int) -> torch.Tensor:
    """Resize by PIL in floating point, cut the centre and normalise: independent of the code under test."""
    out = np.zeros((len(images), 3, resized, resized), dtype=np.float32)
    for n, image in enumerate(images):
        for channel in range(3):
            plane = Image.fromarray(image[..., min(channel, image.shape[-1] - 1)].astype(np.float32))
            out[n, channel] = np.asarray(plane.resize((resized, resized), Image.Resampling.BILINEAR))
    margin = (resized - cut) // 2
    out = out[:, :, margin : margin + cut, margin : margin + cut] / 255
    mean, std = np.array([0.4, 0.5, 0.6]), np.array([0.2, 0.25, 0.3])
    return torch.from_numpy(((out - mean[:, None, None]) / std[:, None, None]).astype(np.float32))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(28, 28), (12, 12), (61, 61), (20, 45)])
def test_embedded_and_run_equals_timm_on_separately_prepared_images(backbone, channels, height, width):
    images = np.random.default_rng(0).integers(0, 256, (3, height, width, channels), dtype=np.uint8)
    expected = timm_feature(backbone.vit, prepared(images, 28, 28))
    feature = backbone.features_from(backbone.embed((torch.from_numpy(images),)), 0)
    assert feature.dtype == torch.float32
    torch.testing.assert_close(feature, expected, atol=2e-4, rtol=1e-4)


def test_crop_resizes_to_more_and_cuts_the_centre(make_vit):
    cropped = ViT(make_vit(), 28, crop=0.875)
    images = np.random.default_rng(1).integers(0, 256, (2, 40, 40, 1), dtype=np.uint8)
    expected = timm_feature(cropped.vit, prepared(images, 32, 28))
    feature = cropped.features_from(cropped.embed((torch.from_numpy(images),)), 0)
    torch.testing.assert_close(feature, expected, atol=2e-4, rtol=1e-4)
    uncropped = ViT(cropped.vit, 28).embed((torch.from_numpy(images),)).values
    assert not torch.allclose(cropped.embed((torch.from_numpy(images),)).values, uncropped, atol=1e-2)


def test_embedding_leaves_the_images_alone(backbone):
    images = torch.full((1, 28, 28, 3), 200, dtype=torch.uint8)
    backbone.embed((images,))
    assert (images == 200).all()


VARIANTS = {
    "plain": {},
    "layer scale": {"init_values": 0.5},
    "no qkv bias": {"qkv_bias": False},
    "norms of query and key": {"qk_norm": True},
    "norm in attention": {"scale_attn_norm": True},
    "register tokens": {"reg_tokens": 2},
    "norm before the blocks": {"pre_norm": True},
    "one block": {"depth": 1},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_short_last_block_gives_the_class_token_of_the_whole_block(make_vit, changes):
    backbone = ViT(make_vit(seed=3, **changes), 28)
    assert backbone._short_last_block
    images = torch.randint(0, 256, (4, 28, 28, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = timm_feature(backbone.vit, prepared(images.numpy(), 28, 28))
    tokens = backbone.embed((images,)).values
    assert tokens.shape[1] == backbone.tokens_per_sample
    torch.testing.assert_close(backbone.features_from(Tokens(tokens), 0), expected, atol=1e-4, rtol=1e-4)


def test_short_last_block_passes_the_same_gradient_to_all_tokens(backbone):
    tokens = torch.randn(3, 9, 32, generator=torch.Generator().manual_seed(0))
    direction = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    short, whole = (tokens.clone().requires_grad_() for _ in range(2))
    (backbone.features_from(Tokens(short), 1) * direction).sum().backward()
    out = backbone.vit.norm(backbone.run(Tokens(whole), 1, 3).values)[:, 0]
    (out * direction).sum().backward()
    assert whole.grad[:, 1:].abs().max() > 1e-3
    torch.testing.assert_close(short.grad, whole.grad, atol=1e-5, rtol=1e-4)


def test_a_block_of_another_kind_is_run_whole(make_vit):
    class Unusual(type(make_vit().blocks[0])):
        def forward(self, x, **_):
            return super().forward(x) + x.mean(1, keepdim=True)

    vit = make_vit(block_fn=Unusual)
    backbone = ViT(vit, 28)
    assert not is_plain(vit.blocks[-1])
    images = torch.randint(0, 256, (2, 28, 28, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = timm_feature(vit, prepared(images.numpy(), 28, 28))
    torch.testing.assert_close(backbone.features_from(backbone.embed((images,)), 0), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
def test_running_in_two_pieces_equals_running_at_once(backbone, layer):
    tokens = Tokens(torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(0)))
    at_once = backbone.features_from(tokens, 0)
    in_pieces = backbone.features_from(backbone.run(tokens, 0, layer), layer)
    torch.testing.assert_close(in_pieces, at_once, atol=1e-5, rtol=1e-5)


def test_own_classifier_is_there_but_does_not_count_as_sent(make_vit):
    vit = make_vit(num_classes=7)
    backbone = ViT(vit, 28)
    features = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    assert backbone.classes == 7
    torch.testing.assert_close(backbone.logits(features), features @ vit.head.weight.T + vit.head.bias)
    assert ViT(make_vit(), 28).classes == 0
    assert backbone.bytes == ViT(make_vit(), 28).bytes == 4 * sum(w.numel() for w in make_vit().parameters())


def test_bfloat16_gives_float32_features_near_the_exact_ones(backbone, make_vit):
    rough = ViT(make_vit(), 28, autocast=torch.bfloat16)
    images = torch.randint(0, 256, (4, 28, 28, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    exact = backbone.features_from(backbone.embed((images,)), 0)
    feature = rough.features_from(rough.embed((images,)), 0)
    assert feature.dtype == torch.float32
    difference = (feature - exact).abs().mean() / exact.abs().mean()
    assert 0 < difference < 0.05
