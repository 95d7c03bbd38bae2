"""Who takes part in the comparison, and what each of them is searched over: six trials for all but whole backbones."""

from __future__ import annotations

from itertools import product

Overrides = tuple[str, ...]


def grid(**keys: tuple[float, ...]) -> tuple[Overrides, ...]:
    """All combinations of values; ``local__lr`` stands for ``local.lr``."""
    names = [name.replace("__", ".") for name in keys]
    return tuple(
        tuple(f"{name}={value:g}" for name, value in zip(names, values, strict=True))
        for values in product(*keys.values())
    )


AVERAGED = grid(local__lr=(5e-4, 1e-3), local__prompt_lr=(1e-3, 3e-3, 1e-2))
TUNED = grid(local__lr=(5e-4, 1e-3), local__prompt_lr=(3e-4, 1e-3, 3e-3))  # where steps of 1e-2 are known to diverge
REMEMBERED = grid(local__lr=(5e-4, 2e-3), algorithm__mu=(0.0, 0.1, 1.0))
UNSEARCHED: Overrides = ("local.lr=5e-4", "local.prompt_lr=1e-3")  # of a method whose trials name something else

ALL_IMAGES = "Fashion-MNIST"
DATA: dict[str, Overrides] = {
    ALL_IMAGES: (),
    "long tail": ("partition.imbalance_factor=50",),
    "two domains": ("data.name=fashion-mnist-small+digits", "data.limit=2000"),  # about as many as the long tail has
}
SKEW: dict[str, Overrides] = {
    "alpha 0.1": ("partition.alpha=0.1",),
    "dominant": ("partition.kind=dominant",),
    "alpha 0.5": ("partition.alpha=0.5",),
}


def setting_of(data: str, skew: str) -> str:
    """What a setting is called: Fashion-MNIST itself goes without saying."""
    return skew if not DATA[data] else f"{data}, {skew}"


SETTINGS = {setting_of(data, skew): (*DATA[data], *SKEW[skew]) for data in DATA for skew in SKEW}
SEARCHED_UNDER = "alpha 0.1"
FIRST = setting_of(ALL_IMAGES, SEARCHED_UNDER)  # where all take part
FEW_IMAGES = ("long tail", "two domains")  # a round has a quarter of the steps there

# name: (what makes the method, its trials)
HEADLINE: dict[str, tuple[Overrides, tuple[Overrides, ...]]] = {
    "pfpt": (("algorithm.name=pfpt",), TUNED),
    "fedavg": (("algorithm.name=fedavg",), AVERAGED),
    "fedprox": (
        ("algorithm.name=fedprox",),
        grid(local__prompt_lr=(1e-3, 3e-3), algorithm__mu=(1e-3, 0.1, 1.0)),
    ),
    "scaffold": (("algorithm.name=scaffold",), grid(local__lr=(3e-3, 1e-2, 3e-2), local__prompt_lr=(0.05, 0.5))),
    "fedopt, adam": (
        ("algorithm.name=fedopt",),
        grid(local__prompt_lr=(1e-3, 3e-3), algorithm__server_lr=(3e-3, 1e-2, 3e-2)),
    ),
    "gmm": (("algorithm.name=gmm",), AVERAGED),
    "pfedpg": (
        ("algorithm.name=pfedpg",),
        grid(local__lr=(5e-4, 2e-3), algorithm__server_lr=(0.05, 0.2, 1.0)),
    ),
    "head": (("algorithm.name=head",), grid(local__lr=(2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3))),
    "adapter, fedavg": (("algorithm.name=fedavg", "prompt.kind=adapter"), TUNED),
    "lora, fedavg": (("algorithm.name=fedavg", "prompt.kind=lora"), TUNED),
    "fedmem, pool": (("algorithm.name=fedmem", "prompt.kind=pool"), REMEMBERED),
    "pfpt-mem": (("algorithm.name=pfpt-mem",), REMEMBERED),
}

# Whole backbones: a round takes ten times as long, so four trials, and only where there are few images.
WHOLE: dict[str, tuple[Overrides, tuple[Overrides, ...]]] = {
    "full, fedavg": (
        ("algorithm.name=fedavg", "prompt.kind=full"),
        grid(local__prompt_lr=(3e-6, 1e-5, 3e-5, 1e-4)),
    ),
}
WITH_TRIALS = {**HEADLINE, **WHOLE}
FOR_WHOLE = tuple(setting_of(data, SEARCHED_UNDER) for data in FEW_IMAGES)


def twice(trial: Overrides) -> Overrides:
    """A trial whose clients learn at twice the rates, those that it leaves to ``UNSEARCHED`` included."""
    rates = {key: float(value) for key, value in (rate.split("=") for rate in (*UNSEARCHED, *trial))}
    return tuple(f"{key}={2 * rate if key.startswith('local.') else rate:g}" for key, rate in rates.items())


SEEDS = (0, 1, 2)
# In the first setting more seeds, for those that a claim about it rests on.
MORE_SEEDS = (3, 4, 5, 6, 7)
SETTLED = ("pfpt", "fedavg", "fedprox", "pfpt-mem")

