"""Random kernels: fused, with every value materialised, and in Triton's interpreter.

``TRITON_CPU_FUZZ_EXAMPLES=500`` runs more of them, others with each ``--seed``.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import torch
import triton.language as tl
from hypothesis import strategies as st

HERE = Path(__file__).parent
DEFAULT_EXAMPLES = 12
EXAMPLES = int(os.environ.get("TRITON_CPU_FUZZ_EXAMPLES", DEFAULT_EXAMPLES))
LONG = EXAMPLES > DEFAULT_EXAMPLES

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="starts the interpreter by itself"
)


def load(path):
    """Import a file beside this one, or one that was generated."""
    specification = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(specification)
    sys.modules[path.stem] = module
    specification.loader.exec_module(module)
    return module


fuzz_values = load(HERE / "fuzz_values.py")  # by this name for the next
fuzz_programs = load(HERE / "fuzz_programs.py")
fuzz_returns = load(HERE / "fuzz_returns.py")


@pytest.fixture(scope="module")
def interpret():
    """Return ``interpret(source, inputs, grid)``, which returns the changed inputs."""
    with subprocess.Popen(
        [sys.executable, HERE / "fuzz_interpreter.py"],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:

        def interpret(source, arguments, grid):
            inputs, outputs = source.with_suffix(".in"), source.with_suffix(".out")
            torch.save((arguments, grid), inputs)
            process.stdin.write(f"{source}\t{inputs}\t{outputs}\n")
            process.stdin.flush()
            answer = process.stdout.readline().strip()
            if answer != "done":
                pytest.fail(f"the interpreter fails: {answer}\n{source.read_text()}")
            return torch.load(outputs)

        yield interpret
        process.stdin.close()


def arguments(offset):
    """Return what a generated kernel takes. ``offset``: of the second scratch in the first."""
    generator = torch.Generator().manual_seed(offset + 1)
    floats = torch.randint(-9, 10, (1024,), generator=generator).float()
    integers = torch.randint(-(2**31), 2**31 - 1, (1024,), generator=generator).int()
    integers[::3] = integers[::3] % 19 - 9
    size = fuzz_values.PROGRAMS * fuzz_values.REGION
    scratch = torch.randint(-9, 10, (3 * size,), generator=generator).float()
    places = offset if offset < 64 else size + 64
    numbers = torch.randint(-99, 99, (size + 64,), generator=generator).int()
    outputs = torch.zeros(3 * 8192), torch.zeros(3 * 8192, dtype=torch.int64)
    return [floats, integers, scratch, scratch[places:], numbers, *outputs, 3, 1]


def chooser(draw):
    return lambda choices: choices[draw(st.integers(0, len(choices) - 1))]


@st.composite
def programs(draw):
    pick = chooser(draw)
    text = fuzz_programs.generate(pick, statements=pick(range(6, 16)))
    return text, pick([64, 64, 0, 1, 16])


@st.composite
def returning_programs(draw):
    return fuzz_returns.generate(chooser(draw)), 64


@st.composite
def mapped_programs(draw):
    return fuzz_returns.generate_mapped(chooser(draw))


def run(launch, kernel, inputs, grid, **options):
    memory = inputs[2].clone()
    second = memory[inputs[3].storage_offset() :]
    copies = [*(t.clone() for t in inputs[:2]), memory, second, *(t.clone() for t in inputs[4:7])]
    launch(kernel, grid)(*copies, *inputs[7:], **options)
    return copies


SETTINGS = hypothesis.settings(
    max_examples=EXAMPLES,
    derandomize=not LONG,
    database=None,
    deadline=None,
    phases=hypothesis.Phase if LONG else [hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
    print_blob=False,
)


def compare_with_interpreter(program, interpret, folder):
    import bitnet_triton.triton_cpu as triton_cpu

    text, offset = program
    source = folder / "fuzzed_kernel.py"
    source.write_text(text)
    hypothesis.note(f"second scratch at {offset} of the first\n{text}")
    inputs, grid = arguments(offset), (fuzz_values.PROGRAMS,)
    right = interpret(source, inputs, grid)
    kernel = load(source).kernel
    for options in ({"materialise": True}, {}):
        outputs = run(triton_cpu.launch, kernel, inputs, grid, **options)
        for name, got, expected in zip(("x", "i", "a", "b", "n", "fo", "io"), outputs, right):
            wrong = (got != expected).nonzero()
            if len(wrong):
                place = int(wrong[0])
                pytest.fail(
                    f"{options}: {name}[{place}] is {got[place].item()}, not "
                    f"{expected[place].item()}; {len(wrong)} elements differ"
                )


@SETTINGS
@hypothesis.given(program=programs())
def test_random_kernels_agree_with_the_interpreter(program, interpret, tmp_path_factory):
    compare_with_interpreter(program, interpret, tmp_path_factory.mktemp("fuzz"))


@SETTINGS
@hypothesis.given(program=returning_programs())
def test_random_early_returns_agree_with_the_interpreter(program, interpret, tmp_path_factory):
    compare_with_interpreter(program, interpret, tmp_path_factory.mktemp("fuzz"))


@pytest.mark.skipif(not hasattr(tl, "map_elementwise"), reason="not in this Triton")
@SETTINGS
@hypothesis.given(text=mapped_programs())
def test_random_mapped_functions_agree_with_python(text, tmp_path_factory):
    import bitnet_triton.triton_cpu as triton_cpu

    hypothesis.note(text)
    source = tmp_path_factory.mktemp("fuzz") / "fuzzed_kernel.py"
    source.write_text(text)
    x = torch.arange(64).int() * 37 % 1024
    y = torch.arange(64).int() * 101 % 512
    a, b = torch.empty_like(x), torch.empty_like(x)
    triton_cpu.launch(load(source).kernel, (1,))(x, y, a, b, BLOCK=64)
    functions = text[text.index("@") : text.rindex("@")].splitlines(keepends=True)
    names = {}
    exec("".join(line for line in functions if not line.startswith("@")), names)
    right = [names["f2"](*pair) for pair in zip(x.tolist(), y.tolist())]
    assert list(zip(a.tolist(), b.tolist())) == right
