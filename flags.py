"""
The command line of train.py: every flag, the presets, and the checks that come before any work is done.

    python train.py --help
"""
import math
import os
import sys
import time
from dataclasses import fields
from pathlib import Path

import torch

import data
import objectives
from common import DataError, DeviceError, Parser, add_device_flags, pick_device, read_config
from objectives import CHOICES, OBJECTIVES, Options
from run import finish_replacing

PRESETS = {     # batch_size: sequences per micro-batch; batch_tokens: per update, over all processes
    "tiny": dict(dataset="stdlib", n_layer=4, n_head=4, n_embd=128, block_size=128,
                 batch_size=16, batch_tokens=2048, max_iters=1000, warmup_iters=50,
                 optimizer="muon", learning_rate=1e-2, eval_interval=250, eval_sequences=320),
    "small": dict(dataset="stdlib", n_layer=8, n_head=8, n_embd=512, block_size=512,
                  batch_size=64, batch_tokens=32768, max_iters=375, warmup_iters=40,
                  optimizer="muon", learning_rate=3e-3, eval_interval=100, eval_sequences=1280),
    "paper": dict(dataset="pile", n_layer=16, n_head=12, n_embd=768, block_size=512,
                  batch_size=64, batch_tokens=524288, max_iters=20000, warmup_iters=700,
                  optimizer="adamw", learning_rate=6e-4, eval_interval=500, eval_sequences=2560),
}


def preset_values():
    """The presets as text for --help."""
    lines = []
    for name, values in PRESETS.items():
        settings = ", ".join(f"{flag} {value}" for flag, value in values.items())
        lines.append(f"{name}: {settings}.")
    return " ".join(lines)


def build_parser(description="Pretrain a Transformer with any objective of objectives.py.", **how):
    p = Parser(description, **how)

    p.add_argument("--objective", choices=OBJECTIVES, default="vlm",
                   help="what is predicted from what, see objectives.py")
    p.add_argument("--lookahead", type=int, default=2, metavar="t",
                   help="dar: the target is one of the next t tokens")
    p.add_argument("--dar_estimator", choices=CHOICES["dar_estimator"], default="sample",
                   help="dar: draw one of the t targets, or average the loss over all of them")
    p.add_argument("--mask_ratio", type=float, default=0.15,
                   help="mlm: fraction of the positions that is masked")
    p.add_argument("--mask_range", type=float, nargs=2, default=[0.15, 1.0], metavar=("LOW", "HIGH"),
                   help="vlm: the mask ratio is uniform in this range, drawn per sequence")
    p.add_argument("--corruption", choices=CHOICES["corruption"], default="mask",
                   help="mlm, vlm: mask all chosen positions, "
                        "or BERT's 80 %% mask, 10 %% random token, 10 %% unchanged")
    p.add_argument("--normalization", choices=CHOICES["normalization"], default="tokens",
                   help="mlm, vlm: the loss is the mean over the masked tokens of the batch (tokens), or "
                        "over sequences of the mean within each (bound)")

    p.add_argument("--preset", choices=["auto", *PRESETS], default="auto",
                   help="values for the flags below: tiny (laptop CPU), small (one GPU), paper; "
                        "auto picks by device")
    preset = p.add_argument_group("set by the preset unless given", preset_values())
    preset.add_argument("--dataset",
                        help="name of a folder in data/, see data.py; stdlib is prepared when missing")
    preset.add_argument("--n_layer", type=int, help="blocks")
    preset.add_argument("--n_head", type=int, help="attention heads")
    preset.add_argument("--n_embd", type=int, help="width")
    preset.add_argument("--block_size", type=int, help="tokens per sequence, T")
    preset.add_argument("--batch_size", type=int, help="sequences per micro-batch")
    preset.add_argument("--batch_tokens", type=int,
                        help="tokens per update, over all processes and micro-batches")
    preset.add_argument("--max_iters", type=int, help="updates")
    preset.add_argument("--warmup_iters", type=int, help="updates of linear warmup")
    preset.add_argument("--optimizer", choices=["adamw", "muon"],
                        help="muon: for the blocks' matrices, with adamw for the embedding")
    preset.add_argument("--learning_rate", type=float, help="peak learning rate of AdamW")
    preset.add_argument("--eval_interval", type=int, help="updates between validations")
    preset.add_argument("--eval_sequences", type=int, help="validation sequences, the same ones every time")

    p.add_argument("--muon_lr", type=float, default=0.02, help="peak learning rate of Muon")
    p.add_argument("--decay_fraction", type=float, default=0.7,
                   help="fraction of the run, at its end, in which the learning rate decays linearly")
    p.add_argument("--min_lr_fraction", type=float, default=0.05,
                   help="the learning rate at the end, as a fraction of its peak")
    p.add_argument("--weight_decay", type=float, default=0.1, help="decoupled weight decay")
    p.add_argument("--grad_clip", type=float, default=1.0, help="largest gradient norm (0: no clipping)")
    p.add_argument("--seed", type=int, default=0,
                   help="seeds the initial weights, the data order and the masks")

    p.add_argument("--train_tokens", type=int, default=0, metavar="N",
                   help="train on N tokens only, evenly spread over the training split, for little data and "
                        "many passes (0: on all)")

    p.add_argument("--out_dir", help="folder for checkpoint and log (default: out/OBJECTIVE)")
    p.add_argument("--data_dir", default=data.DATA_DIR, help="where the prepared datasets are")
    p.add_argument("--save_interval", type=int, default=250, help="updates between checkpoints")
    p.add_argument("--log_interval", type=int, default=10, help="updates between lines of the log")
    p.add_argument("--resume", action="store_true",
                   help="continue the run in out_dir with its saved flags; those given here replace them")
    p.add_argument("--overwrite", action="store_true",
                   help="replace the run in out_dir, once the new one has a checkpoint")
    add_device_flags(p)
    p.add_argument("--compile", choices=["auto", "on", "off"], default="auto",
                   help="torch.compile; auto: on GPUs, and on CPUs when the run is long enough to pay for it")
    return p


