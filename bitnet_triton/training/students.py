"""A dense model becomes a ternary one, as far as a BitNet layer can say what it computes.

A BitNet layer is a Llama layer with a norm in front of each linear that ends a branch (SubLN).
Everything else of the dense model is taken over: weights as masters, the activation of its MLP,
biases of its attention, its rotary embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from bitnet_triton.kernels.packing import CODES_PER_BYTE
from bitnet_triton.models import BitNetConfig, BitNetForCausalLM
from bitnet_triton.models.checkpoint import check_folder, weight_files
from bitnet_triton.models.onebit import config_objection, tensors_objection

FAMILIES = ("llama", "mistral", "qwen2")
_KEPT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range",
    "rms_norm_eps", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings",
    "attention_dropout", "rope_parameters",
)  # fmt: skip
# The norms that a dense model lacks, and the linear that each stands in front of
_SUB_NORMS = {
    "self_attn.attn_sub_norm": "self_attn.o_proj",
    "mlp.ffn_sub_norm": "mlp.down_proj",
}


def read_dense(folder: str, name: str = "model") -> PreTrainedConfig:
    """Return the config of a dense model that can become a ternary one.

    Args:
        folder: of the checkpoint, with its tokenizer.
        name: of the option that says so, for the message.

    Raises:
        CheckpointError: its weights are damaged or pickled.
        ValueError: it has a part for which a BitNet layer has no place, or no tokenizer.
    """
    config = _config(folder, name)
    objection = layer_objection(config)
    if objection is None:
        check_folder(folder)
        objection = tensors_objection(weight_files(folder))
    if objection is not None:
        raise ValueError(f"`{name}`: {folder} cannot become a ternary model: {objection}")
    _check_tokenizer(folder, config, name)
    return config


def read_teacher(folder: str, student: str) -> PreTrainedConfig:
    """Return the config of a teacher for the model in ``student``, a folder too.

    Raises:
        CheckpointError: its weights are damaged or pickled.
        ValueError: it counts other tokens, is quantised, or is none that shows its queries.
    """
    config = _config(folder, "teacher")
    objection = _objection_to_family(config)
    if objection is not None:
        raise ValueError(f"`teacher`: {folder} cannot teach: {objection}")
    check_folder(folder)
    theirs, ours = (
        _check_tokenizer(folder, config, "teacher"),
        AutoTokenizer.from_pretrained(student),
    )
    size = AutoConfig.from_pretrained(student).vocab_size
    if config.vocab_size != size or theirs.get_vocab() != ours.get_vocab():
        raise ValueError(
            f"`teacher`: expected the vocabulary of the model, {size} tokens of {student}, got "
            f"another one of {config.vocab_size} tokens"
        )
    return config


def _config(folder: str, name: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"`{name}`: {folder} has no config to read ({reason})") from error


def _check_tokenizer(folder: str, config: PreTrainedConfig, name: str) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"`{name}`: {folder} has no tokenizer to read ({reason})") from error
    most = max(tokenizer.get_vocab().values(), default=-1)
    if most >= config.vocab_size:
        raise ValueError(
            f"`{name}`: its tokenizer has token {most}, its embeddings end before "
            f"{config.vocab_size}"
        )
    return tokenizer


def layer_objection(config: PreTrainedConfig) -> str | None:
    """Say which part of a dense model a BitNet layer cannot express; None: it can all of them."""
    checks = (_objection_to_family, _objection_to_parts, _objection_to_sizes)
    return next(filter(None, (check(config) for check in checks)), None)


def _objection_to_family(config: Any) -> str | None:
    kind = config.model_type
    if kind in ("bitnet", BitNetConfig.model_type):
        return "it is ternary already; `bitnet-triton train` goes on with its training"
    if getattr(config, "quantization_config", None):
        return "its weights are quantised already; expected those that it was quantised from"
    if kind == "qwen3":
        return "its queries and keys have norms of their own, for which a BitNet layer has no place"
    if kind not in FAMILIES:
        return f"expected a dense model of the families {', '.join(FAMILIES)}, got {kind!r}"
    return config_objection(config)


def _objection_to_parts(config: Any) -> str | None:
    if getattr(config, "mlp_bias", False):
        return "its MLP has biases, for which a BitNet layer has no place"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    window = getattr(config, "sliding_window", None)
    if kinds or window:
        what = ", ".join(sorted(kinds)) or f"a window of {window}"
        return f"expected full attention in all layers, got {what}"
    rotated = (config.rope_parameters or {}).get("partial_rotary_factor", 1.0)
    if rotated != 1.0:
        return f"expected whole heads to be rotated, got a share of {rotated}"
    return None


def _objection_to_sizes(config: Any) -> str | None:
    width, heads = config.hidden_size, config.num_attention_heads
    D = getattr(config, "head_dim", None) or width // heads
    if heads * D != width:
        return (
            f"expected heads that are as wide as the model together ({width}, the width of the "
            f"norm behind them), got {heads} of {D}"
        )
    sizes = {
        "hidden_size": width,
        "intermediate_size": config.intermediate_size,
        "num_key_value_heads * head_dim": config.num_key_value_heads * D,
    }
    for name, size in sizes.items():
        if size % CODES_PER_BYTE:
            return f"expected `{name}` to be a multiple of {CODES_PER_BYTE} to pack, got {size}"
    return None


def load_teacher(folder: str, dtype: torch.dtype | str = "auto") -> Any:
    """Return the dense model of a folder, to be asked and not to be trained."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, attn_implementation="sdpa"
    )
    return model.eval().requires_grad_(False)


