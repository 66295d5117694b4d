"""
Pretrain a Transformer with any objective of objectives.py:
bytes -> windows -> (context, target) pairs -> loss -> update.

    python train.py --objective vlm                 # a first run: this Python's standard library, no download
    python train.py --objective ar --out_dir out/ar-wide --n_embd 256 --max_iters 2000
    python train.py --resume --out_dir out/vlm      # go on after Ctrl-C, a crash, a power cut
    python train.py --objective vlm --preset paper  # 16 layers, width 768, on the Pile (data.py fetches it)
    torchrun --standalone --nproc_per_node=8 train.py --objective vlm --preset paper

Everything random is a pure function of (seed, step, index of the sequence in the global batch), and the loss
is summed over the batch and divided once. So a run is the same, to rounding, on 1 or 8 processes, in 1 or 4
micro-batches, and a resumed run continues exactly where it stopped. Progress goes to the screen and, one JSON
object a line, to out_dir/log.jsonl.
"""
import contextlib
import json
import math
import os
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import objectives
from common import (DataError, file_sha256, one_line_errors, peak_flops, pick_dtype, read_checkpoint, reuse_memory,
                    save_checkpoint, save_config, source_digests, write_atomically)
from flags import parse_args
from model import Config, Transformer, flops, num_params
from objectives import OBJECTIVES, Draw, Options
from sample import generate
from tokenizer import load_tokenizer

VAL_SEED = 2407_00935       # validation windows and masks are the same for every run, so that losses compare

# -----------------------------------------------------------------------------
# Processes: one, or several under torchrun

def start_processes(args):
    """Join the other processes, if torchrun started any."""
    if "RANK" in os.environ:
        if args.device.startswith("cuda"):
            torch.cuda.set_device(args.device)
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")


def rank_and_world():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_reduce(tensor, op=dist.ReduceOp.SUM):
    """Sum over the processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op)
    return tensor


def say(text):
    if rank_and_world()[0] == 0:
        tqdm.write(text)

# -----------------------------------------------------------------------------
# Batches

def load_data(args):
    """data.load; the default dataset, the standard library's text, is prepared first when it is missing."""
    rank, _ = rank_and_world()
    if (rank == 0 and args.dataset == "stdlib"
            and not os.path.exists(os.path.join(args.data_dir, "stdlib", "meta.json"))):
        data.prepare("stdlib", data_dir=args.data_dir)
    if dist.is_initialized():
        dist.barrier()
    return data.load(args.dataset, args.data_dir)


def make_options(args, vocab_size):
    """The flags an objective may depend on, as objectives.Options."""
    names = [field.name for field in fields(Options) if field.name != "vocab_size"]
    missing = [name for name in names if not hasattr(args, name)]
    if missing:
        raise DataError(f"objectives.Options has {', '.join(missing)}, but flags.py no flag of that name")
    given = {name: getattr(args, name) for name in names}
    return Options(vocab_size=vocab_size, **given)


def get_batch(shards, options, seed, step, indices):
    """The sequences `indices` of the global batch of a step, as an objectives.Batch:
    a pure function of its arguments.
    """
    draw = Draw(seed, step, indices)
    x = data.windows(shards, objectives.window_size(options), draw.per_sequence(1)[:, 0])   # (B, T + extra)
    return OBJECTIVES[options.objective].batch(x, draw, options)


def to_device(batch, device):
    """Batch of numpy arrays -> list of tensors.

    From pinned memory the copy to a GPU overlaps with computation.
    """
    tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in batch]
    if device.startswith("cuda"):
        tensors = [t.pin_memory().to(device, non_blocking=True) for t in tensors]
    return tensors


def prefetch(make, batches, first, last):
    """Yields (step, make(step)) for every step, while the next one is already made in another thread.

    batches: make(first), which the caller has at hand.
    """
    with ThreadPoolExecutor(1) as pool:
        for step in range(first, last):
            future = pool.submit(make, step + 1) if step + 1 < last else None
            yield step, batches
            batches = future and future.result()


