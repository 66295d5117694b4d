"""
What surrounds the training loop: processes, the run's folder, signals, compilation. Skip it at first reading.

train.py is the loop itself. Under torchrun every process runs all of it. What belongs to the whole run, such
as writing a file or printing a line, is done by the first one.
"""
import contextlib
import gc
import json
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
from common import (DataError, check_dataset, dataset_digests, hold, lock, output_may_close,
                    read_checkpoint, read_config, save_checkpoint, save_config, source_digests,
                    write_atomically)

# A run's files, in the order in which they are replaced
RUN_FILES = ["config.json", "tokenizer.json", "unigram.npy", "log.jsonl", "ckpt.pt"]
MOST_PASSES = 4             # over the training tokens: beyond, a model begins to learn them by heart

# -----------------------------------------------------------------------------
# Processes

def start_processes(args):
    """Join the other processes, if torchrun started any.

    torch.distributed.nn, which DDP imports, has functions with the default group=WORLD: the group that exists
    when it is first imported. Imported later it would keep the group, and so gloo's threads, alive after
    leave_together, and a thread that meets the end of the interpreter aborts the process (1 exit in 50).
    """
    if "RANK" in os.environ:
        import torch.distributed.nn                                         # noqa: F401
        if args.device.startswith("cuda"):
            torch.cuda.set_device(args.device)
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")


def leave_together():
    """Wait for the other processes, then leave the group: none goes while another still needs it.

    Its threads end with it, if nothing refers to it any more. DDP does until it is collected.
    """
    if dist.is_initialized():
        dist.barrier()
        gc.collect()
        dist.destroy_process_group()


def together(action):
    """The result of action(), which runs in every process.

    If it fails in any of them, all leave: the first that failed with its error, the others silently.
    """
    rank, world = rank_and_world()

    # Try it
    result = failure = None
    try:
        result = action()
    except (DataError, OSError) as error:
        failure = error

    # Where did it fail?
    if world > 1:
        failed = [None] * world
        dist.all_gather_object(failed, failure is not None)
        if any(failed):
            leave_together()
            if rank != failed.index(True):
                sys.exit(2)
    if failure:
        raise failure
    return result


def in_first_process(action):
    """action() in the first process. If it fails there, all leave, see `together`."""
    rank, _ = rank_and_world()
    together(action if rank == 0 else lambda: None)


def rank_and_world():
    """(number of this process, number of processes): (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_reduce(tensor):
    """Sum over the processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor

# -----------------------------------------------------------------------------
# The screen

def say(text):
    """Print a line, once for all processes."""
    rank, _ = rank_and_world()
    if rank == 0:
        with output_may_close():
            tqdm.write(text)


@contextlib.contextmanager
def progress_bar(total, initial):
    """tqdm's bar on the screen of the first process. A screen that is gone does not end the run."""
    rank, _ = rank_and_world()
    bar = tqdm(disable=True)
    with output_may_close():
        bar = tqdm(total=total, initial=initial, disable=rank != 0, dynamic_ncols=True)
    try:
        yield bar
    finally:
        with output_may_close():
            bar.close()


def show_speed(bar, line):
    """Loss and speed behind the progress bar."""
    text = f"loss {line['train_loss']:.3f}, {line['tokens_per_second']:.0f} tokens/s"
    if "mfu" in line:
        text += f", MFU {line['mfu']:.0%}"
    with output_may_close():
        bar.set_postfix_str(text)


def say_passes(args, done, train_tokens):
    """How often the run goes over its training tokens: the more often, the more it learns them by heart."""
    tokens = done["tokens"] + (args.max_iters - done["step"]) * args.batch_tokens
    passes = tokens / train_tokens
    say(f"{args.max_iters} updates are {passes:.2g} passes over {train_tokens:,} training tokens")
    if passes > MOST_PASSES:
        say(f"warning: more than {MOST_PASSES} passes. Watch the validation loss: it may rise while the "
            "training loss falls, for ar first. Fewer --max_iters or more text help")


def patience():
    """What is said before a checkpoint is saved: torchrun kills its processes 30 s after a signal."""
    return " (torchrun waits 30 s for it)" if dist.is_initialized() else ""


