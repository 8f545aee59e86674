"""A crawler on ekiden: polite, restartable, small enough to read in one sitting. Begin with ``tasks``."""
