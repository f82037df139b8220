"""What several ops share: argument checks, pieces of kernels, and a few kernels."""

import bitnet_triton.kernels.common.best  # noqa: F401  registers its tiles
