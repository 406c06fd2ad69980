"""The methods, one file each; importing this package registers all of them."""

from engine.methods import finetune, gradient_ascent, lethe, random_labels, retrain
from engine.methods.base import Context, Method, Phase, get_method, list_methods, register

__all__ = [
    "Context",
    "Method",
    "Phase",
    "finetune",
    "get_method",
    "gradient_ascent",
    "lethe",
    "list_methods",
    "random_labels",
    "register",
    "retrain",
]
