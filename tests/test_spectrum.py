"""
spectrum.py against the toy language, whose spectra are exact: from exact predictions, from contexts that it
samples, and from Transformers trained on the language with every objective.
"""
import json
import math
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import cooccurrence as co
import data
import spectrum
from model import Config, Transformer
from objectives import Options, mask_count

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def conditionals(A):
    """The exact predictions P(y|c) of a matrix of pairs, and the probabilities of its contexts."""
    weights = A.sum(1)
    return A / weights[:, None], weights


def random_joint(seed, rows, columns):
    A = np.random.default_rng(seed).gamma(0.3, size=(rows, columns)) + 1e-3
    return A / A.sum()


# ---------------------------------------- from predictions to singular values

@pytest.mark.parametrize("name", co.short_contexts())
def test_exact_predictions_give_the_exact_spectrum(name):
    """The reference is an SVD of N, which shares no step with spectrum.py."""
    A = co.cooccurrence(co.text_distribution(), co.short_contexts()[name])
    A = A[A.sum(1) > 0]
    exact = np.linalg.svd(co.normalize(A), compute_uv=False)
    P, weights = conditionals(A)
    assert spectrum.singular_values(P, weights) == pytest.approx(exact, abs=1e-10)
    assert spectrum.chi2(P, weights) == pytest.approx((exact[1:] ** 2).sum(), abs=1e-10)


def test_equal_contexts_are_the_definition():
    """N[c, y] = P(y|c) / sqrt(n p(y)), written out."""
    P, _ = conditionals(random_joint(0, 50, 7))
    p = P.mean(0)
    N = np.array([[P[c, y] / math.sqrt(50 * p[y]) for y in range(7)] for c in range(50)])
    exact = np.linalg.svd(N, compute_uv=False)
    s = spectrum.singular_values(P, np.full(50, 1 / 50))
    assert s == pytest.approx(exact, abs=1e-10) and s[0] == pytest.approx(1)


def test_fewer_contexts_than_tokens():
    """The other Gram matrix: the same values, and zeros up to the vocabulary."""
    A = random_joint(1, 5, 12)
    s = spectrum.singular_values(*conditionals(A))
    assert s.shape == (12,)
    assert s == pytest.approx(co.singular_values(A), abs=1e-7)


def test_a_token_that_is_never_predicted():
    A = random_joint(2, 20, 6)
    A[:, 3] = 0
    A /= A.sum()
    s = spectrum.singular_values(*conditionals(A))
    assert s == pytest.approx(co.singular_values(A), abs=1e-7) and s[-1] < 1e-7


def test_a_model_that_knows_nothing_has_no_spectrum():
    """The first caveat: small singular values for the wrong reason."""
    P = np.tile(np.random.default_rng(0).dirichlet(np.ones(8)), (100, 1))
    s = spectrum.singular_values(P, np.full(100, 0.01))
    assert s[0] == pytest.approx(1) and s[1:].max() < 1e-6
    assert spectrum.chi2(P, np.full(100, 0.01)) == pytest.approx(0, abs=1e-12)


# ---------------------------------------- how many contexts

def test_chi2_of_parts_is_the_mean_over_equal_parts():
    A = random_joint(3, 40, 6)
    P, weights = conditionals(A)
    halves = [(spectrum.singular_values(P[rows], weights[rows] / weights[rows].sum())[1:] ** 2).sum()
              for rows in (slice(20), slice(20, 40))]
    assert spectrum.chi2(P, weights, parts=2) == pytest.approx(np.mean(halves))
    assert spectrum.chi2(P, weights, parts=40) == pytest.approx(0)          # one context: nothing