AT_LEAST_1 = ["n_layer", "n_head", "n_embd", "block_size", "batch_size", "batch_tokens", "max_iters",
              "eval_interval", "eval_sequences", "save_interval", "log_interval"]

# What cannot change when a run is resumed: it defines the model, the objective or the random numbers
FIXED = ["preset", "dataset", "n_layer", "n_head", "n_embd", "optimizer", "seed", "train_tokens",
         *(field.name for field in fields(Options) if field.name != "vocab_size")]


def parse_args(argv=None):
    """The command line as a namespace without open choices.

    Exits with code 2 and one line if it makes no sense. Raises DeviceError.
    """
    parser = build_parser()
    if os.environ.get("LOCAL_RANK", "0") != "0":
        parser.error = leave_it_to_the_first
    args = parser.parse_args(argv)
    args.out_dir = args.out_dir or os.path.join("out", args.objective)

    try:
        finish_replacing(args.out_dir)
        if args.resume:
            args = saved_flags(parser, argv, args.out_dir)
        complete(args)
    except DeviceError:                         # every process has a device of its own
        raise
    except ValueError as error:
        parser.error(str(error))
    return args


def leave_it_to_the_first(message):
    """Parser.error of all processes but the first of this machine, which says the same.

    torchrun ends all processes as soon as one has ended. So this one waits, until the first has said it.
    """
    time.sleep(10)
    sys.exit(2)


def saved_flags(parser, argv, out_dir):
    """The flags of the run in out_dir, those on the command line in place of the saved ones.

    The folder is the one on the command line, wherever the run was when it began.
    Raises ValueError for a flag that cannot change.
    """
    # The saved flags become the defaults
    saved = read_config(out_dir).get("train")
    if not saved or "dataset" not in saved:
        raise ValueError(f"{out_dir} cannot be resumed: its config.json holds no flags of train.py")
    known = {action.dest for action in parser._actions}
    saved["data_dir"] = data.data_dir_of_run(saved)
    parser.set_defaults(**{name: value for name, value in saved.items() if name in known})
    args = parser.parse_args(argv)
    args.out_dir = out_dir
    if args.preset == "auto":                   # was settled when the run began
        args.preset = saved["preset"]

    # What cannot change
    changed = [name for name in FIXED if name in saved and getattr(args, name) != saved[name]]
    if changed:
        before = ", ".join(f"{name} {saved[name]}" for name in changed)
        raise ValueError(f"--resume cannot change {', '.join(changed)}: {out_dir} was trained with {before}")
    return args


