"""What the tests of several ops share."""

import pytest

from bitnet_triton import use_backend


@pytest.fixture
def forced_backend(request):
    """Force the backend that a test is run with, if it is run with one."""
    callspec = getattr(request.node, "callspec", None)
    backend = callspec.params.get("backend") if callspec else None
    if not backend:
        yield
        return
    with use_backend(backend):
        yield