def test_chi2_of_few_contexts_is_too_small_by_a_constant_over_n():
    """The constant is sum over y of (m1 m3 - m2^2) / m1^3 with the moments m of P(y|.): second-order
    expansion of the ratio m2/m1 of two sample means. And the extrapolation removes most of it.
    """
    A = co.cooccurrence(co.text_distribution(), co.ar(6, [2]))
    conditional, weights = conditionals(A)
    m1, m2, m3 = [weights @ conditional ** power for power in (1, 2, 3)]
    constant = ((m1 * m3 - m2 ** 2) / m1 ** 3).sum()
    exact = (co.singular_values(A) ** 2).sum() - 1

    rng, n, repeats = np.random.default_rng(0), 256, 1000
    whole, half = [], []
    for _ in range(repeats):
        P = conditional[rng.choice(len(A), size=n, p=weights)]
        whole.append(spectrum.chi2(P, np.full(n, 1 / n)))
        half.append(spectrum.chi2(P, np.full(n, 1 / n), parts=2))
    bias, error = np.mean(whole) - exact, np.std(whole) / math.sqrt(repeats)
    assert bias < -5 * error                                                # it is seen
    assert bias == pytest.approx(-constant / n, abs=4 * error)
    extrapolated = 2 * np.mean(whole) - np.mean(half)
    assert abs(extrapolated - exact) < 0.25 * abs(bias) + 4 * error


def test_chi2_of_a_subset_is_on_average_smaller():
    """At every n, not only for large ones: leaving out each context in turn."""
    for seed in range(100):
        P, _ = conditionals(random_joint(seed, 9, 5))
        whole = spectrum.chi2(P, np.full(9, 1 / 9))
        others = [spectrum.chi2(np.delete(P, c, axis=0), np.full(8, 1 / 8)) for c in range(9)]
        assert np.mean(others) <= whole + 1e-12


# ---------------------------------------- contexts are those of the objective

def options(objective, T, **settings):
    return Options(objective=objective, vocab_size=3, block_size=T, **settings)


TOKENS = [(S, j, weight * 4 * (4 - len(S)) / 10) for S, j, weight in co.vlm(4, [0, 1, 2, 3])]
SAMPLED = {
    "ar": (options("ar", 3), 4, co.ar(4, [1, 2, 3])),
    "dar": (options("dar", 3, lookahead=2), 5, co.dar(5, [1, 2, 3], 2)),
    "mlm": (options("mlm", 4, mask_ratio=0.5), 4, co.mlm(4, 2)),
    "vlm bound": (options("vlm", 4, mask_range=(0.25, 1.0), normalization="bound"), 4,
                  co.vlm(4, [0, 1, 2, 3])),
    "vlm tokens": (options("vlm", 4, mask_range=(0.25, 1.0)), 4, TOKENS)}


def sampled_matrix(settings, P, pairs, n, causal):
    """The matrix of n sampled contexts and their targets, and the variance of each of its cells."""
    rows = {}
    for S in dict.fromkeys(S for S, _, _ in pairs):
        for values in product(range(3), repeat=len(S)):
            context = np.full(P.ndim, 3)
            context[list(S)] = values
            rows[tuple(context)] = len(rows)

    contexts = spectrum.sample_contexts(None, settings, range(n), seed=0)
    T = contexts.inputs.shape[1]
    inputs = np.full((n, P.ndim), 3)
    inputs[:, :T] = contexts.inputs
    if causal:
        inputs[np.arange(P.ndim) > contexts.position[:, None]] = 3
    else:
        assert (inputs[np.arange(n), contexts.position] == 3).all()         # it is a masked position
    row = [rows[tuple(context)] for context in inputs]
    weights = contexts.weights / contexts.weights.sum()
    A, variance = np.zeros((len(rows), 3)), np.zeros((len(rows), 3))
    np.add.at(A, (row, contexts.targets[:, 0]), weights)
    np.add.at(variance, (row, contexts.targets[:, 0]), weights ** 2)
    return A, variance


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_contexts_are_distributed_as_the_matrix_says(name, monkeypatch):
    settings, length, pairs = SAMPLED[name]
    P = np.random.default_rng(1).dirichlet(np.full(3 ** length, 0.1)).reshape((3,) * length)

    def windows(shards, span, u):
        index = np.searchsorted(P.ravel().cumsum(), u * P.sum())
        return np.stack(np.unravel_index(index, P.shape), axis=1)[:, :span]

    monkeypatch.setattr(spectrum.data, "windows", windows)
    A, variance = sampled_matrix(settings, P, pairs, 20000, causal=name in ("ar", "dar"))
    exact = co.cooccurrence(P, pairs)
    often = exact > 20 / 20000
    z = (A - exact)[often] / np.sqrt(variance[often])
    assert often.sum() > 20
    assert abs(z).max() < 5 and (z ** 2).mean() < 1.6


