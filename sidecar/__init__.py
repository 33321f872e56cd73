"""Kafka events with personal data, encrypted into Postgres; decrypted views for those who were granted them; unreadable on command."""

__version__ = "0.1.0"
