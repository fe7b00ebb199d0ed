"""Every step of a request: recorded, kept as JSON, and shown as a page (docs/trace.md)."""

from __future__ import annotations

from dmax.trace.file import Trace as Trace
from dmax.trace.recording import record as record

__all__ = ["Trace", "record"]
