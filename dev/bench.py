"""
How fast does this machine train with these flags, how far is that from what it can do, and how much faster
than plain PyTorch?

    python dev/bench.py                                     # the preset of this device, all objectives
    python dev/bench.py --preset tiny --objective ar vlm --repeats 40 --json bench.json
    python dev/bench.py --n_layer 6 --n_head 6 --n_embd 384 --block_size 256 --batch_tokens 4096 \
        --vocab_size 4096 --optimizer adamw --compile on

Takes every flag of train.py and measures the training step that it would run, on random tokens.

of ceiling     The operations that the step needs (model.flops: redundant work lowers the share) per second,
               over those of large matrix products in the same dtype, measured in the same process.
plain / ours   The plain version of the same model (float32, eager, logits at every position, the same
               optimizer) is timed in turns with ours. It has a process of its own, as common.reuse_memory,
               which it does without, holds for a whole process.
ms per step    The median over repeats, with the quartiles in brackets. The device is waited for after every
               step, which training does not do.
data ms        The time to make the batches of a step, which training hides behind the step before.
peak MiB       What tensors take up at most during a step, beyond those that are there before it. GPUs only.
"""
import copy
import multiprocessing
import platform
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # so that it runs as `python dev/bench.py`

import flags                                                        # noqa: E402
from common import align, one_line_errors, pick_dtype               # noqa: E402
from common import reuse_memory, write_json                         # noqa: E402
from model import Config, Transformer, flops, plain_loss            # noqa: E402
from objectives import OBJECTIVES, Batch                            # noqa: E402
from run import compiled, pick_compile                              # noqa: E402
from train import get_batch, make_optimizers, to_device, update     # noqa: E402

# -----------------------------------------------------------------------------
# Measuring

def seconds(functions, repeats, device="cpu", warmup=3):
    """{name: (repeats,) seconds} of functions {name: f}.

    They are called in turns, so that what else the machine does hits all of them. Of several, each is called
    twice in its turn and the second call counts: by then the caches are its own again.
    """
    times = {name: [] for name in functions}
    for _ in range(warmup + repeats):
        for name, function in functions.items():
            if len(functions) > 1:
                function()
            start = clock(device)
            function()
            times[name].append(clock(device) - start)
    return {name: np.array(values[warmup:]) for name, values in times.items()}


def clock(device):
    """Seconds, when all that was asked of the device is done."""
    if device != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def peak_memory(step, device):
    """Bytes that tensors take up at most during a step, beyond those that exist before it. None: unknown."""
    if not device.startswith("cuda"):
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return torch.cuda.max_memory_allocated(device) - before


def ceiling(device, dtype):
    """What the device can do at best: FLOP/s of a large matrix product."""
    n = 8192 if device.startswith("cuda") else 2048
    a = torch.randn(n, n, device=device).to(dtype)
    b = torch.randn(n, n, device=device).to(dtype)
    times = seconds({"product": lambda: a @ b}, 15, device)["product"]
    return 2 * n ** 3 / float(np.median(times))

# -----------------------------------------------------------------------------
# The training step, ours and plain