def test_contexts_do_not_depend_on_how_they_are_batched():
    shards = [np.random.default_rng(0).integers(50, size=2000)]
    settings = Options(objective="vlm", vocab_size=50, block_size=16)
    whole = spectrum.sample_contexts(shards, settings, range(20), seed=3)
    parts = [spectrum.sample_contexts(shards, settings, indices, seed=3)
             for indices in (range(7), range(7, 20))]
    for name in whole._fields:
        joined = np.concatenate([getattr(part, name) for part in parts])
        assert (joined == getattr(whole, name)).all()


# ---------------------------------------- predictions of a model

@pytest.mark.parametrize("causal", [True, False])
def test_predictions_are_what_the_loss_is_made_of(causal):
    torch.manual_seed(0)
    model = Transformer(Config(vocab_size=30, block_size=8, n_layer=1, n_head=2, n_embd=16, causal=causal))
    torch.nn.init.normal_(model.blocks[0].attn.c_proj.weight)
    rng = np.random.default_rng(0)
    inputs, position = rng.integers(31, size=(5, 8)), rng.integers(8, size=5)
    targets = rng.integers(30, size=5)
    P = spectrum.predict(model, inputs, position)
    assert P.shape == (5, 30) and P.dtype == np.float64
    assert P.sum(1) == pytest.approx(1, abs=1e-12)
    positions = torch.arange(5) * 8 + torch.from_numpy(position)
    loss = model(torch.from_numpy(inputs), positions, torch.from_numpy(targets)[:, None], torch.ones(5))
    assert -np.log(P[np.arange(5), targets]).sum() == pytest.approx(loss.item(), rel=1e-5)


LANGUAGE = dict(S=2, n=4)                   # 6 words, texts of 4 tokens, two of them visible
TRAINED = {                                 # pairs, causal, where a Transformer has the target's position
    "ar": (co.ar(4, [2]), True, "row"),
    "dar": (co.dar(4, [2], 2), True, "none"),           # it is not told which of the next tokens
    "mlm": (co.mlm(4, 2), False, "row"),
    "vlm": (co.vlm(4, [1, 2]), False, "row")}


def queries(pairs, causal, tgt, V, n):
    """What a Transformer is shown for each row of cooccurrence(): inputs (R, T), positions (R,)."""
    inputs, positions = [], []
    for S, j in dict.fromkeys((S, j if tgt == "row" else None) for S, j, _ in pairs):
        for values in product(range(V), repeat=len(S)):
            text = np.full(n, V)                        # V is the mask token
            text[list(S)] = values
            inputs.append(text[:len(S)] if causal else text)
            positions.append(len(S) - 1 if causal else j)
    return np.array(inputs), np.array(positions)


