"""Whether somebody has put something of their own into a module."""

from fused_ops.core.hooks import hooked, plain

__all__ = ["hooked", "plain"]
