"""For tests: the conformance kit of transports and backends, and fixtures for the tests of applications."""
