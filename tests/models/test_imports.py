"""What an import brings with it, each in a process of its own."""

import subprocess
import sys


def python(script):
    command = [sys.executable, "-c", script]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_package_alone_imports_neither_transformers_nor_triton():
    script = "import sys, bitnet_triton; print({'transformers', 'triton'} & sys.modules.keys())"
    assert python(script) == "set()"


def test_the_models_only_add_names_to_transformers():
    script = """
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers import BitNetConfig, LlamaConfig
from transformers import AttentionInterface, AttentionMaskInterface

def state():
    return {
        "config": CONFIG_MAPPING["bitnet"],
        "bitnet": AutoModelForCausalLM._model_mapping[BitNetConfig],
        "base": AutoModel._model_mapping[BitNetConfig],
        "llama": AutoModelForCausalLM._model_mapping[LlamaConfig],
        "quantisers": {k: AUTO_QUANTIZER_MAPPING[k] for k in quantisers},
        "quantisation": {k: AUTO_QUANTIZATION_CONFIG_MAPPING[k] for k in quantisers},
    }

quantisers = list(AUTO_QUANTIZER_MAPPING)
before = state()
import bitnet_triton.models
assert state() == before
print(sorted(set(AUTO_QUANTIZER_MAPPING) - set(quantisers)))
print(CONFIG_MAPPING["bitnet_triton"].__module__)
"""
    assert python(script).splitlines() == [
        "['bitnet_triton']",
        "bitnet_triton.models.bitnet.configuration_bitnet",
    ]


def test_public_names_come_on_first_use():
    script = "import bitnet_triton as bt; print([n for n in bt.__all__ if not hasattr(bt, n)])"
    assert python(script) == "[]"
