"""HuBERT: extractors, masking, the model around any encoder, and its folded form for inference."""
