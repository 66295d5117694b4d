"""
Compare the objectives, or any other settings of train.py: same data, same number of tokens, several seeds.

    python compare.py                                   # the four objectives; about an hour on 2 cores
    python compare.py --runs "ar" "dar --lookahead 4" "mlm --mask_ratio 0.3" "vlm --mask_range 0.4 0.6"
    python compare.py --seeds 0 --max_iters 200         # a quick look
    python compare.py --against ar mlm --plot claims.png --curves curves.png
    python compare.py --train "--preset small --dataset mine" --eval_ppl "--text book.txt" --eval_glue none

Every setting is an objective and flags of train.py, and becomes one column. compare.py runs train.py,
eval_ppl.py and eval_glue.py for every setting and seed, as one would by hand, in OUT_DIR/SETTING-SEED.
Finished commands are skipped, so an interrupted comparison resumes, and can be extended with more seeds and
settings. A run that was made with other code, data or flags is refused, and a number counts only for the
weights it was measured on. Everything goes to OUT_DIR/compare.json, with what is needed to redo the errors.

Settings are compared by the difference of runs with the same seed, averaged over the seeds. A difference of
log perplexities is printed as a ratio of perplexities; one of probes in points. It has two errors:

    over seeds     se_seeds = (standard deviation of the differences) / sqrt(number of seeds)
    over the test  se_test = standard deviation of the mean difference over resamples of the test documents
                   (examples, where they are independent), the same for both settings and all seeds

A difference is shown if it has the same sign in every seed and
|mean| > sqrt((t se_seeds)^2 + (2 se_test)^2), with Student's t for that many seeds (3 seeds: 4.30).
Otherwise it may be chance: other seeds, or another text, could turn it round.

Why t and not 2: the spread of three seeds is itself uncertain. With 2, pure noise between seeds would pass in
18 % of all cases; with t in 5 %. That holds per row: of 40 rows without any difference, two may pass.
"""
import argparse
import hashlib
import importlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

import flags
import objectives
from common import (Help, as_json, check_plot, file_sha256, one_line_errors, read_checkpoint, read_result,
                    save_figure, source_digests, weights_digest, write_atomically, write_json)
from glue_data import METRICS
from objectives import OBJECTIVES

HERE = Path(__file__).parent
RULE = next(part for part in __doc__.split("\n\n") if part.startswith("A difference is shown"))

# -----------------------------------------------------------------------------
# Errors: is a difference more than chance?

RESAMPLES = 500

# Student's t, 97.5 % quantile, by number of seeds (with one seed nothing is known about their spread)
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


def resample(statistic, n):
    """A statistic of n independent test units (documents, examples) and its resamples:
    (1 + RESAMPLES,) float64.

    statistic(times) -> float, where times (n,) says how often each unit counts: first 1 for all of them,
    then as often as it is drawn when n units are drawn with replacement. The draws depend on n alone. So
    all runs see the same ones, and a difference of two results is paired.
    """
    rng = np.random.default_rng(0)
    values = [statistic(np.ones(n, dtype=np.int64))]
    for _ in range(RESAMPLES):
        drawn = rng.integers(n, size=n)
        values.append(statistic(np.bincount(drawn, minlength=n)))
    return np.array(values)


def resample_perplexity(measured):
    """Mean nats per token, (1 + RESAMPLES,): the documents are resampled."""
    nats = np.array(measured["nats"])               # (documents,), sums over the scored tokens
    tokens = np.array(measured["tokens"])           # (documents,), how many those are

    def mean_nats(times):
        return times @ nats / max(1, times @ tokens)

    return resample(mean_nats, len(nats))


def resample_probe(measured, test):
    """A probe's metric in points, (1 + RESAMPLES,): the groups of test examples are resampled."""
    predicted = decode(measured["predictions"])     # (examples,)
    true = decode(test["labels"])                   # (examples,)
    metric = METRICS[measured["metric"]]
    group = np.arange(len(true))
    if test["groups"] is not None:
        group = np.unique(test["groups"], return_inverse=True)[1]

    def points(times):
        index = np.repeat(np.arange(len(true)), times[group])
        return 100 * metric(predicted[index], true[index])

    return resample(points, group.max() + 1)


