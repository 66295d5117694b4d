"""
eval_ppl.py against explicit loops, enumeration of all texts and all orders, and its command line. texts.py.
CPU, no network.

    pytest tests/test_eval_ppl.py
"""
import hashlib
import http.server
import itertools
import contextlib
import json
import math
import os
import re
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import eval_ppl
import texts
import tokenizer
from common import dataset_digests, load_checkpoint, save_checkpoint, save_config
from documents import read_text
from model import Config, Transformer
from objectives import OBJECTIVES, Options

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MASKED = {"objective": "mlm", "mask_ratio": 0.4, "mask_range": [0.15, 1.0]}
TEXT = ("The quick brown fox  jumps\nover the lazy dog. Perplexit\u00e9s et \u4e2d\u6587 words, again and "
        "again.\n") * 8
TEXT_NAME = "t-" + hashlib.sha256(TEXT.encode()).hexdigest()[:8]
COUNTS = np.bincount(np.frombuffer(TEXT.encode(), np.uint8), minlength=257)      # of the bytes


def tiny(causal, vocab_size=3, block_size=4):
    """A random model whose output depends on its whole input,
    and whose embedding favours mask and padded ids.
    """
    torch.manual_seed(4)
    model = Transformer(Config(vocab_size, block_size, n_layer=2, n_head=2, n_embd=16, causal=causal)).eval()
    with torch.no_grad():
        model.wte.weight.mul_(25)
        model.wte.weight[vocab_size:] *= 10   # were these ids not excluded, they would have most of the mass
        for block in model.blocks:
            block.attn.c_proj.weight.normal_(std=0.7)
            block.mlp.c_proj.weight.normal_(std=0.7)
    return model


@torch.no_grad()
def measure(model, x, train=MASKED, method="left-to-right", suffix="full", samples=8, batch_size=64,
            prompt_lengths=None, field="nats"):
    """Mean of a score (nats) over the tokens of every window: {"all": (n,), prompt length k: (n,)}."""
    x = torch.as_tensor(x)
    T = x.size(1)
    most = OBJECTIVES[train["objective"]].most_masks(Options(block_size=T, **train))
    if method == "left-to-right" and prompt_lengths is None:
        prompt_lengths = eval_ppl.standard_lengths(T)
    settings = eval_ppl.Settings(batch_size, samples, tuple(prompt_lengths or ()),
                                 eval_ppl.masks_after_prompt(suffix, T, most))
    measured = eval_ppl.evaluate(model, x, method, settings)
    means = {}
    for name, (scores, weights) in measured.items():
        assert all(array.shape == x.shape for array in (*scores, weights))
        key = name if name in ("all", "sample") else int(name)
        means[key] = (getattr(scores, field) * weights).sum(axis=1) / weights.sum(axis=1)
    return means


@torch.no_grad()
def probability(model, inputs, position, token):
    """P(token at position | inputs), from a softmax over the real vocabulary in float64,
    one sequence at a time.
    """
    logits = model.features(torch.tensor([inputs]))[0, position] @ model.wte.weight.T
    return logits[:model.config.vocab_size].double().softmax(0)[token].item()


def all_texts(model):
    c = model.config
    return torch.tensor(list(itertools.product(range(c.vocab_size), repeat=c.block_size)))


def random_text(n, model):
    c = model.config
    return torch.randint(c.vocab_size, (n, c.block_size), generator=torch.Generator().manual_seed(1))

# -----------------------------------------------------------------------------
# Left to right

def test_causal_is_the_loop_over_prefixes():
    model = tiny(causal=True, vocab_size=7, block_size=9)
    x = random_text(5, model)
    result = measure(model, x, prompt_lengths=list(range(1, 9)))
    want = np.array([[-math.log(probability(model, row[:k], k - 1, row[k])) for k in range(1, 9)]
                     for row in x.tolist()])
    for k in range(1, 9):
        np.testing.assert_allclose(result[k], want[:, k - 1], rtol=1e-4)
    np.testing.assert_allclose(result["all"], want.mean(axis=1), rtol=1e-4)


@pytest.mark.parametrize("suffix, masks_after", [("full", lambda k: 9 - k), ("one", lambda k: 1),
                                                 ("matched", lambda k: min(9 - k, 4))])  # round(0.4 * 9) = 4
def test_masked_left_to_right_is_the_loop_over_prompts(suffix, masks_after):
    model = tiny(causal=False, vocab_size=7, block_size=9)
    x = random_text(5, model)
    result = measure(model, x, suffix=suffix, samples=100, prompt_lengths=[1, 4, 7, 8])
    want = np.array([[-math.log(probability(model, row[:k] + [7] * masks_after(k), k, row[k]))
                      for k in range(1, 9)] for row in x.tolist()])
    for k in (1, 4, 7, 8):
        np.testing.assert_allclose(result[k], want[:, k - 1], rtol=1e-4)
    np.testing.assert_allclose(result["all"], want.mean(axis=1), rtol=1e-4)  # samples >= T - 1: all lengths


def test_matched_takes_the_masks_of_the_objective():
    """vlm was trained with up to mask_range[1] * T masks:
    with the default range `matched` is `full`, with less not.
    """
    model = tiny(causal=False, vocab_size=7, block_size=9)
    x = random_text(5, model)
    vlm = {**MASKED, "objective": "vlm"}
    full = measure(model, x, prompt_lengths=[2])[2]
    assert (measure(model, x, vlm, suffix="matched", prompt_lengths=[2])[2] == full).all()
    narrow = measure(model, x, {**vlm, "mask_range": [0.1, 0.4]}, suffix="matched", prompt_lengths=[2])[2]
    np.testing.assert_array_equal(narrow, measure(model, x, suffix="matched", prompt_lengths=[2])[2])
    assert abs(narrow - full).min() > 1e-3


@pytest.mark.parametrize("causal, suffix", [
    (True, "full"), (False, "full"), (False, "one"), (False, "matched")])
def test_left_to_right_probabilities_of_all_texts_sum_to_one(causal, suffix):
    """Given the first token; so padded ids and the mask token, which this model favours,
    have no probability.
    """
    model = tiny(causal)
    x = all_texts(model)
    result = measure(model, x, suffix=suffix, samples=100)
    total = np.exp(-3 * result["all"]).reshape(3, -1).sum(axis=1)               # T - 1 = 3 scored tokens
    np.testing.assert_allclose(total, 1, atol=1e-5)


