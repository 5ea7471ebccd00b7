"""Tools that see inside a model: layer trends over training, where labels come from in time."""
