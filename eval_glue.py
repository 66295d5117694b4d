"""
What a checkpoint's features know: linear probes on GLUE (the paper's protocol), or fine-tuning.

    python eval_glue.py --checkpoint out/vlm --tasks stdlib             # two built-in tasks, no download
    python eval_glue.py --checkpoint out/ar out/dar out/mlm out/vlm     # GLUE, one column per checkpoint
    python eval_glue.py --checkpoint out/vlm --glue_dir ~/glue --tasks RTE SST-2 --pool mean max
    python eval_glue.py --checkpoint out/vlm --tasks stdlib --directions 8 16 32
    python eval_glue.py --checkpoint out/vlm --tasks stdlib --layer best --by_length
    python eval_glue.py --checkpoint out/vlm --tasks RTE --finetune --lr 3e-4 1e-3

Text -> token ids -> the model's hidden states, frozen -> pooled over the tokens, one vector per
example (features.py) -> linear probe (probe.py) or fine-tuning (finetune.py) -> metric on dev.

Each number is printed with three baselines: what guessing the most frequent class gives, the same
probe on the model before training, and the same probe on its trained token embeddings alone, without
any context. Only what is above all three was learned from context. The baseline of fine-tuning is
the same fine-tuning, with its own choice of the learning rate, from initial weights.

With `--directions K` a probe sees only the K leading principal directions of the features. The
theory's bounds are about these: an encoder of rank K keeps the K leading singular directions.

All numbers go to CHECKPOINT/eval_glue.json, with the predictions behind them. The file is written
after every task and keeps what other commands measured on the same weights.

`--tasks stdlib` takes two stand-ins for a first run, which are not GLUE. They are split as the
dataset stdlib is, so a model that was trained on this Python's library has not seen their test
files. Standard errors are over test examples (in the stand-ins: over files), by bootstrap. Models
that differ only in their seed differ by more.
"""
import json
import math
import sys
import time
from typing import NamedTuple

import numpy as np
import torch

from common import (Parser, add_device_flags, align, check_different, command_line, load_checkpoint,
                    one_line_errors, pick_device, read_result, result_path, write_result)
from features import extract, tokenize
from finetune import LEARNING_RATES, finetune_seeds
from glue_data import BUILT_IN, GLUE, METRICS, bootstrap, check_files, limit, load_task
from model import Transformer
from probe import probe
from tokenizer import load_tokenizer

# -----------------------------------------------------------------------------
# One checkpoint on one task

class Fit(NamedTuple):
    """A classifier and what it predicts."""
    by_seed: list                           # per seed, per dev set: (n,) class numbers or scores
    how: dict                               # how its penalty or learning rate was chosen; for the JSON


def evaluate(model, encoding, task, args):
    """One checkpoint on one task: (rows of the JSON's "results", number of examples that were cut to fit).

    One row for each pooling, number of directions, metric and dev set.
    """
    # 1. Text -> token ids
    task, cut = tokenize(task, encoding, model.config.block_size)

    # 2. Fit: {(pooling, directions): {"model": Fit, and a Fit for each baseline}}
    pools = args.pool or (["mean", "max"] if task.name in BUILT_IN else ["mean"])
    if args.finetune:
        fits = finetune_all(model, task, encoding.eot_token, pools, args)
    else:
        fits = probe_all(model, task, encoding.eot_token, pools, args)
    constant = guess(task)
    majority = Fit([[np.full(len(split.y), constant) for split in task.dev.values()]], how={})

    # 3. Score
    rows = []
    for (pool_kind, directions), by_source in fits.items():
        by_source["majority"] = majority
        for metric in task.metrics:
            for number, (name, split) in enumerate(task.dev.items()):
                row = {"task": dev_name(task, name), "metric": metric,
                       "pool": pool_kind, "layer": args.layer, "directions": directions,
                       **protocol(args),
                       "n_train": len(task.train.y), "n_dev": len(split.y),
                       "malformed": task.malformed, "cut": cut}
                for source, fit in by_source.items():
                    row[source] = score(fit, number, split, METRICS[metric], task.classes)
                row["by_length"] = by_length(by_source, number, split, METRICS[metric])
                rows.append(row)
    return rows, cut


