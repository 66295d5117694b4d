"""
A run stays true: its flags, its data, its folder, its log and its end. Subprocesses on a tiny corpus, as users do it.

    python -m pytest tests/test_runs.py
"""
import ast
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import (ROOT, TINY, assert_same, call, data_dir, log_of, one_thread, resume, run,  # noqa: F401
                        run_script, torchrun, train, weights_of)

import flags
import run as runs
import train as script
from common import DataError, hold, load_checkpoint, read_config, source_digests
from objectives import OBJECTIVES, Objective
from run import flags_in_force


@pytest.fixture(autouse=True, scope="module")
def signals_arrive():
    """A test run in the background of a shell ignores Ctrl-C, and under nohup SIGHUP. Its processes would too."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)

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


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """The folder of a run of one update."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    train(data_dir, folder, "--objective", "vlm", "--max_iters", "1")
    return folder


@pytest.mark.parametrize("change", [
    "--mask_ratio 0.3", "--mask_range 0.2 1.0", "--lookahead 3", "--dar_estimator expectation",
    "--corruption bert", "--normalization bound", "--objective mlm", "--block_size 16", "--seed 1",
    "--n_layer 3", "--optimizer adamw", "--preset small"])
def test_what_defines_the_run_cannot_change(finished, change):
    _, err = resume(finished, "--max_iters", "2", *change.split(), code=2)
    assert f"cannot change {change.split()[0][2:]}: {finished} was trained with" in err
    assert torch.load(finished / "ckpt.pt", weights_only=True)["step"] == 1


def test_every_option_of_an_objective_is_fixed_and_every_flag_is_saved(finished):
    saved = read_config(finished)["train"]
    known = {action.dest for action in flags.build_parser()._actions} - {"help", "resume", "overwrite", "out_dir"}
    assert set(saved) == known
    assert {"mask_ratio", "mask_range", "lookahead", "dar_estimator", "corruption", "normalization", "train_tokens"} <= set(flags.FIXED)


def test_a_device_picked_automatically_is_picked_again(data_dir, tmp_path):
    args = flags.parse_args(["--data_dir", str(data_dir), "--out_dir", str(tmp_path / "out"), "--dataset", "toy"])
    assert args.device != "auto" and flags_in_force(args)["device"] == "auto"

# -----------------------------------------------------------------------------
# Data

@pytest.mark.slow
def test_a_dataset_prepared_again_is_refused(run, data_dir, tmp_path):
    other = tmp_path / "data"
    shutil.copytree(data_dir, other)
    call(*TINY, "--data_dir", other, "--out_dir", tmp_path / "out", "--max_iters", "1")
    files = sorted(str(path) for path in data_dir.parent.glob("*.txt"))[:40]
    run_script("data.py", "--dataset", "toy", "--tokenizer", "bytes", "--val_fraction", "0.2", "--overwrite",
               "--data_dir", other, "--files", *files)
    before = (tmp_path / "out" / "ckpt.pt").read_bytes()
    _, err = resume(tmp_path / "out", "--max_iters", "2", code=2)
    assert "is not the dataset" in err and len(err.strip().splitlines()) == 1
    assert (tmp_path / "out" / "ckpt.pt").read_bytes() == before


def test_a_resume_never_prepares_a_dataset(finished, tmp_path):
    _, err = resume(finished, "--max_iters", "2", "--data_dir", tmp_path / "nowhere", code=2)
    assert "does not exist" in err and not (tmp_path / "nowhere").exists()


def test_changed_code_is_named(run, tmp_path):
    run("--max_iters", "1")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["sources"]["objectives.py"] = "0" * 64
    path.write_text(json.dumps(config))
    out, _ = resume(tmp_path / "out", "--max_iters", "2")
    assert "objectives.py changed" in out
    sources = read_config(tmp_path / "out")["sources"]
    assert sources == {**source_digests(), "objectives.py": "changed during the run"}

# -----------------------------------------------------------------------------
# The folder

def test_a_moved_run_reads_and_writes_where_it_is(run, tmp_path, monkeypatch):
    run("--max_iters", "2")
    shutil.copytree(tmp_path / "out", tmp_path / "moved")
    before = (tmp_path / "out" / "ckpt.pt").read_bytes()
    monkeypatch.chdir(tmp_path)                             # data_dir was given elsewhere
    resume("moved", "--max_iters", "3")
    assert torch.load(tmp_path / "moved" / "ckpt.pt", weights_only=True)["step"] == 3
    assert (tmp_path / "out" / "ckpt.pt").read_bytes() == before


