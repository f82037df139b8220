"""A memory in pages: attention over all tokens of each row, whatever rows share."""

import copy
import gc

import pytest
import torch
from transformers.cache_utils import Cache

import bitnet_triton as bt
from bitnet_triton.cache import Batch, Call, Pages, begin_call
from bitnet_triton.cache.pages import paged_layers
from bitnet_triton.errors import OutOfPagesError
from bitnet_triton.kernels import Mask
from bitnet_triton.kernels.flash_attention.reference import attention_reference

H, HK, D = 4, 2, 16


@pytest.fixture(scope="module")
def model(full_model):
    return full_model


def generate(model, ids, new=24, **settings):
    return model.generate(
        ids, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0,
        return_dict_in_generate=True, **settings,
    )  # fmt: skip


def prompts(B, T, padding=()):
    ids = torch.randint(10, 1000, (B, T))
    mask = torch.ones_like(ids)
    for row, left in enumerate(padding):
        mask[row, :left] = 0
    return ids, mask


def pool_of(cache):
    return cache.layers[0].batch.pool


class Text:
    """Rows that are read through a layer, beside attention over everything in float64."""

    def __init__(self, lefts, **settings):
        self.layer = Pages(page_size=16, **settings).memory()
        self.lefts = list(lefts)
        self.k, self.v = (torch.zeros(len(lefts), 0, HK, D) for _ in range(2))

    def read(self, T):
        layer, B = self.layer, len(self.lefts)
        columns = self.k.shape[1]
        q, k, v = (torch.randn(B, T, heads, D) for heads in (H, HK, HK))
        left = torch.tensor(self.lefts, dtype=torch.int32)
        begin_call([layer], Call(columns, left))
        with torch.no_grad():
            given = layer.update(k.transpose(1, 2), v.transpose(1, 2))
            out, lse = layer.attend(
                q, *(t.transpose(1, 2) for t in given), mask=Mask(), scale=0.3, return_lse=True,
                leftpad_k=(left - columns).clamp_min(0), seqused_q=None, seqused_k=None,
            )  # fmt: skip
        self.k, self.v = torch.cat([self.k, k], 1), torch.cat([self.v, v], 1)
        for row, start in enumerate(self.lefts):
            own = min(max(columns + T - start, 0), T)
            assert out[row, : T - own].eq(0).all()
            if own:
                exact, exact_lse = attention_reference(
                    q[row : row + 1, T - own :].double(),
                    *(t[row : row + 1, start:].double() for t in (self.k, self.v)),
                    mask=Mask(), scale=0.3,
                )  # fmt: skip
                assert (out[row, T - own :] - exact[0]).abs().max() < 1e-5
                assert (lse[row, :, T - own :] - exact_lse[0]).abs().max() < 1e-5

    def select(self, rows):
        self.layer.batch_select_indices(torch.tensor(rows))
        self.lefts = [self.lefts[row] for row in rows]
        self.k, self.v = self.k[rows], self.v[rows]

    def crop(self, n):
        self.layer.crop(-n)
        self.k, self.v = (t[:, : t.shape[1] - n] for t in (self.k, self.v))


@pytest.mark.parametrize("lefts", [(0,), (0, 5, 40)])
def test_every_call_reads_all_tokens_of_its_rows(lefts):
    text = Text(lefts)
    for T in (30, 1, 1, 20, 3, 1, 70, 1):
        text.read(T)


def test_rows_part_where_they_write_and_share_the_rest():
    text = Text((0, 7))
    text.read(40)
    text.select([0, 1, 0, 0, 1])
    pool = text.layer.batch.pool
    assert pool.used == 3 + 3
    text.read(1)  # rows have 41 and 34 tokens: each has a third page of its own, two are shared
    assert pool.used == 5 + 4
    text.crop(3)
    text.read(9)
    text.select([4, 2])
    text.read(30)
    text.layer.reset()
    assert pool.used == 0


