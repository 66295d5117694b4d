"""
train.py as its users run it: subprocesses on a tiny corpus. Exact resume, independence of how the batch is
cut, the identities between objectives, DDP against one process, bad flags.
"""
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
TINY = ("--dataset toy --n_layer 2 --n_head 2 --n_embd 32 --block_size 32 --batch_size 4 --batch_tokens 256 "
        "--max_iters 20 --warmup_iters 2 --eval_interval 10 --eval_sequences 8 --log_interval 1 "
        "--device cpu --dtype float32 --compile off").split()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A corpus of a few hundred made-up lines, byte tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(60):
        (folder / f"{i}.txt").write_text("\n".join(
            f"line {i * j % 97} of file {i}: {i + j} is a number" for j in range(40)))
    files = [str(path) for path in sorted(folder.glob("*.txt"))]
    run_script("data.py", "--dataset", "toy", "--tokenizer", "bytes", "--val_fraction", "0.2",
               "--data_dir", folder / "data", "--files", *files)
    return folder / "data"


def run_script(script, *args, code=0, command=(sys.executable,), **options):
    """Run a script; returns (stdout, stderr); asserts the exit code and that no traceback was shown."""
    result = subprocess.run([*command, ROOT / script, *map(str, args)], capture_output=True, text=True,
                            timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)
    assert result.returncode == code, result.stdout[-3000:] + result.stderr[-3000:]
    assert code == 0 or "Traceback" not in result.stderr
    return result.stdout, result.stderr


def train(data_dir, out_dir, *args, **options):
    """A tiny run; returns (log lines, weights)."""
    run_script("train.py", *TINY, "--data_dir", data_dir, "--out_dir", out_dir, *args, **options)
    return log_of(out_dir), weights_of(out_dir)


def log_of(out_dir):
    return [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]


def weights_of(out_dir):
    return torch.load(out_dir / "ckpt.pt", weights_only=True)["model"]


def assert_same(one, two, tolerance=0.0):
    """Losses of every step and all final weights agree (bit for bit at tolerance 0)."""
    (log1, w1), (log2, w2) = one, two
    assert [line["step"] for line in log1] == [line["step"] for line in log2]
    for a, b in zip(log1, log2):
        for key in ("train_loss", "val_loss"):
            if key in a:
                assert math.isclose(a[key], b[key], rel_tol=tolerance, abs_tol=0), \
                    (a["step"], key, a[key], b[key])
    # Rounding grows: Adam turns a tiny gradient into a full-sized step (and Muon much more so)
    for name in w1:
        difference = (w1[name] - w2[name]).abs().max().item()
        assert difference <= 100 * tolerance, f"{name} differs by {difference}"


@pytest.fixture(scope="module")
def runs(data_dir, tmp_path_factory):
    """Reference runs, one per set of flags, made once: runs("--objective", "ar") -> (log, weights)."""
    made = {}
    def run(*flags):
        if flags not in made:
            made[flags] = train(data_dir, tmp_path_factory.mktemp("run") / "out", *flags)
        return made[flags]
    return run


@pytest.mark.parametrize("objective", ["ar", "dar", "mlm", "vlm"])
def test_trains(runs, objective):
    log, _ = runs("--objective", objective)
    assert [line["step"] for line in log] == list(range(1, 21))
    assert {"step", "tokens", "train_loss", "lr", "tokens_per_second"} <= set(log[0])
    assert log[-1]["tokens"] == 20 * 256
    assert log[-1]["val_loss"] < log[0]["train_loss"] - 0.5, "the loss did not fall"
    assert log[0]["train_loss"] == pytest.approx(math.log(257), abs=0.2), \
        "the first loss is that of a uniform guess"


def test_dar_with_lookahead_1_is_ar(runs):
    assert_same(runs("--objective", "ar"), runs("--objective", "dar", "--lookahead", "1"))


def test_dar_expectation_with_lookahead_1_is_ar(runs):
    assert_same(runs("--objective", "ar"),
                runs("--objective", "dar", "--lookahead", "1", "--dar_estimator", "expectation"))


def test_vlm_with_a_single_ratio_is_mlm(runs):
    assert_same(runs("--objective", "mlm", "--mask_ratio", "0.4"),
                runs("--objective", "vlm", "--mask_range", "0.4", "0.4"))


@pytest.mark.parametrize("objective", ["dar", "vlm"])
@pytest.mark.slow
def test_micro_batches_do_not_change_the_run(runs, objective):
    flags = ("--objective", objective, "--optimizer", "adamw")
    assert_same(runs(*flags), runs(*flags, "--batch_size", "2"), 2e-5)


