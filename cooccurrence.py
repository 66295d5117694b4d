"""
The theory of "Look Ahead or Look Around?" (Zhang et al., ICML 2024, arXiv 2407.00935), on a toy language.

An objective is a distribution over (context, target) pairs. Its matrix A[c, y] = P(context c, target y),
normalised to N = D1^-1/2 A D2^-1/2, is what pretraining factorises. Its singular values 1 = s_1 >= s_2 >= ...
say how well the bipartite graph of contexts and targets is connected; that bounds a linear probe's error.

The paper's: this framework, Theorem 4.2 (masked singular values are smaller, more samples connected), dar,
and that a fixed mask ratio does not fit generation. Derived here, no quotation of its theorem, hypotheses or
constants: every verdict and number below and every proposition in the tests. The default language was chosen,
out of some twenty settings, because the ordering is clean there; where the claim fails is printed beside it.

    python cooccurrence.py                          # six parts, no data needed, about 15 seconds
    python cooccurrence.py --part 3                 # one of them
    python cooccurrence.py --text FILE              # part 6 on your own text as well
    python cooccurrence.py --plot theory.png        # all, and a figure (needs matplotlib)
"""
import argparse
import glob
import math
import os
import re
from collections import Counter
from itertools import combinations, product

if __name__ == "__main__":                          # small matrices: threads would only wait for each other
    os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")
import numpy as np

from common import has_matplotlib, one_line_errors

# -----------------------------------------------------------------------------
# The language, and objectives as lists of (visible positions S, target position j, probability)

def language(C=3, S=3, n=6, eps=0.1, rho=0.5):
    """Joint distribution of every text of n tokens and its topic, (V,)*n + (C,) float64, V = C*S.

    Topic z ~ U(C). A token is one of the S synonyms of z, or with probability eps any of the V. But with
    probability rho, v is followed by v+S+1 mod V: a collocation, local structure that ignores the topic.
    """
    V = C * S
    emit = np.repeat(np.eye(C), S, axis=0) * (1 - eps) / S + eps / V                # (V, C) P(x | z)
    step = np.eye(V)[(np.arange(V) + S + 1) % V]                                    # (V, V) collocation
    kernel = rho * step[:, :, None] + (1 - rho) * emit                              # (V, V, C) P(next | x, z)
    joint = emit / C
    for _ in range(n - 1):
        joint = joint[..., None, :] * kernel                                        # one more axis of size V
    return joint


def ar(n, lengths):
    """See the first k of n tokens, predict the next one; k uniform in `lengths`."""
    return dar(n, lengths, t=1)


def dar(n, lengths, t):
    """See the first k, predict one of the next t (of those that exist), uniformly."""
    return [(tuple(range(k)), j, 1 / len(lengths) / min(t, n - k))
            for k in lengths for j in range(k, min(k + t, n))]


def mlm(n, k):
    """See a uniform set of k tokens, predict a uniform one of the n-k masked tokens."""
    return vlm(n, [k])


def vlm(n, lengths):
    """As mlm with k uniform in `lengths`; this is normalization "bound" of objectives.py."""
    return [(S, j, 1 / len(lengths) / math.comb(n, k) / (n - k))
            for k in lengths for S in combinations(range(n), k) for j in range(n) if j not in S]


def short_contexts():
    """The objectives that most tables compare: two of six tokens are visible."""
    return {"ar": ar(6, [2]), "dar(2)": dar(6, [2], 2), "dar(3)": dar(6, [2], 3), "dar(4)": dar(6, [2], 4),
            "mlm(2)": mlm(6, 2), "vlm(1..4)": vlm(6, range(1, 5))}

# -----------------------------------------------------------------------------
# The matrix and its spectrum

