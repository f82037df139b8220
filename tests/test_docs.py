"""What README and docs print runs as printed, and what they link is there.

A block of Python runs by itself, in a process of its own; lines that begin with ``>>>`` have to
print what stands below them. A line of a shell block is read by the command line that it names,
options and all, without running it. A block that needs more than this machine, a download or a
GPU, says so in the text: its first line is ``# needs ...``. The number of those is asserted.
"""

import doctest
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import typer

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS_MORE = 0

sys.path.insert(0, str(ROOT))  # `bench` lies beside the package and is not installed


def blocks(*languages):
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            if found[1] in languages:
                line = text[: found.start()].count("\n") + 1
                yield pytest.param(found[2], id=f"{page.name}:{line}")


PYTHON = list(blocks("py", "python"))


def test_blocks_that_are_not_run_are_counted():
    marked = [block for block in PYTHON if block.values[0].startswith("# needs ")]
    assert len(marked) == NEEDS_MORE
    assert len(PYTHON) >= 8


@pytest.fixture(scope="module")
def run_script():
    """Return ``run_script(path)``: exit status of the script, and what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        [sys.executable, Path(__file__).with_name("docs_server.py")], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as server:  # fmt: skip

        def run(script):
            printed = script.with_suffix(".out")
            server.stdin.write(json.dumps([str(script), str(script.parent), str(printed)]) + "\n")
            server.stdin.flush()
            return int(server.stdout.readline()), printed.read_text()

        yield run
        server.stdin.close()


def test_a_script_fails_alone(run_script, tmp_path):
    script = tmp_path / "block.py"
    for text, status, printed in [
        ("assert 0, 'wrong'", 1, "AssertionError: wrong"),
        ("import sys\nprint('bitnet_triton' in sys.modules)", 0, "False"),
        ("import os\nos.abort()", -6, ""),
        ("print(__file__)", 0, str(script)),
    ]:
        script.write_text(text)
        found = run_script(script)
        assert found[0] == status
        assert printed in found[1]


@pytest.mark.parametrize("block", [b for b in PYTHON if not b.values[0].startswith("# needs ")])
def test_a_block_of_python_runs_as_printed(block, tmp_path, run_script):
    if block.startswith(">>> "):
        examples = doctest.DocTestParser().get_doctest(block, {}, "block", None, 0)
        assert doctest.DocTestRunner().run(examples).failed == 0
        return
    script = tmp_path / "block.py"  # a file: Triton reads the source of kernels
    script.write_text(block, encoding="utf-8")
    status, printed = run_script(script)
    assert status == 0, printed


@pytest.mark.parametrize("block", list(blocks("json")))
def test_a_block_of_json_is_json(block):
    json.loads(block)


def shell_lines():
    for block in blocks(""):
        for line in block.values[0].splitlines():
            if line.startswith(("bitnet-triton ", "python -m ")):
                words = shlex.split(line.partition(" < ")[0], comments=True)
                yield pytest.param(words, id=f"{block.id}: {line.partition('  #')[0].strip()}")


def read_command(words):
    """Parse the line as the program does that it starts, and run nothing of it."""
    if words[0] == "bitnet-triton":
        module, arguments = "bitnet_triton.cli", words[1:]
    else:
        module, arguments = words[2], words[3:]
    app = importlib.import_module("bench.__main__" if module == "bench" else module).app
    command = typer.main.get_command(app)
    while hasattr(command, "commands") and arguments[0] in command.commands:
        command, arguments = command.commands[arguments[0]], arguments[1:]
    if command.name == "bench":
        return read_command(["python", "-m", "bench", *arguments])
    context = command.make_context(command.name or module, list(arguments))
    assert not hasattr(command, "commands") or not arguments or context.params["list_"], words
    return context


@pytest.mark.parametrize("words", list(shell_lines()))
def test_a_command_is_one_that_its_program_reads(words):
    read_command(words)  # raises for what it does not know


def anchors(page):
    for title in re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        kept = "".join(
            letter for letter in title.lower()
            if letter in "-_ " or unicodedata.category(letter)[0] in "LN"
        )  # fmt: skip
        yield kept.replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in set(anchors(target)), link
