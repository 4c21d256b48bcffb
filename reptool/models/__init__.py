"""The networks and their blocks, in training form, by name; importing this registers them."""

from reptool.models import attention, mlp, rep
from reptool.models.registry import ModelCard, arguments_of, card, create_model, family_of, list_models, natural_order

__all__ = [
    "ModelCard",
    "arguments_of",
    "attention",
    "card",
    "create_model",
    "family_of",
    "list_models",
    "mlp",
    "natural_order",
    "rep",
]
