"""Speech corpora made on this machine: a synthesiser (espeak-ng) with phone and word timings, and the demo corpus."""
