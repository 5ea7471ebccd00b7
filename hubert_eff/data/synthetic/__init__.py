"""Speech corpora made on this machine: a synthesizer (espeak-ng) with phone and word timings, and the demo corpus."""