def train(A, inputs, positions, V, n, causal, steps=600):
    """A small Transformer with the cross-entropy of all pairs, weighted by their probabilities."""
    torch.manual_seed(0)
    model = Transformer(Config(vocab_size=V, block_size=n, n_layer=2, n_head=2, n_embd=32, causal=causal))
    optimizers = [torch.optim.Adam(model.wte.parameters(), lr=0.01),
                  torch.optim.Muon(model.blocks.parameters(), lr=0.02, weight_decay=0)]
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, steps) for o in optimizers]
    texts, index = np.unique(inputs, axis=0, return_inverse=True)
    flat = torch.from_numpy(index.ravel() * texts.shape[1] + positions)
    texts, A = torch.from_numpy(texts), torch.from_numpy(A).float()
    for _ in range(steps):
        hidden = model.features(texts).flatten(0, 1)[flat]                  # (R, C)
        log_p = model.logits(hidden)[:, :V].log_softmax(-1)
        model.zero_grad()
        (-A * log_p).sum().backward()
        for step in optimizers + schedules:
            step.step()
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_transformer_gives_the_exact_spectrum_back(name):
    """Every singular value to 0.001. They lie between 0.1 and 1, and those of the objectives, or of a
    position that is known or not, are apart by more than 0.05.
    """
    pairs, causal, tgt = TRAINED[name]
    P = co.text_distribution(**LANGUAGE)
    V, n = P.shape[0], P.ndim
    A = co.cooccurrence(P, pairs, tgt=tgt)
    inputs, positions = queries(pairs, causal, tgt, V, n)
    model = train(A, inputs, positions, V, n, causal)
    s = spectrum.singular_values(spectrum.predict(model, inputs, positions), A.sum(1))
    exact = co.singular_values(A)
    assert s == pytest.approx(exact, abs=1e-3)
    for other, (pairs, _, tgt) in TRAINED.items():
        for wrong in {"none", "row"} - ({tgt} if other == name else set()):
            reference = co.singular_values(co.cooccurrence(P, pairs, tgt=wrong))
            same = np.allclose(reference, exact)                            # ar: the position says nothing
            assert same or abs(s - reference).max() > 0.05


# ---------------------------------------- features

def test_effective_rank_counts_directions():
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.standard_normal((10, 10)))[0][:4]         # orthonormal
    X = np.concatenate([directions, -directions]) + 7
    rank, s = spectrum.effective_rank(X)
    assert rank == pytest.approx(4) and s[:4] == pytest.approx(np.full(4, 0.5))
    assert spectrum.effective_rank(np.outer(rng.standard_normal(50), rng.standard_normal(6)))[0] == \
        pytest.approx(1)
    X = rng.standard_normal((100, 2)) @ np.diag([3, 1])
    share = np.linalg.eigvalsh(np.cov(X.T))
    share /= share.sum()
    assert spectrum.effective_rank(X)[0] == pytest.approx(math.exp(-(share * np.log(share)).sum()))


# ---------------------------------------- command line