def test_default_prompt_lengths():
    result = measure(tiny(causal=True, block_size=21), torch.zeros(1, 21, dtype=torch.long))
    assert list(result) == ["all", "sample", 1, 2, 4, 8, 16, 20]


@torch.no_grad()
def test_causal_models_are_also_scored_on_the_sample_of_masked_ones():
    """The very same tokens, with the same weights. For a causal model these are some of all."""
    x = torch.randint(30, (40, 21))
    settings = eval_ppl.Settings(samples=4, masks=eval_ppl.masks_after_prompt("full", 21, None))
    causal = eval_ppl.evaluate(tiny(causal=True, block_size=21), x, "left-to-right", settings)
    masked = eval_ppl.evaluate(tiny(causal=False, block_size=21), x, "left-to-right", settings)
    scores, weights = causal["sample"]
    assert "sample" not in masked and (weights == masked["all"][1]).all()
    assert ((weights > 0).sum(axis=1) == 4).all() and weights.sum() == pytest.approx(40 * 20)
    assert (scores.nats == causal["all"][0].nats).all() and (causal["all"][1][:, 1:] == 1).all()


def test_sampled_prompt_lengths_estimate_the_mean_over_all():
    model = tiny(causal=False, vocab_size=7, block_size=24)
    x = random_text(300, model)
    exact, estimate = (measure(model, x, samples=s, prompt_lengths=[1])["all"] for s in (23, 4))
    assert (exact != estimate).mean() > 0.9
    error = (estimate - exact).mean() / ((estimate - exact).std() / 300 ** 0.5)
    assert abs(error) < 4


def test_grid_is_even_and_complete():
    for n, samples, levels in [(500, 3, 127), (200, 8, 10), (50, 5, 5), (4, 99, 7)]:
        grid = eval_ppl.grid(n, samples, levels)
        S = min(samples, levels)
        assert grid.shape == (n, S) and grid.min() >= 0 and grid.max() < levels
        assert (np.floor(grid * S / levels + S / levels - 1e-9) >= np.arange(S)).all()
        assert (np.floor(grid * S / levels) <= np.arange(S)).all()      # one number in each of S equal parts
        counts = np.bincount(grid.ravel(), minlength=levels)
        assert abs(counts - n * S / levels).max() <= 4                  # the golden ratio spreads them
        if S == levels:
            assert (grid == np.arange(S)).all()


@pytest.mark.design
def test_no_pass_is_done_twice_and_none_is_longer_than_needed():
    model = tiny(causal=False, vocab_size=7, block_size=9)
    seen, features = [], model.features
    def counted(inputs, valid=None):
        seen.append(inputs.numel() if valid is None else int(valid.sum()))
        return features(inputs, valid)
    model.features = counted
    x = random_text(5, model)
    measure(model, x, suffix="one", samples=8, prompt_lengths=[1, 4, 8])
    assert sum(seen) == 5 * sum(k + 1 for k in range(1, 9))

# -----------------------------------------------------------------------------
# Bound, pseudo, confidence

def order_probabilities(model, x):
    """For every order, -log of the probability that it writes x; (T!,)."""
    mask, T = model.config.mask_token, len(x)
    P = {visible: [probability(model, [x[i] if i in visible else mask for i in range(T)], j, x[j])
                   for j in range(T)]
         for r in range(T) for visible in itertools.combinations(range(T), r)}
    return np.array([-sum(math.log(P[tuple(sorted(order[:i]))][order[i]]) for i in range(T))
                     for order in itertools.permutations(range(T))])


def test_bound_is_above_the_likelihood_and_hits_its_enumerated_value():
    """-log of the mixture over all 24 orders <= bound = mean over the orders;
    the estimate agrees within 4 s.e.
    """
    model = tiny(causal=False)
    for x in ([0, 1, 2, 0], [2, 2, 1, 0]):
        losses = order_probabilities(model, x)
        true, enumerated = -np.log(np.exp(-losses).mean()), losses.mean()
        estimates = 4 * measure(model, [x] * 1500, method="bound", samples=2)["all"]
        se = estimates.std() / 1500 ** 0.5
        assert abs(estimates.mean() - enumerated) < 4 * se
        assert enumerated - true > 8 * se and estimates.mean() > true


def test_confidence_is_the_loop_and_a_likelihood():
    model = tiny(causal=False)
    x = all_texts(model)
    result = measure(model, x, method="confidence")["all"]
    np.testing.assert_allclose(np.exp(-4 * result).sum(), 1, atol=1e-5)
    for row, got in list(zip(x.tolist(), result))[::7]:
        inputs, total = [3] * 4, 0
        while 3 in inputs:
            hidden = [i for i in range(4) if inputs[i] == 3]
            sure = [max(math.log(probability(model, inputs, i, v)) for v in range(3)) for i in hidden]
            j = next(i for i, s in zip(hidden, sure) if s >= max(sure) - 1e-4)
            total -= math.log(probability(model, inputs, j, row[j]))
            inputs[j] = row[j]
        assert got == pytest.approx(total / 4, rel=1e-4)


def test_pseudo_is_the_loop_over_single_masks_and_no_likelihood():
    model = tiny(causal=False)
    x = all_texts(model)
    result = measure(model, x, method="pseudo")["all"]
    for row, got in list(zip(x.tolist(), result))[::7]:
        want = [-math.log(probability(model, row[:j] + [3] + row[j + 1:], j, row[j])) for j in range(4)]
        assert got == pytest.approx(np.mean(want), rel=1e-4)
    assert abs(np.exp(-4 * result).sum() - 1) > 0.01


@pytest.mark.parametrize("given", [{"method": m} for m in ("left-to-right", "bound", "pseudo", "confidence")]
                         + [{"suffix": "one"}, {"suffix": "matched"}, {"causal": True}])
def test_batches_do_not_matter(given, monkeypatch):
    """Neither the sequences of a pass nor the positions that the head is applied to at once."""
    given = dict(given)
    model = tiny(given.pop("causal", False), vocab_size=9, block_size=11)
    x = random_text(13, model)
    want = measure(model, x, batch_size=64, **given)
    monkeypatch.setattr(eval_ppl, "LOGITS_LIMIT", 3 * 64)
    for batch_size in (1, 5):
        got = measure(model, x, batch_size=batch_size, **given)
        for key in want:
            np.testing.assert_allclose(got[key], want[key], rtol=1e-4, atol=1e-6)

