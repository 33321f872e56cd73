"""Postgres: the only door to asyncpg. Its errors end here, mapped to the product's own (`errors.py` of this package)."""