def decode(values):
    """Classes, one base-36 digit per example ("0a2" -> [0, 10, 2]), or a list of scores, as an array."""
    if isinstance(values, str):
        return np.array([int(digit, 36) for digit in values])
    return np.array(values)


def resample_run(run, tests):
    """{measurement: (1 + RESAMPLES,)} of one run, as `collect` returns it."""
    out = {}
    for name, measured in run["measurements"].items():
        if "nats" in measured:
            out[name] = resample_perplexity(measured)
        elif "predictions" in measured:
            out[name] = resample_probe(measured, tests[measured["test"]])
        elif "minus" in measured:                   # a gain: model less embeddings, on the same resamples
            out[name] = out[measured["of"]] - out[measured["minus"]]
    return out


def errors(pairs):
    """The difference of two settings with both errors and the verdict, as a dict.

    pairs: [(a, b)] of arrays (1 + RESAMPLES,), one pair per seed. "se_seeds" is None with one seed; then
    "shown" is None too, as nothing can be said.
    """
    differences = np.array([a - b for a, b in pairs])       # (seeds, 1 + RESAMPLES)
    by_seed = differences[:, 0]
    mean = float(by_seed.mean())
    se_test = float(differences.mean(axis=0)[1:].std(ddof=1))
    se_seeds = None
    shown = None
    if len(pairs) > 1:
        se_seeds = float(by_seed.std(ddof=1) / math.sqrt(len(pairs)))
        shown = is_shown(by_seed, se_test)
    return {"mean": mean, "by_seed": by_seed.tolist(), "se_seeds": se_seeds, "se_test": se_test,
            "shown": shown}


def is_shown(by_seed, se_test):
    """The rule at the top of this file. by_seed: (seeds,) differences, at least two."""
    n = len(by_seed)
    t = STUDENT.get(n, STUDENT[10])                         # more than ten: a little too strict
    se_seeds = by_seed.std(ddof=1) / math.sqrt(n)
    same_sign = (by_seed > 0).all() or (by_seed < 0).all()
    return bool(same_sign and abs(by_seed.mean()) > math.hypot(t * se_seeds, 2 * se_test))


def compare(runs, tests, against):
    """Every setting against each of the settings in `against`: a list of dicts, one per measurement.

    runs: {setting: {seed: run}}. runs and tests are as in compare.json.
    """
    samples = {}
    for setting, by_seed in runs.items():
        samples[setting] = {seed: resample_run(run, tests) for seed, run in by_seed.items()}

    out = []
    for setting, reference in pairs_of_settings(list(runs), against):
        for name in names_to_compare(runs[setting], runs[reference]):
            pairs = []
            same_test = True
            for seed in runs[setting]:
                a = find(name, runs[setting].get(seed))
                b = find(name, runs[reference].get(seed))
                if a and b:
                    pairs.append((samples[setting][seed][a], samples[reference][seed][b]))
                    same_test &= test_of(runs[setting][seed], a) == test_of(runs[reference][seed], b)
            if not pairs:
                continue
            found = errors(pairs)
            if not same_test:                       # another text or other labels cannot be paired
                found |= {"se_test": None, "shown": None}
            out.append({"setting": setting, "against": reference, "measurement": name, **found})
    return out


def pairs_of_settings(settings, against):
    """[(setting, reference)], no pair twice."""
    pairs = []
    for reference in against:
        for setting in settings:
            if setting != reference and (reference, setting) not in pairs:
                pairs.append((setting, reference))
    return pairs


def names_to_compare(*by_seeds):
    """The measurements that any of these runs has, without the baselines, in the table's order."""
    names = {}
    for by_seed in by_seeds:
        for run in by_seed.values():
            names |= {name: None for name, measured in run["measurements"].items()
                      if "test" in measured and not measured.get("baseline")}
    return list(names)


