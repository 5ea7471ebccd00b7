"""Data sets of training: utterances and labels, transcripts, buckets of lengths, and the checks before a run."""
