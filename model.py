"""
The one Transformer that all objectives share, causal or bidirectional by one flag, and its loss.

Bytes to loss, in the order of `Transformer.forward`: token ids -> embedding -> n_layer blocks (attention,
MLP) -> norm -> logits at the scored positions only -> weighted cross-entropy. Pre-RMSNorm, rotary positions
(Su et al. 2021), QK-norm (Henry et al. 2020), ReLU^2 MLP (So et al. 2021), no biases, no norm gains, tied
embeddings: every parameter is a matrix.

Attention and the loss are first defined, in a few plain lines: `attention` and `plain_loss`. Training runs
the fast versions at the end of this file, and tests hold each pair together.

    model = Transformer(Config(n_layer=4, causal=True))     # trained ones: common.load_checkpoint("out/vlm")
    hidden = model.features(ids)                    # (B, T) int64 -> (B, T, C)
    logits = model.logits(hidden[:, -1])            # (B, C) -> (B, V) float32

    python -m pytest tests/test_model.py            # against a plain reference in numpy
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Config:
    """The sizes of a Transformer, and its attention."""
    vocab_size: int = 2048                  # ids that stand for text: 0 .. vocab_size-1
    block_size: int = 128                   # T, the longest input in tokens
    n_layer: int = 4
    n_head: int = 4                         # H
    n_embd: int = 128                       # C
    causal: bool = False                    # position k sees 1..k only (True) or all (False)

    @property
    def mask_token(self):                   # [MASK] is the first id that is not text
        return self.vocab_size

    @property
    def padded_vocab_size(self):            # V: text, the mask token, and padding up to a multiple of 64
        return 64 * math.ceil((self.vocab_size + 1) / 64)

# -----------------------------------------------------------------------------
# The parts of a block

def norm(x):
    """RMSNorm without gains: x / sqrt(mean of x^2 + eps). (The default eps depends on the dtype.)"""
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)


class Linear(nn.Linear):
    """y = x W^T without a bias. W is kept in float32 and cast to the dtype of x where it is used."""
    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


def rotary_table(T, D, base=10000.0):
    """cos and sin, each (T, D/2): the angle of position t and frequency i is t * base^(-2i/D)."""
    frequency = base ** (-torch.arange(0, D, 2).float() / D)                # (D/2,)
    angle = torch.outer(torch.arange(T).float(), frequency)                 # (T, D/2)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotary position embedding: turn the pair (x[i], x[i + D/2]) by the angle of its position.

    x: (B, H, T, D). cos, sin: (T, D/2), see `rotary_table`.
    """
    a, b = x.chunk(2, dim=-1)                                               # (B, H, T, D/2) each
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)


def attention(q, k, v, causal, mask=None):
    """softmax(q k^T / sqrt(D)) v over the visible keys (Vaswani et al. 2017, equation 1).

    q: (B, H, T, D). k, v: (B, H, S, D). causal: query t sees keys 0..t only, and S = T. mask: bool, broadcast
    to (B, H, T, S), True where a key is visible. Returns (B, H, T, D), for each query a mean of the values.

        q = 0, two keys: all scores are equal  ->  (v[0] + v[1]) / 2, and v[0] for query 0 if causal
    """
    T, D = q.shape[-2:]
    S = k.size(-2)
    scores = (q * D ** -0.5) @ k.transpose(-2, -1)                          # (B, H, T, S)

    # A key that a query must not see gets the score -inf, and so the weight 0
    if causal:
        future = torch.full((T, S), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
        scores = scores + future                        # -inf above the diagonal, 0 elsewhere
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)

    return scores.softmax(dim=-1) @ v                                       # (B, H, T, D)


