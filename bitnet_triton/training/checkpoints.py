"""Checkpoints of ``Trainer`` that are complete or not there: a half-written one is never loaded.

``Trainer`` writes the files of a checkpoint one after another, and a process can be killed between
any two of them. This callback adds a list of all files and their sizes when they are written, by
rename, so that it is there as a whole or not at all; ``last_checkpoint`` takes no folder without a
list, or that does not hold what its list says. The list says too when that was, so that a run goes
on with what was written last, not with the longer one of a former run in the same folder, and does
so from a copy of the folder, whose files all have another time.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

from accelerate import PartialState  # type: ignore[import-untyped]
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

logger = logging.getLogger("bitnet_triton")

LIST = "complete.json"
_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


class SafeCheckpoints(TrainerCallback):
    """Marks checkpoints as complete, and only then deletes older ones.

    ``trainer.train(resume_from_checkpoint=last_checkpoint(output_dir))``

    Args:
        keep: how many complete checkpoints stay, the latest that were written; the best one of
            ``load_best_model_at_end`` stays besides. None: all.
    """

    def __init__(self, keep: int | None = 2) -> None:
        if keep is not None and keep < 1:
            raise ValueError(f"`keep`: expected at least 1 checkpoint, got {keep}")
        self.keep = keep

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse a limit of the trainer's own, which deletes before the new one is complete."""
        if args.save_total_limit is not None:
            raise ValueError(
                "`save_total_limit`: expected none beside SafeCheckpoints, which deletes older "
                f"checkpoints itself (`keep`), got {args.save_total_limit}"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the mark from a checkpoint of this step, which another run has left: it goes now."""
        if args.should_save:
            (_folder(args, state) / LIST).unlink(missing_ok=True)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark what has been written."""
        PartialState().wait_for_everyone()  # each process writes files of its own
        if args.should_save:
            mark_complete(_folder(args, state))
            if self.keep is not None:
                for old in _complete(args.output_dir)[: -self.keep]:
                    if str(old) != state.best_model_checkpoint:
                        _delete(old)
        PartialState().wait_for_everyone()


def mark_complete(folder: str | os.PathLike) -> None:
    """Write the list of the files in ``folder``, after they have reached the disk."""
    folder = Path(folder)
    sizes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != LIST:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
    partial = folder / (LIST + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"written": time.time_ns(), "sizes": sizes}, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / LIST)


def is_complete(folder: str | os.PathLike) -> bool:
    """Tell whether a checkpoint holds all that its list says, and has a list."""
    return _written(Path(folder)) is not None


def last_checkpoint(folder: str | os.PathLike) -> str | None:
    """Return the complete checkpoint below ``folder`` that was written last; None: there is none.

    What has more steps and is not complete is told in the log.
    """
    found = _complete(folder)
    half = sorted(set(_checkpoints(folder)) - set(found), key=_step)
    for path in half:
        if not found or _step(path) > _step(found[-1]):
            logger.warning("%s was not written to its end, and is left out", path)
    return str(found[-1]) if found else None


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def _complete(folder: str | os.PathLike) -> list[Path]:
    """Return complete checkpoints, those that were written last at the end."""
    written = {path: _written(path) for path in _checkpoints(folder)}
    times = {path: when for path, when in written.items() if when is not None}
    return sorted(times, key=lambda path: (times[path], _step(path)))


def _written(folder: Path) -> int | None:
    """Return when a checkpoint was complete, in nanoseconds; None: it is not."""
    try:
        found = json.loads((folder / LIST).read_text(encoding="utf-8"))
        sizes, written = found["sizes"].items(), int(found["written"])
        whole = all((folder / name).stat().st_size == size for name, size in sizes)
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
        return None  # no list, or a damaged one
    return written if whole else None


def _checkpoints(folder: str | os.PathLike) -> list[Path]:
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if path.is_dir() and _NAME.fullmatch(path.name)]


def _step(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    assert found is not None
    return int(found[1])


def _delete(folder: Path) -> None:
    (folder / LIST).unlink()  # first: what is left of it later is no checkpoint any more
    shutil.rmtree(folder)
