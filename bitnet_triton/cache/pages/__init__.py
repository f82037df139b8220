"""Keys and values in pages: shared, counted, copied when one of several owners writes."""

from bitnet_triton.cache.pages.memory import Batch, PagedLayer, Pages, paged_layers
from bitnet_triton.cache.pages.pool import PagePool
from bitnet_triton.cache.pages.tables import Tables
from bitnet_triton.cache.pages.tree import PrefixTree

__all__ = ["Batch", "PagePool", "PagedLayer", "Pages", "PrefixTree", "Tables", "paged_layers"]