@pytest.mark.parametrize("given", [{"method": "pseudo"}, {"causal": True}, {"suffix": "one", "samples": 100}])
def test_first_guess_is_right_where_the_text_is_the_likeliest(given):
    given = dict(given)
    model = tiny(causal := given.pop("causal", False), vocab_size=7, block_size=6)
    x = random_text(20, model)
    result = measure(model, x, field="right", **given)["all"]
    def right(row, k):
        inputs = (row[:k] + [7] + row[k + 1:] if "method" in given else
                  row[:k] if causal else row[:k] + [7])
        at = k - 1 if causal else k
        guesses = [probability(model, inputs, at, token) for token in range(7)]
        return guesses[row[k]] == max(guesses)
    first = 0 if "method" in given else 1
    want = [np.mean([right(row, k) for k in range(first, 6)]) for row in x.tolist()]
    np.testing.assert_allclose(result, want)
    assert 0 < np.mean(want) < 0.9


@pytest.mark.parametrize("causal, suffix", [(True, "full"), (False, "full"), (False, "one"),
                                            (False, "matched")])
def test_context_is_the_loop_over_the_last_tokens(causal, suffix):
    """The same tokens for every m, each after the m tokens before it only, as if the text began there."""
    model = tiny(causal, vocab_size=7, block_size=12)
    x = random_text(9, model)
    masks = eval_ppl.masks_after_prompt(suffix, 12, most=5)
    settings = eval_ppl.Settings(samples=3, batch_size=4, masks=masks)
    with torch.no_grad():
        measured = eval_ppl.by_context(model, x, [1, 2, 6], settings)
    assert list(measured) == [1, 2, 6, "all"]
    rows, places = measured["all"][1].nonzero()
    assert len(rows) == 9 * 3 and places.min() >= 6 and len(set(places)) > 3
    for m, (scores, weights) in measured.items():
        assert (weights == measured["all"][1]).all() and set(weights.ravel()) == {0, 1}
        for row, k in zip(rows, places):
            seen = k if m == "all" else m
            after = {"full": 12 - seen, "one": 1, "matched": min(12 - seen, 5)}[suffix]
            inputs = x[row, k - seen:k].tolist() + ([] if causal else [7] * after)
            p = probability(model, inputs, seen - 1 if causal else seen, x[row, k])
            assert scores.nats[row, k] == pytest.approx(-math.log(p), rel=1e-4)

# -----------------------------------------------------------------------------
# Text, units

def bytes_encoding(folder):
    tokenizer.save_tokenizer({"name": "bytes"}, str(folder))
    return tokenizer.load_tokenizer(str(folder))


def text_of(streams, starts=None):
    return texts.Text("t", "digest", streams, starts or [[] for _ in streams])


def test_windows_cover_the_text_once_and_thin_out_evenly():
    text = text_of([np.arange(100, 123), np.arange(200, 204), np.arange(300, 310)])
    x = texts.cut_windows(text, 5, 0, 99).ids
    assert x[:, 1:].ravel().tolist() == [*range(100, 120), *range(300, 310)]
    assert x[:, 0].tolist() == [99, 104, 109, 114, 99, 304]
    assert texts.cut_windows(text, 5, 3, 99).ids[:, 1].tolist() == [105, 115, 305]
    assert texts.cut_windows(text_of([np.arange(30, dtype=np.uint16)]), 5, 1, 99).ids.dtype == np.int64
    with pytest.raises(ValueError, match="4 tokens, less than one window of 5"):
        texts.cut_windows(text_of([np.arange(200, 204)]), 5, 0, 99)


def test_every_token_belongs_to_its_document():
    """Also where windows cross from one document into the next,
    and where a document goes on in the next stream.
    """
    text = text_of([np.arange(11), np.arange(10)], starts=[[3, 9], [2, 10]])
    windows = texts.cut_windows(text, 5, 0, 99)
    assert windows.document.tolist() == [[0, 0, 0, 1, 1], [1, 1, 1, 1, 2], [2, 2, 3, 3, 3], [3, 3, 3, 3, 3]]
    number, unit = texts.clusters(texts.cut_windows(text, 5, 2, 99).document)
    assert number.tolist() == [[0, 0, 0, 0, 1], [2, 2, 2, 2, 2]] and unit == "documents"
    number, unit = texts.clusters(np.full((3, 2), 7))                    # one document: its windows
    assert number.tolist() == [[0, 0], [1, 1], [2, 2]] and unit == "windows"


def test_articles_of_wikitext_begin_at_their_titles(tmp_path):
    """At any tokenizer, with text of several bytes per character; sections are no articles."""
    articles = [" = \u00c9tude = \n \n text = more \n = = Section = = \n = 3 ohm and R = \n a \n \n",
                " = Second \u4e2d one = \n \n b \n \n", " = C = \n \n"]
    spec = tokenizer.make_tokenizer("bpe:270", ["".join(articles) * 9])
    for encoding in (tokenizer.build_encoding(spec), bytes_encoding(tmp_path)):
        for before in ("", "No article.\n \n"):
            ids = tokenizer.encode_text(encoding, before + "".join(articles)).astype(np.int64)
            starts = texts.article_starts(before + "".join(articles), ids, encoding)
            pieces = [encoding.decode(part.tolist()) for part in np.split(ids, starts)]
            assert pieces == [before, *articles]
    assert len(texts.article_starts("no = title = \n \n", ids[:1], encoding)) == 0


def test_the_test_split_of_wikitext_has_its_articles(tmp_path):
    """60, as its authors say. 62 lines look like titles, but two belong to formulas."""
    path = Path(ROOT, "..", "shared", "data", "wikitext-2", "wiki.test.raw")
    if not path.exists():
        pytest.skip("needs WikiText-2")
    text = read_text(path)
    encoding = bytes_encoding(tmp_path)
    starts = texts.article_starts(text, np.frombuffer(text.encode(), np.uint8), encoding)
    assert len(starts) == 60


def test_text_in_pieces_has_the_tokens_of_the_whole(tmp_path, monkeypatch):
    encoding = tokenizer.build_encoding(tokenizer.make_tokenizer("bpe:300", [TEXT]))
    whole = encoding.encode_ordinary(TEXT)
    monkeypatch.setattr(tokenizer, "PIECE", 50)
    asked = []
    class Watched:
        def encode_to_numpy(self, text, **options):
            asked.append(len(text))
            return encoding.encode_to_numpy(text, **options)
    assert tokenizer.encode_text(Watched(), TEXT).tolist() == whole
    assert len(asked) > 5 and max(asked) <= 50


