"""What holds transformers' cases to ``reasons.py``, and which of them run by default."""

from __future__ import annotations

import importlib.util
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PREFIX = "Test"
# of transformers' tests: --strict-markers wants to know them
MARKERS = (
    "accelerate_tests", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test",
    "generate", "is_training_test", "torch_compile_test", "torch_export_test",
)  # fmt: skip


def _load(name):
    spec = importlib.util.spec_from_file_location(f"peer_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


reasons = _load("reasons")
partly_skipped = set()


def pytest_configure(config):
    for name in MARKERS:
        config.addinivalue_line("markers", f"{name}: of transformers' own tests")


def _case(item):
    """Return ``Variant::test_name`` for a case of transformers', None for a test of ours."""
    if item.path.parent != HERE or getattr(item, "cls", None) is None:
        return None
    return f"{item.cls.__name__.removeprefix(PREFIX)}::{item.name}"


def _find(table, case):
    return next((found for pattern, found in table.items() if fnmatchcase(case, pattern)), None)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    left = []
    for item in list(items):
        case = _case(item)
        if case is None:
            continue
        if (fails := _find(reasons.FAILS, case)) is not None:
            error, sentence = fails
            item.add_marker(pytest.mark.xfail(raises=error, reason=sentence, strict=True))
        is_fast = any(fnmatchcase(case, pattern) for pattern in reasons.FAST)
        if not is_fast and not config.option.peer_all:
            left.append(item)
    if left:
        gone = set(map(id, left))
        items[:] = [item for item in items if id(item) not in gone]
        config.hook.pytest_deselected(items=left)


def pytest_runtest_logreport(report):
    # a case that skips every one of its subtests passes
    if report.skipped and type(report).__name__ == "SubtestReport":
        partly_skipped.add(report.nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    case = _case(item)
    if case is None or hasattr(report, "wasxfail"):
        return report
    if report.skipped:
        if _find(reasons.SKIPS | reasons.ELSEWHERE, case) is None:
            why = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
            report.outcome = "failed"
            report.longrepr = f"{case} is skipped, and reasons.py does not say why ({why})"
    elif (
        (report.passed and report.when == "call")
        and item.nodeid not in partly_skipped
        and _find(reasons.SKIPS, case) is not None
    ):
        report.outcome = "failed"
        report.longrepr = f"{case} runs; take its entry out of SKIPS in reasons.py"
    return report
