"""Sub-commands of `hubert-eff`: thin, the work is in the rooms they call."""
