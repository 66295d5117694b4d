"""
The singular values that a trained model believes in: cooccurrence.py's measurement on real text.

The theory is about A[c, y] = P(context c, target y) of an objective, and the singular values of
N = D1^-1/2 A D2^-1/2. Real contexts hardly ever repeat, so A cannot be counted. But a trained model has an
opinion of it. Draw n contexts from held-out text as the objective does in training, and let P(y|c) be
what the model predicts there, p(y) the mean of it. Then

    N[c, y] = P(y|c) / sqrt(n p(y)),    1 = s_1 >= s_2 >= ...,    chi2 = sum of s_i^2 beyond s_1

are those of the model's own joint distribution. Two things to know when reading them:

- A model that has learned little has small singular values for the wrong reason: it predicts p(y)
  everywhere, and chi2 is 0. So compare models along their training (several checkpoints of a run) or
  at equal loss on the contexts, which is printed beside.
- chi2 of n contexts is too small on average (one context: 0). For large n the shortfall is proportional
  to 1/n. So it is printed for n, n/2 and n/4, and extrapolated: 2 chi2(n) - chi2(n/2). If it grows by
  more than half as much from n/2 to n as from n/4 to n/2, that is too small as well.

    python spectrum.py --checkpoint out/ar out/dar out/mlm out/vlm
    python spectrum.py --checkpoint out/ar out/vlm --contexts 32768 --plot spectrum.png
    python spectrum.py --checkpoint out/vlm --features      # and of what probes read

Also written to CHECKPOINT/spectrum.json.
"""
import math
import os
import sys
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import cooccurrence
import data
from common import (DataError, Parser, add_device_flags, align, check_dataset, check_different, check_exists,
                    check_plot, command_line, load_checkpoint, one_line_errors, pick_device, result_path,
                    save_figure, write_result)
from model import Config
from objectives import OBJECTIVES, Draw, options_of_run, window_size

# -----------------------------------------------------------------------------
# From predictions to singular values

def singular_values(P, weights):
    """s (V,), falling, of N. They are exact if P holds every context once.

    P (n, V) float64: each row a distribution. weights (n,): of the contexts, in any unit (1/n each, to
    get the definition above).
    """
    return cooccurrence.singular_values(weights[:, None] * P)


def chi2(P, weights, parts=1):
    """Sum of s_i^2 beyond s_1, mean over equal parts of the contexts: 2 is what n/2 contexts give."""
    values = []
    for rows in np.array_split(np.arange(len(P)), parts):
        N = cooccurrence.normalize(weights[rows, None] * P[rows])
        values.append((N ** 2).sum() - 1)
    return np.mean(values)


def effective_rank(X):
    """exp(entropy of s_i^2 / sum of s^2) of the centred features X (n, C), in 1..C, and s (C,).

    It is k for features that vary equally in k directions and not at all in the others.
    """
    s = np.linalg.svd(X - X.mean(0), compute_uv=False) / math.sqrt(len(X))
    share = s ** 2 / (s ** 2).sum()
    share = share[share > 0]
    return math.exp(-(share * np.log(share)).sum()), s

# -----------------------------------------------------------------------------
# From a trained model to predictions

class Contexts(NamedTuple):
    """B contexts, one of each sequence, and their targets."""
    inputs: np.ndarray                  # (B, T) int64, as the objective shows them
    position: np.ndarray                # (B,) int64, the scored position
    targets: np.ndarray                 # (B, K) int64
    weights: np.ndarray                 # (B,) float64: how often the objective scores such a sequence
    text: np.ndarray                    # (B, T) int64, nothing masked


def sample_contexts(shards, options, indices, seed):
    """One context per sequence. With their weights they are distributed as the objective's scored positions.

    Only one, because those of a sequence depend on each other. Within the sequence a position is drawn by
    its weight in the loss, and the sequence counts as much as all of its scored positions: in `vlm` with
    normalization "tokens", one with more masks counts more.
    """
    draw = Draw(seed, 0, indices)
    x = data.windows(shards, window_size(options), draw.per_sequence(1)[:, 0])      # (B, T + extra)
    batch = OBJECTIVES[options.objective].batch(x, draw, options)
    B, T = batch.inputs.shape

    # The weight of each position, and its row in the batch
    weight = np.zeros(B * T)
    weight[batch.positions] = batch.weights
    weight = weight.reshape(B, T)
    row = np.zeros(B * T, dtype=np.int64)
    row[batch.positions] = np.arange(len(batch.positions))
    row = row.reshape(B, T)

    # Draw one position of each sequence
    total = weight.sum(axis=1)                                                      # (B,)
    below = draw.per_sequence(1) * total[:, None]                                   # (B, 1)
    position = (weight.cumsum(axis=1) > below).argmax(axis=1)                       # (B,)
    targets = batch.targets[row[np.arange(B), position]]                            # (B, K)
    return Contexts(batch.inputs, position, targets, total, x[:, :T])


