"""
A run stays true: its flags, its data, its folder, its log and its end. Subprocesses on a tiny corpus, as users do it.

    python -m pytest tests/test_runs.py
"""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from test_train import ROOT, TINY, assert_same, data_dir, log_of, run_script, train, weights_of  # noqa: F401

import data
import flags
import objectives
import train as script
from common import load_checkpoint, read_config


@pytest.fixture()
def run(data_dir, tmp_path):
    """run("--max_iters", "4") -> (stdout, stderr) of a run in tmp_path/out, in this process."""
    def call(*args, out="out", **options):
        return run_script("train.py", *TINY, "--data_dir", data_dir, "--out_dir", tmp_path / out, *args, **options)
    return call


def resume(folder, *args, **options):
    return run_script("train.py", "--resume", "--out_dir", folder, *args, **options)

# -----------------------------------------------------------------------------
# Flags

def test_a_resume_writes_its_flags_back_and_counts_its_tokens(run, tmp_path):
    run("--objective", "ar", "--max_iters", "4")
    resume(tmp_path / "out", "--max_iters", "8", "--batch_tokens", "512", "--learning_rate", "0.5",
           "--weight_decay", "0.3")
    saved = read_config(tmp_path / "out")["train"]
    assert (saved["max_iters"], saved["batch_tokens"], saved["learning_rate"]) == (8, 512, 0.5)
    log = log_of(tmp_path / "out")
    assert [line["tokens"] for line in log] == [256 * n for n in range(1, 5)] + [1024 + 512 * n for n in range(1, 5)]
    assert log[4]["lr"] > 0.1, "the learning rate on the command line took no effect"
    state = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["optimizer"][0]
    assert {group["weight_decay"] for group in state["param_groups"]} == {0.3}
    out, _ = resume(tmp_path / "out")                       # the printed advice, typed in
    assert "step 8 of 8 already" in out and len(out.splitlines()) == 1


@pytest.mark.parametrize("change", [
    "--mask_ratio 0.3", "--mask_range 0.2 1.0", "--lookahead 3", "--dar_estimator expectation", "--corruption bert",
    "--normalization bound", "--objective mlm", "--block_size 16", "--seed 1", "--n_layer 3"])
def test_what_defines_the_run_cannot_change(run, tmp_path, change, capsys):
    folder = tmp_path / "out"
    if not folder.exists():
        run("--objective", "vlm", "--max_iters", "1")
    with pytest.raises(SystemExit) as stopped:
        flags.parse_args(["--resume", "--out_dir", str(folder), *change.split()])
    assert stopped.value.code == 2
    assert f"cannot change {change.split()[0][2:]}" in capsys.readouterr().err


def test_every_option_of_an_objective_is_fixed_and_every_flag_is_saved(run, tmp_path):
    run("--objective", "ar", "--max_iters", "1")
    saved = read_config(tmp_path / "out")["train"]
    known = {action.dest for action in flags.build_parser()._actions} - {"help", "resume", "overwrite", "out_dir"}
    assert set(saved) == known
    assert {"mask_ratio", "mask_range", "lookahead", "dar_estimator", "corruption", "normalization"} <= set(flags.FIXED)


def test_a_device_picked_automatically_is_picked_again(data_dir, tmp_path):
    args = flags.parse_args(["--data_dir", str(data_dir), "--out_dir", str(tmp_path / "out"), "--dataset", "toy"])
    assert args.device != "auto" and script.flags_in_force(args)["device"] == "auto"

# -----------------------------------------------------------------------------
# Data

def test_a_dataset_prepared_again_is_refused(run, data_dir, tmp_path):
    other = tmp_path / "data"
    shutil.copytree(data_dir, other)
    run_script("train.py", *TINY, "--data_dir", other, "--out_dir", tmp_path / "out", "--max_iters", "1")
    files = sorted(str(path) for path in data_dir.parent.glob("*.txt"))[:40]
    run_script("data.py", "--dataset", "toy", "--tokenizer", "bytes", "--val_fraction", "0.2", "--overwrite",
               "--data_dir", other, "--files", *files)
    before = (tmp_path / "out" / "ckpt.pt").read_bytes()
    _, err = resume(tmp_path / "out", "--max_iters", "2", code=2)
    assert "is not the dataset" in err and len(err.strip().splitlines()) == 1
    assert (tmp_path / "out" / "ckpt.pt").read_bytes() == before