def complete(args):
    """Settle the device and what the preset sets, in place. Raises ValueError as check_args does.

    args.device_flag keeps what was asked for: a resumed run on another machine picks again.
    """
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(f"torch {torch.__version__} is too old, 2.9 or newer is needed: "
                         "pip install -r requirements.txt")
    args.data_dir = os.path.abspath(args.data_dir)
    args.device_flag = args.device
    args.device = pick_device(args.device)
    fill_preset(args, args.device)
    check_args(args)


def fill_preset(args, device):
    """Settle the preset and what it sets, in place. "auto" goes by the device."""
    if args.preset == "auto":
        args.preset = "small" if device.startswith("cuda") else "tiny"
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def check_args(args):
    """Raises ValueError, one line, for flags that make no sense together."""
    # Ranges
    for name in AT_LEAST_1:
        if getattr(args, name) < 1:
            raise ValueError(f"{name} must be at least 1, not {getattr(args, name)}")
    if args.block_size < 2:
        raise ValueError(f"block_size must be at least 2, not {args.block_size}")
    for name in ["learning_rate", "muon_lr", "weight_decay", "grad_clip", "warmup_iters", "seed",
                 "train_tokens"]:
        if not 0 <= getattr(args, name) < math.inf:
            raise ValueError(f"{name} must be a number of at least 0, not {getattr(args, name)}")
    if args.seed >= 2**63:
        raise ValueError(f"seed must be less than 2**63, not {args.seed}")
    for name in ["decay_fraction", "min_lr_fraction"]:
        if not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"{name} must be in [0, 1], not {getattr(args, name)}")
    objectives.check(args)

    # What must fit together
    if args.n_embd % args.n_head or args.n_embd // args.n_head % 2:
        raise ValueError(f"n_embd {args.n_embd} does not split into "
                         f"{args.n_head} heads (n_head) of even width")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_tokens % (args.batch_size * args.block_size * world):
        raise ValueError(f"batch_tokens {args.batch_tokens} is not a multiple of "
                         "batch_size * block_size * processes "
                         f"= {args.batch_size} * {args.block_size} * {world}")
    check_folder(args)


def check_folder(args):
    """Raises DataError if a new run would replace files in out_dir unasked."""
    if args.resume or args.overwrite:
        return
    if os.path.exists(os.path.join(args.out_dir, "ckpt.pt")):
        raise DataError(f"{args.out_dir} already holds a run: "
                        "continue it with --resume, or replace it with --overwrite")
    config = Path(args.out_dir, "config.json")              # of a run that was killed before it saved?
    if config.exists() and b'"sources"' not in config.read_bytes():
        raise DataError(f"{config} was not written by train.py: "
                        "name another --out_dir, or replace it with --overwrite")


def flag_without_effect(args, vocab_size):
    """The name of a flag that is not at its default though the objective never reads it, or None."""
    given = make_options(args, vocab_size)
    default = make_options(build_parser().parse_args([]), vocab_size)
    changed = {name for name, value in vars(given).items() if value != getattr(default, name)}
    changed -= {"objective", "block_size"}                  # every objective depends on these
    if not changed:
        return None
    try:
        unread = objectives.never_read(given)
    except NotImplementedError:                             # an exercise: its function is not written yet
        return None
    return next((name for name in unread if name in changed), None)


def make_options(args, vocab_size):
    """The flags an objective may depend on, as objectives.Options."""
    names = [field.name for field in fields(Options) if field.name != "vocab_size"]
    missing = [name for name in names if not hasattr(args, name)]
    if missing:
        raise DataError(f"objectives.Options has {', '.join(missing)}, but flags.py has no flag of that name")
    given = {name: getattr(args, name) for name in names}
    return Options(vocab_size=vocab_size, **given)