def test_overwrite_removes_old_results(run, tmp_path):
    run("--max_iters", "1")
    for name in ("eval_glue.json", "eval_ppl_val_left-to-right.json", "spectrum.json", "notes.txt"):
        (tmp_path / "out" / name).write_text("{}")
    run("--max_iters", "1", "--overwrite")
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"ckpt.pt", "config.json", "log.jsonl", "tokenizer.json", "unigram.npy", "notes.txt"}


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".lock"}


@pytest.mark.slow
def test_an_old_run_is_whole_until_the_first_checkpoint_of_the_new_one(run, data_dir, tmp_path):
    folder = tmp_path / "out"
    run("--max_iters", "1", "--objective", "ar")
    (folder / "eval_glue.json").write_text("{}")
    before = files_in(folder)
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *TINY, "--data_dir", data_dir, "--out_dir", folder, "--overwrite",
         "--objective", "mlm", "--n_embd", "16", "--max_iters", "1000000", "--save_interval", "1000000",
         "--eval_interval", "1000000"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(folder / ".new" / "log.jsonl", process)
    process.kill()
    process.wait()
    assert files_in(folder) == before
    load_checkpoint(folder)

    # The next run removes what is left, whether it continues the old one or replaces it
    resume(folder, "--max_iters", "2")
    assert not (folder / ".new").exists() and len(log_of(folder)) == 2
    run("--max_iters", "1", "--objective", "mlm", "--n_embd", "16", "--overwrite")
    assert set(files_in(folder)) == {"ckpt.pt", "config.json", "log.jsonl", "tokenizer.json", "unigram.npy"}
    assert load_checkpoint(folder)[0].config.n_embd == 16 and len(log_of(folder)) == 1


def test_files_of_two_runs_never_make_a_checkpoint(tmp_path, monkeypatch):
    """Killed before any of its steps: the folder is one run, or the other, or none, and the next does the rest."""
    old = {"config.json", "ckpt.pt", "log.jsonl", "tokenizer.json", "unigram.npy", "eval_glue.json"}
    new = {"config.json", "ckpt.pt", "log.jsonl", "tokenizer.json"}
    steps = [0]

    class Killed(BaseException):
        pass

    def counted(function):
        def call(*args):
            if steps[0] == 0:
                raise Killed
            steps[0] -= 1
            return function(*args)
        return call

    for kill_before in range(20):
        folder = tmp_path / str(kill_before)
        for place, names in [(folder, old), (folder / ".new", new)]:
            place.mkdir()
            for name in names:
                (place / name).write_text(str(place == folder))
        with monkeypatch.context() as patched:
            steps[0] = kill_before
            for name in ("remove", "replace", "rename"):
                patched.setattr(os, name, counted(getattr(os, name)))
            try:
                runs.replace_older(str(folder))
            except Killed:
                pass
        if (folder / "ckpt.pt").exists() and (folder / "config.json").exists():
            texts = {(folder / name).read_text() for name in runs.RUN_FILES if (folder / name).exists()}
            assert len(texts) == 1, kill_before
        runs.finish_replacing(str(folder))
        assert {name: text.decode() for name, text in files_in(folder).items()} == dict.fromkeys(new, "False")
        assert not (folder / ".new").exists()
    assert steps[0] > 0, "it was never finished without a kill"


def test_all_processes_of_torchrun_may_finish_what_was_left(tmp_path, monkeypatch):
    """One does it while the others wait. Alone, a process that finds another at work is refused."""
    (tmp_path / ".new").mkdir()
    (tmp_path / ".new/ckpt.pt").write_text("new")
    with hold(tmp_path), pytest.raises(DataError, match="another process is working"):
        runs.finish_replacing(str(tmp_path))

    monkeypatch.setenv("RANK", "1")
    with hold(tmp_path):
        other = threading.Thread(target=runs.finish_replacing, args=(str(tmp_path),))
        other.start()
        time.sleep(0.2)
        assert other.is_alive() and not (tmp_path / "ckpt.pt").exists()
    other.join()
    runs.finish_replacing(str(tmp_path))
    assert (tmp_path / "ckpt.pt").read_text() == "new" and not (tmp_path / ".new").exists()


