"""Tools that look inside a model: layer trends over training, and where in time labels come from."""
