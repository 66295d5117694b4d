"""
The table of common wrong programs in docs/ANSWERS.md is true: each program is run, and its row must say what the
grader says.

    python -m pytest tests/test_answers.py      # a minute
    PYTHONPATH=. python tests/test_answers.py   # print the table, to be copied into docs/ANSWERS.md
"""
import re
from pathlib import Path

import pytest

import conftest     # noqa: F401. Before numpy: it sets the number of threads
import test_grader
import test_grader_evals
import test_grader_model
from test_grader_model import almost, nearly

pytestmark = pytest.mark.slow
ANSWERS = Path(__file__).parent.parent / "docs" / "ANSWERS.md"

# (exercise, what the program does, the program: its name in the test of the grader, or itself)
ROWS = [
    (1, "the target of a position is its own token", "ar_predicts_its_input"),
    (1, "`np.roll` instead of the next token: the last target is the first token", "ar_rolls_around"),
    (1, "positions begin at 0 in every sequence", "ar_positions_begin_at_0_in_every_row"),
    (1, "`targets > 0` decides what counts", "ar_drops_token_0"),
    (1, "targets are (N,)", "ar_flat_targets"),
    (1, "weights are `np.ones(N)`", "ar_float64"),

    (2, "offsets 0 .. t-1", "dar_offsets_from_0"),
    (2, "offsets 1 .. t-1 (`rng.integers(1, t)`)", "dar_offsets_below_t"),
    (2, "every offset is t", "dar_always_the_farthest"),
    (2, "one offset per sequence", "dar_one_offset_per_row"),
    (2, "a generator with a fixed seed", "dar_same_offsets_at_every_step"),
    (2, "`expectation` is forgotten", "dar_expectation_is_sample"),

    (3, "each position is masked with probability mask_ratio", "masks_bernoulli"),
    (3, "`rank <= count`", "masks_one_too_many"),
    (3, "one span of masks", "masks_spans"),
    (3, "masked positions are not hidden", "masks_nothing"),
    (3, "all positions are scored", "scores_all"),
    (3, "left-over slots keep their weight", "scores_the_unused_slots"),
    (3, "bert: of 20 %, all are random tokens", "bert_80_20_0"),

    (4, "one ratio for the whole batch", "vlm_one_ratio_per_batch"),
    (4, "a uniform ratio, rounded down", "vlm_ratio_rounded_down"),
    (4, "each position is masked with the drawn probability", "vlm_bernoulli"),
    (4, "the mean of two uniform numbers", "vlm_beta"),
    (4, "only as many slots as masks on average", "vlm_drops_what_exceeds_the_mean"),

    (5, "attention without a scale", almost(scale=lambda q: 1.0)),
    (5, "softmax over the queries", almost(axis=-2)),
    (5, "the causal mask is forgotten", almost(hide=test_grader_model.only_mask)),
    (5, "hidden keys get the score 0", almost(hide=test_grader_model.score_zero)),
    (5, "the mask is inverted", almost(hide=test_grader_model.mask_inverted)),
    (5, "the mask token keeps its logit", nearly(ids=lambda vocab_size: vocab_size + 1)),
    (5, "the K losses are summed", nearly(combine=lambda chosen: -chosen.sum(dim=1))),
    (5, "divided by the sum of the weights", nearly(total=lambda loss, w: (w * loss).sum() / w.sum())),
    (5, "`F.cross_entropy` of probabilities", test_grader_model.softmax_twice),

    (7, "the causal script", "causal_script"),
    (7, "only the target is masked", "only_the_target_masked"),
    (7, "a single mask, whatever `masks` says", "no_masks_behind"),
    (7, "read out one position too early", "reads_before_the_mask"),
    (7, "the average of each window", "average_per_window"),
    (7, "logits instead of log-probabilities", "logits"),
    (7, "padding in a batch is visible", "padding_is_seen"),

    (8, "features are not standardised", "features_not_standardised"),
    (8, "test sets are standardised by themselves", "test_set_standardised_by_itself"),
    (8, "no intercept", "no_intercept"),
    (8, "the penalty is ignored", "penalty_ignored"),
    (8, "the strength is chosen on fitted examples", "chosen_on_the_fitted_examples"),
    (8, "groups are ignored", "groups_ignored"),
    (8, "the smallest value of the metric wins", "the_worst_strength"),
]


def entries(module):
    """{name of a wrong solution: the arguments of its test} of a module with a list WRONG."""
    table = {}
    for parameter in module.WRONG:
        solution = parameter.values[-2]
        table[solution.__name__] = parameter.values
    return table


def message(number, program):
    """The last line that the grader prints for a wrong program, without "exercise N: "."""
    with pytest.MonkeyPatch.context() as patch:
        if number == 5:
            name = "attention" if "almost" in program.__qualname__ else "plain_loss"
            return test_grader_model.first_failure(patch, name, program)
        if number < 5:
            _, name, solution, _ = entries(test_grader)[program]
            return test_grader.grade(patch, number, {name: solution}).words[0]
        _, solution, _ = entries(test_grader_evals)[program]
        return test_grader_evals.grade(patch, number, solution).words[0]


def rough(line):
    """The line without its decimals, which other versions of the libraries may change."""
    return re.sub(r"-?\d+\.\d+", "#", line)


def row(number, description, words):
    return f"| {number} | {description} | {words} |"


@pytest.mark.parametrize("number,description,program", ROWS, ids=[words for _, words, _ in ROWS])
def test_the_row_is_what_the_grader_says(number, description, program):
    expected = row(number, description, message(number, program))
    assert rough(expected) in [rough(line) for line in ANSWERS.read_text().splitlines()], \
        "docs/ANSWERS.md is out of date: PYTHONPATH=. python tests/test_answers.py prints its table"


def test_there_are_no_other_rows():
    known = {(str(number), description) for number, description, _ in ROWS}
    lines = [line.split(" | ") for line in ANSWERS.read_text().splitlines() if line.startswith("| ")]
    seen = {(cells[0].removeprefix("| "), cells[1]) for cells in lines if cells[0][2:].isdigit()}
    assert seen == known


if __name__ == "__main__":
    print("| | the program | the last line says |\n|---|---|---|")
    for number, description, program in ROWS:
        print(row(number, description, message(number, program)))
