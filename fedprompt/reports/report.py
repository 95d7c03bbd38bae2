"""``fedprompt report``: what finished runs came to, as report.md with figures, table.csv and table.tex."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from fedprompt.errors import InputError
from fedprompt.reports import figures
from fedprompt.reports.groups import (
    METHOD,
    SETTING,
    Group,
    defaults,
    is_rate,
    make_groups,
    of_sections,
    partition_words,
    varying,
)
from fedprompt.reports.statistics import WILCOXON_FROM, Comparison, compare, smallest_wilcoxon_p
from fedprompt.reports.tables import ONLY_RAW, comparison_table, raw_table, setting_table, values
from fedprompt.runtime.folders.folders import check_free, mark, marked, present
from fedprompt.sweeps.outcomes import read_endings
from fedprompt.tracking.files import write_atomic
from fedprompt.tracking.plots import save
from fedprompt.tracking.runs import LeftOut, find
from fedprompt.wording import counted

FILES = (
    *("report.md", "table.csv", "table.tex", "alpha*.png"),
    *(f"{name}-*.png" for name in ("accuracy", "rounds", "bytes", "clients", "pool", "trajectory")),
)
COLUMNS_TOLD = (
    "Test accuracy in percent, mean ± sample standard deviation over seeds. best: at the round that is best on "
    "validation; last: after the last round; last ten: mean of the last ten evaluations; validation: the same on the "
    "validation split, by which the rows are ordered; own clients and worst decile: accuracy on the clients' own test "
    "data, mean of the last ten evaluations; MB/round: both ways, all clients; saved: less than full fine-tuning "
    "sends; s/round: with evaluation, on the machine that it ran on."
)
COMPARED_TOLD = (
    "The difference in test accuracy (last ten, percentage points) to the best other method, which is chosen on "
    "validation accuracy among those that share two seeds or more; paired over shared seeds, which share partition and "
    "cohorts; p of the paired t-test, and corrected over this table (Holm; two methods that are each other's baseline "
    "count once)."
)


@dataclass(frozen=True)
class Setting:
    """A setting's methods, best on validation first, and their comparisons by method."""

    name: str
    groups: list[Group]
    comparisons: dict[str, Comparison]

    @property
    def slug(self) -> str:
        """The name as part of a file's name."""
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-.")


def write_report(
    folders: Sequence[Path], output: Path, say: Callable[[str], None] = lambda line: None, *, tsne: bool = False
) -> tuple[int, list[LeftOut]]:
    """Write the report of all runs below ``folders`` into ``output``; returns how many count, and which do not.

    ``say`` is told what is being done. ``tsne``: map PFPT's prompts by t-SNE instead of PCA, which may take minutes.

    Raises:
        InputError: a folder is none, there is no finished run, or ``output`` has files of a report's names that are
            none of a report.
    """
    runs, left_out = find(folders)
    if not runs:
        raise InputError(
            f"{folders[0]}: no finished run among {counted(len(left_out), 'run')}; the first, "
            f"{left_out[0].folder}: {left_out[0].why}"
        )
    say(f"finished runs: {len(runs)}, left out: {len(left_out)}")
    groups, repeated = make_groups(runs)
    left_out = left_out + repeated
    settings = []
    for name in dict.fromkeys(group.setting for group in groups):
        of_setting = [group for group in groups if group.setting == name]
        settings.append(Setting(name, of_setting, compare(of_setting)))
    output.mkdir(parents=True, exist_ok=True)
    if not _is_earlier_report(output):
        check_free(output, "report", FILES)
    comparisons = {(s.name, method): c for s in settings for method, c in s.comparisons.items()}
    write_atomic(output / "table.csv", raw_table(groups, comparisons).to_csv(index=False).encode())
    write_atomic(output / "table.tex", _latex(settings).encode())
    sections = []
    for number, setting in enumerate(settings, start=1):
        say(f"setting {number} of {len(settings)}: drawing the figures of {setting.name}")
        sections += _setting_section(setting, output, tsne)
    parts = [
        *("# Report", _compared(groups, left_out)),
        *_alpha_section(groups, output),
        *sections,
        *_methods_section(groups),
        *_left_out_section(left_out, failed_trials(folders)),
    ]
    write_atomic(output / "report.md", ("\n\n".join(part.strip("\n") for part in parts) + "\n").encode())
    mark(output, "report", present(output, FILES))
    return len(runs) - len(repeated), left_out


