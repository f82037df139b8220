"""What is remembered between steps: keys and values that a mode can still see."""

from bitnet_triton.cache.buckets import BucketsLayer, SignsLayer
from bitnet_triton.cache.compressed import CompressedLayer
from bitnet_triton.cache.evicting import EvictingLayer
from bitnet_triton.cache.expected_attention import ExpectedAttention
from bitnet_triton.cache.growing import GrowingLayer, grow_in_place
from bitnet_triton.cache.h2o import H2O
from bitnet_triton.cache.index_keys import IndexLayer
from bitnet_triton.cache.kvzip import KVzip
from bitnet_triton.cache.latest import Latest
from bitnet_triton.cache.memory import Attended, Call, Memory, begin_call
from bitnet_triton.cache.named import MEMORIES, MemoryKind, parse_memory, register_memory
from bitnet_triton.cache.pages import Batch, PagedLayer, PagePool, Pages, PrefixTree, Tables
from bitnet_triton.cache.quantised import Quantised, QuantisedLayer
from bitnet_triton.cache.sinks import SinkWindowLayer
from bitnet_triton.cache.snapkv import SnapKV
from bitnet_triton.cache.states import LastCall, StateLayer, latest
from bitnet_triton.cache.streaming import StreamingLayer
from bitnet_triton.cache.tables import TablesLayer
from bitnet_triton.cache.units import UnitsLayer

for _name, _kind in {
    "h2o": H2O,
    "snapkv": SnapKV,
    "expected_attention": ExpectedAttention,
    "kvzip": KVzip,
    "latest": Latest,
    "pages": Pages,
    "quantised": Quantised,
}.items():
    register_memory(_name, _kind)

__all__ = [
    "H2O",
    "MEMORIES",
    "Attended",
    "Batch",
    "BucketsLayer",
    "Call",
    "CompressedLayer",
    "EvictingLayer",
    "ExpectedAttention",
    "GrowingLayer",
    "IndexLayer",
    "KVzip",
    "LastCall",
    "Latest",
    "Memory",
    "MemoryKind",
    "PagePool",
    "PagedLayer",
    "Pages",
    "PrefixTree",
    "Quantised",
    "QuantisedLayer",
    "SignsLayer",
    "SinkWindowLayer",
    "SnapKV",
    "StateLayer",
    "StreamingLayer",
    "Tables",
    "TablesLayer",
    "UnitsLayer",
    "begin_call",
    "grow_in_place",
    "latest",
    "parse_memory",
    "register_memory",
]
