"""Recognises errors that only say that another rank has gone."""

# Of gloo, the store and NCCL.
_MARKS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "Timed out waiting",
    "Operation timed out!",
    "Application timeout",
    "DistNetworkError",
    "DistStoreError",
    "DistBackendError",
)


def is_collateral(text: str) -> bool:
    """Whether an error with this text or traceback is the consequence of another rank's end, and not a cause."""
    return any(mark in text for mark in _MARKS)