def _is_earlier_report(output: Path) -> bool:
    """Whether a version wrote here that left no mark."""
    path = output / "report.md"
    return (
        marked(output, "report") is None and path.exists() and path.read_bytes().startswith(b"# Report\n\n## What was")
    )


def failed_trials(folders: Sequence[Path]) -> list[str]:
    """What the ``results.csv`` of sweeps among the folders say of trials that failed: a line each."""
    return [
        f"{folder / trial}: {reason}"
        for folder in folders
        for trial, (status, reason) in read_endings(folder).items()
        if status == "failed"
    ]


def _compared(groups: Sequence[Group], left_out: Sequence[LeftOut]) -> str:
    """Data, backbone, clients, rounds, seeds and versions, all values that occur."""
    runs = [run for group in groups for run in group.runs]
    found = f"{counted(len(runs), 'finished run')} of {counted(len(groups), 'experiment')}"
    found += f"; {len(left_out)} do not count, see [below](#left-out)" if left_out else "; none is left out"
    keys = [group.keys for group in groups]
    told = {
        "data": (k["data.name"] for k in keys),
        "partition": (partition_words(k) for k in keys),
        "backbone": (
            f"{k['backbone.name']}, weights {k['backbone.weights']}, {k['backbone.image_size']} px" for k in keys
        ),
        "clients": (f"{k['federation.clients']}, {k['federation.cohort']} per round" for k in keys),
        "rounds": (f"{k['federation.rounds']}, evaluated every {k['federation.eval_every']}" for k in keys),
        "seeds": (seed for group in groups for seed in group.seeds),
        "precision": (run.settings.get("runtime.precision") for run in runs),
        "versions": (", ".join(f"{name} {v}" for name, v in run.result["versions"].items()) for run in runs),
    }
    lines = [f"- {name}: {'; '.join(sorted({str(value) for value in of}, key=_by_size))}" for name, of in told.items()]
    found = f"{found}. Numbers with all digits are in [table.csv](table.csv)."
    return "\n".join([f"## What was compared\n\n{found}\n", *lines, "\n## How to read the tables", f"\n{COLUMNS_TOLD}"])


def _setting_section(setting: Setting, output: Path, tsne: bool) -> list[str]:
    parts = [f"## {setting.name}", setting_table(setting.groups).markdown()]
    counts = {len(group.runs) for group in setting.groups}
    if len(counts) > 1:
        parts.append(f"Bold: the best of the methods with {max(counts)} seeds; the others have fewer.")
    parts += [*_personal_heads(setting.groups), *_comparison_section(setting)]
    drawn: dict[str, tuple[str, Callable[[], Figure | None]]] = {
        "accuracy": ("Accuracy of every seed", lambda: figures.accuracy_of_seeds(setting.groups)),
        "rounds": ("Accuracy over the rounds", lambda: figures.accuracy_over_rounds(setting.groups)),
        "bytes": ("Accuracy over the bytes sent", lambda: figures.accuracy_over_bytes(setting.groups)),
        "clients": ("Accuracy of every client", lambda: figures.accuracy_of_clients(setting.groups)),
        "pool": ("Size of the pool", lambda: figures.pool_over_rounds(setting.groups)),
    }
    first = next((g.runs[0] for g in setting.groups if g.keys["algorithm.name"] == "pfpt"), None)
    if first is not None:
        title = f"The pool of PFPT, seed {first.seed}, over the rounds"
        drawn["trajectory"] = (title, lambda: figures.trajectory(figures.load_pools(first), tsne))
    for name, (title, draw) in drawn.items():
        parts += _embedded(draw(), output / f"{name}-{setting.slug}.png", f"{title}: {setting.name}")
    return parts


def _comparison_section(setting: Setting) -> list[str]:
    """The tests, with what they cannot show."""
    if len(setting.groups) < 2:
        return []
    alone = [_seeds_of(group) for group in setting.groups if group.method not in setting.comparisons]
    if not setting.comparisons:
        return [f"No test: no two methods share two seeds or more ({'; '.join(alone)})."]
    compared = list(setting.comparisons.values())
    parts = ["### Against the best other method", COMPARED_TOLD, comparison_table(compared).markdown()]
    if alone:
        parts.append(f"No test of methods that share fewer than two seeds with every other: {'; '.join(alone)}.")
    fewest = min(len(comparison.seeds) for comparison in compared)
    if fewest < WILCOXON_FROM:
        parts.append(_how_little(fewest))
    return parts


