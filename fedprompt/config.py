"""The experiment as one typed, validated object: a YAML file, then dotted overrides, then the defaults."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from fedprompt import yaml_text
from fedprompt.combinations import check
from fedprompt.errors import InputError, shown
from fedprompt.paths import FILE, FILE_OR_WORD, FOLDER_OR_URI, PathKind
from fedprompt.settings import Section, apply, checked

if TYPE_CHECKING:
    from fedprompt.algorithms.base import Algorithm


class DataSection(Section):
    """Which images, and how many of them are held out for every choice that is made by looking at results."""

    name: str = "fashion-mnist-small"
    root: Annotated[str | None, FILE] = None
    limit: int | None = Field(None, gt=0, le=1_000_000_000)
    validation: float = Field(0.1, gt=0, lt=1)


class PartitionSection(Section):
    """How training images are divided among clients (``fedprompt/data/partition.py``)."""

    kind: Literal["iid", "dirichlet", "dominant", "shards", "quantity", "domain"] = "dirichlet"
    alpha: float = Field(0.1, gt=0, le=1e6)
    min_size: int = Field(16, gt=0, le=1_000_000_000)
    repair: Literal["move", "refuse"] = "move"
    dominant_share: float = Field(0.99, gt=0, le=1)
    shards_per_client: int = Field(2, gt=0, le=1_000_000)
    imbalance_factor: float = Field(1.0, ge=1, le=1e6)


class BackboneSection(Section):
    """The frozen Vision Transformer and where its weights come from: ``offline``, ``hub``, ``random`` or a file."""

    name: str = "vit_small_patch14_dinov2"
    weights: Annotated[str, FILE_OR_WORD] = "offline"
    image_size: int = Field(42, gt=0, le=4096)
    crop: float = Field(1.0, ge=0.1, le=1)  # resize to image_size / crop, then cut the centre: 0.875 is 256 -> 224


class PromptSection(Section):
    """What is trained beside the head. ``kind`` left out: the algorithm's own kind."""

    kind: Literal["prompt", "deep", "pool", "none", "adapter", "lora", "full", "visual"] | None = None
    length: int = Field(10, gt=0, le=4096)
    layer: int = Field(10, ge=0, le=1000)  # the first block with prompts, adapters or LoRA; below it nothing changes
    init: Literal["uniform", "patches", "class"] = "uniform"  # like which tokens of public images prompts are drawn
    rank: int = Field(8, gt=0, le=65_536)  # of LoRA; the hidden units of an adapter
    pool_size: int = Field(20, gt=0, le=100_000)
    top_k: int = Field(10, gt=0, le=4096)
    selection: Literal["batch", "instance"] = "batch"
    query: Literal["trained", "frozen", "identity"] = "trained"  # the projection that the pool is searched with
    similarity: float = Field(
        0.01, ge=-1e6, le=1e6
    )  # lambda, signed: > 0 as in PFPT's published code, < 0 as in learning-to-prompt
    channels: int = Field(16, gt=0, le=4096)  # of the generator of visual prompts: 16 make 6,083 parameters
    strength: float = Field(0.5, gt=0, le=1)  # epsilon: how far a visual prompt moves a pixel at most


class HeadSection(Section):
    """The classifier on top: ``mlp`` = Linear, Dropout, Linear; ``linear`` = one layer; ``prototypes`` = none to train.

    ``kind`` left out: prototypes for visual prompts, else mlp. Prototypes are means of public images, or what the file
    ``embeddings`` holds. Public are ``shots`` images of each class, taken out of the training data before the partition
    where anything needs them.
    """

    kind: Literal["mlp", "linear", "prototypes"] | None = None
    hidden: int = Field(512, gt=0, le=1_000_000)
    dropout: float = Field(0.5, ge=0, lt=1)
    input: Literal["features", "logits"] = "features"
    personal: bool = False
    shots: int = Field(8, gt=0, le=1_000_000)
    embeddings: Annotated[str | None, FILE] = None  # .npy or .safetensors, [classes, width]
    scale: float = Field(50.0, gt=0, le=1e6)  # of the cosines with prototypes; CLIP's is 100


class LocalSection(Section):
    """What a client does when it takes part. ``prompt_lr`` is for all but the head.

    Left out: ``optimizer`` (Adam for most), ``momentum`` and ``rho`` are the algorithm's own, the rates those of
    ``RATES``, or of ``RATES_OF_KIND``.
    """

    optimizer: Literal["adam", "sgd", "spsa-gc", "spsa", "rgf", "cma"] | None = None
    lr: float | None = Field(None, gt=0, le=1e38)  # what single precision holds
    prompt_lr: float | None = Field(None, gt=0, le=1e38)
    epochs: int = Field(2, gt=0, le=1_000_000)
    batch_size: int = Field(16, gt=0, le=1_000_000)
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = Field(1e-6, gt=0, le=1e6)
    momentum: float | None = Field(None, ge=0, lt=1)
    rho: float | None = Field(None, ge=0, le=1e6)  # of sharpness-aware minimization; 0: plain gradients


