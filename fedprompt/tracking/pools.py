"""Snapshots of the prompts over the rounds, one small ``round_0003.npy`` each, for the picture of their trajectory.

Files of their own need no care on a resume: those of later rounds are deleted, the others are still there.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np

from fedprompt.tracking.files import write_atomic

SNAPSHOTS = 60


class PoolSnapshots:
    """Keeps at most ``SNAPSHOTS`` pools in a folder, spread evenly over the rounds, always the first and the last."""

    def __init__(self, folder: Path, resume_round: int | None):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._rounds: list[int] = []
        for path in self.folder.glob("round_*.npy"):
            round = _round_of(path)
            if resume_round is not None and round <= resume_round:
                self._rounds.append(round)
            else:
                path.unlink()
        self._rounds.sort()

    def add(self, round: int, pool: np.ndarray) -> None:
        """Store ``pool`` [P, D] of ``round``; over the limit, the snapshot with the nearest neighbours goes."""
        content = io.BytesIO()
        np.save(content, pool.astype(np.float32), allow_pickle=False)
        write_atomic(self._path(round), content.getvalue())
        self._rounds = sorted({*self._rounds, round})
        if len(self._rounds) > SNAPSHOTS:
            gaps = [after - before for before, after in zip(self._rounds, self._rounds[2:])]
            self._path(self._rounds.pop(1 + int(np.argmin(gaps)))).unlink(missing_ok=True)

    def _path(self, round: int) -> Path:
        return self.folder / f"round_{round:04d}.npy"


def load_pools(folder: Path) -> dict[int, np.ndarray]:
    """Return the finite prompts of all snapshots in a folder, {round: [P, D]}, in the order of the rounds.

    A damaged file costs one point of a picture, so it only warns.
    """
    pools = {}
    for round, path in sorted((_round_of(path), path) for path in folder.glob("round_*.npy")):
        try:
            pool = np.load(path, allow_pickle=False)
        except (ValueError, EOFError, FileNotFoundError):
            warnings.warn(f"{path} cannot be read; the trajectory leaves it out", stacklevel=2)
            continue
        pools[round] = pool[np.isfinite(pool).all(axis=1)]
    return pools


def _round_of(path: Path) -> int:
    return int(path.stem.removeprefix("round_"))
