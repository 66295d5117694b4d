"""
What a checkpoint's features know about text: linear probes on GLUE (the paper's protocol), or fine-tuning.

    python eval_glue.py --checkpoint out/vlm --tasks stdlib             # two built-in tasks, no download
    python eval_glue.py --checkpoint out/ar out/dar out/mlm out/vlm     # GLUE, downloaded; a column a model
    python eval_glue.py --checkpoint out/vlm --glue_dir ~/glue --tasks RTE SST-2 --pool mean max \
        --max_train 10000
    python eval_glue.py --checkpoint out/vlm --tasks RTE --finetune

Text -> token ids (two texts: a <end-of-text> b) -> the model's hidden states, frozen -> pooled over the
tokens: one vector an example -> standardised -> softmax regression (STS-B: ridge regression) -> metric on
dev. The regression is convex and starts at 0, so no seed is involved. Beside each number stand what guessing
the most frequent class gives, and the same probe on the model before training and on its trained token
embeddings alone, without any context: only what is above all three was learned from context. All numbers go
to CHECKPOINT/eval_glue.json.

`--tasks stdlib` are stand-ins for a first run and not GLUE. They are split as the dataset stdlib is, so a
model that was trained on this Python's library has not seen their test files. Standard errors are over test
examples (there: files), by bootstrap; models that differ only in their seed differ by more.
"""
import argparse
import copy
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import (add_device_flags, load_checkpoint, one_line_errors, pick_device, pick_dtype, reuse_memory,
                    write_json)
from glue_data import GLUE, METRICS, STDLIB, bootstrap, load_task
from model import Transformer
from probe import held_out, probe
from tokenizer import load_tokenizer

LEARNING_RATES = [1e-4, 3e-4, 1e-3]         # --finetune
BATCH_TOKENS = 16384                        # padded tokens per forward pass

# -----------------------------------------------------------------------------
# Text -> token ids -> features

