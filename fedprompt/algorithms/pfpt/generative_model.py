"""The generative model of prompt sets behind PFPT's server step: parameters, objective and its gradient.

Weng et al., "Probabilistic Federated Prompt-Tuning with Non-IID and Imbalanced Data", NeurIPS 2024, arXiv 2502.19752.

Client t's prompts p_tj are draws around candidates φ_k, one-to-one: z_tjk = 1 if prompt j of client t belongs to
candidate k, c_tk = Σ_j z_tjk is 0 or 1, and

    c_tk ~ Bernoulli(p(φ_k)),    p_tj | z_tjk = 1 ~ N(φ_k, diag σ²(φ_k))

where σ(·) is D -> hidden -> D and p(·) is D -> hidden -> 1, both with ReLU inside and a sigmoid at the end. The
objective (``prior="odds"``) is

    Σ_t Σ_j Σ_k z_tjk log N(p_tj; φ_k, σ²(φ_k)) + Σ_t Σ_k [c_tk log p(φ_k) + (1 - c_tk) log(1 - p(φ_k))]

and giving prompt j to candidate k gains W_tjk = log N(p_tj; φ_k, σ²) + log p(φ_k) - log(1 - p(φ_k)), the matching
weights of :mod:`fedprompt.algorithms.pfpt.evidence`. With ``prior="reference"``, as in the authors' code, W_tjk =
log N(p_tj; φ_k, σ²) + n log Bernoulli(c_tk; p(φ_k)) at the current c, and the objective is Σ z_tjk W_tjk: only matched
candidates feel a prior, and it only ever pushes p up. The n is the number of a client's prompts: that code takes c_tk
for n draws of one variable and adds up. ``prior="none"`` leaves the Bernoulli terms out of both: the p-net is never
run, and stays as it was drawn.

Assignments are [C, n] indices of candidates instead of the indicators z_tjk. Gradients are written out, not left to
autograd: the σ-net needs them for the n matched candidates only, and the weights need both nets' forward pass over all
K anyway.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fedprompt.models.linear import plain_linear, product

Prior = Literal["odds", "reference", "none"]

# The gradient of a ReLU: that of its output where the output is above 0.
_relu_backward = torch.ops.aten.threshold_backward.default
# Unused candidates' σ falls without end. Here 1/σ² is still far from overflowing, and no candidate in use comes near.
_LEAST_SIGMA = 1e-15


def _net_shapes(width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of both nets, laid out as ``nn.Sequential(Linear, ReLU, Linear)``."""
    return {
        "sigma.0.weight": (hidden, width),
        "sigma.0.bias": (hidden,),
        "sigma.2.weight": (width, hidden),
        "sigma.2.bias": (width,),
        "p.0.weight": (hidden, width),
        "p.0.bias": (hidden,),
        "p.2.weight": (1, hidden),
        "p.2.bias": (1,),
    }