def test_one_reader_for_text(tmp_path):
    path = tmp_path / "my text.txt"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):                   # a byte order mark names its encoding
        path.write_bytes(TEXT.encode(encoding))
        assert read_text(path) == TEXT
    for encoding, name in [("utf-16-le", "UTF-16"), ("latin-1", "Latin-1")]:
        plain = TEXT.replace("\u4e2d\u6587", "")
        path.write_bytes(plain.encode(encoding))
        with pytest.raises(ValueError, match=name) as error:
            read_text(path)
        hint = str(error.value)[str(error.value).rindex(": cat ") + 2:]
        subprocess.run(hint, shell=True, check=True, cwd=tmp_path)      # works when typed in
        assert (tmp_path / "utf8.txt").read_text() == plain


def test_bytes_and_words_are_those_of_the_text(tmp_path):
    encoding = bytes_encoding(tmp_path)
    ids = encoding.encode_ordinary(TEXT)
    for T in (2, 7, 64):
        n = len(ids) // T
        x = texts.cut_windows(text_of([np.array(ids)]), T, 0, encoding.eot_token).ids
        text = TEXT.encode()[:n * T]
        n_bytes, n_words = texts.token_sizes(x, encoding)
        assert n_bytes.shape == n_words.shape == (n, T)
        assert (n_bytes.sum(), n_words.sum()) == (n * T, len(text.split()))
    eot = encoding.eot_token
    n_bytes, n_words = texts.token_sizes(np.array([[97, 97, eot, 97, 32, 97]]), encoding)
    assert n_bytes.tolist() == [[1, 0, 1, 1, 1]]                            # a|a<eot>a a
    assert n_words.tolist() == [[0, 0, 1, 0, 1]]

# -----------------------------------------------------------------------------
# Standard errors

