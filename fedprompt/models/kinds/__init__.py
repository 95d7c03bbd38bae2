"""Trainable kinds: what is trained beside the head, and how it enters the frozen backbone.

``base.py`` says what a kind is, ``registry.py`` keeps their names.
"""

from fedprompt.models.kinds.base import Features, Kind, PromptOptions
from fedprompt.models.kinds.blocks import Adapter, LoRA
from fedprompt.models.kinds.full import FullFineTuning
from fedprompt.models.kinds.pool import PromptPool
from fedprompt.models.kinds.prompts import DeepPrompt, NoPrompts, ShallowPrompt
from fedprompt.models.kinds.registry import kind, make_kind
from fedprompt.models.kinds.visual import VisualPrompt

__all__ = [
    "Adapter",
    "DeepPrompt",
    "Features",
    "FullFineTuning",
    "Kind",
    "LoRA",
    "NoPrompts",
    "PromptOptions",
    "PromptPool",
    "ShallowPrompt",
    "VisualPrompt",
    "kind",
    "make_kind",
]