class Attention(nn.Module):
    """Multi-head self-attention, (B, T, C) -> (B, T, C)."""
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.causal = config.causal
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x, rotary, mask=None, cache=None):
        B, T, C = x.shape

        # Queries, keys and values of every head, D = C / H
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                # (B, H, T, D) each
        q = rotate(norm(q), *rotary)
        k = rotate(norm(k), *rotary)
        if cache is not None:
            k, v = extend_cache(cache, k, v)                                # (B, H, S, D) each

        # A single new token comes last and sees all that is cached
        causal = self.causal and T > 1
        y = fast_attention(q, k, v, causal, mask)                           # (B, H, T, D)

        # Heads side by side
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Two matrices with ReLU^2 between them, at every position: (B, T, C) -> (B, T, C)."""
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())                   # (B, T, 4C) inside


class Block(nn.Module):
    """Attention and MLP, each on normalised input and added to it: (B, T, C) -> (B, T, C)."""
    def __init__(self, config):
        super().__init__()
        self.attn = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x, rotary, mask=None, cache=None):
        x = x + self.attn(norm(x), rotary, mask, cache)
        return x + self.mlp(norm(x))

# -----------------------------------------------------------------------------
# The Transformer

class Transformer(nn.Module):
    """dtype: of the activations. Weights stay in float32."""
    def __init__(self, config, dtype=torch.float32):
        super().__init__()
        if config.n_embd % config.n_head or config.n_embd // config.n_head % 2:
            raise ValueError("n_embd / n_head must be an even whole number, "
                             f"not {config.n_embd} / {config.n_head}")
        self.config = config
        self.dtype = dtype
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        cos, sin = rotary_table(config.block_size, config.n_embd // config.n_head)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """How each matrix starts.

        wte                           normal, std 0.02 (also the output matrix: logits start near 0)
        attn.c_attn, mlp.c_fc         normal, std 1/sqrt(C): keeps the scale of their normalised input
        attn.c_proj, mlp.c_proj       zero: every block starts as the identity
        """
        nn.init.normal_(self.wte.weight, std=0.02)
        for block in self.blocks:
            nn.init.normal_(block.attn.c_attn.weight, std=self.config.n_embd ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=self.config.n_embd ** -0.5)
            nn.init.zeros_(block.attn.c_proj.weight)
            nn.init.zeros_(block.mlp.c_proj.weight)

    def features(self, inputs, valid=None, layer=None, cache=None):
        """Hidden states: (B, T, C), RMS-normalised.

        inputs: (B, T) int64 token ids, T <= block_size. valid: (B, T) bool, False at padding that nobody may
        attend to (a causal model with padding on the right needs none). layer: stop after that many blocks
        (0 = embeddings). cache: a list of n_layer lists, empty at first, that keeps keys and values. `inputs`
        are then the tokens after the cached ones, all at once or (T = 1) one by one.
        """
        # Where the new tokens stand in their sequence
        past = cached_tokens(cache)
        T = inputs.size(1)
        if past + T > self.config.block_size or (past and T > 1):
            raise ValueError(f"{past} cached and {T} new tokens: "
                             "at most block_size, and one by one after the first call")
        rotary = self.cos[past:past + T], self.sin[past:past + T]           # (T, D/2) each

        # The keys that are visible to all queries
        mask = None
        if valid is not None and not self.config.causal:
            mask = valid[:, None, None, :]                                  # (B, 1, 1, T)

        # Embedding, blocks, norm
        x = norm(self.wte(inputs).to(self.dtype))                           # (B, T, C)
        for i, block in enumerate(self.blocks[:layer]):
            layer_cache = None if cache is None else cache[i]
            x = block(x, rotary, mask, layer_cache)
        return norm(x)

    def logits(self, hidden):
        """hidden (..., C) -> (..., V) float32. The mask token and padding, never predicted, have -inf."""
        return unembed(hidden, self.wte.weight, self.config.vocab_size)

    def forward(self, inputs, positions, targets, weights):
        """The loss of a batch of any objective: `plain_loss` at the scored positions, a sum in nats.

        The caller divides it by the sum of the weights.

        inputs: (B, T) int64. positions: (N,) int64 into B*T. targets: (N, K) int64. weights: (N,) float32.
        """
        hidden = self.features(inputs).flatten(0, 1)                        # (B*T, C)
        scored = hidden.index_select(0, positions)                          # (N, C)
        return CrossEntropy.apply(scored, self.wte.weight, targets, weights, self.config.vocab_size)

# -----------------------------------------------------------------------------
# The loss

def unembed(hidden, weight, vocab_size):
    """Logits: hidden (..., C), weight (V, C) -> (..., V), at least float32.

    Ids from vocab_size on are never predicted: their logit is -inf.
    """
    logits = F.linear(hidden, weight.to(hidden.dtype))
    logits[..., vocab_size:] = -torch.inf
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def plain_loss(hidden, weight, targets, weights, vocab_size):
    """The definition of the loss, a sum over the N scored positions, in nats:

        sum over n of weights[n] * mean over k of -log softmax(logits[n])[targets[n, k]]

    hidden: (N, C). weight: (V, C), the output matrix. targets: (N, K) int64, K alternatives. weights: (N,).
    vocab_size: ids from there on (the mask token, padding) have probability 0.

        N = K = 1, vocab_size = 4, hidden = 0: every id has probability 1/4  ->  weights[0] * log 4
    """
    logits = unembed(hidden, weight, vocab_size)                            # (N, V)
    log_p = F.log_softmax(logits, dim=-1)                                   # (N, V)
    return -(log_p.gather(1, targets).mean(dim=1) * weights).sum()


# =============================================================================
# Behind the scenes: the same attention and the same loss, faster; the cache; counts.
# =============================================================================

def fast_attention(q, k, v, causal, mask=None):
    """`attention`, fused into one kernel.

    Not for bfloat16 on a CPU: there the fused kernel's backward is so slow that the definition is 1.7 to 3
    times faster (see dev/), at the cost of keeping the (B, H, T, S) scores.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return attention(q, k, v, causal, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


CPU_CHUNK = 2 ** 25         # how many logits are held in memory at a time
GPU_CHUNK = 2 ** 27

class CrossEntropy(torch.autograd.Function):
    """`plain_loss` without holding all of its (N, V) logits.

    At a vocabulary of 50,000 they would be by far the largest buffer of a step. But the gradient of row n
    with respect to its logits needs nothing from outside of the row:

        weights[n] * (softmax(logits[n]) - mean over k of onehot(targets[n, k]))

    So a chunk of rows is turned into its loss and its gradients at once, and forgotten. The operations are
    those of autograd, three matrix products.
    """
    @staticmethod
    def forward(ctx, hidden, weight, targets, weights, vocab_size):
        limit = GPU_CHUNK if hidden.is_cuda else CPU_CHUNK
        rows = max(1, limit // len(weight))
        chunks = zip(hidden.split(rows), targets.split(rows), weights[:, None].split(rows))
        W = weight.to(hidden.dtype)                                         # (V, C), cast once
        K = targets.size(1)

        loss = 0.0
        d_hidden = []
        d_weight = torch.zeros_like(weight)
        for h, t, w in chunks:                          # (rows, C), (rows, K), (rows, 1)
            # The loss
            log_p = F.log_softmax(unembed(h, W, vocab_size), dim=-1)        # (rows, V), the largest buffer
            w = w.to(log_p.dtype)
            loss = loss - (log_p.gather(1, t) * w).sum() / K

            # Its gradient with respect to the logits, in the same memory
            d_logits = log_p.exp_().mul_(w)                                 # w * softmax
            d_logits.scatter_add_(1, t, (-w / K).expand(t.shape))           # less w / K at each target
            d_logits = d_logits.to(h.dtype)

            # The chain rule through logits = h W^T
            d_hidden.append(d_logits @ W)                                   # (rows, C)
            d_weight += d_logits.T @ h                                      # (V, C)

        ctx.save_for_backward(torch.cat(d_hidden), d_weight)
        return loss

    @staticmethod
    def backward(ctx, d_loss):
        d_hidden, d_weight = ctx.saved_tensors
        # d_loss itself is not rounded to 16 bits
        d_hidden = (d_hidden.to(d_weight.dtype) * d_loss).to(d_hidden.dtype)
        return d_hidden, d_weight * d_loss, None, None, None


def extend_cache(cache, k, v):
    """Append new keys and values (B, H, T, D) to the cache of a layer, in place. Returns all it holds.

    cache: an empty list, or [keys, values] of the S positions so far, (B, H, S, D) each.
    """
    if cache:
        old_k, old_v = cache
        k = torch.cat((old_k, k), dim=2)                                    # (B, H, S + T, D)
        v = torch.cat((old_v, v), dim=2)
    cache.clear()
    cache.extend([k, v])
    return k, v


def cached_tokens(cache):
    """The number of positions in a cache (see `Transformer.features`)."""
    if not cache or not cache[0]:
        return 0
    keys, _ = cache[0]                                                      # of the first layer
    return keys.size(2)

# -----------------------------------------------------------------------------
# How large, how much work

def num_params(config):
    """Number of parameters (the embedding, shared with the output matrix, is counted once)."""
    per_block = 12 * config.n_embd ** 2                         # qkv 3C^2, attention output C^2, MLP 8C^2
    return config.padded_vocab_size * config.n_embd + config.n_layer * per_block


def flops(config, B, T, N):
    """Floating-point operations of one training step on B sequences of T tokens with N scored positions.

    A product of (m, k) and (k, n) matrices counts 2mkn, nothing else is counted. Backward costs twice the
    forward. Only the work that is needed counts: the head on the N scored positions, and for a causal model
    the lower triangle.
    """
    C = config.n_embd
    matrices = 2 * 12 * C * C * B * T                           # qkv 3C^2, attention output C^2, MLP 8C^2
    pairs = T * (T + 1) / 2 if config.causal else T * T         # (query, key) pairs
    scores = 2 * 2 * C * pairs * B                              # q k^T and the weighted sum of v
    head = 2 * C * config.padded_vocab_size * N
    return 3 * (config.n_layer * (matrices + scores) + head)
