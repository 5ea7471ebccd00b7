"""HuBERT: waveform extractors, masking, the model around any encoder, and its form folded for inference."""
