"""
Compare the objectives, or any other settings of train.py: same data, same number of tokens, several seeds.

    python compare.py                                   # the four objectives, 3 seeds; an hour on 2 cores
    python compare.py --runs "ar" "dar --lookahead 4" "mlm --mask_ratio 0.3" "vlm --mask_range 0.4 0.6"
    python compare.py --seeds 0 --max_iters 200         # a quick look
    python compare.py --against ar mlm --plot claims.png --curves curves.png
    python compare.py --train "--preset small --dataset mine" --eval_ppl "--text book.txt" --eval_glue none

Every setting is an objective and flags of train.py, and becomes one column. compare.py runs train.py,
eval_ppl.py and eval_glue.py for every setting and seed, as one would by hand, in OUT_DIR/SETTING-SEED.
Finished commands are skipped, so an interrupted comparison resumes, and can be extended with more seeds and
settings. A run that was made with other code, data or flags is refused, and a number counts only for the
weights it was measured on.

Then it prints every measurement, and every difference with its two errors and a verdict, by the rule that
stands above the table (see report.py). Everything goes to OUT_DIR/compare.json, with what is needed to redo
the errors.
"""
import argparse
import importlib
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import torch

import flags
import objectives
import report
from common import (Parser, as_json, check_plot, command_line, file_sha256, one_line_errors, pick_device,
                    read_checkpoint, read_result, source_digests, weights_digest, write_atomically,
                    write_json)
from model import Config
from objectives import OBJECTIVES, Options

HERE = Path(__file__).parent

# -----------------------------------------------------------------------------
# A comparison, from the settings to the tables

def compare(args):
    """Train and evaluate what is left, then write compare.json and print the tables."""
    # Everything that can be wrong comes before the first command
    settings = check(args)
    jobs = make_jobs(settings, args)
    for job in jobs:
        for words in evaluations(job, args):
            check_evaluation(words, job)
    plans = {job.folder: plan(job, args) for job in jobs}

    # Train and evaluate
    for folder, planned in plans.items():
        if planned.kept:
            names = [name_of(command) for command in planned.kept]
            print(f"kept {folder}: {', '.join(names)}", flush=True)
    execute([(job, plans[job.folder].left) for job in jobs], args)

    # Only results of these weights count, and weights of this code
    runs = {setting.name: {} for setting in settings}
    tests = {}
    for job in jobs:
        runs[job.setting.name][str(job.seed)] = collect(job, args, tests)
    differences = report.find_differences(runs, tests, args.against)
    save(args, runs, tests, differences)

    # Show
    report.show(runs, differences)
    if args.plot:
        report.plot(runs, differences, args.plot)
    if args.curves:
        report.plot_curves(runs, tests, args.curves)


def save(args, runs, tests, differences):
    """Write compare.json."""
    contents = {"flags": vars(args), **git_state(),
                "python": platform.python_version(), "torch": torch.__version__,
                "sources": source_digests(),
                "evaluation_code": source_digests(EVALUATION_CODE),
                "rule": report.RULE, "differences": differences, "runs": runs, "tests": tests}
    text = as_json(contents)
    write_atomically(Path(args.out_dir, "compare.json"), lambda file: file.write(text.encode()))


def git_state():
    """{"commit", "dirty"} of the code, where git knows it: dirty says that tracked files were edited."""
    def git(*words):
        done = subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        commit = git("rev-parse", "HEAD")
        changes = git("status", "--porcelain", "--untracked-files=no")
    except OSError:                                         # no git
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": None if changes is None else changes != ""}

# -----------------------------------------------------------------------------
# Settings and runs

class Setting(NamedTuple):
    """One column of the comparison."""
    name: str                           # as on the command line: "dar --lookahead 4"
    words: list                         # all flags of its train.py command but --seed and --out_dir
    options: dict                       # the flags in force, {name: value}; those of the preset filled in


class Job(NamedTuple):
    """A setting with one seed, trained and evaluated in a folder. What it measured is a run of report.py."""
    setting: Setting
    seed: int
    folder: Path


