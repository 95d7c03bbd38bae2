"""D-PSGD on prompts: decentralized parallel SGD.

X. Lian, C. Zhang, H. Zhang, C.-J. Hsieh, W. Zhang, J. Liu: Can Decentralized Algorithms Outperform Centralized
Algorithms? NeurIPS 2017, arXiv 1705.09056. Algorithm 1, with the step before the average, an order that the paper
allows; every round each client i takes one gradient on one batch:

    x_i ← Σ_j w_ij (x_j − γ ∇F_j(x_j; ξ_j))

So a round trains less than that of any other method here; ``local.epochs`` has no part in it.
"""

from __future__ import annotations

from fedprompt.algorithms.decentralized.base import Decentralized
from fedprompt.algorithms.registry import algorithm


@algorithm(
    "dpsgd",
    "D-PSGD: no server, one gradient step a round, then the average over neighbours",
    "Lian et al., Can Decentralized Algorithms Outperform Centralized Algorithms?, NeurIPS 2017, arXiv 1705.09056",
)
class DPSGD(Decentralized):
    """One local step, then mixing."""

    optimizers = ("sgd",)
    takes_momentum = False  # of which one step would know nothing

    def epochs(self, epochs: int) -> float:
        """So little that it makes one step, the least there is."""
        return 0.0