def documents_of_all_sizes(n=400):
    """nats, tokens, bytes and words of n documents: sizes differ a lot, and so do bytes per token."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 300, n).astype(float)
    n_bytes = np.round(tokens * rng.uniform(1, 6, n))
    nats = 0.7 * n_bytes + rng.normal(size=n) * tokens ** 0.5 + 0.2 * tokens * rng.normal(size=n)
    return nats, tokens, n_bytes, np.ceil(n_bytes / 5)


def test_standard_errors_are_those_of_a_bootstrap_over_documents():
    nats, tokens, n_bytes, n_words = documents_of_all_sizes()
    result = eval_ppl.summary(eval_ppl.Sums(nats, tokens / 3, tokens), n_bytes, n_words)
    rng = np.random.default_rng(1)
    again = rng.integers(len(nats), size=(4000, len(nats)))                 # documents, with replacement
    total = {name: array[again].sum(axis=1) for name, array in
             [("nats", nats), ("tokens", tokens), ("bytes", n_bytes), ("words", n_words)]}
    want = {"nats_per_token": total["nats"] / total["tokens"],
            "perplexity": np.exp(total["nats"] / total["tokens"]),
            "bits_per_byte": total["nats"] / total["bytes"] / np.log(2),
            "word_perplexity": np.exp(total["nats"] / total["words"])}
    for name, resampled in want.items():
        assert result[name + "_se"] == pytest.approx(resampled.std(), rel=0.1), name
    # bytes per token are no constant: with the mean of them the error would be another
    constant = result["nats_per_token_se"] / math.log(2) * tokens.sum() / n_bytes.sum()
    assert result["bits_per_byte_se"] < 0.7 * constant


def test_ratio_on_a_toy():
    """Three documents by hand. A fourth without any token does not count; one cluster has no error."""
    r, se = eval_ppl.ratio(np.array([2.0, 4.0, 0.0, 6.0]), np.array([1.0, 4.0, 0.0, 3.0]))
    assert r == 1.5                                                         # 12 / 8
    assert se == pytest.approx(np.std([0.5, -2, 1.5], ddof=1) / 3 ** 0.5 / (8 / 3))
    assert math.isnan(eval_ppl.ratio(np.array([2.0]), np.array([1.0]))[1])
    equal = np.array([1.0, 2.0, 4.0])                                       # equal sizes: std / sqrt(n)
    assert eval_ppl.ratio(equal * 10, np.full(3, 10.0))[1] == pytest.approx(equal.std(ddof=1) / 3 ** 0.5)


def test_summary_in_all_units():
    nats, tokens = np.array([4.0, 8.0, 16.0]), np.full(3, 4.0)
    sums = eval_ppl.Sums(nats, np.array([1.0, 0.0, 2.0]), tokens)
    r = eval_ppl.summary(sums, 4 * tokens, np.full(3, 2.0))
    mean, se = 7 / 3, np.std(nats / 4, ddof=1) / 3 ** 0.5
    assert r["nats_per_token"] == pytest.approx(mean) and r["nats_per_token_se"] == pytest.approx(se)
    assert r["perplexity"] == pytest.approx(math.exp(mean))
    assert r["perplexity_se"] == pytest.approx(math.exp(mean) * se)
    assert r["first_guess_right"] == 0.25
    assert r["bits_per_byte"] == pytest.approx(mean / math.log(2) / 4)
    assert r["bits_per_byte_se"] == pytest.approx(se / math.log(2) / 4)
    assert r["word_perplexity"] == pytest.approx(math.exp(2 * mean))
    assert r["word_perplexity_se"] == pytest.approx(math.exp(2 * mean) * 2 * se)
    assert not {"bits_per_byte", "word_perplexity"} & set(eval_ppl.summary(sums))
    one = eval_ppl.summary(eval_ppl.Sums(nats[:1], nats[:1], tokens[:1]))
    assert one["perplexity_se"] is None


def test_text_without_spaces_has_no_word_perplexity():
    sums = eval_ppl.Sums(np.full(3, 500.0), np.zeros(3), np.full(3, 200.0))
    r = eval_ppl.summary(sums, np.full(3, 600.0), np.array([1.0, 0.0, 0.0]))
    assert "word_perplexity" not in r and eval_ppl.cell(r, "word_perplexity") == "-"
    assert r["bits_per_byte"] == pytest.approx(500 / 600 / math.log(2))

# -----------------------------------------------------------------------------
# Command line

def checkpoint(folder, causal=False, objective="mlm", **train):
    """A random model over bytes with windows of 32 tokens, as train.py would leave it."""
    os.makedirs(folder)
    torch.manual_seed(0)
    config = Config(257, 32, n_layer=1, n_head=2, n_embd=16, causal=causal)
    save_config(folder, config, train={**MASKED, "objective": objective, "lookahead": 2, "dataset": "toy",
                                       **train})
    save_checkpoint(folder, Transformer(config), [], step=7)
    tokenizer.save_tokenizer({"name": "bytes"}, folder)
    np.save(f"{folder}/unigram.npy", COUNTS)
    return folder


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty working directory with a text and a causal and a masked checkpoint."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_bytes(TEXT.encode())
    checkpoint("out/dar", causal=True, objective="dar")
    checkpoint("out/mlm")
    return tmp_path


def test_run_as_a_script(work):
    command = ["eval_ppl.py", "--checkpoint", "out/dar", "out/mlm", "--text", "t.txt", "--max_windows", "6"]
    done = subprocess.run([sys.executable, os.path.join(ROOT, command[0]), *command[1:]],
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""                                    # the progress bar is for terminals only
    lines = done.stdout.splitlines()
    assert "trained on targets up to 2 tokens ahead, scored as if they were the next token" in lines[0]
    assert "masks up to block_size" in lines[1]
    table = lines[next(i for i, line in enumerate(lines) if line.split() == ["dar", "mlm"]):]
    assert [line.split()[2] for line in table[1:7]] == ["1", "2", "4", "8", "16", "31"]
    for name, column in [("dar", 0), ("mlm", 1)]:
        with open(f"out/{name}/eval_ppl_{TEXT_NAME}_left-to-right-6-windows.json") as file:
            report = json.load(file)
        assert report["command"] == "python " + " ".join(command)
        assert (report["step"], report["windows"], report["clusters"]) == (7, 6, "windows")
        assert sum(report["tokens"]["all"]) == pytest.approx(6 * 31)
        assert sum(report["documents"]["bytes"]) == 6 * 31
        assert report["text_sha256"] == hashlib.sha256(TEXT.encode()).hexdigest()
        assert report["weights"] == load_checkpoint(f"out/{name}")[1]["weights"]
        r = report["all"]
        assert r["nats_per_token"] == pytest.approx(math.log(257), abs=0.3)  # untrained: near uniform
        if name == "mlm":
            assert r["bits_per_byte"] == pytest.approx(r["nats_per_token"] / math.log(2))
        else:                                                   # a mixture over 2 tokens is no code
            assert "bits_per_byte" not in r and "word_perplexity" not in r
        assert "bits_per_byte" not in report["prompt_lengths"]["8"]
        assert set(report["prompt_lengths"]) == {"1", "2", "4", "8", "16", "31"}
        cell = table[1].split("after 1")[1].split("  ")
        assert f"{report['prompt_lengths']['1']['perplexity']:.1f}" in [c for c in cell if c.strip()][column]


@pytest.mark.parametrize("method", ["bound", "pseudo", "confidence"])
def test_causal_models_are_refused_in_one_line(work, capsys, method):
    with pytest.raises(SystemExit) as stop:
        eval_ppl.main(["--checkpoint", "out/mlm", "out/dar", "--text", "t.txt", "--method", method])
    out, err = capsys.readouterr()
    assert (stop.value.code == 2 and out == "" and err.startswith("error: out/dar is causal")
            and err.count("\n") == 1)
    assert not [name for name in os.listdir("out/mlm") if name.startswith("eval")]
    eval_ppl.main(["--checkpoint", "out/mlm", "--text", "t.txt", "--method", method, "--max_windows", "2"])
    assert os.path.exists(f"out/mlm/eval_ppl_{TEXT_NAME}_{method}-2-windows.json")
    assert ("NOT a likelihood" in capsys.readouterr().out) == (method == "pseudo")


@pytest.mark.parametrize("flags, message", [
    (["--text", "none.txt"], "none.txt"),
    (["--text", "latin.txt"], "latin.txt:1: invalid UTF-8"),
    (["--text", "t.txt", "--context", "0"], "at least 1"),
    (["--text", "t.txt", "--context", "32"], "must fit into block_size 32"),
    (["--text", "t.txt", "--method", "pseudo", "--context", "2"], "--context needs --method left-to-right"),
    (["--text", "t.txt", "--method", "pseudo", "--prompt_lengths", "3"], "--prompt_lengths needs --method"),
    (["--text", "t.txt", "--method", "pseudo", "--suffix", "one"], "--suffix needs --method"),
    (["--text", "t.txt", "--max_windows", "-1"], "max_windows must be"),
    (["--text", "short.txt"], "less than one window of 32"),
    (["--text", "t.txt", "--prompt_lengths", "4", "32"], "must fit into block_size 32"),
    (["--text", "t.txt", "--prompt_lengths", "0"], "at least 1"),
    (["--text", "t.txt", "--samples", "0"], "at least 1"),
    (["--text", "t.txt", "--device", "cuda:77"], "not available"),
    (["--text", "t.txt", "--method", "bound", "--plot"], "--plot needs"),
    (["--val"], "toy"),
    (["--val", "--checkpoint", "out/mlm", "out/other"], "one and the same dataset"),
    (["--text", "t.txt", "--checkpoint", "out/mlm", "./out/mlm/"], "out/mlm/ twice"),
    (["--text", "t.txt", "--checkpoint", "out/mlm", "b/mlm", "--results", "r"], "folders of the same name"),
    (["--text", "t.txt", "--checkpoint", "out/nothing"], "holds no checkpoint")])
def test_bad_input_is_refused_in_one_line(work, capsys, flags, message):
    (work / "latin.txt").write_bytes(b"caf\xe9 au lait")
    (work / "short.txt").write_text("short")
    checkpoint("out/other", dataset="other")
    with pytest.raises(SystemExit) as stop:
        eval_ppl.main([*(["--checkpoint", "out/mlm"] if "--checkpoint" not in flags else []), *flags])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and message in err, err


def test_val_is_the_validation_split(work, capsys):
    """Of the dataset that the checkpoint names, in its data_dir;
    refused if that has another tokenizer or other documents by now.
    """
    for i in range(40):
        (work / f"{i}.txt").write_text(f"Document {i}. " + "a b c d e " * 10)
    data.prepare("toy", files=[f"{i}.txt" for i in range(40)], tokenizer="bytes", val_fraction=0.3,
                 data_dir="sets")
    checkpoint("out/vlm", objective="vlm", data_dir="sets")
    config = json.loads(Path("out/vlm/config.json").read_text())
    Path("out/vlm/config.json").write_text(json.dumps({**config, "dataset": dataset_digests("sets/toy")}))
    eval_ppl.main(["--checkpoint", "out/vlm", "--val", "--max_windows", "0"])
    with open("out/vlm/eval_ppl_val_left-to-right.json") as file:
        report = json.load(file)
    _, splits = data.load("toy", "sets")
    rows = np.concatenate([np.asarray(ids)[:len(ids) // 32 * 32].reshape(-1, 32) for ids in splits["val"]])
    assert report["windows"] == len(rows) > 3
    assert sum(report["documents"]["bytes"]) == (rows[:, 1:] != 256).sum()
    assert report["clusters"] == "documents"
    ended = np.concatenate([[False], rows.ravel()[:-1] == 256])              # after end-of-text
    number = np.unique(ended.cumsum(), return_inverse=True)[1].reshape(rows.shape)
    sizes = [int((rows[:, 1:] != 256)[number[:, 1:] == i].sum()) for i in range(number.max() + 1)]
    assert report["documents"]["bytes"] == sizes and len(sizes) > 5
    nats, tokens = np.array(report["nats"]["all"]), np.array(report["tokens"]["all"])
    assert len(nats) == len(tokens) == len(sizes) == len(report["nats"]["4"])
    mean, se = eval_ppl.ratio(nats, tokens)
    assert (report["all"]["nats_per_token"], report["all"]["nats_per_token_se"]) == pytest.approx((mean, se))
    assert sum(report["tokens"]["4"]) == sum(report["documents"]["windows"]) == len(rows)

    # The same tokenizer, but training saw other documents
    capsys.readouterr()
    digests = dataset_digests("sets/toy")
    for of_run, refused in [(digests, False), ({**digests, "meta": "0" * 64}, True), (None, True)]:
        Path("out/vlm/config.json").write_text(json.dumps({**config, "dataset": of_run}))
        with pytest.raises(SystemExit) if refused else contextlib.nullcontext():
            eval_ppl.main(["--checkpoint", "out/vlm", "--val", "--max_windows", "1"])
        assert ("toy is not the dataset that" in capsys.readouterr().err) == refused

    tokenizer.save_tokenizer({"name": "gpt2"}, "sets/toy")
    with pytest.raises(SystemExit):
        eval_ppl.main(["--checkpoint", "out/vlm", "--val"])
    assert "toy is not the dataset that" in capsys.readouterr().err


def test_a_run_from_another_machine_finds_its_dataset_here(work):
    """Its config.json names a folder that does not exist here: data/ does, and --data_dir is obeyed."""
    train = {"dataset": "toy", "data_dir": "/another/machine/data"}
    assert data.data_dir_of_run(train) == "data" and data.data_dir_of_run(train, "mine") == "mine"
    (work / "sets/toy").mkdir(parents=True)
    assert data.data_dir_of_run({"dataset": "toy", "data_dir": "sets"}) == "sets"


def test_a_quick_look_replaces_no_full_result(work):
    for windows in ("0", "2"):
        eval_ppl.main(["--checkpoint", "out/dar", "--text", "t.txt", "--max_windows", windows])
    assert report_of(f"out/dar/eval_ppl_{TEXT_NAME}_left-to-right.json")["windows"] > 2
    assert report_of(f"out/dar/eval_ppl_{TEXT_NAME}_left-to-right-2-windows.json")["windows"] == 2


def report_of(path):
    return json.loads(Path(path).read_text())


def test_texts_of_one_name_do_not_share_a_file(work, capsys):
    for folder, text in [("A", TEXT), ("B", TEXT.upper())]:
        os.makedirs(folder)
        Path(folder, "t.txt").write_text(text)
        eval_ppl.main(["--checkpoint", "out/mlm", "--text", f"{folder}/t.txt", "--max_windows", "3"])
    paths = [name for name in os.listdir("out/mlm") if name.startswith("eval")]
    assert len(paths) == 2 and f"eval_ppl_{TEXT_NAME}_left-to-right-3-windows.json" in paths


def test_results_go_elsewhere_or_are_shown_only(work, capsys):
    """A checkpoint that one may only read: its results are on the screen, and a line and exit code 2 say the rest."""
    command = ["--checkpoint", "out/mlm", "out/dar", "--text", "t.txt", "--max_windows", "3"]
    name = f"eval_ppl_{TEXT_NAME}_left-to-right-3-windows.json"
    os.makedirs(f"out/mlm/{name}.tmp")                                      # so it cannot be written
    with pytest.raises(SystemExit) as stop:
        eval_ppl.main(command)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and "all: perplexity" in out and "mlm  " in out
    assert err.count("\n") == 1 and f"error: not saved: out/mlm/{name}" in err and "--results" in err
    assert os.path.exists(f"out/dar/{name}")
    os.remove(f"out/dar/{name}")
    eval_ppl.main([*command, "--results", "elsewhere"])
    assert capsys.readouterr().err == ""
    assert report_of(f"elsewhere/mlm/{name}")["weights"] == load_checkpoint("out/mlm")[1]["weights"]
    assert not os.path.exists(f"out/dar/{name}") and os.path.exists(f"elsewhere/dar/{name}")


@pytest.mark.parametrize("error, code", [(ValueError("broken"), 2), (KeyboardInterrupt(), 130)])
def test_nothing_is_lost_when_a_later_checkpoint_fails(work, capsys, monkeypatch, error, code):
    measure_one, done = eval_ppl.measure, []
    def fail_the_second_time(*args):
        if done:
            raise error
        done.append(measure_one(*args))
        return done[0]
    monkeypatch.setattr(eval_ppl, "measure", fail_the_second_time)
    with pytest.raises(SystemExit) as stop:
        eval_ppl.main(["--checkpoint", "out/mlm", "out/dar", "--text", "t.txt", "--max_windows", "3"])
    out, err = capsys.readouterr()
    assert stop.value.code == code and err.count("\n") == 1
    assert f"{done[0]['all']['perplexity']:.1f}" in out.split("all: perplexity")[1]
    assert os.path.exists(f"out/mlm/eval_ppl_{TEXT_NAME}_left-to-right-3-windows.json")


def test_word_frequencies_stand_beside_every_perplexity(work, capsys):
    """The unigram model of the training tokens on the tokens that are scored, and what is not better."""
    eval_ppl.main(["--checkpoint", "out/mlm", "out/dar", "--text", "t.txt", "--max_windows", "0"])
    out = capsys.readouterr().out
    log_p = np.log((COUNTS + 1) / (COUNTS + 1).sum())
    report = report_of(f"out/mlm/eval_ppl_{TEXT_NAME}_left-to-right.json")
    n = report["windows"]
    rows = np.frombuffer(TEXT.encode(), np.uint8)[:n * 32].reshape(n, 32)
    scored = 1 + eval_ppl.grid(n, 8, 31)
    want = -log_p[np.take_along_axis(rows, scored, axis=1)].mean()
    assert report["unigram"]["nats_per_token"] == pytest.approx(want)
    assert report["unigram"]["perplexity"] == pytest.approx(math.exp(want))
    row = next(line for line in out.splitlines() if line.startswith("word frequencies alone"))
    assert row.split()[3] == f"{math.exp(want):.2f}"
    assert "out/mlm has not learned to use context yet" in out

    # The causal model on all tokens, and on the sample of the masked one
    causal = report_of(f"out/dar/eval_ppl_{TEXT_NAME}_left-to-right.json")
    nats = sum(causal["nats"]["sample"]) / sum(causal["tokens"]["sample"])
    assert causal["sample"]["nats_per_token"] == pytest.approx(nats)
    assert causal["sample"]["perplexity"] != causal["all"]["perplexity"]
    report["all"]["perplexity"], causal["all"]["perplexity"], causal["sample"]["perplexity"] = 30.0, 20.0, 10.0
    lines = eval_ppl.table([report, causal]).splitlines()
    rows = {line.split("   ")[0]: re.findall(r"(\S+) ± ", line) for line in lines}
    assert rows["all: perplexity"] == ["30.00", "20.00"] and rows["all, sampled: perplexity"] == ["30.00", "10.00"]
    assert "all, sampled" not in eval_ppl.table([causal])                   # nothing to compare with

    # On the same text the two kinds of models are scored on other tokens, and a sentence says so
    assert "scored on the same tokens as the model. For a masked model" in out
    command = ["--checkpoint", "out/mlm", "out/dar", "--text", "t.txt", "--max_windows", "0", "--samples"]
    values = {}
    for samples in ("8", "31"):
        eval_ppl.main([*command, samples])
        values[samples] = [report_of(f"out/{name}/eval_ppl_{TEXT_NAME}_left-to-right.json")["unigram"]
                           for name in ("mlm", "dar")]
    assert values["8"][0] != values["8"][1] and values["31"][0] == values["31"][1] == values["8"][1]

    np.save("out/mlm/unigram.npy", COUNTS[:-1])
    with pytest.raises(SystemExit):
        eval_ppl.main(["--checkpoint", "out/mlm", "--text", "t.txt"])
    assert "does not belong to this model's vocabulary" in capsys.readouterr().err


def test_a_model_that_beats_word_frequencies_is_not_called_ignorant(capsys):
    r = {"checkpoint": "a", "method": "m", "suffix": None, "text": "t", "clusters": "windows", "tokens": {"all": [1]},
         "all": {"perplexity": 94.0}, "unigram": {"perplexity": 100.0}, "prompt_lengths": {}, "context": {}, "sample": None,
         "block_size": 4, "windows": 1, "documents": {"bytes": [1]}}
    eval_ppl.show([r])
    assert "learned to use context" not in capsys.readouterr().out
    eval_ppl.show([r | {"all": {"perplexity": 97.0}}])
    assert "a has not learned to use context yet" in capsys.readouterr().out


def test_bits_per_byte_only_where_there_is_a_code(work, capsys):
    checkpoint("out/ar", causal=True, objective="ar")
    for method, has in [("left-to-right", True), ("bound", True), ("confidence", True), ("pseudo", False)]:
        names = ["out/mlm", "out/ar"] if method == "left-to-right" else ["out/mlm"]
        eval_ppl.main(["--checkpoint", *names, "--text", "t.txt", "--method", method, "--max_windows", "2"])
        assert ("Published ones differ" in capsys.readouterr().out) == has
        for name in names:
            result = report_of(f"{name}/eval_ppl_{TEXT_NAME}_{method}-2-windows.json")["all"]
            assert ("bits_per_byte" in result) == ("word_perplexity" in result) == has
    eval_ppl.main(["--checkpoint", "out/dar", "--text", "t.txt", "--max_windows", "2"])
    result = report_of(f"out/dar/eval_ppl_{TEXT_NAME}_left-to-right-2-windows.json")["all"]
    assert "bits_per_byte" not in result and "Published ones differ" not in capsys.readouterr().out


def test_context_on_the_command_line(work, capsys):
    eval_ppl.main(["--checkpoint", "out/dar", "out/mlm", "--text", "t.txt", "--max_windows", "4",
                   "--context", "2", "8"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith(tuple("0123456789"))]
    assert [line.split("  ")[0] for line in lines if line.startswith("nats per token,")] == [
        f"nats per token, {what} visible" for what in ("only last 2", "only last 8", "whole prompt")]
    report = report_of(f"out/mlm/eval_ppl_{TEXT_NAME}_left-to-right-4-windows.json")
    assert set(report["context"]) == {"2", "8", "all"}
    assert sum(report["tokens"]["context 2"]) == 4 * 8
    assert report["context"]["8"]["nats_per_token"] == pytest.approx(
        sum(report["nats"]["context 8"]) / 32)


def test_a_fifth_definition_is_one_entry(work, capsys, monkeypatch):
    def double(model, x, settings):
        scores, weights = eval_ppl.pseudo(model, x, settings)
        return scores._replace(nats=2 * scores.nats), weights
    monkeypatch.setitem(eval_ppl.METHODS, "double", eval_ppl.Method(double, 3, "twice pseudo"))
    for method in ("double", "pseudo"):
        eval_ppl.main(["--checkpoint", "out/mlm", "--text", "t.txt", "--method", method, "--max_windows", "3"])
    assert "twice pseudo" in capsys.readouterr().out
    double, single = [report_of(f"out/mlm/eval_ppl_{TEXT_NAME}_{method}-3-windows.json")["all"]["nats_per_token"]
                      for method in ("double", "pseudo")]
    assert double == pytest.approx(2 * single)


def test_matched_masks_are_those_of_the_objectives_record(work, capsys, monkeypatch):
    """Of any objective in the table, with the flags of its training. No name is tested."""
    record = OBJECTIVES["mlm"]._replace(most_masks=lambda options: options.lookahead + options.block_size // 8)
    monkeypatch.setitem(OBJECTIVES, "fifth", record)
    checkpoint("out/fifth", objective="fifth", lookahead=1)
    loaded = eval_ppl.load("out/fifth", argparse_like(work))
    assert loaded.most_masks == 5
    eval_ppl.main(["--checkpoint", "out/fifth", "--text", "t.txt", "--suffix", "matched", "--max_windows", "3"])
    source = Path(ROOT, "eval_ppl.py").read_text().split('"""', 2)[2]
    assert not [name for name in ("ar", "dar", "mlm", "vlm") if f'"{name}"' in source]


