"""``omniops selftest``."""
