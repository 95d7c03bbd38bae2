"""Measured comparisons that anyone can run with ``fedprompt bench NAME``."""

from __future__ import annotations

from pathlib import Path

from fedprompt.errors import InputError, os_error_line

BENCHMARKS = {
    "aggregation": "PFPT's server step against the straightforward form of the published one: speed and growth",
    "comparison": "all methods on the same clients, data and budget, with one search of rates; resumes",
    "prompts": "do prompts beat none? their start, block, number, rate and image size on validation; resumes",
    "ablations": "PFPT changed in one place at a time: accuracy, and what becomes of its pool; resumes",
    "mechanism": "PFPT's server step taken apart, on the prompt sets of a real federation",
    "graphs": "DFedSAM and MGS against DFedAvg over graphs, at alpha 0.1: accuracy and consensus; resumes",
    "profit": "the personalization and robustness curve: learning rates, interpolation, client optimizers; resumes",
    "blackbox": "Fed-BBPT's accuracy over queries against its baselines: zero-shot, local, centralized, white box",
    "recovery": "how well the set aggregation finds planted correspondences, by scale, noise, schedule and prior",
    "communication": "bytes that a client sends and receives per method, next to full fine-tuning",
    "fused": "a fused group of clients against one client after the other: speed and largest difference",
    "overhead": "from the command to the first local step, the cost of one client's task, the rest of a round",
    "gpu": "local training on a GPU: images per second, FLOP utilisation, and the ratio to the obvious way",
    "training": "local training on the CPU against the obvious way, and its share of the matrix-product rate",
    "layers": "prompts before block 0, 6, 8 or 10: time per step, and accuracy in a fixed time",
    "scale": "memory and time per round by clients of the federation and of a cohort; PFPT's server step by cohort",
    "memory": "peak memory of the demo and of a federation of 20,000 images of 224 px, next to the size of the data",
    "faults": "processes killed, commands stopped, checkpoints damaged: whether runs come to the same numbers",
}


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