def test_a_resume_never_prepares_a_dataset(run, data_dir, tmp_path):
    run("--max_iters", "1")
    _, err = resume(tmp_path / "out", "--max_iters", "2", "--data_dir", tmp_path / "nowhere", code=2)
    assert "does not exist" in err and not (tmp_path / "nowhere").exists()


def test_changed_code_is_named(run, tmp_path):
    run("--max_iters", "1")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["sources"]["objectives.py"] = "0" * 64
    path.write_text(json.dumps(config))
    out, _ = resume(tmp_path / "out", "--max_iters", "2")
    assert "objectives.py changed" in out
    assert read_config(tmp_path / "out")["sources"] == script.source_digests()

# -----------------------------------------------------------------------------
# The folder

def test_a_moved_run_reads_and_writes_where_it_is(run, tmp_path):
    run("--max_iters", "2")
    shutil.copytree(tmp_path / "out", tmp_path / "moved")
    before = (tmp_path / "out" / "ckpt.pt").read_bytes()
    run_script("train.py", "--resume", "--out_dir", "moved", "--max_iters", "3", cwd=tmp_path)
    assert torch.load(tmp_path / "moved" / "ckpt.pt", weights_only=True)["step"] == 3
    assert (tmp_path / "out" / "ckpt.pt").read_bytes() == before


def test_overwrite_removes_old_results(run, tmp_path):
    run("--max_iters", "1")
    for name in ("eval_glue.json", "eval_ppl_val_left-to-right.json", "notes.txt"):
        (tmp_path / "out" / name).write_text("{}")
    run("--max_iters", "1", "--overwrite")
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"ckpt.pt", "config.json", "log.jsonl", "tokenizer.json", "unigram.npy", "notes.txt", ".lock"}


def test_a_second_process_in_the_folder_is_refused(data_dir, tmp_path):
    command = [sys.executable, ROOT / "train.py", *TINY, "--data_dir", data_dir, "--out_dir", tmp_path / "out",
               "--max_iters", "100000"]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(tmp_path / "out" / "log.jsonl", first)
        _, err = run_script("train.py", *command[2:], code=2)
        assert "another process" in err and len(err.strip().splitlines()) == 1
    finally:
        first.kill()                                        # kill -9 leaves no lock
        first.wait()
    run_script("train.py", *TINY, "--data_dir", data_dir, "--out_dir", tmp_path / "out", "--max_iters", "1")


def test_a_damaged_log_does_not_block_a_resume(run, tmp_path):
    run("--max_iters", "3")
    path = tmp_path / "out" / "log.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\xff\x00 nonsense\n" + b'{"no step": 1}\n' + lines[1] + lines[2][:10])
    out, _ = resume(tmp_path / "out", "--max_iters", "4")
    assert "3 damaged lines are dropped" in out
    assert [line["step"] for line in log_of(tmp_path / "out")] == [1, 2, 4]


def test_a_full_disk_is_one_line_and_keeps_the_checkpoint(run, tmp_path, monkeypatch, capsys):
    run("--max_iters", "2")
    before = (tmp_path / "out" / "ckpt.pt").read_bytes()

    def full(state, file):
        file.write(b"x" * 1000)
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit) as stopped:
        script.main(["--resume", "--out_dir", str(tmp_path / "out"), "--max_iters", "3"])
    assert stopped.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and "disk full" in last
    assert (tmp_path / "out" / "ckpt.pt").read_bytes() == before
    assert not list((tmp_path / "out").glob("*.tmp"))

# -----------------------------------------------------------------------------
# Signals and screens

def wait_for(path, process, seconds=60):
    deadline = time.time() + seconds
    while not path.exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    assert path.exists(), "the run did not begin"


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_saves_at_once_whatever_the_log_interval(data_dir, tmp_path, number):
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *TINY, "--data_dir", data_dir, "--out_dir", tmp_path / "out",
         "--max_iters", "1000000", "--log_interval", "100000", "--eval_interval", "100000", "--save_interval", "5"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    wait_for(tmp_path / "out" / "ckpt.pt", process)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "saved; resume with: python train.py --resume --out_dir" in out
    assert torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["step"] >= 5


@pytest.mark.slow
def test_all_processes_stop_at_one_step_whatever_the_log_interval(data_dir, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port()}",
         ROOT / "train.py", *TINY, "--data_dir", data_dir, "--out_dir", tmp_path / "out", "--max_iters", "1000000",
         "--log_interval", "100000", "--eval_interval", "100000", "--save_interval", "20"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    wait_for(tmp_path / "out" / "ckpt.pt", process)
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert "stopped at step" in out, out[-2000:] + err[-2000:]


