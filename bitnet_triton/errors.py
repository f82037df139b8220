"""The exceptions that callers catch."""


class BackendUnavailableError(RuntimeError):
    """The backend that was asked for cannot run this call; the message says why."""


class CheckpointError(ValueError):
    """A checkpoint is damaged or does not fit the model; the message names the tensor or file."""


class OutOfPagesError(RuntimeError):
    """A pool has fewer pages left than a call needs; what it holds is as it was before."""
