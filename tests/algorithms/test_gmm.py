"""GMM-PT against scikit-learn called by hand, and on planted clusters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.mixture import BayesianGaussianMixture, GaussianMixture
from threadpoolctl import threadpool_limits
from tiny import TINY

from fedprompt.algorithms.base import Setting, State
from fedprompt.algorithms.gmm import GMM, GMMSettings
from fedprompt.client.tasks import Update
from fedprompt.config.parsing import load
from fedprompt.errors import InputError
from fedprompt.runtime.checkpoints.store import CheckpointStore
from fedprompt.runtime.run import run_in_process

WIDTH = 16
ESTIMATORS = {"plain": GaussianMixture, "bayesian": BayesianGaussianMixture}


def update(client, params, samples=10):
    return Update(client=client, samples=samples, steps=1, params=params, selected=None, loss=0.0)


def aggregate(sets, name="prompt", seed=0, **settings):
    """What GMM-PT makes of clients' sets [C, ..., L, D]: the next prompts, and its metrics."""
    updates = [update(client, {name: prompts}) for client, prompts in enumerate(sets)]
    state, metrics = GMM(GMMSettings(**settings), Setting(9, len(updates))).aggregate(
        State({name: sets[0]}), updates, np.random.default_rng(seed)
    )
    return state.params[name], metrics


def planted(seed, *, clients=4, prompts=5, noise=0.01, shuffled=True):
    """Clients' noisy copies [C, L, D] of well separated prompts, in any order, and the means [L, D] of the copies."""
    draw = torch.Generator().manual_seed(seed)
    base = torch.randn(prompts, WIDTH, generator=draw)
    copies = base + noise * torch.randn(clients, prompts, WIDTH, generator=draw)
    orders = [torch.randperm(prompts, generator=draw) if shuffled else torch.arange(prompts) for _ in range(clients)]
    return torch.stack([own[order] for own, order in zip(copies, orders, strict=True)]), copies.mean(0)


def apart(first, second):
    """How far two sets of prompts [L, D] are from each other: the largest distance of a best one-to-one pairing."""
    distances = torch.cdist(first.double(), second.double(), compute_mode="donot_use_mm_for_euclid_dist").numpy()
    return distances[linear_sum_assignment(distances)].max()


@pytest.mark.parametrize("prompts", [1, 2, 7])
def test_one_clients_prompts_are_kept_as_a_set(prompts):
    own = torch.randn(1, prompts, WIDTH, generator=torch.Generator().manual_seed(0))
    new, _ = aggregate(own)
    assert new.shape == own[0].shape
    assert apart(new, own[0]) < 1e-6


@pytest.mark.parametrize("mixture", ["plain", "bayesian"])
def test_a_single_point_is_its_own_mean(mixture):
    new, metrics = aggregate(torch.full((1, 1, WIDTH), 3.0), mixture=mixture)
    assert torch.equal(new, torch.full((1, WIDTH), 3.0))
    assert metrics["mixture_iterations"] == 0


@pytest.mark.parametrize("covariance", ["diag", "spherical", "tied", "full"])
@pytest.mark.parametrize("mixture", ["plain", "bayesian"])
def test_means_are_those_of_scikit_learn_on_all_prompts_together(mixture, covariance):
    sets = 0.03 * torch.randn(3, 4, WIDTH, generator=torch.Generator().manual_seed(1))
    new, metrics = aggregate(sets, seed=5, mixture=mixture, covariance=covariance, regularization=1e-5, iterations=20)
    fitted = ESTIMATORS[mixture](
        n_components=4,
        covariance_type=covariance,
        reg_covar=1e-5,
        max_iter=20,
        random_state=int(np.random.default_rng(5).integers(2**31)),
    ).fit(sets.reshape(12, WIDTH).numpy().astype(np.float64))
    np.testing.assert_array_equal(new.numpy(), fitted.means_.astype(np.float32))
    assert metrics["mixture_iterations"] == fitted.n_iter_
    assert new.dtype == torch.float32


