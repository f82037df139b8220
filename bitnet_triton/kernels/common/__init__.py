"""What several ops share: argument checks and pieces of kernels."""
