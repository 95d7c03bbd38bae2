"""Features that one run leaves to the next in the same process."""

from __future__ import annotations

import numpy as np
import pytest

from fedprompt.client.examples import Examples
from fedprompt.config.parsing import load
from fedprompt.data.inputs import ImageInputs
from fedprompt.runtime.features import FeatureMemory
from fedprompt.runtime.run import run_in_process
from fedprompt.runtime.worker import Worker

ROOMY = 1000.0


@pytest.fixture
def prepared(monkeypatch):
    """Sizes of the example sets whose features were computed, as it happens."""
    sizes = []
    original = Worker.prepare

    def count(self, examples, images, keep_tokens):
        sizes.append(len(examples))
        return original(self, examples, images, keep_tokens)

    monkeypatch.setattr(Worker, "prepare", count)
    return sizes


def run(runs, name, memory, *overrides):
    return list(run_in_process(runs.config(*overrides), runs.folder / name, memory))


@pytest.mark.parametrize("kind", ["prompt", "pool", "none"])
def test_a_second_run_computes_nothing_anew_and_gives_the_same_bits(runs, prepared, same_params, kind):
    memory, options = FeatureMemory(ROOMY), ("algorithm.name=fedavg", f"prompt.kind={kind}")
    run(runs, "first", memory, *options)
    once = len(prepared)
    assert once >= 3  # validation, test, and the clients that took part
    run(runs, "second", memory, *options)
    assert len(prepared) == once
    run(runs, "alone", None, *options)
    assert len(prepared) == 2 * once
    for name in ("second", "alone"):
        assert same_params(runs.params("first"), runs.params(name))
        assert runs.lines("first") == runs.lines(name)


def test_runs_that_differ_in_what_is_trained_or_how_share_features(runs, prepared):
    memory = FeatureMemory(ROOMY)
    run(runs, "first", memory, "algorithm.name=fedavg", "federation.cohort=6")
    once = len(prepared)
    run(runs, "rate", memory, "algorithm.name=fedavg", "federation.cohort=6", "local.lr=0.01")
    run(runs, "kind", memory, "algorithm.name=fedavg", "federation.cohort=6", "prompt.kind=deep")
    run(runs, "method", memory, "algorithm.name=fedprox", "federation.cohort=6")
    assert len(prepared) == once


@pytest.mark.parametrize(
    "override",
    [
        "prompt.layer=3",
        "runtime.precision=bfloat16",
        "seed=1",
        "backbone.crop=0.9",
        "runtime.cpus_per_worker=2",
    ],
)
def test_another_layer_precision_or_other_images_share_nothing(runs, prepared, same_params, override):
    memory, options = FeatureMemory(ROOMY), ("algorithm.name=fedavg", "federation.rounds=1")
    run(runs, "first", memory, *options)
    before = len(prepared)
    run(runs, "other", memory, *options, override)
    anew = prepared[before:]
    run(runs, "alone", None, *options, override)
    assert sorted(prepared[before + len(anew) :]) == sorted(anew)  # threads take them as they come
    assert same_params(runs.params("other"), runs.params("alone"))


def test_a_pool_needs_more_of_an_image_than_a_prompt_and_shares_nothing_with_it(runs, prepared):
    memory, options = FeatureMemory(ROOMY), ("algorithm.name=fedavg", "federation.rounds=1")
    run(runs, "prompt", memory, *options)
    once = len(prepared)
    run(runs, "pool", memory, *options, "prompt.kind=pool")
    assert len(prepared) == 2 * once


def raw(seed, n=8):
    images = np.random.default_rng(seed).integers(0, 256, (n, 4, 4, 1), dtype=np.uint8)
    return Examples(np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64), ImageInputs(images))


def made_of(examples, kilobytes):
    tokens = np.full((len(examples), kilobytes * 128 // len(examples)), examples.inputs.pixels().mean())  # float64
    return Examples(examples.labels, examples.domains, None, tokens)


class Asked:
    """A memory that is asked for features of 300 KB each, and which of them it had to have made."""

    def __init__(self, megabytes):
        self.memory, self.config, self.made = FeatureMemory(megabytes), load(None, []), []

    def __call__(self, seed, what="tokens", examples=None):
        examples = examples or raw(seed)

        def make():
            self.made.append(seed)
            return made_of(examples, 300)

        return self.memory.get(self.config, what, examples, make)


def test_the_least_recently_used_is_forgotten_beyond_the_limit():
    ask = Asked(megabytes=1)  # room for three
    for seed in (0, 1, 2, 0, 3):  # 1 is now the one that was not asked for the longest
        ask(seed)
    assert ask.made == [0, 1, 2, 3]
    for seed in (0, 2, 3):
        ask(seed)
    assert ask.made == [0, 1, 2, 3]
    ask(1)  # takes the place of 0
    ask(0)
    assert ask.made == [0, 1, 2, 3, 1, 0]


def test_what_is_larger_than_the_limit_is_kept_until_the_next_comes():
    ask = Asked(megabytes=0.1)
    first = ask(0)
    assert ask(0) is first
    ask(1)
    assert ask(0) is not first
    assert ask.made == [0, 1, 0]


def test_images_labels_domains_and_what_is_wanted_all_count():
    ask, plain = Asked(ROOMY), raw(0)
    known = ask(0, examples=plain)
    assert ask(0, examples=raw(0)) is known  # equal images are the same, wherever they lie
    changed = plain.inputs.pixels().copy()
    changed[-1, -1, -1] ^= 1
    others = [
        Examples(plain.labels, plain.domains, ImageInputs(changed)),
        Examples(plain.labels + 1, plain.domains, plain.inputs),
        Examples(plain.labels, plain.domains + 1, plain.inputs),
        Examples(plain.labels, plain.domains, ImageInputs(plain.inputs.pixels().reshape(8, 2, 8, 1))),
    ]
    answers = [ask(0, examples=other) for other in others] + [ask(0, what="query", examples=plain)]
    assert len({id(answer) for answer in [known, *answers]}) == 6
    assert len(ask.made) == 6
