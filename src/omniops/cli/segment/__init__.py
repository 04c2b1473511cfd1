"""``omniops segment``."""
