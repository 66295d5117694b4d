"""
The graders of exercises 7 and 8 are graded: right solutions, however written, pass; wrong ones fail, each with
words that name the mistake.

    python -m pytest tests/test_grader_evals.py

A solution is a function that stands in for `left_to_right_masked` of eval_ppl.py or `probe` of probe.py.
"""
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval_ppl
import probe as probe_file
from conftest import in_words
from eval_ppl import Scores, score

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
WRITTEN = {7: (eval_ppl, "left_to_right_masked"), 8: (probe_file, "probe")}
REFERENCE = {number: getattr(module, name) for number, (module, name) in WRITTEN.items()}


class Failures:
    """A pytest plugin that keeps the words of every failure."""
    def __init__(self):
        self.words = []
        self.passed = 0

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.words.append(in_words(report))
        elif report.when == "call":
            self.passed += 1


def grade(monkeypatch, number, solution, first_only=True):
    """Failures of the tests of one exercise, with this function in the place of ours."""
    monkeypatch.setattr(*WRITTEN[number], solution)
    failures = Failures()
    arguments = ["-m", f"exercise{number}", "-p", "no:terminal", "-p", "no:cacheprovider", "-W", "ignore"]
    if first_only:
        arguments.append("-x")
    file = ROOT / "tests" / f"test_exercise{number}.py"
    code = pytest.main([*arguments, str(file)], plugins=[failures])
    assert code == bool(failures.words)
    return failures


RIGHT = []      # (exercise, solution)
WRONG = []      # (exercise, solution, words of the first failure)


def right(number):
    def enter(solution):
        RIGHT.append(pytest.param(number, solution, id=f"{number}-{solution.__name__}"))
        return solution
    return enter


def wrong(number, words):
    def enter(solution):
        WRONG.append(pytest.param(number, solution, words, id=f"{number}-{solution.__name__}"))
        return solution
    return enter

# -----------------------------------------------------------------------------
# Exercise 7: right

def each_wanted(wanted):
    return [(int(i), int(k)) for i, k in zip(*np.nonzero(wanted))]


@right(7)
def loops(model, x, wanted, masks, batch_size):
    out = np.zeros((3, *x.shape))
    for i in range(len(x)):
        for k in range(1, x.shape[1]):
            if wanted[i, k]:
                suffix = torch.full((masks[k],), model.config.mask_token, device=x.device)
                inputs = torch.cat((x[i, :k], suffix))
                hidden = model.features(inputs[None])[0]
                out[:, i, k] = np.concatenate(score(model, hidden[k:k + 1], x[i, k:k + 1]))
    return Scores(*out)


@right(7)
def a_batch_per_prompt_length(model, x, wanted, masks, batch_size):
    """From the longest prompt to the shortest, all windows at once, in float32."""
    fields = [np.zeros(tuple(x.shape), dtype=np.float32) for _ in range(3)]
    for k in reversed(range(1, x.shape[1])):
        inputs = F.pad(x[:, :k], (0, int(masks[k])), value=model.config.mask_token)
        scores = score(model, model.features(inputs)[:, k], x[:, k])
        for field, values in zip(fields, scores):
            field[:, k] = np.where(wanted[:, k], values, 0)
    return Scores(*fields)


@right(7)
def own_softmax_in_tensors(model, x, wanted, masks, batch_size):
    """Without `score`. The fields are tensors."""
    zeros = torch.zeros(x.shape, dtype=torch.float64)
    nats, surest, guessed = zeros.clone(), zeros.clone(), zeros.clone()
    for i, k in each_wanted(wanted):
        inputs = x[i].clone()[:k + int(masks[k])]
        inputs[k:] = model.config.mask_token
        z = (model.features(inputs[None])[0, k] @ model.wte.weight.T)[:model.config.vocab_size]
        log_p = torch.log(torch.softmax(z.double(), dim=0))
        nats[i, k] = -log_p[x[i, k]]
        surest[i, k] = -log_p.max()
        guessed[i, k] = log_p.argmax() == x[i, k]
    return Scores(nats, surest, guessed)


