"""Names of trainable kinds: ``prompt.kind``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from fedprompt.models.backbones.base import Backbone
from fedprompt.models.kinds.base import Kind, PromptOptions
from fedprompt.registry import Registered, Registry

Factory = Callable[[Backbone, PromptOptions], Kind]
Rates = Mapping[str, tuple[float, float]]  # local.lr and local.prompt_lr by local.optimizer
F = TypeVar("F", bound=Factory)


@dataclass(frozen=True)
class RegisteredKind(Registered[Factory]):
    """A kind: what makes it, and what else the configuration must know of it."""

    holds_tokens: bool
    head: str
    rates: Rates


KINDS: Registry[RegisteredKind] = Registry("kinds", noun="kind", key="prompt.kind", package="fedprompt.models.kinds")


def kind(
    name: str,
    about: str,
    *,
    holds_tokens: bool = False,
    head: str = "mlp",
    rates: Rates | None = None,
    source: str = "",
) -> Callable[[F], F]:
    """Register ``factory(backbone, options) -> Kind``, usually a class, as ``prompt.kind=name``.

    Args:
        name: letters, digits, ``-``, ``_`` and ``.``.
        about: a line about it.
        holds_tokens: whether what is trained are tokens, which ``prompt.init`` may draw like those of public images.
        head: ``head.kind`` where it is left out.
        rates: ``{local.optimizer: (local.lr, local.prompt_lr)}`` where they are left out and the rule's own do not fit.
        source: the paper.

    Raises InputError where another factory has the name.
    """

    def register(factory: F) -> F:
        KINDS.add(RegisteredKind(name, about, source, factory, holds_tokens, head, rates or {}))
        return factory

    return register


def make_kind(backbone: Backbone, options: PromptOptions) -> Kind:
    """Return the kind that ``options.kind`` names, for this backbone.

    Raises InputError naming ``prompt.layer`` or ``prompt.kind`` where this backbone cannot do what is asked.
    """
    return KINDS.get(options.kind).thing(backbone, options)