def port():
    return 20000 + os.getpid() % 20000


def test_a_closed_pipe_does_not_lose_the_run(data_dir, tmp_path):
    """python train.py 2>&1 | head -n 1: the run goes on to its end."""
    command = [sys.executable, ROOT / "train.py", *TINY, "--data_dir", data_dir, "--out_dir", tmp_path / "out"]
    quoted = " ".join(f"'{word}'" for word in command)
    done = subprocess.run(["bash", "-o", "pipefail", "-c", f"{quoted} 2>&1 | head -n 1"], capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0, done
    assert torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["step"] == 20


def test_a_screen_with_few_characters_does_not_end_the_run(data_dir, tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"\u65e5\u672c\u8a9e and \u00e9t\u00e9 \u2713 in line {i} of it\n" * 20)
    run_script("data.py", "--dataset", "toy", "--tokenizer", "bytes", "--val_fraction", "0.2", "--data_dir",
               tmp_path / "data", "--files", *sorted(folder.glob("*.txt")))
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", *TINY, "--data_dir", tmp_path / "data", "--out_dir", tmp_path / "out",
         "--max_iters", "2"],
        capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]


def test_handlers_are_restored_and_a_thread_may_train(data_dir, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    args = [*TINY, "--data_dir", str(data_dir), "--max_iters", "2"]
    script.main([*args, "--out_dir", str(tmp_path / "a")])
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    thread = threading.Thread(target=script.main, args=([*args, "--out_dir", str(tmp_path / "b")],))
    thread.start()
    thread.join(60)
    assert_same((log_of(tmp_path / "a"), weights_of(tmp_path / "a")),
                (log_of(tmp_path / "b"), weights_of(tmp_path / "b")))

# -----------------------------------------------------------------------------
# What the numbers are: mistakes in training that must not pass

def test_the_learning_rate_warms_up_and_decays(run, tmp_path):
    """Against the definition, written out: 2 updates of warmup, the last 70 % linear down to 5 %."""
    run("--objective", "ar", "--optimizer", "adamw", "--learning_rate", "0.01")
    for line in log_of(tmp_path / "out"):
        done = line["step"] - 1
        expected = 0.01 * min(1, (done + 1) / 3, 0.05 + 0.95 * (20 - done) / 14)
        assert line["lr"] == pytest.approx(expected), f"learning rate of update {line['step']}"


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
    bits = float(last.split("(")[1].split()[0])
    assert bits == pytest.approx(val_loss / math.log(2) * split["tokens"] / split["bytes"], abs=2e-3)

    # Word frequencies of the training split, counted here
    train_ids = np.concatenate(shards["train"])
    p = (np.bincount(train_ids, minlength=meta["vocab_size"]) + 1) / (len(train_ids) + meta["vocab_size"])
    targets = [script.get_batch(shards["val"], options, script.VAL_SEED, 0, [i]).targets for i in range(8)]
    baseline = float(last.split("alone give")[1].split(";")[0])
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
    assert f"{2 * 256 / tokens:.2g} passes" in out and "warning" not in out


def test_presets_do_not_go_over_their_corpus_more_than_four_times():
    """The default corpus has at least 3.2 M tokens on every Python from 3.10 on."""
    for name in ("tiny", "small"):
        preset = flags.PRESETS[name]
        assert preset["max_iters"] * preset["batch_tokens"] <= 4.1 * 3.2e6


def test_many_passes_are_warned_of(capsys):
    args = flags.build_parser().parse_args(["--max_iters", "100", "--batch_tokens", "1000"])
    script.say_passes(args, 20_000)
    assert "5 passes" in capsys.readouterr().out.splitlines()[0]
    script.say_passes(args, 30_000)
    assert "warning" not in capsys.readouterr().out


@pytest.mark.slow
def test_gradient_accumulation_under_ddp_is_one_process(data_dir, tmp_path):
    """Two processes with four micro-batches each, Muon off: the losses and gradient norms of one process."""
    flags_ = ("--objective", "vlm", "--optimizer", "adamw", "--batch_size", "1")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port() + 1}")
    one = train(data_dir, tmp_path / "one", *flags_)
    two = train(data_dir, tmp_path / "two", *flags_, command=torchrun)
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
