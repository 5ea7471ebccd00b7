"""Sub-commands of `hubert-eff`. They are thin: the packages that they call do the work."""
