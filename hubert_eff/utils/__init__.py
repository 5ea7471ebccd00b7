"""What every room may use: writing files whole, locks, progress, the environment that doctor looks at."""
