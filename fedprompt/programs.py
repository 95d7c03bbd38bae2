"""Programs of the folders ``studies`` and ``benchmarks`` of the repository: their names, and how each is started."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fedprompt import allocation
from fedprompt.errors import InputError, os_error_line

STUDIES = {
    "ablations": "PFPT changed in one place at a time: accuracy, and what becomes of its pool; resumes",
    "blackbox": "Fed-BBPT's accuracy over queries against its baselines: zero-shot, local, centralized, white box",
    "comparison": "all methods on the same clients, data and budget, with one search of rates; resumes",
    "graphs": "DFedSAM and MGS against DFedAvg over graphs, at alpha 0.1: accuracy and consensus; resumes",
    "layers": "prompts before block 0, 6, 8 or 10: time per step, and accuracy in a fixed time",
    "mechanism": "PFPT's server step taken apart, on the prompt sets of a real federation",
    "profit": "the personalization and robustness curve: learning rates, interpolation, client optimizers; resumes",
    "prompts": "do prompts beat none? their start, block, number, rate and image size on validation; resumes",
    "recovery": "how well the set aggregation finds planted correspondences, by scale, noise, schedule and prior",
}
BENCHMARKS = {
    "aggregation": "PFPT's server step against the straightforward form of the published one: speed and growth",
    "communication": "bytes that a client sends and receives per method, next to full fine-tuning",
    "faults": "processes killed, commands stopped, checkpoints damaged: whether runs come to the same numbers",
    "fused": "a fused group of clients against one client after the other: speed and largest difference",
    "gpu": "local training on a GPU: images per second, FLOP utilisation, and the ratio to the obvious way",
    "memory": "peak memory of the demo and of a federation of 20,000 images of 224 px, next to the size of the data",
    "overhead": "from the command to the first local step, the cost of one client's task, the rest of a round",
    "scale": "memory and time per round by clients of the federation and of a cohort; PFPT's server step by cohort",
    "training": "local training on the CPU against the obvious way, and its share of the matrix-product rate",
}
PROGRAMS = {
    **{name: f"python -m studies.{name}" for name in STUDIES},
    **{name: f"python -m benchmarks.{name}" for name in BENCHMARKS},
}


def program(main: Callable[..., None]) -> None:
    """Be a program with the options ``--json FILE`` and ``--quick``; ``main`` gets the path and ``quick``.

    Ends with exit code 2 and one line for bad input, as the command ``fedprompt`` does.
    """
    import click

    from fedprompt.commands import OneLine, guarded
    from fedprompt.interrupts import terminated_as_interrupt

    allocation.prepare()

    class Program(OneLine, click.Command):
        """A command of its own."""

    @click.command(cls=Program, help=main.__doc__)
    @click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the numbers here, too.")
    @click.option("--quick", is_flag=True, help="A smaller version that shows that it works.")
    @guarded
    def command(json_path: Path | None, quick: bool) -> None:
        check_json(json_path)
        with terminated_as_interrupt():
            main(json_path, quick=quick)

    command.main()


def check_json(path: Path | None) -> None:
    """Make the folder of a file of results; raise InputError if it could not be written once all is measured."""
    if path is None:
        return
    found = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise InputError(f"--json: {os_error_line(error)}; allowed: a file that can be written") from None
    if not found:
        path.unlink()
