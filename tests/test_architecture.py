"""The shape of the package: import layers, wheel contents, public names, cost of an import."""

import importlib.util
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import bitnet_triton

ROOT = Path(__file__).parents[1]


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        yield {info.filename: info.file_size for info in archive.infolist()}


def test_the_wheel_holds_nothing_but_the_package(wheel):
    tops = {name.split("/")[0] for name in wheel}
    assert tops == {"bitnet_triton", f"bitnet_triton-{bitnet_triton.__version__}.dist-info"}


@pytest.mark.parametrize(("model", "megabytes"), [("tiny", 8), ("recall", 2)])
def test_the_wheel_holds_types_and_the_embedded_models(wheel, model, megabytes):
    files = {name: size for name, size in wheel.items() if f"/assets/{model}/" in name}
    names = {Path(name).name for name in files}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= names
    assert sum(files.values()) <= megabytes * 2**20
    assert "bitnet_triton/py.typed" in wheel


def test_no_folder_shadows_the_kernels_package_of_hugging_face():
    found = importlib.util.find_spec("kernels")
    assert found is None or not Path(found.origin).is_relative_to(ROOT)
    assert not list((ROOT / "tests").rglob("__init__.py"))
    assert not (ROOT / "bitnet_triton" / "backends").exists()


@pytest.mark.parametrize("heavy", ["transformers", "triton", "torch"])
def test_importing_the_package_does_not_import(heavy):
    code = f"import bitnet_triton, sys; print({heavy!r} in sys.modules)"
    assert run_python(code) == ["False"]


def test_the_runtime_names_no_op():
    from bitnet_triton.kernels import IMPLEMENTATIONS
    from bitnet_triton.runtime import autotune

    folders = {path.parent.name for path in (ROOT / "bitnet_triton" / "kernels").rglob("op.py")}
    names = folders | IMPLEMENTATIONS.keys() | autotune.CPU.keys() | autotune.GPU.keys()
    assert {"flash_attention", "exact_attention_bwd", "merge_best", "rotary"} <= names
    for path in sorted((ROOT / "bitnet_triton" / "runtime").glob("*.py")):
        words = set(re.findall(r"\w+", path.read_text()))
        named = {word for word in words if any(name in word for name in names)}
        assert not named, f"{path.name} names {sorted(named)}"


def test_every_public_name_resolves_and_is_listed():
    for name in bitnet_triton.__all__:
        assert getattr(bitnet_triton, name) is not None
    assert set(bitnet_triton.__all__) == set(dir(bitnet_triton))
    with pytest.raises(AttributeError, match="no attribute 'BitNetForEverything'"):
        _ = bitnet_triton.BitNetForEverything


def test_a_function_of_the_runtime_traces_without_a_graph_break():
    from bitnet_triton.runtime import backend_objection

    @torch.compile(fullgraph=True, backend="eager")
    def traced(x):
        return x + 1 if backend_objection("reference", x.device) is None else x

    assert torch.equal(traced(torch.zeros(2)), torch.ones(2))