@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A dataset of bytes, and two checkpoints on it: an untrained model and a random one."""
    folder = tmp_path_factory.mktemp("spectrum")
    for i in range(20):
        (folder / f"{i}.txt").write_text(f"document {i}: " + "all work and no play. " * 40)
    data.prepare("toy", files=[folder / f"{i}.txt" for i in range(20)], tokenizer="bytes",
                 val_fraction=0.3, data_dir=str(folder / "data"))
    meta, _ = data.load("toy", str(folder / "data"))
    train = {"objective": "vlm", "dataset": "toy", "data_dir": str(folder / "data"), "block_size": 16,
             "mask_range": [0.15, 1.0]}
    digests = {name: common.file_sha256(folder / "data" / "toy" / f"{name}.json")
               for name in ("meta", "tokenizer")}
    torch.manual_seed(0)
    for name in ("untrained", "random"):
        config = Config(vocab_size=meta["vocab_size"], block_size=16, n_layer=1, n_head=2, n_embd=32)
        model = Transformer(config)
        if name == "random":
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.2)
        (folder / name).mkdir()
        common.save_config(folder / name, config, train=train, dataset=digests)
        common.save_checkpoint(folder / name, model, [], step=7)
    return folder


def run(folder, *arguments):
    return subprocess.run([sys.executable, str(ROOT / "spectrum.py"), *map(str, arguments)],
                          cwd=folder, capture_output=True, text=True)


def test_two_checkpoints_in_one_table(run_folder):
    out = run(run_folder, "--checkpoint", "untrained", "random", "--contexts", 64, "--features",
              "--results", "results")
    assert out.returncode == 0, out.stderr
    for name in ("untrained", "random"):
        result = json.loads((run_folder / "results" / name / "spectrum.json").read_text())
        model, config = common.load_checkpoint(run_folder / name)
        assert result["weights"] == config["weights"] and result["step"] == 7
        assert result["contexts"] == 64 and result["command"].startswith("python spectrum.py --checkpoint")
        s = np.array(result["singular_values"])
        assert s[0] == pytest.approx(1) and (np.diff(s) <= 0).all()
        assert (s[1:] ** 2).sum() == pytest.approx(result["chi2"], rel=1e-4, abs=1e-5)
        assert result["chi2_limit"] == pytest.approx(2 * result["chi2"] - result["chi2_half"])
        assert result["chi2"] < 1e-6 if name == "untrained" else result["chi2"] > 0.1
        assert result["hitting"] >= model.config.vocab_size - 1 - 1e-6
        assert 1 <= result["effective_rank"] <= 32
        assert f"{result['loss']:.3f}" in out.stdout and "loss on these contexts (nats)" in out.stdout
        text = spectrum.sample_contexts(*spectrum.held_out_text(run_folder / name, config), range(64), seed=0).text
        assert (text < model.config.vocab_size).all()                       # nothing is masked
        pooled = model.features(torch.from_numpy(text)).mean(1).detach().double().numpy()
        variances = np.linalg.eigvalsh(np.cov(pooled.T, bias=True))[::-1]
        assert np.array(result["feature_singular_values"]) ** 2 == pytest.approx(variances, abs=1e-6)
        assert name == "untrained" or result["chi2_quarter"] < result["chi2_half"] < result["chi2"]
    columns = [line.split() for line in out.stdout.splitlines()]
    assert columns[0] == ["untrained", "random"] and ["s_1", "1.000", "1.000"] in columns
    assert {line[0] for line in columns[1:]} >= {"updates", "s_2", "s_64", "chi2,", "mean", "features:"}
    assert sum(line[:1] == ["features:"] for line in columns) == 7              # s_1, .. s_32, effective rank


def test_the_figure_compares_with_what_a_transformer_knows(monkeypatch, tmp_path):
    """THEORY.md's chi2 with the position known, but for dar, which is not told it."""
    pytest.importorskip("matplotlib")
    drawn = {}

    def panel(axis, title, xlabel, ylabel, curves, **settings):
        drawn[title] = curves

    monkeypatch.setattr(co, "panel", panel)
    result = {"singular_values": [1.0, 0.5]}
    spectrum.figure(tmp_path / "a.png", {"a": result, "b": {**result, "feature_singular_values": [3.0, 0.1]}})

    theory, models, features = drawn.values()
    chi2 = {name: (np.array(s)[1:] ** 2).sum().round(3) for name, s in theory.items()}
    assert chi2["ar"] == 2.343 and chi2["mlm(2)"] == 1.857 and chi2["dar(2)"] == 0.866
    assert models == {"a": [1.0, 0.5], "b": [1.0, 0.5]} and features == {"b": [3.0, 0.1]}


@pytest.mark.parametrize("objective", ["vlm", "dar"])
def test_the_loss_is_the_objectives(objective, run_folder):
    """On the sampled contexts, with the objective's weights: the mean over the model's own loss."""
    model, config = common.load_checkpoint(run_folder / "random")
    shards, _ = spectrum.held_out_text(run_folder / "random", config)
    settings = Options(objective=objective, vocab_size=model.config.vocab_size, block_size=16, lookahead=3,
                       dar_estimator="expectation")
    contexts = spectrum.sample_contexts(shards, settings, range(24), seed=1)
    assert contexts.targets.shape == (24, 3 if objective == "dar" else 1)
    positions = torch.arange(24) * 16 + torch.from_numpy(contexts.position)
    weights = torch.from_numpy(contexts.weights).float()
    total = model(torch.from_numpy(contexts.inputs), positions, torch.from_numpy(contexts.targets), weights)
    result = spectrum.measure(model, shards, settings, 24, seed=1, batch_size=10)
    assert result["loss"] == pytest.approx(total.item() / weights.sum().item(), rel=1e-5)


