"""Unit tests need no broker, no database and no stop-watch."""

from hypothesis import settings

settings.register_profile("unit", deadline=None, database=None)
settings.load_profile("unit")
