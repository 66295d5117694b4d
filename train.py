"""
Pretrain a Transformer: tokens -> windows -> (context, target) pairs of an objective -> loss -> update.

    python train.py --objective vlm                 # a first run: the standard library's text, no download
    python train.py --objective ar --out_dir out/ar-wide --n_embd 256 --max_iters 2000
    python train.py --resume --out_dir out/vlm      # continue after Ctrl-C or a crash
    python train.py --objective vlm --preset paper  # 16 layers, width 768, on the Pile (data.py fetches it)
    torchrun --standalone --nproc_per_node=8 train.py --objective vlm --preset paper

Sizes, learning rates and all other settings: PRESETS in flags.py. What surrounds the loop (processes, the
run's folder, signals, compilation): run.py.

Everything random is a pure function of (seed, step, index of the sequence in the global batch), and the loss
is summed over the batch and divided once. So a run is the same, to rounding, on 1 or 8 processes, in 1 or 4
micro-batches, and a resumed run continues exactly where it stopped. Progress goes to the screen and to
out_dir/log.jsonl, one JSON object per line.
"""
import contextlib
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch

import data
import objectives
from common import DataError, one_line_errors, output_may_close, peak_flops, pick_dtype, reuse_memory
from flags import check_folder, flag_without_effect, make_options, parse_args
from model import Config, Transformer, flops, num_params
from objectives import OBJECTIVES, Batch, Draw
from run import (all_reduce, check_finite, check_space, command, compiled, held_by_run, in_first_process,
                 leave_together, load_data, log, one_line_stop, patience, pick_compile, progress_bar,
                 rank_and_world, restore, resume_command, save, say, say_passes, show_speed, start_processes,
                 stop_vote, together, write_folder)
from sample import demonstration
from tokenizer import load_tokenizer

VAL_SEED = 2407_00935       # validation windows and masks are the same for every run, so that losses compare
CONTEXT_GAIN = 0.03         # a loss less than this fraction below that of word frequencies: no context yet

# -----------------------------------------------------------------------------
# Batches

def get_batch(shards, options, seed, step, indices):
    """The sequences `indices`, (B,), of the global batch of a step, as an objectives.Batch.

    shards: a list of (n,) ids. A pure function of its arguments.
    """
    draw = Draw(seed, step, indices)
    x = data.windows(shards, objectives.window_size(options), draw.per_sequence(1)[:, 0])    # (B, T + extra)
    return OBJECTIVES[options.objective].batch(x, draw, options)


def to_device(batch, device):
    """The Batch with tensors on the device instead of numpy arrays.

    From pinned memory the copy to a GPU overlaps with computation.
    """
    tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in batch]
    if device.startswith("cuda"):
        tensors = [tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors]
    return Batch(*tensors)


def check_first_batch(shards, options, args):
    """Raises DataError, one line that says what is wrong, for an objective that cannot be trained.

    Called once, before the first step. The loop checks nothing.
    """
    for split in ("train", "val"):
        data.check_window(shards[split], objectives.window_size(options), split)
    try:
        objectives.check_objective(options, same_shapes=args.compile != "off")
        batch = get_batch(shards["train"], options, args.seed, 0, range(args.batch_size))
        objectives.check_batch(batch, options)
    except objectives.WrongBatch as error:
        raise DataError(f"objectives.py, {options.objective}: {error}") from None
    unused = flag_without_effect(args, options.vocab_size)
    if unused and not args.resume:
        raise DataError(f"--{unused} has no effect on {options.objective}: leave it out")


def prefetch(make, batches, first, last):
    """Yields (step, make(step)) for first <= step < last. Meanwhile the batches of the next step are made.

    batches: make(first), the batches of the first step, already made.
    """
    with ThreadPoolExecutor(1) as pool:
        for step in range(first, last):
            if step + 1 < last:
                future = pool.submit(make, step + 1)
            yield step, batches
            if step + 1 < last:
                batches = future.result()


