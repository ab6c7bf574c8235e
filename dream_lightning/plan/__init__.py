"""What a configuration needs of a GPU, before anything is loaded."""

from dream_lightning.plan.memory import Memory, Plan, make_plan
from dream_lightning.plan.setting import Parameters, Setting, count_parameters

__all__ = ["Memory", "Parameters", "Plan", "Setting", "count_parameters", "make_plan"]
