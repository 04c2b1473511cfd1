"""What goes wrong with a process. Imports nothing, so that whoever names the error does not import PyTorch with it."""

from __future__ import annotations


class RemoteError(RuntimeError):
    """The process of a remote object died or did not answer, or what the caller holds of it is gone with the process.

    Also raised instead of an exception of the remote object whose class cannot be imported or made again here;
    the message names that class.
    """