@pytest.mark.parametrize("objective", ["dar", "vlm"])
@pytest.mark.slow
def test_two_processes_are_one(runs, data_dir, tmp_path, objective):
    port = 20000 + os.getpid() % 20000
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}")
    flags = ("--objective", objective, "--optimizer", "adamw")
    assert_same(runs(*flags), train(data_dir, tmp_path / "out", *flags, command=torchrun), 2e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.slow
def test_killed_and_resumed_is_bit_identical(runs, data_dir, tmp_path, optimizer):
    """kill -9 after the checkpoint of step 10, resume:
    the same log and the same weights as without the kill.
    """
    flags = ("--objective", "vlm", "--optimizer", optimizer, "--max_iters", "60")
    undisturbed = runs(*flags)
    out_dir = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *TINY, "--data_dir", data_dir, "--out_dir", out_dir, *flags,
         "--save_interval", "10"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.time() + 120
    while not (out_dir / "ckpt.pt").exists() and time.time() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    step = torch.load(out_dir / "ckpt.pt", weights_only=True)["step"]
    assert 10 <= step < 60, "the kill came too late to test anything"
    run_script("train.py", "--resume", "--out_dir", out_dir)
    assert_same(undisturbed, (log_of(out_dir), weights_of(out_dir)))


@pytest.mark.slow
def test_sigterm_saves_and_resume_continues(runs, data_dir, tmp_path):
    flags = ("--objective", "ar", "--max_iters", "60")
    out_dir = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *TINY, "--data_dir", data_dir, "--out_dir", out_dir, *flags],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not (out_dir / "log.jsonl").exists() and process.poll() is None:
        time.sleep(0.002)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert 1 <= torch.load(out_dir / "ckpt.pt", weights_only=True)["step"] < 60
    run_script("train.py", "--resume", "--out_dir", out_dir)
    assert_same(runs(*flags), (log_of(out_dir), weights_of(out_dir)))


def test_stops_at_a_loss_that_is_not_finite(data_dir, tmp_path):
    out_dir = tmp_path / "out"
    out, err = run_script("train.py", *TINY, "--data_dir", data_dir, "--out_dir", out_dir,
                          "--objective", "ar", "--optimizer", "adamw", "--learning_rate", "1e38",
                          "--grad_clip", "0", "--save_interval", "1", "--warmup_iters", "0", code=1)
    assert "not finite at step" in out + err
    if (out_dir / "ckpt.pt").exists():
        assert all(w.isfinite().all() for w in weights_of(out_dir).values()), "a broken checkpoint was saved"


def test_a_run_is_not_overwritten(data_dir, tmp_path):
    train(data_dir, tmp_path / "out", "--objective", "ar", "--max_iters", "2")
    before = (tmp_path / "out" / "ckpt.pt").read_bytes()
    args = [*TINY, "--data_dir", data_dir, "--out_dir", tmp_path / "out",
            "--objective", "ar", "--max_iters", "2"]
    _, err = run_script("train.py", *args, code=2)
    assert "--resume" in err and "--overwrite" in err
    assert (tmp_path / "out" / "ckpt.pt").read_bytes() == before
    run_script("train.py", *args, "--overwrite")


@pytest.mark.parametrize("flags, message", [
    ("--batch_tokens 100", "batch_tokens"),
    ("--lookahead 0", "lookahead"),
    ("--mask_range 0 1", "mask_range"),
    ("--mask_range 0.5 0.2", "mask_range"),
    ("--mask_range 0.5 1.2", "mask_range"),
    ("--mask_ratio 0", "mask_ratio"),
    ("--n_head 3", "n_head"),
    ("--max_iters 0", "max_iters"),
    ("--learning_rate -1", "learning_rate"),
    ("--dataset nowhere", "nowhere"),
    ("--device quantum", "quantum"),
    ("--block_size 131072 --batch_tokens 524288", "window"),
    ("--resume", "no checkpoint"),
])
def test_bad_flags_get_one_line_and_exit_2(data_dir, tmp_path, capsys, flags, message):
    import train as script
    with pytest.raises(SystemExit) as stopped:
        script.main([*TINY, "--data_dir", str(data_dir), "--out_dir", str(tmp_path / "out"), *flags.split()])
    assert stopped.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error:" in line and message in line
    assert not (tmp_path / "out").exists(), "something was written for a run that cannot start"


def test_resume_refuses_another_model(data_dir, tmp_path):
    train(data_dir, tmp_path / "out", "--objective", "ar", "--max_iters", "2")
    _, err = run_script("train.py", "--resume", "--out_dir", tmp_path / "out", "--n_layer", "3", code=2)
    assert "cannot change n_layer" in err


@pytest.mark.slow
def test_a_compiler_that_does_not_work_is_one_line_and_the_run_goes_on(data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/bin/false")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    out, err = run_script("train.py", *TINY, "--data_dir", data_dir, "--out_dir", tmp_path / "out",
                          "--max_iters", "2", "--compile", "on")
    said = [line for line in (out + err).splitlines() if "torch.compile does not work here" in line]
    assert len(said) == 1 and len(log_of(tmp_path / "out")) == 2
