"""
Perplexity of causal and masked models on the same text: four definitions, each named, none mixed up.

    python eval_ppl.py --checkpoint out/vlm --val                   # its validation split, no download
    python eval_ppl.py --checkpoint out/ar out/dar out/mlm out/vlm  # WikiText-2 raw test, a column a model
    python eval_ppl.py --checkpoint out/mlm out/vlm --suffix matched --text book.txt --plot book.png
    python eval_ppl.py --checkpoint out/mlm out/vlm --method bound  # also: pseudo, confidence (masked models)

    method         averaged over the text, nats per token             a likelihood?   forward passes a window
    left-to-right  -log P(x[k+1] | x[1..k])                           yes             causal 1, masked 1 per k
    bound          E_n E_|M|=n mean_{j in M} -log P(x[j] | x[not M])  upper bound     --samples
    pseudo         -log P(x[j] | x[not j])                            no              T
    confidence     -log P(x) / T, in the model's order of positions   yes             T

Only left-to-right compares all four objectives (the paper's measurement: perplexity against prompt length); a
causal model is refused by the other three. The text is cut into windows of T = block_size tokens that do not
overlap; a standard error is the standard deviation of the windows' means over sqrt(windows). With different
vocabularies compare bits per byte or word perplexity. All numbers go to CHECKPOINT/eval_ppl_TEXT_METHOD.json:
TEXT is wikitext-2, val or FILE's name without its ending, METHOD may end in -one or -matched.
"""
import argparse
import math
import shlex
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import tokenizer
from common import (DataError, add_device_flags, fetch, file_sha256, has_matplotlib, load_checkpoint, one_line_errors,
                    pick_device, pick_dtype, reuse_memory, unzip, write_json)
from objectives import Draw, Options, mask_batch, mask_count, spread, uniform_masks

SEED = 2407_00935               # of masks and sampled prompt lengths: the same in every run, for every model
WINDOWS = {"left-to-right": 500, "bound": 500, "pseudo": 50, "confidence": 50}
LOGITS_LIMIT = 2 ** 25          # numbers in the largest (N, V) float32 buffer: 128 MiB
WIKITEXT_URL = "https://wikitext.smerity.com/wikitext-2-raw-v1.zip"
WIKITEXT_SHA256 = "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11"
WIKITEXT_TEST_SHA256 = "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"   # wiki.test.raw

NOTES = {                       # what one has to know to read a model's column, by suffix or method
    "left-to-right": "next token after a prompt",
    "full": "next token after a prompt and masks up to block_size; all: --samples prompts a window",
    "one": "next token after a prompt and a single mask; all: --samples prompts a window",
    "matched": "next token after a prompt and no more masks than in training; all: --samples prompts "
               "a window",
    "bound": "upper bound on the nats per token of generation in a random order, from sampled masks",
    "pseudo": "pseudo-perplexity, NOT a likelihood: each token is predicted from both sides",
    "confidence": "exact likelihood of generation in the order of the model's confidence"}

progress = partial(tqdm, unit="batch", dynamic_ncols=True, leave=False, disable=None)

# -----------------------------------------------------------------------------
# The four definitions. x: (n, T) int64 windows. Each returns nats per token, numpy float64

