"""torch's context parallelism shards texts: our attention says that it sees one shard alone."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel

import bitnet_triton as bt

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="PyTorch has no gloo here"
)


@pytest.fixture
def mesh(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("attention", [None, "full", {"mode": "sliding", "window": 8}])
@pytest.mark.parametrize("training", [False, True])
def test_a_shard_is_not_taken_for_a_text(mesh, attention, training):
    options = {} if attention is None else {"attention": attention}
    model = bt.BitNetForCausalLM.from_pretrained(
        bt.RECALL_MODEL, attn_implementation="bitnet_triton", **options
    ).train(training)
    ids = torch.randint(10, 100, (1, 16))
    before = model(ids).logits
    with (
        context_parallel(mesh, buffers=[ids.clone()], buffer_seq_dims=[1]),
        pytest.raises(ValueError, match="context parallelism"),
    ):
        model(ids)
    assert torch.equal(model(ids).logits, before)  # it goes on behind the context
