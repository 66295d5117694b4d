"""
What a checkpoint's features know about text: linear probes on GLUE (the paper's protocol), or
fine-tuning.

    python eval_glue.py --checkpoint out/vlm --tasks stdlib             # two built-in tasks, no download
    python eval_glue.py --checkpoint out/ar out/dar out/mlm out/vlm     # GLUE, one column per checkpoint
    python eval_glue.py --checkpoint out/vlm --glue_dir ~/glue --tasks RTE SST-2 --pool mean max
    python eval_glue.py --checkpoint out/vlm --tasks stdlib --directions 8 16 32
    python eval_glue.py --checkpoint out/vlm --tasks stdlib --layer best --by_length
    python eval_glue.py --checkpoint out/vlm --tasks RTE --finetune --lr 3e-4 1e-3

Text -> token ids (two texts: a <end-of-text> b) -> the model's hidden states, frozen -> pooled over
the tokens, one vector per example -> linear probe (probe.py) -> metric on dev.

Each number is printed with three baselines: what guessing the most frequent class gives, the same
probe on the model before training, and the same probe on its trained token embeddings alone, without
any context. Only what is above all three was learned from context. The baseline of fine-tuning is
the same fine-tuning, with its own choice of the learning rate, from initial weights.

With `--directions k` a probe sees only the k leading principal directions of the features. The
theory's bounds are about these: an encoder of rank k keeps the k leading singular directions.

All numbers go to CHECKPOINT/eval_glue.json, with the predictions behind them. The file is written
after every task and keeps what other commands measured on the same weights.

`--tasks stdlib` are stand-ins for a first run and not GLUE. They are split as the dataset stdlib is,
so a model that was trained on this Python's library has not seen their test files. Standard errors
are over test examples (there: files), by bootstrap. Models that differ only in their seed differ by
more.
"""
import argparse
import copy
import json
import math
import shlex
import sys
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import (Help, add_device_flags, align, load_checkpoint, one_line_errors, pick_device,
                    pick_dtype, read_result, result_path, write_result)
from glue_data import GLUE, METRICS, STDLIB, bootstrap, load_task, require
from model import Transformer
from probe import held_out, probe
from tokenizer import load_tokenizer

# --finetune: right for models of a few million parameters. Published recipes for BERT's size and
# above, 1e-5 to 8e-5, lie all below: --lr 1e-5 2e-5 4e-5 8e-5
LEARNING_RATES = [1e-4, 3e-4, 1e-3, 3e-3]
BATCH_TOKENS = 16384                        # padded tokens per forward pass

# -----------------------------------------------------------------------------
# One checkpoint on one task

class Fit(NamedTuple):
    """A classifier and what it predicts."""
    predictions: list                       # per dev set: (n,) class numbers or scores
    how: dict                               # how its penalty or learning rate was chosen; for the JSON
    by_seed: list = ()                      # fine-tuning: the predictions of every seed