def make_step(args, shards, plain=False):
    """One training step of args.objective, as train.py runs it, or plain.

    Returns (step, load, numbers): two functions, one runs the step and one makes its batches, and
    {"scored": positions, "flops": operations needed, "compiled": bool}.
    """
    # The model. Some of its matrices begin at zero, and products with zeros can be faster on a GPU
    torch.manual_seed(args.seed)
    causal = OBJECTIVES[args.objective].causal
    sizes = args.vocab_size, args.block_size, args.n_layer, args.n_head, args.n_embd
    config = Config(*sizes, causal)
    dtype = torch.float32 if plain else pick_dtype(args.dtype, args.device)
    model = Transformer(config, dtype)
    for block in model.blocks:
        torch.nn.init.normal_(block.attn.c_proj.weight, std=args.n_embd ** -0.5)
        torch.nn.init.normal_(block.mlp.c_proj.weight, std=args.n_embd ** -0.5)
    model = model.to(args.device)

    # The batches of the step
    options = flags.make_options(args, args.vocab_size)
    n = args.batch_tokens // args.block_size                    # sequences
    def load():
        batches = []
        for start in range(0, n, args.batch_size):
            sequences = range(start, start + args.batch_size)
            batch = get_batch(shards, options, args.seed, 0, sequences)
            batches.append(to_device(batch, args.device))
        return batches

    batches = load()
    scored = sum(int((batch.weights > 0).sum()) for batch in batches)
    needed = flops(config, n, args.block_size, scored)

    # The loss
    loss = model
    if plain:
        batches = [score_everywhere(batch) for batch in batches]
        loss = partial(plain_forward, model)
        loss.parameters = model.parameters          # `update` clips their gradients
    elif pick_compile(args, needed):
        torch.compiler.reset()          # else the shapes of the objective before make this one's dynamic
        loss = compiled(model, batches[0])

    # The learning rate 0 leaves the weights as they are, so every repeat is the same work
    optimizers = make_optimizers(model, args)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = 0.0
    step = partial(update, loss, optimizers, batches, args, 0)
    is_compiled = not plain and loss is not model
    return step, load, {"scored": scored, "flops": needed, "compiled": is_compiled}


def plain_forward(model, inputs, positions, targets, weights):
    """What Transformer.forward computes, with all logits in memory at once."""
    hidden = model.features(inputs).flatten(0, 1)[positions]                # (N, C)
    return plain_loss(hidden, model.wte.weight, targets, weights, model.config.vocab_size)


def score_everywhere(batch):
    """The batch with all B*T positions scored, those that were not with weight 0: the same loss."""
    size = batch.inputs.numel()
    positions = torch.arange(size, device=batch.inputs.device)
    targets = batch.targets.new_zeros(size, batch.targets.size(1))
    weights = batch.weights.new_zeros(size)
    used = batch.weights > 0
    targets[batch.positions[used]] = batch.targets[used]
    weights[batch.positions[used]] = batch.weights[used]
    return Batch(batch.inputs, positions, targets, weights)


PLAIN = {}                              # the plain step, in the process that runs it

def start_plain(args, shards):
    """Make the plain step and run it once. Raises torch.OutOfMemoryError if it does not fit."""
    PLAIN.clear()
    step, _, _ = make_step(args, shards, plain=True)
    step()
    PLAIN["step"] = step


def run_plain(device):
    """Run the plain step and wait for it."""
    PLAIN["step"]()
    clock(device)


def measure(args, objective, shards, most, other):
    """All numbers of one objective: a dict for the table and for JSON.

    most: FLOP/s, the ceiling. other: an executor of one process, for the plain version.
    """
    args = copy.copy(args)
    args.objective = objective
    step, load, numbers = make_step(args, shards)

    # Ours and plain in turns
    functions = {"ours": step}
    if not args.no_plain:
        try:
            other.submit(start_plain, args, shards).result()
            functions["plain"] = lambda: other.submit(run_plain, args.device).result()
        except torch.OutOfMemoryError:
            print(f"{objective}: the plain version does not fit into the memory", flush=True)
    times = seconds(functions, args.repeats, args.device)

    # Medians
    low, middle, high = np.quantile(times["ours"], [0.25, 0.5, 0.75]).tolist()
    numbers["ms"] = 1e3 * middle
    numbers["quartiles"] = [1e3 * low, 1e3 * high]
    numbers["tokens_per_second"] = args.batch_tokens / middle
    numbers["of_ceiling"] = numbers["flops"] / middle / most
    numbers["peak_memory"] = peak_memory(step, args.device)
    load_times = seconds({"load": load}, args.repeats, args.device)["load"]
    numbers["data_ms"] = 1e3 * float(np.median(load_times))
    if "plain" in functions:
        numbers["plain_ms"] = 1e3 * float(np.median(times["plain"]))
        numbers["plain_over_ours"] = numbers["plain_ms"] / numbers["ms"]
    return numbers

