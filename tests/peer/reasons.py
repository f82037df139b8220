"""Why a case of transformers' own tests is left out, skipped, or fails: one sentence each.

A pattern is matched against ``Variant::test_name`` (``test_name`` alone in ``OTHER_MODELS``), the
first match counts. A case that is skipped without an entry fails, and so does one with an entry in
``SKIPS`` that runs, or in ``FAILS`` that passes; an entry that matches no case fails as well.
"""

from __future__ import annotations

from typing import Any

from bitnet_triton.errors import CheckpointError

PACKED = ("Bitlinear", "Autobitlinear", "Fused*")
OURS = ("Dense*", "Online", "Plan*", *PACKED)


def _each(variants: tuple[str, ...], test: str, why: Any) -> dict[str, Any]:
    return {f"{variant}::{test}": why for variant in variants}


# Mixins, and what keeps one from running
MIXINS = {
    "ModelTesterMixin": "it is in every source distribution",
    "TrainingTesterMixin": "it is in every source distribution",
    "GenerationTesterMixin": "tests/generation is not in the source distribution of transformers",
    "ExportTesterMixin": "tests/exporters is not in the source distribution of transformers",
    "PipelineTesterMixin": "it loads tiny models from the Hub, and tests/pipelines is absent",
    "TensorParallelTesterMixin": "tests/distributed_testing_utils.py is absent",
    "FSDPTesterMixin": "tests/distributed_testing_utils.py is absent",
}

# Cases of other kinds of models: they are not run at all
OTHER_MODELS = {
    "test_get_*_features*": "asks for pictures, sound or video",
    "test_vision_axial_rope": "asks for pictures",
    "test_attn_implementation_composite_models": "asks for a model made of several",
    "test_sdpa_can_dispatch_composite_models": "asks for a model made of several",
    "test_can_set_attention_dynamically_composite_model": "asks for a model made of several",
    "test_internal_model_config_and_subconfig_are_same": "asks for a model made of several",
    "test_encoder_decoder_*": "asks for an encoder and a decoder",
    "test_moe_*": "asks for experts",
    "test_output_router_logits_from_config": "asks for experts",
    "test_eager_matches_batched_and_grouped_inference*": "asks for experts",
    "test_resize_position_vector_embeddings": "asks for learned positions",
    "test_flash_attn_*": "compares FlashAttention with PyTorch's attention, and nothing of ours",
    "test_*_with_deepspeed*": "asks for DeepSpeed, with which nothing here has been tried",
}

# Cases that this machine may or may not be able to run
ELSEWHERE = {
    "*::test_can_load_with_device_context_manager": "needs a GPU",
    "*::test_can_load_with_global_device_set": "needs a GPU",
    "*::test_cpu_offload": "needs a GPU",
    "*::test_disk_offload_*": "needs a GPU",
    "*::test_flex_attention_with_grads": "needs a GPU",
    "*::test_model_parallelism": "needs two GPUs",
    "*::test_sdpa_can_compile_dynamic": "needs a GPU",
    "*::test_sdpa_can_dispatch_on_flash": "needs a GPU",
    "*::test_torch_compile_for_training": "needs a GPU",
    "*::test_kernels_can_load_without_crashing": "needs kernels from the Hub",
}

_UNTRAINED = "packed codes are not trained"

# Cases that transformers skips, because the model lacks what they are about
SKIPS = {
    "*::test_keep_in_fp32_modules*": "no module asks for float32",
    "*::test_can_load_from_already_mapped_keys": "no parameter has an older name",
    "*::test_reverse_loading_mapping": "no parameter has an older name",
    **_each(
        (*OURS, "HubLlama", "HubMistral", "HubGemma*", "HubPhi*"),
        "test_sliding_window_mask",
        "the config has no `use_sliding_window`",
    ),
    **_each(OURS, "test_tp_plan_matches_params", "BitNet has no plan for tensor parallelism"),
    **_each(OURS, "test_tied_head_has_a_tp_plan_entry", "BitNet has no tensor parallelism"),
    **_each(
        (*OURS, "HubLlama", "HubMistral", "HubQwen*", "HubGemma*"),
        "test_model_rope_with_partial_rotation",
        "all of a head is rotated",
    ),
    **_each(
        ("Dense*", "Online", *PACKED),
        "test_eager_matches_sdpa_inference_24*",
        "it asks how `**kwargs` is annotated, and ours is Any",
    ),
    **_each(PACKED, "test_training*", _UNTRAINED),
    **_each(PACKED, "test_enable_input_require_grads_with_*", _UNTRAINED),
}

_REFUSED = (CheckpointError, "a checkpoint that lacks a tensor is refused; nothing is filled up")
_PLANNED = (ValueError, "config.attention refuses another `attn_implementation`")
_IN_PLACE = (AssertionError, "it wants to read the name sdpa, where this variant has bitnet_triton")
_GARBAGE = (AssertionError, "init_weights leaves garbage in codes and scales that were on meta")

# Cases that fail, by the error that they fail with
FAILS = {
    **_each(OURS, "test_correct_missing_keys", _REFUSED),
    **_each(OURS, "test_model_weights_reload_no_missing_tied_weights", _REFUSED),
    **_each(PACKED, "test_init_weights_can_init_buffers", _GARBAGE),
    **_each(PACKED, "test_can_init_all_missing_weights", _GARBAGE),
    "*Plan*::test_attention_outputs": _PLANNED,
    "*Plan*::test_retain_grad_hidden_states_attentions": _PLANNED,
    "*Plan*::test_can_set_attention_dynamically": _PLANNED,
    "*Plan*::test_eager_matches_sdpa_inference*": _PLANNED,
    "*Plan*::test_sdpa_can_dispatch_non_composite_models": _IN_PLACE,
    "*Hub*::test_can_set_attention_dynamically": _IN_PLACE,
    "*Hub*::test_sdpa_can_dispatch_non_composite_models": _IN_PLACE,
}

# What runs without --peer-all
FAST = [
    "*::test_config",
    "*::test_save_load",
    "*::test_batching_equivalence",
    "*::test_hidden_states_output",
    "*::test_inputs_embeds_matches_input_ids",
    "*::test_resize_tokens_embeddings",
    "*::test_causal_lm_loss_honors_shift_labels",
    "*::test_training",
    "Hub*::test_eager_matches_sdpa_inference_08*",
]
