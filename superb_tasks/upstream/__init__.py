"""The S3PRL upstream `hubert_eff`."""
