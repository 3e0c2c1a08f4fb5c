"""Device state as named, typed values."""