def make_student(teacher: Any, rows: Sequence[dict[str, Tensor]]) -> BitNetForCausalLM:
    """Return a ternary model with the weights of a dense one, as float32 masters.

    Its new norms take the size away that their inputs have in the dense model, and give it back by
    their weights: the root mean square over all tokens and channels of some text.

    Args:
        teacher: a dense model, which ``layer_objection`` has nothing against.
        rows: arguments of its forward; the text.

    Raises:
        ValueError: there is no text, or the model holds other tensors than its family has.
    """
    if not rows:
        raise ValueError("`rows`: expected some text to measure activations on, got none")
    config = _student_config(teacher.config)
    student = BitNetForCausalLM(config).float()
    kept = student.load_state_dict(teacher.float().state_dict(), strict=False)
    new = {name for name in kept.missing_keys if not _is_new(name)} - set(_tied(student))
    if new or kept.unexpected_keys:
        odd = sorted([*new, *kept.unexpected_keys])
        raise ValueError(
            f"`teacher`: expected the tensors of {teacher.config.model_type}, got others: {odd[:3]}"
        )
    with torch.no_grad(), _measured(teacher) as sizes:
        for row in rows:
            teacher(**row, use_cache=False)
        for name, size in sizes().items():
            student.model.get_submodule(name).weight.fill_(size)
        for name in kept.missing_keys:
            if name.endswith("bias"):
                student.get_parameter(name).zero_()
    student.generation_config = teacher.generation_config
    return student


def _student_config(dense: Any) -> BitNetConfig:
    kept = {name: getattr(dense, name) for name in _KEPT if hasattr(dense, name)}
    # qwen2 has them without saying so, on all but the last projection of its attention
    bias = dense.model_type == "qwen2" or bool(getattr(dense, "attention_bias", False))
    return BitNetConfig(**kept, attention_bias=bias)


def _is_new(name: str) -> bool:
    parts = (*(f"{norm}.weight" for norm in _SUB_NORMS), "self_attn.o_proj.bias")
    return name.endswith(parts)


def _tied(model: Any) -> Sequence[str]:
    return list(model.all_tied_weights_keys) if model.config.tie_word_embeddings else []


@contextmanager
def _measured(model: Any) -> Iterator[Callable[[], dict[str, float]]]:
    """Measure what goes into the linears behind the places of new norms, while the block runs."""
    sums: dict[str, list[float]] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].double()
            found = sums.setdefault(name, [0.0, 0.0])
            found[0] += x.square().sum().item()
            found[1] += x.numel()

        return hook

    hooks = []
    for index, layer in enumerate(model.model.layers):
        for norm, linear in _SUB_NORMS.items():
            name = f"layers.{index}.{norm}"
            hooks.append(layer.get_submodule(linear).register_forward_pre_hook(watch(name)))
    try:
        yield lambda: {name: (square / count) ** 0.5 for name, (square, count) in sums.items()}
    finally:
        for hook in hooks:
            hook.remove()
