"""Tasks whose answers stand far back in a text, made from a seed and nothing else."""

from bitnet_triton.training.tasks.haystack import Haystack
from bitnet_triton.training.tasks.mixture import draw_dense, draw_prompt
from bitnet_triton.training.tasks.prompt import Prompt, Turn, build
from bitnet_triton.training.tasks.registry import TASKS, check_tasks
from bitnet_triton.training.tasks.task import Draw, Question, Task
from bitnet_triton.training.tasks.tokens import TextTokens

__all__ = [
    "TASKS",
    "Draw",
    "Haystack",
    "Prompt",
    "Question",
    "Task",
    "TextTokens",
    "Turn",
    "build",
    "check_tasks",
    "draw_dense",
    "draw_prompt",
]