def initial_parameters(prompts: Tensor, hidden: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Return a fresh model: ``phi`` = ``prompts`` [K, D], and both nets as ``nn.Linear`` starts them.

    The numbers are drawn on the CPU in float32, so that they are the same for every device and precision.
    """
    width = prompts.shape[1]
    parameters = {"phi": prompts.clone()}
    for name, shape in _net_shapes(width, hidden).items():
        bound = (hidden if ".2." in name else width) ** -0.5
        drawn = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        parameters[name] = drawn.to(prompts.device, prompts.dtype)
    return parameters


@dataclass(frozen=True)
class Forward:
    """What both nets say about all candidates, with the hidden activations that their gradients need."""

    hidden_sigma: Tensor  # [K, H]
    sigma: Tensor  # [K, D], at least _LEAST_SIGMA
    hidden_p: Tensor | None  # [K, H]
    logit: Tensor  # [K], log p - log(1 - p); zeros where there is no prior


def forward(parameters: dict[str, Tensor], prior: Prior = "odds") -> Forward:
    """Run both nets on all candidates; without a prior only the σ-net."""
    phi = parameters["phi"]
    hidden_sigma = plain_linear(phi, parameters["sigma.0.weight"], parameters["sigma.0.bias"]).relu_()
    sigma = plain_linear(hidden_sigma, parameters["sigma.2.weight"], parameters["sigma.2.bias"])
    sigma.sigmoid_().clamp_(min=_LEAST_SIGMA)
    if prior == "none":
        return Forward(hidden_sigma, sigma, None, phi.new_zeros(len(phi)))
    hidden_p = plain_linear(phi, parameters["p.0.weight"], parameters["p.0.bias"]).relu_()
    logit = torch.addmv(parameters["p.2.bias"], hidden_p, parameters["p.2.weight"][0])
    return Forward(hidden_sigma, sigma, hidden_p, logit)


def objective(parameters: dict[str, Tensor], sets: Tensor, assignment: Tensor, prior: Prior) -> Tensor:
    """Return the objective (to be maximised, summed over clients) of ``sets`` [C, n, D] under ``assignment`` [C, n]."""
    nets = forward(parameters, prior)
    sigma = nets.sigma[assignment].double()
    standardised = (sets - parameters["phi"][assignment]).double() / sigma
    likelihood = -(0.5 * standardised.square() + sigma.log() + 0.5 * math.log(2 * math.pi)).sum()
    if prior == "none":
        return likelihood
    logit = nets.logit.double()
    matched = F.logsigmoid(logit)[assignment].sum()
    if prior == "reference":
        return likelihood + assignment.shape[1] * matched
    absent = F.logsigmoid(-logit)  # log(1 - p)
    return likelihood + matched + len(sets) * absent.sum() - absent[assignment].sum()


def gradient(
    parameters: dict[str, Tensor], nets: Forward, sets: Tensor, assignment: Tensor, prior: Prior
) -> dict[str, Tensor]:
    """Return the gradient of :func:`objective`, given ``nets = forward(parameters, prior)``; no p-net's if no prior.

    The likelihood concerns the matched candidates only: C·n rows, which repeat where clients share a candidate.
    """
    matched = assignment.flatten()
    grads = _likelihood_gradient(parameters, nets, sets, matched)
    rows = grads["phi"]  # [C·n, D]
    if prior == "odds" and nets.hidden_p is not None:
        # every candidate feels the prior: c_tk - p_k, summed over clients
        p = torch.sigmoid(nets.logit)
        upstream = p.mul_(-len(assignment)).index_add_(0, matched, p.new_ones(len(matched)))
        grads |= _prior_gradient(parameters, parameters["phi"], nets.hidden_p, upstream)
    else:
        if prior == "reference" and nets.hidden_p is not None:  # only the matched ones do: n (1 - p_k)
            phi, hidden = (each.index_select(0, matched) for each in (parameters["phi"], nets.hidden_p))
            upstream = assignment.shape[1] * torch.sigmoid(-nets.logit.index_select(0, matched))
            grads |= _prior_gradient(parameters, phi, hidden, upstream)
            rows += grads["phi"]
        grads["phi"] = torch.zeros_like(parameters["phi"])
    grads["phi"].index_add_(0, matched, rows)  # on a CPU it adds up in a fixed order
    return grads


def _prior_gradient(parameters: dict[str, Tensor], phi: Tensor, hidden: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """Return the p-net's gradient of the prior terms, and that of the rows ``phi`` [R, D] that they concern.

    With u_k, the derivative by the logit (``upstream`` [R]), h_k = relu(V φ_k + a) (``hidden`` [R, H]) and
    logit_k = w·h_k + b: ∂w = Σ_k u_k h_k, and the hidden layer receives g_k = u_k w ⊙ 1[h_k > 0], so ∂V = Σ_k g_k φ_kᵀ
    and ∂φ_k = Vᵀ g_k.
    """
    inner = _relu_backward(upstream.unsqueeze(1) * parameters["p.2.weight"], hidden, 0)  # [R, H]
    return {
        "phi": product(inner, parameters["p.0.weight"]),
        "p.0.weight": product(inner.T, phi),
        "p.0.bias": inner.sum(0),
        "p.2.weight": torch.mv(hidden.T, upstream).unsqueeze(0),
        "p.2.bias": upstream.sum(0, keepdim=True),
    }


def _likelihood_gradient(
    parameters: dict[str, Tensor], nets: Forward, sets: Tensor, matched: Tensor
) -> dict[str, Tensor]:
    """Return the σ-net's gradient of the likelihood, and that of the rows of φ that are ``matched`` [C·n].

    With r = p_tj - φ_k and σ = sigmoid(s): ∂log N/∂φ_k = r / σ² directly, and ∂log N/∂s = (r² / σ² - 1)(1 - σ), which
    goes back through s = W relu(V φ_k + a) + b as in :func:`_prior_gradient`.
    """
    phi, sigma, hidden = (each.index_select(0, matched) for each in (parameters["phi"], nets.sigma, nets.hidden_sigma))
    residual = sets.flatten(0, 1) - phi
    pull = residual / sigma.square()
    upstream = torch.addcmul(residual.new_full((), -1), residual, pull)  # r² / σ² - 1
    upstream.addcmul_(upstream, sigma, value=-1)  # times 1 - σ
    inner = _relu_backward(product(upstream, parameters["sigma.2.weight"]), hidden, 0)
    return {
        "phi": pull.add_(product(inner, parameters["sigma.0.weight"])),
        "sigma.0.weight": product(inner.T, phi),
        "sigma.0.bias": inner.sum(0),
        "sigma.2.weight": upstream.T @ hidden,  # so thin that oneDNN's rearranging would take as long again
        "sigma.2.bias": upstream.sum(0),
    }