def argparse_like(folder):
    return eval_ppl.build_parser().parse_args(["--checkpoint", str(folder), "--device", "cpu"])


def test_suffixes_do_not_overwrite_each_other(work, capsys):
    for suffix in ("full", "one", "matched"):
        eval_ppl.main(["--checkpoint", "out/mlm", "--text", "t.txt", "--suffix", suffix,
                       "--max_windows", "3"])
    names = {name for name in os.listdir("out/mlm") if name.startswith("eval")}
    assert names == {f"eval_ppl_{TEXT_NAME}_left-to-right{ending}-3-windows.json" for ending in ("", "-one", "-matched")}


def test_plot(work, capsys):
    pytest.importorskip("matplotlib")
    eval_ppl.main(["--checkpoint", "out/mlm", "out/dar", "--text", "t.txt",
                   "--max_windows", "3", "--plot", "p.png"])
    assert (work / "p.png").read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib_is_refused_before_the_work(work, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)      # importing it raises ImportError
    with pytest.raises(SystemExit):
        eval_ppl.main(["--checkpoint", "out/mlm", "--text", "t.txt", "--plot", "p.png"])
    assert "pip install matplotlib" in capsys.readouterr().err

# -----------------------------------------------------------------------------
# WikiText-2, from a server on this machine

