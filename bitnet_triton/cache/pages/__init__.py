"""Keys and values in pages: shared, counted, copied when one of several owners writes."""

from bitnet_triton.cache.pages.pool import PagePool
from bitnet_triton.cache.pages.tables import Tables
from bitnet_triton.cache.pages.tree import PrefixTree

__all__ = ["PagePool", "PrefixTree", "Tables"]
