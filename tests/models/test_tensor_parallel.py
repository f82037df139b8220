"""Two processes that hold a model together write what one writes that holds all of it."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import bitnet_triton as bt
from bitnet_triton.kernels import quantize_activations
from bitnet_triton.kernels.quantize.by_magnitude import quantize_by_magnitude
from bitnet_triton.models.tensor_parallel import check_division, key_heads
from bitnet_triton.nn import BitLinear, PackedBitLinear

SCRIPT = Path(__file__).with_name("two_parts.py")
WIDTH = json.dumps({"intermediate_size": 96})
# three heads of keys for two processes, and a vocabulary that cannot be divided
ODD = json.dumps(
    {
        "intermediate_size": 96, "vocab_size": 97, "hidden_size": 96,
        "num_attention_heads": 6, "num_key_value_heads": 3,
    }
)  # fmt: skip
# every way to store linears, with what goes with them
KINDS = {
    "packed": {"format": "packed", "tied": True},
    "bitlinear": {"format": "bitlinear", "bias": True, "shards": 2},
    "codes": {"format": "codes", "bias": True},
    "online": {"format": "online", "bias": True},
    "odd": {"format": "packed", "bias": True},
}

needs_gloo = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="PyTorch has no gloo here"
)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("two_parts", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_processes(folder):
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": "2",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(folder)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)


class Closest:
    """How close activations come to where their code, and logits to where the token, is another."""

    def __init__(self, model):
        self.distance = 1.0
        for module in model.modules():
            if isinstance(module, (BitLinear, PackedBitLinear)):
                module.register_forward_pre_hook(self.look)
        model.lm_head.register_forward_hook(self.look_at_logits)

    def look(self, module, args):
        x = args[0].float()
        scaled = x * (127 / x.abs().amax(-1, keepdim=True).clamp_min(1e-5))
        # the largest is 127 in any case
        self.distance = min(self.distance, (scaled.frac().abs() - 0.5).abs().min().item())

    def look_at_logits(self, module, args, logits):
        best = logits[:, -1].topk(2).values
        self.distance = min(self.distance, (best[:, 0] - best[:, 1]).min().item())


def answers_apart_from_ties(model, script):
    """Draw ids until no activation is near a tie; return them and what the model makes of them.

    Sums of two processes round otherwise than one's. A code may be another one then, and all that
    follows is.
    """
    closest, draws = Closest(model), torch.Generator().manual_seed(torch.initial_seed())
    for _ in range(200):
        ids = torch.randint(3, 96, (2, 3), generator=draws)
        closest.distance = 1.0
        torch.manual_seed(3)
        answers = script.ask(model, ids)
        if closest.distance > 4e-5:
            return ids, answers
    raise AssertionError("no ids without a tie")


@pytest.fixture(scope="module")
def runs(checkpoint, script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    (folder / "checkpoints").mkdir()
    expected, ids = {}, {}
    for name, fields in KINDS.items():
        source = checkpoint(**fields, config=ODD if name == "odd" else WIDTH)
        (folder / "checkpoints" / name).symlink_to(source)
        model = bt.BitNetForCausalLM.from_pretrained(source, fuse=False)
        parameters = model.num_parameters()
        ids[name], expected[name] = answers_apart_from_ties(model, script)
        with torch.no_grad():
            expected[name]["hidden"] = model.model(ids[name]).last_hidden_state
        expected[name]["parameters"] = parameters
    torch.save(ids, folder / "ids.pt")
    run_processes(folder)
    told = [json.loads((folder / f"told-{rank}.json").read_text()) for rank in range(2)]
    return SimpleNamespace(folder=folder, expected=expected, told=told)


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_two_processes_make_of_a_text_what_one_does(name, runs):
    for rank in range(2):
        answers = torch.load(runs.folder / f"{name}-{rank}.pt")
        for what, value in answers.items():
            expected = runs.expected[name][what]
            if value.is_floating_point():
                torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5, msg=what)
            else:
                assert torch.equal(value, expected), what


@needs_gloo
@pytest.mark.slow
def test_each_process_holds_half_of_the_matrices(runs):
    for name in ("packed", "codes"):
        whole = load_file(runs.folder / "checkpoints" / name / "model.safetensors")
        divided = ("_proj.weight", "_sub_norm.weight", "embed_tokens.weight", "lm_head.weight")
        # codes are packed as they are read: a byte holds four
        size = {
            n: t.numel() // 4 if n.endswith("_proj.weight") and t.dtype != torch.uint8 else t.nbytes
            for n, t in whole.items()
        }
        half = sum(b // 2 if n.endswith(divided) else b for n, b in size.items())
        biases = sum(
            t.nbytes // 2 for n, t in whole.items()
            if n.endswith("bias") and "o_proj" not in n and "down_proj" not in n
        )  # fmt: skip
        for told in runs.told:
            assert told[name]["bytes"] == half - biases
            assert told[name]["parameters"] == runs.expected[name]["parameters"]


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize("name", ["packed", "bitlinear", "codes", "odd"])
def test_what_two_processes_save_is_the_whole_checkpoint(name, runs):
    saved, source = runs.folder / f"saved-{name}", runs.folder / "checkpoints" / name
    one = bt.BitNetForCausalLM.from_pretrained(source).state_dict()
    two = bt.BitNetForCausalLM.from_pretrained(saved).state_dict()
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        assert torch.equal(tensor, two[key]), key
    config = json.loads((saved / "config.json").read_text())
    assert "distributed_config" not in config


@needs_gloo
@pytest.mark.slow
def test_what_a_divided_model_cannot_do_is_refused_by_name(runs):
    for told in runs.told:
        assert "master weights" in told["online"]["refused"]
        assert not (runs.folder / "saved-online").exists()
        assert "divided among processes" in told["packed"]["batching"]
        assert any("module by module" in line and "divided" in line for line in told["heard"])
        assert any("97 tokens stays whole" in line for line in told["heard"])


@pytest.mark.parametrize(
    ("config", "wanted", "named"),
    [
        ({}, {"tp_size": 3}, "num_attention_heads=4"),
        ({"intermediate_size": 99}, {}, "intermediate_size=99"),
        ({"intermediate_size": 100}, {}, "50 of 100 rows for each of 2 processes"),
        ({"attention": "full"}, {}, "`attention`"),
        ({"quantization_config": None}, {}, "ternary weights, got dense"),
        ({}, {"fsdp_size": 2}, "`fsdp_size`"),
        ({}, {"tp_plan": {"layers.*.mlp.up_proj": "colwise"}}, '"auto"'),
    ],
)
def test_what_cannot_be_divided_is_refused_by_name(config, wanted, named):
    sizes = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    with torch.device("meta"):
        model = bt.BitNetForCausalLM(bt.BitNetConfig(**sizes | config))
    with pytest.raises(ValueError, match=named):
        check_division(model, SimpleNamespace(**{"tp_size": 2, "tp_plan": "auto"} | wanted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts_of_a_row_have_the_codes_of_the_whole_row(dtype):
    x = torch.randn(5, 48).to(dtype)
    x[3] = 0
    x[4, 7] = torch.nan
    codes, scale = quantize_activations(x)
    magnitude = x.abs().amax(-1, keepdim=True).float()
    parts = [quantize_by_magnitude(part, magnitude) for part in x.split(24, 1)]
    told = torch.cat([part[0] for part in parts], 1)
    assert torch.equal(told[:4], codes[:4])
    assert torch.equal(parts[0][1][:4], scale[:4])
    assert parts[0][1][4].isnan().all()
    assert torch.equal(sum(part[2] for part in parts)[:4], codes[:4].sum(1, dtype=torch.int32))


@pytest.mark.parametrize(
    ("heads", "key_heads_", "size", "expected"),
    [
        (4, 2, 2, [[0], [1]]),
        (20, 5, 2, [[0, 0, 1, 1, 2], [2, 3, 3, 4, 4]]),  # 2B-4T
        (4, 1, 4, [[0], [0], [0], [0]]),
        (6, 3, 3, [[0], [1], [2]]),
    ],
)
def test_every_process_has_the_keys_of_its_queries(heads, key_heads_, size, expected):
    config = SimpleNamespace(num_attention_heads=heads, num_key_value_heads=key_heads_)
    found = key_heads(config, size)
    assert found == expected
    for rank, own in enumerate(found):
        for query in range(heads // size):
            whole = (rank * heads // size + query) // (heads // key_heads_)
            assert own[query // (heads // size // len(own))] == whole


def test_a_model_that_transformers_has_divided_keeps_its_linears(checkpoint, load_theirs):
    model = load_theirs(checkpoint())
    model._tp_size = 2
    with pytest.raises(ValueError, match="expected a whole one"):
        bt.use_ternary_kernels(model)


def test_the_plan_of_transformers_names_what_is_divided():
    with torch.device("meta"):
        model = bt.BitNetForCausalLM(bt.BitNetConfig(num_hidden_layers=1))
    names = {name.replace(".0.", ".*.") for name, _ in model.named_modules()}
    assert set(model.tp_plan) <= names
    assert model.tp_plan["model.layers.*.self_attn.k_proj"] == "colwise"
    assert copy.deepcopy(model.config).base_model_tp_plan == model.config.base_model_tp_plan
