"""Models that run on their packed weights."""