def encode(encoding, examples, T, half=0):
    """(token ids of each example, a list of int lists of length 1..T; how many were cut to fit).

    A pair is a <end-of-text> b. What is too long loses its end; of a pair, the longer of the two does. With
    `half`, a pair is the last `half` tokens of a and the first `half` of b.
    """
    texts = [encoding.encode_ordinary_batch(list(column)) for column in zip(*examples)]
    if half:
        half = min(half, (T - 1) // 2)
        texts = [[ids[-half:] for ids in texts[0]], [ids[:half] for ids in texts[1]]]
    rows, cut = [], 0
    for parts in zip(*texts):
        room = T - (len(parts) - 1)
        cut += sum(map(len, parts)) > room
        if len(parts) == 2:
            a, b = parts
            keep_a = max(room - len(b), min(len(a), (room + 1) // 2))
            keep_b = room - min(len(a), keep_a)
            rows.append(a[:keep_a] + [encoding.eot_token] + b[:keep_b])
        else:
            rows.append(parts[0][:room] or [encoding.eot_token])
    return rows, cut


def batches(lengths, batch_tokens=BATCH_TOKENS):
    """Yield index arrays that hold at most batch_tokens tokens when padded to their longest;
    longest first."""
    order, first = np.argsort(-np.asarray(lengths), kind="stable"), 0
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
    """hidden (B, T, C), valid (B, T) -> (B, C) float32: mean or max over the valid positions,
    or the last of them."""
    hidden, lengths = hidden.float(), valid.sum(dim=1)
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
    """{kind: (n, C) float32, on the CPU} of n lists of token ids, in batches of similar length."""
    out = {kind: torch.empty(len(rows), model.config.n_embd) for kind in kinds}
    device = next(model.parameters()).device
    bar = tqdm(total=sum(map(len, rows)), unit="tok", unit_scale=True, desc="features", leave=False,
               disable=None)
    for index in batches([len(row) for row in rows]):
        ids, valid = collate([rows[i] for i in index], eot, device)
        for kind, values in pooled_features(model, ids, valid, layer, kinds).items():
            out[kind][index] = values.cpu()
        bar.update(sum(len(rows[i]) for i in index))
    bar.close()
    return out

# -----------------------------------------------------------------------------
# Fine-tuning: the whole model

def finetune(model, rows, y, tests, K, eot, layer, kind, lr, seed, epochs):
    """Train a copy of the model and a linear head on it, AdamW, warmup and linear decay;
    predictions on each test set.

    rows, tests: lists of token ids. Always begins at the checkpoint, never at a model
    fine-tuned on another task.
    """
    torch.manual_seed(seed)
    rng, device = np.random.default_rng(seed), next(model.parameters()).device
    model = copy.deepcopy(model).train()
    head = torch.nn.Linear(model.config.n_embd, K or 1).to(device)
    torch.nn.init.zeros_(head.weight)
    if not K:
        torch.nn.init.constant_(head.bias, float(y.mean()))
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=lr, weight_decay=0.01)
    batch_size, target = 32, torch.from_numpy(y if K else y.astype(np.float32)).to(device)
    steps = epochs * -(-len(rows) // batch_size)
    factor = torch.optim.lr_scheduler.LambdaLR(optimizer,
                                               lambda s: min((s + 1) / (0.06 * steps + 1), 1 - s / steps))
    for step in tqdm(range(steps), desc=f"finetune lr {lr} seed {seed}", leave=False, disable=None):
        at = step * batch_size % (-(-len(rows) // batch_size) * batch_size)
        order = rng.permutation(len(rows)) if at == 0 else order
        index = order[at:at + batch_size]
        scores = head(pooled_features(model, *collate([rows[i] for i in index], eot, device), layer,
                                      [kind])[kind])
        loss = F.cross_entropy(scores, target[index]) if K else (scores[:, 0] - target[index]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*model.parameters(), *head.parameters()], 1.0)
        optimizer.step()
        factor.step()
    with torch.inference_mode():
        scores = [head(extract(model.eval(), test, eot, layer, [kind])[kind].to(device)).cpu()
                  for test in tests]
    return [(s.argmax(dim=1) if K else s[:, 0].double()).numpy() for s in scores]


def finetune_runs(model, task, rows, tests, eot, kind, args):
    """(predictions of each seed, those of the median seed, {"lr", "held_out": {lr: metric}}); of each, a
    list, one for each dev set.

    The learning rate is chosen by the task's first metric on the held-out tenth of the training split.
    """
    def run(keep, tests, lr, seed):
        return finetune(model, [rows[i] for i in np.flatnonzero(keep)], task.y[keep], tests,
                        len(task.classes), eot, args.layer, kind, lr, seed, args.epochs)

    out, metric = held_out(task.groups), METRICS[task.metrics[0]]
    chosen_on = [[rows[i] for i in np.flatnonzero(out)]]
    by_lr = {lr: metric(run(~out, chosen_on, lr, seed=0)[0], task.y[out]) for lr in LEARNING_RATES}
    lr = max(by_lr, key=by_lr.get)
    predictions = [run(np.ones(len(rows), dtype=bool), tests, lr, seed) for seed in range(args.seeds)]
    true = list(task.dev.values())[0][1]
    order = sorted(range(args.seeds), key=lambda i: metric(predictions[i][0], true))
    return predictions, predictions[order[(args.seeds - 1) // 2]], {"lr": lr, "held_out": by_lr}

# -----------------------------------------------------------------------------
# One checkpoint on one task

def untrained(model):
    """A model of the same shape as at the start of training, from a fixed seed. As its blocks start as the
    identity (see init_weights), its features are its random embeddings: `layer=0` gives them without the
    blocks' work."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Transformer(model.config).eval()


def limit(task, n):
    """The task with at most n training examples (all if n is 0), the same in every run."""
    keep = np.sort(np.random.default_rng(0).permutation(len(task.train))[:n or None])
    return task._replace(train=[task.train[i] for i in keep], y=task.y[keep], groups=task.groups[keep])


def score(task, metric, predictions):
    """[{"value", "se"}] for each dev set."""
    return [{"value": METRICS[metric](p, true), "se": bootstrap(METRICS[metric], p, true, groups)}
            for p, (_, true, groups) in zip(predictions, task.dev.values())]


def evaluate(model, encoding, task, args):
    """A list of results, one for each pooling, dev set and metric."""
    start, eot, K = time.time(), encoding.eot_token, len(task.classes)
    kinds = args.pool or (["mean", "max"] if task.name in STDLIB else ["mean"])
    (rows, cut), *tests = [encode(encoding, examples, model.config.block_size, task.half)
                           for examples in [task.train, *(d[0] for d in task.dev.values())]]
    tests, cut = [t[0] for t in tests], cut + sum(t[1] for t in tests)
    guess = np.bincount(task.y).argmax() if K else task.y.mean()
    majority = [np.full(len(d[1]), guess) for d in task.dev.values()]
    sources = {"untrained": (untrained(model), 0), "embeddings": (model, 0), "model": (model, args.layer)}
    if args.finetune:
        del sources["model"]
    features = {name: [extract(m, r, eot, layer, kinds) for r in [rows, *tests]]
                for name, (m, layer) in sources.items()}
    results = []
    for kind in kinds:
        fits = {name: probe(f[0][kind], task.y, task.groups, [t[kind] for t in f[1:]], K)
                for name, f in features.items()}
        seeds = None
        if args.finetune:
            seeds, *fits["model"] = finetune_runs(model, task, rows, tests, eot, kind, args)
        for metric in task.metrics:
            scores = {name: score(task, metric, fit[0]) for name, fit in fits.items()}
            scores["majority"] = score(task, metric, majority)
            for i, (split, (_, true, _)) in enumerate(task.dev.items()):
                row = {"task": " ".join([task.name, split]).strip(), "metric": metric, "pool": kind,
                       **{name: s[i] for name, s in scores.items()},
                       **{f"{n}_fit": fit[1] for n, fit in fits.items()}}
                if seeds:
                    values = [METRICS[metric](p[i], true) for p in seeds]
                    row["model"] |= {"value": float(np.median(values)), "seeds": values}
                results.append(row | {"n_train": len(task.y), "n_dev": len(true), "malformed": task.malformed,
                                      "cut": cut, "seconds": round(time.time() - start, 1)})
    return results

# -----------------------------------------------------------------------------
# The table

ROWS = {"model": "", "embeddings": "its input embeddings", "untrained": "before training",
        "majority": "most frequent class"}

def cell(score):
    spread = (f" [{100 * min(score['seeds']):.1f}, {100 * max(score['seeds']):.1f}]"
              if "seeds" in score else "")
    return f"{100 * score['value']:.1f} ± {100 * score['se']:.1f}{spread}"


def table(reports):
    """Text: a column a checkpoint; for each task, metric and pooling a row for the model
    and one for each baseline."""
    lines = [["", *(report["checkpoint"] for report in reports)]]
    for same in zip(*(report["results"] for report in reports)):
        first = same[0]
        for name, label in ROWS.items():
            label = f"  {label}" if label else f"{first['task']}, {first['metric']}, {first['pool']}"
            lines.append([label, *(cell(row[name]) for row in same)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join([line[0].ljust(widths[0]),
                                *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))])
                     for line in lines)


def build_parser():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("--checkpoint", nargs="+", required=True, metavar="DIR",
                   help="one or several, a column each")
    p.add_argument("--tasks", nargs="+", default=["glue"], choices=["glue", "stdlib", *GLUE, *STDLIB],
                   metavar="TASK", help="glue (default: all nine), stdlib (both built-in ones), or any of "
                                        f"{', '.join([*GLUE, *STDLIB])}")
    p.add_argument("--glue_dir", metavar="DIR",
                   help="folder with CoLA/train.tsv and so on (default: data/glue, downloaded there if "
                        "missing)")
    p.add_argument("--pool", nargs="+", choices=["mean", "last", "max"],
                   help="from token vectors to one vector (default: mean; built-in tasks: mean max)")
    p.add_argument("--layer", type=int, metavar="N",
                   help="features after N blocks (default: all; 0: embeddings)")
    p.add_argument("--max_train", type=int, default=0, metavar="N",
                   help="use at most N training examples of each task, the same for all models "
                        "(default 0: all)")
    p.add_argument("--finetune", action="store_true",
                   help="train the whole model on each task instead of a probe")
    p.add_argument("--epochs", type=int, default=3, help="--finetune: passes over the training split")
    p.add_argument("--seeds", type=int, default=3,
                   help="--finetune: runs; their median and [least, greatest] are shown")
    add_device_flags(p)
    return p


def run(args, command):
    """Evaluate the checkpoints one after the other, write their JSON files, print the table."""
    names = [n for t in args.tasks for n in {"glue": GLUE, "stdlib": STDLIB}.get(t, [t])]
    if min(args.epochs, args.seeds) < 1 or args.max_train < 0 or 0 < args.max_train < 20:
        raise ValueError("epochs and seeds must be at least 1, max_train 0 (all) or at least 20")
    device = pick_device(args.device)
    torch.backends.cuda.enable_cudnn_sdp(False)         # it would plan anew for each of hundreds of shapes
    loaded = [(c, *load_checkpoint(c, device), load_tokenizer(c)) for c in args.checkpoint]
    for checkpoint, model, *_ in loaded:
        if not 0 <= (args.layer or 0) <= model.config.n_layer:
            raise ValueError(f"{checkpoint} has {model.config.n_layer} blocks: --layer {args.layer} "
                             "is not there")
        if model.config.block_size < 4:
            raise ValueError(f"{checkpoint}: a block_size of {model.config.block_size} is too short for "
                             "a pair of texts")
    tasks = [limit(load_task(name, args.glue_dir or "data/glue", download=not args.glue_dir), args.max_train)
             for name in dict.fromkeys(names)]
    reports = []
    for checkpoint, model, config, encoding in loaded:
        model.dtype = pick_dtype(args.dtype, device)
        report = {"checkpoint": checkpoint, "step": config["step"], "command": command,
                  "dtype": str(model.dtype)[6:], "finetune": args.finetune, "layer": args.layer,
                  "max_train": args.max_train, "results": []}
        for task in tasks:
            results = evaluate(model, encoding, task, args)
            report["results"] += results
            print(f"{checkpoint}: {task.name}, {len(task.y)} training examples, "
                  f"{task.malformed} malformed rows skipped, {results[-1]['cut']} texts cut to "
                  f"{model.config.block_size} tokens, {results[-1]['seconds']} s", flush=True)
        write_json(Path(checkpoint, "eval_glue.json"), report)
        reports.append(report)
    protocol = "fine-tuned, median [range] of seeds" if args.finetune else "linear probe"
    print(f"\n{protocol}, percent ± bootstrap standard error\n{table(reports)}")


def main(argv=None):
    args = build_parser().parse_args(argv)
    reuse_memory()
    with one_line_errors():
        run(args, shlex.join(["python", "eval_glue.py", *(sys.argv[1:] if argv is None else argv)]))


if __name__ == "__main__":
    main()