def cooccurrence(P, pairs, ctx_pos=True, tgt="none"):
    """A (R, V), A[c, y] = sum of w(S, j) P(x_S = c, x_j = y) over `pairs`; P (V,)*n: distribution of texts.

    Rows: set S after set S in the order of `pairs`, the tokens at S lexicographically. Two choices matter:
    ctx_pos: a context shows which positions it has, as a masked input does. False: only its tokens, in order.
    tgt: where the target's position lives. "none": forgotten, the target is a token. "col": in the target,
         A is (R, n*V). "row": the context says which position is asked for, as in a real Transformer.
    """
    n, together, blocks = P.ndim, {}, {}
    for S, j, weight in pairs:
        seen = tuple(sorted((*S, j)))
        if seen not in together:                                              # the same for every j in `seen`
            together[seen] = P.sum(axis=tuple(set(range(n)) - set(seen)))
        block = weight * np.moveaxis(together[seen], seen.index(j), -1).reshape(-1, P.shape[j])   # (V^|S|, V)
        if tgt == "col":
            block = np.kron(np.eye(n)[j], block)                                 # (V^|S|, n*V), zero but at j
        context = (S if ctx_pos else len(S), j if tgt == "row" else None)
        blocks[context] = blocks[context] + block if context in blocks else block
    return np.concatenate(list(blocks.values()))


def inverse_sqrt(p):
    return np.where(p > 0, 1 / np.sqrt(np.where(p > 0, p, 1)), 0)


def normalize(A):
    """N = D1^-1/2 A D2^-1/2; rows and columns that never occur stay zero."""
    return inverse_sqrt(A.sum(1))[:, None] * A * inverse_sqrt(A.sum(0))


def singular(A):
    """s (V,) and right vectors W (V, V) of N, from the V x V matrix N^T N: A may be very tall."""
    N = normalize(A)
    values, W = np.linalg.eigh(N.T @ N)
    return np.sqrt(np.clip(values[::-1], 0, None)), W[:, ::-1]


def left_vectors(A, k):
    """U_k (R, k) = N W_k / s_k."""
    s, W = singular(A)
    return normalize(A) @ W[:, :k] / s[:k]


def report(s, C=3):
    """chi2: chi-square mutual information of context and target. tail: what rank C cannot explain. parts:
    components of the graph. kemeny: mean hitting time of its walk context-target-context, at least V-1."""
    gap = 1 - s[1:] ** 2
    return {"chi2": (s ** 2).sum() - 1, "tail": (s[C:] ** 2).sum(), "s_2": s[1], f"s_{C + 1}": s[C],
            "parts": int((s > 1 - 1e-9).sum()), "kemeny": (1 / gap).sum() if gap.min() > 1e-9 else math.inf}


def verdict(s, reference, C=3):
    """E: every singular value smaller than the reference's, A: only in aggregate (chi2, tail), X: not."""
    size = max(len(s), len(reference))
    a, b = (np.pad(v, (0, size - len(v))) for v in (s, reference))
    if (a <= b + 1e-6).all():                                              # a root of rounding errors is 1e-8
        return "=" if (b <= a + 1e-6).all() else "E"
    return "A" if (a ** 2).sum() <= (b ** 2).sum() and (a[C:] ** 2).sum() <= (b[C:] ** 2).sum() else "X"


def line(name, *cells, width=9):
    """Prints one row of a table: text and integers as they are, other numbers with three decimals."""
    text = [str(c) if isinstance(c, (str, int)) else f"{c:.3f}" for c in cells]
    print(f"  {name:<20}" + "".join(f"{c:>{width}}" for c in text))

# -----------------------------------------------------------------------------
# 1. Is "masked singular values are smaller" true?

