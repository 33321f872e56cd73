"""Kafka: the only door to confluent_kafka. Its errors end here, mapped in `client.py`."""