@pytest.fixture
def serve(tmp_path, monkeypatch):
    """serve(content, status=200, sha256=None): the address of WikiText-2 now answers with that."""
    servers = []
    def start(content, status=200, cut=None, sha256=None):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                begin = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
                self.send_response(206 if begin and status == 200 else status)
                self.send_header("Content-Length", str(len(content) - begin))
                self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
                self.end_headers()
                self.wfile.write(content[begin:cut])
            def log_message(self, *args):
                pass
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        monkeypatch.setattr(texts, "WIKITEXT_URL",
                            f"http://127.0.0.1:{server.server_address[1]}/wikitext.zip")
        monkeypatch.setattr(texts, "WIKITEXT_SHA256", sha256 or hashlib.sha256(content).hexdigest())
        monkeypatch.setattr(texts, "WIKITEXT_TEST_SHA256", hashlib.sha256(TEXT.encode()).hexdigest())
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def archive(path, members):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path.read_bytes()


GOOD = {"wikitext-2-raw/wiki.test.raw": TEXT, "wikitext-2-raw/wiki.train.raw": "train"}


def test_wikitext_is_downloaded_once_and_checked(work, serve, capsys):
    serve(archive(work / "a.zip", GOOD))
    command = ["--checkpoint", "out/dar", "--max_windows", "3"]
    eval_ppl.main(command)
    folder = work / "data" / "wikitext-2"
    assert (folder / "wiki.test.raw").read_text() == TEXT and os.listdir(folder) == ["wiki.test.raw"]
    serve(b"", status=404)                                                  # no longer asked
    eval_ppl.main(command)
    assert os.path.exists("out/dar/eval_ppl_wikitext-2_left-to-right-3-windows.json")
    capsys.readouterr()
    (folder / "wiki.test.raw").write_text(TEXT + "changed")
    with pytest.raises(SystemExit):
        eval_ppl.main(command)
    assert "is not the official file" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["403", "truncated", "checksum", "climbs", "absolute", "windows",
                                  "no zip", "empty zip"])
