"""``omniops export``."""