def find(name, run):
    """The name under which a run has a measurement; None if it does not have it.

    A model that has seen every number of masks in training has no line "masks as in training" of its own:
    its plain line is that.
    """
    if run is None:
        return None
    candidates = [name, name.removesuffix(MATCHED)]
    return next((name for name in candidates if name in run["measurements"]), None)


def test_of(run, name):
    return run["measurements"][name]["test"]

# -----------------------------------------------------------------------------
# What the evaluations of a run have left, as {measurement: numbers}

MATCHED = ", masks as in training"
UNIGRAM = "perplexity, word frequencies alone"
BASELINES = {"embeddings": "its input embeddings", "untrained": "before training"}


def collect(run, args, tests):
    """All numbers of a finished run, for compare.json. Adds the test sets to `tests`, {name: contents}.

    Raises ValueError if a result is missing or belongs to other weights.
    """
    state, config = read_checkpoint(run.folder)
    weights = weights_digest(state["model"])
    out = {"folder": str(run.folder), "step": state["step"], "weights": weights,
           "dataset": config.get("dataset"), "measurements": {}}
    reason = mismatch(config, run)
    if reason:
        raise ValueError(f"{run.folder} was trained {reason}; it changed while this comparison ran")
    for words in evaluations(run, args):
        report = finished(words, run, weights)
        if report is None:
            raise ValueError(f"{run.folder}: no result of: python {shlex.join(words)}")
        read = perplexities if words[0] == "eval_ppl.py" else probes
        out["measurements"] |= read(report, tests)
    return out


def perplexities(report, tests):
    """The measurements in a report of eval_ppl.py."""
    documents = report["documents"]
    test = remember(tests, report["text"], {"text_sha256": report.get("text_sha256"), **documents})
    kind = MATCHED if report["suffix"] == "matched" else ""

    out = {}
    for k in [*report["prompt_lengths"], "all"]:
        name = f"perplexity, all{kind}" if k == "all" else f"perplexity after {k}{kind}"
        result = report["all"] if k == "all" else report["prompt_lengths"][k]
        out[name] = {"value": result["perplexity"], "test": test, "tokens": report["tokens"][k],
                     "nats": [round(nats, 3) for nats in report["nats"][k]]}
    if report["unigram"] and not kind:
        out[UNIGRAM] = {"value": report["unigram"]["perplexity"]}
    return out


def probes(report, tests):
    """The measurements in a report of eval_glue.py: the model, its baseline, and the gain over it."""
    out = {}
    for row in report["results"]:
        contents = report["tests"][row["task"]]
        test = remember(tests, row["task"], {"labels": contents["labels"], "groups": contents["groups"]})
        source = "embeddings" if row.get("embeddings") else "untrained"

        # Whatever makes two rows of one task differ belongs into the name
        name = f"{row['task']}, {row['metric']}, {row['pool']}"
        if row["layer"] is not None:
            name += f", layer {row['layer']}"
        if row["directions"] is not None:
            name += f", {row['directions']} directions"
        if row["max_train"]:
            name += f", {row['max_train']} examples"
        if row["protocol"] == "finetune":
            name += ", fine-tuned"
        baseline = f"{name}: {BASELINES[source]}"
        gain = f"{name}: gain over {BASELINES[source]}"

        # The three lines of the table
        common = {"test": test, "metric": row["metric"]}
        out[name] = {"value": 100 * row["model"]["value"], **common,
                     "predictions": row["model"]["predictions"]}
        out[baseline] = {"value": 100 * row[source]["value"], **common, "baseline": True,
                         "predictions": row[source]["predictions"]}
        out[gain] = {"value": out[name]["value"] - out[baseline]["value"], "test": test,
                     "of": name, "minus": baseline}
    return out


def remember(tests, name, contents):
    """Store a test set once; returns its key, which two runs share only if it is the same for both."""
    digest = hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
    key = f"{name} {digest[:8]}"
    tests[key] = contents
    return key

# -----------------------------------------------------------------------------
# Tables, in Markdown

