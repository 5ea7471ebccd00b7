"""Synthetic speech corpora: a synthesizer (espeak-ng) with phone and word timings, and the demo corpus."""