def parse_setting(text, args):
    """The Setting of a string of --runs. Raises ValueError, one line, if train.py would not accept it."""
    words = shlex.split(text)
    if not words or words[0] not in OBJECTIVES:
        raise ValueError(f"--runs {text!r} must begin with one of {', '.join(OBJECTIVES)}")
    taken = [word for word in words + shlex.split(args.train) if word.split("=")[0] in OURS]
    if taken:
        raise ValueError(f"{taken[0]} is chosen by compare.py: leave it out of --runs and --train")

    # The last of two equal flags counts, so a setting's own come last
    words = ["--preset", "tiny", "--max_iters", str(args.max_iters), *shlex.split(args.train),
             "--objective", *words]
    given = parse(["train.py", *words])
    flags.fill_preset(given, pick_device(given.device))

    # What train.py would refuse
    objectives.check(given)
    unused = flags.flag_without_effect(given, Options.vocab_size)
    if unused:
        raise ValueError(f"--runs {text!r}: --{unused} has no effect on {given.objective}: "
                         "leave it out, or give it to other settings of --runs")

    options = json.loads(json.dumps(vars(given)))           # as config.json holds them
    return Setting(shlex.join(shlex.split(text)), words, options)


OURS = ["--seed", "--out_dir", "--resume", "--overwrite", "--objective"]


def parse(words):
    """Parse a command of ours by the script's own parser. Raises ValueError, one line, on a wrong flag."""
    module = "flags" if words[0] == "train.py" else words[0].removesuffix(".py")
    parser = importlib.import_module(module).build_parser()

    def error(message):
        raise ValueError(f"python {shlex.join(words)}: {message}")

    parser.error = error
    return parser.parse_args(words[1:])


def check_evaluation(words, job):
    """Raises ValueError, one line, for an evaluation that would fail, or measure another checkpoint."""
    given = parse(words)
    if given.checkpoint != [str(job.folder)] or given.results:
        raise ValueError(f"{words[0]}: --checkpoint and --results are chosen by compare.py")

    # What the script would refuse, for the model that will be trained
    module = importlib.import_module(words[0].removesuffix(".py"))
    module.check_flags(given)
    pick_device(given.device)
    if hasattr(module, "check_model"):
        options = job.setting.options
        sizes = {name: options[name] for name in ("block_size", "n_layer", "n_head", "n_embd")}
        config = Config(causal=OBJECTIVES[options["objective"]].causal, **sizes)
        module.check_model(job.setting.name, config, given)


def make_jobs(settings, args):
    """Every job, seed by seed: after the first seed each setting has a number already."""
    slugs = [re.sub(r"[^\w.]+", "-", setting.name).strip("-") for setting in settings]
    twice = [setting.name for setting, slug in zip(settings, slugs) if slugs.count(slug) > 1]
    if twice:
        raise ValueError(f"--runs names {twice[0]!r} twice")
    jobs = []
    for seed in args.seeds:
        for setting, slug in zip(settings, slugs):
            jobs.append(Job(setting, seed, Path(args.out_dir, f"{slug}-{seed}")))
    return jobs

# -----------------------------------------------------------------------------
# What is left to do. A run belongs to its code, data and flags, a result to the weights

EVALUATION_CODE = ["eval_ppl.py", "texts.py", "eval_glue.py", "features.py", "probe.py", "finetune.py",
                   "glue_data.py", "spectrum.py", "cooccurrence.py"]

# Flags that do not change what a run learns
FREE = ["out_dir", "data_dir", "resume", "overwrite", "device", "compile", "save_interval", "log_interval"]


class Command(NamedTuple):
    words: list                         # ["eval_ppl.py", "--checkpoint", ...]
    work: int                           # updates to train, or 1 for an evaluation: its time is estimated


