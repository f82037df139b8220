"""The README keeps its promises: its example runs, its table of modes is the registry."""

import re
import subprocess
import sys
from pathlib import Path

from bitnet_triton.attention import MODES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs_and_writes_something():
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", example], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "import" in done.stdout
    assert len(done.stdout.strip()) > len("import")  # sampled: how many words is chance


def test_the_table_of_attention_modes_tells_what_works():
    rows = re.findall(r"^\| `(\w+)`.*\| (works|planned) \|$", README, flags=re.MULTILINE)
    assert {name for name, state in rows if state == "works"} == set(MODES)


def test_every_linked_file_exists():
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link


def test_the_commands_are_the_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
