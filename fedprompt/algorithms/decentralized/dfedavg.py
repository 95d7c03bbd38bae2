"""DFedAvg and DFedAvgM on prompts: decentralized federated averaging.

T. Sun, D. Li, B. Wang: Decentralized Federated Averaging. IEEE TPAMI 45(4), 2023, arXiv 2104.11375. Every client i:

    y_i ← x_i;  K times:  y_i ← y_i − η g_i(y_i) + θ (y_i − its value one step before)
    x_i ← Σ_j w_ij y_j

DFedAvg is θ = 0. The momentum starts anew in every round. K is as many batches as ``local.epochs`` have.
The paper's quantised form sends the rounded move of a round; here ``algorithm.compress`` is for messages of all methods
(``gossip.py``), and also brings clients together that have come apart.
"""

from __future__ import annotations

from fedprompt.algorithms.decentralized.base import Decentralized
from fedprompt.algorithms.registry import algorithm

SOURCE = "Sun, Li, Wang, Decentralized Federated Averaging, IEEE TPAMI 2023, arXiv 2104.11375"


@algorithm("dfedavg", "DFedAvg: no server, local SGD, then the average over neighbours", SOURCE)
class DFedAvg(Decentralized):
    """Local epochs, then mixing."""


@algorithm("dfedavgm", "DFedAvgM: DFedAvg with momentum in the local steps", SOURCE)
class DFedAvgM(DFedAvg):
    """θ is ``local.momentum``, by default 0.9."""

    optimizers = ("sgd",)
    momentum = 0.9
