import importlib.metadata
import json

import pytest
import torch
import transformers
from packaging.version import Version
from typer.testing import CliRunner

from bench.__main__ import app
from bench.case import PeerMissingError, Settings
from bench.cases import (
    CASES,
    attention_modes,
    bit_linear,
    int8_linear,
    linear_attention,
    make_case,
    model,
    sparse_attention,
    state_steps,
    ternary_linear,
)
from bench.decoding import STEPS
from bench.measure import measure_point, relative_error
from bench.models import SHAPES, RandomModels, state_bytes
from bench.peers import PEERS, TORCHAO, Peer, from_transformers
from bitnet_triton.kernels.packing import unpack_codes

SETTINGS = Settings(rounds=3, block_s=1e-3, budget_s=0.1)


@pytest.mark.parametrize("cache", ["cold", "hot"])
def test_ternary_linear_providers_agree(cache, monkeypatch):
    monkeypatch.setattr(ternary_linear, "copies_beyond_cache", lambda held, device: 3)
    case = ternary_linear.case()
    point = {"M": 3, "cache": cache, "K": 64, "N": 32}
    rows = measure_point(case, point, case.providers, SETTINGS)
    assert [(row.provider, row.status) for row in rows] == [(n, "timed") for n in case.providers]
    assert {row.details["copies"] for row in rows} == {3 if cache == "cold" else 1}
    held = {row.provider: row.details["weight_bytes"] for row in rows}
    assert held["bitnet_triton"] == held["transformers"] == held["torch_bf16"] / 8 == 64 * 32 / 4


@pytest.mark.parametrize("passes", ["forward", "forward+backward"])
def test_bit_linear_providers_agree(passes):
    case = bit_linear.case()
    rows = measure_point(
        case, {"passes": passes, "M": 24, "K": 64, "N": 32}, case.providers, SETTINGS
    )
    assert [(row.provider, row.status) for row in rows] == [(n, "timed") for n in case.providers]


@pytest.mark.parametrize("passes", ["forward+backward", "backward", "decode"])
def test_sparse_attention_providers_agree_with_their_formulas(passes):
    case = sparse_attention.case()
    names = ["native_sparse", "selected", "dense", "sdpa", "fla"]
    point = {"passes": passes, "T": 1200, "H": 4, "Hk": 2, "D": 16}
    rows = measure_point(case, point, case.select_providers(names), SETTINGS)
    expected = dict.fromkeys(names, "timed") | {"fla": "missing"}
    assert {row.provider: row.status for row in rows} == expected, [row.reason for row in rows]
    limits = {row.provider: row.details["at_most"]["dense"] for row in rows[:4]}
    assert limits["dense"] == limits["sdpa"] == 1
    read = 1024 if passes == "decode" else (1024 * 1025 / 2 + 176 * 1024) / 1200
    assert limits["selected"] == (1200 if passes == "decode" else 1201 / 2) / read


@pytest.mark.parametrize("passes", ["forward", "decode", "backward"])
def test_choices_of_blocks_agree_with_attention_to_what_they_choose(passes):
    case = sparse_attention.case()
    names = ["indexed", "indexed_int8", "pooled", "quest"]
    point = {"passes": passes, "T": 3000, "H": 4, "Hk": 2, "D": 32}
    rows = measure_point(case, point, case.select_providers(names), SETTINGS)
    status = "missing" if passes == "backward" else "timed"
    assert {row.provider: row.status for row in rows} == dict.fromkeys(names, status), rows
    if passes == "decode":
        # bytes: an index key of two or four bytes beside two keys and two values, then 16 blocks
        bytes_of = {"indexed": 1, "indexed_int8": 1 / SETTINGS.dtype.itemsize}
        for row in rows[:2]:
            keys = 3000 * bytes_of[row.provider] / 4 + 2048
            assert row.details["at_most"]["dense"] == pytest.approx(3000 / keys)


def test_flex_attention_reads_the_union_of_the_blocks_that_a_tile_has_chosen():
    case = sparse_attention.case()
    point = {"passes": "forward", "T": 1200, "H": 4, "Hk": 2, "D": 16}
    (row,) = measure_point(case, point, case.select_providers(["flex_blocks"]), SETTINGS)
    assert row.status == "timed", row.reason
    inputs = case.inputs(**point, settings=SETTINGS)
    chosen = inputs.indices[0].transpose(0, 1).split(128, dim=1)  # of each head, a tile at a time
    counts = [len(set(one.flatten().tolist()) - {-1}) for tile in chosen for one in tile]
    assert row.details["share_read"] == pytest.approx(sum(counts) / len(counts) / 19)


