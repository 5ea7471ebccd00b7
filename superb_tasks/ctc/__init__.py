"""What S3PRL's wheel lacks of `s3prl.downstream.ctc`: its `corpus` package. `superb_tasks.patches` puts this folder on its path."""
