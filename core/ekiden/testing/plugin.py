"""The pytest plugin: apps on throw-away brokers, and workers for them."""
