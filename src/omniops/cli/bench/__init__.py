"""``omniops bench``, and ``omniops bench sam2``."""
