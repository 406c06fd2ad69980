"""Resource estimates: memory, flops, bytes and time of an unlearning run, compared with a retrain."""

from engine.plan.planning import Plan, plan

__all__ = ["Plan", "plan"]