def probe_all(model, task, eot, pools, args):
    """{(pooling, directions): {source: Fit}} of linear probes.

    `--layer best` is the layer whose probe is best on the held-out examples of the training split,
    for each pooling and number of directions. Dev has no say in it.
    """
    # What is probed: {source: (model, its layers to choose from)}
    layers = [args.layer]
    if args.layer == "best":
        layers = range(1, model.config.n_layer + 1)
    sources = {"model": (model, layers),
               "embeddings": (model, [0]),
               "untrained": (untrained(model), [0])}        # [0]: its blocks start as the identity
    metric = METRICS[task.metrics[0]]

    # Features once per layer, then a probe for each pooling and number of directions
    fits = {(kind, k): {} for kind in pools for k in args.directions or [None]}
    for source, (network, candidates) in sources.items():
        for layer in candidates:
            train = extract(network, task.train.examples, eot, layer, pools)
            tests = [extract(network, split.examples, eot, layer, pools)
                     for split in task.dev.values()]
            for (kind, k), by_source in fits.items():
                predictions, how = probe(
                    train[kind], task.train.y, task.train.groups, [test[kind] for test in tests],
                    len(task.classes), metric, directions=k)
                best = by_source.get(source)
                if best is None or how["held_out"] > best.how["held_out"]:
                    by_source[source] = Fit([predictions], {**how, "layer": layer})
    return fits


def finetune_all(model, task, eot, pools, args):
    """{(pooling, None): {"model": Fit, "untrained": Fit}} of fine-tuning."""
    fits = {}
    for kind in pools:
        fits[kind, None] = {}
        for source, network in [("model", model), ("untrained", untrained(model))]:
            fits[kind, None][source] = Fit(*finetune_seeds(network, task, eot, kind, args))
    return fits


