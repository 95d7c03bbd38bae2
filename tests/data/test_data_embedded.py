"""The data sets that come along, joined data sets, and the script that makes the embedded file."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from fedprompt.data import PartitionOptions, Split, available, federate, load
from fedprompt.data.multi import fit
from fedprompt.data.partitions.registry import PARTITIONS
from fedprompt.data.sources.embedded import FASHION_CLASSES, FASHION_FILE, read_npz
from fedprompt.errors import InputError

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_embedded.py"


@pytest.fixture(scope="module")
def joined():
    return load("fashion-mnist-small+digits")


def test_embedded_fashion_mnist_is_balanced_and_holds_different_images():
    found = load("fashion-mnist-small")
    assert found.train.inputs.array.shape == (8000, 28, 28, 1)
    assert found.test.inputs.array.shape == (2000, 28, 28, 1)
    assert np.bincount(found.train.labels).tolist() == [800] * 10
    assert np.bincount(found.test.labels).tolist() == [200] * 10
    assert found.class_names == FASHION_CLASSES
    rows = np.concatenate([found.train.inputs.array, found.test.inputs.array]).reshape(10_000, -1)
    assert len(np.unique(rows, axis=0)) > 9990  # the original has a few duplicates
    trousers, bags = (found.train.inputs.array[found.train.labels == k].mean() for k in (1, 8))
    assert trousers < bags  # a bag fills more of its picture
    assert (FASHION_FILE.parent / "NOTICE.txt").read_text().count("Copyright (c) 2017 Zalando SE") == 1


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:-1000], lambda b: b[:5000] + bytes(9) + b[5009:]])
def test_a_damaged_embedded_file_is_named(tmp_path, damage):
    path = tmp_path / "small.npz"
    path.write_bytes(damage(FASHION_FILE.read_bytes()))
    with pytest.raises(InputError, match=r"small\.npz: not the embedded data set"):
        read_npz("small", path, FASHION_CLASSES)


def test_digits_are_split_by_class_and_fill_the_grey_range():
    found = load("digits")
    assert (len(found.train), len(found.test)) == (1438, 359)
    assert found.train.inputs.array.shape[1:] == (8, 8, 1)
    assert (found.train.inputs.array.min(), found.train.inputs.array.max()) == (0, 255)
    share = np.bincount(found.test.labels) / (np.bincount(found.train.labels) + np.bincount(found.test.labels))
    np.testing.assert_allclose(share, 0.2, atol=0.005)
    np.testing.assert_array_equal(load("digits").test.inputs.array, found.test.inputs.array)


def test_joining_shifts_labels_and_domains(joined):
    digits = load("digits")
    assert joined.class_names[:1] + joined.class_names[10:12] == (
        "fashion-mnist-small/T-shirt/top", "digits/0", "digits/1")  # fmt: skip
    assert joined.domain_names == ("fashion-mnist-small", "digits")
    assert joined.train.inputs.array.shape == (9438, 28, 28, 1)
    np.testing.assert_array_equal(joined.train.labels[8000:], digits.train.labels + 10)
    np.testing.assert_array_equal(joined.train.domains, np.repeat([0, 1], [8000, 1438]))
    np.testing.assert_array_equal(joined.domain_classes, np.kron(np.eye(2), np.ones((1, 10))).astype(bool))
    assert joined.domain_classes[joined.train.domains, joined.train.labels].all()
    np.testing.assert_array_equal(joined.train.inputs.array[:8000], load("fashion-mnist-small").train.inputs.array)


@pytest.mark.parametrize("kind", PARTITIONS.names())
def test_every_client_of_a_joined_federation_holds_one_data_set(joined, kind):
    found = federate(joined, clients=12, kind=kind, options=PartitionOptions(), validation=0.1, limit=2000,
                     imbalance_factor=1.0, seed=0)  # fmt: skip
    domains = [set(found.client(i).domains) for i in range(12)]
    assert all(len(one) == 1 for one in domains)
    assert {0, 1} == set().union(*domains)
    assert sum(found.sizes) == 1800
    for i, one in enumerate(domains):
        assert set(found.test.domains[found.local_tests[i]]) == one


def test_fitting_repeats_grey_over_colours_and_keeps_flat_images_flat():
    grey = np.full((2, 4, 6, 1), 90, np.uint8)
    found = fit(grey, 8, 8, 3)
    assert found.shape == (2, 8, 8, 3)
    assert (found == 90).all()
    ramp = np.tile(np.array([0, 200], np.uint8)[None, :, None], (1, 1, 2))[..., None].reshape(1, 2, 2, 1)
    assert (np.diff(fit(ramp, 4, 4, 1)[0, :, 0, 0].astype(int)) >= 0).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "fashon-mnist",
            r"data\.name: unknown data set 'fashon-mnist' \(did you mean 'fashion-mnist'\?\); allowed: .*cifar10",
        ),
        ("digits+mnits", r"unknown data set 'mnits'"),
        ("digits+digits", r"'digits' is joined with itself"),
        ("", r"unknown data set ''"),
    ],
)
def test_unknown_names_are_refused(name, message):
    with pytest.raises(InputError, match=message):
        load(name)


def test_available_lists_the_embedded_ones_first_and_how_to_get_the_others(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDPROMPT_DATA", str(tmp_path))
    found = available()
    assert [info.name for info in found[:2]] == ["digits", "fashion-mnist-small"]
    assert all(info.present for info in found[:2])
    assert not {info.name: info for info in found}["cifar10"].present
    assert {info.name for info in found} >= {"mnist", "mnist-m", "cifar100", "tiny-imagenet", "cinic10", "folder"}
    assert all(info.about and info.get and "\n" not in info.about + info.get for info in found)


def test_splits_refuse_wrong_arrays_and_copy_what_is_taken():
    images = np.zeros((3, 2, 2, 1), np.uint8)
    with pytest.raises(ValueError, match="images"):
        Split.of(images.astype(float), np.zeros(3, np.int64), np.zeros(3, np.int64))
    with pytest.raises(ValueError, match="labels"):
        Split.of(images, np.zeros(2, np.int64), np.zeros(3, np.int64))
    split = Split.of(images, [4, 5, 6])
    taken = split.take(np.array([2, 0]))
    assert taken.labels.tolist() == [6, 4]
    assert len(taken) == 2
    taken.inputs.array[:] = 1
    assert not split.inputs.array.any()


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_embedded", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_writes_the_same_bytes_every_time(script, tmp_path):
    with np.load(FASHION_FILE) as arrays:
        held = {name: arrays[name] for name in ("test_images", "test_labels")}
    for name in ("one.npz", "two.npz"):
        script.write(tmp_path / name, held)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    with np.load(tmp_path / "one.npz") as again:
        assert all(np.array_equal(again[name], held[name]) for name in held)


def test_the_script_chooses_equally_and_always_the_same(script):
    labels = np.random.default_rng(1).integers(0, 10, 5000)
    chosen = script.choose(labels, 50, 0)
    assert np.bincount(labels[chosen]).tolist() == [50] * 10
    assert (np.diff(chosen) > 0).all()
    np.testing.assert_array_equal(chosen, script.choose(labels, 50, 0))
    assert not np.array_equal(chosen, script.choose(labels, 50, 1))


def test_the_script_refuses_inputs_other_than_the_published_ones(script, tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x01\0\0\0\1\0")
    with pytest.raises(InputError, match="SHA-256"):
        script.read_checked(tmp_path, "train-images-idx3-ubyte")
