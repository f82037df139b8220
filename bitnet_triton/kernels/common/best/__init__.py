"""The largest outputs of a product: found by its programs, merged by one more kernel."""

import bitnet_triton.kernels.common.best.tile_sizes  # noqa: F401  registers them