@right(7)
def whole_windows_with_hidden_ends(model, x, wanted, masks, batch_size):
    """Inputs are always T long; what follows the masks is hidden from attention."""
    T = x.shape[1]
    out = np.zeros((3, *x.shape))
    jobs = each_wanted(wanted)
    np.random.default_rng(0).shuffle(jobs)
    for start in range(0, len(jobs), batch_size):
        i, k = torch.tensor(jobs[start:start + batch_size]).T
        length = k + torch.as_tensor(masks)[k]
        column = torch.arange(T)
        inputs = torch.where(column < k[:, None], x[i], model.config.mask_token)
        hidden = model.features(inputs, column < length[:, None])
        scores = score(model, hidden[torch.arange(len(k)), k], x[i, k])
        out[:, i.numpy(), k.numpy()] = np.array(scores)
    return Scores(nats=out[0], surest=out[1], right=out[2])


@right(7)
def by_cross_entropy(model, x, wanted, masks, batch_size):
    """Lists of rows, put together at the end."""
    rows = []
    for window, asked in zip(x, wanted):
        row = []
        for k in range(len(window)):
            if not asked[k]:
                row.append((0.0, 0.0, 0.0))
                continue
            inputs = torch.tensor(window[:k].tolist() + [model.config.mask_token] * int(masks[k]))
            z = model.logits(model.features(inputs.unsqueeze(0)))[0, k]
            nats = F.cross_entropy(z[None], window[k:k + 1]).item()
            row.append((nats, -z.log_softmax(0).max().item(), float(z.argmax() == window[k])))
        rows.append(row)
    return Scores(*np.moveaxis(np.array(rows), 2, 0))

# -----------------------------------------------------------------------------
# Exercise 7: wrong

def almost(inputs=None, at=lambda k, m: k, target=lambda k: k, place=lambda k: k, combine=None):
    """The loops with one part replaced.

    inputs(row, k, m, mask) -> list of ids, m masks after the prompt. at(k, m) -> the position that is read
    out. target(k), place(k) -> columns of the target and of the result. combine(nats, wanted) -> nats.
    """
    def solution(model, x, wanted, masks, batch_size):
        mask = model.config.mask_token
        T = x.shape[1]
        out = np.zeros((3, *x.shape))
        for i, k in each_wanted(wanted):
            row, m = x[i].tolist(), int(masks[k])
            shown = row[:k] + [mask] * m if inputs is None else inputs(row, k, m, mask)
            hidden = model.features(torch.tensor([shown[:T]]))[0]
            last = len(hidden) - 1
            scores = score(model, hidden[min(at(k, m), last)][None], x[i, [min(target(k), T - 1)]])
            out[:, i, min(place(k), T - 1)] = np.concatenate(scores)
        if combine is not None:
            out[0] = combine(out[0], wanted)
        return Scores(*out)
    return solution


def wrong_loops(words, name, **replaced):
    solution = almost(**replaced)
    solution.__name__ = name
    wrong(7, words)(solution)


wrong_loops("the score is that of the causal script", "causal_script_in_loops",
            inputs=lambda row, k, m, mask: row, at=lambda k, m: k - 1)
wrong_loops("the target x[k+1] is visible: a leak", "everything_visible", inputs=lambda row, k, m, mask: row)
wrong_loops("the prompt has k+1 tokens: the target x[k+1] is visible, a leak", "prompt_with_the_target",
            inputs=lambda row, k, m, mask: row[:k + 1] + [mask] * (m - 1))
wrong_loops("the tokens after it are visible: the future is seen", "only_the_target_masked",
            inputs=lambda row, k, m, mask: row[:k] + [mask] + row[k + 1:])
wrong_loops("there is no mask: the prediction is read out at the prompt's last token", "prompt_alone",
            inputs=lambda row, k, m, mask: row[:k], at=lambda k, m: k - 1)
wrong_loops("one mask follows the prompt", "no_masks_behind", inputs=lambda row, k, m, mask: row[:k] + [mask])
wrong_loops("masks fill the window", "masks_to_the_end",
            inputs=lambda row, k, m, mask: row[:k] + [mask] * (len(row) - k))