# -----------------------------------------------------------------------------
# Command line

def table(results):
    """One row per objective. results: {objective: numbers}."""
    head = ["", "ms per step", "tokens/s", "of ceiling", "peak MiB", "data ms", "plain ms", "plain / ours"]
    rows = [head]
    for objective, r in results.items():
        low, high = r["quartiles"]
        memory, plain = "-", ["-", "-"]
        if r["peak_memory"] is not None:
            memory = f"{r['peak_memory'] / 2 ** 20:.0f}"
        if "plain_ms" in r:
            plain = [f"{r['plain_ms']:.1f}", f"{r['plain_over_ours']:.2f}"]
        time_cell = f"{r['ms']:.1f} [{low:.1f}, {high:.1f}]"
        rows.append([objective, time_cell, f"{r['tokens_per_second']:.0f}", f"{r['of_ceiling']:.0%}",
                     memory, f"{r['data_ms']:.1f}", *plain])
    return align(rows)


def build_parser():
    p = flags.build_parser("Measure the training step of each objective.",
                           conflict_handler="resolve")          # --objective takes several here
    p.add_argument("--objective", nargs="+", choices=[*OBJECTIVES, "all"], default=["all"],
                   help="which to measure")
    p.add_argument("--vocab_size", type=int,
                   help="number of text ids (default: that of the preset's dataset)")
    p.add_argument("--repeats", type=int, default=20, help="steps of each kind")
    p.add_argument("--no_plain", action="store_true", help="leave out the plain version")
    p.add_argument("--json", metavar="FILE", help="write all numbers there")
    return p


def run(args):
    """Measure, print and write to --json as it comes. Raises ValueError, one line, for bad input."""
    # The flags
    names = list(OBJECTIVES) if "all" in args.objective else args.objective
    args.objective = names[0]
    args.overwrite = True                                       # nothing is written: any out_dir will do
    flags.complete(args)
    if args.vocab_size is None:
        args.vocab_size = 2048 if args.dataset == "stdlib" else 50257
    if min(args.repeats, args.vocab_size) < 1:
        raise ValueError("repeats and vocab_size must be at least 1")

    # The machine
    device = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    if args.device.startswith("cuda"):
        device = torch.cuda.get_device_name(args.device)
    dtype = pick_dtype(args.dtype, args.device)
    most = ceiling(args.device, dtype)
    print(f"{device}, torch {torch.__version__}")
    print(f"{args.preset}: {args.n_layer} layers, width {args.n_embd}, T {args.block_size}, "
          f"vocabulary {args.vocab_size}, {args.batch_tokens} tokens per step, {args.optimizer}")
    print(f"ceiling: {most / 1e9:.0f} GFLOP/s in {str(dtype)[6:]}", flush=True)

    # Each objective
    results = {}
    report = {"date": time.strftime("%Y-%m-%d"), "device": device, "torch": torch.__version__,
              "flags": {**vars(args), "objective": names}, "ceiling": most, "objectives": results}
    tokens = np.random.default_rng(0).integers(args.vocab_size, size=2 ** 21)
    shards = [tokens.astype(np.uint32)]
    context = multiprocessing.get_context("spawn")
    ignore = (signal.SIGINT, signal.SIG_IGN)                    # Ctrl-C is for this process, which ends it
    with ProcessPoolExecutor(1, context, signal.signal, ignore) as other:
        for name in names:
            print(f"measuring {name} ...", flush=True)
            results[name] = measure(args, name, shards, most, other)
            if args.json:
                write_json(args.json, report)
    print(table(results), flush=True)
    return report


def main(argv=None):
    args = build_parser().parse_args(argv)
    reuse_memory()
    with one_line_errors():
        run(args)


if __name__ == "__main__":
    main()
