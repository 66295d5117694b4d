"""
How fast is each objective, and how far is that from what this machine can do?

    python dev/bench.py                                             # the preset of this device, all objectives
    python dev/bench.py --preset tiny --objective ar vlm --repeats 40 --json bench.json
    python dev/bench.py --parts step --n_layer 6 --n_head 6 --n_embd 384 --block_size 256 --batch_tokens 4096 \
        --vocab_size 4096 --optimizer adamw --compile on
    python dev/bench.py --compare bench.json                        # the same flags: ratios to that run

Takes every flag of train.py and measures the training step that it would run, on random tokens. The ceilings
are measured in the same process: large matrix products in the dtypes used, and copying memory. Beside each
step stands the plain version of the same model, float32, eager, logits at every position, in turns with it
and with the same optimizer, in a process of its own: model.reuse_memory, which it does without, is for all of
a process. It is left out where it does not fit into a GPU's memory.
Operations are counted for the work that is needed (model.flops), so redundant work lowers the percentage.
Times are medians over repeats, of the step with its quartiles in brackets; the device is waited for after
every step, which training does not do. "data ms" is the time to make a step's batch, which training hides.
"""
import copy
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

if __name__ == "__main__":                                      # the profiler's own messages are not for us
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))          # run as python dev/bench.py
import data
import flags
from documents import pieces, stdlib_files
from eval_ppl import left_to_right_masked, standard_lengths
from common import one_line_errors, pick_dtype, reuse_memory, write_json
from model import Config, Transformer, flops
from objectives import OBJECTIVES
from sample import append, draw, fill
from tokenizer import build_encoding, make_tokenizer
from train import compiled, get_batch, make_optimizers, make_options, pick_compile, to_device, update

# -----------------------------------------------------------------------------
# Measuring

def clock(device):
    """Seconds, when all that was asked of the device is done."""
    if device != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def seconds(functions, repeats, device="cpu", warmup=3):
    """{name: (repeats,) seconds} of functions {name: f}, called in turns:
    what else the machine does hits all.

    Of several, each is called twice in its turn, and the second call counts: the caches are its own again.
    """
    out = {name: [] for name in functions}
    for _ in range(warmup + repeats):
        for name, f in functions.items():
            if len(functions) > 1:
                f()
            start = clock(device)
            f()
            out[name].append(clock(device) - start)
    return {name: np.array(times[warmup:]) for name, times in out.items()}


def median(times):
    """Of (n,) seconds: {"ms": median, "quartiles": [ms, ms]}."""
    low, middle, high = (1e3 * np.quantile(times, q) for q in (0.25, 0.5, 0.75))
    return {"ms": middle, "quartiles": [low, high]}


def peak_memory(step, device):
    """Bytes that tensors take up at the most during a step, beyond those that are there before it.

    0 where this cannot be known (Apple's GPUs).
    """
    if device == "mps":
        return 0
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    return max(0, int(np.cumsum([0, *(size for _, size in changes)]).max()))


def ceilings(device, dtypes):
    """What the device can do: {dtype: FLOP/s of a large matrix product, "copy": bytes/s read and written}."""
    n, repeats = (8192, 20) if device.startswith("cuda") else (2048, 15)
    out = {}
    for dtype in dtypes:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        times = seconds({"product": lambda: a @ b}, repeats, device)["product"]
        out[str(dtype)[6:]] = 2 * n ** 3 / float(np.median(times))
    a, b = (torch.zeros(2 ** 26, device=device) for _ in range(2))                  # 256 MiB each
    times = seconds({"copy": lambda: b.copy_(a)}, repeats, device)["copy"]
    return out | {"copy": 2 * 4 * 2 ** 26 / float(np.median(times))}

# -----------------------------------------------------------------------------
# What is measured. Each part returns {name: number or dict}, for the table and for JSON

def plain_loss(model, inputs, positions, targets, weights):
    """What Transformer.forward computes, written the plain way: all logits at once."""
    log_p = model.logits(model.features(inputs).flatten(0, 1)[positions]).log_softmax(dim=-1)   # (N, V)
    return -(log_p.gather(1, targets).mean(dim=1) * weights).sum()


