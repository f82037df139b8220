"""bitnet-triton run: enable() in a program and in what it starts."""

import os
import signal
import subprocess
import sys

import pytest

from bitnet_triton import TINY_MODEL

LOAD = (
    "from transformers import AutoModelForCausalLM as A\n"
    f"print(type(A.from_pretrained({str(TINY_MODEL)!r})).__module__)\n"
)
OURS = "bitnet_triton.models.bitnet.modeling_bitnet"


def command(*arguments):
    code = "import sys; from bitnet_triton.cli import main; sys.argv[0] = 'bitnet-triton'; main()"
    return [sys.executable, "-c", code, "run", *map(str, arguments)]


def run(*arguments, **environment):
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_a_file_and_the_python_that_it_starts_get_our_models(tmp_path):
    file = tmp_path / "tool.py"
    child = f"subprocess.run([sys.executable, '-c', {LOAD!r}], check=True)"
    file.write_text(f"import subprocess, sys\n{LOAD}sys.stdout.flush()\n{child}\n")
    done = run("--", file)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [OURS, OURS]


def test_what_needs_no_transformers_imports_none():
    done = run(
        "--", "python", "-c", "import sys; print('torch' in sys.modules, sys.argv[1:])", "-v"
    )
    assert done.stdout == "False ['-v']\n"


def test_a_sitecustomize_that_was_there_runs(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import builtins; builtins.was_here = 7\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = run("--", "python", "-c", "print(was_here)", PYTHONPATH=path)
    assert done.stdout == "7\n"


def test_the_exit_code_is_that_of_the_program():
    assert run("--", "python", "-c", "raise SystemExit(42)").returncode == 42


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_signal_reaches_the_program():
    wait = "import signal; print('waits', flush=True); signal.pause()"
    with subprocess.Popen(command("--", "python", "-c", wait), stdout=subprocess.PIPE) as started:
        assert started.stdout.readline() == b"waits\n"
        started.send_signal(signal.SIGTERM)
        assert started.wait() == -signal.SIGTERM


@pytest.mark.parametrize("program", ["no-such-program", "no_such_file.py"])
def test_a_program_that_is_not_there_is_named(program):
    done = run("--", program)
    assert done.returncode == 1
    assert "`COMMAND`: there is no" in done.stderr
    assert program in done.stderr.replace("\n", "")
    assert "Traceback" not in done.stderr