def table(runs):
    """One column per setting: mean over the seeds [least, greatest]."""
    rows = [["", *runs]]
    names = {name: None for by_seed in runs.values() for run in by_seed.values()
             for name in run["measurements"]}
    for name in names:
        row = [name]
        for by_seed in runs.values():
            found = [run["measurements"].get(name) for run in by_seed.values()]
            row.append(spread([measured["value"] for measured in found if measured]))
        rows.append(row)
    return markdown(rows)


def spread(values):
    """Mean [least, greatest], with as many digits as make sense."""
    if not values:
        return "-"
    mean = np.mean(values)
    digits = 0 if mean >= 100 else 1
    return f"{mean:.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def difference_table(differences):
    """One row per difference: mean over seeds [least, greatest], both errors, and the verdict."""
    rows = [["difference", "measurement", "mean over seeds", "se seeds", "se test", "verdict"]]
    for found in differences:
        mean = found["mean"]
        least = min(found["by_seed"])
        greatest = max(found["by_seed"])

        # Nats become a ratio, points stay points
        sign, unit, digits, scale = "-", "points", 1, 1.0
        if found["measurement"].startswith("perplexity"):
            sign, unit, digits = "/", "ratio", 3
            mean, least, greatest = np.exp([mean, least, greatest])
            scale = mean                            # of an error: d exp(x) = exp(x) dx

        def error(kind):
            return "-" if found[kind] is None else f"{scale * found[kind]:.{digits}f}"

        verdict = {True: "shown", False: "not shown", None: "-"}[found["shown"]]
        rows.append([f"{found['setting']} {sign} {found['against']}",
                     f"{found['measurement']}, {unit}",
                     f"{mean:.{digits}f} [{least:.{digits}f}, {greatest:.{digits}f}]",
                     error("se_seeds"), error("se_test"), verdict])
    return markdown(rows)


def markdown(rows):
    """Rows of strings as a Markdown table that also reads well on a screen. The first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |"
             for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)

# -----------------------------------------------------------------------------
# Settings and runs

class Setting(NamedTuple):
    name: str                           # as on the command line: "dar --lookahead 4"
    words: list                         # all flags of its train.py command but --seed and --out_dir
    options: dict                       # the flags in force, {name: value}; those of the preset filled in


class Run(NamedTuple):
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
    options = vars(parse(["train.py", *words]))
    for name, value in flags.PRESETS[options["preset"]].items():
        if options[name] is None:
            options[name] = value
    objectives.check(argparse.Namespace(**options))
    return Setting(shlex.join(shlex.split(text)), words, json.loads(json.dumps(options)))


OURS = ["--seed", "--out_dir", "--resume", "--overwrite", "--objective"]


def parse(words):
    """Parse a command of ours by the script's own parser. Raises ValueError, one line, on a wrong flag."""
    module = "flags" if words[0] == "train.py" else words[0].removesuffix(".py")
    parser = importlib.import_module(module).build_parser()

    def error(message):
        raise ValueError(f"python {shlex.join(words)}: {message}")

    parser.error = error
    return parser.parse_args(words[1:])


def make_runs(settings, args):
    """Every run, seed by seed: after the first seed there is already a table's worth of each setting."""
    slugs = [re.sub(r"[^\w.]+", "-", setting.name).strip("-") for setting in settings]
    twice = [setting.name for setting, slug in zip(settings, slugs) if slugs.count(slug) > 1]
    if twice:
        raise ValueError(f"--runs names {twice[0]!r} twice")
    return [Run(setting, seed, Path(args.out_dir, f"{slug}-{seed}"))
            for seed in args.seeds for setting, slug in zip(settings, slugs)]

# -----------------------------------------------------------------------------
# What is left to do. A run belongs to its code, data and flags, a result to the weights

EVALUATION_CODE = ["eval_ppl.py", "eval_glue.py", "glue_data.py", "probe.py"]

# Flags that do not change what a run learns
FREE = ["out_dir", "data_dir", "resume", "overwrite", "device", "compile", "save_interval", "log_interval"]


