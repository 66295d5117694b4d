"""
Sample text from a checkpoint: continue a prompt with any objective's model, fill gaps with the masked ones.

    python sample.py --checkpoint out/ar --prompt "def "                # ar, dar: left to right
    python sample.py --checkpoint out/vlm --prompt "def "               # mlm, vlm: [MASK]s after the prompt
    python sample.py --checkpoint out/vlm --prompt "def " --order confidence --steps 16
    python sample.py --checkpoint out/vlm --infill "for ____ in range(10):" --num_samples 3

A causal model gives P(next token | tokens so far): draw it, append it, repeat. (After dar training this is
the mixture over the next t tokens, so its text is looser than that of ar.) A masked model gives P(token |
visible tokens) at every mask: draw some, which makes them visible, repeat. It knows the mask ratios of its
training: vlm (up to 1.0) can start from a short prompt, mlm at 0.15 can only be trusted with small gaps.
"""
import argparse
import math
import re
import sys
from functools import partial

import torch

from common import add_device_flags, load_checkpoint, one_line_errors, pick_device, pick_dtype
from tokenizer import load_tokenizer

# -----------------------------------------------------------------------------
# One draw

def draw(logits, temperature=1.0, top_k=None, generator=None):
    """One token per row, drawn from softmax(logits / temperature) cut to the top_k likeliest tokens.

    (N, V) logits -> (N,) int64, both drawn and returned on the CPU: a seed means the same on every device.
    temperature 0 takes the likeliest token. Ids at -inf (the mask token, padding) have probability 0.
    """
    greedy = temperature < 1e-6                             # 0, or too small to divide by
    k = 1 if greedy else min(top_k or logits.size(1), logits.size(1))
    values, ids = (x.cpu() for x in logits.topk(k))         # (N, k), likeliest first; host-device sync
    probs = (values / (1.0 if greedy else temperature)).softmax(dim=-1)
    return ids.gather(1, torch.multinomial(probs, 1, generator=generator))[:, 0]

# -----------------------------------------------------------------------------
# Look ahead: a causal model appends one token at a time