wrong_loops("one too many", "masks_one_too_many",
            inputs=lambda row, k, m, mask: row[:k] + [mask] * (m + 1))
wrong_loops("read out at the prompt's last token", "reads_before_the_mask", at=lambda k, m: k - 1)
wrong_loops("read out at the last mask", "reads_at_the_last_mask", at=lambda k, m: k + m - 1)
wrong_loops("read out at the second mask", "reads_at_the_second_mask", at=lambda k, m: k + 1)
wrong_loops("the target is x[k], the prompt's last token: shifted by one", "target_of_the_prompt",
            target=lambda k: k - 1)
wrong_loops("the target is x[k+2]: shifted by one", "target_after_next", target=lambda k: k + 1)
wrong_loops("everything is masked", "prompt_masked", inputs=lambda row, k, m, mask: [mask] * (k + m))
wrong_loops("the prompt has k-1 tokens", "prompt_too_short",
            inputs=lambda row, k, m, mask: row[:k - 1] + [mask] * (m + 1))
wrong_loops("the masks are the id 0, which is text", "masks_with_id_0",
            inputs=lambda row, k, m, mask: row[:k] + [0] * m)
wrong_loops("in bits (log2)", "bits", combine=lambda nats, wanted: nats / math.log(2))
wrong_loops("it must be minus that", "log_probabilities", combine=lambda nats, wanted: -nats)
wrong_loops("the score is the probability", "probabilities",
            combine=lambda nats, wanted: np.exp(-nats) * wanted)
wrong_loops("the score is a perplexity", "perplexities", combine=lambda nats, wanted: np.exp(nats) * wanted)
wrong_loops("all tokens of a window have the same score, its average", "average_per_window",
            combine=lambda nats, wanted: wanted * nats.sum(1, keepdims=True)
            / np.maximum(1, wanted.sum(1, keepdims=True)))
wrong_loops("divided by the number of tokens of the window", "divided_by_the_window",
            combine=lambda nats, wanted: nats / np.maximum(1, wanted.sum(1, keepdims=True)))
wrong_loops("5 of 5 tokens that are wanted have no score", "one_column_too_early", place=lambda k: k - 1)


@wrong(7, "the score is that of the causal script")
def causal_script(model, x, wanted, masks, batch_size):
    """One forward pass per window, no masks, the loss at every position."""
    scores = eval_ppl.left_to_right_causal(model, x, batch_size)
    return Scores(*[field * wanted for field in scores])


@wrong(7, "the score is a logit, not a log-probability")
def logits(model, x, wanted, masks, batch_size):
    scores = REFERENCE[7](model, x, wanted, masks, batch_size)
    for i, k in each_wanted(wanted):
        inputs = torch.cat((x[i, :k], torch.full((int(masks[k]),), model.config.mask_token)))
        scores.nats[i, k] = -model.logits(model.features(inputs[None])[0, k])[x[i, k]]
    return scores


@wrong(7, "the mask token and padding get probability")
def probability_on_padding(model, x, wanted, masks, batch_size):
    scores = REFERENCE[7](model, x, wanted, masks, batch_size)
    for i, k in each_wanted(wanted):
        inputs = torch.cat((x[i, :k], torch.full((int(masks[k]),), model.config.mask_token)))
        z = model.features(inputs[None])[0, k] @ model.wte.weight.T
        scores.nats[i, k] = F.cross_entropy(z[None], x[i, k:k + 1])
    return scores


@wrong(7, "a score is infinite: its target has probability 0, as the mask token does")
def scores_the_mask_token(model, x, wanted, masks, batch_size):
    out = np.zeros((3, *x.shape))
    for i, k in each_wanted(wanted):
        inputs = x[i].clone()
        inputs[k:] = model.config.mask_token
        hidden = model.features(inputs[None])[0, k]
        out[:, i, k] = np.concatenate(score(model, hidden[None], inputs[k:k + 1]))
    return Scores(*out)


@wrong(7, "is not wanted, but has a score: it must be 0")
def scores_what_is_not_wanted(model, x, wanted, masks, batch_size):
    everything = np.ones(x.shape, dtype=bool)
    everything[:, 0] = False
    return REFERENCE[7](model, x, everything, masks, batch_size)


