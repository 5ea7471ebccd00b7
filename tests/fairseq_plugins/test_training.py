"""fairseq-hydra-train with the plug-in, as a user runs it: it trains, refuses bad input, is killed, goes on, runs on two ranks."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hubert_eff
from hubert_eff.reports.training_log import read_log
from hubert_eff.streaming.stream import StreamingModel

pytest.importorskip("fairseq", reason="fairseq is not installed: pip install 'hubert-eff[fairseq]'")
from ..helpers.paths import ROOT  # noqa: E402
from ..helpers.pretraining import CLASSES, logged, make_data, run, start, two_ranks, update_made, weights  # noqa: E402  # noqa: E402
from ..helpers.processes import Training  # noqa: E402


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lengths = [0.8 + 0.1 * (i % 5) for i in range(12)]
    return make_data(tmp_path_factory.mktemp("training") / "data", {"train": lengths, "valid": [1.0, 0.9]})


def test_it_trains_reports_and_writes_a_checkpoint_that_loads(data: Path, tmp_path: Path) -> None:
    done = run(data, tmp_path / "run", "optimization.max_update=2")
    assert done.returncode == 0, done.stderr
    record = next(line for line in done.stdout.splitlines() if "[valid]" in line)
    for key in ("valid_correct_m_0", "valid_majority_m_0", "valid_code_ppl_0", "valid_label_ppl_0", "valid_loss"):
        assert f'"{key}"' in record
    log = read_log(tmp_path / "run" / "hydra_train.log")
    assert [r["num_updates"] for r in log.train] == [1, 2] and log.best["correct_m_0"] >= 0
    assert all(r["audio_per_s"] > 0 and 0.05 < r["mem_gb"] < 50 for r in log.train[1:])
    model = hubert_eff.load(tmp_path / "run" / "checkpoint_last.pt")
    assert model.num_classes == (CLASSES + 4,) and model.config.label_rate == 100 and model.config.normalize
    assert (tmp_path / "run" / ".hydra" / "config.yaml").is_file()
    saved = (tmp_path / "run" / "checkpoint_last.pt").read_bytes()
    assert b"fairseq_plugins" in saved  # the configuration is there, without the folders of this machine
    assert str(tmp_path).encode() not in saved and str(data.parent).encode() not in saved and str(ROOT).encode() not in saved


@pytest.mark.long
def test_it_trains_in_chunks_on_log_mel_and_the_checkpoint_streams(data: Path, tmp_path: Path) -> None:
    overrides = (
        "task.normalize=false", "model.streaming=true", "model.chunk_sizes='8,16,0'", "model.left_chunks='1,-1'",
        "model.conv_feature_layers=logmel-dws", "task.pad_audio=true", "optimization.max_update=6",
    )  # fmt: skip
    done = run(data, tmp_path / "run", *overrides)
    assert done.returncode == 0, done.stderr
    model = hubert_eff.load(tmp_path / "run" / "checkpoint_last.pt")
    drawn = set()
    for update in range(6):
        model.train().set_num_updates(update)
        drawn.add(model.draw_chunks())
    assert len(drawn) > 1 and set(drawn) <= {(size, left) for size in (8, 16, None) for left in (1, -1)}
    stream, wav = StreamingModel(model, 16, 1), torch.randn(1, 20_000)
    pieces = [stream.feed(wav[:, :9_000]), stream.feed(wav[:, 9_000:]), stream.flush()]
    with torch.no_grad():
        expected = model.hidden_states(wav, chunk_size=16, left_chunks=1)[0][-1]
    torch.testing.assert_close(torch.cat([y for y in pieces if y is not None], 1), expected, rtol=0, atol=1e-4)
    refused = run(data, tmp_path / "refused", "model.streaming=true")
    assert refused.returncode == 2 and "normalize=true needs the whole utterance" in refused.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("override", "start"),
    [
        ("task.label_rate=50", "task.label_rate=50, but"),
        ("+model.encoder_layer=2", "unknown key of hubert_conformer 'encoder_layer' - did you mean 'encoder_layers'?"),
        ("model.depthwise_conv_kernel_size=4", "depthwise_conv_kernel_size=4 must be odd"),
        ("checkpoint.best_checkpoint_metric=gnorm", "unknown figure for checkpoint.best_checkpoint_metric 'gnorm'. Known: audio_per_s"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(override: str, start: str, data: Path, tmp_path: Path) -> None:
    done = run(data, tmp_path / "run", override)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("fairseq-hydra-train: ")]
    assert line.startswith(f"fairseq-hydra-train: {start}")
    assert "Traceback" not in done.stdout + done.stderr
    assert not list((tmp_path / "run").glob("*.pt"))


@pytest.mark.long
@pytest.mark.parametrize("key", ["last", "checkpoint.restore_file", "checkpoint.finetune_from_model"])
def test_a_file_that_is_no_checkpoint_is_one_line_and_exit_code_2(key: str, data: Path, tmp_path: Path) -> None:
    junk = tmp_path / "run" / "checkpoint_last.pt" if key == "last" else tmp_path / "junk.pt"
    junk.parent.mkdir(exist_ok=True)
    junk.write_bytes(bytes(1000))
    done = run(data, tmp_path / "run", *([] if key == "last" else [f"{key}={junk}"]))
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "is not a checkpoint" in line]
    assert line.startswith(f"fairseq-hydra-train: {junk} is not a checkpoint")
    assert "Traceback" not in done.stdout + done.stderr
    assert junk.read_bytes() == bytes(1000)


@pytest.mark.long
def test_a_run_that_was_killed_goes_on_as_if_nothing_had_happened(data: Path, tmp_path: Path) -> None:
    whole = run(data, tmp_path / "whole", "checkpoint.save_interval_updates=2")
    assert whole.returncode == 0, whole.stderr
    args = (data, tmp_path / "killed", "checkpoint.save_interval_updates=2")
    process = start(*args)
    process.wait_for(update_made(5))
    process.kill()
    process.end()
    assert not (tmp_path / "killed" / "checkpoint_1_8.pt").exists()
    resumed = run(*args)
    assert resumed.returncode == 0, resumed.stderr
    expected, losses = logged(whole.stdout), logged(resumed.stdout)
    assert list(expected) == list(range(1, 9))
    assert losses and 2 < min(losses) <= 6 and max(losses) == 8
    assert losses == {update: expected[update] for update in losses}
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.long
@pytest.mark.parametrize("to_all", [False, True], ids=["to the process", "to the whole group"])
def test_sigterm_saves_and_exits_with_143(to_all: bool, data: Path, tmp_path: Path) -> None:
    args = (data, tmp_path / "run", "optimization.max_update=100000", "checkpoint.save_interval_updates=0")
    process = start(*args)
    process.wait_for(update_made(4))
    process.send(signal.SIGTERM, to_group=to_all)
    done = process.end(timeout=120)
    assert done.returncode == 143, done.stderr
    (update,) = re.findall(r"SIGTERM at update (\d+): saved", done.stdout + done.stderr)
    assert int(update) == max(logged(done.stdout)) >= 4
    resumed = run(*args[:2], f"optimization.max_update={int(update) + 2}", "checkpoint.save_interval_updates=0")
    assert resumed.returncode == 0, resumed.stderr
    assert list(logged(resumed.stdout)) == [int(update) + 1, int(update) + 2]


@pytest.mark.long
def test_a_loss_that_is_not_finite_ends_the_run_with_one_line(data: Path, tmp_path: Path) -> None:
    args = (data, tmp_path / "run", "checkpoint.save_interval_updates=2", "optimization.clip_norm=0", "lr_scheduler.warmup_updates=0")
    healthy = run(*args, "optimization.max_update=2")
    assert healthy.returncode == 0, healthy.stderr
    broken = run(*args, "optimization.max_update=50", "criterion.loss_weights=[1e38]", "task.resume_changed=true")
    assert broken.returncode == 1, broken.stdout
    (line,) = [line for line in broken.stderr.splitlines() if line.startswith("fairseq-hydra-train:")]
    assert re.search(r"stopped at update \d+: the (loss|gradient norm) is (nan|inf) \(utterances \d", line)
    assert "Traceback" not in broken.stderr + broken.stdout
    assert not (tmp_path / "run" / "crash.pt").exists()
    assert all(torch.isfinite(w).all() for w in weights(tmp_path / "run").values())


@pytest.mark.long
@pytest.mark.parametrize("backend", ["legacy_ddp", "pytorch_ddp"])
def test_two_ranks_on_the_cpu_train_save_on_sigterm_and_resume(backend: str, data: Path, tmp_path: Path) -> None:
    def ranks(updates: int) -> list[Training]:
        return two_ranks(data, tmp_path / "run", f"optimization.max_update={updates}", f"distributed_training.ddp_backend={backend}")

    both = ranks(100_000)
    both[0].wait_for(update_made(3))
    both[1].send(signal.SIGTERM)  # one rank alone: the ranks agree on when to stop
    done = [process.end(timeout=120) for process in both]
    assert [one.returncode for one in done] == [143, 143], done
    (update,) = re.findall(r"SIGTERM at update (\d+): saved", "".join(one.stdout + one.stderr for one in done))
    done = [process.end() for process in ranks(int(update) + 2)]
    assert [one.returncode for one in done] == [0, 0], done
    assert list(logged(done[0].stdout)) == [int(update) + 1, int(update) + 2]


@pytest.mark.long
def test_two_ranks_with_layerdrop_and_batches_of_other_shapes_do_not_wait_for_each_other_for_ever(tmp_path: Path) -> None:
    # one utterance per batch, longest first: in every update the ranks have audio of another length
    data = make_data(tmp_path / "data", {"train": [0.8 + 0.1 * i for i in range(12)], "valid": [1.0, 0.9]})
    both = two_ranks(
        data, tmp_path / "run", "dataset.batch_size=1", "dataset.required_batch_size_multiple=1", "optimization.max_update=4",
        "model.encoder_layerdrop=0.5",
    )  # fmt: skip
    try:
        done = [process.end() for process in both]
    finally:
        for process in both:
            process.kill()
    assert [one.returncode for one in done] == [0, 0], done
    assert list(logged(done[0].stdout)) == [1, 2, 3, 4]


@pytest.mark.long
def test_objects_are_gathered_across_ranks_without_a_gpu(tmp_path: Path) -> None:
    program = f"""
import sys, torch.distributed as dist
sys.path.insert(0, {str(ROOT)!r})
import fairseq_plugins
from fairseq.distributed import utils
dist.init_process_group("gloo", init_method="file://{tmp_path}/meet", world_size=2, rank=int(sys.argv[1]))
for size in (1000, 50_000):
    assert utils.all_gather_list({{"rank": dist.get_rank(), "text": "x" * (size // 2)}}, max_size=size)[1]["rank"] == 1
"""
    both = [subprocess.Popen([sys.executable, "-c", program, str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
