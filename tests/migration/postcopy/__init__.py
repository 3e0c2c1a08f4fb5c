"""Memory that follows a machine."""
