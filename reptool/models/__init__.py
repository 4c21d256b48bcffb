"""The networks and their blocks, in training form, by name; importing this registers them."""

from reptool.models import attention, rep
from reptool.models.registry import ModelCard, card, create_model, family_of, list_models

__all__ = ["ModelCard", "attention", "card", "create_model", "family_of", "list_models", "rep"]