@pytest.mark.slow
def test_a_second_process_in_the_folder_is_refused(data_dir, tmp_path):
    command = [sys.executable, ROOT / "train.py", *TINY, "--data_dir", data_dir, "--out_dir", tmp_path / "out",
               "--max_iters", "100000", "--save_interval", "5"]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(tmp_path / "out" / "ckpt.pt", first)
        for flag in ("--overwrite", "--resume"):
            _, err = call(*command[2:], flag, code=2)
            assert "another process" in err and len(err.strip().splitlines()) == 1
    finally:
        first.kill()                                        # kill -9 leaves no lock
        first.wait()
    call(*TINY, "--data_dir", data_dir, "--out_dir", tmp_path / "out", "--max_iters", "1", "--overwrite")


def test_a_damaged_log_does_not_block_a_resume(run, tmp_path):
    run("--max_iters", "3")
    path = tmp_path / "out" / "log.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\xff\x00 nonsense\n" + b'{"no step": 1}\n' + lines[1] + lines[2][:10])
    out, _ = resume(tmp_path / "out", "--max_iters", "4")
    assert "3 damaged lines are dropped" in out
    assert [line["step"] for line in log_of(tmp_path / "out")] == [1, 2, 4]


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_keeps_the_checkpoint(run, tmp_path):
    """The system refuses to write more than 100 kB to a file, as a full disk would."""
    run("--max_iters", "2")
    before = (tmp_path / "out" / "ckpt.pt").read_bytes()
    assert len(before) > 100_000
    code = ("import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
            "import train; train.main(sys.argv[1:])")
    done = subprocess.run([sys.executable, "-c", code, "--resume", "--out_dir", tmp_path / "out",
                           "--max_iters", "3"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and "ckpt.pt" in last and "disk full" in last
    assert (tmp_path / "out" / "ckpt.pt").read_bytes() == before
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_too_little_space_is_said_before_training(run, tmp_path, monkeypatch):
    """A new run keeps two checkpoints for a moment. One that goes on has written the first of them."""
    run("--max_iters", "1")
    one = 3 * 4 * sum(weight.numel() for weight in weights_of(tmp_path / "out").values())
    assert 0.5 < one / (tmp_path / "out/ckpt.pt").stat().st_size < 2
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(runs.shutil, "disk_usage", lambda path: usage._replace(free=1.5 * one))
    _, err = run("--max_iters", "1", out="new", code=2)
    assert err.count("\n") == 1 and f"new: checkpoints of this model need {2 * one / 1e6:.1f} MB" in err
    assert not list((tmp_path / "new").iterdir())
    resume(tmp_path / "out", "--max_iters", "2")

    # A smaller run frees only its own size when it is replaced
    (tmp_path / "small").mkdir()
    (tmp_path / "small/ckpt.pt").write_bytes(b"0" * 1000)
    _, err = run("--max_iters", "1", "--overwrite", out="small", code=2)
    assert f"small: checkpoints of this model need {(2 * one - 1000) / 1e6:.1f} MB" in err


def test_files_that_are_not_of_a_run_stay(run, tmp_path):
    """In a folder of somebody's own: its scripts are no results, its config.json is no run's."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "eval_ppl.py").write_text("print()")
    run("--max_iters", "1")
    assert (folder / "eval_ppl.py").read_text() == "print()"

    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"architectures": []}')
    _, err = run("--max_iters", "1", out="other", code=2)
    assert err.count("\n") == 1 and "config.json was not written by train.py: name another --out_dir" in err
    assert (tmp_path / "other/config.json").read_text() == '{"architectures": []}'


def test_a_folder_that_cannot_be_made_is_one_line(run, tmp_path):
    (tmp_path / "file").write_text("")
    _, err = run("--max_iters", "1", out="file/out", code=2)
    assert "file/out cannot be made" in err and err.count("\n") == 1


def test_a_run_that_never_saved_is_one_line(run, tmp_path):
    run("--max_iters", "1")
    (tmp_path / "out" / "ckpt.pt").unlink()
    _, err = resume(tmp_path / "out", "--max_iters", "2", code=2)
    assert "ckpt.pt is missing" in err and len(err.strip().splitlines()) == 1

# -----------------------------------------------------------------------------
# Signals and screens

def wait_for(path, process, seconds=60):
    deadline = time.time() + seconds
    while not path.exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    assert path.exists(), "the run did not begin"


@pytest.mark.slow
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


def begin(*args, **options):
    """train.py in a process of its own, which can be sent a signal."""
    return subprocess.Popen([sys.executable, "-u", ROOT / "train.py", *map(str, args)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, **options)


def assert_stopped(process, number):
    """One line on stderr, exit code 128 + number."""
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert err == f"stopped by {number.name}\n"
    return out


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_while_the_data_is_prepared_is_one_line(tmp_path, number):
    process = begin("--preset", "tiny", "--data_dir", tmp_path / "data", "--out_dir", tmp_path / "out")
    wait_for(tmp_path / "data" / "stdlib" / ".new", process)
    process.send_signal(number)
    assert_stopped(process, number)
    assert not list((tmp_path / "data").rglob("*.npy")) and not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_model_is_compiled_is_one_line(data_dir, tmp_path, number):
    process = begin(*TINY, "--compile", "on", "--data_dir", data_dir, "--out_dir", tmp_path / "out",
                    env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")})
    while "compiling" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(2)
    process.send_signal(number)
    assert_stopped(process, number)


@pytest.mark.slow
def test_a_signal_while_torch_compile_cleans_up_is_one_line():
    """Python ignores an exception in the callback of a weak reference: a signal there must still stop."""
    code = """
import signal, torch, weakref
from run import compiled, one_line_stop

def model():
    layer = torch.nn.Linear(1, 1)
    reference = weakref.ref(layer, lambda _: signal.raise_signal(signal.SIGTERM))
    del layer
    print("still running")

torch.compile = lambda model: model
with one_line_stop():
    compiled(model, [])
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, cwd=ROOT)
    out = assert_stopped(process, signal.SIGTERM)
    assert out.startswith("compiling") and "still running" not in out


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_stop_does_not_wait_for_a_long_validation(data_dir, tmp_path, processes):
    """The validation takes a minute, and torchrun kills 30 s after SIGTERM."""
    command = [sys.executable] if processes == 1 else torchrun(2, 5)
    process = subprocess.Popen(
        [*command, ROOT / "train.py", *TINY, "--data_dir", data_dir, "--out_dir", tmp_path / "out",
         "--eval_sequences", "80000", "--eval_interval", "3", "--max_iters", "6"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    workers = [process.pid]
    try:
        wait_for(tmp_path / "out" / "log.jsonl", process)
        if processes > 1:
            workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        while len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) < 2:
            time.sleep(0.01)
        time.sleep(1)
        process.terminate()
        wait_for(tmp_path / "out" / "ckpt.pt", process, 10)
        assert process.poll() is None, "the validation was already over"
    finally:
        for worker in workers:                              # as torchrun does after 30 s
            os.kill(int(worker), signal.SIGKILL)
        process.wait()
    assert torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["step"] == 3
    resume(tmp_path / "out", "--eval_sequences", "8")
    assert [line["step"] for line in log_of(tmp_path / "out")] == [1, 2, 4, 5, 6]


@pytest.mark.slow
def test_all_processes_stop_at_one_step_whatever_the_log_interval(data_dir, tmp_path):
    process = subprocess.Popen(
        [*torchrun(2, 2), ROOT / "train.py", *TINY, "--data_dir", data_dir, "--out_dir", tmp_path / "out", "--max_iters", "1000000",
         "--log_interval", "100000", "--eval_interval", "100000", "--save_interval", "20"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    wait_for(tmp_path / "out" / "ckpt.pt", process)
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert "stopped at step" in out, out[-2000:] + err[-2000:]


@pytest.mark.slow
def test_a_closed_pipe_does_not_lose_the_run(data_dir, tmp_path):
    """python train.py 2>&1 | head -n 1: the run goes on to its end."""
    command = [sys.executable, ROOT / "train.py", *TINY, "--data_dir", data_dir, "--out_dir", tmp_path / "out"]
    quoted = " ".join(f"'{word}'" for word in command)
    done = subprocess.run(["bash", "-o", "pipefail", "-c", f"{quoted} 2>&1 | head -n 1"], capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0, done
    assert torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["step"] == 20


@pytest.mark.slow
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
        capture_output=True, env={**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0", "OMP_NUM_THREADS": "1"})
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


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="reads the names of threads from /proc")
def test_no_thread_of_the_process_group_meets_the_end_of_the_interpreter(data_dir, tmp_path):
    """That aborts a process once in 50 exits ("terminate called without an active exception")."""
    wrapper = tmp_path / "wrapper.py"
    wrapper.write_text(
        "import atexit, glob, os, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import train\n"
        "def show():\n"
        "    names = []\n"
        "    for path in glob.glob('/proc/self/task/*/comm'):\n"
        "        try:\n"
        "            names.append(open(path).read().strip())\n"
        "        except OSError:\n"                             # the thread has ended meanwhile
        "            pass\n"
        f"    with open({str(tmp_path)!r} + '/threads-' + os.environ['RANK'], 'w') as file:\n"
        "        file.write(' '.join(names))\n"
        "atexit.register(show)\n"
        "train.main(sys.argv[1:])\n")
    command = [*torchrun(2, 3), wrapper, *TINY, "--data_dir", data_dir, "--out_dir", tmp_path / "out"]
    done = subprocess.run([*map(str, command), "--max_iters", "3"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for rank in "01":
        assert "gloo" not in (tmp_path / f"threads-{rank}").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--overwrite", "--resume"])
def test_a_refusal_ends_all_processes_without_a_traceback(run, data_dir, tmp_path, flag):
    run("--max_iters", "1", "--objective", "ar")
    with hold(tmp_path / "out"):
        done = subprocess.run(
            [*torchrun(2, 4), ROOT / "train.py", *TINY, "--data_dir", data_dir, "--out_dir", tmp_path / "out",
             "--objective", "ar", flag, "--max_iters", "2"],
            capture_output=True, text=True, timeout=300)
    ours = done.stderr.split("torch.distributed.elastic")[0].split("Traceback")[0]
    assert done.returncode != 0 and ours.count("another process is working in") == 1, done.stderr
    assert "[rank" not in done.stderr, "a traceback of a process"
    assert (tmp_path / "out" / "ckpt.pt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("flags, message", [
    ("--dataset nowhere", "there is no dataset"), ("--n_head 3", "n_head"), ("--lookahead x", "lookahead"),
    ("--resume", "holds no checkpoint"), ("--block_size 16384 --batch_tokens 131072", "window")])
def test_an_error_is_said_once_in_all(data_dir, tmp_path, flags, message):
    done = subprocess.run(
        [*torchrun(2, 6), ROOT / "train.py", *TINY, "--data_dir", data_dir, "--out_dir", tmp_path / "out",
         *flags.split()], capture_output=True, text=True, timeout=300)
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert done.returncode != 0 and len(errors) == 1 and message in errors[0], done.stderr
    assert "[rank" not in done.stderr, "a traceback of a process"


@pytest.mark.slow
def test_an_error_is_said_though_the_first_process_is_slower(tmp_path):
    """torchrun ends all processes as soon as one has ended, so the others must not be faster."""
    script = tmp_path / "slow_start.py"
    script.write_text(f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import train
if os.environ["LOCAL_RANK"] == "0":
    time.sleep(2)
train.main()
""")
    done = subprocess.run([*torchrun(2, 7), script, *TINY, "--n_head", "3", "--out_dir", tmp_path / "out"],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and done.stderr.count("error: n_embd") == 1, done.stderr


def test_a_flag_may_have_another_default_than_its_field(run, monkeypatch):
    """Nobody gave it, so it is no mistake."""
    parser = flags.build_parser

    def other_default():
        p = parser()
        p.set_defaults(lookahead=5)
        return p

    monkeypatch.setattr(flags, "build_parser", other_default)
    run("--objective", "ar", "--max_iters", "1")


def test_an_error_in_an_objective_keeps_its_traceback(run, monkeypatch):
    """It is a mistake in code: a line without its place would not help."""
    def broken(x, draw, options):
        return np.zeros(3).reshape(2, 2)

    monkeypatch.setitem(OBJECTIVES, "ar", OBJECTIVES["ar"]._replace(batch=broken))
    with pytest.raises(ValueError, match="cannot reshape"):
        run("--objective", "ar")


def test_a_model_without_masks_that_sees_both_sides_gets_no_bits_per_byte(run, monkeypatch):
    """It fills in tokens that were replaced by 0: its loss is not that of a next token."""
    def replaced(x, draw, options):
        batch = OBJECTIVES["mlm"].batch(x, draw, options)
        return batch._replace(inputs=np.where(batch.inputs == options.mask_token, 0, batch.inputs))

    monkeypatch.setitem(OBJECTIVES, "fifth", Objective(replaced, causal=False))
    out, _ = run("--objective", "fifth", "--max_iters", "2")
    assert "nats per target token" in out and "bits per byte" not in out


def test_an_objective_whose_slots_vary_needs_eager_code(run, tmp_path, monkeypatch):
    vlm = OBJECTIVES["vlm"]

    def slots_as_needed(x, draw, options):
        batch = vlm.batch(x, draw, options)
        used = batch.weights > 0
        return batch._replace(positions=batch.positions[used], targets=batch.targets[used],
                              weights=batch.weights[used])

    monkeypatch.setitem(OBJECTIVES, "vlm", vlm._replace(batch=slots_as_needed))
    _, err = run("--max_iters", "2", "--compile", "auto", code=2)
    assert "changes from" in err and "--compile off" in err and err.count("\n") == 1
    run("--max_iters", "2", "--compile", "off")

# -----------------------------------------------------------------------------
# Characters

ASCII = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.slow
def test_every_script_runs_where_the_screen_has_few_characters(tmp_path):
    """Text, names of files and of folders in Japanese: none of it is in ascii or cp1252."""
    texts = [tmp_path / f"\u65e5\u672c{i}.txt" for i in range(40)]
    for i, path in enumerate(texts):
        lines = "".join(f"\u65e5\u672c\u8a9e and \u00e9t\u00e9 \u2713 in line {j} of {i}\n" for j in range(20))
        path.write_text(lines, encoding="utf-8")
    task = tmp_path / "glue" / "RTE"
    task.mkdir(parents=True)
    for name in ("train.tsv", "dev.tsv"):
        rows = [f"{i}\t\u65e5\u672c{'ab'[i % 2]}\t\u8a9e\t{['entailment', 'not_entailment'][i % 2]}\n" for i in range(60)]
        (task / name).write_text("index\tsentence1\tsentence2\tlabel\n" + "".join(rows), encoding="utf-8")

    def call_script(name, *args):
        done = subprocess.run([sys.executable, ROOT / name, *map(str, args)], capture_output=True, cwd=tmp_path,
                              env={**os.environ, "OMP_NUM_THREADS": "1", **ASCII})
        assert done.returncode == 0, (name, done.stderr[-2000:].decode("utf-8", "replace"))

    folder = tmp_path / "\u00e9t\u00e9 \u65e5\u672c"
    data_flags = ["--dataset", "toy", "--data_dir", folder]
    call_script("data.py", *data_flags, "--tokenizer", "bytes", "--val_fraction", "0.2", "--files", *texts)
    call_script("dev/overlap.py", *data_flags)
    call_script("train.py", *TINY, "--data_dir", folder, "--out_dir", folder / "vlm", "--max_iters", "2")
    call_script("sample.py", "--checkpoint", folder / "vlm", "--prompt", "\u65e5\u672c", "--watch")
    call_script("eval_ppl.py", "--checkpoint", folder / "vlm", "--val", "--max_windows", "2")
    call_script("eval_glue.py", "--checkpoint", folder / "vlm", "--tasks", "RTE", "--glue_dir", tmp_path / "glue")
    words = shlex.join([*TINY, "--max_iters", "2", "--data_dir", str(folder)])
    call_script("compare.py", "--runs", "vlm", "--seeds", "0", "--train", words, "--out_dir", folder / "compare", "--eval_ppl", "none", "--eval_glue", "none")


def test_text_files_are_opened_as_utf8():
    """Without encoding= Python takes that of the system, which on Windows is not UTF-8."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("dev/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and is_text_file(node):
                assert "encoding" in [keyword.arg for keyword in node.keywords], \
                    f"{path.name}, line {node.lineno}: {ast.unparse(node)}"


def is_text_file(call):
    """Whether a call opens, reads or writes a file as text."""
    if isinstance(call.func, ast.Name) and call.func.id == "open":
        mode = ast.unparse(call.args[1]) if len(call.args) > 1 else "r"
        return "b" not in mode
    if isinstance(call.func, ast.Attribute):
        encoding = {"read_text": 0, "write_text": 1}.get(call.func.attr)    # its place among the arguments
        return encoding is not None and len(call.args) <= encoding
    return False