class Command(NamedTuple):
    words: list                         # ["eval_ppl.py", "--checkpoint", ...]
    work: int                           # updates to train, or 1: in what its time is estimated


def evaluations(run, args):
    """The commands that evaluate a run, as lists of words.

    A model that saw fewer masks in training than eval_ppl.py shows it is also scored with as few.
    """
    checkpoint = ["--checkpoint", str(run.folder)]
    commands = []
    if args.eval_ppl != "none":
        command = ["eval_ppl.py", *checkpoint, *shlex.split(args.eval_ppl)]
        commands.append(command)
        options = argparse.Namespace(**run.setting.options)
        most = OBJECTIVES[options.objective].most_masks(options)
        if most is not None and most < options.block_size:
            commands.append([*command, "--suffix", "matched"])
    if args.eval_glue != "none":
        commands.append(["eval_glue.py", *checkpoint, *shlex.split(args.eval_glue)])
    return commands


def plan(run, args):
    """(Commands that are left to do, those of them that are finished) of a run.

    Raises ValueError, one line, if its folder holds a run that is not this one, unless --overwrite is given.
    """
    out_dir = ["--out_dir", str(run.folder)]
    max_iters = run.setting.options["max_iters"]
    train = ["train.py", *run.setting.words, "--seed", str(run.seed), *out_dir]
    evaluate = [Command(words, 1) for words in evaluations(run, args)]

    # No run yet, or not this one
    if not Path(run.folder, "ckpt.pt").exists():
        return [Command(train, max_iters), *evaluate], []
    state, config = read_checkpoint(run.folder)
    reason = mismatch(config, run)
    if reason and not args.overwrite:
        raise ValueError(f"{run.folder} was trained {reason}: --overwrite trains it again, "
                         "or take another --out_dir")
    if reason:
        return [Command([*train, "--overwrite"], max_iters), *evaluate], []

    # A part of it
    if state["step"] < max_iters:
        resume = ["train.py", "--resume", *out_dir]
        return [Command(resume, max_iters - state["step"]), *evaluate], []

    # Trained: what was measured on these weights
    weights = weights_digest(state["model"])
    done = [command for command in evaluate if finished(command.words, run, weights)]
    left = [command for command in evaluate if command not in done]
    return left, [Command(train, max_iters), *done]


