"""The README keeps its promises: its table of modes is the registry, an index shows no dead link.

That its examples run is tested in test_docs.py.
"""

import importlib.util
import re
from pathlib import Path

from bitnet_triton.attention import MODES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_attention_modes_tells_what_works():
    rows = re.findall(r"^\| `(\w+)`.*\| (works|planned) \|$", README, flags=re.MULTILINE)
    assert {name for name, state in rows if state == "works"} == set(MODES)


def test_the_commands_are_the_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def long_description(source):
    path = ROOT / ".ci" / "long_description.py"
    spec = importlib.util.spec_from_file_location("long_description", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.long_description(README, source)


def targets(text):
    return re.findall(r"\]\(([^)\s]+)\)", text)


def test_an_index_shows_no_dead_link():
    assert any("://" not in target for target in targets(README))
    shown = long_description(None)
    assert all("://" in target for target in targets(shown))
    assert "- docs/benchmarks.md: how to measure" in shown  # as a path, with what it is
    assert "are those of the source distribution" in shown


def test_with_a_repository_links_lead_there():
    source = "https://example.org/repository"
    shown = targets(long_description(source))
    assert len(shown) == len(targets(README))
    assert all(target.startswith(f"{source}/blob/main/") for target in shown if "://" in target)
    assert not [target for target in shown if "://" not in target]
