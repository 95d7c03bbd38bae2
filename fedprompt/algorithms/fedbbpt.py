"""Federated black-box prompt tuning (Fed-BBPT).

Z. Lin, Y. Sun, Y. Shi, X. Wang, L. Huang, L. Shen, D. Tao: Efficient Federated Prompt Tuning for Black-box Large
Pre-trained Models. arXiv 2310.03123, 2023. The model F is a service that gives class scores for images, and neither
parameters nor gradients. Client k owns the params φ of a prompt generator g and minimises over its data D_k

    L_k(φ) = E_{(x, y) in D_k} CE(F(clip(x + ε g_φ(x))), y)

by zeroth-order steps, with SPSA and gradient correction (``client/rules/zeroth_order.py``):

    m ← β m − a_i ĝ(φ + β m),   φ ← φ + m,   ĝ(φ) = (L(φ + c_i Δ) − L(φ − c_i Δ)) / (2 c_i) · Δ^{-1}

The server averages generators: φ_{t+1} = Σ_{k in S_t} n_k / n · φ_{t+1}^k. A step costs two queries per image.

So it is FedAvg whose clients ask instead of differentiating, and that is all that is here: the estimator is
``local.optimizer`` (spsa-gc, spsa, rgf, cma), a is ``local.prompt_lr``, the other gains and the budget are the section
``blackbox``. With one of these optimizers every other method is a black-box one in the same way: ``fedprox`` and
``fedopt`` are other servers and clients for it, ``local`` and ``centralized`` its reference points, and ``fedavg`` with
adam on the same generator its white-box counterpart. The round 0 of each is the service without any prompt.
"""

from __future__ import annotations

from fedprompt.algorithms.fedavg import FedAvg
from fedprompt.algorithms.registry import algorithm
from fedprompt.client.rules.registry import without_gradients


@algorithm(
    "fedbbpt",
    "Fed-BBPT: the model is a service; generators of visual prompts, tuned by asking it, are averaged",
    "Lin et al., Efficient Federated Prompt Tuning for Black-box Large Pre-trained Models, arXiv 2310.03123",
)
class FedBBPT(FedAvg):
    """FedAvg of prompt generators that clients train without gradients."""

    kinds = ("visual",)
    optimizers = without_gradients("spsa-gc")