def mismatch(config, run):
    """How a trained run, with this config.json, differs from the one asked for: "with another model.py".
    "" if it does not.
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
    options = run.setting.options
    meta = Path(options["data_dir"], options["dataset"], "meta.json")
    if meta.exists() and config.get("dataset", {}).get("meta") != file_sha256(meta):
        return f"on another dataset, {meta} has changed"

    # Flags. What is left to train.py's choice cannot differ
    used = config["train"]
    for name, value in {**options, "seed": run.seed}.items():
        chosen = name not in FREE and value not in (None, "auto")
        if chosen and name in used and used[name] != value:
            return f"with {name} {used[name]}, not {value}"
    return ""


def finished(words, run, weights):
    """The JSON report of an evaluation, None if it is not finished: a command counts as finished once it
    ended well (`mark_finished`), for the weights and the code it measured.
    """
    command = shlex.join(["python", *words])
    if read_finished(run).get(command) != [weights, source_digests(EVALUATION_CODE)]:
        return None
    for path in sorted(run.folder.glob("eval_*.json")):
        report = read_result(path, weights)
        if report and report["command"] == command:
            return report
    return None


def read_finished(run):
    """{command: [digest of the weights, digests of the code]}; {} if nothing is finished."""
    try:
        return json.loads(Path(run.folder, "finished.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def mark_finished(words, run):
    """Remember that an evaluation ended well. Its report alone does not say so: eval_glue.py writes it
    after every task.
    """
    state, _ = read_checkpoint(run.folder)
    entry = [weights_digest(state["model"]), source_digests(EVALUATION_CODE)]
    command = shlex.join(["python", *words])
    write_json(Path(run.folder, "finished.json"), {**read_finished(run), command: entry})

# -----------------------------------------------------------------------------
# Running the commands

children = set()                        # processes that run now, to be ended with this one


def call(words, args):
    """Run one of our scripts. Raises ValueError with what it said if it fails."""
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONIOENCODING": "utf-8"}
    process = subprocess.Popen([sys.executable, str(HERE / words[0]), *words[1:]], env=environment,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               encoding="utf-8", errors="replace")
    children.add(process)
    output, _ = process.communicate()
    children.discard(process)
    if process.returncode:
        said = [line for line in output.splitlines() if line.strip()] or ["no output"]
        errors = [line for line in said if "error:" in line] or said
        raise ValueError(f"python {shlex.join(words)} failed (exit code {process.returncode}): "
                         f"{errors[-1]}")


def execute(plans, args):
    """Run what is left of every run, args.jobs runs in parallel, and say how much is left.

    plans: [(run, [Command])]. If one command fails, those that run now are finished, and the rest is not
    begun.
    """
    left = Counter()                    # work not yet done, by script
    for _, commands in plans:
        for command in commands:
            left[command.words[0]] += command.work
    done = Counter()                    # work done, and the seconds that it took, by script
    seconds = Counter()
    total = sum(len(commands) for _, commands in plans)
    begun = 0

    def time_left():
        if any(left[script] and not done[script] for script in left):
            return "time left: known once each script has run"
        rest = sum(left[script] * seconds[script] / done[script] for script in left if left[script])
        return f"about {rest / 60 / args.jobs:.0f} min left"

    def work_on(run, commands):
        nonlocal begun
        for words, work in commands:
            begun += 1
            line = f"[{begun} of {total}, {time_left()}] python {shlex.join(words)}\n"
            print(line, end="", flush=True)             # whole, whatever the other jobs print
            start = time.time()
            call(words, args)
            if words[0] != "train.py":
                mark_finished(words, run)
            left[words[0]] -= work
            done[words[0]] += work
            seconds[words[0]] += time.time() - start

    pool = ThreadPoolExecutor(args.jobs)
    try:
        futures = [pool.submit(work_on, run, commands) for run, commands in plans]
        for future in futures:
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)

# -----------------------------------------------------------------------------
# Figures. Colours that the colour-blind can tell apart (Okabe and Ito 2008), and markers besides

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"]
MARKERS = "osD^vP*X"


def style(i):
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 5}


def plot(runs, tests, path):
    """The paper's two sides in one figure: generation (perplexity by prompt length) and what linear
    probes read from context (gain over the input embeddings). Bands and bars: lowest and highest seed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    plot_perplexity(runs, left)
    plot_gains(runs, tests, right)
    save_figure(figure, path)


def draw_curves(runs, axes, points):
    """One curve per setting, with a band over its seeds. points(run): the (x, y) of one run.

    Returns [(last x, last y, setting, colour), ...] for `label_ends`.
    """
    ends = []
    for i, (setting, by_seed) in enumerate(runs.items()):
        # {x: values of the seeds}
        curve = {}
        for run in by_seed.values():
            for x, y in points(run):
                curve.setdefault(x, []).append(y)
        if curve:
            xs = sorted(curve)
            band(axes, xs, [curve[x] for x in xs], i)
            last = xs[-1]
            ends.append((last, np.mean(curve[last]), setting, style(i)["color"]))
    return ends


def perplexity_points(run):
    """Yield (prompt length, perplexity) of a run."""
    for name, measured in run["measurements"].items():
        found = re.fullmatch(r"perplexity after (\d+)", name)
        if found:
            yield int(found[1]), measured["value"]


def loss_points(run):
    """Yield (million tokens, validation loss) of a run."""
    for line in read_log(Path(run["folder"], "log.jsonl")):
        if "val_loss" in line:
            yield line["tokens"] / 1e6, line["val_loss"]