def test_bad_downloads_are_refused_in_one_line(work, serve, capsys, what):
    names = {"climbs": "a/../../wiki.test.raw", "absolute": "/tmp/wiki.test.raw",
             "windows": "..\\wiki.test.raw"}
    content = archive(work / "a.zip", {**GOOD, names[what]: "evil"} if what in names else GOOD)
    content = {"no zip": b"not a zip" * 100,
               "empty zip": archive(work / "e.zip", {"other": "x"})}.get(what, content)
    before = {path for path in work.rglob("*")}
    serve(content, status=403 if what == "403" else 200, cut=-50 if what == "truncated" else None,
          sha256="0" * 64 if what == "checksum" else None)
    if what in names:                       # only the named member is read: the other one is written nowhere
        with contextlib.suppress(SystemExit):           # (the text of this test has another checksum)
            eval_ppl.main(["--checkpoint", "out/dar"])
        new = [p for p in set(work.parent.rglob("*")) - before if p.suffix == ".raw"]
        assert all(p.read_text() != "evil" for p in new) and not Path("/tmp/wiki.test.raw").exists()
        return
    with pytest.raises(SystemExit) as stop:
        eval_ppl.main(["--checkpoint", "out/dar"])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.splitlines()[-1].startswith("error: ") and "Traceback" not in err
    assert not [p for p in set(work.rglob("*")) - before if p.suffix == ".raw"]
    if what == "403":
        assert "without a network: --val, or --text FILE" in err and not (work / "data/wikitext-2").exists()


def test_progress_is_shown_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    list(eval_ppl.progress(range(3)))
    assert "0/3" in capsys.readouterr().err


def test_matched_suffix_is_refused_for_an_objective_whose_masks_are_not_known(work, capsys):
    config = json.loads((work / "out/mlm/config.json").read_text())
    config["train"]["objective"] = "mine"
    (work / "out/mlm/config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as stop:
        eval_ppl.main(["--checkpoint", "out/mlm", "--text", "t.txt", "--suffix", "matched"])
    assert stop.value.code == 2 and "mine" in capsys.readouterr().err
