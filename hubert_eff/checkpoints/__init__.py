"""Reading models: fairseq checkpoints, exports of this package, and presets."""