@pytest.mark.parametrize("mixture", ["plain", "bayesian"])
@pytest.mark.parametrize("seed", range(3))
def test_well_separated_clusters_are_found_whatever_the_order_of_prompts(seed, mixture):
    sets, means = planted(seed)
    in_order, _ = planted(seed, shuffled=False)
    assert apart(sets.mean(0), means) > 1  # averaging slot by slot would mix different prompts
    # the prior on means counts as one more prompt at the mean of all
    expected = means if mixture == "plain" else (4 * means + means.mean(0)) / 5
    for clients in (sets, in_order):
        new, _ = aggregate(clients, seed=seed, mixture=mixture)
        assert apart(new, expected) < 1e-4


def test_every_block_of_deep_prompts_is_fitted_for_itself():
    blocks = [planted(seed) for seed in (3, 4, 5)]
    sets = torch.stack([sets for sets, _ in blocks], dim=1)  # [C, blocks, L, D]
    new, _ = aggregate(sets, "deep")
    assert new.shape == sets.shape[1:]
    for block, (_, means) in enumerate(blocks):
        assert apart(new[block], means) < 1e-4


def test_iterations_reported_are_the_mean_over_blocks():
    sets = torch.randn(4, 2, 3, WIDTH, generator=torch.Generator().manual_seed(7))
    _, metrics = aggregate(sets, "deep", seed=2)
    draw, counts = np.random.default_rng(2), []
    for block in range(2):
        fit = GaussianMixture(3, covariance_type="diag", random_state=int(draw.integers(2**31)))
        counts.append(fit.fit(sets[:, block].reshape(12, WIDTH).double().numpy()).n_iter_)
    assert metrics["mixture_iterations"] == np.mean(counts)


def test_what_is_not_a_prompt_is_averaged_by_samples_and_the_pool_keeps_its_size():
    sets, means = planted(6, prompts=6)
    others = [{"query_proj": torch.full((2, 2), float(c)), "head.2.bias": torch.tensor([c * 2.0])} for c in range(4)]
    samples = [10, 20, 30, 40]
    updates = [update(c, {"pool": sets[c], **others[c]}, samples[c]) for c in range(4)]
    algorithm = GMM(GMMSettings(), Setting(9, 4))
    state, _ = algorithm.aggregate(State({"pool": sets[0], **others[0]}), updates, np.random.default_rng(0))
    mean = sum(c * n for c, n in enumerate(samples)) / 100
    assert torch.allclose(state.params["query_proj"], torch.full((2, 2), mean))
    assert state.params["head.2.bias"].item() == pytest.approx(2 * mean)
    assert state.params["pool"].shape == sets[0].shape
    assert apart(state.params["pool"], means) < 1e-4  # numbers of samples do not weigh prompts


def test_the_number_of_threads_changes_no_bit():
    """Beyond 511 points k-means works in several chunks and adds up what its threads found as it comes.

    In float64, as no bit of the fit is then rounded away.
    """
    sets = 0.03 * torch.randn(12, 50, 64, generator=torch.Generator().manual_seed(8)).double()
    made = []
    for threads in (1, 4):
        with threadpool_limits(threads):
            made.append(aggregate(sets, iterations=5)[0])
    assert torch.equal(*made)


@pytest.mark.runs
@pytest.mark.parametrize("kind", ["prompt", "deep", "pool"])
@pytest.mark.parametrize("mixture", ["plain", "bayesian"])
def test_prompts_keep_their_shape_through_a_run(tmp_path, kind, mixture):
    overrides = [*TINY, "algorithm.name=gmm", f"algorithm.mixture={mixture}", f"prompt.kind={kind}"]
    records = list(run_in_process(load(None, overrides), tmp_path))
    params = CheckpointStore(str(tmp_path / "checkpoints")).latest().state.params
    shapes = {"prompt": (10, 64), "deep": (params[kind].shape[0], 10, 64), "pool": (6, 64)}
    assert params[kind].shape == shapes[kind]
    assert torch.isfinite(params[kind]).all()
    assert all(record["aggregate"]["mixture_iterations"] >= 1 for record in records[1:-1])
    if kind == "pool":
        assert records[-1]["result"]["pool_size"] == {"first": 6, "last": 6}


def test_what_is_no_set_of_prompts_is_refused():
    with pytest.raises(InputError, match=r"prompt\.kind: 'adapter' does not go with algorithm\.name = 'gmm'"):
        load(None, ["algorithm.name=gmm", "prompt.kind=adapter"])