@torch.no_grad()
def predict(model, inputs, position):
    """P(y|c) (B, V) float64 over the ids that stand for text. inputs (B, T), position (B,) int64."""
    device = model.wte.weight.device
    hidden = model.features(torch.from_numpy(inputs).to(device))                    # (B, T, C)
    hidden = hidden[torch.arange(len(inputs)), torch.from_numpy(position)]          # (B, C)
    logits = model.logits(hidden).cpu().double()
    return logits.softmax(-1)[:, :model.config.vocab_size].numpy()


@torch.no_grad()
def mean_features(model, text):
    """The mean of the last layer's hidden states, as probes read it: (B, T) -> (B, C) float64."""
    device = model.wte.weight.device
    hidden = model.features(torch.from_numpy(text).to(device))                      # (B, T, C)
    return hidden.float().mean(1).cpu().double().numpy()


def measure(model, shards, options, n, seed=0, features=False, batch_size=64):
    """The spectrum of a model on n contexts, as a dict of JSON values. Losses in nats."""
    batches = []                        # (P, weights, losses) of each
    pooled = []
    for first in tqdm(range(0, n, batch_size), desc="contexts", leave=False, disable=None):
        indices = range(first, min(n, first + batch_size))
        contexts = sample_contexts(shards, options, indices, seed)
        P = predict(model, contexts.inputs, contexts.position)                      # (B, V)
        likelihoods = np.take_along_axis(P, contexts.targets, axis=1)               # (B, K)
        batches.append((P, contexts.weights, -np.log(likelihoods).mean(axis=1)))
        if features:
            pooled.append(mean_features(model, contexts.text))

    # The model's joint distribution of context and target
    P, weights, losses = [np.concatenate(arrays) for arrays in zip(*batches)]       # (n, V), (n,), (n,)
    del batches                         # as large as P
    s = singular_values(P, weights)
    hitting = cooccurrence.describe(s)["hitting"]
    whole, half, quarter = [chi2(P, weights, parts) for parts in (1, 2, 4)]
    result = {"contexts": n,
              "loss": np.average(losses, weights=weights),
              "chi2": whole, "chi2_half": half, "chi2_quarter": quarter,
              "chi2_limit": 2 * whole - half,
              "hitting": hitting if hitting < math.inf else None,
              "singular_values": s[:1024].round(7).tolist()}
    if features:
        rank, feature_values = effective_rank(np.concatenate(pooled))
        result["effective_rank"] = rank
        result["feature_singular_values"] = feature_values.round(7).tolist()
    return result

# -----------------------------------------------------------------------------
# Command line

def held_out_text(checkpoint, config, data_dir=None):
    """(validation shards, options) of the run. Raises DataError if the dataset is not the run's."""
    train = config.get("train", {})
    if "dataset" not in train or train.get("objective") not in OBJECTIVES:
        raise DataError(f"{checkpoint}: its config.json names no dataset, or no objective that exists")
    data_dir = data.data_dir_of_run(train, data_dir)
    _, splits = data.load(train["dataset"], data_dir)

    # The same name may stand for other text or other tokens
    folder = os.path.join(data_dir, train["dataset"])
    check_dataset(folder, checkpoint)
    return splits["val"], options_of_run(train, Config(**config["model"]))


def table(results):
    """{checkpoint: result} -> text with one column per checkpoint."""
    def row(name, key, digits=3):
        values = [result.get(key) for result in results.values()]
        return [name, *["-" if value is None else f"{value:.{digits}f}" for value in values]]

    def spectrum_rows(name, key):                                           # i = 1, 2, 4, .. 1024
        spectra = [result.get(key, []) for result in results.values()]
        for i in [2 ** power for power in range(11)]:
            values = [f"{s[i - 1]:.3f}" if i <= len(s) else "-" for s in spectra]
            if set(values) != {"-"}:
                rows.append([f"{name}_{i}", *values])

    rows = [["", *results], row("updates", "step", 0), row("loss on these contexts (nats)", "loss")]
    spectrum_rows("s", "singular_values")
    rows += [row("chi2, all contexts", "chi2", 1),
             row("chi2, half of them", "chi2_half", 1),
             row("chi2, a quarter", "chi2_quarter", 1),
             row("chi2, extrapolated", "chi2_limit", 1),
             row("mean hitting time", "hitting", 0)]
    if any("effective_rank" in result for result in results.values()):
        spectrum_rows("features: s", "feature_singular_values")
        rows.append(row("features: effective rank", "effective_rank", 1))
    return align(rows)