def validation_batches(shards, options, args):
    """This process's share of the args.eval_sequences validation sequences, in micro-batches.

    The windows and masks are the same at every call, whatever the batch size and the number of processes.
    """
    rank, world = rank_and_world()
    starts = range(0, args.eval_sequences, args.batch_size)
    for start in starts[rank::world]:
        stop = min(start + args.batch_size, args.eval_sequences)
        yield get_batch(shards, options, VAL_SEED, 0, range(start, stop))


def evaluate(model, shards, options, args, after_batch):
    """The validation loss in nats per scored token: the sum of the losses over the sum of the weights.

    after_batch() is called after every batch, equally often in all processes. Gradients stay on: without them
    the model would be compiled again.
    """
    _, world = rank_and_world()
    total = torch.zeros(2)
    batches = validation_batches(shards, options, args)
    for _ in range(math.ceil(args.eval_sequences / (args.batch_size * world))):
        batch = next(batches, None)                         # None: another process has one batch more
        if batch is not None:
            batch = to_device(batch, args.device)
            total += torch.stack([model(*batch).detach(), batch.weights.sum()]).cpu()
        after_batch()
    loss, weight = all_reduce(total.to(args.device)).tolist()
    return loss / weight


def unigram_loss(dataset, shards, options, args):
    """The validation loss, in nats, of a model that only knows how often each token occurs in training.

    dataset: its folder.
    """
    log_p = data.load_unigram(dataset)                                      # (V,) float64, nats
    total = torch.zeros(2, dtype=torch.float64)
    for batch in validation_batches(shards, options, args):
        nats = -log_p[batch.targets].mean(axis=1)                           # (N,)
        total += torch.tensor([(nats * batch.weights).sum(), batch.weights.sum()])
    loss, weight = all_reduce(total.float().to(args.device)).tolist()
    return loss / weight

# -----------------------------------------------------------------------------
# Optimizer

def make_optimizers(model, args):
    """AdamW for every parameter, or Muon for the blocks' matrices and AdamW for the embedding."""
    adamw = dict(lr=args.learning_rate, betas=(0.9, 0.95), eps=1e-8, weight_decay=args.weight_decay,
                 fused=args.device != "mps")
    if args.optimizer == "adamw":
        return [torch.optim.AdamW(model.parameters(), **adamw)]
    muon = torch.optim.Muon(model.blocks.parameters(), lr=args.muon_lr, weight_decay=args.weight_decay)
    return [torch.optim.AdamW(model.wte.parameters(), **adamw), muon]


def set_rates(optimizers, args):
    """Give every group its peak learning rate and weight decay, also where a checkpoint held others."""
    for optimizer, peak in zip(optimizers, [args.learning_rate, args.muon_lr]):
        for group in optimizer.param_groups:
            group["peak_lr"] = peak
            group["weight_decay"] = args.weight_decay


def lr_factor(step, args):
    """Fraction of the peak learning rate at a step: linear warmup, constant, linear decay.

    The decay takes the last decay_fraction of the run and ends at min_lr_fraction.
    """
    warmup = (step + 1) / (args.warmup_iters + 1)
    left = (args.max_iters - step) / max(1, args.decay_fraction * args.max_iters)
    decay = args.min_lr_fraction + (1 - args.min_lr_fraction) * left
    return min(1.0, warmup, decay)


def update(model, optimizers, batches, args, step):
    """One optimizer step on this process's micro-batches.

    Returns (loss, gradient norm), a tensor (2,), without a host-device sync.
    """
    _, world = rank_and_world()

    # Forward and backward. Each micro-batch is divided by the weight of the whole global batch
    total = all_reduce(sum(batch.weights.sum() for batch in batches))
    loss = 0.0
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        context = contextlib.nullcontext()
        if world > 1 and not last:
            context = model.no_sync()                           # DDP adds up the gradients once, at the end
        with context:
            part = model(*batch) / total                        # this micro-batch's share of the loss
            (part * world).backward()                           # DDP averages the gradients: times world
        loss = loss + part.detach()

    # Clip the gradient
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)

    # Step
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_factor(step, args)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return torch.stack([loss, grad_norm / world])               # summed over processes when logged

# -----------------------------------------------------------------------------
# The run

