"""The package `corpus` of `s3prl.downstream.ctc`, which S3PRL's wheel lacks; `superb_tasks.patches` puts this folder on its path."""
