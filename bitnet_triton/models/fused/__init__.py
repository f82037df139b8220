"""The fused decoder: its layers, the steps it records, and whether somebody has changed it."""
