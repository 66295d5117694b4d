"""
The paper's claims, measured: four objectives, the same model, data and number of tokens, several seeds.

    python compare.py                                   # 3 seeds; about an hour on 2 cores
    python compare.py --seeds 0 --max_iters 200         # a quick look
    python compare.py --train "--preset small --dataset mine" --eval_ppl "--text book.txt"

Runs train.py, eval_ppl.py and eval_glue.py for every objective and seed, as one would by hand, in
OUT_DIR/OBJECTIVE-SEED. What is there already is not done again, so the same command goes on where it was
stopped. At the end: a table of means over the seeds with [least, greatest], and each claim as differences
between runs of the same seed (which share their data order). All numbers go to OUT_DIR/compare.json.
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

from files import one_line_errors, write_json
from objectives import CAUSAL, OBJECTIVES

HERE = Path(__file__).parent

# -----------------------------------------------------------------------------
# Running

def commands(objective, folder, args, seed):
    """The command lines of one run, each with the file that shows that it is done."""
    train = ["train.py", "--objective", objective, "--seed", str(seed), "--max_iters", str(args.max_iters),
             *shlex.split(args.train), "--out_dir", str(folder)]
    if (folder / "ckpt.pt").exists():
        train = ["train.py", "--resume", "--out_dir", str(folder)]
    ppl = ["eval_ppl.py", "--checkpoint", str(folder), *shlex.split(args.eval_ppl)]
    glue = ["eval_glue.py", "--checkpoint", str(folder), *shlex.split(args.eval_glue)]
    yield train, None
    yield ppl, "eval_ppl_*_left-to-right.json"
    if objective not in CAUSAL:
        yield [*ppl, "--suffix", "matched"], "eval_ppl_*_left-to-right-matched.json"
    yield glue, "eval_glue.json"


def trained(folder, max_iters):
    log = folder / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() and (folder / "ckpt.pt").exists() else []
    return bool(lines) and json.loads(lines[-1])["step"] >= max_iters


def one_run(objective, seed, args):
    """Train and evaluate; raises ValueError with the command and its last line if one of them fails."""
    folder = Path(args.out_dir, f"{objective}-{seed}")
    for command, result in commands(objective, folder, args, seed):
        if any(folder.glob(result)) if result else trained(folder, args.max_iters):
            continue
        print("python", shlex.join(command), flush=True)
        threads = str(max(1, (os.cpu_count() or 1) // args.jobs))
        done = subprocess.run([sys.executable, str(HERE / command[0]), *command[1:]], capture_output=True,
                              text=True, env={"OMP_NUM_THREADS": threads, **os.environ})
        if done.returncode:
            raise ValueError(f"python {shlex.join(command)} failed: {done.stderr.strip().splitlines()[-1:]}")

# -----------------------------------------------------------------------------
# Collecting

def numbers(folder):
    """{name of a measurement: number} of one run: what its JSON files say."""
    out = {}
    for path in sorted(folder.glob("eval_ppl_*_left-to-right*.json")):
        report = json.loads(path.read_text())
        kind = ", suffix matched" if report["suffix"] == "matched" else ""
        for k, result in report["prompt_lengths"].items():
            out[f"perplexity after {k}{kind}"] = result["perplexity"]
        out[f"perplexity, all{kind}"] = report["all"]["perplexity"]
    for row in json.loads((folder / "eval_glue.json").read_text())["results"]:
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
        for a, b in [("dar", "ar"), ("mlm", "ar"), ("vlm", "ar")]:
            x, y = paired(a, b, name)
            if len(x):
                lines.append(f"{a} - {b} | {name}, points | {cell(x - y)}")
    for name in [n for n in names if n.startswith("perplexity")]:
        for a, b, other in [("mlm", "ar", None), ("vlm", "ar", None), ("vlm", "mlm", None),
                            ("vlm", "mlm", f"{name}, suffix matched")]:
            x, y = paired(a, b, name, other)
            if len(x):
                label = f"{a} / {b}" + (" (suffix matched)" if other else "")
                ratio = x / y
                lines.append(f"{label} | {name} | {ratio.mean():.2f} [{ratio.min():.2f}, {ratio.max():.2f}]")
    head = ["objectives | measurement | mean [least, greatest]", "---|---|---"]
    return "\n".join(f"| {line} |" for line in [*head, *lines])

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
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda job: one_run(*job, args), [(o, s) for s in args.seeds for o in args.objectives]))
    results = {o: {s: numbers(Path(args.out_dir, f"{o}-{s}")) for s in args.seeds} for o in args.objectives}
    write_json(Path(args.out_dir, "compare.json"), {"flags": vars(args), "results": results})
    print(f"\nmean over seeds {args.seeds} [least, greatest]\n\n{table(results, args.objectives)}\n\n"
          f"{claims(results)}")


def main(argv=None):
    args = build_parser().parse_args(argv)
    with one_line_errors():
        run(args)


if __name__ == "__main__":
    main()
