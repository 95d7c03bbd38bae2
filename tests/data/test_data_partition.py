"""Partitions: nothing lost or doubled, and each kind skews what it says."""

import numpy as np
import pytest

from fedprompt.data import PartitionOptions, Split, feature_distance, measures
from fedprompt.data.partitions import division
from fedprompt.data.partitions.base import REDRAWS, Samples, give_from_largest, with_minimum
from fedprompt.data.partitions.long_tail import long_tail
from fedprompt.data.partitions.registry import PARTITIONS
from fedprompt.errors import InputError

CLASSES = 5


def split_of(labels, domains=None) -> Split:
    return Split.of(np.zeros((len(labels), 2, 2), np.uint8), np.asarray(labels), domains)


def balanced(per_class: int = 200) -> Split:
    return split_of(np.tile(np.arange(CLASSES), per_class))


def divide(split, clients, kind, seed=0, per_domain=False, **options):
    rng = np.random.default_rng(seed)
    settings = PartitionOptions(**options)
    return division.divide(split, clients, kind, rng, classes=CLASSES, options=settings, per_domain=per_domain)


def counts(split, parts):
    return np.stack([np.bincount(split.labels[part], minlength=CLASSES) for part in parts])


def assert_covers(split, parts, clients):
    assert len(parts) == clients
    assert all(part.dtype == np.int64 and len(part) > 0 and (np.diff(part) > 0).all() for part in parts)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(split)))


@pytest.mark.parametrize("kind", PARTITIONS.names())
@pytest.mark.parametrize("per_domain", [False, True])
@pytest.mark.parametrize(("samples", "clients"), [(1000, 1), (1000, 3), (1000, 40), (45, 40)])
def test_every_kind_gives_every_sample_to_exactly_one_client(kind, per_domain, samples, clients):
    labels = np.random.default_rng(7).integers(0, CLASSES, samples)
    domains = (np.arange(samples) % 10 == 0).astype(np.int64)
    split = split_of(labels, None if clients == 1 else domains)
    parts = divide(split, clients, kind, min_size=1, shards_per_client=1, per_domain=per_domain)
    assert_covers(split, parts, clients)


@pytest.mark.parametrize("kind", PARTITIONS.names())
def test_as_many_clients_as_samples_leaves_nobody_empty(kind):
    split = split_of(np.arange(30) % CLASSES)
    assert_covers(split, divide(split, 30, kind, min_size=1, shards_per_client=1), 30)


