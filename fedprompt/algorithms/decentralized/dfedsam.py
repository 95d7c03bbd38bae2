"""DFedSAM and DFedSAM-MGS on prompts: decentralized averaging of flat local models.

Y. Shi, L. Shen, K. Wei, Y. Sun, B. Yuan, X. Wang, D. Tao: Improving the Model Consistency of Decentralized Federated
Learning. ICML 2023, arXiv 2302.04083. Every client i, with the gradient g of a batch:

    y_i ← x_i;  K times:  y_i ← y_i − η g(y_i + ρ g(y_i) / ‖g(y_i)‖)
    x_i ← Σ_j w_ij y_j,   with multiple gossip steps (MGS) Q times in a row

SAM is a local rule (``client/rules/sam.py``), so both methods are DFedAvg with ρ > 0; ρ = 0.01 (``local.rho``) and
Q = 4 (``algorithm.gossip_steps``) are the defaults here.
"""

from __future__ import annotations

from pydantic import Field

from fedprompt.algorithms.decentralized.base import GossipSettings
from fedprompt.algorithms.decentralized.dfedavg import DFedAvg
from fedprompt.algorithms.registry import algorithm

SOURCE = "Shi et al., Improving the Model Consistency of Decentralized FL, ICML 2023, arXiv 2302.04083"


@algorithm("dfedsam", "DFedSAM: no server, local sharpness-aware SGD, then the average over neighbours", SOURCE)
class DFedSAM(DFedAvg):
    """DFedAvg with SAM's gradients."""

    rho = 0.01


class MGSSettings(GossipSettings):
    """As all without a server; ``gossip_steps``: Q, each of them sends a message over every link."""

    gossip_steps: int = Field(4, ge=1, le=1_000)


@algorithm("dfedsam-mgs", "DFedSAM-MGS: DFedSAM with several gossip steps a round", SOURCE)
class DFedSAMMGS(DFedSAM):
    """DFedSAM that mixes Q times."""

    Settings = MGSSettings
    settings: MGSSettings

    @property
    def gossip_steps(self) -> int:
        """Q."""
        return self.settings.gossip_steps
