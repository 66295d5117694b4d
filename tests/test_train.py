"""
What train.py computes, on a tiny corpus: learning rate, clipping, weight decay, the numbers it prints, exact
resume, independence of how the batch is cut, the identities between objectives, DDP against one process.

    python -m pytest -m "not slow" tests/test_train.py
"""
import contextlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import flags
import objectives
import train as script
from common import load_checkpoint
from run import say_passes

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


def call(*args, code=0):
    """train.py in this process, which saves the seconds of its imports; returns (stdout, stderr)."""
    out, err, ended = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            script.main([str(arg) for arg in args])
        except SystemExit as stopped:
            ended = stopped.code
    assert ended == code, out.getvalue()[-3000:] + err.getvalue()[-3000:]
    return out.getvalue(), err.getvalue()


def train(data_dir, out_dir, *args, **options):
    """A tiny run; returns (log lines, weights). options: see run_script, for a process of its own."""
    words = [*TINY, "--data_dir", data_dir, "--out_dir", out_dir, *args]
    if options:
        run_script("train.py", *words, **options)
    else:
        call(*words)
    return log_of(out_dir), weights_of(out_dir)


def torchrun(n, offset=0):
    """The command that starts n processes, for run_script."""
    port = 20000 + (os.getpid() + offset) % 20000
    return (sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}", f"--master_port={port}")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As the subprocesses have it: sums in the same order, and no fight for the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture()
def run(data_dir, tmp_path):
    """run("--max_iters", "4") -> (stdout, stderr) of a tiny run in tmp_path/out."""
    def run_in(*args, out="out", code=0):
        return call(*TINY, "--data_dir", data_dir, "--out_dir", tmp_path / out, *args, code=code)
    return run_in


