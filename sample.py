"""
Sample text from a checkpoint: continue a prompt with any objective's model, fill gaps with the masked ones.

    python sample.py --checkpoint out/ar --prompt "def"                 # ar, dar: left to right
    python sample.py --checkpoint out/vlm --prompt "def"                # mlm, vlm: [MASK]s after the prompt
    python sample.py --checkpoint out/vlm --prompt "def" --order confidence --steps 16 --watch
    python sample.py --checkpoint out/vlm --infill "for ____ in range(10):" --num_samples 3

A causal model gives P(next token | tokens so far): draw it, append it, repeat. (After dar training this is
the mixture over the next t tokens, so its text is looser than that of ar.) A masked model gives P(token |
visible tokens) at every mask: draw some, which makes them visible, repeat. It knows the mask ratios of its
training: vlm (up to 1.0) can start from a short prompt, mlm (at 0.15) can only be trusted with small gaps.
"""
import math
import re
import shutil
import sys
import time
from functools import partial

import numpy as np
import torch

from common import Parser, add_device_flags, load_checkpoint, one_line_errors, pick_device
from tokenizer import load_tokenizer

# -----------------------------------------------------------------------------
# One draw

def draw_tokens(logits, temperature=1.0, top_k=None, generator=None):
    """One token per row, drawn from softmax(logits / temperature) cut to the top_k likeliest tokens.

    (N, V) logits -> (N,) int64 on the CPU, where they are drawn: a seed means the same on every device.
    temperature 0 takes the likeliest token. Ids at -inf (the mask token, padding) have probability 0.
    """
    greedy = temperature < 1e-6                             # 0, or too small to divide by
    if greedy:
        temperature = 1.0
        top_k = 1
    k = min(top_k or logits.size(1), logits.size(1))
    values, ids = logits.topk(k)                            # (N, k), (N, k), likeliest first
    probs = (values.cpu() / temperature).softmax(dim=-1)    # host-device sync
    column = torch.multinomial(probs, 1, generator=generator)       # (N, 1)
    return ids.cpu().gather(1, column)[:, 0]

# -----------------------------------------------------------------------------
# Look ahead: a causal model appends one token at a time