@pytest.mark.parametrize("kind", PARTITIONS.names())
def test_the_same_seed_gives_the_same_partition_and_another_seed_another(kind):
    first, again, other = (divide(balanced(), 8, kind, seed=seed) for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    assert any(not np.array_equal(a, b) for a, b in zip(first, other))


def test_iid_sizes_differ_by_one_at_most_and_labels_look_alike():
    split = balanced()
    parts = divide(split, 7, "iid")
    assert np.ptp([len(part) for part in parts]) <= 1
    assert measures(counts(split, parts))["total_variation"] < 0.15


def test_dirichlet_skew_grows_as_alpha_falls():
    split = balanced()
    skew = []
    for alpha in (100, 10, 1, 0.1):
        tables = [counts(split, divide(split, 10, "dirichlet", s, alpha=alpha, min_size=1)) for s in range(5)]
        skew.append(np.mean([measures(table)["total_variation"] for table in tables]))
    assert skew == sorted(skew)
    assert skew[0] < 0.1
    assert skew[-1] > 0.7


def test_dirichlet_class_shares_follow_the_distribution():
    # the share of one client is Beta(alpha, (N - 1) alpha): mean 1/N, variance (N - 1) / (N^2 (N alpha + 1))
    split, clients, alpha = balanced(1000), 4, 0.5
    shares = np.concatenate([
        counts(split, divide(split, clients, "dirichlet", s, alpha=alpha, min_size=1)).ravel() / 1000 for s in range(80)
    ])  # fmt: skip
    assert shares.mean() == pytest.approx(1 / clients)
    assert shares.var() == pytest.approx((clients - 1) / (clients**2 * (clients * alpha + 1)), rel=0.15)


@pytest.mark.parametrize("kind", ["dirichlet", "quantity", "domain"])
def test_repair_move_reaches_the_minimum_size(kind):
    split = balanced()
    parts = divide(split, 40, kind, alpha=0.05, min_size=12)
    assert min(len(part) for part in parts) == 12
    assert_covers(split, parts, 40)


@pytest.mark.parametrize("kind", ["dirichlet", "quantity"])
def test_repair_refuse_says_the_best_minimum_of_the_draws(kind):
    with pytest.raises(InputError, match=r"partition\.min_size.*best minimum was \d+") as caught:
        divide(balanced(), 40, kind, alpha=0.05, min_size=12, repair="refuse")
    reached = int(str(caught.value).split("best minimum was ")[1].split(";")[0])
    assert 0 <= reached < 12
    # what it names is really within reach, with the same draws
    parts = divide(balanced(), 40, kind, alpha=0.05, min_size=max(reached, 1))
    assert min(len(part) for part in parts) >= reached


def test_the_first_draw_that_reaches_the_minimum_is_taken_and_redraws_are_bounded():
    samples, rng = Samples(np.zeros(10, np.int64), np.zeros(10, np.int64)), np.random.default_rng(0)
    sizes = iter([0, 1, 3, 5, *[1] * 100])
    drawn = []

    def draw():
        drawn.append(next(sizes))
        return np.split(np.arange(10), [drawn[-1]])

    parts = with_minimum(draw, samples, 2, PartitionOptions(min_size=2), rng)
    assert [len(part) for part in parts] == [3, 7]
    assert drawn == [0, 1, 3]
    drawn.clear()
    next(sizes)
    with_minimum(draw, samples, 2, PartitionOptions(min_size=2), rng)
    assert len(drawn) == REDRAWS


def test_a_minimum_that_the_data_cannot_give_is_refused_with_the_largest_possible():
    with pytest.raises(InputError, match=r"partition\.min_size: 101 .*at most 100$"):
        divide(balanced(), 10, "dirichlet", min_size=101)


def test_moving_takes_from_the_largest_and_gives_to_the_smallest():
    parts = [np.arange(10), np.array([10]), np.array([], dtype=np.int64)]
    moved = give_from_largest(parts, 3, np.random.default_rng(0))
    assert [len(part) for part in moved] == [5, 3, 3]
    assert set(moved[0]) < set(range(10))
    assert 10 in moved[1]
    assert sorted(np.concatenate(moved)) == list(range(11))


@pytest.mark.parametrize("share", [0.99, 0.7])
def test_dominant_gives_each_class_share_evenly_to_its_own_clients(share):
    split = balanced()
    table = counts(split, divide(split, 10, "dominant", dominant_share=share))
    for client in range(10):
        assert table[client, client % CLASSES] == round(share * 200) / 2
    assert (table.sum(axis=0) == 200).all()  # the rest of each class lies with the others
    if share == 0.99:
        own = np.arange(10) % CLASSES
        assert (table[np.arange(10), own] / table.sum(axis=1)).min() > 0.9


def test_dominant_with_fewer_clients_than_classes_keeps_the_classes_that_nobody_owns():
    split = balanced()
    table = counts(split, divide(split, 2, "dominant"))
    assert table[0, 0] == table[1, 1] == 198
    assert (table.sum(axis=0) == 200).all()


def test_shards_give_each_client_few_classes_and_equal_sizes():
    split = balanced()
    parts = divide(split, 10, "shards", shards_per_client=2)  # 20 shards of 50: no shard spans two classes
    table = counts(split, parts)
    assert (table.sum(axis=1) == 100).all()
    assert ((table > 0).sum(axis=1) <= 2).all()
    assert set(table.ravel()) <= {0, 50, 100}


def test_quantity_skews_sizes_but_not_labels():
    split = balanced()
    found = measures(counts(split, divide(split, 5, "quantity", alpha=0.3, min_size=50)))
    labels = measures(counts(split, divide(split, 5, "dirichlet", alpha=0.3, min_size=50)))
    assert found["size_max_over_min"] > 2
    assert found["total_variation"] < 0.2 < labels["total_variation"]


@pytest.mark.parametrize(("kind", "per_domain"), [("domain", False), *((kind, True) for kind in PARTITIONS.names())])
def test_clients_belong_to_one_domain_in_proportion_to_its_size(kind, per_domain):
    domains = np.repeat([0, 1, 2], [700, 290, 10])
    split = split_of(np.arange(1000) % CLASSES, domains)
    parts = divide(split, 10, kind, min_size=2, per_domain=per_domain)
    assert_covers(split, parts, 10)
    own = [set(domains[part]) for part in parts]
    assert all(len(one) == 1 for one in own)
    assert np.bincount([one.pop() for one in own]).tolist() == [6, 3, 1]


def test_fewer_clients_than_domains_is_refused():
    split = split_of([0, 1, 2] * 10, np.arange(30) % 3)
    with pytest.raises(InputError, match=r"federation\.clients: 2 .*3 domains"):
        divide(split, 2, "domain")


@pytest.mark.parametrize("kind", PARTITIONS.names())
def test_more_clients_than_samples_is_refused(kind):
    with pytest.raises(InputError, match=r"^federation\.clients: 11 .*10"):
        divide(split_of(np.arange(10) % CLASSES), 11, kind, min_size=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, r"partition\.alpha: 0\.0"),
        ({"alpha": float("nan")}, r"partition\.alpha"),
        ({"min_size": 0}, r"partition\.min_size: 0"),
        ({"repair": "mve"}, r"partition\.repair: .*did you mean 'move'"),
        ({"dominant_share": 1.2}, r"partition\.dominant_share: 1\.2"),
        ({"shards_per_client": 0}, r"partition\.shards_per_client: 0"),
    ],
)
def test_an_option_outside_its_range_is_refused_by_its_key(options, message):
    with pytest.raises(InputError, match=message):
        divide(balanced(), 4, "iid", **options)