def plot_perplexity(runs, axes):
    ends = draw_curves(runs, axes, perplexity_points)
    level = without_context(runs)
    if level:
        dotted(axes, level)
    axes.set(xscale="log", yscale="log", xlabel="prompt length (tokens)",
             ylabel="perplexity of the next token", title="Generation (lower is better)")
    plain_numbers(axes.yaxis)
    label_ends(axes, ends)
    if ends:
        lengths = set()
        for by_seed in runs.values():
            for run in by_seed.values():
                lengths |= {k for k, _ in perplexity_points(run)}
        ticks = [k for k in sorted(lengths) if math.log2(k) % 2 == 0]
        axes.set_xticks(ticks, ticks, minor=False)
        axes.set_xticks([], minor=True)


def band(axes, x, values, i):
    """Mean over seeds as a line, lowest to highest as a band. values: one list per x."""
    axes.fill_between(x, [min(v) for v in values], [max(v) for v in values], alpha=0.2, linewidth=0,
                      color=style(i)["color"])
    axes.plot(x, [np.mean(v) for v in values], **style(i))


def without_context(runs):
    """The perplexity of word frequencies alone, None if it was not measured."""
    for by_seed in runs.values():
        for run in by_seed.values():
            if UNIGRAM in run["measurements"]:
                return run["measurements"][UNIGRAM]["value"]
    return None


def dotted(axes, level):
    axes.axhline(level, color="gray", linestyle=":")
    axes.annotate("word frequencies alone", (1, level), xycoords=("axes fraction", "data"),
                  xytext=(0, 3), textcoords="offset points", color="gray", fontsize=9, ha="right")


def plain_numbers(axis):
    """5, 10, 20, 50, 100, ... along a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def label_ends(axes, ends):
    """Write each setting at the end of its line. Labels that would overlap are moved apart."""
    axes.spines[["top", "right"]].set_visible(False)        # room for the labels
    axes.figure.draw_without_rendering()                    # settles the scales
    gap = 13                                                # points, the height of a label
    above = -math.inf
    for x, y, setting, colour in sorted(ends, key=lambda end: end[1]):
        height = axes.transData.transform((x, y))[1] * 72 / axes.figure.dpi
        placed = max(height, above + gap)
        above = placed
        axes.annotate(setting, (x, y), xytext=(8, placed - height), textcoords="offset points",
                      color=colour, va="center", annotation_clip=False)


def plot_gains(runs, tests, axes):
    # {measurement: name below the axis}
    names = {}
    for by_seed in runs.values():
        for run in by_seed.values():
            names |= {name: name.split(": gain")[0].replace(", accuracy", "").replace(", ", "\n")
                      for name, measured in run["measurements"].items() if "minus" in measured}

    for i, (setting, by_seed) in enumerate(runs.items()):
        samples = [resample_run(run, tests) for run in by_seed.values()]
        shift = (i - (len(runs) - 1) / 2) * 0.8 / len(runs)         # side by side within a measurement
        label = setting
        for x, name in enumerate(names):
            gains = np.array([sample[name] for sample in samples if name in sample])
            if not len(gains):
                continue
            # Dot: mean. Thick bar: lowest to highest seed. Whisker: standard error over test examples
            mean = gains[:, 0].mean()
            se = gains.mean(axis=0)[1:].std(ddof=1)
            colour = style(i)["color"]
            axes.plot([x + shift] * 2, [gains[:, 0].min(), gains[:, 0].max()], color=colour, alpha=0.35,
                      linewidth=7, solid_capstyle="butt")
            axes.errorbar(x + shift, mean, se, capsize=3, linewidth=1, label=label, **style(i))
            label = None                                            # once in the legend

    axes.spines[["top", "right"]].set_visible(False)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(names)), names.values())
    axes.set(ylabel="points above its input embeddings",
             title="Linear probes (higher is better)")
    if names:
        axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4,
                           frameon=False)


def plot_curves(runs, path):
    """Validation loss of each setting by tokens seen. The loss is that of its own objective."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    ends = draw_curves(runs, axes, loss_points)
    level = without_context(runs)
    if level:
        dotted(axes, math.log(level))
    axes.set(xlabel="tokens seen (millions)", ylabel="validation loss (nats per scored token)",
             title="Each objective's own loss")
    label_ends(axes, ends)
    save_figure(figure, path)


