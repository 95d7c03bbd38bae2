"""Visual prompts and class prototypes: where they start, what they may do, and what they are made of."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch
from special_files import SPECIAL, make_special

from fedprompt.errors import InputError
from fedprompt.models.generator import init_generator, prompted
from fedprompt.models.heads.classifier import HeadOptions
from fedprompt.models.heads.prototypes import class_means, prototype_scores, read_embeddings
from fedprompt.models.kinds import PromptOptions
from fedprompt.models.model import PromptedModel
from fedprompt.models.params import stack

HEAD = HeadOptions(kind="prototypes", scale=10.0)


def uint8(n, seed=0, channels=1, size=28):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, size, size, channels), dtype=np.uint8))


@pytest.fixture
def model(backbone):
    prototypes = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    return PromptedModel(backbone, PromptOptions(kind="visual", channels=4), HEAD, 5, prototypes)


def moved(params, seed):
    draw = torch.Generator().manual_seed(seed)
    return {n: v + 0.3 * torch.randn(v.shape, generator=draw) for n, v in params.items()}


def test_at_its_start_the_prompt_changes_nothing(model, backbone, make_batch):
    batch = make_batch([3, 2], images=uint8(5))
    params = stack([model.init(np.random.default_rng(0))] * 2)
    assert set(params) == {
        f"visual.{n}" for n in ("trigger", "1.weight", "1.bias", "2.weight", "2.bias", "3.weight", "3.bias")
    }
    features = backbone.features_from(backbone.embed(batch.given), 0)
    expected = prototype_scores(features, model.prototypes, HEAD.scale)
    torch.testing.assert_close(model.forward(params, batch).logits, expected)


def test_the_default_generator_is_as_large_as_the_configuration_says():
    assert sum(v.numel() for v in init_generator(np.random.default_rng(0), 16).values()) == 6083


def test_prompted_pixels_stay_pixels_and_within_the_strength(make_batch):
    batch = make_batch([4], images=None)
    params = stack([{n: 50 * v for n, v in moved(init_generator(np.random.default_rng(0), 4), 1).items()}])
    pixels = torch.rand(4, 3, 20, 20, generator=torch.Generator().manual_seed(2))
    changed = prompted(params, pixels, batch, 0.2)
    assert 0 <= changed.min() <= changed.max() <= 1
    assert 0.1 < (changed - pixels).abs().max() <= 0.2 + 1e-6


def test_every_group_has_its_own_prompt_whoever_it_is_with(make_batch):
    own = [moved(init_generator(np.random.default_rng(0), 4), seed) for seed in range(3)]
    pixels = torch.rand(9, 1, 20, 20, generator=torch.Generator().manual_seed(2))
    together = prompted(stack(own), pixels, make_batch([4, 3, 2]), 0.5)
    for params, part, expected in zip(own, pixels.split([4, 3, 2]), together.split([4, 3, 2]), strict=True):
        torch.testing.assert_close(prompted(stack([params]), part, make_batch([len(part)]), 0.5), expected)
    assert (together[0] - prompted(stack(own[1:2]), pixels[:1], make_batch([1]), 0.5)[0]).abs().max() > 0.01


def test_gradients_reach_the_generator_through_the_frozen_backbone(model, make_batch):
    params = {n: v.requires_grad_() for n, v in stack([moved(model.init(np.random.default_rng(0)), 1)]).items()}
    losses, _ = model.losses(params, make_batch([6], images=uint8(6)))
    grads = torch.autograd.grad(losses.sum(), list(params.values()))
    assert all(grad.abs().max() > 0 for grad in grads)
    assert all(p.grad is None for p in model.backbone.vit.parameters())


def test_prototypes_are_the_means_of_features_of_length_1():
    features = torch.tensor([[3.0, 4.0], [0.0, 2.0], [5.0, 0.0]])
    means = class_means(features, torch.tensor([0, 0, 1]), 2)
    torch.testing.assert_close(means, torch.tensor([[0.3, 0.9], [1.0, 0.0]]))


def test_scores_are_cosines_times_the_scale():
    features, prototypes = torch.randn(4, 8), torch.randn(3, 8)
    expected = 7 * F.cosine_similarity(features[:, None], prototypes[None], dim=-1)
    torch.testing.assert_close(prototype_scores(features, prototypes, 7.0), expected)


@pytest.mark.parametrize("suffix", ["npy", "safetensors"])
def test_class_embeddings_come_out_of_a_file_as_they_went_in(tmp_path, suffix):
    path, values = tmp_path / f"classes.{suffix}", np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    np.save(path, values) if suffix == "npy" else save_file({"anything": values}, path)
    np.testing.assert_array_equal(read_embeddings(str(path), 5, 8).numpy(), values)


@pytest.mark.parametrize("dtype", ["<f2", ">f4", ">f8", "i1", "<i8", "u2", "g"])
def test_class_embeddings_of_any_real_numbers_become_float32(tmp_path, dtype):
    values = np.arange(1, 41).reshape(5, 8)
    np.save(tmp_path / "a.npy", np.asfortranarray(values.astype(dtype)))
    found = read_embeddings(str(tmp_path / "a.npy"), 5, 8)
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy(), values)
    save_torch({"a": torch.from_numpy(values).bfloat16()}, tmp_path / "a.safetensors")
    np.testing.assert_array_equal(read_embeddings(str(tmp_path / "a.safetensors"), 5, 8).numpy(), values)


def pickled(path):
    np.save(path, np.array([{"a": 1}]), allow_pickle=True)


def archived(path):
    np.savez(path.with_suffix(".npz"), np.ones((5, 8)))
    path.with_suffix(".npz").rename(path)


def with_header(path, shape, dtype):
    header = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    path.write_bytes(b"\x93NUMPY\x02\x00" + len(header).to_bytes(4, "little") + header)


BAD = {
    "of another shape": ("a.npy", lambda path: np.save(path, np.ones((5, 7)))),
    "infinite": ("a.npy", lambda path: np.save(path, np.full((5, 8), np.inf))),
    "texts": ("a.npy", lambda path: np.save(path, np.full((5, 8), "x"))),
    "pickled": ("a.npy", pickled),
    "cut off": ("a.npy", lambda path: path.write_bytes(b"\x93NUMPY")),
    "not there": ("a.npy", lambda path: None),
    "of another kind": ("a.txt", lambda path: path.write_text("1 2")),
    "two tensors": ("a.safetensors", lambda path: save_file({"a": np.ones(2), "b": np.ones(2)}, path)),
    "an archive": ("a.npz", lambda path: np.savez(path, np.ones((5, 8)))),
    "an archive of another name": ("a.npy", archived),
    "objects": ("a.npy", lambda path: np.save(path, np.ones((5, 8), object), allow_pickle=True)),
    "beyond float32": ("a.npy", lambda path: np.save(path, np.full((5, 8), 1e300))),
    "long beyond float32": ("a.npy", lambda path: np.save(path, np.full((5, 8), 3e38))),
    "not a number": ("a.npy", lambda path: np.save(path, np.full((5, 8), np.nan))),
    "complex": ("a.npy", lambda path: np.save(path, np.ones((5, 8), complex))),
    "truths": ("a.npy", lambda path: np.save(path, np.ones((5, 8), bool))),
    "records": ("a.npy", lambda path: np.save(path, np.ones((5, 8), [("a", "f4")]))),
    "dates": ("a.npy", lambda path: np.save(path, np.ones((5, 8), "M8[s]"))),
    "one number": ("a.npy", lambda path: np.save(path, np.float32(1))),
    "one row": ("a.npy", lambda path: np.save(path, np.ones(40))),
    "three axes": ("a.npy", lambda path: np.save(path, np.ones((1, 5, 8)))),
    "a row of zeros": ("a.npy", lambda path: np.save(path, np.ones((5, 8)) * (np.arange(5) != 3)[:, None])),
    "rows of almost nothing": ("a.npy", lambda path: np.save(path, np.full((5, 8), 1e-30))),
    "a header of terabytes": ("a.npy", lambda path: with_header(path, (2**40, 8), "<f4")),
    "a header of commands": ("a.npy", lambda path: with_header(path, "__import__('os').abort()", "<f4")),
    "a header without end": ("a.npy", lambda path: with_header(path, "(" * 60_000, "<f4")),
    "less than its header says": ("a.npy", lambda path: with_header(path, (5, 8), "<f4")),
    "safetensors with zeros": ("a.safetensors", lambda path: save_file({"a": np.zeros((5, 8))}, path)),
    "safetensors beyond float32": ("a.safetensors", lambda path: save_file({"a": np.full((5, 8), 1e300)}, path)),
    "safetensors of truths": ("a.safetensors", lambda path: save_file({"a": np.ones((5, 8), bool)}, path)),
    "safetensors of another shape": ("a.safetensors", lambda path: save_file({"a": np.ones(40)}, path)),
    "empty safetensors": ("a.safetensors", lambda path: path.write_bytes(b"")),
    "safetensors with a header of terabytes": ("a.safetensors", lambda path: path.write_bytes(b"\xff" * 7 + b"\0" * 9)),
    **{f"a {kind}.npy": ("a.npy", partial(make_special, kind)) for kind in SPECIAL},
    **{f"a {kind}.safetensors": ("a.safetensors", partial(make_special, kind)) for kind in SPECIAL},
    "no safetensors": ("a.safetensors", lambda path: path.write_bytes(b"12345678rubbish")),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", BAD.values(), ids=BAD.keys())
def test_a_bad_file_of_embeddings_is_told_in_one_line(tmp_path, case):
    name, make = case
    make(tmp_path / name)
    with pytest.raises(InputError, match=r"head\.embeddings: .*allowed: ") as caught:
        read_embeddings(str(tmp_path / name), 5, 8)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)