def test_measured_again_it_is_the_same(run_folder):
    model, config = common.load_checkpoint(run_folder / "random")
    shards, settings = spectrum.held_out_text(run_folder / "random", config)
    result = spectrum.measure(model, shards, settings, 40, seed=1, batch_size=16)
    assert result == spectrum.measure(model, shards, settings, 40, seed=1, batch_size=16)
    assert result["loss"] != spectrum.measure(model, shards, settings, 40, seed=2)["loss"]
    assert settings.mask_range == (0.15, 1.0) and settings.vocab_size == model.config.vocab_size

    contexts = spectrum.sample_contexts(shards, settings, range(16), seed=1)
    masks = (contexts.inputs == settings.mask_token).sum(1)
    assert (contexts.weights == masks).all() and masks.min() >= mask_count(0.15, 16)


@pytest.mark.parametrize("arguments, reason", [
    (["--contexts", "3"], "at least 4"), (["--seed", "-1"], "at least 0"),
    (["--checkpoint", "nowhere", "nowhere"], "nowhere twice"),
    (["--checkpoint", "nowhere"], "no checkpoint"), (["--data_dir", "nowhere"], "does not exist")])
def test_bad_input_is_one_line_and_exit_2(arguments, reason, run_folder, capsys):
    with pytest.raises(SystemExit) as stop:
        spectrum.main(["--checkpoint", str(run_folder / "random"), *arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert error.startswith("error: ") and reason in error


def test_all_checkpoints_are_checked_before_the_first_is_measured(run_folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        spectrum.main(["--checkpoint", str(run_folder / "random"), "nowhere", "--results", str(tmp_path)])
    assert stop.value.code == 2 and "nowhere" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_where_nothing_can_be_written_the_table_is_printed_and_the_exit_code_is_2(run_folder, tmp_path, capsys):
    (tmp_path / "untrained/spectrum.json.tmp").mkdir(parents=True)
    paths = [str(run_folder / name) for name in ("untrained", "random")]
    with pytest.raises(SystemExit) as stop:
        spectrum.main(["--checkpoint", *paths, "--contexts", "8", "--results", str(tmp_path)])
    out, error = capsys.readouterr()
    assert stop.value.code == 2 and "chi2, all contexts" in out and (tmp_path / "random/spectrum.json").exists()
    assert error.startswith("error: not saved: ") and error.count("\n") == 1


def test_another_dataset_of_the_same_name_is_refused(run_folder, tmp_path, capsys):
    (tmp_path / "other.txt").write_text("something else " * 500)
    (tmp_path / "more.txt").write_text("and more " * 500)
    data.prepare("toy", files=[tmp_path / "other.txt", tmp_path / "more.txt"], tokenizer="bytes",
                 val_fraction=0.5, data_dir=str(tmp_path / "data"))
    with pytest.raises(SystemExit) as stop:
        spectrum.main(["--checkpoint", str(run_folder / "random"), "--data_dir", str(tmp_path / "data")])
    assert stop.value.code == 2 and "is not the dataset" in capsys.readouterr().err


@pytest.mark.parametrize("train", [{}, {"dataset": "toy"}, {"dataset": "toy", "objective": "of another version"}])
def test_a_checkpoint_that_does_not_say_how_it_was_trained_is_refused(train):
    with pytest.raises(common.DataError, match="names no dataset, or no objective"):
        spectrum.held_out_text("out/x", {"model": {}, "train": train})