def append(model, ids, n, pick):
    """ids followed by n new tokens, each drawn by pick from P(token | the tokens before it).

    Keys and values are cached, so that a step runs the model on one new token only. When the window
    (block_size tokens) is full, its last half starts a new window and is encoded anew.
    """
    T, device = model.config.block_size, model.wte.weight.device
    ids, new, cached = list(ids), list(ids), 0              # new: the tokens that are not in the cache yet
    cache = [[] for _ in model.blocks]
    for _ in range(n):
        if cached + len(new) > T:
            new, cached, cache = ids[-max(1, T // 2):], 0, [[] for _ in model.blocks]
        hidden = model.features(torch.tensor([new], device=device), cache=cache)    # (1, len(new), C)
        cached += len(new)
        new = pick(model.logits(hidden[:, -1])).tolist()    # (1, V) -> [token]
        ids += new
    return ids

# -----------------------------------------------------------------------------
# Look around: a masked model fills in masks, one or more per forward pass

@torch.no_grad()
def fill(model, ids, pick, order="left", steps=None):
    """ids (at most block_size) with every mask token replaced, in `steps` passes (default: one per mask).

    order "left": the leftmost masks first. "confidence": first the masks whose likeliest token is most
    probable. This depends on the visible tokens, not on what is then drawn, so every token is a draw from the
    model's own distribution. Tokens of one pass do not see each other: few steps are fast, but incoherent.
    """
    mask_token = model.config.mask_token
    ids = torch.tensor(ids, device=model.wte.weight.device)     # (T,)
    total = int((ids == mask_token).sum())
    steps = min(steps or total, total)
    for step in range(1, steps + 1):
        masked = (ids == mask_token).nonzero()[:, 0]            # (M,) positions, left to right
        count = len(masked) - total * (steps - step) // steps   # an even share of the masks, at least 1
        if order == "left":
            masked = masked[:count]
        logits = model.logits(model.features(ids[None])[0, masked])         # (M, V)
        if order == "confidence":
            confidence = logits.amax(dim=-1) - logits.logsumexp(dim=-1)     # (M,) log P(likeliest token)
            surest = confidence.topk(count).indices
            masked, logits = masked[surest], logits[surest]
        ids[masked] = pick(logits).to(ids.device)
    return ids.tolist()


def append_masked(model, ids, n, pick, order="left", steps=None):
    """ids followed by n new tokens: they are masks at first, as many as the window (block_size tokens) holds.

    For more, the last half of the window starts a new one. Windows share `steps` by their numbers of masks.
    """
    T, mask_token = model.config.block_size, model.config.mask_token
    ids, context, steps = list(ids), list(ids), steps or n
    while n:
        masks = min(n, T - len(context))
        passes = max(1, round(steps * masks / n))
        ids += fill(model, context + [mask_token] * masks, pick, order, passes)[len(context):]
        n, steps, context = n - masks, steps - passes, ids[-(T // 2):]
    return ids

# -----------------------------------------------------------------------------
# Both

@torch.no_grad()
def generate(model, prompt_ids, max_new_tokens, temperature=1.0, top_k=None, order="left", steps=None,
             generator=None):
    """prompt_ids, a list of at least one id (end-of-text starts a document), and max_new_tokens more ids.

    model: a Transformer, causal or masked. temperature, top_k: see `draw`. order ("left", "confidence") and
    steps (forward passes in all): masked models only, see `fill`. generator: a torch.Generator on the CPU, or
    None for the global one. Returns a list. Raises ValueError, one line, for an argument that makes no sense.
    """
    check(model, temperature, top_k, order, steps)
    T, causal = model.config.block_size, model.config.causal
    room = T if causal else T - 1                           # a masked model needs one mask
    if not 1 <= len(prompt_ids) <= room:
        raise ValueError(f"the prompt has {len(prompt_ids)} tokens; the model's window takes 1 to {room}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    pick = partial(draw, temperature=temperature, top_k=top_k, generator=generator)
    if causal:
        return append(model, prompt_ids, max_new_tokens, pick)
    return append_masked(model, prompt_ids, max_new_tokens, pick, order, steps)


def check(model, temperature, top_k, order, steps):
    """Raises ValueError, one line, if these make no sense."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 (greedy) or more, not {temperature}")
    if order not in ("left", "confidence"):
        raise ValueError(f"order must be left or confidence, not {order}")
    for name, value in [("top_k", top_k), ("steps", steps)]:
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if model.config.causal and (order != "left" or steps is not None):
        raise ValueError("order and steps are for masked models; a causal one adds one token a step")

# -----------------------------------------------------------------------------
# Command line

def build_parser():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--checkpoint", required=True, help="folder that train.py wrote, e.g. out/vlm")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--prompt", default="", help="text to continue; if empty, a new document is begun")
    what.add_argument("--infill", metavar="TEXT", help="masked models: a text with gaps, ____, to be filled")
    p.add_argument("--gap_tokens", type=int, default=1, help="infill: tokens per gap")
    p.add_argument("--max_new_tokens", type=int, default=100, help="prompt: tokens to add")
    p.add_argument("--num_samples", type=int, default=1, help="how many texts")
    p.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest; 1: as the model says")
    p.add_argument("--top_k", type=int, help="draw among the k likeliest tokens only")
    p.add_argument("--order", choices=["left", "confidence"], default="left",
                   help="masked models: fill from the left, or where the model is surest first")
    p.add_argument("--steps", type=int, help="masked models: forward passes (default: one per token)")
    p.add_argument("--seed", type=int, default=0, help="of the draws")
    add_device_flags(p, dtype="float32")
    return p


def infill_ids(text, encoding, config, gap_tokens):
    """Token ids of a text, gap_tokens mask tokens for each run of 4 or more underscores (not __init__)."""
    first, *rest = [encoding.encode_ordinary(piece) for piece in re.split("_{4,}", text)]
    if config.causal:
        raise ValueError("infill needs a masked model (mlm, vlm); a causal one cannot see beyond a gap")
    if not rest or gap_tokens < 1:
        raise ValueError("infill needs a gap in the text, marked ____, and gap_tokens of at least 1")
    ids = sum(([config.mask_token] * gap_tokens + piece for piece in rest), first)
    if len(ids) > config.block_size:
        raise ValueError(f"the text has {len(ids)} tokens; the model's window takes {config.block_size}")
    return ids


def run(args):
    """Print the samples. Raises ValueError, one line, for bad input."""
    if args.num_samples < 1 or not 0 <= args.seed < 2**63:
        raise ValueError("num_samples must be at least 1, and seed at least 0 and less than 2**63")
    device = pick_device(args.device)
    model, _ = load_checkpoint(args.checkpoint, device)
    model.dtype = pick_dtype(args.dtype, device)
    encoding = load_tokenizer(args.checkpoint)
    if encoding.n_vocab != model.config.vocab_size:
        raise ValueError(f"{args.checkpoint}: tokenizer.json is not the one of this model's training")
    check(model, args.temperature, args.top_k, args.order, args.steps)
    generator = torch.Generator().manual_seed(args.seed)
    how = dict(temperature=args.temperature, top_k=args.top_k, generator=generator)
    prompt = encoding.encode_ordinary(args.prompt)
    for i in range(args.num_samples):
        if args.infill is not None:
            ids = infill_ids(args.infill, encoding, model.config, args.gap_tokens)
            ids = fill(model, ids, partial(draw, **how), args.order, args.steps)
        else:
            start = prompt or [encoding.eot_token]
            ids = generate(model, start, args.max_new_tokens, order=args.order, steps=args.steps, **how)
            ids = ids if prompt else ids[1:]
        print(("-" * 15 + "\n" if i else "") + encoding.decode(ids))


def main(argv=None):
    args = build_parser().parse_args(argv)
    sys.stdout.reconfigure(errors="replace")                # "?" where a terminal cannot show a character
    with one_line_errors():
        run(args)


if __name__ == "__main__":
    main()
