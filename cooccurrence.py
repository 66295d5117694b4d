"""
The theory of "Look Ahead or Look Around?" (Zhang et al., ICML 2024, arXiv 2407.00935), on a toy language.

An objective is a distribution over (context, target) pairs. Write it as a matrix,
A[c, y] = P(context c, target y), and normalise it to N = D1^-1/2 A D2^-1/2, where D1 and D2 hold
the row and column sums. N is what pretraining factorises (part 2). Its singular values
1 = s_1 >= s_2 >= ... say how much contexts and targets depend on each other: how well the bipartite
graph that links them is connected. That bounds the error of a linear probe (part 3).

From the paper: this framework, Theorem 4.2 (masked singular values are smaller, so more samples are
connected), dar, and that a fixed mask ratio does not fit generation. Derived here: every verdict and
number below, and every proposition in the tests. They do not quote the theorem, its hypotheses or its
constants. The default language was chosen out of some twenty settings because the ordering is clean
there. The cases where the claim fails are printed too. spectrum.py measures the same singular values in
trained models.

    python cooccurrence.py                          # five parts, no data needed, about 15 seconds
    python cooccurrence.py --part 3                 # one of them
    python cooccurrence.py --plot theory.png        # all of them, and a figure (needs matplotlib)
"""
import math
import os
from itertools import combinations

