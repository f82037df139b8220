"""Above the models: tasks that need a far context, and what a model makes of them."""

from bitnet_triton.training.evaluation import evaluate
from bitnet_triton.training.results import Report
from bitnet_triton.training.settings import Setting, combine, parse_setting

__all__ = ["Report", "Setting", "combine", "evaluate", "parse_setting"]