def evaluate(model, shards, options, args):
    """Validation loss, nats per scored token: sum of the losses over sum of the weights,
    every process its share.

    The windows and masks are the same at every call.
    Gradients stay on: without them the model would be compiled anew.
    """
    rank, world = rank_and_world()
    total = torch.zeros(2)
    for i in range(rank, args.eval_iters, world):
        sequences = range(i * args.batch_size, (i + 1) * args.batch_size)
        batch = to_device(get_batch(shards, options, VAL_SEED, 0, sequences), args.device)
        total += torch.stack([model(*batch).detach(), batch[3].sum()]).cpu()
    loss, weight = all_reduce(total.to(args.device)).tolist()
    return loss / weight

# -----------------------------------------------------------------------------
# Optimizer

def make_optimizers(model, args):
    """AdamW for every parameter, or Muon for the blocks' matrices and AdamW for the embedding."""
    adamw = dict(lr=args.learning_rate, betas=(0.9, 0.95), eps=1e-8, weight_decay=args.weight_decay,
                 fused=args.device != "mps")
    if args.optimizer == "adamw":
        return [torch.optim.AdamW(model.parameters(), **adamw)]
    return [torch.optim.AdamW(model.wte.parameters(), **adamw),
            torch.optim.Muon(model.blocks.parameters(), lr=args.muon_lr, weight_decay=args.weight_decay)]


def lr_factor(step, args):
    """Fraction of the peak learning rate at a step:
    linear warmup, constant, linear decay to min_lr_fraction.
    """
    warmup = (step + 1) / (args.warmup_iters + 1)
    left = (args.max_iters - step) / max(1, args.decay_fraction * args.max_iters)
    return min(1.0, warmup, args.min_lr_fraction + (1 - args.min_lr_fraction) * left)


def update(model, optimizers, batches, args, step):
    """One optimizer step on this process's micro-batches.

    Returns (loss, gradient norm), (2,): no host-device sync.
    """
    _, world = rank_and_world()
    total = all_reduce(sum(weights.sum() for *_, weights in batches))   # sum of weights of the global batch
    loss = 0.0
    for i, batch in enumerate(batches):
        with model.no_sync() if world > 1 and i < len(batches) - 1 else contextlib.nullcontext():
            part = model(*batch) / total                                # this micro-batch's share of the loss
            (part * world).backward()                                   # as DDP averages the gradients
        loss = loss + part.detach()
    parameters = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.grad_clip or math.inf)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_factor(step, args)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return torch.stack([loss, grad_norm / world])                       # summed over processes when logged

# -----------------------------------------------------------------------------
# Compilation

COMPILE_PAYS_FLOPS = 2e13   # of a run on a CPU: compiling takes 10 to 20 s, a step is then 1.3 times faster


def pick_compile(args, step_flops):
    """Whether to compile: on a GPU yes,
    on a CPU if there is a C++ compiler and the run is long enough to pay for it.
    """
    if args.compile != "auto":
        return args.compile == "on"
    compiler = shutil.which("g++") or shutil.which("clang++")
    pays = args.device == "cpu" and compiler and step_flops * args.max_iters > COMPILE_PAYS_FLOPS
    return args.device.startswith("cuda") or bool(pays)


def compiled(model, batch):
    """The model under torch.compile, tried on one batch; where that fails, one line and the model itself."""
    start = time.time()
    say("compiling (a second run finds it in the cache) ...")
    try:
        fast = torch.compile(model)
        fast(*batch).backward()
        say(f"compiled in {time.time() - start:.0f} s")
    except Exception as error:      # no compiler, a compiler that fails, an unsupported platform: many kinds
        say("torch.compile does not work here, going on without: "
            f"{(str(error) or repr(error)).splitlines()[0]}")
        fast = model
    model.zero_grad(set_to_none=True)
    return fast

# -----------------------------------------------------------------------------
# The run