def read_log(path):
    """The lines of a log.jsonl, without damaged ones."""
    out = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            out.append(json.loads(line))
        except ValueError:
            continue
    return out

# -----------------------------------------------------------------------------
# Command line

def build_parser():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=Help)
    p.add_argument("--runs", nargs="+", default=list(OBJECTIVES), metavar="SETTING",
                   help="an objective and flags of train.py, each setting in quotes")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2],
                   help="every setting is trained once with each")
    p.add_argument("--against", nargs="+", metavar="SETTING",
                   help="settings that the others are compared with (default: the first)")
    p.add_argument("--max_iters", type=int, default=1500,
                   help="updates of each run, unless its setting says otherwise")
    p.add_argument("--train", default="", metavar="FLAGS",
                   help="flags of train.py for all runs, in quotes; the preset is tiny unless given here")
    p.add_argument("--eval_ppl", default="--val", metavar="FLAGS",
                   help="flags of eval_ppl.py, in quotes; none leaves it out")
    p.add_argument("--eval_glue", default="--tasks stdlib", metavar="FLAGS",
                   help="flags of eval_glue.py, in quotes; none leaves it out")
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
    if args.jobs < 1:
        raise ValueError(f"jobs must be at least 1, not {args.jobs}")
    if len(set(args.seeds)) < len(args.seeds):
        raise ValueError("seeds must differ")
    check_plot(args.plot)
    check_plot(args.curves)
    settings = [parse_setting(text, args) for text in args.runs]
    names = [setting.name for setting in settings]
    args.against = [shlex.join(shlex.split(text)) for text in args.against or args.runs[:1]]
    unknown = [name for name in args.against if name not in names]
    if unknown:
        raise ValueError(f"--against {unknown[0]!r} is not one of the runs: {', '.join(names)}")
    return settings


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


def run(args):
    """Train and evaluate what is left, then write compare.json and print the tables."""
    settings = check(args)
    runs = make_runs(settings, args)
    for one in runs:
        for words in evaluations(one, args):
            parse(words)

    # What is finished, what is left
    plans = []
    for one in runs:
        left, kept = plan(one, args)
        plans.append((one, left))
        if kept:
            print(f"kept {one.folder}: " + ", ".join(name_of(command) for command in kept), flush=True)
    execute([(one, left) for one, left in plans if left], args)

    # Collect: only what belongs to these weights, and weights that belong to this code
    results = {setting.name: {} for setting in settings}
    tests = {}
    for one in runs:
        results[one.setting.name][str(one.seed)] = collect(one, args, tests)
    differences = compare(results, tests, args.against)
    report = {"flags": vars(args), **git_state(), "sources": source_digests(),
              "evaluation_code": source_digests(EVALUATION_CODE), "rule": RULE,
              "differences": differences, "runs": results, "tests": tests}
    path = Path(args.out_dir, "compare.json")
    write_atomically(path, lambda file: file.write(as_json(report).encode()))

    # Show
    if args.eval_ppl != "none" or args.eval_glue != "none":
        print(f"\nmean over seeds {args.seeds} [least, greatest]; probes in percent\n\n{table(results)}")
    if differences:
        print(f"\n{RULE}\n\n{difference_table(differences)}")
    if args.plot:
        plot(results, tests, args.plot)
    if args.curves:
        plot_curves(results, args.curves)


def name_of(command):
    matched = "matched" in command.words
    return command.words[0] + (" --suffix matched" if matched else "")


def join_quoted(words):
    """argparse would take the value in `--eval_ppl "--val"` for a flag of ours: --eval_ppl=--val is safe."""
    out = []
    for word in words:
        if out and out[-1] in ("--train", "--eval_ppl", "--eval_glue"):
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
    try:
        with one_line_errors():
            run(args)
    except KeyboardInterrupt:
        print("stopped; run the same command again to resume", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    main()
