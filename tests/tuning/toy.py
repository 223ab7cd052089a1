"""A search without networks, for tests of the engine; workers import it by name."""
