"""``omniops detect`` and ``omniops detect-eval``."""