def command(script, *words):
    """A command line that can be typed in where this process runs."""
    path = Path(__file__).with_name(script)
    with contextlib.suppress(ValueError):                   # another drive, on Windows
        path = os.path.relpath(path)
    return shlex.join(["python", str(path), *words])


def resume_command(args):
    """How to continue a run that was stopped."""
    line = command("train.py", "--resume", "--out_dir", args.out_dir)
    _, world = rank_and_world()
    if world == 1:
        return line
    return line.replace("python", f"torchrun --standalone --nproc_per_node={world}", 1)

# -----------------------------------------------------------------------------
# The dataset

def load_data(args):
    """data.load. The default dataset, the standard library's text, is prepared first when it is missing.

    A resumed run never prepares one: it needs the very dataset that it began with. Raises DataError.
    """
    folder = os.path.join(args.data_dir, args.dataset)

    def prepare():
        if os.path.exists(os.path.join(folder, "meta.json")):
            return
        if args.resume:
            raise DataError(f"{folder}, the dataset of this run, does not exist: --data_dir names its folder")
        if args.dataset == "stdlib":
            data.prepare("stdlib", data_dir=args.data_dir)

    in_first_process(prepare)
    meta, shards = together(lambda: data.load(args.dataset, args.data_dir))
    if args.train_tokens:
        shards["train"] = together(lambda: data.few(shards["train"], args.train_tokens))
    if args.resume:
        in_first_process(lambda: check_dataset(folder, args.out_dir))
    return meta, shards

# -----------------------------------------------------------------------------
# The run's folder

@contextlib.contextmanager
def held_by_run(out_dir):
    """`common.hold` for all processes: the first one holds the folder until the end of the block."""
    with contextlib.ExitStack() as held:
        in_first_process(lambda: held.enter_context(hold(out_dir)))
        yield


def flags_in_force(args):
    """The flags as config.json keeps them.

    out_dir is left out: it is the folder that holds config.json, wherever that is moved to. A device "auto"
    stays "auto", so that another machine picks its own.
    """
    flags = {**vars(args), "device": args.device_flag}
    for name in ("device_flag", "out_dir", "resume", "overwrite"):
        del flags[name]
    return flags


def check_space(out_dir, model):
    """Raises DataError if the disk has too little space: otherwise only the first save would show it.

    A checkpoint holds the weights and AdamW's two moments of each, which is more than Muon has. The last one
    is kept until the next one is complete.
    """
    checkpoint = 3 * sum(p.numel() * p.element_size() for p in model.parameters())      # bytes
    path = os.path.join(out_dir, "ckpt.pt")
    old = os.path.getsize(path) if os.path.exists(path) else 0      # bytes, free once it is replaced
    needed = max(checkpoint, 2 * checkpoint - old)
    free = shutil.disk_usage(out_dir).free
    if free < needed:
        raise DataError(f"{out_dir}: checkpoints of this model need {needed / 1e6:.1f} MB, and the disk has "
                        f"{free / 1e6:.1f} MB left: make space, or name another --out_dir")


def write_folder(args, config, dataset):
    """Write what makes a folder a checkpoint besides the weights.

    A run that replaces an older one begins in out_dir/.new, see `replace_older`.
    """
    new = os.path.join(args.out_dir, ".new")
    shutil.rmtree(new, ignore_errors=True)                  # of a run that was killed before it saved
    folder = args.out_dir

    # A new run begins beside an older one, or in a folder without one
    if not args.resume:
        if os.path.exists(os.path.join(args.out_dir, "ckpt.pt")):
            folder = new
            os.mkdir(folder)
        else:
            remove_run(args.out_dir)                        # a log without a checkpoint, for instance
        for name in ("tokenizer.json", "unigram.npy"):
            shutil.copy(os.path.join(dataset, name), folder)

    # What it is made from
    save_config(folder, config, train=flags_in_force(args), torch=torch.__version__,
                sources=sources_of_run(args), dataset=dataset_digests(dataset))


def folder_now(out_dir):
    """Where the files of the running run are: in out_dir/.new until an older run is replaced."""
    new = os.path.join(out_dir, ".new")
    return new if os.path.exists(new) else out_dir


