"""What a run needs, before anybody asks for the GPUs: memory, flops, bytes and time of unlearning, beside a retrain."""

from engine.plan.planning import Plan, plan

__all__ = ["Plan", "plan"]
