"""Recognises errors that only say that another rank has gone."""

# Parts of messages of gloo, torch's stores and NCCL. They raise plain RuntimeErrors: only the text tells them apart.
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