@pytest.mark.skipif(torch.cuda.is_available(), reason="FlexAttention has both on a GPU")
@pytest.mark.parametrize(
    ("passes", "reason"), [("backward", "no backward"), ("decode", "for one query")]
)
def test_flex_attention_says_what_it_cannot_do_on_a_cpu(passes, reason):
    case = sparse_attention.case()
    point = {"passes": passes, "T": 1200, "H": 4, "Hk": 2, "D": 16}
    (row,) = measure_point(case, point, case.select_providers(["flex_blocks"]), SETTINGS)
    assert row.status == "missing"
    assert reason in row.reason


@pytest.mark.parametrize("passes", ["forward+backward", "decode"])
def test_linear_attention_providers_agree_with_float64(passes):
    case = linear_attention.case()
    point = {"passes": passes, "dtype": "fp32", "T": 70, "H": 2, "D": 16}
    rows = measure_point(case, point, case.providers, SETTINGS)
    expected = dict.fromkeys(case.providers, "timed")
    if passes == "decode":
        expected["softmax"] = "missing"
        assert rows[0].details["state_bytes"] == 2 * 16 * 16 * 4
    assert {row.provider: row.status for row in rows} == expected, [row.reason for row in rows]


def test_sampling_tells_its_error_beside_its_bound():
    case = make_case("sampling")
    chosen = case.select_providers(["dense", "lsh_proposal_8x75", "verified_0.1_normal"])
    rows = measure_point(case, {"T": 2500, "H": 4, "Hk": 2, "D": 32}, chosen, SETTINGS)
    assert [(row.provider, row.status) for row in rows] == [(name, "timed") for name in chosen]
    for row in rows[1:]:
        assert 0 < row.details["error"] < 1
        assert row.details["most_speedup"] == pytest.approx(1 / row.details["rows_share"])
    assert rows[1].details["table_bytes"] > 2 * 75 * 2500 * 2


def test_steps_inside_of_buckets_agree_with_keys_hashed_anew():
    case = make_case("bucket_steps")
    chosen = case.select_providers([])
    rows = measure_point(case, {"T": 700, "H": 2, "D": 32}, chosen, SETTINGS)
    assert {row.provider: row.status for row in rows} == dict.fromkeys(case.providers, "timed")


@pytest.mark.parametrize(("model_name", "dtype"), [("recall", "fp32"), ("tiny", "bf16")])
def test_steps_over_pages_agree_with_those_over_a_plain_cache(model_name, dtype):
    case = make_case("page_steps")
    chosen = case.select_providers(["plain", "pages_16_apart", "pages_32_random", "pages_64"])
    rows = measure_point(case, {"model": model_name, "dtype": dtype, "T": 300}, chosen, SETTINGS)
    assert {row.provider: row.status for row in rows} == dict.fromkeys(chosen, "timed"), rows
    if dtype == "fp32":
        assert max(row.error for row in rows) < 1e-5


@pytest.mark.parametrize("of", ["attention", "tiny"])
def test_steps_over_codes_agree_with_those_over_a_plain_cache(of):
    case = make_case("code_steps")
    rows = measure_point(case, {"of": of, "T": 256}, case.providers, SETTINGS)
    assert {row.provider: row.status for row in rows} == dict.fromkeys(case.providers, "timed"), (
        rows
    )
    errors = {row.provider: row.error for row in rows}
    assert errors["plain"] < errors["int8"] < errors["int4"]


def test_steps_over_states_agree_with_a_call_of_all_their_tokens(monkeypatch):
    case, bytes_of = make_case("state_steps"), {}
    for T in (300, 2000):
        rows = measure_point(case, {"model": "tiny", "T": T}, case.providers, SETTINGS)
        assert {row.status for row in rows} == {"timed"}, rows
        bytes_of[T] = {row.provider: row.details["cache_bytes"] for row in rows}
    # of heads of 16 values a state in float32, and three inputs of the convolution in bfloat16
    assert (
        bytes_of[2000]["linear"] == bytes_of[300]["linear"] == 4 * (2 * 16 * 16 * 4 + 3 * 128 * 2)
    )
    assert bytes_of[2000]["full"] - bytes_of[300]["full"] == 1700 * 4 * 2 * 2 * 16 * 2
    monkeypatch.setattr(state_steps, "LARGEST_CACHE", 4 * 2 * 2 * 16 * 2 * 300 - 1)
    rows = measure_point(case, {"model": "tiny", "T": 300}, case.providers, SETTINGS)
    assert [row.status for row in rows] == ["timed", "timed", "missing"]


