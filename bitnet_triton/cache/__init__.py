"""What is remembered between steps: layers of transformers' caches."""

from bitnet_triton.cache.growing import GrowingLayer

__all__ = ["GrowingLayer"]