# What nothing was searched or chosen on, for those that a claim is about, and eight seeds.
UNTUNED = {"digits, alpha 0.1": ("data.name=digits", "partition.alpha=0.1")}
CLAIMED = ("pfpt", "fedavg", "fedprox", "head", "lora, fedavg", "fedmem, pool", "pfpt-mem")
# As many clients, rounds and epochs as in the PFPT study, on all images, for those that a claim is about.
STUDY = {
    "100 clients, alpha 0.1": (
        *SKEW["alpha 0.1"],
        *("federation.clients=100", "federation.cohort=10", "federation.rounds=120", "local.epochs=5"),
        "federation.eval_every=4",
    ),
}
IN_STUDY = ("pfpt", "fedavg", "fedprox", "head", "pfpt-mem")
# Is it the pool that grows? name: (what makes the method, whose chosen rates it takes)
CAPPED: dict[str, tuple[Overrides, str]] = {
    "pfpt, pool of 20": (("algorithm.name=pfpt", "algorithm.max_pool=20"), "pfpt")
}
# Is it the rates? name: (what makes the method, whose chosen rates it takes)
CONTROLS: dict[str, tuple[Overrides, str]] = {
    "fedprox, pool, same rates": (("algorithm.name=fedprox", "prompt.kind=pool"), "pfpt-mem"),
}

# Where memories and pools fall behind: one without the other. name: (what makes the method, whose rates it takes)
BEHIND = ("long tail", "alpha 0.5")
APART: dict[str, tuple[Overrides, str]] = {
    "fedavg, remembered heads": (("algorithm.name=fedmem", "algorithm.remembers=head"), "fedavg"),
    "lora, remembered heads": (
        ("algorithm.name=fedmem", "algorithm.remembers=head", "prompt.kind=lora"),
        "lora, fedavg",
    ),
    "head, remembered": (("algorithm.name=fedmem", "prompt.kind=none"), "head"),
    "fedavg, pool": (("algorithm.name=fedavg", "prompt.kind=pool"), "pfpt"),
    "fedprox, pool, same rates": CONTROLS["fedprox, pool, same rates"],
}

# name: (what makes the method, whose chosen rates it takes)
ONCE: dict[str, tuple[Overrides, str]] = {
    "fedavg, sgd": (("algorithm.name=fedavg", "local.optimizer=sgd"), "scaffold"),
    "fedavg, pool": (("algorithm.name=fedavg", "prompt.kind=pool"), "fedavg"),
    "fedprox, pool": (("algorithm.name=fedprox", "prompt.kind=pool"), "fedprox"),
    "scaffold, pool": (("algorithm.name=scaffold", "prompt.kind=pool"), "scaffold"),
    "fedopt, adam, pool": (("algorithm.name=fedopt", "prompt.kind=pool"), "fedopt, adam"),
    "gmm, pool": (("algorithm.name=gmm", "prompt.kind=pool"), "gmm"),
    "pfedpg, pool": (("algorithm.name=pfedpg", "prompt.kind=pool"), "pfedpg"),
    "gmm, bayesian": (("algorithm.name=gmm", "algorithm.mixture=bayesian"), "gmm"),
    "fedopt, yogi": (("algorithm.name=fedopt", "algorithm.server=yogi"), "fedopt, adam"),
    "fedopt, adagrad": (("algorithm.name=fedopt", "algorithm.server=adagrad"), "fedopt, adam"),
    "fedopt, momentum": (
        ("algorithm.name=fedopt", "algorithm.server=momentum", "algorithm.server_lr=0.3"),
        "fedavg",
    ),
    "fedprox, reference": (("algorithm.name=fedprox", "algorithm.form=reference"), "fedprox"),
    "scaffold, reference": (("algorithm.name=scaffold", "algorithm.form=reference"), "scaffold"),
    "fedopt, adam, reference": (("algorithm.name=fedopt", "algorithm.form=reference"), "fedopt, adam"),
    "pfedpg, cohort": (("algorithm.name=pfedpg", "algorithm.schedule=cohort"), "pfedpg"),
    "mifa": (("algorithm.name=mifa",), "fedavg"),
    "mifa, pool": (("algorithm.name=mifa", "prompt.kind=pool"), "pfpt-mem"),
    "fedmem": (("algorithm.name=fedmem",), "fedmem, pool"),
    "fedmem, head alone": (("algorithm.name=fedmem", "prompt.kind=none"), "fedmem, pool"),
    "lora, fedmem": (("algorithm.name=fedmem", "prompt.kind=lora"), "lora, fedavg"),
    "pfpt-map": (("algorithm.name=pfpt-map",), "pfpt-mem"),
    "adapter, fedprox": (("algorithm.name=fedprox", "prompt.kind=adapter"), "adapter, fedavg"),
    "lora, fedprox": (("algorithm.name=fedprox", "prompt.kind=lora"), "lora, fedavg"),
    "adapter, pfpt-units": (("algorithm.name=pfpt-units", "prompt.kind=adapter"), "adapter, fedavg"),
    "lora, pfpt-units": (("algorithm.name=pfpt-units", "prompt.kind=lora"), "lora, fedavg"),
    "fedavg, personal heads": (("algorithm.name=fedavg", "head.personal=true"), "fedavg"),
    "pfpt, personal heads": (("algorithm.name=pfpt", "head.personal=true"), "pfpt"),
    "frozen": (("algorithm.name=frozen",), "head"),
    "local": (("algorithm.name=local",), "fedavg"),
    "centralized": (("algorithm.name=centralized",), "fedavg"),
}