def figure(path, results):
    """The theory's spectra, the models' own, and those of their features where they were measured."""
    from matplotlib.figure import Figure
    features = {name: result["feature_singular_values"] for name, result in results.items()
                if "feature_singular_values" in result}
    n = 3 if features else 2
    fig = Figure(figsize=(5 * n, 4), layout="constrained")
    panels = fig.subplots(1, n)
    axes = "i", "singular value $s_i$"

    # A Transformer knows which position it predicts, but `dar` not which of the next tokens is asked for
    P = cooccurrence.text_distribution()
    theory = {}
    for name, pairs in cooccurrence.short_contexts().items():
        tgt = "none" if name.startswith("dar") else "row"
        theory[name] = cooccurrence.singular_values(cooccurrence.cooccurrence(P, pairs, tgt))
    cooccurrence.panel(panels[0], "Toy language, exact, position known", *axes, theory)

    # The models, and what probes read of them
    models = {name: result["singular_values"] for name, result in results.items()}
    cooccurrence.panel(panels[1], "Trained models", *axes, models, xscale="log")
    if features:
        title = "Their features, mean over tokens"
        cooccurrence.panel(panels[2], title, *axes, features, xscale="log", yscale="log")
    save_figure(fig, path)


def build_parser():
    parser = Parser(__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", nargs="+", default=["out/vlm"], metavar="DIR",
                        help="checkpoint folders, of several models or of one along its run")
    parser.add_argument("--contexts", type=int, default=8192, metavar="N",
                        help="contexts to draw; memory is 32 bytes * N * vocabulary")
    parser.add_argument("--features", action="store_true",
                        help="also the singular values of the mean hidden state, and its effective rank: "
                             "exp(entropy of the shares of variance of its principal directions)")
    parser.add_argument("--seed", type=int, default=0, help="seed of windows, masks and positions")
    parser.add_argument("--data_dir", help="folder of the datasets (default: that of the run)")
    parser.add_argument("--plot", metavar="FILE", help="draw the spectra (needs matplotlib)")
    parser.add_argument("--results", metavar="DIR",
                        help="write to DIR/CHECKPOINT'S NAME instead of the checkpoint's own folder")
    add_device_flags(parser, dtype="float32")
    return parser


def check_flags(args):
    """Raises ValueError, one line, for flags that make no sense."""
    if args.contexts < 4:
        raise ValueError(f"--contexts must be at least 4, not {args.contexts}")
    if args.seed < 0:
        raise ValueError(f"--seed must be at least 0, not {args.seed}")
    check_exists("--data_dir", args.data_dir)
    check_different(args.checkpoint, args.results)
    check_plot(args.plot)


def run(args, command):
    """Measure the checkpoints one after the other, write their JSON files, print the table."""
    # Read and check everything before the work begins
    check_flags(args)
    device = pick_device(args.device)
    loaded = []
    for checkpoint in args.checkpoint:
        model, config = load_checkpoint(checkpoint, device, args.dtype)
        shards, options = held_out_text(checkpoint, config, args.data_dir)
        loaded.append((checkpoint, model, config, shards, options))

    # Measure and write
    results = {}
    all_saved = True
    for checkpoint, model, config, shards, options in loaded:
        result = {"checkpoint": checkpoint, "step": config["step"], "weights": config["weights"],
                  "objective": options.objective, "command": command, "seed": args.seed,
                  **measure(model, shards, options, args.contexts, args.seed, args.features)}
        results[checkpoint] = result
        saved = write_result(result_path(checkpoint, "spectrum.json", args.results), result)
        all_saved = all_saved and saved

    # Show
    print(table(results))
    if args.plot:
        figure(args.plot, results)
    if not all_saved:
        sys.exit(2)


def main(argv=None):
    args = build_parser().parse_args(argv)
    with one_line_errors():
        run(args, command_line("spectrum.py", argv))


if __name__ == "__main__":
    main()
