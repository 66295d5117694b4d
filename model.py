"""
The one Transformer that all objectives share, causal or bidirectional by one flag, and its loss.

Bytes to loss, in the order of `Transformer.forward`: token ids -> embedding -> n_layer blocks (attention,
MLP) -> norm -> logits at the scored positions only -> weighted cross-entropy. Pre-RMSNorm, rotary positions
(Su et al. 2021), QK-norm (Henry et al. 2020), ReLU^2 MLP (So et al. 2021), no biases, no norm gains, tied
embeddings: every parameter is a matrix.

    model = Transformer(Config(n_layer=4, causal=True))     # trained ones: common.load_checkpoint("out/vlm")
    hidden = model.features(ids)                    # (B, T) int64 -> (B, T, C)
    logits = model.logits(hidden[:, -1])            # (B, C) -> (B, V) float32
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

# -----------------------------------------------------------------------------
# The model

@dataclass
class Config:
    vocab_size: int = 2048                  # ids that stand for text: 0 .. vocab_size-1
    block_size: int = 128                   # T, the longest input in tokens
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128                       # C
    causal: bool = False                    # position k sees 1..k only (True) or all (False)

    @property
    def mask_token(self):                   # [MASK] is the first id that is not text
        return self.vocab_size

    @property
    def padded_vocab_size(self):            # V: text, the mask token, and padding up to a multiple of 64
        return 64 * math.ceil((self.vocab_size + 1) / 64)


def norm(x):
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)          # the default eps depends on the dtype


class Linear(nn.Linear):
    """y = x W^T without a bias; W is kept in float32 and cast to the dtype of x where it is used."""
    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.causal = config.n_head, config.causal
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x, rotary, mask=None, cache=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                    # 3 x (B, H, T, D), D = C / H
        q, k = rotate(norm(q), *rotary), rotate(norm(k), *rotary)
        if cache is not None:                                   # keys and values of earlier positions
            if cache:
                k, v = torch.cat((cache[0], k), dim=2), torch.cat((cache[1], v), dim=2)
            cache[:] = k, v
        causal = self.causal and T > 1                          # a single new token sees all that is cached
        y = attend(q, k, v, causal, mask)                       # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


def attend(q, k, v, causal, mask=None):
    """Attention, softmax(q k^T / sqrt(D)) v over the visible keys (Vaswani et al. 2017).

    q: (B, H, T, D). k, v: (B, H, S, D), S = T if causal. mask: bool, broadcast to (B, H, T, S), True where
    visible. Fused, except for bfloat16 on a CPU: there the fused kernel's backward is so slow that the
    same thing written out is 1.7 to 3 times faster (LOG.md), at the cost of keeping the (B, H, T, S) scores.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    scores = (q * q.size(-1) ** -0.5) @ k.transpose(-2, -1)                 # (B, H, T, S)
    if causal:                                                              # nothing above the diagonal
        scores = scores + torch.full(scores.shape[-2:], -torch.inf, dtype=q.dtype).triu(1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1) @ v


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())                   # (B, T, 4C) inside


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attn = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x, rotary, mask=None, cache=None):
        x = x + self.attn(norm(x), rotary, mask, cache)
        return x + self.mlp(norm(x))


def rotary_table(T, D, base=10000.0):
    """cos and sin, each (T, D/2): the angle of position t and frequency i is t * base^(-2i/D)."""
    angle = torch.outer(torch.arange(T).float(), base ** (-torch.arange(0, D, 2).float() / D))
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotary position embedding: turn the pair (x[i], x[i + D/2]) by the angle of its position.

    x: (B, H, T, D).
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)


def logits(hidden, weight, vocab_size):
    """hidden (..., C), weight (V, C) -> (..., V) float32; -inf for ids that are never predicted."""
    scores = F.linear(hidden, weight)
    scores[..., vocab_size:] = -torch.inf
    return scores.float()


CHUNK = {False: 2 ** 25, True: 2 ** 27}         # numbers in a chunk's logits, {on a GPU: n}

