"""Tools for all packages: atomic writes, locks, progress, configurations, signals."""
