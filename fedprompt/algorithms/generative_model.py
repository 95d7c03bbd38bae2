"""The generative model of prompt sets behind PFPT's server step: parameters, objective, gradient and matching weights.

Weng et al., "Probabilistic Federated Prompt-Tuning with Non-IID and Imbalanced Data", NeurIPS 2024, arXiv 2502.19752.

Client t's prompts p_tj are draws around candidates φ_k, one-to-one: z_tjk = 1 if prompt j of client t belongs to
candidate k, c_tk = Σ_j z_tjk is 0 or 1, and

    c_tk ~ Bernoulli(p(φ_k)),    p_tj | z_tjk = 1 ~ N(φ_k, diag σ²(φ_k))

where σ(·) is D -> hidden -> D and p(·) is D -> hidden -> 1, both with ReLU inside and a sigmoid at the end. The
objective (``prior="odds"``) is

    Σ_t Σ_j Σ_k z_tjk log N(p_tj; φ_k, σ²(φ_k)) + Σ_t Σ_k [c_tk log p(φ_k) + (1 - c_tk) log(1 - p(φ_k))]

and giving prompt j to candidate k gains W_tjk = log N(p_tj; φ_k, σ²) + log p(φ_k) - log(1 - p(φ_k)). With
``prior="reference"``, as in the authors' code, W_tjk = log N(p_tj; φ_k, σ²) + log Bernoulli(c_tk; p(φ_k)) at the
current c, and the objective is Σ z_tjk W_tjk: only matched candidates feel a prior, and it only ever pushes p up.

Assignments are [C, n] indices of candidates instead of the indicators z_tjk. Gradients are written out, which measured
1.5 times faster a step than autograd: the σ-net needs them for the n matched candidates only, and the weights need
both nets' forward pass over all K anyway.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Prior = Literal["odds", "reference"]

# Candidates per block of the pairwise likelihood: larger float64 temporaries leave the cache, measured 4 times slower.
_BLOCK = 64
# Where exp(-2 log σ) is still far from overflowing in float64. No candidate in use comes near.
_LEAST_LOG_SIGMA = -300.0


def parameter_shapes(candidates: int, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of φ [K, D] and of both nets, laid out as ``nn.Sequential(Linear, ReLU, Linear)``."""
    return {
        "phi": (candidates, width),
        "sigma.0.weight": (hidden, width),
        "sigma.0.bias": (hidden,),
        "sigma.2.weight": (width, hidden),
        "sigma.2.bias": (width,),
        "p.0.weight": (hidden, width),
        "p.0.bias": (hidden,),
        "p.2.weight": (1, hidden),
        "p.2.bias": (1,),
    }