def part1(args):
    """Spectra and graphs of every objective, then mlm against ar by what happens to positions."""
    P, every, spectra, curve = language().sum(-1), range(1, 6), {}, []
    flat, small = language(rho=0).sum(-1), language(S=2, n=5).sum(-1)
    print("chi2: sum of s_i^2 beyond s_1, tail: beyond s_3, parts: components. Against ar of equal lengths:")
    print("E: every singular value smaller, A: only in aggregate (chi2, tail), X: NOT SMALLER, =: the same")
    line("objective", *report(np.ones(4)), "degree", "against")
    for text, texts, objectives in [
            ("2 of 6 tokens visible", P, short_contexts()),
            ("1 to 5 visible", P, {"ar 1..5": ar(6, every), "dar(2) 1..5": dar(6, every, 2),
                                   "vlm(1..5)": vlm(6, every), "vlm(3..5)": vlm(6, range(3, 6))}),
            ("one mask: both neighbours visible", P, {"ar (5)": ar(6, [5]), "mlm(5)": mlm(6, 5)}),
            ("exchangeable text: no gain", flat, {"ar, rho=0": ar(6, [2]), "mlm(2), rho=0": mlm(6, 2)}),
            ("5 tokens, 6 words, and all masked tokens as one target: reversed", small,
             {"ar, n = 5": ar(5, [2]), "whole block": None})]:
        print("  - " + text)
        for name, pairs in objectives.items():
            A = cooccurrence(texts, pairs) if pairs else texts.reshape(6 ** 2, 6 ** 3)
            s = spectra[name] = singular(A)[0]
            reference = s if name.startswith("ar") else reference
            degree = np.count_nonzero(A) / len(A)
            line(name, *report(s).values(), degree, "" if s is reference else verdict(s, reference))

    print("\nchi2 of mlm(k) by where positions live; each column is judged against ar with the same choice")
    line("k visible (masked)", "ar", "forgotten", "nor in ctx", "in query", "in target", width=12)
    for k in every:
        row = []
        for choice in ({}, {"ctx_pos": False}, {"tgt": "row"}, {"tgt": "col"}):
            s, reference = (singular(cooccurrence(P, p, **choice))[0] for p in (mlm(6, k), ar(6, [k])))
            row.append((report(s)["chi2"], verdict(s, reference), report(reference)["chi2"]))
        curve.append((1 - k / 6, row[0][2], *(chi2 for chi2, _, _ in row)))
        line(f"{k} ({1 - k / 6:.2f})", row[0][2], *(f"{chi2:.3f} {mark}" for chi2, mark, _ in row), width=12)
    return {"spectra": spectra, "masking": np.array(curve)}

# -----------------------------------------------------------------------------
# 2. Self-supervised loss = matrix factorisation

def spectral_loss(A, f, g):
    """L = -2 E_A f(c).g(y) + E_p1 E_p2 (f(c).g(y))^2 = ||N - F G^T||^2 - ||N||^2, F = D1^1/2 f, G = D2^1/2 g.

    Pull pairs together, push independent ones apart. At its minimum, -(s_1^2 + .. + s_k^2), F spans the top k
    left singular vectors (Eckart-Young). f (R, k), g (V, k) numpy or torch; expectations are exact.
    """
    p1, p2 = A.sum(1)[:, None], A.sum(0)[:, None]
    return -2 * (f * (A @ g)).sum() + ((f.T @ (p1 * f)) * (g.T @ (p2 * g))).sum()