def nats(model, hidden, targets):
    """-log P of the target and of the likeliest token, (2, N). hidden (N, C), targets (N,). Mask token and
    padded ids have logit -inf (model.logits): all probability is on ids that stand for text."""
    rows, parts = max(1, LOGITS_LIMIT // model.config.padded_vocab_size), []
    for h, target in zip(hidden.split(rows), targets.split(rows)):
        logits = model.logits(h)                                                        # (rows, V)
        scores = torch.stack([logits.gather(1, target[:, None])[:, 0], logits.amax(dim=1)])     # (2, rows)
        parts.append(logits.logsumexp(dim=1) - scores)
    return torch.cat(parts, dim=1).cpu().double().numpy()


def left_to_right_causal(model, x, batch_size):
    """-log P(x[k+1] | x[1..k]) for k = 1 .. T-1 of every window, (n, T-1): one forward pass a window."""
    out = []
    for window in progress(x.split(batch_size)):                                        # (B, T)
        hidden = model.features(window[:, :-1]).flatten(0, 1)                           # (B * (T-1), C)
        out.append(nats(model, hidden, window[:, 1:].flatten())[0].reshape(len(window), -1))
    return np.concatenate(out)


def left_to_right_masked(model, x, prompts, masks, batch_size):
    """-log P(x[k+1] | x[1..k]) of a masked model: x[1..k] visible, then masks only, read out
    at the first of them.

    prompts: (n, K) the lengths k at which each window is scored. masks: (n, K), how many follow. Returns
    (n, K). Each (window, k) is a forward pass of k + masks tokens, none done twice; the head runs on one
    position a row. Rows are sorted by length; where lengths differ within a batch, padding is hidden from
    attention."""
    key = np.arange(len(x))[:, None] * x.size(1) + prompts                              # (n, K), window and k
    key, first, inverse = np.unique(key, return_index=True, return_inverse=True)    # (jobs,), (jobs,), (n, K)
    row, k, m = (torch.from_numpy(a).to(x.device) for a in (*np.divmod(key, x.size(1)), masks.ravel()[first]))
    out = np.empty(len(first))
    for job in progress(torch.argsort(k + m, stable=True).split(batch_size)):
        window, prompt, length = x[row[job]], k[job, None], (k + m)[job, None]  # (B, T), (B, 1), (B, 1)
        column = torch.arange(int(length[-1]), device=x.device)                 # (L,), the longest; a sync
        inputs = torch.where(column < prompt, window[:, :len(column)], model.config.mask_token)     # (B, L)
        valid = None if int(length[0]) == len(column) else column < length              # (B, L)
        hidden = model.features(inputs, valid).take_along_dim(prompt[:, None], 1)[:, 0]     # (B, C)
        out[job.cpu().numpy()] = nats(model, hidden, window.gather(1, prompt)[:, 0])[0]
    return out[inverse].reshape(prompts.shape)


def bound(model, x, samples, batch_size):
    """Monte Carlo estimate of the likelihood bound of a masked model, nats per token of every window, (n,):

        -log P(x) / T  <=  E_{n ~ U{1..T}} E_{|M| = n}  1/n sum_{j in M} -log P(x[j] | x[not M])

    P(x) is the mixture over all orders of generating the tokens one by one (Uria et al. 2014, Hoogeboom
    et al. 2022); by Jensen's inequality. It is minus the ELBO of masked diffusion. Each window gets `samples`
    counts n (see `grid`) and for each a uniform mask of exactly n positions, a pure function of (SEED,
    sample, window), not of the batch."""
    T, options = x.size(1), Options(block_size=x.size(1), vocab_size=model.config.vocab_size,
                                    normalization="bound")
    counts = 1 + grid(len(x), samples, levels=T)                                        # (n, S)
    out = np.zeros(len(x))
    cuts = np.split(np.arange(len(x)), range(batch_size, len(x), batch_size))
    for rows, s in progress([(rows, s) for rows in cuts for s in range(counts.shape[1])]):
        count = counts[rows, s]                                                         # (B,)
        draw = Draw(SEED, s, rows)
        masked = uniform_masks(count, draw, options)
        batch = mask_batch(x[rows].cpu().numpy(), masked, count.sum(), draw, options)
        inputs, positions, targets = (torch.from_numpy(a).to(x.device) for a in batch[:3])
        hidden = model.features(inputs).flatten(0, 1)[positions]                        # (N, C)
        loss = nats(model, hidden, targets[:, 0])[0] * batch.weights                    # (N,), weights 1/n
        out[rows] += np.bincount(batch.positions // T, loss, minlength=len(rows)) / counts.shape[1]
    return out


def pseudo(model, x, batch_size):
    """Pseudo-log-likelihood (Salazar et al. 2020), 1/T sum_j -log P(x[j] | x[not j]), one mask at a time:
    (n,). Not a likelihood: every token is predicted from its future too, and exp(-T * result) does not
    sum to 1 over texts."""
    n, T = x.shape
    out = np.empty(n * T)
    for job in progress(torch.arange(n * T, device=x.device).split(batch_size)):
        window, j = x[job // T], (job % T)[:, None]                                     # (B, T), (B, 1)
        inputs = window.scatter(1, j, model.config.mask_token)
        hidden = model.features(inputs).take_along_dim(j[:, None], 1)[:, 0]             # (B, C)
        out[job.cpu().numpy()] = nats(model, hidden, window.gather(1, j)[:, 0])[0]
    return out.reshape(n, T).mean(axis=1)


def confidence(model, x, batch_size):
    """Exact likelihood under deterministic unmasking (DUEL, arXiv 2603.01367), (n,):

        -log P(x) / T = 1/T sum_i -log P(x[j_i] | x[j_1], ..., x[j_{i-1}])

    Start from masks only. j_i is the masked position where the model is surest of some token (the first of
    equals, up to 1e-4 nats): a function of what is visible, not of x[j_i]. There the text's token is scored
    and shown, so exp(-T * result) sums to 1 over texts: the probability that generation in this order
    writes x."""
    out = []
    for window in x.split(batch_size):                                                  # (B, T)
        inputs, total = torch.full_like(window, model.config.mask_token), 0.0
        for left in progress(range(window.size(1), 0, -1)):                             # masks left, each row
            position = (inputs == model.config.mask_token).nonzero()[:, 1].view(-1, left)       # (B, left)
            hidden = model.features(inputs).take_along_dim(position[:, :, None], 1)     # (B, left, C)
            loss, surest = nats(model, hidden.flatten(0, 1),
                                window.gather(1, position).flatten()).reshape(2, -1, left)
            equal = surest <= surest.min(axis=1, keepdims=True) + 1e-4      # all are, where all is masked
            best = equal.argmax(axis=1)[:, None]                                    # (B, 1), into position
            total += np.take_along_axis(loss, best, axis=1)[:, 0]
            j = position.gather(1, torch.from_numpy(best).to(x.device))             # (B, 1), into the window
            inputs = inputs.scatter(1, j, window.gather(1, j))
        out.append(total / window.size(1))
    return np.concatenate(out)


def grid(n, samples, levels):
    """(n, S) of 0 .. levels-1: for each of n windows an even grid of S = min(samples, levels) numbers.

    Number s of window i is floor(levels * (s + u_i) / S), u_i = (u + i*phi) mod 1 with phi the golden ratio:
    all numbers are equally likely, every window is spread evenly, and so are the windows. S = levels: each
    exactly once."""
    S = min(samples, levels)
    u = spread(Draw(SEED, 0, []).offset, np.arange(n), 2 ** 24) / 2 ** 24              # (n,)
    return (levels * (np.arange(S) + u[:, None]) / S).astype(np.int64)


def standard_lengths(T):
    """Prompt lengths 1, 2, 4, ... and T - 1, a list."""
    return sorted({*(2 ** i for i in range(T.bit_length()) if 2 ** i < T), T - 1})


def evaluate(model, x, train, args):
    """Nats per token of every window, as {"all": (n,)} and, for left-to-right,
    {prompt length k: (n,)} as well."""
    n, T = x.shape
    if args.method != "left-to-right":
        score = {"bound": partial(bound, samples=args.samples), "pseudo": pseudo,
                 "confidence": confidence}[args.method]
        return {"all": score(model, x, batch_size=args.batch_size)}
    lengths = args.prompt_lengths or standard_lengths(T)
    if model.config.causal:
        loss = left_to_right_causal(model, x, args.batch_size)                          # (n, T-1)
        return {"all": loss.mean(axis=1), **{k: loss[:, k - 1] for k in lengths}}
    prompts = np.hstack((np.tile(lengths, (n, 1)), 1 + grid(n, args.samples, T - 1)))   # (n, K + S)
    masks = np.ones_like(prompts) if args.suffix == "one" else T - prompts
    if args.suffix == "matched":
        ratio = train["mask_ratio"] if train["objective"] == "mlm" else train["mask_range"][1]
        masks = np.minimum(masks, mask_count(ratio, T))
    loss = left_to_right_masked(model, x, prompts, masks, args.batch_size)
    return {"all": loss[:, len(lengths):].mean(axis=1), **{k: loss[:, i] for i, k in enumerate(lengths)}}

# -----------------------------------------------------------------------------
# The text

def wikitext(folder):
    """Path of WikiText-2's raw test split, downloaded to `folder` if it is not there. Raises DataError."""
    path, archive = Path(folder, "wiki.test.raw"), Path(folder, "wikitext-2-raw-v1.zip")
    if not path.exists():
        archive.parent.mkdir(parents=True, exist_ok=True)
        fetch(WIKITEXT_URL, str(archive), sha256=WIKITEXT_SHA256)
        unzip(archive, {"wikitext-2-raw/wiki.test.raw": path})
        archive.unlink()
    if file_sha256(path) != WIKITEXT_TEST_SHA256:
        raise DataError(f"{path} is not the official file: remove it, or name it with --text")
    return path


def read_tokens(args, checkpoint, train):
    """([token arrays], tokenizer): the text in the checkpoint's vocabulary.
    Raises ValueError or OSError, one line."""
    encoding = tokenizer.load_tokenizer(checkpoint)
    if args.val:
        folder = Path(args.data_dir or train.get("data_dir", data.DATA_DIR), train["dataset"])
        _, splits = data.load(folder.name, str(folder.parent))
        if Path(folder, "tokenizer.json").read_text() != Path(checkpoint, "tokenizer.json").read_text():
            raise ValueError(f"{folder} has another tokenizer than {checkpoint}: it was prepared anew "
                             "after training")
        return splits["val"], encoding
    path = Path(args.text) if args.text else wikitext(args.wikitext_dir)
    try:
        return [np.array(encoding.encode_ordinary(path.read_bytes().decode()))], encoding
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start}") from None


def cut_windows(streams, T, limit, eot):
    """Windows of T tokens, each after the one token before it (`eot` at the start of a stream): (n, 1 + T)
    int64. They do not overlap or cross from one stream into the next; a stream's last tokens, fewer than T,
    are not used. Of more than `limit` (0: none) that many are taken, evenly spread."""
    starts = [(stream, i * T) for stream in streams for i in range(len(stream) // T)]
    if not starts:
        raise ValueError(f"the text has {sum(map(len, streams))} tokens, less than one window of {T} "
                         "(block_size)")
    n = min(len(starts), limit or len(starts))
    chosen = [starts[(2 * i + 1) * len(starts) // (2 * n)] for i in range(n)]
    rows = [[stream[start - 1] if start else eot, *stream[start:start + T]] for stream, start in chosen]
    return np.array(rows, dtype=np.int64)                                               # shards may be uint16


def text_size(x, scored, encoding):
    """(bytes, words) of the original text in the last `scored` tokens of each row of x. Words are parted by
    white space and counted in the token they start in; end-of-text parts words and has no bytes."""
    text = [encoding.decode_single_token_bytes(i) for i in range(encoding.n_vocab)]
    text[encoding.eot_token] = b" "
    words = np.array([len(t.split()) for t in text])
    joins_left, joins_right = (np.array([not t[i:][:1].isspace() for t in text]) for i in (0, -1))
    token, before = x[:, -scored:], x[:, -scored - 1:-1]
    n_words = words[token].sum() - (joins_left[token] & joins_right[before]).sum()      # a word that goes on
    return int(tokenizer.token_bytes(encoding)[token].sum()), int(n_words)

# -----------------------------------------------------------------------------
# Numbers, table, plot

def summary(loss, per_byte, per_word):
    """Mean and standard error over windows in all units.
    loss: (n,) nats per token. per_*: tokens per byte, word."""
    mean, se, result = loss.mean(), loss.std(ddof=1) / len(loss) ** 0.5 if len(loss) > 1 else math.nan, {}
    for name, unit in [("nats_per_token", 1), ("bits_per_byte", per_byte / math.log(2))]:
        result |= {name: mean * unit, name + "_se": se * unit}
    for name, unit in [("perplexity", 1), ("word_perplexity", per_word)]:
        value = np.exp(min(mean * unit, 700))                                           # float64: up to e^709
        result |= {name: value, name + "_se": value * se * unit}                        # d exp(a) = exp(a) da
    return {name: float(value) if math.isfinite(value) else None for name, value in result.items()}


def table(reports):
    """All models, a column each, as text."""
    def cell(result, name):
        value, se = result.get(name), result.get(name + "_se")
        style = (".3g" if value is None or value >= 1e5 else ".1f" if value >= 100
                 else ".2f" if value >= 10 else ".3f")
        return "-" if value is None else f"{value:{style}}" + ("" if se is None else f" ± {se:{style}}")

    names = [Path(r["checkpoint"]).name for r in reports]
    rows = [["", *(names if len(set(names)) == len(names) else (r["checkpoint"] for r in reports))]]
    for k in sorted({k for r in reports for k in r["prompt_lengths"]}, key=int):
        rows.append([f"perplexity after {k}",
                     *(cell(r["prompt_lengths"].get(k, {}), "perplexity") for r in reports)])
    for name in ("perplexity", "nats_per_token", "bits_per_byte", "word_perplexity"):
        rows.append(["all: " + name.replace("_", " "), *(cell(r["all"], name) for r in reports)])
    width = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join([row[0].ljust(width[0]), *map(str.rjust, row[1:], width[1:])]) for row in rows)


def plot(reports, path):
    """Perplexity against prompt length, a line a model. Needs matplotlib."""
    from matplotlib.figure import Figure
    axes = Figure(figsize=(6, 4), layout="constrained").subplots()
    for r in reports:
        points = [(int(k), p["perplexity"], p["perplexity_se"] or 0) for k, p in r["prompt_lengths"].items()]
        axes.errorbar(*zip(*points), marker="o", capsize=2, label=r["checkpoint"])
    axes.set(xscale="log", yscale="log", xlabel="prompt length (tokens)",
             ylabel=f"perplexity on {reports[0]['text']}")
    axes.legend()
    axes.figure.savefig(path, dpi=150)

# -----------------------------------------------------------------------------
# Command line

def build_parser():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--checkpoint", nargs="+", required=True,
                   help="one or several folders written by train.py")
    p.add_argument("--method", choices=WINDOWS, default="left-to-right",
                   help="definition, see the top of the file")
    p.add_argument("--suffix", choices=["full", "one", "matched"], default="full",
                   help="left-to-right, masked models: what follows the prompt; masks up to block_size as in "
                        "generation, one mask, or at most as many masks as the model saw in training")
    text = p.add_mutually_exclusive_group()
    text.add_argument("--text", metavar="FILE",
                      help="UTF-8 text to use in place of WikiText-2's raw test split")
    text.add_argument("--val", action="store_true",
                      help="use the validation split of the checkpoints' own dataset")
    p.add_argument("--wikitext_dir", default="data/wikitext-2",
                   help="where wiki.test.raw is, or is downloaded to")
    p.add_argument("--data_dir", help="--val: where the datasets are (default: where train.py read them)")
    p.add_argument("--prompt_lengths", type=int, nargs="+", metavar="K",
                   help="left-to-right: tokens in the prompt (default: 1, 2, 4, ... and block_size - 1)")
    p.add_argument("--max_windows", type=int, help="take that many windows, evenly spread; 0: all (default: "
                   + ", ".join(f"{n} for {method}" for method, n in WINDOWS.items()) + ")")
    p.add_argument("--samples", type=int, default=8, help="masked models: mask counts per window (bound) or "
                   "prompt lengths per window (left-to-right, for the mean over all positions), evenly "
                   "spread; block_size: all there are")
    p.add_argument("--plot", nargs="?", const="perplexity.png", metavar="FILE",
                   help="draw perplexity by prompt length")
    p.add_argument("--batch_size", type=int, default=64,
                   help="sequences per forward pass; does not change the result")
    add_device_flags(p, dtype="float32")
    return p


def check(args, loaded):
    """Raises ValueError, one line, for what cannot be evaluated. loaded: [(checkpoint, model, config)]."""
    if min([args.samples, args.batch_size, *(args.prompt_lengths or [])]) < 1 or (args.max_windows or 0) < 0:
        raise ValueError("samples, batch_size and prompt_lengths must be at least 1, max_windows at least 0")
    if args.plot and (args.method != "left-to-right" or not has_matplotlib()):
        raise ValueError("--plot needs --method left-to-right and matplotlib (pip install matplotlib)")
    for checkpoint, model, config in loaded:
        if model.config.causal and args.method != "left-to-right":
            raise ValueError(f"{checkpoint} is causal, it cannot fill masks: --method {args.method} "
                             "does not apply")
        if max([1, *(args.prompt_lengths or [])]) >= model.config.block_size:
            raise ValueError(f"{checkpoint}: prompt and next token must fit into block_size "
                             f"{model.config.block_size}")
        objective = config["train"].get("objective")
        if args.suffix == "matched" and not model.config.causal and objective not in ("mlm", "vlm"):
            raise ValueError(f"{checkpoint}: how many masks {objective} saw in training is not known to "
                             "--suffix matched; take full or one")
    datasets = {config["train"].get("dataset") for *_, config in loaded}
    if args.val and (len(datasets) > 1 or None in datasets):
        raise ValueError("--val needs checkpoints that were trained on one and the same dataset; "
                         "use --text FILE")


@torch.inference_mode()
def measure(model, x, encoding, train, args):
    """The part of a report that is measured."""
    start, T = time.time(), model.config.block_size
    losses = evaluate(model, torch.from_numpy(x[:, 1:]).to(args.device), train, args)
    scored = T - (args.method == "left-to-right")       # left to right, a window's first token is only read
    tokens, (n_bytes, n_words) = len(x) * scored, text_size(x, scored, encoding)
    results = {str(k): summary(loss, tokens / max(1, n_bytes), tokens / max(1, n_words))
               for k, loss in losses.items()}
    return {"windows": len(x), "block_size": T, "tokens": tokens, "bytes": n_bytes, "words": n_words,
            "seconds": time.time() - start, "all": results.pop("all"), "prompt_lengths": results}


def run(args, command):
    """Evaluate the checkpoints one after the other, write their JSON files, print the table."""
    args.device = pick_device(args.device)
    loaded = [(checkpoint, *load_checkpoint(checkpoint, args.device)) for checkpoint in args.checkpoint]
    check(args, loaded)
    name = "val" if args.val else Path(args.text).stem if args.text else "wikitext-2"
    limit = WINDOWS[args.method] if args.max_windows is None else args.max_windows
    texts, reports = [], []
    for checkpoint, model, config in loaded:
        streams, encoding = read_tokens(args, checkpoint, config["train"])
        texts.append((cut_windows(streams, model.config.block_size, limit, encoding.eot_token), encoding))
    for (checkpoint, model, config), (x, encoding) in zip(loaded, texts):
        model.dtype, train = pick_dtype(args.dtype, args.device), config["train"]
        suffix = None if model.config.causal or args.method != "left-to-right" else args.suffix
        lookahead = train["lookahead"] if train.get("objective") == "dar" else 1
        ending = f"-{suffix}" if suffix in ("one", "matched") else ""
        path = Path(checkpoint, f"eval_ppl_{name}_{args.method}{ending}.json")
        mixture = (f" (dar: of the next {lookahead}, scored as if it were the next one)"
                   if lookahead > 1 else "")
        print(f"{checkpoint}: {NOTES[suffix or args.method]}{mixture}; {len(x)} windows -> {path}",
              flush=True)
        report = {"checkpoint": checkpoint, "step": config["step"], "objective": train.get("objective"),
                  "lookahead": lookahead, "command": command, "text": name, "method": args.method,
                  "suffix": suffix, "samples": args.samples, "dtype": str(model.dtype)[6:],
                  "device": args.device}
        reports.append(report | measure(model, x, encoding, train, args))
        write_json(path, reports[-1])
    print(f"\n{args.method} on {name}, ± standard error over windows\n{table(reports)}")
    if len({(r["block_size"], r["tokens"], r["bytes"]) for r in reports}) > 1:
        print("Windows differ between models (vocabulary or block_size): compare bits per byte and "
              "word perplexity.")
    if args.plot:
        plot(reports, args.plot)


def main(argv=None):
    args = build_parser().parse_args(argv)
    reuse_memory()
    with one_line_errors():
        run(args, shlex.join(["python", "eval_ppl.py", *(sys.argv[1:] if argv is None else argv)]))


if __name__ == "__main__":
    main()