def start_folder(args, config):
    """A fresh out_dir: what an earlier run left is removed,
    config and tokenizer make the checkpoint self-contained.
    """
    os.makedirs(args.out_dir, exist_ok=True)
    for name in ["ckpt.pt", "log.jsonl"]:
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(args.out_dir, name))
    shutil.copy(os.path.join(args.data_dir, args.dataset, "tokenizer.json"), args.out_dir)
    save_config(args.out_dir, config, train=vars(args), torch=torch.__version__, sources=source_digests(),
                dataset=dataset_digests(os.path.join(args.data_dir, args.dataset)))


def dataset_digests(folder):
    """sha256 of a dataset's description and vocabulary."""
    return {name: file_sha256(os.path.join(folder, f"{name}.json")) for name in ("meta", "tokenizer")}


def resume_folder(args, model, optimizers):
    """Restore weights and optimizers from out_dir, cut the log at that step,
    return the number of updates done.
    """
    state, _ = read_checkpoint(args.out_dir, args.device)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizer"]):
        optimizer.load_state_dict(saved)
    path = os.path.join(args.out_dir, "log.jsonl")
    if rank_and_world()[0] == 0 and os.path.exists(path):
        with open(path) as file:    # a killed run may have logged steps, or half a line, after its checkpoint
            lines = [line for line in file
                     if line.endswith("}\n") and json.loads(line)["step"] <= state["step"]]
        write_atomically(path, lambda file: file.write("".join(lines).encode()))
    return state["step"]


def train(args):
    """Set up data, model and optimizers, and run."""
    start_processes(args)
    rank, world = rank_and_world()
    meta, shards = load_data(args)
    options = make_options(args, meta["vocab_size"])
    for split in ("train", "val"):
        data.check_window(shards[split], objectives.window_size(options))

    torch.manual_seed(args.seed)
    causal = OBJECTIVES[args.objective].causal
    config = Config(meta["vocab_size"], args.block_size, args.n_layer, args.n_head, args.n_embd, causal)
    model = Transformer(config).to(args.device)
    model.dtype = pick_dtype(args.dtype, args.device)
    optimizers = make_optimizers(model, args)
    first = 0
    if args.resume:
        first = resume_folder(args, model, optimizers)
    elif rank == 0:
        start_folder(args, config)
    for optimizer, peak in zip(optimizers, [args.learning_rate, args.muon_lr]):
        for group in optimizer.param_groups:
            group["peak_lr"] = peak

    # The sequences of the global batch that this process works on, in micro-batches
    local = args.batch_tokens // args.block_size // world
    cuts = [range(i, i + args.batch_size) for i in range(rank * local, (rank + 1) * local, args.batch_size)]

    def make(step):
        return [to_device(get_batch(shards["train"], options, args.seed, step, cut), args.device)
                for cut in cuts]

    batches = make(first)
    scored = sum(positions.numel() for _, positions, _, _ in batches)       # by this process, per update
    step_flops = flops(config, local, args.block_size, scored)
    say(f"{args.objective}, {'causal' if causal else 'bidirectional'} | "
        f"{num_params(config) / 1e6:.2f} M parameters | {args.batch_tokens} tokens an update, "
        f"{scored * world} scored | {args.device} x {world}, {str(model.dtype)[6:]} | {args.out_dir}")
    fast = compiled(model, batches[0]) if pick_compile(args, step_flops) else model
    loop(args, model, fast, optimizers, prefetch(make, batches, first, args.max_iters),
         lambda: evaluate(fast, shards["val"], options, args), first, step_flops)
    if rank == 0:
        finish(args, model, meta)
    if dist.is_initialized():
        dist.destroy_process_group()


