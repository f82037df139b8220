"""What the tests of several ops share."""

import pytest

from bitnet_triton import use_backend

# Of a value of up to 127 that went through a few steps in float32, each good to 1e-7 of it
_ROUNDING = 1e-3


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


@pytest.fixture
def assert_rounded():
    """A function that compares codes with the float64 values [M K] that they were rounded from."""

    def check(codes, values):
        # beside a tie the last bit of float32 decides: to the value itself either code is as near
        assert ((codes.double() - values).abs() <= 0.5 + _ROUNDING).all()

    return check
