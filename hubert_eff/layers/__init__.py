"""Building blocks that encoders share."""