def evaluations(job, args):
    """The commands that evaluate a trained job, as lists of words."""
    checkpoint = ["--checkpoint", str(job.folder)]
    commands = []
    if args.eval_ppl != "none":
        words = ["eval_ppl.py", *checkpoint, *shlex.split(args.eval_ppl)]
        commands.append(words)

        # A model that saw fewer masks in training than it is shown is also scored with as few
        given = parse(words)
        options = argparse.Namespace(**job.setting.options)
        most = OBJECTIVES[options.objective].most_masks(options)
        fewer = most is not None and most < options.block_size
        if fewer and given.method == "left-to-right" and given.suffix != "matched":
            commands.append([*words, "--suffix", "matched"])
    if args.eval_glue != "none":
        commands.append(["eval_glue.py", *checkpoint, *shlex.split(args.eval_glue)])
    if args.spectrum != "none":
        commands.append(["spectrum.py", *checkpoint, *shlex.split(args.spectrum)])
    return commands


class Plan(NamedTuple):
    left: list                          # Commands that are left to do
    kept: list                          # Commands that are finished


def plan(job, args):
    """The Plan of a job.

    Raises ValueError, one line, if its folder holds a run that is not this one, unless --overwrite is given.
    """
    out_dir = ["--out_dir", str(job.folder)]
    max_iters = job.setting.options["max_iters"]
    train = ["train.py", *job.setting.words, "--seed", str(job.seed), *out_dir]
    evaluate = [Command(words, 1) for words in evaluations(job, args)]

    # No run yet, or not this one
    if not Path(job.folder, "ckpt.pt").exists():
        return Plan([Command(train, max_iters), *evaluate], kept=[])
    state, config = read_checkpoint(job.folder)
    reason = mismatch(config, job)
    if reason and not args.overwrite:
        raise ValueError(f"{job.folder} was trained {reason}: --overwrite trains it again, "
                         "or take another --out_dir")
    if reason:
        return Plan([Command([*train, "--overwrite"], max_iters), *evaluate], kept=[])

    # A part of it
    if state["step"] < max_iters:
        resume = Command(["train.py", "--resume", *out_dir], max_iters - state["step"])
        return Plan([resume, *evaluate], kept=[])

    # Trained: what was measured on these weights
    weights = weights_digest(state["model"])
    done = [command for command in evaluate if finished(command.words, job, weights)]
    left = [command for command in evaluate if command not in done]
    return Plan(left, kept=[Command(train, max_iters), *done])


def name_of(command):
    """A Command's script, for the screen: "eval_ppl.py --suffix matched"."""
    matched = "matched" in command.words
    return command.words[0] + (" --suffix matched" if matched else "")


def mismatch(config, job):
    """How a trained run differs from the one asked for, such as "with another model.py". "" if it does not.

    config: the config.json of the trained run.
    """
    # Code
    now = source_digests()
    then = config.get("sources")
    if not then:
        return "by code that its config.json does not name"
    changed = [name for name in {**now, **then} if now.get(name) != then.get(name)]
    if changed:
        return f"with another {', '.join(changed)}"

    # Data. A dataset that is not there any more cannot have changed
    options = job.setting.options
    meta = Path(options["data_dir"], options["dataset"], "meta.json")
    if meta.exists() and config.get("dataset", {}).get("meta") != file_sha256(meta):
        return f"on another dataset, {meta} has changed"

    # Flags. What is left to train.py's choice cannot differ
    used = config["train"]
    for name, value in {**options, "seed": job.seed}.items():
        chosen = name not in FREE and value not in (None, "auto")
        if chosen and name in used and used[name] != value:
            return f"with {name} {used[name]}, not {value}"
    return ""


def finished(words, job, weights):
    """The JSON result of an evaluation, a command as a list of words. None if it is not finished.

    A command counts as finished once it has ended well (`mark_finished`), for the weights that it measured
    and the code that it measured them with.
    """
    line = command_line(words[0], words[1:])
    if read_finished(job).get(line) != [weights, source_digests(EVALUATION_CODE)]:
        return None
    for path in [*sorted(job.folder.glob("eval_*.json")), job.folder / "spectrum.json"]:
        result = read_result(path, weights)
        if result and result["command"] == line:
            return result
    return None