@pytest.mark.parametrize("of", ["attention", "tiny", "recall"])
def test_steps_over_what_policies_keep_agree_with_attention_to_those_rows(of):
    case = make_case("policy_steps")
    rows = measure_point(case, {"of": of, "T": 320}, case.providers, SETTINGS)
    assert {row.provider: row.status for row in rows} == dict.fromkeys(case.providers, "timed"), (
        rows
    )
    read = {row.provider: row.read_bytes for row in rows}
    most = read["plain"] / 4 if of == "attention" else read["plain"]  # layers have weights, too
    assert max(read["snapkv"], read["h2o"]) < most


def test_engines_answer_as_requests_alone():
    case = make_case("many_requests", shape="tiny")
    point = {"requests": 5, "prompt": 70, "new": 6}
    rows = measure_point(case, point, case.providers, SETTINGS)
    states = {row.provider: row.status for row in rows}
    engines = "timed" if Version(transformers.__version__) >= Version("5.23") else "missing"
    assert states == {"bitnet_triton": engines, "transformers": engines, "alone": "timed"}


@pytest.mark.parametrize("output", ["logits", "best"])
def test_int8_linear_providers_agree(output):
    case = int8_linear.case()
    rows = measure_point(
        case, {"output": output, "M": 2, "K": 64, "N": 96}, case.providers, SETTINGS
    )
    expected = dict.fromkeys(case.providers, "timed")
    if TORCHAO.missing():
        expected["torchao"] = "missing"
    assert {row.provider: row.status for row in rows} == expected


def test_models_hold_the_same_codes():
    shape = SHAPES["tiny"]
    models = RandomModels(shape, Settings())
    name = "model.layers.1.mlp.up_proj"
    ours, packed, dense = (
        models.get(kind).get_submodule(name) for kind in ("unfused", "bitlinear", "autobitlinear")
    )
    codes = ours.ternary_weight.codes()
    assert codes.unique().tolist() == [-1, 0, 1]
    assert torch.equal(codes, unpack_codes(packed.weight))
    assert torch.equal(codes, dense.weight.to(torch.int8))
    scale = ours.ternary_weight.scale
    assert scale == dense.weight_scale.float() == 1 / packed.weight_scale.float()


def test_state_counts_tied_weights_once():
    shape = SHAPES["tiny"]
    dense = RandomModels(shape, Settings()).get("autobitlinear")
    weights = shape.layers * shape.layer_weights + shape.head_weights
    norms = shape.layers * (3 * shape.hidden + shape.ffn) + shape.hidden
    small = state_bytes(dense) - 2 * (weights + norms)
    assert 0 < small < 1000  # scales and rotary frequencies


def test_decoding_can_be_started_again():
    case = model.case(shape="tiny", prompt=8, contexts=[3])
    inputs = case.inputs(**case.grid[1], settings=Settings())
    work = case.providers["bitnet_triton"].build(inputs)
    with torch.no_grad():
        before = work.output()
        for _ in range(STEPS + 1):  # beyond the point where the cache is cut back
            work.call()
        assert torch.equal(before, work.output())


def test_decoding_gives_the_logits_of_one_long_prefill():
    case = model.case(shape="tiny", prompt=8, contexts=[6])
    inputs = case.inputs(**case.grid[1], settings=Settings())
    work = case.providers["transformers_bf16"].build(inputs)
    whole = inputs.models.random.get("autobitlinear")
    with torch.no_grad():
        expected = whole(inputs.models.ids[:, :7], use_cache=False).logits[:, -1:]
        assert relative_error(work.output(), expected) < model.TOLERANCE


def test_shorter_contexts_are_the_first_tokens_of_the_longest():
    case = model.case(shape="tiny", prompt=8, contexts=[3, 7])
    (short, long) = (case.inputs(**point, settings=Settings()) for point in case.grid[1:])
    ours = short.models.random.get("fused")
    decoders = [inputs.models.decoder(ours, inputs.context) for inputs in (short, long)]
    assert [decoder.cache.get_seq_length() for decoder in decoders] == [3, 7]
    keys = [decoder.cache.layers[1].keys for decoder in decoders]
    assert torch.equal(keys[0], keys[1][:, :, :3])
    decoders[0].cache.layers[1].keys.zero_()  # the copies have memory of their own
    assert keys[1].any()