def test_a_copy_goes_its_own_way():
    """As ``copy.deepcopy`` of a cache that several prompts continue."""
    text = Text((0, 3))
    text.read(20)
    other = copy.deepcopy(text)
    assert other.layer.batch.pool is text.layer.batch.pool
    assert other.layer.batch.pool.used == 4
    other.read(5)
    text.read(1)
    other.read(1)
    text.read(30)


def test_pages_in_a_row_are_one_run_of_memory_to_a_head():
    """As without pages: what lies between the rows of a head is fetched in vain."""
    text = Text((0,))
    text.read(3 * 16)
    pool = text.layer.batch.pool
    for pages in pool.pages_of(0):
        for head in range(HK):
            assert pages[:, :, head].is_contiguous()


PADDED = (0, 30, 7)


@pytest.mark.pairwise
@pytest.mark.parametrize("padding", [(), PADDED], ids=str)
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("chunk", [None, 32])
@pytest.mark.parametrize("page_size", [16, 64])
def test_tokens_are_those_of_the_plain_cache(padding, beams, chunk, page_size, model):
    ids, mask = prompts(3, 75, padding)
    settings = {"attention_mask": mask, "num_beams": beams, "prefill_chunk_size": chunk}
    plain = generate(model, ids, **settings)
    kind = {"name": "pages", "page_size": page_size}
    ours = generate(model, ids, **settings, cache_implementation=kind)
    assert torch.equal(ours.sequences, plain.sequences)
    pool = pool_of(ours.past_key_values)
    recording = model.model.decode_steps.recording
    assert recording._step.addresses[0][0] is pool.store  # beams too: only tables change


def test_a_first_call_is_that_of_the_plain_cache_bitwise(model):
    ids, mask = prompts(2, 70, (0, 13))
    plain = generate(model, ids, 1, attention_mask=mask, output_logits=True)
    ours = generate(
        model, ids, 1, attention_mask=mask, output_logits=True, cache_implementation="pages"
    )
    assert torch.equal(ours.logits[0], plain.logits[0])


def test_beams_share_what_they_have_in_common(model):
    ids, _ = prompts(1, 600)
    output = generate(model, ids, 40, num_beams=4, cache_implementation="pages")
    # 4 beams of 640 tokens would be 160 pages; behind the 37 whole ones of the prompt each has 3
    assert pool_of(output.past_key_values).used <= 37 + 4 * 3


def test_a_conversation_goes_on_and_assistants_take_back(model):
    ids, _ = prompts(1, 60)
    first = generate(model, ids, cache_implementation="pages")
    more = torch.cat([first.sequences, prompts(1, 20)[0]], 1)
    plain = generate(model, more)
    cache = first.past_key_values
    assert torch.equal(generate(model, more, past_key_values=cache).sequences, plain.sequences)
    cache.crop(-cache.get_seq_length() + 50)
    assert cache.get_seq_length() == 50
    assert torch.equal(generate(model, more, past_key_values=cache).sequences, plain.sequences)
    repeated = ids.repeat(1, 2)
    guessed = generate(
        model, repeated, prompt_lookup_num_tokens=4, cache_implementation="pages"
    ).sequences
    assert torch.equal(guessed, generate(model, repeated).sequences)


def test_layers_without_a_fused_model_do_the_same():
    slow = bt.BitNetForCausalLM.from_pretrained(
        bt.RECALL_MODEL, attention="full", dtype=torch.float32, fuse=False, cache="pages"
    ).eval()
    ids, mask = prompts(2, 50, (9,))
    ours = generate(slow, ids, attention_mask=mask)
    assert pool_of(ours.past_key_values).used
    bt.set_cache(slow, None)
    assert torch.equal(ours.sequences, generate(slow, ids, attention_mask=mask).sequences)