def save(out_dir, model, optimizers, step, tokens):
    """Save a checkpoint. The first one of a run puts it in the place of an older run."""
    save_checkpoint(folder_now(out_dir), model, optimizers, step, tokens)
    replace_older(out_dir)


def replace_older(out_dir):
    """If the run in out_dir/.new has a checkpoint, put it in the place of the older run in out_dir.

    Until then the older run is whole. Of its checkpoint, config.json goes first, and the new ckpt.pt comes
    last, so files of two runs never make a checkpoint together. A process that is killed in between leaves
    .new/ckpt.pt, and the next one does the rest.
    """
    new = os.path.join(out_dir, ".new")
    if not os.path.exists(os.path.join(new, "ckpt.pt")):
        return
    if os.path.exists(os.path.join(out_dir, "ckpt.pt")):
        remove_run(out_dir)
    for name in RUN_FILES:
        with contextlib.suppress(FileNotFoundError):
            os.replace(os.path.join(new, name), os.path.join(out_dir, name))
    shutil.rmtree(new)


def finish_replacing(out_dir):
    """What a process that was killed in `replace_older` left to do.

    Raises DataError if it is still alive. Under torchrun it waits for it instead.
    """
    if not os.path.exists(os.path.join(out_dir, ".new", "ckpt.pt")):
        return
    if "RANK" in os.environ:                                # all processes come here: one does it
        holding = lock(os.path.join(out_dir, ".lock"))
    else:
        holding = hold(out_dir)
    with holding:
        replace_older(out_dir)


def remove_run(out_dir):
    """Remove the files of a run, and the results that were measured on it."""
    results = [path.name for path in Path(out_dir).glob("eval_*.json")]
    for name in [*results, "finished.json", "spectrum.json", *RUN_FILES]:
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(out_dir, name))


def sources_of_run(args):
    """{file: sha256} of the code that made the run.

    A file that changed since the run began is named on the screen, and from then on matches no code: such
    weights belong to neither version.
    """
    now = source_digests()
    if not args.resume:
        return now
    before = read_config(args.out_dir).get("sources", {})
    changed = [name for name, digest in now.items() if before.get(name) != digest]
    if changed:
        say(f"note: {', '.join(changed)} changed since {args.out_dir} was begun")
    return {**now, **dict.fromkeys(changed, "changed during the run")}


def restore(args, model, optimizers):
    """Restore weights and optimizers from out_dir and cut the log there. Returns {"step", "tokens"}."""
    state, _ = read_checkpoint(args.out_dir, args.device)
    try:
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizer"]):
            optimizer.load_state_dict(saved)
        done = {"step": state["step"], "tokens": state["tokens"]}
    except (KeyError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{args.out_dir} cannot be resumed, ckpt.pt is not what config.json says: "
                        f"{reason}") from None
    in_first_process(lambda: cut_log(os.path.join(args.out_dir, "log.jsonl"), done["step"]))
    return done


def cut_log(path, step):
    """Keep the lines of a log up to a step. A killed run may have logged more, or half a line."""
    if not os.path.exists(path):
        return
    good = []
    damaged = 0
    with open(path, "rb") as file:
        for line in file:
            try:
                if json.loads(line)["step"] <= step and line.endswith(b"\n"):
                    good.append(line)
            except (ValueError, KeyError, TypeError):
                damaged += 1
    if damaged:
        say(f"{path}: {damaged} damaged lines are dropped")
    write_atomically(path, lambda file: file.write(b"".join(good)))


