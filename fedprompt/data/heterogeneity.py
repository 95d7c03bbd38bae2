"""How unlike the clients are, as numbers: label distributions and sizes."""

from __future__ import annotations

import numpy as np


def measures(class_counts: np.ndarray) -> dict[str, float]:
    """Measure the heterogeneity of clients from their class counts [N, K].

    ``total_variation`` and ``jensen_shannon`` are means over all pairs of clients of the distance between their label
    distributions (both from 0, equal, to 1, no class in common; Jensen-Shannon to base 2, square root included),
    ``classes_per_client`` is a mean, ``size_max_over_min`` and ``size_variation`` (standard deviation over mean)
    describe the sizes. Clients without samples are left out; fewer than two clients have distance 0.
    """
    from scipy.spatial.distance import pdist  # a tenth of what every worker would import

    counts = np.asarray(class_counts, dtype=np.float64)
    counts = counts[counts.sum(axis=1) > 0]
    if len(counts) == 0:
        raise ValueError("no client has samples")
    sizes = counts.sum(axis=1)
    shares = counts / sizes[:, None]  # [N, K]
    pairs = len(counts) > 1
    return {
        "total_variation": float(pdist(shares, "cityblock").mean() / 2) if pairs else 0.0,
        # scipy's distance is the square root of the divergence in nats
        "jensen_shannon": float(pdist(shares, "jensenshannon").mean() / np.sqrt(np.log(2))) if pairs else 0.0,
        "classes_per_client": float((counts > 0).sum(axis=1).mean()),
        "size_max_over_min": float(sizes.max() / sizes.min()),
        "size_variation": float(sizes.std() / sizes.mean()),
    }
