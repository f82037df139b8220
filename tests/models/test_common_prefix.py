"""64 requests of continuous batching behind one prefix: what they compute, and what they hold."""

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import ContinuousBatchingConfig, GenerationConfig

from bitnet_triton import BitNetConfig, BitNetForCausalLM

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="the cache of continuous batching before transformers 5.23 has another layout",
)
PAGE, PREFIX, REQUESTS, NEW = 16, 2048, 64, 4
SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
# Prompts are cut otherwise than in `generate`, which may turn a code of an activation
_CLEAR = 0.02


def greedy(**more):
    wanted = {"max_new_tokens": NEW, "do_sample": False, "repetition_penalty": 1.0}
    return GenerationConfig(**wanted, eos_token_id=None, pad_token_id=0, **more)


def draw_text(model, prefix):
    """Return a prompt, what ``generate`` writes, and how much of that is clear of ties."""
    wanted = greedy(output_logits=True, return_dict_in_generate=True)
    tail = torch.randint(3, 96, (int(torch.randint(20, 100, ())),)).tolist()
    made = model.generate(torch.tensor([prefix + tail]), generation_config=wanted)
    best = torch.stack(made.logits).topk(2).values[:, 0]
    is_clear = best[:, 0] - best[:, 1] >= _CLEAR
    written = made.sequences[0, PREFIX + len(tail) :].tolist()
    return prefix + tail, written, int(is_clear.int().cumprod(0).sum())


def draw_texts():
    """Return a model, and texts of it that are clear of ties for the most part."""
    for _ in range(20):
        model = BitNetForCausalLM(BitNetConfig(**SIZES)).eval()
        model.set_attn_implementation("bitnet_triton")
        prefix = torch.randint(3, 96, (PREFIX,)).tolist()
        drawn = [draw_text(model, prefix) for _ in range(REQUESTS)]
        if sum(clear for *_, clear in drawn) >= REQUESTS * NEW // 2:
            return model, drawn
    raise AssertionError("no model whose texts are clear of ties")


def counted(model, prompts):
    """Return what the engine writes, the tokens that it computes, and pages in use at the peak."""
    computed, used = [], []

    def count(module, args, kwargs):
        pool, (allocator,) = kwargs["cache"].pool, kwargs["cache"].cache_allocators.values()
        computed.append(args[0].shape[1] if args else kwargs["hidden_states"].shape[1])
        taken = pool.num_sectors - pool.num_free_sectors
        used.append(taken * allocator.blocks_per_sector - pool.count_free_blocks(0))

    hook = model.model.layers[0].self_attn.register_forward_pre_hook(count, with_kwargs=True)
    try:
        done = model.generate_batch(
            prompts, generation_config=greedy(),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE, num_blocks=4096, max_batch_tokens=8192
            ),
        )  # fmt: skip
    finally:
        hook.remove()
    assert [one.error for one in done.values()] == [None] * len(prompts)
    return [one.generated_tokens for one in done.values()], sum(computed), max(used)


def test_64_requests_compute_and_hold_one_prefix_and_their_tails():
    model, drawn = draw_texts()
    prompts = [prompt for prompt, *_ in drawn]

    written, computed, used = counted(model, prompts)

    for ours, (_, theirs, clear) in zip(written, drawn, strict=True):
        assert len(ours) == NEW
        assert ours[:clear] == theirs[:clear]
    tails = sum(map(len, prompts)) - REQUESTS * PREFIX
    decoded = REQUESTS * (NEW - 1)  # the first token comes of the prompt
    assert computed - decoded == PREFIX + tails
    assert used * PAGE <= 1.1 * (PREFIX + tails + decoded)