class BlackBoxSection(Section):
    """The model as a service, for the optimizers without gradients (``fedprompt/client/zeroth.py`` has the symbols).

    ``budget``: queries (images) that each client may ask in training. ``draws``: directions per step of SPSA and RGF.
    ``address``: of a service elsewhere (`fedprompt serve` prints it), with a budget of its own.
    """

    address: str | None = None
    budget: int | None = Field(None, gt=0, le=1_000_000_000_000)
    c: float = Field(0.01, gt=0, le=1e6)
    offset: float = Field(1.0, ge=0, le=1e9)
    alpha: float = Field(0.4, ge=0, le=10)
    gamma: float = Field(0.1, ge=0, le=10)
    beta: float = Field(0.9, ge=0, lt=1)
    draws: int = Field(1, gt=0, le=1_000_000)


PROMPTS = ("prompt", "deep", "pool")  # the kinds that are tokens
ZEROTH_RATES = {"spsa-gc": (5e-4, 5e-4), "spsa": (4e-3, 4e-3), "rgf": (4e-3, 4e-3), "cma": (0.02, 0.02)}
RATES = {"adam": (5e-4, 1e-3), "sgd": (0.01, 0.1), **ZEROTH_RATES}  # lr, prompt_lr
# Where validation preferred others than a pool's (docs/comparison.md), by prompt.kind.
RATES_OF_KIND = {
    "prompt": {"adam": (1e-3, 3e-3)},
    "none": {"adam": (1e-3, 3e-3)},
    "adapter": {"adam": (1e-3, 3e-3)},
    "lora": {"adam": (1e-3, 3e-4)},
    "full": {"adam": (5e-4, 3e-5), "sgd": (0.01, 1e-3)},
}


class AlgorithmSection(BaseModel):
    """The method's name; every other key under ``algorithm`` is the method's own (checked by its ``Settings``)."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = "pfpt"

    @property
    def settings(self) -> dict[str, Any]:
        """The method's own settings."""
        return dict(self.model_extra or {})


class FederationSection(Section):
    """Who takes part, and for how long."""

    clients: int = Field(20, gt=0, le=1_000_000)
    cohort: int = Field(5, gt=0, le=1_000_000)
    rounds: int = Field(25, gt=0, le=999_999)  # names of checkpoints have six digits
    eval_every: int = Field(1, gt=0, le=999_999)
    dropout: float = Field(0.0, ge=0, lt=1)  # probability that a client of a cohort never answers
    deadline: float | None = Field(
        None, gt=0, le=1e9
    )  # in multiples of the cohort's median time; who is later is not waited for
    speed_spread: float = Field(0.5, ge=0, le=10)  # of clients' times per step: the standard deviation of the logarithm
    max_lost: float = Field(0.5, ge=0, le=1)  # share of a round's updates that may be no finite numbers


class RuntimeSection(Section):
    """Where it happens. ``workers`` left out: as many as the machine's GPUs or cores carry."""

    workers: int | None = Field(None, gt=0, le=10_000)
    cpus_per_worker: float = Field(1.0, ge=0.01, le=256)
    gpus_per_worker: float | None = Field(None, ge=0, le=1024)
    group_size: int = Field(3, gt=0, le=1_000_000)  # clients that train as one batch; on a GPU more are faster
    address: str | None = None
    storage: Annotated[str | None, FOLDER_OR_URI] = None
    cache_mb: float = Field(2048, ge=0, le=1e9)
    checkpoint_every: int = Field(1, gt=0, le=999_999)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool = False  # the frozen blocks, by torch.compile; only on a GPU, and it takes a while at the start


class TrackingSection(Section):
    """What is written beside metrics.jsonl and result.json."""

    tensorboard: bool = True