def loop(args, model, fast, optimizers, steps, validate, first, step_flops):
    """Update; at their intervals log, validate, save. fast: `model`, compiled or not. steps: see prefetch."""
    rank, world = rank_and_world()
    wrapped = torch.nn.parallel.DistributedDataParallel(fast) if world > 1 else fast
    signals = [0]                           # Ctrl-C and SIGTERM: save, then exit
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: signals.append(number))
    peak, saved, pending, clock = peak_flops(args.device), first, [], time.time()
    bar = tqdm(total=args.max_iters, initial=first, disable=rank != 0, dynamic_ncols=True)

    for step, batches in steps:
        pending.append(update(wrapped, optimizers, batches, args, step))
        done = step + 1
        bar.update()
        final = done == args.max_iters
        logs = final or done % args.log_interval == 0
        stop = signals[-1]
        if world > 1:                       # all stop together, at a step that is logged; a sync
            stop = int(all_reduce(torch.tensor(stop, device=args.device), dist.ReduceOp.MAX)) if logs else 0
        validates = final or done % args.eval_interval == 0
        saves = final or stop or done % args.save_interval == 0
        if not (logs or validates or saves):
            continue

        numbers = all_reduce(torch.stack(pending)).cpu()        # (steps, 2): loss and gradient norm; a sync
        bad = (~numbers.isfinite()).any(dim=1).nonzero()
        if len(bad) or saves and not all(p.isfinite().all() for p in model.parameters()):
            bar.close()
            at = done - len(pending) + 1 + int(bad[0]) if len(bad) else done
            say(f"error: loss, gradient or weights not finite at step {at}; "
                + (f"the checkpoint of step {saved} is kept" if saved else "there is no checkpoint yet"))
            sys.exit(1)
        seconds = time.time() - clock
        rate = len(pending) * args.batch_tokens / seconds
        line = dict(step=done, tokens=done * args.batch_tokens, train_loss=numbers[:, 0].mean().item(),
                    grad_norm=numbers[-1, 1].item(), lr=optimizers[0].param_groups[0]["lr"],
                    tokens_per_second=rate)
        if peak:
            line["mfu"] = len(pending) * step_flops / seconds / peak
        if validates:
            bar.set_postfix_str("validating")
            line["val_loss"] = validate()
            say(f"step {done}: train loss {line['train_loss']:.4f}, val loss {line['val_loss']:.4f}")
        bar.set_postfix_str(f"loss {line['train_loss']:.3f}, {rate:.0f} tokens/s"
                            + (f", MFU {line['mfu']:.0%}" if peak else ""))
        if rank == 0:
            with open(os.path.join(args.out_dir, "log.jsonl"), "a") as file:
                file.write(json.dumps(line) + "\n")
            if saves:
                save_checkpoint(args.out_dir, model, optimizers, done)
        saved = done if saves else saved
        pending, clock = [], time.time()
        if stop and not final:
            bar.close()
            say(f"stopped at step {done} and saved; "
                f"go on with: python train.py --resume --out_dir {args.out_dir}")
            sys.exit(128 + stop)
    bar.close()


def finish(args, model, meta):
    """The result: validation loss in nats per token and bits per byte, and a short sample."""
    with open(os.path.join(args.out_dir, "log.jsonl")) as file:
        val_loss = [json.loads(line) for line in file][-1]["val_loss"]
    split = meta["splits"]["val"]
    bits = val_loss / math.log(2) * split["tokens"] / split["bytes"]
    kind = "of next tokens" if args.objective == "ar" else f"under the {args.objective} objective"
    say(f"validation loss {val_loss:.4f} nats per token {kind}, {bits:.3f} bits per byte; "
        f"checkpoint in {args.out_dir}")
    encoding = load_tokenizer(args.out_dir)
    ids = generate(model.eval(), [encoding.eot_token], min(80, args.block_size - 1), temperature=0.8,
                   generator=torch.Generator().manual_seed(args.seed))
    say("--- a sample (more: python sample.py --checkpoint " + args.out_dir + ") ---\n"
        + encoding.decode(ids[1:]))


def main(argv=None):
    args = parse_args(argv)
    reuse_memory()
    with one_line_errors(DataError, OSError):
        train(args)


if __name__ == "__main__":
    main()
