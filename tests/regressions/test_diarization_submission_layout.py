"""The leaderboard's folder of diarization lacked what S3PRL's submit.py puts there."""

from __future__ import annotations

import zipfile
from pathlib import Path

from superb_tasks.results.submission import write_submission


def test_predictions_and_their_frame_shift_stand_as_s3prl_has_them(tmp_path: Path) -> None:
    experiment = tmp_path / "sd" / "lr-0.01"
    (experiment / "scoring" / "predictions").mkdir(parents=True)
    (experiment / "scoring" / "predictions" / "rec1.h5").write_bytes(b"one")
    results = {"sd": (tmp_path / "sd", {"checkpoints": ["lr-0.01/best-states-dev.ckpt"]})}
    expected = {"predict/sd_public/scoring/predictions/rec1.h5"}
    for shift in (None, "320\n"):  # older experiments have none
        if shift:
            (experiment / "frame_shift").write_text(shift)
            expected.add("predict/sd_public/frame_shift")
        assert write_submission(results, tmp_path / "out") == ["sd_public"]
        with zipfile.ZipFile(tmp_path / "out" / "predict.zip") as archive:
            assert set(archive.namelist()) == expected
