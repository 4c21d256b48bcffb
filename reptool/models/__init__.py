"""The networks, in their training form, by name; importing this registers them."""

from reptool.models import rep
from reptool.models.registry import ModelCard, card, create_model, family_of, list_models

__all__ = ["ModelCard", "card", "create_model", "family_of", "list_models", "rep"]