if __name__ == "__main__":              # small matrices: threads would only wait for each other
    os.environ.update(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")
import numpy as np

from common import Parser, check_plot, one_line_errors, save_figure

# -----------------------------------------------------------------------------
# The language, and the objectives as lists of (visible positions S, target position j, probability)

def language(C=3, S=3, n=6, eps=0.1, rho=0.5):
    """Joint distribution of every text of n tokens and its topic: (V,)*n + (C,) float64, V = C*S.

    The topic z is uniform on C. A token is one of the S synonyms of z, or with probability eps any
    of the V. But with probability rho, v is followed by v+S+1 mod V: a collocation, local structure
    that ignores the topic.
    """
    V = C * S
    synonyms = np.repeat(np.eye(C), S, axis=0)                              # (V, C)
    emit = synonyms * (1 - eps) / S + eps / V                               # (V, C) P(x | z)
    follower = (np.arange(V) + S + 1) % V                                   # (V,) collocations
    collocation = np.eye(V)[follower]                                       # (V, V)
    step = rho * collocation[:, :, None] + (1 - rho) * emit                 # (V, V, C) P(next | x, z)

    joint = emit / C
    for _ in range(n - 1):
        joint = joint[..., None, :] * step                                  # one more axis of size V
    return joint


def text_distribution(**settings):
    """P (V,)*n: the distribution of texts alone. The settings are those of `language`."""
    return language(**settings).sum(-1)


def ar(n, lengths):
    """See the first k of n tokens, predict the next one. k is uniform in `lengths`."""
    return dar(n, lengths, t=1)


def dar(n, lengths, t):
    """See the first k, predict one of the next t (of those that exist), uniformly."""
    pairs = []
    for k in lengths:
        targets = range(k, min(k + t, n))
        weight = 1 / len(lengths) / len(targets)
        pairs += [(tuple(range(k)), j, weight) for j in targets]
    return pairs


def mlm(n, k):
    """See a uniform set of k tokens, predict a uniform one of the n-k masked tokens."""
    return vlm(n, [k])


def vlm(n, lengths):
    """As mlm, with k uniform in `lengths`. This is normalization "bound" of objectives.py."""
    pairs = []
    for k in lengths:
        weight = 1 / len(lengths) / math.comb(n, k) / (n - k)
        for S in combinations(range(n), k):
            pairs += [(S, j, weight) for j in range(n) if j not in S]
    return pairs


def short_contexts():
    """The objectives that most tables compare: two of six tokens are visible."""
    return {"ar": ar(6, [2]),
            "dar(2)": dar(6, [2], 2),
            "dar(3)": dar(6, [2], 3),
            "dar(4)": dar(6, [2], 4),
            "mlm(2)": mlm(6, 2),
            "vlm(1..4)": vlm(6, range(1, 5))}

# -----------------------------------------------------------------------------
# The matrix and its spectrum

def cooccurrence(P, pairs, tgt="none"):
    """A (R, V): A[c, y] = sum of w(S, j) P(x_S = c, x_j = y) over `pairs`. P (V,)*n: texts.

    Rows: set S after set S in the order of `pairs`, within a set the tokens at S lexicographically. A
    context shows which positions it has, as a masked input does.

    tgt says where the target's position lives, which decides what is true of the singular values. "none":
    forgotten, the target is a token. "col": in the target, A is (R, n*V). "row": in the context, which then
    says which position is asked for, as a Transformer's does.
    """
    n = P.ndim
    blocks = {}
    for S, j, weight in pairs:
        # P(tokens at S, token at j)
        other = tuple(i for i in range(n) if i not in S and i != j)
        seen = sorted((*S, j))
        block = np.moveaxis(P.sum(axis=other), seen.index(j), -1)           # (V,)*|S| + (V,)
        block = weight * block.reshape(-1, P.shape[j])                      # (V^|S|, V)
        if tgt == "col":
            block = np.kron(np.eye(n)[j], block)                            # (V^|S|, n*V), zero but at j

        # Pairs with the same context share their rows
        context = (S, j) if tgt == "row" else S
        blocks[context] = blocks.get(context, 0) + block
    return np.concatenate(list(blocks.values()))


def inverse_sqrt(p):
    """p^-1/2, and 0 where p is 0."""
    occurs = p > 0
    positive = np.where(occurs, p, 1)
    return np.where(occurs, 1 / np.sqrt(positive), 0)


def normalize(A):
    """N = D1^-1/2 A D2^-1/2. Rows and columns that never occur stay zero."""
    contexts = A.sum(1)                                             # (R,) D1
    targets = A.sum(0)                                              # (V,) D2
    return inverse_sqrt(contexts)[:, None] * A * inverse_sqrt(targets)


def singular(A):
    """s (V,) and right vectors W (V, V) of N, from the V x V matrix N^T N, as A may be very tall."""
    N = normalize(A)
    squares, W = np.linalg.eigh(N.T @ N)                            # ascending
    s = np.sqrt(np.clip(squares, 0, None))
    return s[::-1], W[:, ::-1]


def singular_values(A):
    """s (V,) of N, falling. Beyond its rank they are 0, to rounding."""
    N = normalize(A)
    R, V = N.shape
    gram = N @ N.T if R < V else N.T @ N                            # the smaller one
    squares = np.linalg.eigvalsh(gram)[::-1]                        # falling
    return np.pad(np.sqrt(np.clip(squares, 0, None)), (0, V - len(squares)))


def left_vectors(A, k):
    """U_k (R, k) = N W_k / s_k."""
    s, W = singular(A)
    return normalize(A) @ W[:, :k] / s[:k]


def describe(s, C=3):
    """What a spectrum s (V,) says.

    chi2     sum of s_i^2 beyond s_1: the chi-square mutual information of context and target
    tail     the same beyond s_C: what a representation of rank C cannot explain
    parts    connected components of the graph
    hitting  mean hitting time of the walk target-context-target in steps, at least V-1 (Kemeny's constant)
    """
    squares = s ** 2
    gap = 1 - squares[1:]
    connected = gap.min() > 1e-9
    return {
        "chi2": squares.sum() - 1,
        "tail": squares[C:].sum(),
        "s_2": s[1],
        f"s_{C + 1}": s[C],
        "parts": int((s > 1 - 1e-9).sum()),
        "hitting": (1 / gap).sum() if connected else math.inf}


def verdict(s, reference, C=3):
    """How a spectrum s compares with a reference. The shorter one is filled up with zeros.

    E  every singular value is at most the reference's
    A  only in aggregate (chi2 and tail)
    X  not even that
    =  they are the same
    """
    size = max(len(s), len(reference))
    s = np.pad(s, (0, size - len(s)))
    reference = np.pad(reference, (0, size - len(reference)))

    rounding = 1e-6                                         # a root of rounding errors is 1e-8
    if (abs(s - reference) <= rounding).all():
        return "="
    if (s <= reference + rounding).all():
        return "E"
    more = s ** 2 - reference ** 2
    aggregate = more.sum() <= 0 and more[C:].sum() <= 0
    return "A" if aggregate else "X"


def line(name, *cells, width=9):
    """Print one row of a table: text and integers as they are, other numbers with three decimals."""
    text = f"  {name:<20}"
    for cell in cells:
        cell = cell if isinstance(cell, (str, int)) else f"{cell:.3f}"
        text += str(cell).rjust(width)
    print(text)

# -----------------------------------------------------------------------------
# 1. Is "masked singular values are smaller" true?

def every_objective():
    """[(heading, P, {name: pairs})]. The first of each group is the reference of the others."""
    every = range(1, 6)
    return [
        ("2 of 6 tokens visible", text_distribution(), short_contexts()),
        ("1 to 5 visible", text_distribution(), {
            "ar 1..5": ar(6, every),
            "dar(2) 1..5": dar(6, every, 2),
            "vlm(1..5)": vlm(6, every),
            "vlm(3..5)": vlm(6, range(3, 6))}),
        ("one mask: both neighbours visible", text_distribution(), {
            "ar (5)": ar(6, [5]),
            "mlm(5)": mlm(6, 5)}),
        ("exchangeable text: no gain", text_distribution(rho=0), {
            "ar, rho=0": ar(6, [2]),
            "mlm(2), rho=0": mlm(6, 2)})]


def compare_objectives():
    """Print every objective's spectrum. Returns {name: s}."""
    print("chi2: sum of s_i^2 beyond s_1, tail: beyond s_3, parts: components. "
          "Against the first of each group:")
    print("E: every singular value smaller, A: only in aggregate (chi2, tail), "
          "X: NOT SMALLER, =: the same")
    print("known: chi2 if the context says which position is asked for, as in a Transformer "
          "(dar is not told)")
    line("objective", *describe(np.ones(4)), "against", "known", "against")

    spectra = {}
    for heading, P, objectives in every_objective():
        print("  - " + heading)
        forgotten = {}
        known = {}
        for name, pairs in objectives.items():
            forgotten[name] = singular_values(cooccurrence(P, pairs))
            known[name] = singular_values(cooccurrence(P, pairs, "row"))

        first = next(iter(objectives))
        for name, s in forgotten.items():
            line(name, *describe(s).values(), verdict(s, forgotten[first]),
                 describe(known[name])["chi2"], verdict(known[name], known[first]))
        spectra |= forgotten
    return spectra


POSITIONS = {                           # where the target's position lives, and the tgt that means it
    "forgotten": "none",
    "in query": "row",
    "in target": "col"}


def compare_mask_ratios():
    """Print chi2 of mlm(k) by where the target's position lives.

    Returns (5, 4): mask ratio, chi2 of ar, of mlm, and of mlm with the position in the query.
    """
    print("chi2 of mlm(k) by where the target's position lives. "
          "Each column is judged against ar with the same choice")
    line("k visible (masked)", "ar", *POSITIONS, width=12)
    P = text_distribution()
    curve = []
    for k in range(1, 6):
        ar_chi2 = describe(singular_values(cooccurrence(P, ar(6, [k]))))["chi2"]
        chi2 = {}
        cells = []
        for name, tgt in POSITIONS.items():
            s = singular_values(cooccurrence(P, mlm(6, k), tgt))
            reference = singular_values(cooccurrence(P, ar(6, [k]), tgt))
            chi2[name] = describe(s)["chi2"]
            cells.append(f"{chi2[name]:.3f} {verdict(s, reference)}")

        ratio = 1 - k / 6
        line(f"{k} ({ratio:.2f})", ar_chi2, *cells, width=12)
        curve.append([ratio, ar_chi2, chi2["forgotten"], chi2["in query"]])
    return np.array(curve)


def part1(args):
    """The spectra of all objectives, then chi2 by mask ratio."""
    spectra = compare_objectives()
    print()
    return {"spectra": spectra, "masking": compare_mask_ratios()}

# -----------------------------------------------------------------------------
# 2. Self-supervised loss = matrix factorisation

def spectral_loss(A, f, g):
    """L = -2 E_A f(c).g(y) + E_p1 E_p2 (f(c).g(y))^2: pull pairs together, push independent ones apart.

    With F = D1^1/2 f and G = D2^1/2 g, L = ||N - F G^T||^2 - ||N||^2. So at its minimum,
    -(s_1^2 + .. + s_k^2), F spans the top k left singular vectors (Eckart-Young). Cross-entropy is
    half of this loss, to second order in the dependence of contexts and targets (see the tests).

    f (R, k), g (V, k), numpy or torch. The expectations are exact.
    """
    p1 = A.sum(1)[:, None]
    p2 = A.sum(0)[:, None]
    together = (f * (A @ g)).sum()
    ff = f.T @ (p1 * f)                                             # (k, k) E f f^T
    gg = g.T @ (p2 * g)                                             # (k, k) E g g^T
    return -2 * together + (ff * gg).sum()


def factorize(A, rank, steps=500, seed=0):
    """Adam on the spectral loss: f (R, rank), g (V, rank), loss."""
    import torch                                                    # only this part needs it
    A = torch.from_numpy(A)
    generator = torch.Generator().manual_seed(seed)
    f, g = [0.1 * torch.randn(size, rank, generator=generator, dtype=torch.float64)
            for size in A.shape]
    optimizer = torch.optim.Adam([f.requires_grad_(), g.requires_grad_()], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        spectral_loss(A, f, g).backward()
        optimizer.step()
    f = f.detach()
    g = g.detach()
    return f.numpy(), g.numpy(), spectral_loss(A, f, g).item()


def angle(X, Y):
    """Largest principal angle between the column spaces of X and Y, degrees."""
    X, _ = np.linalg.qr(X)
    Y, _ = np.linalg.qr(Y)
    outside = X - Y @ (Y.T @ X)                                     # the part of X that Y lacks
    sine = min(1.0, np.linalg.norm(outside, 2))
    return np.degrees(np.arcsin(sine))


def part2(args):
    """The identity at random f and g, then Adam against the singular vectors."""
    P = text_distribution()
    rng = np.random.default_rng(args.seed)
    print("Spectral loss L, Adam, rank 3 (s_3 > s_4). "
          "identity: L - ||N - FG^T||^2 + ||N||^2 at random f, g")
    line("objective", "contexts", "identity", "L - min", "angle (deg)", width=12)
    objectives = {
        "ar": ar(6, [2]),
        "dar(4)": dar(6, [2], 4),
        "mlm(2)": mlm(6, 2),
        "vlm(1..3)": vlm(6, [1, 2, 3])}
    for name, pairs in objectives.items():
        A = cooccurrence(P, pairs)
        N = normalize(A)
        root1 = np.sqrt(A.sum(1))[:, None]
        root2 = np.sqrt(A.sum(0))[:, None]

        # The identity at random f and g
        f, g = [rng.standard_normal((size, 3)) for size in A.shape]
        rest = N - root1 * f @ (root2 * g).T
        identity = spectral_loss(A, f, g) - (rest ** 2).sum() + (N ** 2).sum()

        # What Adam finds, against the least loss and the singular vectors
        f, g, loss = factorize(A, 3, seed=args.seed)
        top = singular_values(A)[:3]
        above = loss + (top ** 2).sum()
        degrees = angle(root1 * f, left_vectors(A, 3))
        numbers = [f"{abs(number):.0e}" for number in (identity, above, degrees)]
        line(name, len(A), *numbers, width=12)
    return {}

# -----------------------------------------------------------------------------
# 3. Classification: a linear probe for the topic

def features(contexts, A, k):
    """A's top k directions for the rows of `contexts` (M, V), another matrix of pairs: (M, k).

    D1^-1/2 U_k S_k = P(target | c) D2^-1/2 W_k.
    """
    _, W = singular(A)
    per_target = inverse_sqrt(A.sum(0))                                         # (V,) D2^-1/2
    per_context = inverse_sqrt(contexts.sum(1)) ** 2                            # (M,) 1 / P(c)
    directions = per_target[:, None] * W[:, :k]                                 # (V, k)
    return per_context[:, None] * contexts @ directions


def probe_error(x, labels, fit=slice(None), test=slice(None)):
    """Error of a linear probe for the topic: least squares to P(z|c) on the rows `fit`, then argmax.

    x (M, k): features. labels (M, C): P(c, z). The error is that on the rows `test`.
    """
    root = np.sqrt(labels.sum(1, keepdims=True))                                # sqrt P(c)
    posterior = labels * inverse_sqrt(root ** 2)                                # sqrt P(c) P(z|c)
    weighted = root * x
    weights, *_ = np.linalg.lstsq(weighted[fit], posterior[fit], rcond=None)

    guess = (x[test] @ weights).argmax(1)
    truth = labels[test]
    right = np.take_along_axis(truth, guess[:, None], axis=1).sum()
    return 1 - right / truth.sum()


def probe_bound(A, labels, k):
    """phi, phi/(1 - s_{k+1}^2) and R_k, of which the second bounds the third. labels (R, C): P(c, z).

    phi: disagreement of label posteriors over one walk context-target-context. R_k: squared error of
    the best probe of k features.
    """
    Y = labels * inverse_sqrt(labels.sum(1, keepdims=True))                     # (R, C) D1^1/2 P(z|c)
    total = (Y ** 2).sum()
    after_a_step = normalize(A).T @ Y                                           # (V, C)
    explained = left_vectors(A, k).T @ Y                                        # (k, C)
    phi = total - (after_a_step ** 2).sum()
    residual = total - (explained ** 2).sum()

    gap = 1 - singular_values(A)[k] ** 2
    return phi, phi / gap, residual


PREFIX = (0, 1)                         # the contexts x_1 x_2, which all objectives share
TOPIC = 6                               # the axis of `language()` that is the topic

def classification(joint, P, ranks=(3, 9)):
    """{objective: [probe error at each rank]} on the contexts x_1 x_2.

    Features come from the texts' distribution P, labels from `joint`: the probe always knows the true
    posterior.
    """
    labels = cooccurrence(joint, [(PREFIX, TOPIC, 1)])
    errors = {}
    for name, pairs in short_contexts().items():
        A = cooccurrence(P, pairs)
        prefixes = cooccurrence(P, [(S, j, weight) for S, j, weight in pairs if S == PREFIX])
        errors[name] = [probe_error(features(prefixes, A, k), labels) for k in ranks]
    return errors


def learning_curve(seed=0, sizes=(30, 100, 300, 1000, 3000, 10000), repeats=5):
    """{objective: error at rank 3 for each size}, and the sizes.

    A size is the number of texts that features come from. A prefix that does not occur has features 0.
    """
    joint = language()
    P = joint.sum(-1)
    curve = {}
    for N in sizes:
        # Draw N texts, `repeats` times
        rng = np.random.default_rng((seed, N))
        probabilities = P.ravel() / P.sum()
        counts = rng.multinomial(N, probabilities, size=repeats)                # (repeats, V^n)
        samples = counts.reshape(repeats, *P.shape) / N

        # The mean error of the probes on their features
        errors = [classification(joint, sample, ranks=[3]) for sample in samples]
        for name in errors[0]:
            mean = np.mean([error[name] for error in errors])
            curve.setdefault(name, []).append(mean)
    return curve, sizes


def compare_probes(rho):
    """Probe errors and their bounds beside the spectra, each judged by the first."""
    joint = language(rho=rho)
    P = joint.sum(-1)
    errors = classification(joint, P)
    line("objective", "error k=3", "k=9", "chi2", "tail", "phi", "bound", "R_3", "against")
    reference = None
    for name, pairs in short_contexts().items():
        # Contexts with targets, and contexts with labels
        A = cooccurrence(P, pairs)
        labels = cooccurrence(joint, [(S, TOPIC, weight) for S, _, weight in pairs])

        # The spectrum, and whether it is below that of the first
        s = singular_values(A)
        mark = "" if reference is None else verdict(s, reference)
        reference = s if reference is None else reference
        r = describe(s)
        line(name, *errors[name], r["chi2"], r["tail"], *probe_bound(A, labels, 3), mark)


def part3(args):
    """The probe where the ordering is clean, and where it is not. The learning curve."""
    print("rho = 0.5, the default language: smaller singular values, better probe. "
          "Bayes error 0.0667")
    compare_probes(rho=0.5)
    print("\nrho = 0.8: every singular value smaller, yet a WORSE probe: the bound does not order the "
          "errors. Bayes error 0.0667")
    compare_probes(rho=0.8)

    print("\nProbe error at rank 3, features learned from N texts (rho = 0.5, mean of 5 samples)")
    curve, sizes = learning_curve(args.seed)
    line("N", *sizes)
    for name, errors in curve.items():
        line(name, *errors)
    return {"errors": curve, "sizes": sizes}

# -----------------------------------------------------------------------------
# 4. Contexts that never repeat

TARGETS_PER_CONTEXT = {"ar": 1, "dar(2)": 2, "dar(4)": 4, "dar(8)": 8, "mlm, 8 masks": 8}


def unique_contexts(N, seed=0, C=4, S=15, n=16, k=8, eps=0.2):
    """N texts with rho = 0, in which every context of k tokens occurs once: a row of its own.

    Returns topics (N, C) one-hot, {objective: A (N, V)}.
    """
    # The texts
    rng = np.random.default_rng((seed, N))
    V = C * S
    topic = rng.integers(C, size=N)
    synonym = topic[:, None] * S + rng.integers(S, size=(N, n))
    noise = rng.integers(V, size=(N, n))
    clean = rng.random((N, n)) < 1 - eps
    x = np.where(clean, synonym, noise)                                         # (N, n)

    # The targets of each objective, (N, how many)
    shuffled = rng.permuted(x, axis=1)
    targets = {}
    for name, t in TARGETS_PER_CONTEXT.items():
        text = shuffled if name.startswith("mlm") else x
        targets[name] = text[:, k:k + t]
    one_hot = np.eye(V)
    matrices = {name: one_hot[y].mean(1) / N for name, y in targets.items()}
    return np.eye(C)[topic], matrices


def limit_spectrum(t, C=4, V=60, eps=0.2):
    """The spectrum as N -> infinity with t targets per context, (V,).

    s^2 = 1/t + (1 - 1/t) lambda, where lambda are the eigenvalues of the topic model.
    """
    eigenvalues = np.zeros(V)
    eigenvalues[:C] = (1 - eps) ** 2
    eigenvalues[0] = 1
    return np.sqrt(1 / t + (1 - 1 / t) * eigenvalues)


def part4(args):
    """Measurement beside closed form."""
    print("ar: V stars, not connected. t targets per context connect them, tail -> (V-C)/t. "
          "Mean of 3 runs")
    line("objective", "N", "parts", "s_2", "limit", "tail", "limit", "err k=4", "k=60")
    for N in (50, 200, 1000, 4000):
        half = slice(N // 2), slice(N // 2, N)                                  # to fit, to test
        rows = {}
        for seed in range(args.seed, args.seed + 3):
            topic, matrices = unique_contexts(N, seed)
            for name, A in matrices.items():
                r = describe(singular_values(A), C=4)
                errors = [probe_error(features(A, A, k), topic, *half) for k in (4, 60)]
                numbers = [r["parts"], r["s_2"], r["tail"], *errors]
                rows.setdefault(name, []).append(numbers)

        for name, values in rows.items():
            t = TARGETS_PER_CONTEXT[name]
            parts, s_2, tail, error_4, error_60 = np.mean(values, axis=0)
            ideal = describe(limit_spectrum(t), C=4)
            shown = "-" if t == 1 else error_4          # ar: any 4 of 60 equal directions
            line(name, N, f"{parts:.1f}", s_2, ideal["s_2"], tail, ideal["tail"], shown, error_60)
    return {}

# -----------------------------------------------------------------------------
# 5. Generation: what dar costs

def next_token_excess(P, m, t):
    """Excess log-loss, nats, if the exact dar(t) is used to predict the next token after m tokens."""
    truth = cooccurrence(P, ar(P.ndim, [m]))
    used = cooccurrence(P, dar(P.ndim, [m], t))                     # its rows have the same sums
    return (truth * np.log(truth / used)).sum()


def part5(args):
    """What dar's predictions lose as predictions of the next token."""
    print("dar's exact distribution, used for the next token after m tokens: excess log-loss (nats)")
    line("m", *range(1, 6))
    P = text_distribution()
    for t in (1, 2, 3, 5):
        line(f"dar({t})", *[next_token_excess(P, m, t) for m in range(1, 6)])
    return {}

# -----------------------------------------------------------------------------
# The figure, and the command line

def panel(axis, title, xlabel, ylabel, curves, x=None, **settings):
    """One panel. curves: {name: y}, over x or over 1, 2, ..."""
    for name, y in curves.items():
        points = range(1, len(y) + 1) if x is None else x
        style = "o-" if len(y) < 20 else "-"
        axis.plot(points, y, style, label=name)
    axis.set(title=title, xlabel=xlabel, ylabel=ylabel, **settings)
    axis.legend(fontsize=8)


def figure(path, spectra, masking, errors, sizes):
    """Three panels from the results of parts 1 (two of them) and 3."""
    from matplotlib.figure import Figure
    fig = Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = fig.subplots(1, 3)

    short = {name: spectra[name] for name in short_contexts()}
    panel(left, "1. Two visible tokens", "i", "singular value $s_i$", short)

    ratio, *chi2 = masking.T
    curves = dict(zip(["ar, equal length", "mlm", "mlm, position in query"], chi2))
    panel(middle, "1. Too few masks, and the claim fails", "mask ratio", r"$\sum_{i>1} s_i^2$",
          curves, ratio)

    panel(right, "3. Probe of three features", "training texts", "error", errors, sizes,
          xscale="log", ylim=0)
    save_figure(fig, path)


PARTS = {"Objectives as matrices": part1,
         "Self-supervised loss = matrix factorisation": part2,
         "Classification": part3,
         "Contexts that never repeat": part4,
         "Generation": part5}


def build_parser():
    parser = Parser("The paper's theory on a toy language.")
    parser.add_argument("--part", type=int, choices=range(1, 6), help="run only this part")
    parser.add_argument("--plot", metavar="FILE",
                        help="also draw a figure of three panels (needs matplotlib)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything that is sampled")
    return parser


def check(args):
    """Raises ValueError before any work is done."""
    if args.seed < 0:
        raise ValueError(f"--seed must be at least 0, not {args.seed}")
    if args.plot and args.part:
        raise ValueError("--plot needs all parts: leave out --part")
    check_plot(args.plot)


def main(argv=None):
    args = build_parser().parse_args(argv)
    with one_line_errors():
        check(args)
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