def read_finished(job):
    """{command line: [digest of the weights, digests of the code]}; {} if nothing is finished."""
    try:
        return json.loads(Path(job.folder, "finished.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def mark_finished(words, job):
    """Remember that an evaluation ended well.

    Its result alone does not say so: eval_glue.py writes it after every task.
    """
    state, _ = read_checkpoint(job.folder)
    entry = [weights_digest(state["model"]), source_digests(EVALUATION_CODE)]
    line = command_line(words[0], words[1:])
    write_json(Path(job.folder, "finished.json"), {**read_finished(job), line: entry})

# -----------------------------------------------------------------------------
# Running the commands

children = set()                        # processes that run now. They are ended with this one


def call(words, args):
    """Run one of our scripts. Raises ValueError with what it said if it fails."""
    # The jobs share the cores
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ,
                   "PYTHONIOENCODING": "utf-8",
                   "PYTHONFAULTHANDLER": "1"}           # a crash of the process itself says where
    process = subprocess.Popen([sys.executable, str(HERE / words[0]), *words[1:]], env=environment,
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               encoding="utf-8", errors="replace")
    children.add(process)
    output, _ = process.communicate()
    children.discard(process)

    # What went wrong, in its own words
    if process.returncode:
        said = [line for line in output.splitlines() if line.strip()]
        errors = [line for line in said if "error:" in line]
        last = (errors or said or ["no output"])[-1]
        raise ValueError(f"python {shlex.join(words)} failed ({how_it_ended(process.returncode)}): {last}")


def how_it_ended(code):
    """"exit code 2", or which signal ended the process, where nothing in its output can say so."""
    if code >= 0:
        return f"exit code {code}"
    memory = ", perhaps for lack of memory" if code == -9 else ""       # SIGKILL
    return f"ended by a signal: {signal.strsignal(-code)}{memory}"


def execute(plans, args):
    """Run what is left of every job, args.jobs of them in parallel, and say how much is left.

    plans: [(Job, [Command])]. If a command fails, the commands that run beside it are finished, and no other
    is begun.
    """
    # How much there is to do
    left = Counter()                    # work not yet done, by script
    for _, commands in plans:
        for command in commands:
            left[command.words[0]] += command.work
    done = Counter()                    # work done, and the seconds that it took, by script
    seconds = Counter()
    total = sum(len(commands) for _, commands in plans)
    begun = 0
    failed = False

    def time_left():
        # By the time that each script has taken per unit of work
        waiting = [script for script in left if left[script]]
        if not all(done[script] for script in waiting):
            return "time left: known once each script has run"
        rest = sum(left[script] * seconds[script] / done[script] for script in waiting)
        return f"about {rest / 60 / args.jobs:.0f} min left"

    def run(job, words, work):
        nonlocal begun
        begun += 1
        line = f"[{begun} of {total}, {time_left()}] python {shlex.join(words)}\n"
        print(line, end="", flush=True)                 # whole, whatever the other jobs print

        start = time.time()
        call(words, args)
        if words[0] != "train.py":
            mark_finished(words, job)
        left[words[0]] -= work
        done[words[0]] += work
        seconds[words[0]] += time.time() - start

    def work_on(job, commands):
        nonlocal failed
        try:
            for words, work in commands:
                if not failed:                          # nor in another job
                    run(job, words, work)
        except Exception:
            failed = True
            raise

    # The commands of a job one after the other, args.jobs jobs at a time
    pool = ThreadPoolExecutor(args.jobs)
    try:
        futures = [pool.submit(work_on, job, commands) for job, commands in plans]
        for future in as_completed(futures):
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)

# -----------------------------------------------------------------------------
# Reading the results

