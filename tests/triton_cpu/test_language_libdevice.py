"""Every function of triton.language.extra.libdevice, all of a kind in one generated kernel."""

import functools
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from triton.language.extra.cuda import libdevice

HERE = Path(__file__).parent
DTYPES = {"float32": "f", "float64": "d", "int32": "i", "int64": "l"}

HEADER = """\
import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def kernel({arguments}, N: tl.constexpr):
    n = tl.arange(0, N)
"""


def load(path):
    specification = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(specification)
    sys.modules[path.stem] = module
    specification.loader.exec_module(module)
    return module


libdevice_cases = load(HERE / "libdevice_cases.py")

KINDS = {kind.__name__: kind for kind in libdevice_cases.KINDS}


@functools.cache
def cases(kind, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = [case for case in KINDS[kind]() if hasattr(libdevice, case.name)]
    return {case.key: case for case in found}


def source(found):
    """Return a kernel that calls every case, each with inputs and outputs of its own."""
    lines, places = [], dict.fromkeys([f"{v}{way}" for v in DTYPES.values() for way in "xy"], 0)

    def place(dtype, way):
        letter = DTYPES[str(dtype)[6:]] + way
        places[letter] += 1
        return f"{letter}_ptr + {places[letter] - 1} * N + n"

    for case in found:
        arguments = []
        for x in case.inputs:
            unsigned = case.unsigned and not x.dtype.is_floating_point
            suffix = f".to(tl.u{str(x.dtype)[6:]}, bitcast=True)" if unsigned else ""
            arguments.append(f"tl.load({place(x.dtype, 'x')}){suffix}")
        call = f"libdevice.{case.name}({', '.join(arguments)})"
        lines.append(f"    tl.store({place(case.result, 'y')}, {call})")
    return HEADER.format(arguments=", ".join(f"{p}_ptr" for p in places)) + "\n".join(lines)


@functools.cache
def results(kind, seed, folder):
    """Run all cases of a kind; return their outputs by key."""
    import bitnet_triton.triton_cpu as triton_cpu

    found = list(cases(kind, seed).values())
    path = Path(folder, f"libdevice_{kind}_kernel.py")
    path.write_text(source(found))
    arguments = []
    for name in DTYPES:
        dtype = getattr(torch, name)
        inputs = [x for case in found for x in case.inputs if x.dtype == dtype]
        arguments.append(torch.cat([*inputs, torch.zeros(libdevice_cases.N, dtype=dtype)]))
        count = sum(case.result == dtype for case in found) + 1
        arguments.append(torch.zeros(count, libdevice_cases.N, dtype=dtype))
    triton_cpu.launch(load(path).kernel, (1,))(*arguments, N=libdevice_cases.N)
    taken = dict.fromkeys(DTYPES, 0)
    outputs = {}
    for case in found:
        name = str(case.result)[6:]
        outputs[case.key] = arguments[2 * list(DTYPES).index(name) + 1][taken[name]]
        taken[name] += 1
    return outputs


def pytest_generate_tests(metafunc):
    if "case_key" in metafunc.fixturenames:
        pairs = [(kind, key) for kind in KINDS for key in cases(kind, metafunc.config.option.seed)]
        metafunc.parametrize(("kind", "case_key"), pairs, ids=[key for _, key in pairs])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("libdevice")


def unit(x, dtype):
    """Return the distance from x to its neighbour in dtype."""
    return 2.0 ** (torch.frexp(x.abs())[1] - 1.0) * torch.finfo(dtype).eps


@pytest.mark.no_interpreter("it has no libdevice")
def test_a_function_of_libdevice(kind, case_key, folder, request):
    seed = request.config.option.seed
    case, got = cases(kind, seed)[case_key], results(kind, seed, folder)[case_key]
    if not case.result.is_floating_point:
        # a predicate is true or not, whatever bits say so
        predicates = ("isnan", "isinf", "signbit", "finitef", "isfinited")
        got = (got != 0).int() if case.name in predicates else got
        assert torch.equal(got, case.expected.to(case.result))
        return
    right = case.expected.double()
    size = torch.nan_to_num(right.abs(), posinf=0).clamp_min(max(case.least, 1e-30))
    error = (got.double() - right).abs()
    good = (got.double() == right.to(case.result).double()) | (got.isnan() & right.isnan())
    good |= error <= case.ulp * unit(size, case.result)
    if not good.all():
        at = int((~good).nonzero()[0])
        inputs = [x[at].item() for x in case.inputs]
        pytest.fail(f"{case.name}{tuple(inputs)} is {got[at].item()}, not {right[at].item()}")


def test_every_function_has_a_case(request):
    found = {
        case.name for kind in KINDS for case in cases(kind, request.config.option.seed).values()
    }
    public = {name for name, value in vars(libdevice).items() if hasattr(value, "__wrapped__")}
    assert len(public) > 150
    assert public - found == set()