def every_position(batch, size):
    """The batch with all `size` positions scored, at weight 0 those that were not: the same loss."""
    inputs, positions, targets, weights = batch
    every = torch.zeros(size, targets.size(1), dtype=targets.dtype, device=targets.device)
    weight = torch.zeros(size, device=weights.device)
    positions = positions[weights > 0]
    every[positions], weight[positions] = targets[weights > 0], weights[weights > 0]
    return [inputs, torch.arange(size, device=inputs.device), every, weight]


def build(args, causal, vocab_size):
    """A model with no matrix at zero, as some are at first: products with zeros can be faster on a GPU."""
    torch.manual_seed(args.seed)
    config = Config(vocab_size, args.block_size, args.n_layer, args.n_head, args.n_embd, causal)
    model = Transformer(config)
    for block in model.blocks:
        for part in (block.attn, block.mlp):
            torch.nn.init.normal_(part.c_proj.weight, std=args.n_embd ** -0.5)
    model = model.to(args.device)
    model.dtype = pick_dtype(args.dtype, args.device)
    return model


def make_step(args, shards, plain=False):
    """One training step of args.objective, as train.py runs it or plain: {"step": a function, "load": one
    that makes its batches, "scored": positions, "needed": floating-point operations, "compiled": bool}.
    """
    options = make_options(args, args.vocab_size)
    model = build(args, OBJECTIVES[args.objective].causal, args.vocab_size)
    sequences = range(args.batch_tokens // args.block_size)
    cuts = [sequences[i:i + args.batch_size] for i in sequences[::args.batch_size]]

    def load():
        return [to_device(get_batch(shards, options, args.seed, 0, cut), args.device) for cut in cuts]

    batches, loss = load(), model
    scored = sum(int((weights > 0).sum()) for *_, weights in batches)
    needed = flops(model.config, len(sequences), args.block_size, scored)
    if plain:
        model.dtype = torch.float32
        batches, loss = [every_position(b, b[0].numel()) for b in batches], partial(plain_loss, model)
    elif pick_compile(args, needed):
        torch.compiler.reset()          # else the shapes of the objective before make this one's dynamic
        loss = compiled(model, batches[0])
    optimizers = make_optimizers(model, args)
    for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
        group["peak_lr"] = 0.0          # the weights stay, so every repeat is the same work
    return {"step": partial(update, loss, optimizers, batches, args, 0), "load": load, "scored": scored,
            "needed": needed, "compiled": loss is not model}


PLAIN = {}                              # the plain step, in its own process

def start_plain(args, shards):
    """Whether the plain step fits into the memory."""
    PLAIN.clear()
    try:
        PLAIN.update(make_step(args, shards, plain=True), device=args.device)
        plain_step()
        return True
    except torch.OutOfMemoryError:
        PLAIN.clear()
    torch.cuda.empty_cache()
    return False


def plain_step():
    PLAIN["step"]()
    clock(PLAIN["device"])


def plain_memory():
    return peak_memory(PLAIN["step"], PLAIN["device"])


def bench_step(args, objective, shards, ceiling, other):
    """One training step of an objective, as train.py runs it and plain. other: an executor of one process."""
    args = copy.copy(args)
    args.objective = objective
    ours = make_step(args, shards)
    steps = {"step": ours["step"]}
    if not args.no_plain and other.submit(start_plain, args, shards).result():
        steps["plain"] = lambda: other.submit(plain_step).result()
    times = seconds(steps, args.repeats, args.device)
    result, needed = median(times["step"]), ours["needed"]
    rate = args.batch_tokens / result["ms"] * 1e3
    result |= {"tokens_per_second": rate, "flops_per_second": needed / result["ms"] * 1e3,
               "of_ceiling": needed / result["ms"] * 1e3 / ceiling, "floor_ms": needed / ceiling * 1e3,
               "scored": ours["scored"], "peak_memory": peak_memory(ours["step"], args.device),
               "load_ms": median(seconds({"load": ours["load"]}, args.repeats, args.device)["load"])["ms"],
               "compiled": ours["compiled"]}
    if "plain" in steps:
        result["plain"] = median(times["plain"]) | {"peak_memory": other.submit(plain_memory).result()}
        result["times_plain"] = result["plain"]["ms"] / result["ms"]
    return result


def bench_prepare(args):
    """Text to shards, in bytes of text a second, against tiktoken's own batch call on the same documents."""
    texts = [text for _, text in stdlib_files()]
    encoding = build_encoding(make_tokenizer("bpe:2048", iter(texts)))
    size = sum(len(text.encode()) for text in texts)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "texts.jsonl")
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

        def prepare():
            writer = data.ShardWriter(folder, "train", "uint16", data.SHARD_TOKENS)
            for _, ids, _, _ in data.encode(pieces([str(source)], 0.0, print), encoding):
                writer.write(ids)
            writer.close()

        times = seconds({"ours": prepare, "tiktoken": lambda: encoding.encode_ordinary_batch(texts)}, 5,
                        warmup=1)
    rate = {name: size / float(np.median(t)) for name, t in times.items()}
    return {"bytes_per_second": rate["ours"], "tiktoken": rate["tiktoken"],
            "ratio": rate["ours"] / rate["tiktoken"]}