def test_an_unknown_kind_is_refused_with_the_nearest_and_all_kinds():
    with pytest.raises(
        InputError, match=r"partition\.kind: unknown partition 'dirichlett' \(did you mean 'dirichlet'\?\).*shards"
    ):
        divide(balanced(), 4, "dirichlett")


def test_long_tail_keeps_the_exponential_profile():
    labels = np.repeat(np.arange(5), 1000)
    kept = long_tail(labels, 100, np.random.default_rng(0))
    assert np.bincount(labels[kept]).tolist() == [1000, 316, 100, 32, 10]  # 1000 * 100 ** (-c / 4)
    assert len(np.unique(kept)) == len(kept)


def test_long_tail_is_capped_by_what_a_class_holds_and_empties_none():
    labels = np.repeat([0, 1, 2], [100, 3, 5])
    kept = long_tail(labels, 1000, np.random.default_rng(0))
    assert np.bincount(labels[kept]).tolist() == [100, 3, 1]
    with pytest.raises(InputError, match=r"partition\.imbalance_factor: 0\.5"):
        long_tail(labels, 0.5, np.random.default_rng(0))


def test_measures_of_known_tables():
    apart = measures(np.array([[10, 0], [0, 30]]))
    assert apart["total_variation"] == apart["jensen_shannon"] == pytest.approx(1)
    assert apart["classes_per_client"] == 1
    assert apart["size_max_over_min"] == 3
    assert apart["size_variation"] == pytest.approx(0.5)
    alike = measures(np.array([[1, 3], [2, 6], [0, 0]]))  # the empty client is left out
    assert alike["total_variation"] == pytest.approx(0)
    assert alike["jensen_shannon"] == pytest.approx(0, abs=1e-7)
    half = measures(np.array([[1, 1, 0], [0, 1, 1]]))
    assert half["total_variation"] == pytest.approx(0.5)
    assert half["jensen_shannon"] == pytest.approx(np.sqrt(0.5))  # 1/2 bit
    assert measures(np.array([[4, 4]]))["total_variation"] == 0


def test_feature_distance_is_zero_for_random_parts_and_one_where_clients_explain_everything():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(4000, 30))
    parts = np.split(rng.permutation(4000), [40, 400, 2000])
    assert feature_distance(features, parts) < 0.03  # the noise in the mean of 40 alone would make it 0.08
    owner = np.repeat([0, 1, 2, 3], 1000)
    own = [np.flatnonzero(owner == client) for client in range(4)]
    assert feature_distance(np.eye(4)[owner], own) == pytest.approx(1, abs=1e-3)
    moved = features + 0.5 * np.eye(30)[owner]
    assert feature_distance(features, own) < feature_distance(moved, own) < 0.2
    assert feature_distance(features + 3, own) == pytest.approx(feature_distance(features, own), abs=1e-9)
    assert feature_distance(features, [own[0], own[1][:1]]) == 0  # one client alone that can be measured
