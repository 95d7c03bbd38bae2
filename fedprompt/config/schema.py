"""Every option of a run, with its default and its limits: the sections of the configuration."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fedprompt.config import yaml_text
from fedprompt.config.paths import FILE, FILE_OR_WORD, FOLDER_OR_URI
from fedprompt.registry import registry_of


class Section(BaseModel):
    """A part of the configuration: no unknown keys, no changes once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class DataSection(Section):
    """Which images, and how many of them are held out for every choice that is made by looking at results."""

    name: str = "fashion-mnist-small"
    root: Annotated[str | None, FILE] = None
    limit: int | None = Field(None, gt=0, le=1_000_000_000)
    validation: float = Field(0.1, gt=0, lt=1)


class PartitionSection(Section):
    """How training images are divided among clients (``fedprompt/data/partitions``)."""

    kind: str = "dirichlet"
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

    kind: str | None = None
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

    ``kind`` left out: what ``prompt.kind`` goes with, mlp for most. Prototypes are means of public images, or what the
    file ``embeddings`` holds. Public are ``shots`` images of each class, taken out of the training data before the
    partition where anything needs them.
    """

    kind: str | None = None
    hidden: int = Field(512, gt=0, le=1_000_000)
    dropout: float = Field(0.5, ge=0, lt=1)
    input: Literal["features", "logits"] = "features"
    personal: bool = False
    shots: int = Field(8, gt=0, le=1_000_000)
    embeddings: Annotated[str | None, FILE] = None  # .npy or .safetensors, [classes, width]
    scale: float = Field(50.0, gt=0, le=1e6)  # of the cosines with prototypes; CLIP's is 100


class LocalSection(Section):
    """What a client does when it takes part. ``prompt_lr`` is for all but the head.

    Left out: ``optimizer`` (Adam for most), ``momentum`` and ``rho`` are the algorithm's own, the rates those that
    ``optimizer`` or ``prompt.kind`` is registered with.
    """

    optimizer: str | None = None
    lr: float | None = Field(None, gt=0, le=1e38)  # what single precision holds
    prompt_lr: float | None = Field(None, gt=0, le=1e38)
    epochs: int = Field(2, gt=0, le=1_000_000)
    batch_size: int = Field(16, gt=0, le=1_000_000)
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = Field(1e-6, gt=0, le=1e6)
    momentum: float | None = Field(None, ge=0, lt=1)
    rho: float | None = Field(None, ge=0, le=1e6)  # of sharpness-aware minimization; 0: plain gradients


class BlackBoxSection(Section):
    """The model as a service, for the optimizers without gradients (symbols: ``client/rules/zeroth_order.py``).

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
    """What is written beside metrics.jsonl and result.json: ``trackers`` by name.

    ``tensorboard`` adds that tracker or takes it away, and is then null.
    """

    trackers: tuple[str, ...] = ("figures", "tensorboard")
    tensorboard: bool | None = None


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
        kind, head = self.prompt.kind, self.head.kind
        prototypes = head and registry_of("heads").get(head).thing.wants_prototypes and self.head.embeddings is None
        like_tokens = kind and registry_of("kinds").get(kind).holds_tokens and self.prompt.init != "uniform"
        return self.head.shots if prototypes or like_tokens else 0

    @property
    def is_blackbox(self) -> bool:
        """Whether clients ask a service, because their optimizer needs no gradients."""
        rule = self.local.optimizer
        return rule is not None and not registry_of("local_rules").get(rule).needs_gradients

    def to_yaml(self) -> str:
        """The complete configuration, as a file that ``load`` reads back to an equal object."""
        return yaml_text.dump(self.model_dump(mode="json"))