def views(flat: Tensor, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return named views that together cover the one-dimensional buffer ``flat``."""
    parts = flat.split([math.prod(shape) for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def initial_parameters(prompts: Tensor, hidden: int, generator: torch.Generator) -> Tensor:
    """Return the flat buffer of a fresh model: φ = ``prompts`` [K, D], nets as ``nn.Linear`` starts them.

    The numbers are drawn on the CPU in float32, so that they are the same for every device and precision.
    """
    candidates, width = prompts.shape
    flat = torch.empty(sum(map(math.prod, parameter_shapes(candidates, width, hidden).values())))
    for name, view in views(flat, parameter_shapes(candidates, width, hidden)).items():
        if name != "phi":
            fan_in = hidden if ".2." in name else width
            view.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)
    flat = flat.to(prompts.device, prompts.dtype)
    flat[: prompts.numel()] = prompts.reshape(-1)
    return flat


@dataclass(frozen=True)
class Forward:
    """What both nets say about all candidates, with the hidden activations that their gradients need."""

    hidden_sigma: Tensor  # [K, H]
    log_sigma: Tensor  # [K, D]
    hidden_p: Tensor  # [K, H]
    logit: Tensor  # [K], log p - log(1 - p)


def forward(parameters: dict[str, Tensor]) -> Forward:
    """Run both nets on all candidates."""
    phi = parameters["phi"]
    hidden_sigma = F.linear(phi, parameters["sigma.0.weight"], parameters["sigma.0.bias"]).relu()
    hidden_p = F.linear(phi, parameters["p.0.weight"], parameters["p.0.bias"]).relu()
    sigma = F.linear(hidden_sigma, parameters["sigma.2.weight"], parameters["sigma.2.bias"])
    logit = F.linear(hidden_p, parameters["p.2.weight"], parameters["p.2.bias"])
    return Forward(hidden_sigma, F.logsigmoid(sigma), hidden_p, logit.squeeze(1))


def log_likelihood(prompts: Tensor, phi: Tensor, log_sigma: Tensor) -> Tensor:
    """Return log N(prompt; φ_k, σ_k²) for every prompt and candidate: [n, D], [K, D], [K, D] -> float64 [n, K].

    The square is expanded into two matrix products. Its terms are thousands of times larger than the distances of
    prompts that belong together, hence float64 for the products and sums; also, at unused candidates the σ-net
    extrapolates to σ of 1e-17 and less, whose squares float32 does not hold.
    """
    prompts = prompts.double()
    blocks = zip(phi.split(_BLOCK), log_sigma.split(_BLOCK), strict=True)
    return torch.cat([_block_log_likelihood(prompts, *block) for block in blocks], 1)


def _block_log_likelihood(prompts: Tensor, phi: Tensor, log_sigma: Tensor) -> Tensor:
    precision = torch.exp(-2 * log_sigma.double().clamp(min=_LEAST_LOG_SIGMA))
    phi = phi.double()
    scaled = phi * precision
    distance = prompts.square() @ precision.T - 2 * (prompts @ scaled.T) + torch.linalg.vecdot(phi, scaled)  # [n, K]
    log_determinant = 2 * log_sigma.sum(1, dtype=torch.float64)
    constant = log_determinant + phi.shape[1] * math.log(2 * math.pi)
    return -0.5 * (distance.clamp_(min=0) + constant)  # rounding must not make a distance negative


def matching_weights(prompts: Tensor, phi: Tensor, nets: Forward, assignment: Tensor, prior: Prior) -> Tensor:
    """Return W [C, n, K] in float64 for the clients' prompts [C, n, D] under their current assignment [C, n]."""
    weights = log_likelihood(prompts.flatten(0, 1), phi, nets.log_sigma).view(*prompts.shape[:2], -1)
    logit = nets.logit.double()
    if prior == "odds":
        return weights + logit
    bernoulli = F.logsigmoid(-logit).repeat(len(prompts), 1)  # [C, K]
    bernoulli.scatter_(1, assignment, F.logsigmoid(logit)[assignment])
    return weights + bernoulli.unsqueeze(1)


def objective(parameters: dict[str, Tensor], sets: Tensor, assignment: Tensor, prior: Prior) -> Tensor:
    """Return the objective (to be maximised, summed over clients) of ``sets`` [C, n, D] under ``assignment`` [C, n]."""
    nets = forward(parameters)
    log_sigma = nets.log_sigma[assignment].double()
    standardised = (sets - parameters["phi"][assignment]).double() * torch.exp(-log_sigma)
    likelihood = -(0.5 * standardised.square() + log_sigma + 0.5 * math.log(2 * math.pi)).sum()
    logit = nets.logit.double()
    matched = F.logsigmoid(logit)[assignment].sum()
    if prior == "reference":
        return likelihood + matched
    absent = F.logsigmoid(-logit)  # log(1 - p)
    return likelihood + matched + len(sets) * absent.sum() - absent[assignment].sum()


def write_gradient(
    parameters: dict[str, Tensor],
    nets: Forward,
    sets: Tensor,
    assignment: Tensor,
    prior: Prior,
    out: dict[str, Tensor],
) -> None:
    """Write the gradient of :func:`objective` into ``out``, given ``nets = forward(parameters)``."""
    _write_p_gradient(parameters, nets, assignment, prior, out)
    _add_sigma_gradient(parameters, nets, sets, assignment, out)


def _write_p_gradient(
    parameters: dict[str, Tensor], nets: Forward, assignment: Tensor, prior: Prior, out: dict[str, Tensor]
) -> None:
    """Write the gradient of the prior terms. d/dlogit of c log p + (1 - c) log(1 - p) is c - p."""
    users = torch.zeros_like(nets.logit)
    for row in assignment:  # within a client no index repeats, so plain indexing adds up, in a fixed order
        users[row] += 1
    exposed = users if prior == "reference" else torch.full_like(users, len(assignment))
    upstream = users - exposed * torch.sigmoid(nets.logit)  # [K]
    out["p.2.bias"].copy_(upstream.sum())
    torch.mm(upstream.unsqueeze(0), nets.hidden_p, out=out["p.2.weight"])
    hidden = upstream.unsqueeze(1) * parameters["p.2.weight"] * (nets.hidden_p > 0)  # [K, H]
    torch.sum(hidden, 0, out=out["p.0.bias"])
    torch.mm(hidden.T, parameters["phi"], out=out["p.0.weight"])
    torch.mm(hidden, parameters["p.0.weight"], out=out["phi"])


def _add_sigma_gradient(
    parameters: dict[str, Tensor], nets: Forward, sets: Tensor, assignment: Tensor, out: dict[str, Tensor]
) -> None:
    """Write the σ-net's gradient of the likelihood, and add the likelihood's to that of φ; matched rows only."""
    matched = assignment.flatten()
    phi, log_sigma, hidden = parameters["phi"][matched], nets.log_sigma[matched], nets.hidden_sigma[matched]
    residual = sets.flatten(0, 1) - phi
    pull = residual * torch.exp(-2 * log_sigma)  # d log N / d φ, without the way through σ
    upstream = (residual * pull - 1) * -torch.expm1(log_sigma)  # (r²/σ² - 1) (1 - σ): through σ = sigmoid(·)
    torch.sum(upstream, 0, out=out["sigma.2.bias"])
    torch.mm(upstream.T, hidden, out=out["sigma.2.weight"])
    inner = (upstream @ parameters["sigma.2.weight"]) * (hidden > 0)
    torch.sum(inner, 0, out=out["sigma.0.bias"])
    torch.mm(inner.T, phi, out=out["sigma.0.weight"])
    total = torch.addmm(pull, inner, parameters["sigma.0.weight"]).view_as(sets)
    for row, of_client in zip(assignment, total, strict=True):
        out["phi"][row] += of_client