def _seeds_of(group: Group) -> str:
    seeds = ", ".join(map(str, group.seeds))
    return f"{group.method}: {'seed' if len(group.seeds) == 1 else 'seeds'} {seeds}"


def _how_little(seeds: int) -> str:
    """What so few seeds can show at all."""
    half = stats.t.ppf(0.975, seeds - 1) / np.sqrt(seeds)
    return (
        f"{seeds} seeds can show little: the 95 % interval reaches {half:.1f} standard deviations of the differences "
        "to both sides, the t-test takes it on trust that they are normally distributed, and Wilcoxon's signed-rank "
        f"test, which does not, cannot fall below p = {smallest_wilcoxon_p(seeds):g} even where one method wins on "
        f"every seed; it is told from {WILCOXON_FROM} seeds on. A difference that is not significant here is not shown "
        "to be absent."
    )


def _personal_heads(groups: Sequence[Group]) -> list[str]:
    """Both scores of the global test set where clients keep their heads."""
    lines = []
    for group in groups:
        own, averaged = (100 * values(group, column).mean() for column in ONLY_RAW.values())
        if not np.isnan(own):
            told = "" if np.isnan(averaged) else f", with the averaged head {averaged:.1f}"
            lines.append(f"{group.method} {own:.1f}{told}")
    told = "Clients with models of their own, global test accuracy (last ten) as the mean over these: "
    return [told + "; ".join(lines) + "."] if lines else []


def _alpha_section(groups: Sequence[Group], output: Path) -> list[str]:
    """Accuracy over α, a figure for each family of settings that differ in nothing else."""
    families: dict[str, list[Group]] = {}
    for group in groups:
        if group.keys.get("partition.kind") == "dirichlet":
            rest = {k: v for k, v in of_sections(group.keys, SETTING).items() if k != "partition.alpha"}
            families.setdefault(repr(rest), []).append(group)
    parts: list[str] = []
    for family in families.values():
        figure = figures.accuracy_over_alpha(family)
        number = "" if not parts else f"-{len(parts) + 1}"
        parts += _embedded(figure, output / f"alpha{number}.png", f"Accuracy over α: {family[0].keys['data.name']}")
    return ["## Accuracy over α", *parts] if parts else []


def _methods_section(groups: Sequence[Group]) -> list[str]:
    """What the short names stand for."""
    keys_of = {group.family: of_sections(group.keys, METHOD) for group in groups}
    always = ("algorithm.name", "prompt.kind", *varying(list(keys_of.values())))
    lines = []
    for family, keys in sorted(keys_of.items()):
        usual = defaults(keys["algorithm.name"])
        told = dict.fromkeys([*always, *(key for key in keys if keys[key] != usual.get(key, ...))])
        words = [f"{key}={keys[key]}" for key in told if key in keys and not is_rate(key)]
        lines.append(f"- {family}: `{' '.join(words)}`")
    text = (
        "What the names stand for: all settings that vary between methods or are no defaults, but for rates, which are "
        "in the tables where they vary and in [table.csv](table.csv)."
    )
    return ["## Methods", text, "\n".join(lines)]


def _left_out_section(left_out: Sequence[LeftOut], failed: Sequence[str]) -> list[str]:
    lines = [f"- `{item.folder}`: {item.why}" for item in left_out]
    parts = ["## Left out", "\n".join(lines) if lines else "No run is left out."]
    return parts + (
        ["Trials that failed, by the sweep's results.csv:", "\n".join(f"- {t}" for t in failed)] if failed else []
    )


def _embedded(figure: Figure | None, path: Path, title: str) -> list[str]:
    if figure is None:
        return []
    save(figure, path)
    return [f"![{title}]({path.name})"]


def _latex(settings: Iterable[Setting]) -> str:
    tables = ["% Needs \\usepackage{booktabs}. \\input this file."]
    for setting in settings:
        tables.append(setting_table(setting.groups).latex(f"{setting.name}. {COLUMNS_TOLD}", setting.slug))
        if setting.comparisons:
            table = comparison_table(list(setting.comparisons.values()))
            tables.append(table.latex(f"{setting.name}. {COMPARED_TOLD}", f"{setting.slug}-compared"))
    return "\n\n".join(tables) + "\n"


def _by_size(text: str) -> tuple[float, str]:
    number = re.match(r"\d+(\.\d+)?$|\d+(?=,)", text)
    return (float(number.group()) if number else 0.0, text)
