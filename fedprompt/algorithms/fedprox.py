"""FedProx on prompts (FedProx-PT).

T. Li, A. K. Sahu, M. Zaheer, M. Sanjabi, A. Talwalkar, V. Smith: Federated Optimization in Heterogeneous Networks.
MLSys 2020, arXiv 1812.06127. Algorithm 2: client k minimises, inexactly,

    h_k(w; w^t) = F_k(w) + μ/2 ‖w − w^t‖²

with w^t the params that it was sent; the server averages as FedAvg does. μ = 0 is FedAvg.

``form = reference`` is the form in the published code of the PFPT study (Weng et al., NeurIPS 2024): μ/2 ‖w − w^t‖,
the plain norm of all tensors together, left out in the first round and in every epoch's first batch.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fedprompt.algorithms.base import MethodSettings, Setting, Weight
from fedprompt.algorithms.fedavg import FedAvg
from fedprompt.algorithms.registry import algorithm
from fedprompt.client.rules.base import LocalOptions, LocalRule
from fedprompt.client.rules.proximal import Proximal
from fedprompt.client.rules.registry import make_rule
from fedprompt.models.params import Params


class FedProxSettings(MethodSettings):
    """``mu``: weight of the pull to what was sent. ``form``: the paper's, or the study's published code's."""

    mu: Weight = 1e-3
    form: Literal["paper", "reference"] = "paper"


@algorithm(
    "fedprox",
    "FedProx: FedAvg whose clients are pulled to what they were sent",
    "Li et al., Federated Optimization in Heterogeneous Networks, MLSys 2020, arXiv 1812.06127",
)
class FedProx(FedAvg):
    """FedAvg with a proximal term in every client's loss; personal tensors are not pulled."""

    Settings = FedProxSettings
    settings: FedProxSettings

    def rule(self, options: LocalOptions, round: int) -> LocalRule:
        """The configuration's optimizer, on the loss with the proximal term."""
        if self.settings.form == "reference" and round == 1:
            return make_rule(options)
        return Proximal(make_rule(options), self)

    def penalty(self, away: Params, opens_epoch: Tensor) -> Tensor:
        """The proximal term [C] for params that are ``away`` = w − w^t from their start."""
        squares = [a.square().flatten(1).sum(1) for name, a in away.items() if not self.is_personal(name)]
        square = sum(squares, torch.zeros(len(opens_epoch), device=opens_epoch.device))
        if self.settings.form == "paper":
            return self.settings.mu / 2 * square
        return self.settings.mu / 2 * square.sqrt() * ~opens_epoch

    def pull(self, away: Params, opens_epoch: Tensor) -> Params:
        """Gradient {name: [C, ...]} of the proximal term, for params that are ``away`` = w − w^t from their start."""
        mu = self.settings.mu
        away = {name: torch.zeros_like(a) if self.is_personal(name) else a for name, a in away.items()}
        if self.settings.form == "paper":
            return {name: mu * a for name, a in away.items()}
        norm = torch.cat([a.reshape(len(a), -1) for a in away.values()], dim=1).norm(dim=1)  # [C]
        norm = norm.clamp_min(torch.finfo(norm.dtype).tiny)  # at w = w^t the pull is 0, not 0 / 0
        rows = {name: (-1, *(1,) * (a.ndim - 1)) for name, a in away.items()}
        return {n: mu / 2 * (a / norm.view(rows[n])) * ~opens_epoch.view(rows[n]) for n, a in away.items()}


def pulled(rule: LocalRule, mu: float, setting: Setting) -> LocalRule:
    """A rule with FedProx's pull of weight ``mu`` to what was sent, for other methods; at 0 the rule itself."""
    return Proximal(rule, FedProx(FedProxSettings(mu=mu), setting)) if mu else rule
