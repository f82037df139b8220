"""``bitnet-triton run``: any Python program, with ``bitnet_triton.enable()`` in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

CONTEXT_SETTINGS = {"ignore_unknown_options": True, "allow_interspersed_args": False}
_ON_START = Path(__file__).parent / "on_start"


def run(
    command: Annotated[
        list[str],
        typer.Argument(help="A program of this environment, or a `.py` file, and its arguments."),
    ],
) -> None:
    """Run a Python program whose models are ours: evaluation, training and serving tools.

    transformers' `AutoModelForCausalLM` and its BitNet classes give the layers of this package in
    that program, as after `bitnet_triton.enable()`, and in every Python that it starts (`accelerate
    launch`, `torchrun`). The program replaces this one: signals and exit codes are its own. A
    Python that is started with `-I` or `-E` reads no environment, and stays as it is.

    **Examples**

    - `bitnet-triton run -- lm_eval --model hf --model_args pretrained=./model --tasks piqa`

    - `bitnet-triton run -- transformers serve`

    - `bitnet-triton run -- accelerate launch train.py`

    - `bitnet-triton run -- python -m my_tool --option`
    """
    program, *arguments = command
    line = [*_resolve(program), *arguments]
    environment = with_enable(dict(os.environ))
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name == "posix":
        os.execvpe(line[0], line, environment)
    sys.exit(subprocess.run(line, env=environment, check=False).returncode)


def with_enable(environment: dict[str, str]) -> dict[str, str]:
    """Return an environment in which every Python calls ``enable()`` with transformers."""
    path = [p for p in environment.get("PYTHONPATH", "").split(os.pathsep) if p]
    folder = str(_ON_START)
    rest = [entry for entry in path if entry != folder]
    return {**environment, "PYTHONPATH": os.pathsep.join([folder, *rest])}


def _resolve(program: str) -> list[str]:
    """Return how a program starts; those of this environment come before others.

    Raises:
        ValueError: there is none of that name.
    """
    if program.endswith(".py"):
        if Path(program).is_file():
            return [sys.executable, program]
        raise ValueError(f"`COMMAND`: there is no file {program}")
    if program in ("python", "python3"):
        return [sys.executable]
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which(program, path=beside)
    if found is None:
        raise ValueError(
            f"`COMMAND`: there is no program {program} in {Path(sys.executable).parent} or on the "
            "PATH; `python -m MODULE` runs a module, `python FILE` a file"
        )
    return [found]
