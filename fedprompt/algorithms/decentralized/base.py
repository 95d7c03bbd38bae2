"""What methods without a server share: every client owns all params, and mixes them with its neighbours'.

    z_i ← client i's local steps from x_i,        x_i ← Σ_j w_ij z_j

over the links of a round's graph (``graphs.py``), with whole or compressed messages (``gossip.py``). All clients take
part in every round, whatever ``federation.cohort`` says. Who drops out, is late or diverges is no part of that round's
graph: its neighbours mix without it, and its own params stay as they were.

The state's params are the mean of all clients' models; nobody receives them. The consensus distance is

    ( 1/N Σ_i ‖x_i − x̄‖² )^½

over all N clients and everything that they share (not over personal heads).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from scipy.sparse import csr_array

from fedprompt.algorithms.base import RULE, Algorithm, MethodSettings, Metrics, State
from fedprompt.algorithms.decentralized.gossip import Compression, Models, mix, mix_compressed
from fedprompt.algorithms.decentralized.graphs import Graph, among, lose, make_links, metropolis, spectral_gap
from fedprompt.client.rules.registry import with_gradients
from fedprompt.client.tasks import Task, Update
from fedprompt.models.params import Params, size_in_bytes, weighted_mean

PUBLIC = "public."  # prefix, in a client's store, of the copies that its neighbours hold
KNOWN = "known"  # in the state's memory: bool [N, N], whether client i holds today's public copy of client j


class GossipSettings(MethodSettings):
    """Who talks to whom, and what they send.

    ``graph``: see ``graphs.make_links``; ``degree`` is for ``random``. ``link_loss``: probability that a link fails for
    a round. ``compress``: ``quantise`` to ``bits`` per number, or ``topk``, the ``share`` of numbers that changed most.
    ``gamma``: γ of compressed gossip; left out: a value that is known to converge.
    """

    graph: Graph = "ring"
    degree: int = Field(4, ge=2, le=1_000, multiple_of=2)
    link_loss: float = Field(0.0, ge=0, lt=1)
    compress: Literal["none", "quantise", "topk"] = "none"
    bits: int = Field(8, ge=2, le=16)
    share: float = Field(0.1, gt=0, le=1)
    gamma: float | None = Field(None, gt=0, le=1)


@dataclass(frozen=True)
class Network:
    """The clients of a round, the links [E, 2] between their places in ``clients``, and W."""

    clients: tuple[int, ...]
    links: np.ndarray
    weights: csr_array

    @property
    def messages(self) -> int:
        """Of one gossip step: one per link and direction."""
        return 2 * len(self.links)

    def around(self, place: int) -> tuple[int, ...]:
        """Places of a client's neighbours and its own, ascending."""
        return tuple(self.weights.indices[slice(*self.weights.indptr[place : place + 2])].tolist())


