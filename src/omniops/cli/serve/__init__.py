"""``omniops serve``."""
