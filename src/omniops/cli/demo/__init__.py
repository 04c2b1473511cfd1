"""``omniops demo``."""
