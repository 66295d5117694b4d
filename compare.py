"""
The paper's claims, measured: four objectives, the same model, data and number of tokens, several seeds.

    python compare.py                                   # 3 seeds; about an hour on 2 cores
    python compare.py --seeds 0 --max_iters 200         # a quick look
    python compare.py --train "--preset small --dataset mine" --eval_ppl "--text book.txt"

Runs train.py, eval_ppl.py and eval_glue.py for every objective and seed, as one would by hand, in
OUT_DIR/OBJECTIVE-SEED. What the same commands have done already is not done again, so a run goes on where it
was stopped, and takes further seeds or objectives; other flags need another OUT_DIR. At the end: a table of
means over the seeds with [least, greatest], and each claim as differences between runs of the same seed
(which share their data order). All numbers go to OUT_DIR/compare.json.
"""
import argparse
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from common import one_line_errors, read_checkpoint, write_json
from objectives import OBJECTIVES

HERE = Path(__file__).parent

# -----------------------------------------------------------------------------
# Running

def evaluations(objective, folder, args):
    """The command lines that evaluate a run. mlm is also scored with as few masks as it was trained with."""
    ppl = ["eval_ppl.py", "--checkpoint", str(folder), *shlex.split(args.eval_ppl)]
    matched = [[*ppl, "--suffix", "matched"]] if objective == "mlm" else []
    return [ppl, *matched, ["eval_glue.py", "--checkpoint", str(folder), *shlex.split(args.eval_glue)]]


def report(command, folder):
    """What a command has left in the folder, a dict; None if there is nothing of it."""
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("eval_*.json"))]
    return next((r for r in reports if r["command"] == shlex.join(["python", *command])), None)


