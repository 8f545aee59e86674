"""Real servers for tests: those that run already, and those that a test starts and ends itself."""
