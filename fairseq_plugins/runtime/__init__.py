"""Changes to fairseq itself, and how a run stops and resumes."""