class Decentralized(Algorithm):
    """Gossip instead of a server; a method says how clients train, how often they mix, and what is not mixed by W."""

    averaged_model = True
    optimizers = with_gradients("sgd")
    Settings = GossipSettings
    settings: GossipSettings

    @property
    def gossip_steps(self) -> int:
        """Q: how often clients mix in a round."""
        return 1

    def is_personal(self, name: str) -> bool:
        """Everything is a client's own."""
        return True

    def travels(self, name: str) -> bool:
        """Neighbours get everything but constants and a head that ``head.personal`` keeps at home."""
        return not super().is_personal(name) and not self.is_constant(name)

    def is_mixed(self, name: str) -> bool:
        """Whether the tensor called ``name`` is averaged over neighbours by W."""
        return self.travels(name)

    def cohort(self, state: State, round: int, rng: np.random.Generator) -> list[int]:
        """Everybody."""
        return list(range(self.setting.clients))

    def travelling(self, task: Task, update: Update) -> tuple[Params, Params]:
        """Nothing to or from a server: what neighbours send each other is counted where they mix."""
        return {}, {}

    def aggregate(self, state: State, updates: Sequence[Update], rng: np.random.Generator) -> tuple[State, Metrics]:
        """One round's graph, the exchange over it, and the mean of all models as the state's params."""
        network = self.network([update.client for update in updates], rng)
        trained = {update.client: update.params for update in updates}
        _, before = self._mean_and_distance(state, trained)
        models, state, metrics = self.exchange(state, network, list(trained.values()), rng)
        mean, after = self._mean_and_distance(state, dict(zip(network.clients, models, strict=True)))
        stores = {
            update.client: {
                **{n: value for n, value in state.clients.get(update.client, {}).items() if n.startswith(PUBLIC)},
                **model,
                **{RULE + name: value for name, value in update.kept.items()},
            }
            for update, model in zip(updates, models, strict=True)
        }
        state = replace(state, params=mean, clients={**state.clients, **stores})
        agreement = {"consensus_distance": after, "consensus_before_mixing": before}
        return state, {**agreement, "spectral_gap": spectral_gap(network.weights), **metrics}

    def network(self, clients: Sequence[int], rng: np.random.Generator) -> Network:
        """The graph of a round; drawn for all clients, so that those who are away change no other link."""
        settings, everybody = self.settings, self.setting.clients
        links = lose(make_links(settings.graph, everybody, settings.degree, rng), settings.link_loss, rng)
        links = among(links, np.array(clients))
        return Network(tuple(clients), links, metropolis(links, len(clients)))

    def exchange(
        self, state: State, network: Network, trained: Sequence[Params], rng: np.random.Generator
    ) -> tuple[list[Params], State, Metrics]:
        """Mix what is mixed by W; the clients' next models, public copies in the state, and the traffic."""
        models = {
            name: np.stack([params[name].double().numpy() for params in trained])
            for name in trained[0]
            if self.is_mixed(name)
        }
        if self.settings.compress == "none":
            for _ in range(self.gossip_steps):
                models = mix(network.weights, models)
            whole = size_in_bytes({name: trained[0][name] for name in models})
            sent = self.gossip_steps * network.messages * whole
        else:
            models, state, sent = self._exchange_compressed(state, network, models)
        mixed = [{**params, **_row(models, i, params)} for i, params in enumerate(trained)]
        traffic = {"up_bytes": sent, "down_bytes": sent, "messages": self.gossip_steps * network.messages}
        return mixed, state, {name: float(value) for name, value in traffic.items()}

    def _exchange_compressed(self, state: State, network: Network, models: Models) -> tuple[Models, State, int]:
        """Mix with public copies, which every client starts at the common start; the bytes that are sent.

        Who has missed a neighbour's last message, for want of a link, is sent the whole public copy instead of the
        next one: so graphs that change from round to round save little.
        """
        settings = self.settings
        compression = Compression("topk" if settings.compress == "topk" else "quantise", settings.bits, settings.share)
        start = {PUBLIC + name: value for name, value in state.memory["personal_start"].items()}
        copies = [{**start, **state.clients.get(client, {})} for client in network.clients]
        public = {name: np.stack([own[PUBLIC + name].double().numpy() for own in copies]) for name in models}
        for _ in range(self.gossip_steps):
            models, public = mix_compressed(
                network.weights, models, public, compression, settings.gamma or compression.gamma
            )
        like = {name: copies[0][PUBLIC + name] for name in models}
        stores = {
            client: {
                **state.clients.get(client, {}),
                **{PUBLIC + name: value for name, value in _row(public, i, like).items()},
            }
            for i, client in enumerate(network.clients)
        }
        known, missed = self._catch_up(state, network)
        short, whole = sum(compression.bytes(value.numel()) for value in like.values()), size_in_bytes(like)
        sent = self.gossip_steps * network.messages * short + missed * (whole - short)
        return models, replace(state, clients={**state.clients, **stores}, memory={**state.memory, KNOWN: known}), sent

    def _catch_up(self, state: State, network: Network) -> tuple[torch.Tensor, int]:
        """Who holds whose public copy after a round, and how many messages of its first step had to be whole copies."""
        everybody = self.setting.clients
        known = state.memory.get(KNOWN, torch.ones(everybody, everybody, dtype=torch.bool)).clone()
        first, second = torch.from_numpy(np.array(network.clients)[network.links]).reshape(-1, 2).T
        holders, senders = torch.cat([first, second]), torch.cat([second, first])
        missed = int((~known[holders, senders]).sum())
        known[:, senders] = False
        known[holders, senders] = True
        return known, missed

    def _mean_and_distance(self, state: State, models: Mapping[int, Params]) -> tuple[Params, float]:
        """Mean of all clients' models, those in ``models`` and else their own, and their consensus distance."""
        everybody = range(self.setting.clients)
        own = [models[client] if client in models else self.broadcast(state, client) for client in everybody]
        mean = weighted_mean(own, [1.0] * len(own))
        center = {name: value.double().numpy() for name, value in mean.items() if self.travels(name)}
        squares = [np.square(m[name].double().numpy() - value).sum() for m in own for name, value in center.items()]
        return mean, float(np.sqrt(np.sum(squares) / len(own)))


def _row(models: Models, index: int, like: Params) -> Params:
    """One client's tensors out of [n, ...], in the types of ``like``."""
    return {name: torch.from_numpy(values[index]).to(like[name].dtype) for name, values in models.items()}