def resume(folder, *args, code=0):
    return call("--resume", "--out_dir", folder, *args, code=code)


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
    flags = ("--objective", objective, "--optimizer", "adamw", "--eval_sequences", "11")     # 3 batches for 2
    two = train(data_dir, tmp_path / "out", *flags, command=torchrun(2))
    assert_same(runs(*flags), two, 2e-5)
    for a, b in zip(runs(*flags)[0], two[0]):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3), "the loss is divided twice"


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
    out, err = call(*TINY, "--data_dir", data_dir, "--out_dir", out_dir,
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
    _, err = call(*args, code=2)
    assert "--resume" in err and "--overwrite" in err
    assert (tmp_path / "out" / "ckpt.pt").read_bytes() == before
    call(*args, "--overwrite")


@pytest.mark.parametrize("flags, message", [
    ("--batch_tokens 100", "batch_tokens"),
    ("--lookahead 0", "lookahead"),
    ("--mask_range 0 1", "mask_range"),
    ("--mask_range 0.5 0.2", "mask_range"),
    ("--mask_range 0.5 1.2", "mask_range"),
    ("--mask_ratio 0", "mask_ratio"),
    ("--objective vlm --mask_ratio 0.3", "--mask_ratio has no effect on vlm"),
    ("--objective ar --lookahead 4", "--lookahead has no effect on ar"),
    ("--n_head 3", "n_head"),
    ("--max_iters 0", "max_iters"),
    ("--learning_rate -1", "learning_rate"),
    ("--dataset nowhere", "nowhere"),
    ("--device quantum", "quantum"),
    ("--block_size 131072 --batch_tokens 524288", "window"),
    ("--resume", "no checkpoint"),
])
def test_bad_flags_get_one_line_and_exit_2(run, tmp_path, flags, message):
    _, err = run(*flags.split(), code=2)
    line = err.strip().splitlines()[-1]
    assert "error:" in line and message in line
    assert not (tmp_path / "out").exists(), "something was written for a run that cannot start"


@pytest.mark.slow
def test_a_compiler_that_does_not_work_is_one_line_and_the_run_goes_on(data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/bin/false")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    out, err = run_script("train.py", *TINY, "--data_dir", data_dir, "--out_dir", tmp_path / "out",
                          "--max_iters", "2", "--compile", "on")
    said = [line for line in (out + err).splitlines() if "torch.compile does not work here" in line]
    assert len(said) == 1 and len(log_of(tmp_path / "out")) == 2

# -----------------------------------------------------------------------------
# What the numbers are: mistakes in training that must not pass

def test_the_learning_rate_warms_up_and_decays(run, tmp_path):
    """Against the definition, written out: 2 updates of warmup, the last 70 % linear down to 5 %."""
    run("--objective", "ar", "--optimizer", "adamw", "--learning_rate", "0.01")
    for line in log_of(tmp_path / "out"):
        done = line["step"] - 1
        expected = 0.01 * min(1, (done + 1) / 3, 0.05 + 0.95 * (20 - done) / 14)
        assert line["lr"] == pytest.approx(expected), f"learning rate of update {line['step']}"


def test_a_line_of_the_log_is_of_all_steps_since_the_last_one():
    """Mean loss and speed of all of them, the gradient norm of the last. Two steps of 100 tokens in 4 seconds."""
    args = types.SimpleNamespace(batch_tokens=100, device="cpu")
    line = script.measured(torch.tensor([[1.0, 5.0], [3.0, 7.0]]), 4.0, 1e6, args)
    assert line == {"train_loss": 2.0, "grad_norm": 7.0, "tokens_per_second": 50.0}


def test_the_gradient_is_clipped(run, tmp_path):
    """AdamW's epsilon of 1e-8 swallows a gradient that is clipped to 1e-9: the weights hardly move."""
    run("--objective", "ar", "--optimizer", "adamw", "--max_iters", "3", out="a")
    run("--objective", "ar", "--optimizer", "adamw", "--max_iters", "3", "--grad_clip", "1e-9", out="b")
    one, two = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    moved = sum((one[name] - two[name]).abs().sum().item() for name in one)
    assert moved > 1, "a gradient clipped to 1e-9 changes nothing: it is not clipped"


def test_weight_decay_shrinks_the_weights(run, tmp_path):
    norms = []
    for decay in ("0", "5"):
        run("--objective", "ar", "--optimizer", "adamw", "--learning_rate", "0.01", "--weight_decay", decay, out=decay)
        norms.append(sum(w.square().sum().item() for w in weights_of(tmp_path / decay).values()))
    assert norms[1] < 0.8 * norms[0]


def test_validation_is_on_the_validation_split_and_the_last_line_is_right(run, data_dir, tmp_path):
    """Against the loss of the saved model, computed here from the shards of the validation split."""
    out, _ = run("--objective", "ar")
    model, _ = load_checkpoint(tmp_path / "out")
    meta, shards = data.load("toy", str(data_dir))
    options = objectives.Options("ar", block_size=32, vocab_size=meta["vocab_size"])
    losses = []
    for index in range(8):                                  # --eval_sequences 8, one by one
        batch = script.get_batch(shards["val"], options, script.VAL_SEED, 0, [index])
        hidden = model.features(torch.from_numpy(batch.inputs.copy()))
        log_p = model.logits(hidden)[0].double().log_softmax(dim=-1)
        losses.append(-log_p[range(32), batch.targets[:, 0]].mean().item())
    said = out.splitlines()
    last = next(line for line in said if line.startswith("validation loss"))
    val_loss = float(last.split()[2])
    assert val_loss == pytest.approx(np.mean(losses), abs=2e-4), "not the loss on the validation split"

    # Bits per byte, by the logarithm to base 2; every byte is a token here, and end-of-text one more
    split = meta["splits"]["val"]
    bits = float(last.split("next token, ")[1].split()[0])
    assert bits == pytest.approx(val_loss / math.log(2) * split["tokens"] / split["bytes"], abs=2e-3)

    # Word frequencies of the training split, counted here
    train_ids = np.concatenate(shards["train"])
    p = (np.bincount(train_ids, minlength=meta["vocab_size"]) + 1) / (len(train_ids) + meta["vocab_size"])
    targets = [script.get_batch(shards["val"], options, script.VAL_SEED, 0, [i]).targets for i in range(8)]
    baseline = float(last.split("alone: ")[1].split(")")[0])
    assert baseline == pytest.approx(-np.log(p[np.concatenate(targets)]).mean(), abs=2e-4)


@pytest.mark.parametrize("objective", ["dar", "mlm", "vlm"])
def test_bits_per_byte_only_where_they_are_the_length_of_a_code(run, objective):
    out, _ = run("--objective", objective, "--max_iters", "2")
    assert "bits per byte" not in out and "word frequencies alone" in out
    assert "has not learned to use context yet" in out


def test_the_validation_loss_does_not_depend_on_the_batch_size(run, tmp_path):
    losses = []
    for size in ("8", "2"):
        run("--objective", "vlm", "--max_iters", "1", "--batch_size", size, "--eval_sequences", "7", out=size)
        losses.append(log_of(tmp_path / size)[-1]["val_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_micro_batches_of_unequal_weight_are_not_averaged(run, tmp_path):
    """vlm's micro-batches hold different numbers of masked tokens: an average of averages differs."""
    for size in ("8", "1"):
        run("--objective", "vlm", "--optimizer", "adamw", "--max_iters", "3", "--batch_size", size, out=size)
    one, two = [log_of(tmp_path / size) for size in ("8", "1")]
    for a, b in zip(one, two):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_a_resumed_run_is_the_undisturbed_one(run, tmp_path):
    """A resume without the optimizers' state, or one that repeats a batch, ends elsewhere."""
    run("--objective", "vlm", "--decay_fraction", "0", out="whole", *("--max_iters", "6"))
    run("--objective", "vlm", "--decay_fraction", "0", out="parts", *("--max_iters", "3"))
    resume(tmp_path / "parts", "--max_iters", "6")
    whole, parts = [(log_of(tmp_path / name), weights_of(tmp_path / name)) for name in ("whole", "parts")]
    for name in whole[1]:
        assert torch.equal(whole[1][name], parts[1][name]), name


def test_the_first_lines_say_how_many_passes(run, data_dir):
    tokens = data.load("toy", str(data_dir))[0]["splits"]["train"]["tokens"]
    out, _ = run("--objective", "ar", "--max_iters", "2")
    assert f"{2 * 256 / tokens:.2g} passes over {tokens:,} training tokens" in out.splitlines()[0]
    assert "warning" not in out


def test_presets_do_not_go_over_their_corpus_more_than_four_times():
    """The default corpus has at least 3.2 M tokens on every Python from 3.10 on."""
    for name in ("tiny", "small"):
        preset = flags.PRESETS[name]
        assert preset["max_iters"] * preset["batch_tokens"] <= 4.1 * 3.2e6


def test_many_passes_are_warned_of(capsys):
    args = flags.build_parser().parse_args(["--max_iters", "100", "--batch_tokens", "1000"])
    begun = {"step": 0, "tokens": 0}
    say_passes(args, begun, 20_000)
    out = capsys.readouterr().out
    assert "5 passes" in out.splitlines()[0] and "warning" in out
    say_passes(args, begun, 30_000)
    assert "warning" not in capsys.readouterr().out


@pytest.mark.slow
def test_gradient_accumulation_under_ddp_is_one_process(data_dir, tmp_path):
    """Two processes with four micro-batches each, Muon off: the losses and gradient norms of one process."""
    flags_ = ("--objective", "vlm", "--optimizer", "adamw", "--batch_size", "1")
    one = train(data_dir, tmp_path / "one", *flags_)
    two = train(data_dir, tmp_path / "two", *flags_, command=torchrun(2, 1))
    assert_same(one, two, 2e-5)
    for a, b in zip(one[0], two[0]):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3), "the loss is divided twice"


@pytest.mark.slow
@pytest.mark.parametrize("how", [("--compile", "on"), ("--dtype", "bfloat16"), ("--optimizer", "muon")])
def test_compiled_bfloat16_and_muon_learn_as_the_plain_run_does(data_dir, tmp_path, how):
    plain = train(data_dir, tmp_path / "plain", "--objective", "ar", "--optimizer", "adamw")
    other = train(data_dir, tmp_path / "other", "--objective", "ar", "--optimizer", "adamw", *how)
    assert other[0][0]["train_loss"] == pytest.approx(plain[0][0]["train_loss"], rel=1e-2)
    tolerance = 0.6 if "muon" in how else 0.05
    assert other[0][-1]["val_loss"] == pytest.approx(plain[0][-1]["val_loss"], abs=tolerance)
