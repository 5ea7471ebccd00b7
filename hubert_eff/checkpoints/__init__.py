"""Reading models: checkpoints of fairseq, exports of this package, presets."""