def train(args):
    """Set up the processes and the data, then run with the folder locked."""
    start_processes(args)
    meta, shards = load_data(args)
    options = make_options(args, meta["vocab_size"])
    together(lambda: check_first_batch(shards, options, args))
    with held_by_run(args.out_dir):
        in_first_process(lambda: check_folder(args))    # again: another run may have ended just now
        stop = pretrain(args, meta, shards, options)
        leave_together()
    if stop:
        sys.exit(128 + stop)


def pretrain(args, meta, shards, options):
    """Set up model and optimizers, continue or begin the run, and finish it.

    meta: of the dataset. shards: {"train": [(n,) ids, ...], "val": [...]}. Returns the signal that stopped
    it early, or 0.
    """
    rank, world = rank_and_world()
    dataset = os.path.join(args.data_dir, args.dataset)

    # Model and optimizers
    torch.manual_seed(args.seed)
    causal = OBJECTIVES[args.objective].causal
    config = Config(meta["vocab_size"], args.block_size, args.n_layer, args.n_head, args.n_embd, causal)
    model = Transformer(config).to(args.device)
    model.dtype = pick_dtype(args.dtype, args.device)
    optimizers = make_optimizers(model, args)

    # The run's folder: what an earlier run left, or a fresh one
    done = {"step": 0, "tokens": 0}
    if args.resume:
        done = restore(args, model, optimizers)
        if done["step"] >= args.max_iters:
            say(f"{args.out_dir} is at step {done['step']} of {args.max_iters} already; "
                "to train it further, give a larger --max_iters")
            return 0
    set_rates(optimizers, args)
    in_first_process(lambda: check_space(args.out_dir, model))
    in_first_process(lambda: write_folder(args, config, dataset))

    # The sequences of the global batch that this process works on, in micro-batches
    local = args.batch_tokens // args.block_size // world
    starts = range(rank * local, (rank + 1) * local, args.batch_size)
    cuts = [range(start, start + args.batch_size) for start in starts]

    def make(step):
        return [to_device(get_batch(shards["train"], options, args.seed, step, cut), args.device)
                for cut in cuts]

    # Say what is about to happen
    batches = make(done["step"])
    scored = sum(len(batch.positions) for batch in batches)                 # by this process, per update
    step_flops = flops(config, local, args.block_size, scored)
    baseline = unigram_loss(dataset, shards["val"], options, args)
    say_passes(args, done, sum(map(len, shards["train"])))
    dtype = str(model.dtype).removeprefix("torch.")
    say(f"{args.objective}, {'causal' if causal else 'bidirectional'} | "
        f"{num_params(config) / 1e6:.2f} M parameters | {args.batch_tokens} tokens per update, "
        f"{scored * world} scored | {args.device} x {world}, {dtype} | {args.out_dir}")

    # Train
    fast = compiled(model, batches[0]) if pick_compile(args, step_flops) else model
    validate = partial(evaluate, fast, shards["val"], options, args)
    steps = prefetch(make, batches, done["step"], args.max_iters)
    line, stop = loop(args, model, fast, optimizers, steps, validate, baseline, done, step_flops)
    if line["step"] < args.max_iters:
        return stop
    if rank == 0:
        finish(args, model, meta["splits"]["val"], shards["val"], line["val_loss"], baseline)
    return 0