def collect(job, args, tests):
    """All numbers of a finished job, for compare.json. Adds the test sets to `tests`, {name: contents}.

    Raises ValueError if a result is missing or belongs to other weights.
    """
    state, config = read_checkpoint(job.folder)
    reason = mismatch(config, job)
    if reason:
        raise ValueError(f"{job.folder} was trained {reason}; it changed while this comparison ran")

    weights = weights_digest(state["model"])
    measurements = {}
    for words in evaluations(job, args):
        result = finished(words, job, weights)
        if result is None:
            raise ValueError(f"{job.folder}: no result of: python {shlex.join(words)}")
        measurements |= report.READERS[words[0]](result, tests)
    curve = report.read_curve(job.folder / "log.jsonl")
    measurements |= report.own_loss(curve)
    return {"folder": str(job.folder), "step": state["step"], "weights": weights,
            "dataset": config.get("dataset"), "measurements": measurements, "curve": curve}

# -----------------------------------------------------------------------------
# Command line

def build_parser():
    p = Parser(__doc__.split("\n\n")[0])
    p.add_argument("--runs", nargs="+", default=list(OBJECTIVES), metavar="SETTING",
                   help="an objective and flags of train.py, each setting in quotes")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2],
                   help="every setting is trained once with each")
    p.add_argument("--against", nargs="+", metavar="SETTING",
                   help="settings that the others are compared with (default: the first)")
    p.add_argument("--max_iters", type=int, default=1500,
                   help="updates of each run whose setting does not give its own")
    p.add_argument("--train", default="", metavar="FLAGS",
                   help="flags of train.py for all runs, in quotes; the preset is tiny if none is given here")
    p.add_argument("--eval_ppl", default="--val", metavar="FLAGS",
                   help="flags of eval_ppl.py, in quotes; 'none' skips it")
    p.add_argument("--eval_glue", default="--tasks stdlib", metavar="FLAGS",
                   help="flags of eval_glue.py, in quotes; 'none' skips it")
    p.add_argument("--spectrum", default="none", metavar="FLAGS",
                   help="flags of spectrum.py, in quotes ('' for its defaults); 'none' skips it")
    p.add_argument("--jobs", type=int, default=1, help="runs in parallel; on a CPU they share the cores")
    p.add_argument("--out_dir", default="out/compare", help="a folder for each run, and compare.json")
    p.add_argument("--overwrite", action="store_true",
                   help="train runs again that were made with other code, data or flags")
    p.add_argument("--plot", metavar="FILE", help="draw perplexity by prompt length and probe gains")
    p.add_argument("--curves", metavar="FILE", help="draw validation loss by tokens seen")
    return p


def check(args):
    """Everything that can be wrong with the command line, before any run begins.

    Returns the settings. Raises ValueError, one line.
    """
    # Numbers and figures
    if args.jobs < 1:
        raise ValueError(f"jobs must be at least 1, not {args.jobs}")
    if len(set(args.seeds)) < len(args.seeds):
        raise ValueError("seeds must differ")
    check_plot(args.plot)
    check_plot(args.curves)

    # Settings, and which of them the others are compared with
    settings = [parse_setting(text, args) for text in args.runs]
    names = [setting.name for setting in settings]
    args.against = [shlex.join(shlex.split(text)) for text in args.against or args.runs[:1]]
    unknown = [name for name in args.against if name not in names]
    if unknown:
        raise ValueError(f"--against {unknown[0]!r} is not one of the runs: {', '.join(names)}")
    return settings


def join_quoted(words):
    """argparse would take the value in `--eval_ppl "--val"` for a flag of ours: --eval_ppl=--val is safe."""
    out = []
    for word in words:
        if out and out[-1] in ("--train", "--eval_ppl", "--eval_glue", "--spectrum"):
            out[-1] += f"={word}"
        else:
            out.append(word)
    return out


def main(argv=None):
    args = build_parser().parse_args(join_quoted(sys.argv[1:] if argv is None else argv))

    def stop(number, frame):                                # the scripts save and end, then so do we
        for process in list(children):
            process.terminate()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    with one_line_errors():
        try:
            compare(args)
        except KeyboardInterrupt:
            print("stopped; run the same command again to resume", file=sys.stderr)
            sys.exit(130)
        finally:
            signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    main()