def test_pages_come_back_when_nobody_has_the_cache(model):
    kind = Pages(page_size=16, tokens=512)
    pool = kind.pool()
    cache = paged(pool)
    generate(model, prompts(2, 60)[0], past_key_values=cache)
    assert pool.used == 2 * -(-83 // 16)
    del cache
    gc.collect()
    assert pool.used == 0


def paged(pool):
    """Return an empty cache of three layers in the pages of a pool."""
    return Cache(paged_layers(Batch(pool), 3))


def test_a_pool_that_runs_out_says_so_and_spoils_nothing(model):
    pool = Pages(page_size=16, tokens=128).pool()
    cache, ids = paged(pool), prompts(1, 100)[0]
    with torch.no_grad():
        model(ids, past_key_values=cache)
        with pytest.raises(OutOfPagesError, match=r"4 wanted \(64 tokens\), 1 of 8 are free, 7 in"):
            model(prompts(1, 70)[0], past_key_values=cache)
        assert pool.used == 7
        more = prompts(1, 20)[0]
        found = model(more, past_key_values=cache).logits
        plain = model(torch.cat([ids, more], 1)).logits[:, 100:]
    # an activation near a tie may round otherwise; other tokens are off by the size of a logit
    assert (found - plain).abs().max() < 0.03 * plain.abs().max()


def test_what_pages_do_not_do_is_refused_by_name(model):
    with pytest.raises(ValueError, match="'pages' does not go with attention 'quest'"):
        bt.BitNetConfig(attention="quest", cache="pages")
    with pytest.raises(ValueError, match="'page_size': expected a power of two, got 48"):
        Pages(page_size=48)
    with pytest.raises(ValueError, match="'page_size': expected at least 16, got 8"):
        Pages(page_size=8)
    with pytest.raises(ValueError, match="'tokens': expected at least 16, got 15"):
        Pages(tokens=15)
    ids, mask = prompts(2, 20)
    mask[0, 15:] = 0
    cache = paged(Pages().pool())
    with torch.no_grad(), pytest.raises(ValueError, match="takes padding to the left of rows"):
        model(ids, attention_mask=mask, past_key_values=cache)
    mask[:] = 1
    cache = paged(Pages().pool())
    with torch.no_grad():
        model(ids, past_key_values=cache)
        mask[0, :3] = 0
        longer = torch.cat([mask, torch.ones(2, 5)], 1)
        with pytest.raises(ValueError, match="row 0 has 17 tokens before this call by the mask"):
            model(ids[:, :5], attention_mask=longer, past_key_values=cache)
        with pytest.raises(ValueError, match="expected 2 rows, as it holds, got 1"):
            model(ids[:1], past_key_values=cache)
    layer = Pages().memory()
    k = torch.zeros(1, 2, 3, 16, requires_grad=True)
    with pytest.raises(ValueError, match="pages have no gradient"):
        layer.update(k, k)


def test_a_model_that_would_not_read_the_pages_is_told():
    plain = bt.BitNetForCausalLM.from_pretrained(bt.RECALL_MODEL, dtype=torch.float32).eval()
    ids = prompts(1, 20)[0]
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"PagedLayer goes with `config.attention`"),
    ):
        plain(ids, past_key_values=paged(Pages().pool()))
    # of another class, which knows nothing of memories
    cache, k = paged(Pages().pool()), torch.zeros(1, 2, 3, 16)
    for layer in cache.layers:
        layer.update(k, k)
    cache.layers[0].update(k, k)
    with pytest.raises(RuntimeError, match="nobody has read the pages of the layer before"):
        cache.layers[1].update(k, k)


def test_layers_that_have_seen_different_calls_are_refused():
    """As when a call has failed behind its first layer."""
    cache, k = paged(Pages().pool()), torch.zeros(1, 2, 3, 16)
    cache.layers[0].update(k, k)
    cache.layers[0].crop(-1)
    with pytest.raises(RuntimeError, match="a call has failed midway"):
        cache.layers[1].update(k, k)