@torch.inference_mode()
def bench_score(args):
    """Left-to-right scoring of a masked model against plain forward passes over as many tokens."""
    model, T = build(args, False, args.vocab_size).eval(), args.block_size
    lengths = standard_lengths(T)
    x = torch.randint(args.vocab_size, (32, T), device=args.device)
    prompts = np.tile(lengths, (len(x), 1))                                         # (n, K)
    rows = x.repeat(len(lengths), 1).split(64)
    times = seconds({
        "score": lambda: left_to_right_masked(model, x, prompts, T - prompts, batch_size=64),
        "forward": lambda: [model.features(batch) for batch in rows]
    }, max(3, args.repeats // 4), args.device, 1)
    score, forward = (float(np.median(t)) for t in times.values())
    return {"tokens_per_second": prompts.size * T / score, "times_forward": score / forward}


@torch.inference_mode()
def bench_sample(args):
    """New tokens a second, one text at a time: causal with and without the cache,
    masked from left to right.
    """
    def recompute(model, ids, n):
        for _ in range(n):
            hidden = model.features(torch.tensor([ids], device=args.device))[:, -1]
            ids = ids + pick(model.logits(hidden)).tolist()

    pick, n = partial(draw, temperature=0.8), args.block_size - 1
    causal, masked = (build(args, kind, args.vocab_size).eval() for kind in (True, False))
    masks = [0] + [masked.config.mask_token] * n
    times = seconds({"cached": lambda: append(causal, [0], n, pick),
                     "uncached": lambda: recompute(causal, [0], n),
                     "masked": lambda: fill(masked, masks, pick)}, 3, args.device, 1)
    return {f"{name}_tokens_per_second": n / float(np.median(t)) for name, t in times.items()}

# -----------------------------------------------------------------------------
# Output

def step_table(steps):
    rows = [["", "ms a step", "tokens/s", "GFLOP/s", "of ceiling", "floor ms", "peak MiB", "data ms",
             "plain ms", "plain MiB", "plain / ours"]]
    for objective, r in steps.items():
        plain = ["-"] * 3 if "plain" not in r else [
            f"{r['plain']['ms']:.1f}", f"{r['plain']['peak_memory'] / 2 ** 20:.0f}",
            f"{r['times_plain']:.2f}"]
        low, high = r["quartiles"]
        rows.append([objective, f"{r['ms']:.1f} [{low:.1f}, {high:.1f}]", f"{r['tokens_per_second']:.0f}",
                     f"{r['flops_per_second'] / 1e9:.0f}", f"{r['of_ceiling']:.0%}", f"{r['floor_ms']:.1f}",
                     f"{r['peak_memory'] / 2 ** 20:.0f}", f"{r['load_ms']:.1f}", *plain])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)


def rates(result, path=""):
    """{path: value} of every rate in a nested result: what --compare compares; more is better."""
    out = {}
    for key, value in result.items():
        if isinstance(value, dict):
            out |= rates(value, f"{path}{key} ")
        elif key.endswith("per_second") or path == "ceilings ":
            out[path + key] = value
    return out


RUN = ("preset", "n_layer", "n_head", "n_embd", "block_size", "batch_size", "batch_tokens", "vocab_size",
       "optimizer", "dtype", "compile", "device")       # flags that must be equal for two results to compare

def check_same(old, new):
    """Raises ValueError, one line, unless the flags of two results ask for the same work."""
    other = [f"{name} {old.get(name)}" for name in RUN if old.get(name) != new.get(name)]
    if other:
        raise ValueError(f"the other result was measured with {', '.join(other)}: give the same flags")


def comparison(old, new):
    """Lines with the ratio new / old of every rate that both results have. Raises ValueError if none."""
    old, new = rates(old), rates(new)
    both = [name for name in new if old.get(name)]
    if not both:
        raise ValueError("the other result has no number in common with this one")
    width = max(map(len, both))
    return "\n".join(f"{name:{width}}  {old[name]:12.4g} -> {new[name]:12.4g}  x {new[name] / old[name]:.2f}"
                     for name in both)

# -----------------------------------------------------------------------------
# Command line

PARTS = ("step", "prepare", "score", "sample")

def build_parser():
    p = flags.build_parser("Measure training, preparation, scoring and sampling.", conflict_handler="resolve")
    p.add_argument("--objective", nargs="+", choices=[*OBJECTIVES, "all"], default=["all"],
                   help="which to measure")
    p.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    p.add_argument("--vocab_size", type=int, help="default: that of the preset's dataset")
    p.add_argument("--repeats", type=int, default=20, help="steps of each kind")
    p.add_argument("--no_plain", action="store_true", help="without the plain version")
    p.add_argument("--json", metavar="FILE", help="write all numbers there")
    p.add_argument("--compare", metavar="FILE", help="print the ratios to an earlier --json FILE")
    return p


def run(args):
    """Measure, print and write to --json as it comes. Raises ValueError, one line, for bad input."""
    names = list(OBJECTIVES) if "all" in args.objective else args.objective
    args.objective, args.overwrite = names[0], True             # nothing is written: any out_dir will do
    flags.complete(args)
    if args.vocab_size is None:
        args.vocab_size = {"stdlib": 2048}.get(args.dataset, 50257)
    if min(args.repeats, args.vocab_size) < 1:
        raise ValueError("repeats and vocab_size must be at least 1")
    old = json.loads(Path(args.compare).read_text()) if args.compare else None
    if old:
        check_same(old["flags"], vars(args))
    dtype = pick_dtype(args.dtype, args.device)
    device = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
    result = {"device": device, "torch": torch.__version__, "flags": {**vars(args), "objective": names},
              "ceilings": ceilings(args.device, list(dict.fromkeys([dtype, torch.float32]))), "parts": {}}
    ceiling = result["ceilings"]
    print(f"{device}, torch {torch.__version__}, {args.preset}: {args.n_layer} layers, width {args.n_embd}, "
          f"T {args.block_size}, vocabulary {args.vocab_size}, {args.batch_tokens} tokens a step, "
          f"{args.optimizer}\n"
          "ceilings: " + ", ".join(f"{k} {v / 1e9:.0f} {'GB' if k == 'copy' else 'GFLOP'}/s"
                                   for k, v in ceiling.items()), flush=True)
    for part in args.parts:
        if part == "step":
            shards = [np.random.default_rng(0).integers(args.vocab_size, size=2 ** 21).astype(np.uint32)]
            r = {}
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as other:
                for name in names:
                    print(f"measuring {name} ...", flush=True)
                    r[name] = bench_step(args, name, shards, ceiling[str(dtype)[6:]], other)
            print(step_table(r), flush=True)
        elif part == "prepare":
            r = bench_prepare(args)
            print(f"preparation: {r['bytes_per_second'] / 1e6:.1f} MB of text a second, "
                  f"{r['ratio']:.0%} of bare tiktoken")
        elif part == "score":
            r = bench_score(args)
            print(f"masked left-to-right scoring: {r['tokens_per_second']:.0f} tokens/s, "
                  f"{r['times_forward']:.2f} times the plain forward passes")
        else:
            r = bench_sample(args)
            print("sampling, tokens/s: " + ", ".join(f"{n.split('_')[0]} {v:.0f}" for n, v in r.items()))
        result["parts"][part] = r
        if args.json:
            write_json(args.json, result)
    if old:
        print(f"\nratios to {args.compare} ({old['device']}, torch {old['torch']})\n"
              f"{comparison(old, result)}")
    return result


def main(argv=None):
    args = build_parser().parse_args(argv)
    reuse_memory()
    with one_line_errors():
        run(args)


if __name__ == "__main__":
    main()
