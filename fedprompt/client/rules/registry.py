"""Names of local rules: ``local.optimizer``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from fedprompt.client.rules.base import LocalOptions, LocalRule
from fedprompt.registry import AnyOf, Registered, Registry

Factory = Callable[[LocalOptions], LocalRule]
F = TypeVar("F", bound=Factory)


@dataclass(frozen=True)
class RegisteredRule(Registered[Factory]):
    """A local rule: what makes it, what it needs, and its rates where the configuration gives none."""

    lr: float
    prompt_lr: float
    needs_gradients: bool


LOCAL_RULES: Registry[RegisteredRule] = Registry(
    "local_rules", noun="local rule", key="local.optimizer", package="fedprompt.client.rules"
)


def local_rule(
    name: str, about: str, *, lr: float, prompt_lr: float, needs_gradients: bool = True, source: str = ""
) -> Callable[[F], F]:
    """Register ``factory(options) -> LocalRule``, a class or a function, as ``local.optimizer=name``.

    Args:
        name: letters, digits, ``-``, ``_`` and ``.``.
        about: a line about it.
        lr: rate of the head where ``local.lr`` is left out.
        prompt_lr: rate of everything else where ``local.prompt_lr`` is left out.
        needs_gradients: ``False`` for a rule that asks for losses alone; its clients ask a black-box model.
        source: the paper.

    Raises InputError where another factory has the name.
    """

    def register(factory: F) -> F:
        LOCAL_RULES.add(RegisteredRule(name, about, source, factory, lr, prompt_lr, needs_gradients))
        return factory

    return register


def make_rule(options: LocalOptions) -> LocalRule:
    """Return the rule that ``local.optimizer`` names; InputError for an unknown one, or a package that is not there."""
    return LOCAL_RULES.get(options.optimizer).thing(options)


def with_gradients(first: str) -> AnyOf:
    """Names of all rules that follow gradients, ``first`` the first of them."""
    return AnyOf("local_rules", first, lambda rule: rule.needs_gradients)


def without_gradients(first: str) -> AnyOf:
    """Names of all rules that need losses alone, ``first`` the first of them."""
    return AnyOf("local_rules", first, lambda rule: not rule.needs_gradients)