def loop(args, model, fast, optimizers, steps, validate, baseline, done, step_flops):
    """Update; at their intervals log, validate and save.

    fast: `model`, compiled or not. steps: see `prefetch`. validate(after_batch): see `evaluate`.
    baseline: that of word frequencies. done: {"step", "tokens"} of the run so far.
    Returns the last line of the log, a dict, and the signal that stopped the run, or 0.
    """
    _, world = rank_and_world()
    wrapped = torch.nn.parallel.DistributedDataParallel(fast) if world > 1 else fast
    step = done["step"]
    tokens = done["tokens"]
    saved = step                                # the last step that a checkpoint holds
    stop = 0                                    # the signal on which the run stops
    pending = []                                # (loss, gradient norm) of the steps since the last log line
    clock = time.time()

    def save_now():
        nonlocal saved
        if saved == step:
            return
        if stop:
            say(f"stopping: saving step {step} ...{patience()}")
        in_first_process(lambda: save(args.out_dir, model, optimizers, step, tokens))
        saved = step

    def notice_stop():
        """A stop during a long validation saves at once: torchrun kills 30 s after SIGTERM."""
        nonlocal stop
        stop = stop or vote()
        if stop:
            save_now()

    with stop_vote() as vote, contextlib.closing(steps), progress_bar(args.max_iters, done["step"]) as bar:
        for step, batches in steps:
            # Update
            pending.append(update(wrapped, optimizers, batches, args, step))
            step += 1
            tokens += args.batch_tokens
            with output_may_close():
                bar.update()

            # What is due after this step?
            stop = vote()
            final = step == args.max_iters
            validates = final or step % args.eval_interval == 0
            saves = final or step % args.save_interval == 0
            logs = validates or saves or stop or step % args.log_interval == 0
            if not logs:
                continue

            # Log
            numbers = all_reduce(torch.stack(pending)).cpu()    # (steps, 2), host-device sync
            may_save = validates or saves or stop
            check_finite(numbers, model if may_save else None, step, saved)
            line = {"step": step, "tokens": tokens, "lr": optimizers[0].param_groups[0]["lr"],
                    **measured(numbers, time.time() - clock, step_flops, args)}
            show_speed(bar, line)

            # Validate
            if validates:
                line["val_loss"] = validate(notice_stop)
                say(f"step {step}: train loss {line['train_loss']:.4f}, val loss {line['val_loss']:.4f}"
                    f"{beside(baseline)}")

            # Save
            in_first_process(lambda: log(args.out_dir, line))
            if saves or stop:
                save_now()
            if stop and not final:
                say(f"stopped at step {step} and saved; resume with: {resume_command(args)}")
                break
            pending = []
            clock = time.time()
    return line, stop


def measured(numbers, seconds, step_flops, args):
    """The part of a log line about the steps since the last one. numbers: (steps, 2), of `update`."""
    steps = len(numbers)
    losses, grad_norms = numbers.T                              # (steps,) each
    line = {"train_loss": losses.mean().item(), "grad_norm": grad_norms[-1].item(),
            "tokens_per_second": steps * args.batch_tokens / seconds}
    peak = peak_flops(args.device)
    if peak:
        line["mfu"] = steps * step_flops / seconds / peak
    return line

# -----------------------------------------------------------------------------
# The end of a run: its loss, and what the model was trained for

def finish(args, model, val_size, shards, val_loss, baseline):
    """Print the validation loss beside that of word frequencies, and some text that the model writes.

    val_size: {"tokens", "bytes"} of the validation split. shards: its ids. baseline: see unigram_loss.
    """
    objective = OBJECTIVES[args.objective]
    options = make_options(args, model.config.vocab_size)
    masked = objective.most_masks(options) is not None
    next_token = objective.causal and not masked and objective.ahead(options) == 1

    # The loss. Only the next token's is the length of a code, so only there are bits per byte meaningful
    code = ""
    if next_token:
        kind = "next"
        bits = val_loss / math.log(2) * val_size["tokens"] / val_size["bytes"]
        code = f", {bits:.3f} bits per byte"
    elif masked:
        kind = "masked"
    else:
        kind = "target"
    say(f"validation loss {val_loss:.4f} nats per {kind} token{code}{beside(baseline)}; "
        f"checkpoint in {args.out_dir}")
    if val_loss > (1 - CONTEXT_GAIN) * baseline:
        say("This is the level of word frequencies: the model has not learned to use context yet. "
            "Masked models stay there for a while; more --max_iters help")

    # The demonstration
    say(demonstration(model.eval(), load_tokenizer(args.out_dir), shards, masked))
    say(f"more: {command('sample.py', '--checkpoint', args.out_dir)}")


def beside(baseline):
    """The loss of word frequencies, to stand behind a validation loss."""
    return f" (word frequencies alone: {baseline:.4f})"


def main(argv=None):
    with one_line_stop(), one_line_errors(DataError, OSError):
        args = parse_args(argv)
        reuse_memory()
        train(args)


if __name__ == "__main__":
    main()