@wrong(7, "what fills up the shorter ones must be hidden from attention (valid)")
def padding_is_seen(model, x, wanted, masks, batch_size):
    out = np.zeros((3, *x.shape))
    jobs = each_wanted(wanted)
    for start in range(0, len(jobs), batch_size):
        i, k = torch.tensor(jobs[start:start + batch_size]).T
        longest = int((k + torch.as_tensor(masks)[k]).max())
        inputs = torch.where(torch.arange(longest) < k[:, None], x[i, :longest], model.config.mask_token)
        hidden = model.features(inputs)[torch.arange(len(k)), k]
        out[:, i.numpy(), k.numpy()] = np.array(score(model, hidden, x[i, k]))
    return Scores(*out)


@wrong(7, "the scores are right but stand in the wrong places")
def sorted_and_not_put_back(model, x, wanted, masks, batch_size):
    scores = REFERENCE[7](model, x, wanted, masks, batch_size)
    for field in scores:
        field[wanted] = field[wanted][::-1].copy()
    return scores


@wrong(7, "is the last, smaller batch forgotten?")
def forgets_the_last_batch(model, x, wanted, masks, batch_size):
    jobs = each_wanted(wanted)
    kept = np.zeros_like(wanted)
    whole = len(jobs) // batch_size * batch_size
    for i, k in jobs[:whole if batch_size == 3 else None]:
        kept[i, k] = True
    return REFERENCE[7](model, x, kept, masks, batch_size)


@wrong(7, "surest must be -log P of the likeliest token")
def nats_in_all_fields(model, x, wanted, masks, batch_size):
    nats = REFERENCE[7](model, x, wanted, masks, batch_size).nats
    return Scores(nats, nats, nats)


@wrong(7, "one number per token")
def one_number_per_window(model, x, wanted, masks, batch_size):
    scores = REFERENCE[7](model, x, wanted, masks, batch_size)
    return Scores(*[field.sum(axis=1) / wanted.sum(axis=1) for field in scores])


@wrong(7, "returns a ndarray: it must return Scores")
def nats_alone(model, x, wanted, masks, batch_size):
    return REFERENCE[7](model, x, wanted, masks, batch_size).nats


@wrong(7, "returns nothing (None)")
def returns_nothing(model, x, wanted, masks, batch_size):
    pass


@wrong(7, "changes x, wanted or masks")
def masks_in_place(model, x, wanted, masks, batch_size):
    out = np.zeros((3, *x.shape))
    for k in reversed(range(1, x.shape[1])):
        target = x[:, k].clone()
        x[:, k] = model.config.mask_token
        hidden = model.features(x[:, :k + int(masks[k])])[:, k]
        out[:, :, k] = np.array(score(model, hidden, target)) * wanted[:, k]
    return Scores(*out)


@wrong(7, "misspelt raises AttributeError")
def misspelt(model, x, wanted, masks, batch_size):
    return model.feature(x)

# -----------------------------------------------------------------------------

@pytest.mark.parametrize("number,solution", RIGHT)
def test_a_right_solution_passes(monkeypatch, number, solution):
    failures = grade(monkeypatch, number, solution)
    assert not failures.words and failures.passed


@pytest.mark.parametrize("number,solution,words", WRONG)
def test_a_wrong_solution_is_told_its_mistake(monkeypatch, number, solution, words):
    failures = grade(monkeypatch, number, solution)
    assert failures.words, "a wrong solution passes"
    assert words in failures.words[0]
    assert len(failures.words[0]) < 300 and "\n" not in failures.words[0]


@pytest.mark.parametrize("number", WRITTEN)
def test_every_test_of_an_exercise_fails_before_it_is_written(monkeypatch, number):
    def unwritten(*arguments):
        raise NotImplementedError(f"exercise {number}: see docs/EXERCISES.md")

    failures = grade(monkeypatch, number, unwritten, first_only=False)
    assert failures.passed == 0
    assert set(failures.words) == {f"not yet written: exercise {number}: see docs/EXERCISES.md"}
