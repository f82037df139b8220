"""The largest outputs of a product: found by its programs, merged by one more kernel."""