class CrossEntropy(torch.autograd.Function):
    """hidden (N, C), weight (V, C), targets (N, K), weights (N,) -> sum over n of weights[n] times the mean
    over k of -log softmax(logits[n])[targets[n, k]], nats.

    The (N, V) logits, at a vocabulary of 50,000 by far the largest buffer of a step, are never held in
    memory: the gradient of row n with respect to its logits is weights[n] * (softmax - mean over k of one-hot
    targets), so a chunk of rows is turned into its loss and its gradients at once, and forgotten. The
    operations are those of autograd, three matrix products.
    """
    @staticmethod
    def forward(ctx, hidden, weight, targets, weights, vocab_size):
        rows = max(1, CHUNK[hidden.is_cuda] // len(weight))
        W, loss, d_hidden, d_weight = weight.to(hidden.dtype), 0.0, [], torch.zeros_like(weight)
        for h, t, w in zip(hidden.split(rows), targets.split(rows), weights[:, None].split(rows)):
            log_p = F.log_softmax(logits(h, W, vocab_size), dim=-1)                 # (rows, V) float32
            loss = loss - (log_p.gather(1, t) * w).sum() / t.size(1)
            d_logits = log_p.exp_().mul_(w).scatter_add_(1, t, (-w / t.size(1)).expand(t.shape)).to(h.dtype)
            d_hidden.append(d_logits @ W)                                           # (rows, C)
            d_weight += d_logits.T @ h                                              # (V, C)
        ctx.save_for_backward(torch.cat(d_hidden), d_weight)
        return loss

    @staticmethod
    def backward(ctx, d_loss):
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * d_loss.to(d_hidden.dtype), d_weight * d_loss, None, None, None


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head or config.n_embd // config.n_head % 2:
            raise ValueError("n_embd / n_head must be an even whole number, "
                             f"not {config.n_embd} / {config.n_head}")
        self.config = config
        self.dtype = torch.float32          # of the activations; weights stay in float32
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        cos, sin = rotary_table(config.block_size, config.n_embd // config.n_head)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """wte                        normal, std 0.02 (also the output matrix: logits start near 0)
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
        """Hidden states.

        inputs: (B, T) int64 token ids, T <= block_size. valid: (B, T) bool, False at padding that nobody may
        attend to (a causal model with padding on the right needs none). layer: stop after that many blocks
        (0 = embeddings). cache: a list of n_layer lists, empty at first, that keeps keys and values; then
        `inputs` are the tokens after the cached ones, all at once or (T = 1) one by one.
        Returns (B, T, C), RMS-normalised.
        """
        past = cache[0][0].size(2) if cache and cache[0] else 0
        T = inputs.size(1)
        if past + T > self.config.block_size or past and T > 1:
            raise ValueError(f"{past} cached and {T} new tokens: "
                             "at most block_size, and one by one after the first call")
        rotary = self.cos[past:past + T], self.sin[past:past + T]
        mask = None if valid is None or self.config.causal else valid[:, None, None, :]     # (B, 1, 1, T)
        x = norm(self.wte(inputs).to(self.dtype))                           # (B, T, C)
        for i, block in enumerate(self.blocks[:layer]):
            x = block(x, rotary, mask, None if cache is None else cache[i])
        return norm(x)

    def logits(self, hidden):
        """hidden (..., C) -> (..., V) float32;
        -inf for the mask token and padding, which are never predicted.
        """
        return logits(hidden, self.wte.weight.to(hidden.dtype), self.config.vocab_size)

    def forward(self, inputs, positions, targets, weights):
        """The loss of a batch of any objective (objectives.py): sum over n of weights[n] times the
        cross-entropy of targets[n] (mean over its K alternatives) at positions[n], in nats. The caller
        divides by the sum of weights.

        inputs: (B, T) int64. positions: (N,) int64 into B*T. targets: (N, K) int64. weights: (N,) float32.
        """
        hidden = self.features(inputs).flatten(0, 1).index_select(0, positions)     # (N, C)
        return CrossEntropy.apply(hidden, self.wte.weight, targets, weights, self.config.vocab_size)

# -----------------------------------------------------------------------------
# How large, how much work

def num_params(config):
    """Number of parameters (the embedding, shared with the output matrix, is counted once)."""
    return config.padded_vocab_size * config.n_embd + config.n_layer * 12 * config.n_embd ** 2


def flops(config, B, T, N):
    """Floating-point operations of one training step on B sequences of T tokens with N scored positions.

    A product of (m, k) and (k, n) matrices counts 2mkn; nothing else is counted. Backward costs twice the
    forward. Only the work that is needed counts: the head on the N scored positions, and for a causal model
    the lower triangle.
    """
    C = config.n_embd
    matrices = 2 * 12 * C * C * B * T                           # qkv 3C^2, attention output C^2, MLP 8C^2
    pairs = T * (T + 1) / 2 if config.causal else T * T         # (query, key) pairs
    attention = 2 * 2 * C * pairs * B                           # q k^T and the weighted sum of v
    head = 2 * C * config.padded_vocab_size * N
    return 3 * (config.n_layer * (matrices + attention) + head)