def evaluate(model, encoding, task, args):
    """Returns (rows of the JSON's "results", number of texts that were cut to fit).

    One row for each pooling, number of directions, metric and dev set.
    """
    # 1. Text -> token ids
    task, cut = tokenize(task, encoding, model.config.block_size)

    # 2. Fit: {(pooling, directions): {"model": Fit, and a Fit for each baseline}}
    pools = args.pool or (["mean", "max"] if task.name in STDLIB else ["mean"])
    if args.finetune:
        fits = finetune_all(model, task, encoding.eot_token, pools, args)
    else:
        fits = probe_all(model, task, encoding.eot_token, pools, args)
    majority = Fit([np.full(len(split.y), guess(task)) for split in task.dev.values()], {})

    # 3. Score
    rows = []
    for (pool_kind, directions), by_source in fits.items():
        by_source["majority"] = majority
        for metric in task.metrics:
            for number, (name, split) in enumerate(task.dev.items()):
                row = {"task": f"{task.name} {name}".strip(), "metric": metric, "pool": pool_kind,
                       "layer": args.layer, "directions": directions, **protocol(args),
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
    layers = [args.layer]
    if args.layer == "best":
        layers = range(1, model.config.n_layer + 1)
    sources = {"model": (model, layers),
               "embeddings": (model, [0]),
               "untrained": (untrained(model), [0])}        # [0]: its blocks start as the identity
    metric = METRICS[task.metrics[0]]

    fits = {(kind, k): {} for kind in pools for k in args.directions or [None]}
    for source, (network, candidates) in sources.items():
        for layer in candidates:
            train = extract(network, task.train.examples, eot, layer, pools)
            tests = [extract(network, split.examples, eot, layer, pools)
                     for split in task.dev.values()]
            for (kind, k), by_source in fits.items():
                predictions, how = probe(train[kind], task.train.y, task.train.groups,
                                         [test[kind] for test in tests], len(task.classes), metric, k)
                best = by_source.get(source)
                if best is None or how["held_out"] > best.how["held_out"]:
                    by_source[source] = Fit(predictions, {**how, "layer": layer})
    return fits


def finetune_all(model, task, eot, pools, args):
    """{(pooling, None): {"model": Fit, "untrained": Fit}} of fine-tuning."""
    return {(kind, None): {"model": finetune_seeds(model, task, eot, kind, args),
                           "untrained": finetune_seeds(untrained(model), task, eot, kind, args)}
            for kind in pools}


def untrained(model):
    """A model of the same shape and device as at the start of training, from a fixed seed. As its
    blocks start as the identity (see init_weights), its features are its random embeddings."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = Transformer(model.config)
    fresh.dtype = model.dtype
    return fresh.to(next(model.parameters()).device).eval()


def guess(task):
    """The most frequent class of the training split, or the mean score."""
    return np.bincount(task.train.y).argmax() if task.classes else task.train.y.mean()


def limit(task, n):
    """The task with at most n training examples (all if n is 0), the same in every run."""
    train = task.train
    chosen = np.random.default_rng(0).permutation(len(train.y))[:n or None]
    return task._replace(train=subset(train, np.sort(chosen)))


def subset(split, index):
    return split._replace(examples=[split.examples[i] for i in index], y=split.y[index],
                          groups=split.groups[index])

# -----------------------------------------------------------------------------
# Text -> token ids -> features

def tokenize(task, encoding, T):
    """(the task with lists of token ids as examples, number of examples cut to T tokens)."""
    total = 0
    splits = {}
    for name, split in {"train": task.train, **task.dev}.items():
        rows, cut = encode(encoding, split.examples, T, task.half)
        splits[name] = split._replace(examples=rows)
        total += cut
    train = splits.pop("train")
    return task._replace(train=train, dev=splits), total


def encode(encoding, examples, T, half=0):
    """(token ids of each example, a list of int lists of length 1..T; how many were cut to fit).

    A pair is a <end-of-text> b. What is too long loses its end; of a pair, the longer of the two
    does. With `half`, a pair is the last `half` tokens of a and the first `half` of b.
    """
    columns = [encoding.encode_ordinary_batch(list(column)) for column in zip(*examples)]
    rows, n_cut = [], 0
    for texts in zip(*columns):
        if len(texts) == 1:
            n_cut += len(texts[0]) > T
            rows.append(texts[0][:T] or [encoding.eot_token])
            continue

        # Where the two texts meet
        a, b = texts
        if half:
            kept = min(half, (T - 1) // 2)
            a, b = a[-kept:], b[:kept]

        # Cut the longer one, or both to equal halves
        room = T - 1
        n_cut += len(a) + len(b) > room
        keep_a = max(room - len(b), min(len(a), (room + 1) // 2))
        keep_b = room - min(len(a), keep_a)
        rows.append(a[:keep_a] + [encoding.eot_token] + b[:keep_b])
    return rows, n_cut


def batches(lengths, batch_tokens=BATCH_TOKENS):
    """Yield index arrays that hold at most batch_tokens tokens when padded to their longest; longest
    first."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    first = 0
    while first < len(order):
        n = max(1, batch_tokens // lengths[order[first]])
        yield order[first:first + n]
        first += n


def collate(rows, eot, device):
    """Lists of ids -> ids (B, T) int64, padded on the right, and valid (B, T) bool."""
    lengths = torch.tensor([len(row) for row in rows])
    valid = torch.arange(int(lengths.max())) < lengths[:, None]             # (B, T)
    ids = torch.full(valid.shape, eot)
    ids[valid] = torch.tensor([i for row in rows for i in row])
    return ids.to(device), valid.to(device)


def pool(hidden, valid, kind):
    """hidden (B, T, C), valid (B, T) -> (B, C) float32: mean or max over the valid positions, or the
    last of them."""
    hidden = hidden.float()
    lengths = valid.sum(dim=1)                                              # (B,)
    if kind == "mean":
        return (hidden * valid[:, :, None]).sum(dim=1) / lengths[:, None]
    if kind == "max":
        return hidden.masked_fill(~valid[:, :, None], -torch.inf).amax(dim=1)
    return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]


def pooled_features(model, ids, valid, layer, kinds):
    """{kind: (B, C)} of one batch. Without padding no attention mask is needed, which is faster."""
    hidden = model.features(ids, None if valid.all() else valid, layer)     # (B, T, C)
    return {kind: pool(hidden, valid, kind) for kind in kinds}


@torch.inference_mode()
def extract(model, rows, eot, layer, kinds):
    """{kind: (n, C) float32, on the CPU} of n lists of token ids, in batches of similar length.

    layer: features after that many blocks (None: all).
    """
    out = {kind: torch.empty(len(rows), model.config.n_embd) for kind in kinds}
    device = next(model.parameters()).device
    lengths = [len(row) for row in rows]
    with tqdm(total=sum(lengths), unit="tok", unit_scale=True, desc="features", leave=False,
              disable=None) as bar:
        for index in batches(lengths):
            ids, valid = collate([rows[i] for i in index], eot, device)
            for kind, values in pooled_features(model, ids, valid, layer, kinds).items():
                out[kind][index] = values.cpu()
            bar.update(sum(lengths[i] for i in index))
    return out

# -----------------------------------------------------------------------------
# Fine-tuning: the whole model

def finetune_seeds(model, task, eot, kind, args):
    """The Fit of fine-tuning with `--seeds` seeds; its predictions are those of the median seed.

    The learning rate is chosen by the task's first metric on the held-out tenth of the training
    split, with seed 0.
    """
    metric = METRICS[task.metrics[0]]
    n_classes = len(task.classes)
    rates = sorted(set(args.lr))
    train = task.train

    # Choose the learning rate
    values = []
    if len(rates) > 1:
        out = held_out(train.groups)
        rest, judged = [subset(train, np.flatnonzero(chosen)) for chosen in (~out, out)]
        for lr in rates:
            [predicted] = finetune(model, rest, [judged], n_classes, eot, kind, lr, 0, args)
            values.append(metric(predicted, judged.y))
    best = best_rate(values) if values else 0

    # Fine-tune on all of the training split
    dev = list(task.dev.values())
    by_seed = [finetune(model, train, dev, n_classes, eot, kind, rates[best], seed, args)
               for seed in range(args.seeds)]
    order = sorted(range(args.seeds), key=lambda seed: metric(by_seed[seed][0], dev[0].y))
    median = by_seed[order[(args.seeds - 1) // 2]]
    how = {"lr": rates[best], "at_edge": len(rates) > 1 and best in (0, len(rates) - 1),
           "held_out": dict(zip(map(str, rates), values))}
    return Fit(median, how, by_seed)


def best_rate(values):
    """Index of the largest of the values, one per learning rate in ascending order. Of equal ones
    that nearest to the middle of the grid: [1, 1, 1, 0] -> 1."""
    middle = (len(values) - 1) / 2
    ties = [i for i, value in enumerate(values) if value == max(values)]
    return min(ties, key=lambda i: abs(i - middle))


def finetune(model, train, tests, n_classes, eot, kind, lr, seed, args):
    """Train a copy of the model and a linear head on it: AdamW, warmup and linear decay.

    train and the members of tests are Splits of token ids. Returns the predictions on each test set.
    The model itself is left as it is, so every run begins at the checkpoint.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    device = next(model.parameters()).device
    model = copy.deepcopy(model).train()

    # The head starts at 0, or at the mean score
    head = torch.nn.Linear(model.config.n_embd, n_classes or 1).to(device)
    torch.nn.init.zeros_(head.weight)
    if not n_classes:
        torch.nn.init.constant_(head.bias, float(train.y.mean()))
    target = torch.from_numpy(train.y).to(device)
    if not n_classes:
        target = target.float()

    # Batches, epoch after epoch
    rows, y_size = train.examples, len(train.y)
    cuts = range(args.batch_size, y_size, args.batch_size)
    order = [index for _ in range(args.epochs) for index in np.split(rng.permutation(y_size), cuts)]

    # Optimizer: 6 % warmup, then linear decay to 0
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    steps = len(order)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.06 * steps + 1), 1 - step / steps))

    for index in tqdm(order, desc=f"finetune lr {lr:g} seed {seed}", leave=False, disable=None):
        ids, valid = collate([rows[i] for i in index], eot, device)
        features = pooled_features(model, ids, valid, args.layer, [kind])[kind]     # (B, C)
        scores = head(features)                                                     # (B, K)
        if n_classes:
            loss = F.cross_entropy(scores, target[index])
        else:
            loss = F.mse_loss(scores[:, 0], target[index])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()

    # Predict
    predictions = []
    model.eval()
    for test in tests:
        features = extract(model, test.examples, eot, args.layer, [kind])[kind]
        with torch.inference_mode():
            scores = head(features.to(device)).cpu()
        predictions.append((scores.argmax(dim=1) if n_classes else scores[:, 0].double()).numpy())
    return predictions

# -----------------------------------------------------------------------------
# Results

def score(fit, number, split, metric, classes):
    """{"value", "se", "predictions", how it was fitted} of a Fit on the dev set of that number.
    Fine-tuning: the value is the median of the seeds, the error that of the median seed."""
    predicted = fit.predictions[number]
    result = {"value": metric(predicted, split.y),
              "se": bootstrap(metric, predicted, split.y, split.groups),
              "predictions": compact(predicted, classes), **fit.how}
    if fit.by_seed:
        values = [metric(predictions[number], split.y) for predictions in fit.by_seed]
        result |= {"value": float(np.median(values)), "seeds": values}
    return result


def compact(values, classes):
    """Class numbers as a string with one base-36 digit each, scores as a list with 4 digits."""
    if classes:
        return "".join(np.base_repr(value, 36).lower() for value in values)
    return [round(float(value), 4) for value in values]


def by_length(by_source, number, split, metric):
    """The metric on texts of similar length: short, middle and long ones, about a third of the
    examples each. A list of {"up_to": tokens, "n": examples, "value": of the model, and of its
    "embeddings" if they were probed}. Texts of equal length stay together, so there may be fewer."""
    lengths = np.array([len(row) for row in split.examples])
    limits = np.quantile(lengths, [1 / 3, 2 / 3, 1], method="inverted_cdf")
    third = np.searchsorted(limits, lengths)                                # 0, 1 or 2
    result = []
    for i in np.unique(third):
        inside = third == i
        part = {"up_to": int(lengths[inside].max()), "n": int(inside.sum())}
        for source, name in [("model", "value"), ("embeddings", "embeddings")]:
            if source in by_source:
                part[name] = metric(by_source[source].predictions[number][inside], split.y[inside])
        result.append(part)
    return result


def protocol(args):
    """The part of a row that says how it was measured."""
    recipe = None
    if args.finetune:
        recipe = {"lr": sorted(set(args.lr)), "batch_size": args.batch_size, "epochs": args.epochs,
                  "seeds": args.seeds}
    return {"protocol": "finetune" if args.finetune else "probe", "max_train": args.max_train,
            "finetune": recipe}


def test_labels(task):
    """{"TASK" or "TASK SPLIT": {"labels", "groups"}} of the dev sets, what a row's predictions are
    compared with. groups is None where each example is its own."""
    tests = {}
    for name, split in task.dev.items():
        alone = len(np.unique(split.groups)) == len(split.groups)
        tests[f"{task.name} {name}".strip()] = {
            "labels": compact(split.y, task.classes),
            "groups": None if alone else split.groups.tolist()}
    return tests


def key(row):
    """What makes two rows the same measurement."""
    names = ("task", "metric", "pool", "layer", "directions", "protocol", "max_train", "finetune")
    return json.dumps([row[name] for name in names])


def merge(old, report):
    """The report with those results of an older one (or None) added that were not measured again.
    What was measured on other dev examples of the same name, as another Python's library has them,
    is dropped."""
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
    """{checkpoint: rows of its results} as text: one column per checkpoint. For each task, metric and
    pooling one line for the model and one for each baseline."""
    lines = [["", *columns]]
    for same in zip(*columns.values()):             # one row of each checkpoint
        lines.append([title(same[0]), *[cell(row["model"]) for row in same]])
        if show_lengths and len(same[0]["by_length"]) == 3:
            for i, name in enumerate(["short", "middle", "long"]):
                cells = [length_cell(row["by_length"], i) for row in same]
                lines.append([f"    {name} texts", *cells])
        for source, label in LABELS[same[0]["protocol"]].items():
            lines.append([f"  {label}", *[cell(row[source]) for row in same]])
    return align(lines)


def title(row):
    parts = [row["task"], row["metric"], row["pool"]]
    if row["layer"] is not None:
        parts.append(f"layer {row['layer']}")
    if row["directions"] is not None:
        parts.append(f"{row['directions']} directions")
    return ", ".join(parts)


def cell(score):
    """54.1 ± 1.2 in percent, with the [least, greatest] of fine-tuning's seeds."""
    text = f"{100 * score['value']:.1f} ± {100 * score['se']:.1f}"
    if "seeds" in score:
        least, greatest = min(score["seeds"]), max(score["seeds"])
        text += f" [{100 * least:.1f}, {100 * greatest:.1f}]"
    return text


def length_cell(parts, i):
    if i >= len(parts):
        return "-"
    return f"{100 * parts[i]['value']:.1f} (up to {parts[i]['up_to']} tokens)"


def progress(rows):
    """What was found and chosen for one task, in one line."""
    found = []
    for row in rows:
        result = row["model"]
        text = f"{', '.join(title(row).split(', ')[1:])} {cell(result)}"
        if "lr" in result:
            text += f" (lr {result['lr']:g}{edge_note(result)})"
        elif row["layer"] == "best":
            text += f" (layer {result['layer']})"
        elif result["at_edge"]:
            text += f" (penalty {result['strength']:g}, at the edge of its grid)"
        found.append(text)
    return "; ".join(found)


def edge_note(result):
    """A word when the chosen learning rate is the grid's least or greatest."""
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
    return text if text == "best" else int(text)


def direction_number(text):
    return None if text == "all" else int(text)


def build_parser():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=Help)
    p.add_argument("--checkpoint", nargs="+", required=True, metavar="DIR",
                   help="one or several, one column each")
    p.add_argument("--tasks", nargs="+", metavar="TASK",
                   choices=["glue", "stdlib", *GLUE, *STDLIB],
                   help="glue (all nine; if none are given), stdlib (both built-in ones), or any of "
                        f"{', '.join([*GLUE, *STDLIB])}")
    p.add_argument("--glue_dir", metavar="DIR",
                   help="folder with CoLA/train.tsv and so on, which is only read; without it data/glue, "
                        "and what is missing there is downloaded")
    p.add_argument("--results", metavar="DIR",
                   help="write to DIR/NAME/eval_glue.json instead of the checkpoint's own folder")
    p.add_argument("--max_train", type=int, default=0, metavar="N",
                   help="use at most N training examples of each task, the same for all models; 0: all")

    features = p.add_argument_group("features")
    features.add_argument("--pool", nargs="+", choices=["mean", "last", "max"],
                          help="from token vectors to one vector; mean unless given, and mean max for "
                               "the built-in tasks")
    features.add_argument("--layer", type=layer_number, metavar="N",
                          help="features after N blocks (0: embeddings), or best: chosen on held-out "
                               "training examples; after all blocks unless given")
    features.add_argument("--directions", nargs="+", type=direction_number, metavar="K",
                          help="probe only the K leading principal directions; all unless given, or "
                               "among others: 8 16 all")
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
        raise ValueError("lr must be positive")
    if args.finetune and (args.layer == "best" or args.directions):
        raise ValueError("--layer best and --directions are for probes, not for --finetune")


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


def load_tasks(args):
    """The tasks that were asked for. All are loaded before any is computed."""
    members = {"glue": GLUE, "stdlib": STDLIB}
    names = list(dict.fromkeys(name for task in args.tasks or ["glue"]
                               for name in members.get(task, [task])))
    if args.glue_dir:
        require(names, args.glue_dir)
    glue_dir = args.glue_dir or "data/glue"
    return [limit(load_task(name, glue_dir, download=not args.glue_dir), args.max_train)
            for name in names]


def run(args, command):
    """Evaluate the checkpoints one after the other, write their JSON files, print the table."""
    # Everything that can be missing or wrong comes first
    check_flags(args)
    device = pick_device(args.device)
    loaded = {}                                             # {checkpoint: (model, config, encoding)}
    for checkpoint in args.checkpoint:
        model, config = load_checkpoint(checkpoint, device)
        check_model(checkpoint, model.config, args)
        model.dtype = pick_dtype(args.dtype, device)
        loaded[checkpoint] = model, config, load_tokenizer(checkpoint)
    paths = {checkpoint: result_path(checkpoint, "eval_glue.json", args.results) for checkpoint in loaded}
    if len(set(paths.values())) < len(paths):
        raise ValueError("two checkpoints have folders of the same name: --results needs one call for "
                         "each, with another DIR")
    tasks = load_tasks(args)
    torch.backends.cuda.enable_cudnn_sdp(False)     # it would plan again for each of hundreds of shapes

    # Compute. The file is read again before each writing: another process may have added to it
    columns = {}
    for checkpoint, (model, config, encoding) in loaded.items():
        path, weights = paths[checkpoint], config["weights"]
        if path.exists() and read_result(path, weights) is None:
            print(f"{path} is replaced: it holds results of other weights", flush=True)
        columns[checkpoint] = []
        writable = True
        for task in tasks:
            start = time.time()
            rows, cut = evaluate(model, encoding, task, args)
            seconds = round(time.time() - start, 1)
            for row in rows:
                row |= {"command": command, "dtype": str(model.dtype)[len("torch."):],
                        "seconds": seconds}
            columns[checkpoint] += rows

            report = {"checkpoint": checkpoint, "step": config["step"], "weights": weights,
                      "command": command, "results": rows, "tests": test_labels(task)}
            if writable:
                writable = write_result(path, merge(read_result(path, weights), report))
            print(f"{checkpoint}: {task.name}: {progress(rows)} | {len(task.train.y)} training "
                  f"examples, {task.malformed} malformed rows skipped, {cut} texts cut to "
                  f"{model.config.block_size} tokens, {seconds} s", flush=True)

    kind = "fine-tuned, median [range] of seeds" if args.finetune else "linear probe"
    print(f"\n{kind}, percent ± bootstrap standard error\n{table(columns, args.by_length)}")


def main(argv=None):
    args = build_parser().parse_args(argv)
    with one_line_errors():
        run(args, shlex.join(["python", "eval_glue.py", *(sys.argv[1:] if argv is None else argv)]))


if __name__ == "__main__":
    main()