class Config(Section):
    """One experiment, complete."""

    seed: int = Field(0, ge=0, lt=2**63)
    data: DataSection = DataSection()
    partition: PartitionSection = PartitionSection()
    backbone: BackboneSection = BackboneSection()
    prompt: PromptSection = PromptSection()
    head: HeadSection = HeadSection()
    local: LocalSection = LocalSection()
    blackbox: BlackBoxSection = BlackBoxSection()
    algorithm: AlgorithmSection = AlgorithmSection()
    federation: FederationSection = FederationSection()
    runtime: RuntimeSection = RuntimeSection()
    tracking: TrackingSection = TrackingSection()

    @property
    def public_shots(self) -> int:
        """How many images of each class are public: none where neither prototypes nor prompts are made of them."""
        prototypes = self.head.kind == "prototypes" and self.head.embeddings is None
        like_tokens = self.prompt.kind in PROMPTS and self.prompt.init != "uniform"
        return self.head.shots if prototypes or like_tokens else 0

    @property
    def is_blackbox(self) -> bool:
        """Whether clients ask a service, because their optimizer needs no gradients."""
        return self.local.optimizer in ZEROTH_RATES

    def to_yaml(self) -> str:
        """The complete configuration, as a file that ``load`` reads back to an equal object."""
        return yaml_text.dump(self.model_dump(mode="json"))


def load(path: str | Path | None = None, overrides: tuple[str, ...] | list[str] = ()) -> Config:
    """Read a configuration file (all defaults without one), apply ``key.path=value`` overrides and check the whole.

    Raises InputError with one line that names the key, the value and what is allowed.
    """
    tree = _read(Path(path)) if path is not None else {}
    for override in overrides:
        apply(tree, override)
    return from_dict(tree)


def from_dict(tree: dict[str, Any]) -> Config:
    """Check a nested dict of settings and complete it with the defaults, the algorithm's own included."""
    from fedprompt.algorithms import registry  # the registry is no part of reading YAML; `algorithms` never imports us
    from fedprompt.unknown_keys import check_method_keys, did_you_mean

    def hint(name: str, beside: list[str]) -> str:
        return did_you_mean(name, beside, Config)

    config = checked(Config, tree, hint=hint)
    algorithm = registry.get(config.algorithm.name)
    registry.tell_broken()
    check_method_keys(algorithm, list(config.algorithm.settings))
    settings = checked(algorithm.Settings, config.algorithm.settings, "algorithm", hint)
    kind = config.prompt.kind or algorithm.kinds[0]
    complete = {
        "algorithm": AlgorithmSection(name=config.algorithm.name, **settings.model_dump()),
        "prompt": config.prompt.model_copy(update={"kind": kind}),
        "local": _complete_local(config.local, algorithm, kind),
        "head": config.head.model_copy(update={"kind": config.head.kind or own_head(kind)}),
    }
    config = config.model_copy(update=complete)
    check(config, algorithm)
    return config


def _complete_local(local: LocalSection, algorithm: type[Algorithm], kind: str) -> LocalSection:
    """Fill in the optimizer, its settings and the rates that were left out."""
    optimizer = local.optimizer or algorithm.optimizers[0]
    lr, prompt_lr = {**RATES, **RATES_OF_KIND.get(kind, {})}[optimizer]
    rates = {"lr": local.lr or lr, "prompt_lr": local.prompt_lr or prompt_lr}
    own = {name: getattr(algorithm, name) for name in ("momentum", "rho") if getattr(local, name) is None}
    return local.model_copy(update={"optimizer": optimizer, **rates, **own})


def is_path(key: str) -> bool:
    """Whether the setting under a dotted key is a path."""
    return bool(_path_kinds(key))


def made_absolute(key: str, value: Any) -> Any:
    """Return a setting as ``from_dict`` would take it where it is a path, else as it is. Raises InputError."""
    for kind in _path_kinds(key) if isinstance(value, str) else ():
        try:
            value = kind.absolute(value)
        except PydanticCustomError as error:
            raise InputError(f"{key}: found {shown(value)}; allowed: {error.message()}") from None
    return value


def _path_kinds(key: str) -> list[PathKind]:
    """How the value under a dotted key is made absolute; empty where it is no path."""
    from fedprompt.algorithms import registry

    section, _, name = key.partition(".")
    models = [method.Settings for method in registry.available()] if section == "algorithm" else []
    if section in Config.model_fields and isinstance(Config.model_fields[section].default, BaseModel):
        models.append(type(Config.model_fields[section].default))
    fields = (model.model_fields[name] for model in models if name in model.model_fields)
    return [mark for field in fields for mark in field.metadata if isinstance(mark, PathKind)][:1]


def own_head(prompt_kind: str) -> str:
    """``head.kind`` where it is left out."""
    return "prototypes" if prompt_kind == "visual" else "mlp"


def _read(path: Path) -> dict[str, Any]:
    tree = yaml_text.read(path, "configuration file")
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise InputError(
            f"{path}: found a {type(tree).__name__}; allowed: sections such as 'federation:' with keys below"
        )
    sections = {name for name, field in Config.model_fields.items() if name != "seed"}
    return {key: {} if value is None and key in sections else value for key, value in tree.items()}