def call(command, args):
    """Run one of our scripts; raises ValueError with what it said if it fails."""
    print(f"python {shlex.join(command)}\n", end="", flush=True)     # a whole line at once
    threads = str(max(1, (os.cpu_count() or 1) // args.jobs))
    done = subprocess.run([sys.executable, str(HERE / command[0]), *command[1:]], capture_output=True,
                          text=True, env={"OMP_NUM_THREADS": threads, **os.environ})
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        errors = [line for line in said if "error:" in line] or said or ["it said nothing"]
        raise ValueError(f"python {shlex.join(command)} failed: {errors[-1]}")


def one_run(objective, seed, args):
    """Train and evaluate, unless that is done."""
    folder = Path(args.out_dir, f"{objective}-{seed}")
    begun = (folder / "ckpt.pt").exists()
    if not begun:
        call(["train.py", "--objective", objective, "--seed", str(seed), "--max_iters", str(args.max_iters),
              *shlex.split(args.train), "--out_dir", str(folder)], args)
    elif read_checkpoint(folder)[0]["step"] < args.max_iters:
        call(["train.py", "--resume", "--out_dir", str(folder)], args)
    for command in evaluations(objective, folder, args):
        done = report(command, folder)
        if not done or done["step"] != args.max_iters:
            call(command, args)

# -----------------------------------------------------------------------------
# Collecting

def numbers(objective, seed, args):
    """{name of a measurement: number} of one run: what its evaluations have left."""
    folder, out = Path(args.out_dir, f"{objective}-{seed}"), {}
    *scores, glue = [report(command, folder) for command in evaluations(objective, folder, args)]
    for score in scores:
        kind = ", suffix matched" if score["suffix"] == "matched" else ""
        for k, result in score["prompt_lengths"].items():
            out[f"perplexity after {k}{kind}"] = result["perplexity"]
        out[f"perplexity, all{kind}"] = score["all"]["perplexity"]
    for row in glue["results"]:
        name = f"{row['task']}, {row['metric']}, {row['pool']}"
        out[name] = 100 * row["model"]["value"]
        out[f"{name}: its input embeddings"] = 100 * row["embeddings"]["value"]
    return out


def cell(values):
    """Mean over seeds [least, greatest]."""
    if not len(values):
        return "-"
    digits = 0 if np.mean(values) >= 100 else 1
    return f"{np.mean(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def table(results, objectives):
    """Markdown; results: {objective: {seed: {name: number}}}."""
    names = list(dict.fromkeys(name for runs in results.values() for run in runs.values() for name in run))
    lines = ["| | " + " | ".join(objectives) + " |", "|---" * (len(objectives) + 1) + "|"]
    for name in names:
        cells = [cell([run[name] for run in results[o].values() if name in run]) for o in objectives]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def claims(results):
    """One line a claim and measurement: the paired difference, or ratio, of two objectives over the seeds."""
    lines = []
    def paired(a, b, name, other=None):
        seeds = [s for s in results.get(a, {}) if s in results.get(b, {})]
        pairs = [(results[a][s].get(name), results[b][s].get(other or name)) for s in seeds]
        return np.array([pair for pair in pairs if None not in pair]).reshape(-1, 2).T

    names = list(next(iter(next(iter(results.values())).values())))
    for name in [n for n in names if "perplexity" not in n and "embeddings" not in n]:
        for a, b in [(o, "ar") for o in results if o != "ar"]:
            x, y = paired(a, b, name)
            if len(x):
                lines.append(f"{a} - {b} | {name}, points | {cell(x - y)}")
    for name in [n for n in names if n.startswith("perplexity")]:
        for a, b, other in [*((o, "ar", None) for o in results if o != "ar"), ("vlm", "mlm", None),
                            ("vlm", "mlm", f"{name}, suffix matched")]:
            x, y = paired(a, b, name, other)
            if len(x):
                label = f"{a} / {b}" + (" (suffix matched)" if other else "")
                ratio = x / y
                lines.append(f"{label} | {name} | {ratio.mean():.2f} [{ratio.min():.2f}, {ratio.max():.2f}]")
    head = ["objectives | measurement | mean [least, greatest]", "---|---|---"]
    return "\n".join(f"| {line} |" for line in [*head, *lines]) if lines else ""

# -----------------------------------------------------------------------------
# Command line

def build_parser():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES),
                   help="which to compare")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="a run for each")
    p.add_argument("--max_iters", type=int, default=1500, help="updates of each run")
    p.add_argument("--train", default="", metavar="FLAGS", help="further flags of train.py, in quotes")
    p.add_argument("--eval_ppl", default="--val", metavar="FLAGS", help="flags of eval_ppl.py, in quotes")
    p.add_argument("--eval_glue", default="--tasks stdlib", metavar="FLAGS",
                   help="flags of eval_glue.py, in quotes")
    p.add_argument("--jobs", type=int, default=1,
                   help="runs at the same time, on a CPU with a share of the cores each")
    p.add_argument("--out_dir", default="out/compare", help="a folder for each run, and compare.json")
    return p


def run(args):
    if args.jobs < 1:
        raise ValueError(f"jobs must be at least 1, not {args.jobs}")
    fixed = {name: getattr(args, name) for name in ("max_iters", "train", "eval_ppl", "eval_glue")}
    path = Path(args.out_dir, "flags.json")
    if path.exists() and json.loads(path.read_text()) != fixed:
        raise ValueError(f"{args.out_dir} holds runs with other flags, see {path}: take another --out_dir")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, fixed)
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda job: one_run(*job, args), [(o, s) for s in args.seeds for o in args.objectives]))
    results = {o: {s: numbers(o, s, args) for s in args.seeds} for o in args.objectives}
    write_json(Path(args.out_dir, "compare.json"), {"flags": vars(args), "results": results})
    print(f"\nmean over seeds {args.seeds} [least, greatest]\n\n{table(results, args.objectives)}\n\n"
          f"{claims(results)}")


def main(argv=None):
    args = build_parser().parse_args(argv)
    with one_line_errors():
        run(args)


if __name__ == "__main__":
    main()
