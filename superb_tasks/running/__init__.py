"""Running tasks: S3PRL's programs launched with SUPERB's settings, records, a cache of hidden states."""