def append(model, ids, n, pick, watch=None):
    """ids followed by n new tokens, each drawn from P(token | the tokens before it).

    ids: a list. pick: a function, logits (1, V) -> a token, (1,). Returns a list.

    Keys and values are cached, so that a step runs the model on one new token only. When the window
    (block_size tokens) is full, its last half starts a new window and is encoded again. watch(ids) is called
    after every token.
    """
    T = model.config.block_size
    device = model.wte.weight.device
    ids = list(ids)
    new = list(ids)                                         # tokens that are not in the cache yet
    cached = 0
    cache = [[] for _ in model.blocks]
    for _ in range(n):
        # A full window: start the next one
        if cached + len(new) > T:
            new = ids[-max(1, T // 2):]
            cached = 0
            cache = [[] for _ in model.blocks]

        # The next token
        hidden = model.features(torch.tensor([new], device=device), cache=cache)    # (1, len(new), C)
        cached += len(new)
        new = pick(model.logits(hidden[:, -1])).tolist()    # (1, V) -> [token]
        ids += new
        if watch:
            watch(ids)
    return ids

# -----------------------------------------------------------------------------
# Look around: a masked model fills in masks, one or more per forward pass

@torch.no_grad()
def fill(model, ids, pick, order="left", steps=None, n=None, watch=None):
    """ids, at most block_size, with the first n mask tokens filled in (None: all).

    ids: a list. pick: a function, logits (N, V) -> N tokens. steps: forward passes, by default one per token.
    Returns a list.

    order "left": the leftmost masks first. "confidence": first the masks whose likeliest token is most
    probable. This depends on the visible tokens, not on what is then drawn, so every token is a draw from the
    model's own distribution. Tokens of one pass do not see each other: few steps are fast, but incoherent.
    watch(ids) is called before the first pass and after every one.
    """
    mask_token = model.config.mask_token
    ids = torch.tensor(ids, device=model.wte.weight.device)     # (T,)
    to_fill = (ids == mask_token).nonzero()[:n, 0]              # (n,) positions, left to right
    total = len(to_fill)
    steps = min(steps or total, total)
    if watch:
        watch(ids.tolist())

    for step in range(1, steps + 1):
        # Which masks: an even share of them, at least 1
        count = len(to_fill) - total * (steps - step) // steps
        if order == "left":
            chosen = to_fill[:count]                                        # (count,)
            logits = model.logits(model.features(ids[None])[0, chosen])     # (count, V)
        else:
            logits = model.logits(model.features(ids[None])[0, to_fill])    # (masks left, V)
            confidence = logits.amax(dim=-1) - logits.logsumexp(dim=-1)     # log P(likeliest token)
            surest = confidence.topk(count).indices                         # (count,)
            chosen = to_fill[surest]
            logits = logits[surest]

        # Draw them
        ids[chosen] = pick(logits).to(ids.device)
        to_fill = to_fill[ids[to_fill] == mask_token]
        if watch:
            watch(ids.tolist())
    return ids.tolist()


def append_masked(model, ids, n, pick, order="left", steps=None, watch=None):
    """ids followed by n new tokens.

    Masks follow the prompt up to block_size, as in training and evaluation, and the first n are filled in.
    For more than the window holds, its last half starts a new one. Windows share `steps` by their numbers of
    new tokens.
    """
    T = model.config.block_size
    ids = list(ids)
    context = ids
    steps = steps or n
    while n:
        begin = len(context)
        end = min(begin + n, T)                             # new tokens of this window: begin .. end
        passes = max(1, round(steps * (end - begin) / n))   # its share of the steps

        def watch_window(window):
            watch(ids + window[begin:end])

        # Fill them in
        window = context + [model.config.mask_token] * (T - begin)          # (T,)
        window = fill(model, window, pick, order, passes, end - begin,
                      watch_window if watch else None)
        ids = ids + window[begin:end]
        context = ids[-(T // 2):]
        n -= end - begin
        steps -= passes
    return ids

# -----------------------------------------------------------------------------
# Both

@torch.no_grad()
def generate(model, prompt_ids, max_new_tokens, temperature=1.0, top_k=None, order="left", steps=None,
             generator=None, watch=None):
    """prompt_ids followed by max_new_tokens more ids, a list.

    prompt_ids: a list of at least one id (end-of-text starts a document). model: a Transformer, causal or
    masked. temperature, top_k: see `draw_tokens`. order ("left", "confidence") and steps (forward passes in
    all): masked models only, see `fill`. generator: a torch.Generator on the CPU, or None for the global one.
    watch: called with the ids so far, before the first pass of a masked model and after every pass. Raises
    ValueError, one line, for an argument that makes no sense.
    """
    check(model, temperature, top_k, order, steps)
    T = model.config.block_size
    room = T if model.config.causal else T - 1              # a masked model needs one mask
    if not 1 <= len(prompt_ids) <= room:
        raise ValueError(f"the prompt has {len(prompt_ids)} tokens; the model's window takes 1 to {room}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")

    pick = partial(draw_tokens, temperature=temperature, top_k=top_k, generator=generator)
    if model.config.causal:
        return append(model, prompt_ids, max_new_tokens, pick, watch)
    return append_masked(model, prompt_ids, max_new_tokens, pick, order, steps, watch)


def check(model, temperature, top_k, order, steps):
    """Raises ValueError, one line, if these make no sense."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a number of at least 0 (greedy), not {temperature}")
    if order not in ("left", "confidence"):
        raise ValueError(f"order must be left or confidence, not {order}")
    for name, value in [("top_k", top_k), ("steps", steps)]:
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if model.config.causal and (order != "left" or steps is not None):
        raise ValueError("order and steps are for masked models; a causal one adds one token per step")

# -----------------------------------------------------------------------------
# From text to ids and back

def encode_beginning(text, encoding):
    """Token ids of a text that a model will continue: those that the text has if a word follows it.

    In most vocabularies a word includes the space before it: "def f" is the tokens "def" and " f", and
    training has hardly ever shown "def" followed by a token " ". So a last space is left out, and a last line
    break is a token of its own:

        "def " -> "def",    "if x:\\n    " -> "if", " x", ":", "\\n   ",    "x\\n\\n" -> "x", "\\n", "\\n"
    """
    last = text[-1:]
    words_bring_spaces = any(re.match(rb" \w", token) for token in encoding.token_byte_values())
    if last == " " and words_bring_spaces:
        return encoding.encode_ordinary(text[:-1])
    if last.isspace():
        return encoding.encode_ordinary(text[:-1]) + encoding.encode_ordinary(last)
    return encoding.encode_ordinary(text)


def infill_ids(text, encoding, config, gap_tokens):
    """Token ids of a text, gap_tokens mask tokens for each run of 4 or more underscores (not __init__)."""
    *pieces, last = re.split("_{4,}", text)
    if config.causal:
        raise ValueError("infill needs a masked model (mlm, vlm); a causal one cannot see beyond a gap")
    if not pieces or gap_tokens < 1:
        raise ValueError("infill needs a gap in the text, marked ____, and gap_tokens of at least 1")
    ids = []
    for piece in pieces:
        ids += encode_beginning(piece, encoding) + [config.mask_token] * gap_tokens
    ids += encoding.encode_ordinary(last)
    if len(ids) > config.block_size:
        raise ValueError(f"the text has {len(ids)} tokens; the model's window takes {config.block_size}")
    return ids


def text_so_far(ids, encoding, mask_token):
    """The text of ids, masks shown as _."""
    pieces = [b"_" if i == mask_token else encoding.decode_single_token_bytes(i) for i in ids]
    return b"".join(pieces).decode(errors="replace")

# -----------------------------------------------------------------------------
# --watch

def show_passes(stream):
    """A function that shows a growing text: show(text) for every pass, then show("") to clear the screen.

    On a terminal the text is printed again in place, at a speed that one can follow. Of a text that is taller
    than the terminal only the end is shown. Elsewhere every pass is one line.
    """
    terminal = stream.isatty()
    height = 0                                              # rows that are on the screen now

    def show(text):
        nonlocal height
        if not terminal:
            if text:
                print(text.replace("\n", "\\n"), file=stream, flush=True)
            return

        # Cut the text into the terminal's rows
        columns, lines = shutil.get_terminal_size()
        rows = []
        for line in text.expandtabs().split("\n"):
            rows += [line[i:i + columns] for i in range(0, max(1, len(line)), columns)]
        rows = rows[-(lines - 1):] if text else []

        # Go up to the first row of the last pass, clear all below, print
        up = f"\x1b[{height}A\r\x1b[J" if height else ""
        print(up + "".join(row + "\n" for row in rows), end="", file=stream, flush=True)
        height = len(rows)
        if text:
            time.sleep(0.05)

    return show

# -----------------------------------------------------------------------------
# What train.py prints at its end

def demonstration(model, encoding, shards, masked):
    """Text that shows what the model was trained for, from the same prompts for every objective.

    A masked model fills in three lines of validation text of which half of the tokens are masked, and
    continues the beginning of the first. A causal one continues the beginnings of the first two.
    """
    lines = example_lines(encoding, shards[0], model.config.block_size)
    text = []
    if masked:
        shown, filled = half_masked(model, encoding, "\n".join(lines))
        text += ["--- validation text with half of its tokens masked", shown,
                 "--- filled in by the model", filled]

    generator = torch.Generator().manual_seed(0)
    for line in lines[:1 if masked else 2]:
        words = line.split(" ")
        prompt = " ".join(words[:math.ceil(len(words) / 2)])                # never ends in a space
        ids = encoding.encode_ordinary(prompt)[:model.config.block_size - 1]
        length = min(32, model.config.block_size - len(ids))
        ids = generate(model, ids, length, temperature=0.8, generator=generator)
        text += [f"--- {prompt!r} continued by the model", encoding.decode(ids)]
    return "\n".join(text)


def half_masked(model, encoding, text):
    """Mask every token of a text with probability 1/2 and let the model fill them in.

    Returns the text with `_` in place of the characters of masked tokens, and the filled one. Tokens that
    hold a line's end stay, so that the two can be compared line by line.
    """
    ids = encoding.encode_ordinary(text)[:model.config.block_size]
    pieces = [encoding.decode([token]) for token in ids]
    free = [i for i, piece in enumerate(pieces) if "\n" not in piece]
    masked = np.random.default_rng(0).permutation(free)[:math.ceil(len(free) / 2)]

    with_masks = np.array(ids)
    with_masks[masked] = model.config.mask_token
    filled = fill(model, with_masks.tolist(), partial(draw_tokens, temperature=0.0), order="confidence")
    for i in masked:
        shown = r"\S" if pieces[i].strip() else r"."                        # a masked space shows, too
        pieces[i] = re.sub(shown, "_", pieces[i])
    return "".join(pieces), encoding.decode(filled)


def example_lines(encoding, ids, block_size, n=3):
    """n successive lines from the beginning of validation ids, (n_ids,), of 24 to 72 characters each.

    Text without such lines (one long line, short ones only) is cut into pieces of 48 characters.
    """
    ids = [token for token in ids[:50_000].tolist() if token != encoding.eot_token]
    text = encoding.decode(ids)
    lines = [line.strip() for line in text.splitlines()]
    for i in range(len(lines) - n + 1):
        chosen = lines[i:i + n]
        short = len(encoding.encode_ordinary("\n".join(chosen))) <= block_size
        if short and all(24 <= len(line) <= 72 and " " in line for line in chosen):
            return chosen
    text = " ".join(text.split())
    return [text[48 * i:48 * (i + 1)].strip() or "..." for i in range(n)]

# -----------------------------------------------------------------------------
# Command line

def build_parser():
    p = Parser(__doc__.split("\n\n")[0])
    p.add_argument("--checkpoint", required=True, help="folder that train.py wrote, e.g. out/vlm")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--prompt", default="", help="text to continue; if empty, a new document is begun")
    what.add_argument("--infill", metavar="TEXT",
                      help="masked models: a text with gaps, ____, to be filled")
    p.add_argument("--gap_tokens", type=int, default=1, help="infill: tokens per gap")
    p.add_argument("--max_new_tokens", type=int, default=100, help="prompt: tokens to add")
    p.add_argument("--num_samples", type=int, default=1, help="how many texts")
    p.add_argument("--temperature", type=float, default=0.8,
                   help="0 takes the most likely token, 1 samples the model's distribution")
    p.add_argument("--top_k", type=int, help="draw among the k likeliest tokens only")
    p.add_argument("--order", choices=["left", "confidence"], default="left",
                   help="masked models: fill from the left, or where the model is surest first")
    p.add_argument("--steps", type=int,
                   help="masked models: forward passes (default: one per token)")
    p.add_argument("--watch", action="store_true",
                   help="show the text after every pass, masks as _; in place on a terminal, else one line "
                        "per pass")
    p.add_argument("--seed", type=int, default=0, help="seed of the draws")
    add_device_flags(p, dtype="float32")
    return p


def run(args):
    """Print the samples. Raises ValueError, one line, for bad input."""
    # The model and its tokenizer
    if args.num_samples < 1 or not 0 <= args.seed < 2**63:
        raise ValueError("num_samples must be at least 1, and seed at least 0 and less than 2**63")
    device = pick_device(args.device)
    model, _ = load_checkpoint(args.checkpoint, device, args.dtype)
    encoding = load_tokenizer(args.checkpoint, model.config.vocab_size)
    check(model, args.temperature, args.top_k, args.order, args.steps)
    how = {"temperature": args.temperature, "top_k": args.top_k,
           "generator": torch.Generator().manual_seed(args.seed)}

    # What to start from. An empty prompt is a new document, after an end-of-text that is not printed
    prompt = encode_beginning(args.prompt, encoding)
    n_silent = 0 if prompt or args.infill is not None else 1
    show = show_passes(sys.stdout)

    def watch(ids):
        show(text_so_far(ids[n_silent:], encoding, model.config.mask_token))

    for number in range(args.num_samples):
        if number:
            print("-" * 15)
        each_pass = watch if args.watch else None
        if args.infill is not None:
            ids = infill_ids(args.infill, encoding, model.config, args.gap_tokens)
            ids = fill(model, ids, partial(draw_tokens, **how), args.order, args.steps, watch=each_pass)
        else:
            ids = generate(model, prompt or [encoding.eot_token], args.max_new_tokens, order=args.order,
                           steps=args.steps, watch=each_pass, **how)
        if args.watch:
            show("")
        print(encoding.decode(ids[n_silent:]))


def main(argv=None):
    args = build_parser().parse_args(argv)
    with one_line_errors():
        run(args)


if __name__ == "__main__":
    main()