def untrained(model):
    """A model of the same sizes as it is before training, on the same device, from a fixed seed.

    As its blocks start as the identity (see init_weights), its features are its random embeddings.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = Transformer(model.config)
    fresh.dtype = model.dtype
    return fresh.to(next(model.parameters()).device).eval()


def guess(task):
    """The most frequent class of the training split, or the mean score."""
    return np.bincount(task.train.y).argmax() if task.classes else task.train.y.mean()

# -----------------------------------------------------------------------------
# Results

def score(fit, number, split, metric, classes):
    """{"value", "se", "predictions", how it was fitted} of a Fit on the dev set of that number.

    Of several seeds: all are those of the median seed, and "seeds" has the value of each.
    """
    predicted, values = median_seed(fit, number, split, metric)
    result = {"value": metric(predicted, split.y),
              "se": bootstrap(metric, predicted, split.y, split.groups),
              "predictions": compact(predicted, classes), **fit.how}
    if len(values) > 1:
        result["seeds"] = values
    return result


def median_seed(fit, number, split, metric):
    """(the median seed's predictions on the dev set of that number, the metric of every seed).

    Of an even number of seeds, the lower of the two in the middle.
    """
    values = [metric(predictions[number], split.y) for predictions in fit.by_seed]
    median = np.argsort(values, kind="stable")[(len(values) - 1) // 2]
    return fit.by_seed[median][number], values


def compact(values, classes):
    """Class numbers as a string with one base-36 digit each, scores as a list with 4 digits."""
    if classes:
        return "".join(np.base_repr(value, 36).lower() for value in values)
    return [round(float(value), 4) for value in values]


def by_length(by_source, number, split, metric):
    """The metric on short, middle and long texts, each about a third of the examples.

    A list of {"up_to": tokens, "n": examples, "value": of the model, and "embeddings": of its embeddings
    if they were probed}. Texts of equal length stay together, so there may be fewer than three.
    """
    # Which third each example is in
    lengths = np.array([len(row) for row in split.examples])
    limits = np.quantile(lengths, [1 / 3, 2 / 3, 1], method="inverted_cdf")
    third = np.searchsorted(limits, lengths)                                # 0, 1 or 2

    # The metric in each
    result = []
    for i in np.unique(third):
        inside = third == i
        part = {"up_to": int(lengths[inside].max()), "n": int(inside.sum())}
        for source, name in [("model", "value"), ("embeddings", "embeddings")]:
            if source in by_source:
                predicted, _ = median_seed(by_source[source], number, split, metric)
                part[name] = metric(predicted[inside], split.y[inside])
        result.append(part)
    return result


def protocol(args):
    """The part of a row that says how it was measured."""
    recipe = None
    if args.finetune:
        recipe = {"lr": sorted(set(args.lr)), "batch_size": args.batch_size,
                  "epochs": args.epochs, "seeds": args.seeds}
    return {"protocol": "finetune" if args.finetune else "probe",
            "max_train": args.max_train, "finetune": recipe}


def dev_name(task, split):
    """Of a dev set: "RTE", or "MNLI matched" where the task has several."""
    return f"{task.name} {split}".strip()


def dev_labels(task):
    """{"TASK" or "TASK SPLIT": {"labels", "groups"}} of the dev sets.

    A row's predictions are compared with them. groups is None where each example is a group of its own.
    """
    tests = {}
    for name, split in task.dev.items():
        alone = len(np.unique(split.groups)) == len(split.groups)
        tests[dev_name(task, name)] = {
            "labels": compact(split.y, task.classes),
            "groups": None if alone else split.groups.tolist()}
    return tests


def key(row):
    """What makes two rows the same measurement."""
    names = ("task", "metric", "pool", "layer", "directions", "protocol", "max_train", "finetune")
    return json.dumps([row[name] for name in names])


def merge(old, report):
    """The report, and those results of an older one (or None) that were not measured again.

    What was measured on other dev examples of the same name is dropped: another Python's library has
    others.
    """
    if old is None:
        return report
    tests = {**old["tests"], **report["tests"]}
    rows = {}
    for row in old["results"]:
        if tests[row["task"]] == old["tests"][row["task"]]:
            rows[key(row)] = row
    rows |= {key(row): row for row in report["results"]}
    return {**report, "results": list(rows.values()), "tests": tests}

# -----------------------------------------------------------------------------
# The table

LABELS = {"probe": {"embeddings": "its input embeddings", "untrained": "before training",
                    "majority": "most frequent class"},
          "finetune": {"untrained": "the same from initial weights", "majority": "most frequent class"}}


def table(columns, show_lengths=False):
    """{checkpoint: rows of its results} as text, one column per checkpoint.

    For each task, metric and pooling one line for the model and one for each baseline.
    """
    lines = [["", *columns]]
    for same in zip(*columns.values()):             # one row of each checkpoint
        lines.append([", ".join(title(same[0])), *[cell(row["model"]) for row in same]])
        if show_lengths and len(same[0]["by_length"]) == 3:
            for i, name in enumerate(["short", "middle", "long"]):
                cells = [length_cell(row["by_length"], i) for row in same]
                lines.append([f"    {name} texts", *cells])
        for source, label in LABELS[same[0]["protocol"]].items():
            lines.append([f"  {label}", *[cell(row[source]) for row in same]])
    return align(lines)


def title(row):
    """What a row of the results measures, a list: ["RTE", "accuracy", "mean", "layer 2"]."""
    parts = [row["task"], row["metric"], row["pool"]]
    if row["layer"] is not None:
        parts.append(f"layer {row['layer']}")
    if row["directions"] is not None:
        parts.append(f"{row['directions']} directions")
    return parts


def cell(score):
    """54.1 ± 1.2 in percent, with the [least, greatest] of fine-tuning's seeds."""
    text = f"{100 * score['value']:.1f} ± {100 * score['se']:.1f}"
    if "seeds" in score:
        least = min(score["seeds"])
        greatest = max(score["seeds"])
        text += f" [{100 * least:.1f}, {100 * greatest:.1f}]"
    return text


def length_cell(parts, i):
    """Part number i of `by_length`, in percent."""
    if i >= len(parts):
        return "-"
    return f"{100 * parts[i]['value']:.1f} (up to {parts[i]['up_to']} tokens)"


def progress_line(rows):
    """What was found and chosen for one task, in one line."""
    found = []
    for row in rows:
        result = row["model"]
        text = f"{', '.join(title(row)[1:])} {cell(result)}"
        if "lr" in result:
            text += f" (lr {result['lr']:g}{edge_note(result)})"
        elif row["layer"] == "best":
            text += f" (layer {result['layer']})"
        elif result["at_edge"]:
            text += f" (penalty {result['strength']:g}, at the edge of its grid)"
        found.append(text)
    return "; ".join(found)


def edge_note(result):
    """What to try when the chosen learning rate is the grid's least or greatest."""
    if not result["at_edge"]:
        return ""
    lr = result["lr"]
    lower = lr == min(map(float, result["held_out"]))
    further = [lr / 10, lr / 3, lr] if lower else [lr, 3 * lr, 10 * lr]
    flags = " ".join(f"{rate:.1g}" for rate in further)
    return f", at the {'lower' if lower else 'upper'} edge of the grid: try --lr {flags}"

# -----------------------------------------------------------------------------
# Command line

def layer_number(text):
    """The value of --layer: an int or "best"."""
    return text if text == "best" else int(text)


def direction_number(text):
    """A value of --directions: an int, or None for "all"."""
    return None if text == "all" else int(text)


def build_parser():
    p = Parser(__doc__.split("\n\n")[0])
    p.add_argument("--checkpoint", nargs="+", required=True, metavar="DIR",
                   help="one or several folders written by train.py, one column each")
    p.add_argument("--tasks", nargs="+", metavar="TASK",
                   choices=["glue", "stdlib", *GLUE, *BUILT_IN],
                   help="glue (all nine, the default), stdlib (both built-in ones), or any of "
                        f"{', '.join([*GLUE, *BUILT_IN])}")
    p.add_argument("--glue_dir", metavar="DIR",
                   help="folder with CoLA/train.tsv and so on, which is only read (default: data/glue, "
                        "where missing files are downloaded)")
    p.add_argument("--results", metavar="DIR",
                   help="write to DIR/CHECKPOINT'S NAME instead of the checkpoint's own folder")
    p.add_argument("--max_train", type=int, default=0, metavar="N",
                   help="use at most N training examples of each task, the same for all models; 0: all")

    features = p.add_argument_group("features")
    features.add_argument("--pool", nargs="+", choices=["mean", "last", "max"],
                          help="how token vectors become one (default: mean; mean and max for the "
                               "built-in tasks)")
    features.add_argument("--layer", type=layer_number, metavar="N",
                          help="features after N blocks (0: embeddings), or best: the layer is chosen on "
                               "held-out training examples (default: after all blocks)")
    features.add_argument("--directions", nargs="+", type=direction_number, metavar="K",
                          help="probe only the K leading principal directions, e.g. 8 16 all "
                               "(default: all)")
    features.add_argument("--by_length", action="store_true",
                          help="show the result on short, middle and long texts too")

    tuning = p.add_argument_group("fine-tuning")
    tuning.add_argument("--finetune", action="store_true",
                        help="train the whole model on each task instead of a probe")
    tuning.add_argument("--lr", nargs="+", type=float, default=LEARNING_RATES, metavar="LR",
                        help="learning rates to choose from on held-out training examples; larger "
                             "models need 1e-5 to 8e-5")
    tuning.add_argument("--batch_size", type=int, default=32, help="examples per update")
    tuning.add_argument("--epochs", type=int, default=3, help="passes over the training split")
    tuning.add_argument("--seeds", type=int, default=3,
                        help="number of runs; their median and [least, greatest] are shown")
    add_device_flags(p)
    return p


def check_flags(args):
    """Raise ValueError for values that make no sense, before anything is loaded."""
    if min(args.epochs, args.seeds, args.batch_size) < 1:
        raise ValueError("epochs, seeds and batch_size must be at least 1")
    if args.max_train < 0 or 0 < args.max_train < 20:
        raise ValueError("max_train must be 0 (all) or at least 20")
    if not all(0 < lr < math.inf for lr in args.lr):
        raise ValueError("lr must be positive and finite")
    if args.finetune and (args.layer == "best" or args.directions):
        raise ValueError("--layer best and --directions are for probes, not for --finetune")
    if args.glue_dir:
        check_files(task_names(args), args.glue_dir)
    check_different(args.checkpoint, args.results)


def check_model(checkpoint, config, args):
    """Raise ValueError if the flags do not fit the model."""
    if args.layer not in (None, "best") and not 0 <= args.layer <= config.n_layer:
        raise ValueError(f"{checkpoint} has {config.n_layer} blocks: --layer can be 0 to "
                         f"{config.n_layer}, not {args.layer}")
    for k in args.directions or []:
        if k is not None and not 1 <= k <= config.n_embd:
            raise ValueError(f"{checkpoint} has {config.n_embd} features: --directions can be 1 to "
                             f"{config.n_embd}, not {k}")
    if config.block_size < 4:
        raise ValueError(f"{checkpoint}: a block_size of {config.block_size} is too short for a pair "
                         "of texts")


def task_names(args):
    """The names of the tasks that are asked for, each once."""
    members = {"glue": GLUE, "stdlib": BUILT_IN}
    names = []
    for task in args.tasks or ["glue"]:
        names += [name for name in members.get(task, [task]) if name not in names]
    return names


def load_tasks(args):
    """The tasks that are asked for. All are loaded before any is computed."""
    glue_dir = args.glue_dir or "data/glue"
    return [limit(load_task(name, glue_dir, download=not args.glue_dir), args.max_train)
            for name in task_names(args)]


class LoadedCheckpoint(NamedTuple):
    """A model, and what of its training matters here."""
    path: str
    model: torch.nn.Module
    config: dict                        # config.json, with the step and the digest of the weights
    encoding: object                    # its tokenizer


def load(path, args, device):
    """A LoadedCheckpoint. Raises ValueError if it cannot be evaluated."""
    model, config = load_checkpoint(path, device, args.dtype)
    check_model(path, model.config, args)
    return LoadedCheckpoint(path, model, config, load_tokenizer(path, model.config.vocab_size))


def evaluate_checkpoint(checkpoint, tasks, args, command):
    """Evaluate one checkpoint, write its JSON file after every task.

    Returns its rows, and whether all were written.
    """
    model = checkpoint.model
    weights = checkpoint.config["weights"]
    path = result_path(checkpoint.path, "eval_glue.json", args.results)
    if path.exists() and read_result(path, weights) is None:
        print(f"{path} is replaced: it holds results of other weights", flush=True)

    found = []
    saved = True
    for task in tasks:
        # Compute
        start = time.time()
        rows, cut = evaluate(model, checkpoint.encoding, task, args)
        seconds = round(time.time() - start, 1)
        dtype = str(model.dtype).removeprefix("torch.")
        for row in rows:
            row |= {"command": command, "dtype": dtype, "seconds": seconds}
        found += rows

        # Write. The file is read again each time: another process may have added to it
        report = {"checkpoint": checkpoint.path, "step": checkpoint.config["step"], "weights": weights,
                  "command": command, "results": rows, "tests": dev_labels(task)}
        if saved:
            saved = write_result(path, merge(read_result(path, weights), report))
        malformed = f"{task.malformed} malformed rows skipped, " if task.malformed else ""
        print(f"{checkpoint.path}: {task.name}: {progress_line(rows)} | "
              f"{len(task.train.y)} training examples, {malformed}"
              f"{cut} texts cut to {model.config.block_size} tokens, {seconds} s", flush=True)
    return found, saved


def run(args, command):
    """Evaluate the checkpoints one after the other, write their JSON files, print the table."""
    # Everything that can be missing or wrong comes first
    check_flags(args)
    device = pick_device(args.device)
    loaded = [load(path, args, device) for path in args.checkpoint]
    tasks = load_tasks(args)

    # On a GPU, cuDNN's attention would plan again for each of hundreds of shapes
    torch.backends.cuda.enable_cudnn_sdp(False)
    columns = {}
    all_saved = True
    for checkpoint in loaded:
        columns[checkpoint.path], saved = evaluate_checkpoint(checkpoint, tasks, args, command)
        all_saved = all_saved and saved
    kind = "fine-tuned, median [range] of seeds" if args.finetune else "linear probe"
    print(f"\n{kind}, percent ± bootstrap standard error\n{table(columns, args.by_length)}")
    if not all_saved:
        sys.exit(2)


def main(argv=None):
    args = build_parser().parse_args(argv)
    with one_line_errors():
        run(args, command_line("eval_glue.py", argv))


if __name__ == "__main__":
    main()
