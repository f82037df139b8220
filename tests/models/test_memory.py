"""A checkpoint of the shapes of microsoft/bitnet-b1.58-2B-4T loads in its own size."""

import json
import shutil
import subprocess
import sys

import pytest

HIDDEN, LAYERS, HEADS, KV_HEADS, FFN, VOCABULARY = 2560, 30, 20, 5, 6912, 128256

WRITE = f"""
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file

H, L, KV, F, V = {HIDDEN}, {LAYERS}, {HIDDEN // HEADS * KV_HEADS}, {FFN}, {VOCABULARY}
folder = Path(sys.argv[1])
weight_map = {{}}

def packed(n, k):  # random bytes without a code of three
    bytes = torch.randint(0, 256, (n // 4, k), dtype=torch.uint8)
    return bytes & ~((bytes & (bytes >> 1) & 0b01010101) << 1)

def save(name, tensors):
    save_file(tensors, folder / name, metadata={{"format": "pt"}})
    weight_map.update(dict.fromkeys(tensors, name))

ones = lambda n: torch.ones(n, dtype=torch.bfloat16)
shapes = {{"self_attn.q_proj": (H, H), "self_attn.k_proj": (KV, H), "self_attn.v_proj": (KV, H),
          "self_attn.o_proj": (H, H), "mlp.gate_proj": (F, H), "mlp.up_proj": (F, H),
          "mlp.down_proj": (H, F)}}
layer = {{}}
for name, shape in shapes.items():
    layer[f"{{name}}.weight"], layer[f"{{name}}.weight_scale"] = packed(*shape), ones(1)
for name, width in {{"input_layernorm": H, "post_attention_layernorm": H,
                    "self_attn.attn_sub_norm": H, "mlp.ffn_sub_norm": F}}.items():
    layer[f"{{name}}.weight"] = ones(width)
for i in range(L):
    save(f"layer-{{i}}.safetensors", {{f"model.layers.{{i}}.{{k}}": v for k, v in layer.items()}})
save("rest.safetensors", {{"model.norm.weight": ones(H),
     "model.embed_tokens.weight": torch.full((V, H), 0.01, dtype=torch.bfloat16)}})
index = {{"metadata": {{}}, "weight_map": weight_map}}
(folder / "model.safetensors.index.json").write_text(json.dumps(index))
"""

LOAD = """
import json, sys
import torch
import bitnet_triton as bt

def peak():  # bytes
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

bt.BitNetForCausalLM
imported = peak()
model = bt.BitNetForCausalLM.from_pretrained(sys.argv[1], fuse=sys.argv[2] == "fused")
loaded = peak()
# weights that are mapped from the file become resident when they are read
tensors = [*model.parameters(), *model.buffers()]
for tensor in tensors:
    tensor.detach().view(-1).view(torch.uint8)[::256].max()
read = peak()
if sys.argv[2] == "fused":
    ids = torch.randint(0, 1000, (1, 64))
    with torch.inference_mode():
        model.generate(ids, max_new_tokens=16, eos_token_id=None, do_sample=False, pad_token_id=0)
decoded = peak()
json.dump({"loaded": loaded - imported, "read": read - imported, "decoded": decoded - imported,
           "dtype": str(model.dtype), "tensors": sum(tensor.nbytes for tensor in tensors)},
          sys.stdout)
"""


def run(script, folder, *more):
    command = [sys.executable, "-c", script, str(folder), *more]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def folder_of_2b(tmp_path):
    config = {
        "model_type": "bitnet",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "offline",
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    try:
        run(WRITE, tmp_path)
        yield tmp_path
    finally:
        shutil.rmtree(tmp_path)  # 1.2 GB


@pytest.mark.slow
@pytest.mark.usefixtures("default_backend")
@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from /proc")
def test_a_2b_model_takes_little_more_than_its_tensors(folder_of_2b, record_property):
    plain, fused = (json.loads(run(LOAD, folder_of_2b, kind)) for kind in ("unfused", "fused"))
    for name, result in (("unfused", plain), ("fused", fused)):
        record_property(name, result)
        assert result["dtype"] == "torch.bfloat16"
        # embeddings of 0.66 GB and linears of 0.52 GB in two bits a weight
        assert 1.17e9 < result["tensors"] < 1.2e9
    assert plain["loaded"] < 0.1e9  # mapped from the file until it is read
    assert plain["read"] < 1.25e9
    # the merged 0.34 GB, and the pages of the file that they were read from
    assert fused["loaded"] < 0.8e9
    assert fused["read"] < 1.6e9
    # kernels are compiled meanwhile, and a prompt is read
    assert fused["decoded"] < 2.2e9
