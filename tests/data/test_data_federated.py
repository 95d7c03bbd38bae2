"""The federated view: what is held out, who gets what, and what local tests look like."""

import numpy as np
import pytest

from fedprompt.data import Dataset, PartitionOptions, Split, View, federate
from fedprompt.data.federated import LOCAL_TEST_LEAST, LOCAL_TEST_SIZE, local_test_counts
from fedprompt.data.partitions.registry import PARTITIONS
from fedprompt.errors import InputError

CLASSES = 4


def numbered(count: int, start: int, domains=None) -> Split:
    """Make images that carry their own number, class-sorted like some published files."""
    numbers = np.arange(start, start + count)
    images = np.stack([numbers // 256, numbers % 256], axis=1).astype(np.uint8).reshape(count, 1, 2, 1)
    return Split.of(images, np.repeat(np.arange(CLASSES), count // CLASSES), domains)


def numbers(samples: Split | View) -> list[int]:
    images = samples.take(np.arange(len(samples))).inputs.array
    return (images[:, 0, 0, 0].astype(int) * 256 + images[:, 0, 1, 0]).tolist()


def toy(train: int = 2000, test: int = 800) -> Dataset:
    return Dataset("toy", numbered(train, 0), numbered(test, 10_000), tuple("abcd"))


def view(dataset=None, **changed):
    settings = {"clients": 10, "kind": "dirichlet", "options": PartitionOptions(alpha=0.3), "validation": 0.1,
                "limit": None, "imbalance_factor": 1.0, "seed": 0}  # fmt: skip
    return federate(dataset or toy(), **(settings | changed))


@pytest.mark.parametrize("kind", PARTITIONS.names())
def test_clients_and_validation_hold_every_training_image_once(kind):
    found = view(kind=kind)
    held = [n for i in range(10) for n in numbers(found.client(i))]
    assert sorted(held + numbers(found.validation)) == list(range(2000))
    assert sorted(numbers(found.test)) == list(range(10_000, 10_800))
    assert found.sizes.tolist() == [len(found.client(i)) for i in range(10)]
    np.testing.assert_array_equal(found.class_counts().sum(axis=1), found.sizes)
    np.testing.assert_array_equal(found.class_counts()[3], np.bincount(found.client(3).labels, minlength=CLASSES))


def test_the_view_copies_no_image_but_those_that_are_taken():
    data = toy()
    found = view(data, imbalance_factor=4.0)
    assert found.train.split is found.validation.split is data.train
    assert found.test.split is data.test
    taken = found.train.take(np.array([5, 2]))
    assert not np.shares_memory(taken.inputs.array, data.train.inputs.array)
    np.testing.assert_array_equal(taken.inputs.array, found.train.inputs(np.array([5, 2])).pixels())
    np.testing.assert_array_equal(taken.labels, found.train.labels[[5, 2]])


def test_validation_has_its_share_of_every_class():
    found = view(validation=0.15)
    assert np.bincount(found.validation.labels).tolist() == [75] * 4


def test_validation_and_test_do_not_depend_on_the_partition_but_on_the_seed():
    found = view()
    other_kind = view(kind="shards", clients=7)
    for part in ("validation", "test"):
        assert numbers(getattr(found, part)) == numbers(getattr(other_kind, part))
        assert numbers(getattr(found, part)) != numbers(getattr(view(seed=1), part))


def test_validation_and_test_are_not_sorted_by_class():
    found = view()
    for split in (found.validation, found.test):
        first_half = split.labels[: len(split) // 2]
        assert np.bincount(first_half, minlength=CLASSES).min() > 0.3 * len(first_half) / CLASSES


def test_limit_keeps_so_many_images_in_equal_shares():
    found = view(limit=400, validation=0.25)
    assert len(found.train) == 300
    assert len(found.validation) == 100
    assert np.bincount(found.train.labels).tolist() == [75] * 4
    assert not set(numbers(found.train)) & set(numbers(found.validation))


def test_imbalance_thins_training_but_not_validation():
    found = view(imbalance_factor=8.0)
    assert np.bincount(found.train.labels).tolist() == [450, 225, 112, 56]  # 450 * 8 ** (-c / 3)
    assert np.bincount(found.validation.labels).tolist() == [50] * 4
    assert numbers(found.validation) == numbers(view().validation)


def test_local_tests_follow_the_clients_own_label_distribution():
    found = view()
    for i, indices in enumerate(found.local_tests):
        assert len(np.unique(indices)) == len(indices) >= LOCAL_TEST_LEAST
        own = np.bincount(found.client(i).labels, minlength=CLASSES) / found.sizes[i]
        drawn = np.bincount(found.test.labels[indices], minlength=CLASSES) / len(indices)
        np.testing.assert_allclose(drawn, own, atol=1 / len(indices))


def test_local_tests_differ_between_clients_of_equal_distribution():
    one_class = Split.of(np.zeros((600, 1, 2), np.uint8), np.zeros(600))
    found = view(Dataset("one", one_class, one_class, ("a",)), kind="iid", clients=2)
    assert [len(indices) for indices in found.local_tests] == [LOCAL_TEST_SIZE] * 2
    assert not np.array_equal(*found.local_tests)


def test_a_stratified_choice_is_random_within_each_class():
    first, other = (view(limit=400, seed=seed) for seed in (0, 1))
    assert sorted(numbers(first.train)) != sorted(numbers(other.train))
    halves = np.array(numbers(first.train)) % 500 < 250  # not just the first ones of each class
    assert 0.4 < halves.mean() < 0.6


@pytest.mark.parametrize(
    ("own", "held", "wanted"),
    [
        ([5, 5], [1000, 1000], [LOCAL_TEST_SIZE // 2, LOCAL_TEST_SIZE // 2]),
        ([9, 1], [90, 1000], [90, 10]),  # as large as class 0 permits without bending the distribution
        ([9, 1], [9, 1000], [9, 2]),  # would be 10 images; at least 20 are asked for, class 0 has but 9
        ([3, 0], [7, 1000], [7, 0]),
        ([5, 5], [0, 300], [0, LOCAL_TEST_SIZE]),  # the test set lacks a class
        ([5, 0], [0, 300], [0, 0]),
    ],
)
def test_local_test_counts(own, held, wanted):
    assert local_test_counts(np.array(own), np.array(held)).tolist() == wanted


def test_where_domains_differ_in_classes_every_client_and_its_local_test_stay_in_one_domain():
    domains = np.repeat([0, 1], [1000, 1000])
    allowed = np.array([[True, True, False, False], [False, False, True, True]])
    data = Dataset("two", numbered(2000, 0, domains), numbered(800, 10_000, np.repeat([0, 1], 400)), tuple("abcd"),
                   ("left", "right"), allowed)  # fmt: skip
    for kind in PARTITIONS.names():
        found = view(data, kind=kind)
        for i in range(10):
            own = set(found.client(i).domains)
            assert len(own) == 1
            assert set(found.test.domains[found.local_tests[i]]) == own


def test_a_local_test_stays_in_the_clients_domain_where_classes_are_shared():
    train, test = numbered(2000, 0, np.arange(2000) % 2), numbered(800, 10_000, np.arange(800) % 2)
    found = view(Dataset("two", train, test, tuple("abcd"), ("odd", "even")), kind="domain")
    for i in range(10):
        assert set(found.test.domains[found.local_tests[i]]) == set(found.client(i).domains)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"validation": 1.0}, r"data\.validation: 1\.0"),
        ({"validation": -0.1}, r"data\.validation: -0\.1"),
        ({"limit": 0}, r"data\.limit: 0"),
        ({"limit": 2001}, r"data\.limit: 2001 .*2000"),
        ({"clients": 3000}, r"federation\.clients: 3000"),
        ({"clients": 0}, r"federation\.clients: 0"),
        ({"imbalance_factor": 0.5}, r"partition\.imbalance_factor: 0\.5"),
        ({"validation": 0.0002}, r"data\.validation: .* 0\.0002 of 2000 .*none for validation; .*more than 0\.00025"),
        ({"validation": 0.9999}, r"data\.validation: .* 0\.9999 of 2000 .*none for training; .*less than 0\.99975"),
        ({"limit": 1}, r"data\.limit: 1 training image .*at least 2"),
        ({"limit": 2}, r"data\.validation: .* 0\.1 of 2 .*none for validation; .*more than 0\.25"),
        ({"limit": 12, "validation": 0.5}, r"federation\.clients: 10 .* 6; give at most that many"),
        ({"limit": 40, "shots": 20}, r"head\.shots: 20, and class 'a' has 9 image.*at most 8"),
        ({"limit": 8, "validation": 0.5, "shots": 1}, r"head\.shots: 1, .* has 1 image.*more images of it"),
        ({"limit": 3, "validation": 0.4, "shots": 1}, r"head\.shots: 1, .* has 0 image.*more images of it"),
    ],
)
def test_values_that_are_not_allowed_are_refused_by_their_key(changed, message):
    with pytest.raises(InputError, match=message):
        view(**({"options": PartitionOptions(min_size=1)} | changed))


@pytest.mark.parametrize("images", [2, 3, 7, 100])
def test_any_share_that_a_refusal_allows_is_accepted(images):
    few = {"limit": images, "clients": 1, "options": PartitionOptions(min_size=1)}
    for share, step, words in ((1e-9, 1e-6, "more than "), (1 - 1e-9, -1e-6, "less than ")):
        with pytest.raises(InputError) as refused:
            view(validation=share, **few)
        allowed = view(validation=float(str(refused.value).rpartition(words)[2]) + step, **few)
        assert min(len(allowed.validation), len(allowed.train)) == 1


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_data_set_without_images_is_refused(part):
    parts = {"train": numbered(8, 0), "test": numbered(8, 0)}
    parts[part] = parts[part].take(np.arange(0))
    with pytest.raises(InputError, match=r"data\.name: 'toy' has no (training|test) images"):
        view(Dataset("toy", **parts, class_names=tuple("abcd")))


def test_no_validation_is_possible():
    found = view(validation=0.0)
    assert len(found.validation) == 0
    assert len(found.train) == 2000