def test_layers_are_limited_by_memory():
    full = SHAPES["2b4t"]
    assert model.layers_that_fit(full, 2**40) == 30
    assert 0 < model.layers_that_fit(full, 6 * 2**30) < 30
    assert model.layers_that_fit(full, 2**30) == 0
    fewer = model.layers_that_fit(full, 6 * 2**30, longest=32768)
    assert fewer < model.layers_that_fit(full, 6 * 2**30)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": "7b"}, "`shape`: expected one of 2b4t, tiny, got '7b'"),
        ({"contexts": [8, 0]}, "`contexts`: expected at least 1, got 0"),
        ({"layers": -1}, "`layers`: not one layer fits"),
    ],
)
def test_model_refuses_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make_case("model", **options)


def test_peers_are_found_or_skipped_by_name():
    states = {peer.name: peer.state() for peer in PEERS}
    assert states["transformers"].startswith(importlib.metadata.version("transformers"))
    assert "ternary_linear (BitLinear)" in states["transformers"]
    assert states["bitnet.cpp"].startswith("skipped: a C++ program")
    absent = Peer("x", ("torch", "no_such_module"), {"a": "b"}, install="pip install x")
    assert absent.state() == "skipped: no_such_module: not installed; pip install x"
    with pytest.raises(PeerMissingError, match="no_such_module: not installed; pip install x"):
        absent.need()
    with pytest.raises(PeerMissingError, match="has no SuperLinear"):
        from_transformers("SuperLinear")


def test_every_case_has_a_peer_and_every_peer_a_case_or_a_reason():
    compared = {case for peer in PEERS for case in peer.compared_in}
    # these stand beside our own dense attention or what they were: nobody else decodes so on a CPU;
    # training_memory and eviction are commands of their own
    alone = {"sampling", *(name for name in CASES if name.endswith("_steps"))}
    assert compared == {*CASES, "training_memory", "eviction"} - alone
    assert all(bool(peer.compared_in) != bool(peer.reason) for peer in PEERS)


def test_model_command_writes_json_and_plot(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("bench.run.measure_limits", small_limits)
    target = tmp_path / "model.json"
    arguments = ["model", "--shape", "tiny", "--quick", "--prompt", "8", "--context", "4"]
    arguments += ["--context", "9"]
    arguments += ["--threads", "1", "--device", "cpu", "--output", str(target)]
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output
    data = json.loads(target.read_text())
    status = {(row["provider"], row["status"]) for row in data["rows"]}
    # rows as short as these are no blocks of llama.cpp's
    peers = {(name, found) for name, found in status if name.startswith("llama_cpp")}
    assert peers == {("llama_cpp", "missing"), ("llama_cpp_q8_head", "missing")}
    assert {found for _, found in status - peers} == {"timed"}, outcome.output
    contexts = [row["point"]["context"] for row in data["rows"] if row["provider"] == "llama_cpp"]
    assert contexts == [0, 4, 9]
    beside = {row["read_bytes_per_s"] is None for row in data["rows"] if row["status"] == "timed"}
    assert beside == {False}
    assert data["rows"][0]["details"]["layers"] == 2
    assert target.with_suffix(".png").stat().st_size > 10_000


def test_attention_modes_are_compared_recorded_and_not():
    modes = ("full", "sliding,window=4,sinks=1", "longformer,window=4,global_tokens=0+2")
    case = attention_modes.case(shape="tiny", contexts=[9], attention=modes)
    rows = measure_point(case, case.grid[0], case.providers, SETTINGS)
    assert [row.provider for row in rows] == [
        name for mode in modes for name in (mode, f"{mode} unrecorded")
    ]
    found = [(row.status, row.reason) for row in rows]
    # global tokens may be a mode that is not recorded, and says so
    assert found[4] in [("timed", ""), ("missing", "the steps of this mode are not recorded")]
    assert found[:4] + found[5:] == [("timed", "")] * 5
    # of 13 keys a query sees 13, 5, and of a mode that is more than a mask all count
    full, sliding, longformer = (row.read_bytes for row in rows[1::2])
    assert full == longformer > sliding
    assert set(rows[2].ratios) == {"full", "full unrecorded"}
    assert attention_modes.parse(modes[2]) == {
        "mode": "longformer", "window": 4, "global_tokens": [0, 2],
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"expected MODE\[,KEY=VALUE...\], got 'full,'"):
        attention_modes.parse("full,")


def small_limits(settings):
    from bench.peaks import measure_limits

    return measure_limits(settings, buffer_bytes=2**22, size=64)


def test_command_refuses_what_it_does_not_know():
    runner = CliRunner()
    assert runner.invoke(app, ["ternary_linear", "--dtype", "int4"]).exit_code == 2
    assert runner.invoke(app, ["ternary_linear", "--only", "M"]).exit_code == 2
    outcome = runner.invoke(app, ["ternary_linear", "--only", "Q=1", "--quick"])
    assert "has the keys M, cache, K, N" in str(outcome.exception)
