"""Errors of other libraries in one line."""

from __future__ import annotations


def one_line(error: Exception, limit: int = 300) -> str:
    """An error as one line of at most about `limit` characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:limit]}"
