"""`fedprompt personalize`: every client of a run goes on tuning for itself, at one learning rate after the other.

It starts from the run's newest checkpoint that is whole (only the newest ones are kept, so the round that is best on
validation may be gone), and from what the method would send each client: so it works on any method's state.
Batches are drawn as in the round after that checkpoint, alike at all learning rates. ``client/personal.py`` says what
is measured, ``personalization/trade_off.py`` what is made of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from pydantic import BeforeValidator, Field

from fedprompt.client.personal import Point, Trains, Tuning
from fedprompt.client.rules.registry import with_gradients
from fedprompt.client.tasks import Task, steps_of
from fedprompt.config import yaml_text
from fedprompt.config.parsing import load
from fedprompt.config.schema import Config, Section
from fedprompt.config.settings import apply, checked
from fedprompt.data import FederatedData
from fedprompt.errors import InputError, did_you_mean, shown
from fedprompt.personalization import trade_off
from fedprompt.runtime.build import build_algorithm, divided_data
from fedprompt.runtime.checkpoints.file import Checkpoint
from fedprompt.runtime.checkpoints.resuming import check_config, check_data, check_state, digests
from fedprompt.runtime.checkpoints.store import store_of
from fedprompt.runtime.federation import LOADING_DATA
from fedprompt.runtime.folders.holders import is_unused
from fedprompt.runtime.folders.locks import entered, refuse_if_used
from fedprompt.runtime.pool import InProcessPool, Pool
from fedprompt.runtime.scoring import subsample
from fedprompt.runtime.training import grouped
from fedprompt.texts import printable
from fedprompt.tracking.files import plain, write_atomic
from fedprompt.tracking.plots import save
from fedprompt.tracking.progress import Minutely
from fedprompt.wording import counted

COMMAND = "fedprompt personalize"
FOLDER, SETTINGS, ROWS, RESULT = "personalize", "personalize.yaml", "personalize.csv", "result.json"


def _as_list(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) else [value]


Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0, le=1e38)]
Listed = BeforeValidator(_as_list)  # one number stands for a list of one


class Personalize(Section):
    """How clients go on tuning. ``trains`` left out: the prompts, or the head where there are none.

    Batch size, and the optimizer's settings beside its rate, are the run's.
    """

    lr: Annotated[tuple[Rate, ...], Listed, Field(min_length=1)] = (1e-3, 1e-2)
    epochs: int = Field(5, ge=0, le=1_000_000)
    optimizer: str = "adam"
    trains: Trains | None = None
    pull: float = Field(0.0, ge=0, le=1e6)  # mu / 2 |w - w_sent|^2 in the loss
    interpolation: Annotated[tuple[Share, ...], Listed] = (0.5,)  # lambda; the client's own model is 1
    averaging: bool = False  # score the mean of the models after each epoch, too
    clients: int | None = Field(None, gt=0, le=1_000_000)  # the first ones; left out: all

    def tuning(self, lr: float) -> Tuning:
        """What clients are told at one learning rate."""
        return Tuning(lr=lr, **self.model_dump(exclude={"lr", "clients"}))


class _Settings(Section):
    personalize: Personalize = Personalize()


@dataclass(frozen=True)
class Plan:
    """A personalization that is ready to start. ``notes``: what the user should know before."""

    config: Config
    settings: Personalize
    checkpoint: Checkpoint
    output: Path
    notes: tuple[str, ...] = ()
    resumes: bool = False

    def text(self) -> str:
        """All settings, as YAML."""
        return yaml_text.dump(
            {**self.config.model_dump(mode="json"), "personalize": self.settings.model_dump(mode="json")}
        )


def settings_of(tree: dict[str, Any], config: Config | None = None) -> Personalize:
    """Check settings, and complete them for a run of ``config``. Raises InputError that names ``personalize.KEY``."""
    settings = checked(_Settings, {"personalize": tree}).personalize
    for key in ("lr", "interpolation"):
        given = getattr(settings, key)
        if len(set(given)) < len(given):
            raise InputError(f"personalize.{key}: {list(given)} has a number twice; allowed: every number once")
    rules = with_gradients("adam")
    if settings.optimizer not in rules:
        raise InputError(
            f"personalize.optimizer: found {shown(settings.optimizer)}{did_you_mean(settings.optimizer, rules)}; "
            f"allowed: {', '.join(rules)}"
        )
    if config is None:
        return settings
    if config.is_blackbox:
        raise InputError(
            f"local.optimizer: the run's is '{config.local.optimizer}', its model is a black box without gradients; "
            "allowed to personalize: runs with gradients, as of adam or sgd"
        )
    if settings.clients and settings.clients > config.federation.clients:
        raise InputError(
            f"personalize.clients: {settings.clients} is more than federation.clients = {config.federation.clients}; "
            f"allowed: 1 to {config.federation.clients}"
        )
    only_head = config.prompt.kind == "none"
    if only_head and settings.trains not in (None, "head"):
        raise InputError(
            f"personalize.trains: '{settings.trains}', but prompt.kind = 'none' has no prompts; allowed: head"
        )
    return settings.model_copy(update={"trains": settings.trains or ("head" if only_head else "prompt")})


def planned(run: Path, overrides: Sequence[str], output: Path | None, resume: bool = False) -> Plan:
    """Read a run, and settings from ``personalize.key=value`` (or, to resume, from ``output``).

    ``runtime.key=value`` says where it happens. Raises InputError where there is no run, settings are wrong, or
    ``output`` holds something that is not to be continued.
    """
    if not (run / "config.yaml").exists():
        raise InputError(f"{run}: no run in it (config.yaml is missing); allowed: the folder of a run")
    output = output or run / FOLDER
    tree: dict[str, Any] = {}
    for override in overrides:
        section = apply(tree, override).partition(".")[0]
        if section not in (("runtime",) if resume else ("personalize", "runtime")):
            kept = f" (the rest is in {output / SETTINGS})" if resume else ""
            allowed = "keys of runtime" if resume else "keys of personalize and runtime"
            raise InputError(f"{override}: cannot be given here{kept}; allowed: {allowed}")
    config = load(run / "config.yaml", [override for override in overrides if override.startswith("runtime.")])
    if output.resolve().is_relative_to(run.resolve()):  # else the run is only read
        refuse_if_used(run, "RUN_DIR")
    if resume:
        return replace(_plan(run, config, _saved(output)["personalize"], output), resumes=True)
    if output.exists() and (not output.is_dir() or not is_unused(output)):
        refuse_if_used(output, "--output")
        raise InputError(f"--output: {output} is not an empty folder; allowed: --resume, or another folder")
    return _plan(run, config, tree.get("personalize", {}), output)


@contextmanager
def written(plan: Plan, session: str | None = None) -> Iterator[None]:
    """Hold the folder that a personalization writes to, for a sweep where that has a ``session``.

    Raises InputError where it is in use, or no longer empty.
    """
    with entered(plan.output, "--output", COMMAND, session=session, patient=session is not None):
        if not plan.resumes and not is_unused(plan.output):
            raise InputError(f"--output: {plan.output} is not an empty folder; allowed: --resume, or another folder")
        yield


def after_run(run: Path, config: Config, settings: Personalize) -> Plan:
    """Personalize a run of a sweep, or go on with that."""
    return replace(_plan(run, config, settings.model_dump(), run / FOLDER), resumes=True)


def _plan(run: Path, config: Config, tree: Any, output: Path) -> Plan:
    settings = settings_of(tree, config)
    store = store_of(config.runtime.storage, run)
    checkpoint = store.latest()
    if checkpoint is None:
        raise InputError(f"{run}: the run has no checkpoint yet; allowed: a run that has begun")
    check_config(checkpoint, config, digests(config), store.name(checkpoint.round))
    if (output / SETTINGS).exists() and (before := _saved(output)["round"]) != checkpoint.round:
        raise InputError(
            f"--resume: {output} began from round {before}, and the run is at round {checkpoint.round} now; "
            "allowed: another --output"
        )
    notes = tuple(f"{name}: {what}; took round {checkpoint.round}" for name, what in store.damaged.items())
    return Plan(config, settings, checkpoint, output, notes)


def _saved(output: Path) -> dict[str, Any]:
    path = output / SETTINGS
    if not path.exists():
        raise InputError(f"--resume: no personalization in {output} ({SETTINGS} is missing); allowed: a folder of one")
    tree = yaml_text.read(path, "settings")
    if not isinstance(tree, dict) or not {"round", "personalize"} <= tree.keys():
        raise InputError(f"{path}: found {shown(tree)}; allowed: the keys round and personalize")
    return tree


def run(plan: Plan, local: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Tune all clients, in this process or on Ray, and write everything; ``say`` gets a line per learning rate.

    What is done when it is interrupted stays. Returns the content of result.json.
    """
    with written(plan):
        say(f"{LOADING_DATA} and the model")
        data = divided_data(plan.config)
        check_data(plan.checkpoint, plan.config, data.fingerprint)
        for note in (*plan.notes, *data.notes):
            say(note)
        with _pool(plan, data, local, say) as pool:
            return personalize(plan, data, pool, say)