def log(out_dir, line):
    """Append a JSON object to log.jsonl, as a line."""
    with open(os.path.join(folder_now(out_dir), "log.jsonl"), "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def check_finite(numbers, model, step, saved):
    """End the run, exit code 1, if a loss or gradient norm (steps, 2) or a weight is not finite."""
    steps_ok = numbers.isfinite().all(dim=1)                                # (steps,)
    weights_ok = model is None or all(p.isfinite().all() for p in model.parameters())
    if steps_ok.all() and weights_ok:
        return
    bad = step
    if not steps_ok.all():
        bad = step - len(numbers) + 1 + int(steps_ok.int().argmin())        # the first one
    kept = f"the checkpoint of step {saved} is kept" if saved else "this run has saved no checkpoint yet"
    say(f"error: loss, gradient or weights not finite at step {bad}; {kept}")
    leave_together()
    sys.exit(1)

# -----------------------------------------------------------------------------
# Signals: save, then stop

@contextlib.contextmanager
def handler(handle):
    """Call handle(number, frame) on Ctrl-C, SIGTERM and a closed terminal.

    The old handlers are restored at the end. Outside of the main thread Python allows none, so nothing is
    caught there.
    """
    old = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)            # Windows has no SIGHUP
            if number and signal.getsignal(number) not in (signal.SIG_IGN, None):   # nohup ignores SIGHUP
                old[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, before in old.items():
            signal.signal(number, before)


@contextlib.contextmanager
def one_line_stop():
    """A signal ends the process with one line and exit code 128 + its number.

    For the time before and after the loop, when nothing needs to be saved.
    """
    numbers = []

    def stop(number, frame):
        numbers.append(number)
        sys.exit(128 + number)

    try:
        with handler(in_first_process_only(stop)):
            yield
    except SystemExit:
        if numbers and dist.is_initialized():               # its threads would abort at Python's own end
            end_at_once(numbers[0])
        if numbers:
            say_signal(numbers[0])
        raise


def in_first_process_only(handle):
    """What a process does on a signal: the first one calls handle, the others end at once.

    Python would not call handle while they wait for the first one.
    """
    return handle if os.environ.get("RANK", "0") == "0" else signal.SIG_DFL


def end_at_once(number, frame=None):
    """End the process as one_line_stop does, but without an exception, so nothing is cleaned up.

    Where library code runs, the exception may get lost (Python ignores those in the callback of a weak
    reference, of which torch.compile has thousands), or that code may warn about it.
    """
    with output_may_close():
        sys.stdout.flush()
    say_signal(number)
    os._exit(128 + number)


def say_signal(number):
    """The one line of a process that is stopped, on stderr."""
    print(f"stopped by {signal.Signals(number).name}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def stop_vote():
    """A function to call after every step: the signal on which all processes stop at this step, or 0.

    Processes must stop at the same step. So the flags of a step are combined while the next one runs, and
    read after it: on the CPU (gloo), without waiting for a GPU.
    """
    # Signals that came so far in this process, and a group of its own for the vote
    _, world = rank_and_world()
    signals = [0]
    group = dist.new_group(backend="gloo") if world > 1 else None
    running = []                                            # (work, flag) of the steps that are not read yet

    def vote():
        if world == 1:
            return signals[-1]

        # Send this step's flag, read that of the step before
        flag = torch.tensor(signals[-1])
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=group, async_op=True)
        running.append((work, flag))
        if len(running) == 1:
            return 0
        work, flag = running.pop(0)
        work.wait()
        return int(flag)

    with handler(lambda number, frame: signals.append(number)):
        try:
            yield vote
        finally:
            for work, _ in running:
                work.wait()

# -----------------------------------------------------------------------------
# Compilation

COMPILE_PAYS_FLOPS = 2e13   # of a run on a CPU: compiling takes 10 to 20 s, a step is then 1.3 times faster


def pick_compile(args, step_flops):
    """Whether to compile: always on a GPU, on a CPU only where it pays.

    It pays if there is a C++ compiler and the run is long enough.
    """
    if args.compile != "auto":
        return args.compile == "on"
    if args.device.startswith("cuda"):
        return True
    compiler = shutil.which("g++") or shutil.which("clang++")
    pays = step_flops * args.max_iters > COMPILE_PAYS_FLOPS
    return args.device == "cpu" and compiler is not None and pays


def compiled(model, batch):
    """The model under torch.compile, tried on one batch. If that fails, says so and returns the model."""
    start = time.time()
    say("compiling (a second run finds it in the cache) ...")
    try:
        fast = torch.compile(model)
        with handler(in_first_process_only(end_at_once)):
            fast(*batch).backward()
        say(f"compiled in {time.time() - start:.0f} s")
    except Exception as error:      # no compiler, a compiler that fails, an unsupported platform: many kinds
        reason = (str(error) or repr(error)).splitlines()[0]
        say(f"torch.compile does not work here, continuing without: {reason}")
        fast = model
    model.zero_grad(set_to_none=True)
    return fast