def factorize(A, rank, steps=500, seed=0):
    """Adam on the spectral loss: f (R, rank), g (V, rank), loss."""
    import torch                                                                    # parts 2 and 5 only
    A, generator = torch.from_numpy(A), torch.Generator().manual_seed(seed)
    f, g = (0.1 * torch.randn(size, rank, generator=generator, dtype=torch.float64) for size in A.shape)
    optimizer = torch.optim.Adam([f.requires_grad_(), g.requires_grad_()], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        spectral_loss(A, f, g).backward()
        optimizer.step()
    f, g = f.detach(), g.detach()
    return f.numpy(), g.numpy(), spectral_loss(A, f, g).item()


def cross_entropy(A, rank, d, seed=0):
    """Left singular vectors (R, rank) of sqrt(p1 p2) u; cross-entropy learns P(y|c) ~ p2(y) e^u, u centred.

    Data: (1-d) p1 p2^T + d A. Up to third order in u, CE = const + (spectral loss)/2: they agree as d -> 0.
    Training F = D1^1/2 f instead of f is what lets L-BFGS converge.
    """
    import torch
    p1, p2 = A.sum(1), A.sum(0)
    independent = np.outer(p1, p2)
    data, root = torch.from_numpy((1 - d) * independent + d * A), torch.from_numpy(np.sqrt(independent))
    generator = torch.Generator().manual_seed(seed)
    F, G = (0.01 * torch.randn(size, rank, generator=generator, dtype=torch.float64) for size in A.shape)
    optimizer = torch.optim.LBFGS([F.requires_grad_(), G.requires_grad_()], max_iter=200, history_size=20,
                                  tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        logits = torch.from_numpy(np.log(p2)) + d * (F @ G.T) / root                # (R, V)
        loss = -(data * logits.log_softmax(-1)).sum() / d ** 2
        loss.backward()
        return loss

    optimizer.step(closure)
    u = ((F @ G.T) / root).detach().numpy()
    u = u - (u @ p2)[:, None]
    return np.linalg.svd((u - p1 @ u) * root.numpy(), full_matrices=False)[0][:, :rank]


def angle(X, Y):
    """Largest principal angle between the column spaces of X and Y, degrees."""
    X, Y = np.linalg.qr(X)[0], np.linalg.qr(Y)[0]
    return np.degrees(np.arcsin(min(1.0, np.linalg.norm(X - Y @ (Y.T @ X), 2))))


def part2(args):
    """The identity at random f, g; Adam and cross-entropy against the singular vectors."""
    P, rng, objectives = language().sum(-1), np.random.default_rng(args.seed), short_contexts()
    matrices = {name: cooccurrence(P, objectives[name]) for name in ("ar", "dar(4)", "mlm(2)")}
    print("Spectral loss L, Adam, rank 3 (s_3 > s_4). identity: L - ||N - FG^T||^2 + ||N||^2 at random f, g")
    line("objective", "contexts", "identity", "L - min", "angle (deg)", width=12)
    for name, A in {**matrices, "vlm(1..3)": cooccurrence(P, vlm(6, [1, 2, 3]))}.items():
        N, root1, root2 = normalize(A), np.sqrt(A.sum(1))[:, None], np.sqrt(A.sum(0))[:, None]
        f, g = (rng.standard_normal((size, 3)) for size in A.shape)
        identity = spectral_loss(A, f, g) - ((N - root1 * f @ (root2 * g).T) ** 2).sum() + (N ** 2).sum()
        f, g, loss = factorize(A, 3, seed=args.seed)
        numbers = identity, loss + (singular(A)[0][:3] ** 2).sum(), angle(root1 * f, left_vectors(A, 3))
        line(name, len(A), *(f"{abs(x):.0e}" for x in numbers), width=12)
    print("\nCross-entropy, rank 2: angle (deg) to u_2, u_3, dependence scaled by d. Equal to second order")
    line("d", "1", "0.3", "0.1", "0.03")
    for name in ("ar", "mlm(2)"):
        U = left_vectors(matrices[name], 3)[:, 1:]
        line(name, *(angle(cross_entropy(matrices[name], 2, d, args.seed), U) for d in (1, 0.3, 0.1, 0.03)))
    return {}

# -----------------------------------------------------------------------------
# 3. Classification: a linear probe for the topic

def features(contexts, A, k):
    """D1^-1/2 U_k S_k = P(target | c) D2^-1/2 W_k (M, k): A's top directions for contexts, rows (M, V)."""
    E = inverse_sqrt(A.sum(0))[:, None] * singular(A)[1][:, :k]
    return inverse_sqrt(contexts.sum(1))[:, None] ** 2 * contexts @ E


def probe(x, labels, fit=slice(None), test=slice(None)):
    """Error on rows `test` of the linear probe of x (M, k): least squares to P(z|c) on rows `fit`, argmax.
    labels (M, C): P(c, z)."""
    root = np.sqrt(labels.sum(1, keepdims=True))
    weights = np.linalg.lstsq((root * x)[fit], (labels * inverse_sqrt(root ** 2))[fit], rcond=None)[0]
    guess = (x @ weights).argmax(1)[test]
    return 1 - labels[test][np.arange(len(guess)), guess].sum() / labels[test].sum()


def bound(A, labels, k):
    """phi, phi/(1 - s_{k+1}^2), R_k. phi: disagreement of label posteriors over context-target-context.
    R_k: squared error of the best probe of k features, bounded by the second. labels (R, C): P(c, z)."""
    Y = labels * inverse_sqrt(labels.sum(1, keepdims=True))                         # (R, C) D1^1/2 P(z|c)
    phi = (Y ** 2).sum() - ((normalize(A).T @ Y) ** 2).sum()
    return phi, phi / (1 - singular(A)[0][k] ** 2), (Y ** 2).sum() - ((left_vectors(A, k).T @ Y) ** 2).sum()


def classification(joint, P, ranks=(3, 9)):
    """{objective: [probe error at each rank]} on the contexts x_1 x_2 that all share. Features are from
    the texts' distribution P, labels from `joint`: the probe always knows the true posterior."""
    labels, errors = cooccurrence(joint, [((0, 1), 6, 1)]), {}                      # axis 6 is the topic
    for name, pairs in short_contexts().items():
        A, prefixes = cooccurrence(P, pairs), cooccurrence(P, [pair for pair in pairs if pair[0] == (0, 1)])
        errors[name] = [probe(features(prefixes, A, k), labels) for k in ranks]
    return errors


def learning_curve(seed=0, sizes=(30, 100, 300, 1000, 3000, 10000), repeats=5):
    """{objective: error at rank 3 for each size}; features from so many texts, zero for an unseen prefix."""
    joint, curve = language(), {}
    P = joint.sum(-1)
    for N in sizes:
        rng = np.random.default_rng((seed, N))
        draws = rng.multinomial(N, P.ravel() / P.sum(), size=repeats)               # (repeats, V^n)
        errors = [classification(joint, draw.reshape(P.shape) / N, ranks=[3]) for draw in draws]
        for name in errors[0]:
            curve.setdefault(name, []).append(np.mean([e[name] for e in errors]))
    return curve, sizes


def part3(args):
    """The probe where the ordering is clean, and where it is not; the learning curve."""
    for rho, text in [(0.5, "rho = 0.5, the default language: smaller singular values, better probe"),
                      (0.8, "rho = 0.8: every singular value smaller, yet a WORSE probe: a bound is no law")]:
        joint = language(rho=rho)
        P, errors = joint.sum(-1), classification(joint, joint.sum(-1))
        print(f"{text}. Bayes error {1 - cooccurrence(joint, [((0, 1), 6, 1)]).max(1).sum():.4f}")
        line("objective", "error k=3", "k=9", "chi2", "tail", "phi", "bound", "R_3", "against")
        for name, pairs in short_contexts().items():
            A, labels = cooccurrence(P, pairs), cooccurrence(joint, [(S, 6, w) for S, _, w in pairs])
            s = singular(A)[0]
            reference = s if name == "ar" else reference
            numbers = *errors[name], report(s)["chi2"], report(s)["tail"], *bound(A, labels, 3)
            line(name, *numbers, "" if s is reference else verdict(s, reference))
        print()
    curve, sizes = learning_curve(args.seed)
    print("Probe error at rank 3, features learned from N texts (rho = 0.5, mean of 5 samples)")
    line("N", *sizes)
    for name, row in curve.items():
        line(name, *row)
    return {"errors": curve, "sizes": sizes}

# -----------------------------------------------------------------------------
# 4. Contexts that never repeat

def unique_contexts(N, seed=0, C=4, S=15, n=16, k=8, eps=0.2):
    """N texts, rho = 0, each a context of its own: topics (N, C) one-hot, bags (N, V), matrices (N, V)."""
    rng, V = np.random.default_rng((seed, N)), C * S
    z = rng.integers(C, size=N)
    synonym, noise = z[:, None] * S + rng.integers(S, size=(N, n)), rng.integers(V, size=(N, n))
    x = np.where(rng.random((N, n)) < 1 - eps, synonym, noise)
    targets = {"ar": x[:, k:k + 1], "dar(2)": x[:, k:k + 2], "dar(4)": x[:, k:k + 4], "dar(8)": x[:, k:k + 8],
               "mlm, 8 masks": rng.permuted(x, axis=1)[:, k:]}                # the last n-k of a random order
    matrices = {name: np.eye(V)[y].mean(1) / N for name, y in targets.items()}      # (N, V)
    return np.eye(C)[z], np.eye(V)[x[:, 1:]].mean(1), matrices


def limit(t, C=4, V=60, eps=0.2):
    """Spectrum as N -> infinity, t targets per context: s^2 = 1/t + (1 - 1/t) lambda, of the topic model."""
    return np.sqrt(1 / t + (1 - 1 / t) * np.array([1] + [(1 - eps) ** 2] * (C - 1) + [0] * (V - C)))


def part4(args):
    """Measurement beside closed form."""
    print("ar: V stars, not connected. t targets per context connect them, tail -> (V-C)/t. Mean of 3 runs")
    line("objective", "N", "parts", "s_2", "limit", "chi2", "limit", "tail", "limit", "err k=4", "k=60")
    for N in (50, 200, 1000, 4000):
        rows, pooled, halves = {}, [], (slice(N // 2), slice(N // 2, N))
        for seed in range(args.seed, args.seed + 3):
            z, bag, matrices = unique_contexts(N, seed)
            pooled.append(probe(bag, z, *halves))
            for name, A in matrices.items():
                r = report(singular(A)[0], 4)
                errors = [probe(features(A, A, k), z, *halves) for k in (4, 60)]
                rows.setdefault(name, []).append([r["parts"], r["s_2"], r["chi2"], r["tail"], *errors])
        for (name, values), t in zip(rows.items(), (1, 2, 4, 8, 8)):
            parts, s2, chi2, tail, low, full = np.mean(values, axis=0)
            r = report(limit(t), 4)
            low = "-" if t == 1 else low                    # ar: any 4 of 60 equal directions, not identified
            line(name, N, f"{parts:.1f}", s2, r["s_2"], chi2, r["chi2"], tail, r["tail"], low, full)
    print("But at full rank and pooled over all prefixes ar is a bag of words, as good as any: error "
          f"{np.mean(pooled):.3f}")
    return {}

# -----------------------------------------------------------------------------
# 5. Generation: a masked model of one fixed length cannot read a short prompt

TRAINED = {"ar = vlm(1..5)": range(1, 6), "mlm(5)": [5], "mlm(3)": [3], "vlm(3..5)": [3, 4, 5]}

def prompts(P):
    """Multisets of 0..n-1 tokens: counts (M, V), P(multiset, next token | length) (M, V), length (M,)."""
    V, counts, joint = P.shape[0], [], []
    for m in range(P.ndim):
        texts = np.array(list(product(range(V), repeat=m)), dtype=int).reshape(V ** m, m)
        bags, index = np.unique(np.eye(V)[texts].sum(1), axis=0, return_inverse=True)
        counts.append(bags)
        joint.append(np.zeros((len(bags), V)))
        np.add.at(joint[m], index.ravel(), cooccurrence(P, ar(P.ndim, [m])))
    return np.concatenate(counts), np.concatenate(joint), np.repeat(range(P.ndim), [len(c) for c in counts])


def generation(hidden=32, runs=3, seed=0, steps=1000):
    """Excess log-loss in nats over the truth, {objective: (runs, 6)}, prompt lengths 0..5, exchangeable text.

    There the next token given m tokens is the masked token given any m: only the lengths trained on differ.
    The model, an MLP or with hidden = 0 log-linear, sees token counts; all runs are trained side by side.
    """
    import torch
    counts, joint, length = prompts(language(S=2, rho=0).sum(-1))
    share = np.stack([sum(length == m for m in K) / len(K) for K in TRAINED.values() for _ in range(runs)])
    x, weight = torch.from_numpy(counts), torch.from_numpy(share[:, :, None] * joint)    # .., (models, M, V)
    generator = torch.Generator().manual_seed(seed)

    def start(fan_in, fan_out):                                                # (models, in, out), N(0, 1/in)
        W = torch.randn(runs, fan_in, fan_out, generator=generator, dtype=torch.float64) / fan_in ** 0.5
        return W.repeat(len(TRAINED), 1, 1).requires_grad_()

    W = [start(6, hidden), start(hidden, 6)] if hidden else [start(6, 6)]
    b = [torch.zeros_like(w[:, :1]).requires_grad_() for w in W] if hidden else []
    optimizer = torch.optim.Adam(W + b, lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        logits = (x @ W[0] + b[0]).tanh() @ W[1] + b[1] if hidden else x @ W[0]     # (models, M, V)
        logp = logits.log_softmax(-1)
        optimizer.zero_grad()
        (-weight * logp).sum().backward()
        optimizer.step()
        schedule.step()
    truth = joint / joint.sum(1, keepdims=True)
    excess = (joint * (np.log(truth) - logp.detach().numpy())).sum(-1)              # (models, M)
    excess = np.stack([excess[:, length == m].sum(1) for m in range(6)], axis=-1)   # (models, 6)
    return dict(zip(TRAINED, excess.reshape(len(TRAINED), runs, 6)))


def next_token_excess(P, m, t):
    """Excess nats if the exact distribution of dar(t) given the first m tokens is used for the next token."""
    truth, A = cooccurrence(P, ar(P.ndim, [m])), cooccurrence(P, dar(P.ndim, [m], t))       # equal row sums
    return (truth * np.log(truth / A)).sum()


def part5(args):
    """Prompts of the lengths that were trained on can be read; a weak model has to choose."""
    _, joint, length = prompts(language(S=2, rho=0).sum(-1))
    backoff = joint * np.log(joint / joint.sum(1, keepdims=True) / joint[0])
    print("Excess log-loss (nats) of the token after m tokens, exchangeable text; nobody trains on m = 0")
    line("m", *range(6))
    line("table, m untrained", *(abs(backoff[length == m].sum()) for m in range(6)))
    for hidden, runs, text in [(0, 1, "log-linear model, too weak for all lengths at once: a trade-off"),
                               (32, 3, "MLP with 32 hidden units, mean of 3 runs")]:
        print("  - " + text)
        excess = {name: abs(e.mean(0)) for name, e in generation(hidden, runs, args.seed).items()}
        for name, row in excess.items():
            line(name, *(f"{e:.4f}" for e in row))
    print("\nWhat dar costs: its exact distribution used for the next token, default language (nats)")
    for t in (1, 2, 3, 5):
        line(f"dar({t})", "", *(next_token_excess(language().sum(-1), m, t) for m in range(1, 6)))
    return {"excess": excess}

# -----------------------------------------------------------------------------
# 6. Real text: contexts of one token, exact counts

def tokens(*paths, V=500, limit=10**6):
    """First words, numbers, signs of text files, lower-case: ids (T,), V-1 most common and one for others."""
    words = []
    for path in paths:
        with open(path, encoding="utf-8", errors="replace") as file:
            words += re.findall(r"[a-z]+|[0-9]+|[^\sa-z0-9]", file.read().lower())
    rank = {word: i for i, (word, _) in enumerate(Counter(words[:limit]).most_common(V - 1))}
    return np.array([rank.get(word, len(rank)) for word in words[:limit]], dtype=np.int64)


def real_text(ids, seed=0, window=8):
    """{objective: spectrum} from B_d[u, v] = P(x_i = u, x_{i+d} = v); mlm: one of 8 tokens visible."""
    def bigrams(x, d, V=ids.max() + 1):
        return np.bincount(x[:-d] * V + x[d:], minlength=V * V).reshape(V, V) / (len(x) - d)
    B = {d: bigrams(ids, d) for d in range(1, window)}
    matrices = {f"dar({t})": sum(B[d] for d in range(1, t + 1)) / t for t in (1, 2, 4, 7)}
    matrices["mlm(1)"] = sum((window - d) * (B[d] + B[d].T) for d in B) / (window * (window - 1))
    matrices["noise"] = bigrams(np.random.default_rng(seed).permutation(ids), 1)   # what sampling alone gives
    return {name.replace("dar(1)", "ar"): singular(A)[0] for name, A in matrices.items()}


def part6(args):
    """On the source of this Python's standard library and on --text."""
    texts = {"standard library": sorted(glob.glob(os.path.join(os.path.dirname(os.__file__), "*.py")))}
    for name, files in {**texts, **({args.text: [args.text]} if args.text else {})}.items():
        ids = tokens(*files)
        spectra = real_text(ids, args.seed)
        noise = ids.max() ** 2 / len(ids)
        print(f"{name}: {len(ids)} tokens; sampling alone gives chi2 = (V-1)^2/T = {noise:.3f}")
        line("objective", "chi2", "tail>10", "s_2", "s_11", "first s_i<=ar", width=15)
        for objective, s in spectra.items():
            above = np.flatnonzero(s > spectra["ar"] + 1e-6)
            smaller = f"{above[0] if len(above) else len(s)} of {len(s)}"
            line(objective, *list(report(s, 10).values())[:4], smaller, width=15)
    print("In aggregate and for the leading values as claimed, but not for every single one.")
    return {"text": name, "real": spectra}

# -----------------------------------------------------------------------------
# The figure, and the command line

def figure(path, spectra, masking, errors, sizes, excess, text, real):
    """Five panels from the results of parts 1 (two of them), 3, 5 and 6."""
    import matplotlib.pyplot as plt
    plt.switch_backend("Agg")
    fig, axes = plt.subplot_mosaic("AABBCC;DDDEEE", figsize=(13, 7.5), layout="constrained")

    def panel(key, title, xlabel, ylabel, x, curves, **scales):
        for name, y in curves.items():
            axes[key].plot(x, y, "k:" if name == "noise" else "-" if len(x) > 20 else "o-", label=name)
        axes[key].set(title=title, xlabel=xlabel, ylabel=ylabel, **scales)
        axes[key].legend(fontsize=8)

    panel("A", "1. Toy language, two visible tokens", "i", "singular value $s_i$", range(1, 10),
          {name: spectra[name] for name in short_contexts()})
    panel("B", "1. Too few masks, and the claim fails", "mask ratio", r"$\sum_{i>1} s_i^2$", masking[:, 0],
          {"ar, equal length": masking[:, 1], "mlm": masking[:, 2], "mlm, position in query": masking[:, 4]})
    panel("C", "3. Probe of three features", "training texts", "error", sizes, errors, xscale="log", ylim=0)
    panel("D", "5. Generation", "prompt (tokens)", "excess log-loss (nats)", range(6), excess, yscale="log")
    panel("E", "6. Real text: " + text, "i", "singular value $s_i$", range(1, 1 + len(real["ar"])), real,
          xscale="log", yscale="log", ylim=1e-3)
    fig.savefig(path, dpi=100)


PARTS = {"Objectives as matrices": part1, "Self-supervised loss = matrix factorisation": part2,
         "Classification": part3, "Contexts that never repeat": part4, "Generation": part5,
         "Real text": part6}

def build_parser():
    parser = argparse.ArgumentParser(description="The paper's theory on a toy language and on real text.")
    parser.add_argument("--part", type=int, choices=range(1, 7), help="run only this part")
    parser.add_argument("--plot", metavar="FILE", help="also draw a figure of five panels (needs matplotlib)")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is sampled (default: 0)")
    parser.add_argument("--text", metavar="FILE", help="a text file for part 6")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    with one_line_errors():
        if args.seed < 0:
            raise ValueError(f"--seed must be at least 0, not {args.seed}")
        if args.plot and args.part:
            raise ValueError("--plot needs all parts: leave out --part")
        if args.text and len(set(tokens(args.text))) < 20:
            raise ValueError(f"{args.text} has fewer than 20 different words, too few for a spectrum")
        if args.plot:                                                       # fail before the work
            if not has_matplotlib():
                raise ValueError("--plot needs matplotlib: pip install matplotlib")
            open(args.plot, "ab").close()
        results = {}
        for number, (title, part) in enumerate(PARTS.items(), 1):
            if args.part in (None, number):
                print(f"{number}. {title}\n{'-' * 110}")
                results.update(part(args))
                print()
        if args.plot:
            figure(args.plot, **results)


if __name__ == "__main__":
    main()
