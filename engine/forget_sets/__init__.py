"""Strategies for choosing forget sets to test unlearning with; importing this package registers all of them."""

from engine.forget_sets import adversarial, duplicates, influence, loss, plain
from engine.forget_sets.base import Selection, Strategy, get_strategy, list_strategies, register
from engine.forget_sets.choose import ForgetSet, choose_forget_set, require_csv
from engine.forget_sets.pool import Pool

__all__ = [
    "ForgetSet",
    "Pool",
    "Selection",
    "Strategy",
    "adversarial",
    "choose_forget_set",
    "duplicates",
    "get_strategy",
    "influence",
    "list_strategies",
    "loss",
    "plain",
    "register",
    "require_csv",
]