@contextmanager
def _pool(plan: Plan, data: FederatedData, local: bool, say: Callable[[str], None]) -> Iterator[Pool]:
    if local:
        with closing(InProcessPool(plan.config, data)) as pool:
            yield pool
        return
    from fedprompt.runtime.ray.on_ray import pool_on_ray

    with pool_on_ray(plan.config, data, plan.output, say) as pool:
        yield pool


def personalize(plan: Plan, data: FederatedData, pool: Pool, say: Callable[[str], None]) -> dict[str, Any]:
    """Tune all clients on ``pool`` at every learning rate that is not done yet; as ``run``."""
    algorithm, name = build_algorithm(plan.config), f"checkpoint of round {plan.checkpoint.round}"
    check_state(plan.checkpoint, algorithm, pool.facts.params, plan.config, name)
    plan.output.mkdir(parents=True, exist_ok=True)
    settings = {"round": plan.checkpoint.round, "personalize": plan.settings.model_dump(mode="json")}
    write_atomic(plan.output / SETTINGS, yaml_text.dump(settings).encode())
    path = plan.output / ROWS
    rows = _rows(path)
    for lr in plan.settings.lr:
        if lr not in set(rows.lr):
            tuned = _tuned(plan, data, pool, lr, Minutely(say))
            rows = pd.concat([rows, tuned]) if len(rows) else tuned
            write_atomic(path, rows.to_csv(index=False).encode())
        say(trade_off.line({"lr": lr, **trade_off.summary(trade_off.curve(rows[rows.lr == lr]))}))
    return _written(plan, data, trade_off.curve(rows))


