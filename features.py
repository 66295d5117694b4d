"""
From texts to features, one vector per text: what probes (probe.py) and fine-tuning (finetune.py) work on.

    text -> token ids (two texts: a <end-of-text> b) -> hidden states of the model -> pooled over the tokens

    rows, cut = encode(encoding, [("a text",), ("another",)], T=128)    # lists of 1 to 128 ids
    features = extract(model, rows, eot, layer=None, kinds=["mean"])    # {"mean": (2, C)}
"""
import numpy as np
import torch
from tqdm import tqdm

BATCH_TOKENS = 16384                        # padded tokens per forward pass


def tokenize(task, encoding, T):
    """A task of texts -> (the same task of token ids, how many examples were cut to T tokens)."""
    total = 0
    splits = {}
    for name, split in {"train": task.train, **task.dev}.items():
        rows, cut = encode(encoding, split.examples, T, task.half)
        splits[name] = split._replace(examples=rows)
        total += cut
    train = splits.pop("train")
    return task._replace(train=train, dev=splits), total


def encode(encoding, examples, T, half=0):
    """Examples, tuples of one or two texts, as token ids: (lists of 1 to T ids, how many were cut to fit).

    A pair is a <end-of-text> b. An example that is too long loses its end. Of a pair the longer text
    is cut first. With `half`, a pair is the last `half` tokens of a and the first `half` of b.
    """
    columns = [encoding.encode_ordinary_batch(list(column)) for column in zip(*examples)]
    rows = []
    n_cut = 0
    for texts in zip(*columns):
        if len(texts) == 1:
            [text] = texts
            n_cut += len(text) > T
            rows.append(text[:T] or [encoding.eot_token])
            continue

        # Where the two texts meet
        a, b = texts
        if half:
            kept = min(half, (T - 1) // 2)
            a = a[-kept:]
            b = b[:kept]

        # Cut the longer one, or both to equal halves
        room = T - 1
        n_cut += len(a) + len(b) > room
        keep_a = max(room - len(b), min(len(a), (room + 1) // 2))
        keep_b = room - min(len(a), keep_a)
        rows.append(a[:keep_a] + [encoding.eot_token] + b[:keep_b])
    return rows, n_cut


def batches_by_length(lengths, batch_tokens=BATCH_TOKENS):
    """Yield arrays of indices into lengths, the longest first.

    A batch has at most batch_tokens tokens when it is padded to its longest row (or it is one row).
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    first = 0
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
    """One vector per text: hidden (B, T, C), valid (B, T) bool -> (B, C) float32.

    kind: "mean" or "max" over the valid positions, or "last", the last of them.
    """
    hidden = hidden.float()
    lengths = valid.sum(dim=1)                                              # (B,)
    valid = valid[:, :, None]                                               # (B, T, 1)
    if kind == "mean":
        return (hidden * valid).sum(dim=1) / lengths[:, None]
    if kind == "max":
        return hidden.masked_fill(~valid, -torch.inf).amax(dim=1)
    row = torch.arange(len(hidden), device=hidden.device)
    return hidden[row, lengths - 1]


def pooled_features(model, ids, valid, layer, kinds):
    """{kind: (B, C)} of one batch. Without padding no attention mask is needed, which is faster."""
    hidden = model.features(ids, None if valid.all() else valid, layer)     # (B, T, C)
    return {kind: pool(hidden, valid, kind) for kind in kinds}


@torch.inference_mode()
def extract(model, rows, eot, layer, kinds):
    """{kind: (n, C) float32, on the CPU} of n lists of token ids, in batches of similar length.

    layer: features after that many blocks (None: all).
    """
    out = {kind: torch.empty(len(rows), model.config.n_embd) for kind in kinds}
    device = next(model.parameters()).device
    lengths = [len(row) for row in rows]
    bar = tqdm(total=sum(lengths), unit="tok", unit_scale=True, desc="features", leave=False,
               disable=None)
    with bar:
        for index in batches_by_length(lengths):
            ids, valid = collate([rows[i] for i in index], eot, device)
            for kind, values in pooled_features(model, ids, valid, layer, kinds).items():
                out[kind][index] = values.cpu()
            bar.update(int(valid.sum()))
    return out