def _rows(path: Path) -> pd.DataFrame:
    """The rows of the rates that are done. Raises InputError where the file is damaged."""
    if not path.exists():
        return pd.DataFrame({"lr": []})
    needed = [*trade_off.MODEL, *trade_off.ACCURACIES]
    try:
        # a rate is found again only if every digit of it is read
        rows = pd.read_csv(path, converters={"lr": float}, float_precision="round_trip")
        numbers = rows[needed].astype(float)
    except (ValueError, KeyError) as error:
        raise InputError(f"{path}: not a table of {', '.join(needed)} ({printable(str(error), 100)})") from None
    if numbers[trade_off.MODEL].isna().any(axis=None):
        raise InputError(f"{path}: found an empty cell; allowed: a number in each of {', '.join(trade_off.MODEL)}")
    return rows


def _tuned(plan: Plan, data: FederatedData, pool: Pool, lr: float, say: Minutely) -> pd.DataFrame:
    """All clients at one learning rate: a row per client and model; ``say`` is told how many are done."""
    config, settings, state = plan.config, plan.settings, plan.checkpoint.state
    algorithm = build_algorithm(config)
    clients = range(settings.clients or config.federation.clients)
    tasks = [Task(client, algorithm.broadcast(state, client), settings.epochs) for client in clients]
    steps = {c: steps_of(len(data.clients[c]), settings.epochs, config.local.batch_size) for c in clients}
    groups = grouped(tasks, steps, config.runtime.group_size if pool.facts.fusable else 1)
    robust = subsample(data.test.labels, config.seed)
    points: list[Point] = []
    for done in pool.personalize(settings.tuning(lr), plan.checkpoint.round + 1, groups, robust):
        points += done
        say(f"lr {lr:g}: {len({point.client for point in points})} of {counted(len(tasks), 'client')}")
    return trade_off.table(lr, data.sizes, sorted(points, key=lambda point: point.client))


def _written(plan: Plan, data: FederatedData, points: pd.DataFrame) -> dict[str, Any]:
    config = plan.config
    result = {
        "algorithm": config.algorithm.name,
        "dataset": data.name,
        "backbone": config.backbone.name,
        "seed": config.seed,
        "round": plan.checkpoint.round,
        **trade_off.summaries(points),
    }
    write_atomic(plan.output / "curve.csv", points.to_csv(index=False).encode())
    save(trade_off.figure({config.algorithm.name: points}), plan.output / "curve.png")
    write_atomic(plan.output / RESULT, (json.dumps(plain(result), indent=2) + "\n").encode())
    return result
