"""
report.py: its errors against references of their own and simulations. compare.py: its bookkeeping with
scripts that are played here, and small runs of the real ones.

    pytest tests/test_compare.py
"""
import argparse
import ast
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import compare
import flags
import glue_data
import report

ROOT = Path(__file__).parents[1]

# -----------------------------------------------------------------------------
# Both errors and the rule


def documents(rng, n, mean):
    """Nats and tokens of n documents of very different lengths, each with its own level: clusters."""
    tokens = rng.integers(1, 40, size=n) * 10
    level = rng.normal(mean, 0.5, size=n)
    return {"nats": (tokens * level).tolist(), "tokens": tokens.tolist()}


def test_the_error_of_a_perplexity_is_that_of_the_ratio_estimator():
    """Linearised by hand: mean nats = sum nats / sum tokens over documents of unequal length."""
    measured = documents(np.random.default_rng(1), 200, 3.0)
    nats, tokens = np.array(measured["nats"]), np.array(measured["tokens"])
    values = report.resample_perplexity(measured)
    assert values[0] == pytest.approx(nats.sum() / tokens.sum(), rel=1e-12)

    residual = nats - values[0] * tokens
    expected = residual.std(ddof=1) / tokens.mean() / math.sqrt(200)
    assert values[1:].std(ddof=1) == pytest.approx(expected, rel=0.12)


def test_a_difference_of_perplexities_is_paired_by_document():
    """What two models share, easy and hard documents, is no error of their difference."""
    rng = np.random.default_rng(2)
    a = documents(rng, 100, 3.0)
    tokens = np.array(a["tokens"])
    own = rng.normal(0.1, 0.05, size=100)                   # nats per token by which b is worse, per document
    b = {"tokens": a["tokens"], "nats": (np.array(a["nats"]) + own * tokens).tolist()}
    found = report.errors([report.resample_perplexity(b) - report.resample_perplexity(a)])

    mean = (own @ tokens) / tokens.sum()
    expected = ((own - mean) * tokens).std(ddof=1) / tokens.mean() / 10
    assert found["mean"] == pytest.approx(mean)
    assert found["se_test"] == pytest.approx(expected, rel=0.12)
    assert found["se_seeds"] is None and found["shown"] is None, "one seed says nothing about seeds"


def test_seeds_share_their_test_documents():
    """More seeds do not make the test set larger: what all seeds have in common stays in the error."""
    rng = np.random.default_rng(6)
    tokens = np.full(80, 10)
    shared = rng.normal(0.1, 0.3, size=80)                  # per document, the same in every seed
    own = rng.normal(0, 0.3, size=(4, 80))                  # per document and seed
    differences = [report.resample_perplexity({"nats": 10 * (shared + noise), "tokens": tokens})
                   for noise in own]                        # from a model that loses nothing
    expected = (shared + own.mean(axis=0)).std(ddof=1) / math.sqrt(80)
    assert report.errors(differences)["se_test"] == pytest.approx(expected, rel=0.12)


@pytest.mark.parametrize("metric", ["accuracy", "Matthews", "F1"])
def test_the_error_of_a_probe_is_a_paired_bootstrap_over_groups(metric):
    """Against a brute-force bootstrap that repeats whole groups, with random numbers of its own."""
    rng = np.random.default_rng(3)
    groups = np.sort(rng.integers(40, size=300)) * 7        # numbers need not be consecutive
    true = rng.integers(2, size=300)
    group = np.unique(groups, return_inverse=True)[1]
    a = np.where(rng.random(300) < 0.2, 1 - true, true)
    b = np.where((rng.random(41) < 0.3)[group], 1 - a, a)   # other answers in whole groups
    test = {"labels": digits(true), "groups": groups.tolist()}
    x, y = [report.resample_probe({"metric": metric, "predictions": digits(p)}, test) for p in (a, b)]
    found = report.errors([x - y])

    of = glue_data.METRICS[metric]
    assert found["mean"] == pytest.approx(100 * (of(a, true) - of(b, true)))
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    drawn = []
    for _ in range(1500):
        chosen = rng.integers(len(members), size=len(members))
        index = np.concatenate([members[i] for i in chosen])
        drawn.append(100 * (of(a[index], true[index]) - of(b[index], true[index])))
    assert found["se_test"] == pytest.approx(np.std(drawn), rel=0.12)


def digits(values):
    return "".join(np.base_repr(value, 36).lower() for value in values)


def test_a_gain_is_paired_too():
    """Model and embeddings are right on the same examples: where they agree, the gain has no error."""
    run = {"measurements": {
        "t": {"test": "t", "metric": "accuracy", "predictions": "0110"},
        "t: e": {"test": "t", "metric": "accuracy", "predictions": "0110", "baseline": True},
        "t: gain": {"test": "t", "of": "t", "minus": "t: e"}}}
    samples = report.resample_run(run, {"t": {"labels": "0101", "groups": None}})
    assert samples["t"][0] == 50 and samples["t"].std() > 10
    assert not samples["t: gain"].any()


def test_scores_are_decoded_as_they_are():
    assert report.decode([0.5, 2.25]).tolist() == [0.5, 2.25]
    assert report.decode("09az").tolist() == [0, 9, 10, 35]


def test_shown_needs_one_sign_and_both_errors():
    by_seed = np.array([1.0, 1.1, 0.9])                     # se over seeds .058, times 4.30: .248
    assert report.is_shown(by_seed, se_test=0.4)
    assert report.is_shown(-by_seed, se_test=0.4)
    assert not report.is_shown(by_seed, se_test=0.5), "hypot(.248, 1.0) > 1"
    assert not report.is_shown(np.array([1.0, 3.0, 0.5]), se_test=0.0), "2 se over seeds would pass this"
    assert not report.is_shown(np.zeros(3), se_test=0.0)
    many = np.array([5.0] * 9 + [-0.1])
    assert not report.is_shown(many, se_test=0.1), "another sign in one seed"


@pytest.mark.parametrize("seeds", [2, 3, 5, 12])
@pytest.mark.parametrize("test_share", [0.0, 0.5, 1.0])
def test_of_no_difference_at_most_one_in_twenty_is_shown(seeds, test_share):
    """Noise of variance 1 in the mean: of the seeds, the test set, or half of each."""
    rng = np.random.default_rng(4)
    sd_seeds = math.sqrt((1 - test_share) * seeds)
    shown = 0
    for _ in range(4000):
        by_seed = rng.normal(0, sd_seeds, size=seeds) + rng.normal(0, math.sqrt(test_share))
        shown += report.is_shown(by_seed, math.sqrt(test_share))
    assert shown / 4000 < 0.06                              # 3 standard errors above 5 %


def test_the_whole_chain_on_data_without_a_difference(monkeypatch):
    """From documents to verdict: two settings whose runs differ by noise of documents and of seeds only."""
    monkeypatch.setattr(glue_data, "RESAMPLES", 60)
    rng = np.random.default_rng(5)
    tokens = np.full(30, 100)
    shown = {0.0: 0, 0.1: 0}
    for difference in shown:
        for _ in range(200):
            differences = []
            per_document = rng.normal(0, 0.05, size=30)     # the same for all seeds: of the two settings
            for _ in range(3):
                a = 3 + difference + per_document + rng.normal(0, 0.01) + rng.normal(0, 0.02, size=30)
                x, y = [report.resample_perplexity({"tokens": tokens, "nats": tokens * nats})
                        for nats in (a, np.full(30, 3.0))]
                differences.append(x - y)
            shown[difference] += report.errors(differences)["shown"]
    assert shown[0.0] / 200 < 0.08 and shown[0.1] / 200 > 0.9, shown

# -----------------------------------------------------------------------------
# Tables


def perplexity(value, nats=(3.0, 4.0), test="val"):
    return {"value": value, "test": test, "nats": [10 * n for n in nats], "tokens": [10, 10]}


def runs_of(**values):
    """{setting: {seed: {measurement: number}}} -> runs as in compare.json."""
    return {setting: {seed: {"measurements": measured} for seed, measured in by_seed.items()}
            for setting, by_seed in values.items()}


def cells(text):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]


def test_table_has_mean_least_and_greatest():
    runs = runs_of(ar={"0": {"perplexity, all": perplexity(40.0)},
                       "1": {"perplexity, all": perplexity(60.0)}},
                   mlm={"0": {"perplexity, all": perplexity(400.0),
                              "perplexity, all, masks as in training": perplexity(200.0)}})
    rows = cells(report.table(runs))
    assert rows[0] == ["", "ar", "mlm"]
    assert ["perplexity, all", "50.0 [40.0, 60.0]", "400"] in rows
    assert ["perplexity, all, masks as in training", "-", "200"] in rows


def test_differences_are_of_runs_with_the_same_seed():
    name = "perplexity, all"
    runs = runs_of(ar={"0": {name: perplexity(0, (1, 1))}, "1": {name: perplexity(0, (2, 2))}},
                   vlm={"1": {name: perplexity(0, (5, 5))}, "0": {name: perplexity(0, (3, 3))},
                        "2": {name: perplexity(0, (9, 9))}})
    [found] = report.find_differences(runs, {}, ["ar"])
    assert sorted(found["by_seed"]) == [2, 3] and found["mean"] == 2.5
    assert (found["setting"], found["against"]) == ("vlm", "ar")
    [row] = cells(report.difference_table([found]))[2:]
    assert row[:3] == ["vlm / ar", "perplexity, all, ratio", "12.182 [7.389, 20.086]"]


def test_masks_as_in_training_are_compared_with_the_only_perplexity_of_others():
    plain, matched = "perplexity, all", "perplexity, all, masks as in training"
    runs = runs_of(ar={"0": {plain: perplexity(0, (1, 1))}}, vlm={"0": {plain: perplexity(0, (2, 2))}},
                   mlm={"0": {plain: perplexity(0, (4, 4)), matched: perplexity(0, (3, 3))}})
    found = {(d["setting"], d["against"], d["measurement"]): d["mean"]
             for d in report.find_differences(runs, {}, ["ar", "mlm"])}
    assert found["mlm", "ar", plain] == 3 and found["mlm", "ar", matched] == 2
    assert found["vlm", "mlm", plain] == -2 and found["vlm", "mlm", matched] == -1
    assert ("ar", "mlm", plain) not in found and ("vlm", "ar", matched) not in found


def test_a_causal_model_is_compared_with_a_masked_one_on_the_same_tokens():
    """Its exact perplexity is no part of it: on a sample other tokens are scored."""
    def result(suffix, nats, sample):
        found = {"perplexity": math.exp(nats)}
        return {"text": "val", "text_sha256": "abc", "method": "left-to-right", "suffix": suffix, "samples": 2,
                "prompt_lengths": {}, "context": {},
                "unigram": None, "documents": {"windows": [1]}, "all": found,
                "sample": None if sample is None else {"perplexity": math.exp(sample)},
                "nats": {"all": [10 * nats], "sample": [10 * (sample or 0)]},
                "tokens": {"all": [10], "sample": [10]}}

    tests = {}
    ar = report.perplexities(result(None, 3.0, 2.5), tests)
    dar = report.perplexities(result(None, 3.5, 2.5), tests)
    mlm = report.perplexities(result("full", 4.0, None), tests)
    mlm |= report.perplexities(result("matched", 3.75, None), tests)
    runs = runs_of(ar={"0": ar}, dar={"0": dar}, mlm={"0": mlm})
    found = {(d["setting"], d["measurement"]): d["mean"] for d in report.find_differences(runs, tests, ["ar"])}
    assert found == {("dar", "perplexity, all"): 0.5, ("dar", "perplexity, all, sampled"): 0,
                     ("mlm", "perplexity, all, sampled"): 1.5,
                     ("mlm", "perplexity, all, sampled, masks as in training"): 1.25}
    assert mlm["perplexity, all, sampled"]["test"] == ar["perplexity, all, sampled"]["test"]
    assert mlm["perplexity, all, sampled"]["test"] != ar["perplexity, all"]["test"]


def test_context_is_compared_on_the_tokens_that_all_contexts_share():
    def result(samples, nats):
        found = {m: {"perplexity": math.exp(value)} for m, value in nats.items()}
        scored = {f"context {m}": [10 * value] for m, value in nats.items()}
        return {"text": "val", "text_sha256": "abc", "method": "left-to-right", "suffix": "full",
                "samples": samples, "prompt_lengths": {}, "context": found, "unigram": None,
                "documents": {"windows": [1]}, "all": {"perplexity": 1.0}, "nats": {"all": [0], **scored},
                "tokens": {"all": [10], **{name: [10] for name in scored}}}

    tests = {}
    mlm = report.perplexities(result(8, {"4": 3.0, "all": 2.0}), tests)
    vlm = report.perplexities(result(8, {"4": 3.5, "all": 1.5}), tests)
    more = report.perplexities(result(16, {"4": 3.5, "all": 1.5}), tests)
    runs = runs_of(mlm=dict.fromkeys("01", mlm), vlm=dict.fromkeys("01", vlm), more=dict.fromkeys("01", more))
    found = {(d["setting"], d["measurement"]): d for d in report.find_differences(runs, tests, ["mlm"])}
    assert found["vlm", "perplexity, 4 tokens visible"]["mean"] == 0.5
    assert found["vlm", "perplexity, all tokens visible"]["mean"] == -0.5
    assert found["vlm", "perplexity, 4 tokens visible"]["se_test"] is not None
    assert found["more", "perplexity, 4 tokens visible"]["se_test"] is None         # other tokens


def test_what_context_is_worth_is_a_difference_of_nats():
    """Documents of 10 and 30 tokens, and visible lengths in another order than theirs."""
    nats = {"16": [20.0, 90.0], "4": [30.0, 90.0], "all": [10.0, 60.0]}             # sums, per document
    found = {m: {"perplexity": math.exp(sum(values) / 40)} for m, values in nats.items()}
    scored = {f"context {m}": values for m, values in nats.items()}
    result = {"text": "val", "text_sha256": "abc", "method": "left-to-right", "suffix": "matched",
              "samples": 8, "prompt_lengths": {}, "context": found, "unigram": None,
              "documents": {"windows": [1, 1]}, "all": {"perplexity": 1.0}, "nats": {"all": [0, 0], **scored},
              "tokens": {"all": [10, 30], **{name: [10, 30] for name in scored}}}
    measured = report.perplexities(result, {})
    gains = {name: value for name, value in measured.items() if name.startswith("gain")}
    expected = {"from 4 to 16": 0.25, "from 16 to all": 1.0, "from 4 to all": 1.25}
    assert {name: round(value["value"], 9) for name, value in gains.items()} == {
        f"gain in nats, {step} tokens visible, masks as in training": nats for step, nats in expected.items()}

    # The same resamples of the two documents for both of its ends: 1 and 0 nats in them, or their mean
    run = {"measurements": measured}
    resampled = report.resample_run(run, {})["gain in nats, from 4 to 16 tokens visible, masks as in training"]
    assert resampled[0] == pytest.approx(0.25) and set(resampled.round(6)) == {0, 0.25, 1}

    # A table of nats, with three digits and one unit
    def cells(table):
        rows = [line.strip("|").split("|") for line in table.splitlines() if "from 4 to 16" in line]
        return [[cell.strip() for cell in row[:3]] for row in rows]

    runs = {"mlm": {"0": run}, "vlm": {"0": run}}
    name = "gain in nats, from 4 to 16 tokens visible, masks as in training"
    assert cells(report.table(runs)) == [[name, "0.250", "0.250"]]
    assert cells(report.difference_table(report.find_differences(runs, {}, ["mlm"]))) == [
        ["vlm - mlm", name, "0.000"], ["mlm", name, "0.250"], ["vlm", name, "0.250"]]


def test_another_method_is_another_measurement():
    """Pseudo-perplexity is no likelihood: it must not stand in the row of causal models."""
    result = {"text": "val", "text_sha256": "abc", "method": "pseudo", "suffix": None, "samples": 8,
              "prompt_lengths": {}, "context": {}, "unigram": None, "sample": None,
              "documents": {"windows": [1]}, "all": {"perplexity": 2.0},
              "nats": {"all": [1.0]}, "tokens": {"all": [1]}}
    assert list(report.perplexities(result, {})) == ["perplexity, pseudo"]
    assert list(report.perplexities({**result, "method": "left-to-right"}, {})) == ["perplexity, all"]


def test_a_setting_that_its_objective_ignores_is_refused(scripts, capsys):
    with pytest.raises(SystemExit) as stop:
        compare.main(["--runs", "ar", "vlm --mask_ratio 0.3"])
    assert stop.value.code == 2 and scripts.commands == []
    assert "--mask_ratio has no effect on vlm" in capsys.readouterr().err


def test_another_text_is_not_judged():
    name = "perplexity, all"
    runs = runs_of(ar={seed: {name: perplexity(0, (1, 1))} for seed in "01"},
                   vlm={seed: {name: perplexity(0, (9, 9), test="other")} for seed in "01"})
    [found] = report.find_differences(runs, {}, ["ar"])
    assert found["shown"] is None and found["se_test"] is None

# -----------------------------------------------------------------------------
# Bookkeeping, with scripts that are played by `Scripts`


class Scripts:
    """Stands in for compare.call: does in no time what the scripts do, and remembers the commands."""
    def __init__(self):
        self.commands = []
        self.stop_after = None

    def __call__(self, words, args):
        if len(self.commands) == self.stop_after:
            raise ValueError("stopped here")
        self.commands.append(" ".join(words))
        play = {"train.py": self.train, "eval_ppl.py": self.eval_ppl, "eval_glue.py": self.eval_glue,
                "spectrum.py": self.spectrum}
        play[words[0]](words)

    def train(self, words):
        # The flags in force
        options = flags.build_parser().parse_args(words[1:])
        folder = Path(options.out_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if options.resume:
            options = json.loads((folder / "config.json").read_text())["train"]
        else:
            flags.fill_preset(options, "cpu")
            options = vars(options)

        # Config, weights that depend on the flags, log
        meta = Path(options["data_dir"], options["dataset"], "meta.json")
        dataset = {"meta": common.file_sha256(meta)} if meta.exists() else {}
        (folder / "config.json").write_text(json.dumps(
            {"model": {}, "train": options, "sources": common.source_digests(), "dataset": dataset}))
        generator = torch.Generator().manual_seed(options["seed"] + options["lookahead"])
        self.save(folder, torch.rand(3, generator=generator), options["max_iters"])
        (folder / "log.jsonl").write_text('{"step": 1, "tokens": 100, "val_loss": 7.0}\n'
                                          'half a li\n'
                                          '{"step": 2, "tokens": 200, "val_loss": 6.5}\n')

    def save(self, folder, weights, step):
        torch.save({"model": {"w": weights}, "optimizer": [], "step": step}, folder / "ckpt.pt")

    def loaded(self, words):
        folder = Path(words[words.index("--checkpoint") + 1])
        state = torch.load(folder / "ckpt.pt")
        head = {"weights": common.weights_digest(state["model"]), "step": state["step"],
                "command": " ".join(["python", *words])}
        return folder, head, state["model"]["w"][0].item()

    def eval_ppl(self, words):
        folder, head, level = self.loaded(words)
        suffix = "matched" if "matched" in words else None
        result = {"perplexity": 100 * level}
        lengths = ["1", "2", "8", "64"]
        saved = {**head, "text": "val", "text_sha256": "abc", "method": "left-to-right", "suffix": suffix,
                  "all": result, "sample": None, "samples": 8,
                  "prompt_lengths": {k: {"perplexity": 1000 * level / int(k)} for k in lengths}, "context": {},
                  "unigram": {"nats_per_token": 6.3, "perplexity": 544.6},
                  "documents": {"windows": [1, 2, 1], "bytes": [50, 90, 40], "words": [9, 19, 8]},
                  "nats": {k: [100.12345 + level, 210.0, 95 * level] for k in [*lengths, "all"]},
                  "tokens": {k: [30, 60, 30] for k in [*lengths, "all"]}}
        common.write_result(folder / f"eval_ppl_val_left-to-right{'-matched' if suffix else ''}.json", saved)

    def eval_glue(self, words):
        folder, head, level = self.loaded(words)
        rows = []
        predictions = "0011" if level > 0.5 else "0001"
        for pool in ("mean", "max"):
            rows.append({"task": "stdlib-pair", "metric": "accuracy", "pool": pool, "layer": None,
                         "directions": None, "protocol": "probe", "max_train": 0, "command": head["command"],
                         "model": {"value": 0.75, "se": 0.1, "predictions": predictions},
                         "embeddings": {"value": 0.5, "se": 0.1, "predictions": "0110"}})
        common.write_result(folder / "eval_glue.json",
                            {**head, "results": rows,
                             "tests": {"stdlib-pair": {"labels": "0010", "groups": [0, 0, 1, 2]}}})

    def spectrum(self, words):
        folder, head, level = self.loaded(words)
        common.write_result(folder / "spectrum.json",
                            {**head, "contexts": 8192, "seed": 0, "chi2": 100 * level, "chi2_limit": 110 * level,
                             "hitting": None, "singular_values": [1.0, level, level / 2]})


@pytest.fixture
def scripts(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(glue_data, "RESAMPLES", 20)
    played = Scripts()
    monkeypatch.setattr(compare, "call", played)
    return played


def run(*words):
    """compare.main; returns compare.json."""
    compare.main(["--seeds", "0", "--max_iters", "3", *words])
    return json.loads(Path("out/compare/compare.json").read_text())


def refused(capsys, *words):
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        run(*words)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    return error


def scripts_of(commands):
    return [command.split()[0] for command in commands]


def test_every_setting_is_trained_and_evaluated_in_a_folder_with_its_name(scripts, capsys):
    saved = run("--runs", "ar", "dar --lookahead 4", "vlm  --mask_range 0.4 0.6", "--train", "--n_embd 64")
    assert list(saved["runs"]) == ["ar", "dar --lookahead 4", "vlm --mask_range 0.4 0.6"]
    assert sorted(p.name for p in Path("out/compare").iterdir()) == [
        "ar-0", "compare.json", "dar-lookahead-4-0", "vlm-mask_range-0.4-0.6-0"]
    assert scripts.commands[0] == ("train.py --preset tiny --max_iters 3 --n_embd 64 --objective ar --seed 0 "
                                   "--out_dir out/compare/ar-0")
    # vlm with at most 60 % of masks is scored with as few too; causal models have none
    assert scripts_of(scripts.commands) == [*(["train.py", "eval_ppl.py", "eval_glue.py"] * 2), "train.py",
                                            "eval_ppl.py", "eval_ppl.py", "eval_glue.py"]
    assert scripts.commands[-2].endswith("--suffix matched")
    out = capsys.readouterr().out
    assert "[1 of 10, time left: known once each script has run] python train.py" in out
    assert "[4 of 10, about 0 min left]" in out
    assert report.RULE in out and out.index(report.RULE) < out.index("verdict")
    assert "perplexity, word frequencies alone" in out


def test_a_setting_of_its_own_number_of_updates(scripts):
    saved = run("--runs", "ar --max_iters 7", "mlm")
    assert [run["0"]["step"] for run in saved["runs"].values()] == [7, 3]
    matched = [command for command in scripts.commands if command.endswith("matched")]
    assert len(matched) == 1 and "mlm-0" in matched[0]


def test_what_is_finished_is_kept_and_said(scripts, capsys):
    first = run("--runs", "ar", "mlm")
    done = len(scripts.commands)
    capsys.readouterr()
    assert run("--runs", "ar", "mlm") == first
    assert len(scripts.commands) == done
    out = capsys.readouterr().out
    kept = "train.py, eval_ppl.py, eval_ppl.py --suffix matched, eval_glue.py"
    assert f"kept {Path('out/compare/mlm-0')}: {kept}\n" in out
    run("--runs", "ar", "mlm", "vlm", "--seeds", "0", "1")          # extended
    assert len(scripts.commands) == done + 3 + 10


def test_an_interrupted_comparison_resumes(scripts, capsys):
    scripts.stop_after = 2
    assert "stopped here" in refused(capsys, "--runs", "ar", "vlm")
    scripts.stop_after = None
    run("--runs", "ar", "vlm")
    assert scripts_of(scripts.commands) == ["train.py", "eval_ppl.py", "eval_glue.py", "train.py",
                                            "eval_ppl.py", "eval_glue.py"]
    # A training that was stopped on its way, which leaves the results of the old weights worthless
    folder = Path("out/compare/vlm-0")
    scripts.save(folder, torch.zeros(3), step=1)
    scripts.commands.clear()
    run("--runs", "ar", "vlm")
    assert scripts.commands[0] == f"train.py --resume --out_dir {folder}"
    assert scripts_of(scripts.commands) == ["train.py", "eval_ppl.py", "eval_glue.py"]


def test_a_result_counts_for_its_weights_and_command_and_when_it_was_completed(scripts):
    run("--runs", "ar", "vlm")
    folder = Path("out/compare/vlm-0")

    def again():
        scripts.commands.clear()
        saved = run("--runs", "ar", "vlm")
        return scripts_of(scripts.commands), saved

    # Other weights, same step
    scripts.save(folder, torch.tensor([0.25, 0, 0]), step=3)
    commands, saved = again()
    assert commands == ["eval_ppl.py", "eval_glue.py"]
    assert saved["runs"]["vlm"]["0"]["measurements"]["perplexity, all"]["value"] == 25

    # Another command by hand
    scripts(["eval_glue.py", "--checkpoint", str(folder), "--tasks", "RTE"], None)
    assert again()[0] == ["eval_glue.py"]

    # A report that was written, but the command did not end: eval_glue.py writes after every task
    (folder / "finished.json").unlink()
    assert again()[0] == ["eval_ppl.py", "eval_glue.py"]

    # Numbers by an older eval_glue.py
    finished = json.loads((folder / "finished.json").read_text())
    for entry in finished.values():
        entry[1]["probe.py"] = "other"
    (folder / "finished.json").write_text(json.dumps(finished))
    assert again()[0] == ["eval_ppl.py", "eval_glue.py"]
    assert again()[0] == []


def test_other_code_is_refused_by_name(scripts, capsys, monkeypatch):
    run("--runs", "ar", "vlm")
    edited = {**common.source_digests(), "objectives.py": "edited"}
    digests = lambda names=None: {name: "e" for name in names} if names else edited         # noqa: E731
    monkeypatch.setattr(compare, "source_digests", digests)
    error = refused(capsys, "--runs", "ar", "vlm")
    assert "another objectives.py" in error and "model.py" not in error and "--overwrite" in error

    # --overwrite trains again; then all is kept
    monkeypatch.setattr(common, "source_digests", digests)
    scripts.commands.clear()
    run("--runs", "ar", "vlm", "--overwrite")
    assert scripts_of(scripts.commands).count("train.py") == 2 and "--overwrite" in scripts.commands[0]
    done = len(scripts.commands)
    run("--runs", "ar", "vlm", "--overwrite")
    assert len(scripts.commands) == done


def test_code_that_changes_while_the_comparison_runs_is_noticed(scripts, capsys, monkeypatch):
    train = scripts.train

    def edit_then_train(words):
        train(words)
        if "vlm" in words:
            monkeypatch.setattr(compare, "source_digests",
                                lambda names=None: {**common.source_digests(), "objectives.py": "edited"})
    scripts.train = edit_then_train
    assert "it changed while this comparison ran" in refused(capsys, "--runs", "ar", "vlm")
    assert not Path("out/compare/compare.json").exists()


def test_a_run_without_digests_is_taken_as_made_by_other_code(scripts, capsys):
    run("--runs", "ar")
    path = Path("out/compare/ar-0/config.json")
    config = json.loads(path.read_text())
    del config["sources"]
    path.write_text(json.dumps(config))
    assert "by code that its config.json does not name" in refused(capsys, "--runs", "ar")


def test_another_dataset_is_refused(scripts, capsys):
    meta = Path("data/stdlib/meta.json")
    meta.parent.mkdir(parents=True)
    meta.write_text("one")
    run("--runs", "ar")
    meta.write_text("another")
    assert f"{meta} has changed" in refused(capsys, "--runs", "ar")


@pytest.mark.parametrize("words, said", [(["--max_iters", "4"], "max_iters 3, not 4"),
                                         (["--train", "--weight_decay 0.5"], "weight_decay 0.1, not 0.5")])
def test_other_flags_are_refused(scripts, capsys, words, said):
    run("--runs", "ar")
    assert said in refused(capsys, "--runs", "ar", *words)


@pytest.mark.parametrize("words, said", [
    (["--runs", "gpt"], "must begin with one of ar, dar, mlm, vlm"),
    (["--runs", "ar", "dar --lookahed 2"], "--lookahed"),
    (["--runs", "ar", "mlm --mask_ratio 2"], "mask_ratio must be in (0, 1]"),
    (["--runs", "ar --seed 3"], "--seed is chosen by compare.py"),
    (["--runs", "ar", "vlm", "ar"], "twice"),
    (["--runs", "ar", "--eval_glue", "--tasks nope"], "nope"),
    (["--runs", "ar", "--against", "dar"], "--against 'dar' is not one of the runs"),
    (["--runs", "ar", "--jobs", "0"], "jobs"),
    (["--runs", "ar", "--eval_ppl", "--val --checkpoint out/x"], "eval_ppl.py: --checkpoint and --results are"),
    (["--runs", "ar", "--eval_glue", "--results out/x"], "eval_glue.py: --checkpoint and --results are"),
    (["--runs", "ar", "--eval_ppl", "--val --samples 0"], "samples"),
    (["--runs", "ar", "--eval_glue", "--tasks stdlib --max_train 5"], "max_train"),
    (["--runs", "mlm", "ar", "--eval_ppl", "--val --method bound"], "ar is causal, it cannot fill masks"),
    (["--runs", "ar", "--eval_ppl", "--val --prompt_lengths 128"], "must fit into block_size 128"),
    (["--runs", "ar", "--eval_glue", "--tasks stdlib --layer 9"], "ar has 4 blocks: --layer can be 0 to 4"),
    (["--runs", "ar --obj mlm"], "unrecognized arguments: --obj mlm"),
    (["--runs", "ar", "--spectrum", "--contexts 3"], "--contexts")])
def test_wrong_settings_are_refused_before_any_run(scripts, capsys, words, said):
    assert said in refused(capsys, *words)
    assert not scripts.commands


def test_evaluations_can_be_left_out(scripts):
    saved = run("--runs", "ar", "vlm", "--eval_ppl", "--val", "--eval_glue", "none")
    assert scripts_of(scripts.commands) == ["train.py", "eval_ppl.py"] * 2
    assert all("perplexity" in d["measurement"] for d in saved["differences"])
    run("--runs", "ar", "vlm", "--eval_ppl", "none")
    assert scripts_of(scripts.commands)[4:] == ["eval_glue.py"] * 2


@pytest.mark.parametrize("flags, times", [("--val", 2), ("--val --method bound", 1),
                                          ("--val --suffix matched", 1), ("--val --suffix one", 2)])
def test_perplexity_is_measured_with_fewer_masks_where_that_is_another_number(scripts, flags, times):
    """Once more for a model that saw fewer in training, unless the two would write one and the same file."""
    args = compare.build_parser().parse_args(["--runs", "mlm", f"--eval_ppl={flags}", "--eval_glue", "none"])
    [job] = compare.make_jobs(compare.check(args), argparse.Namespace(seeds=[0], out_dir="out"))
    commands = compare.evaluations(job, args)
    assert len(commands) == times and [words[-1] for words in commands[1:]] == ["matched"] * (times - 1)


def test_the_preset_may_be_auto(scripts):
    saved = run("--runs", "ar", "--train", "--preset auto --device cpu --dataset toy")
    assert json.loads(Path("out/compare/ar-0/config.json").read_text())["train"]["n_layer"] == 4
    assert saved["runs"]["ar"]["0"]["step"] == 3


def test_errors_can_be_redone_from_compare_json_which_is_small(scripts):
    saved = run("--seeds", "0", "1", "2")
    text = Path("out/compare/compare.json").read_text()
    assert report.find_differences(saved["runs"], saved["tests"], ["ar"]) == saved["differences"]
    assert "\n" in text and "[ 100.7" in text, "one key per line, but a list in one line"
    measured = saved["runs"]["vlm"]["2"]["measurements"]["perplexity after 8"]
    assert len(str(measured["nats"][0]).split(".")[1]) <= 3
    assert set(saved) >= {"flags", "commit", "dirty", "python", "torch", "sources", "rule", "runs", "tests", "differences"}
    assert saved["runs"]["ar"]["0"]["weights"]


def test_a_failing_command_keeps_what_others_finished(scripts, capsys):
    train = scripts.train

    def fail(words):
        if "mlm" in words:
            raise ValueError("python train.py failed: error: n_head")
        train(words)
    scripts.train = fail
    assert "n_head" in refused(capsys, "--jobs", "2")
    assert Path("out/compare/ar-0/finished.json").exists()


@pytest.mark.slow
def test_figures_need_no_training(scripts, capsys):
    pytest.importorskip("matplotlib")
    run("--seeds", "0", "1")
    done = len(scripts.commands)
    run("--seeds", "0", "1", "--plot", "a.png", "--curves", "b.png")
    assert len(scripts.commands) == done
    assert Path("a.png").read_bytes().startswith(b"\x89PNG") and Path("b.png").stat().st_size > 5000
    run("--seeds", "0", "1", "--eval_ppl", "none", "--plot", "a.svg")
    run("--seeds", "0", "1", "--eval_glue", "none", "--plot", "a.svg")


@pytest.mark.parametrize("words", [
    ["--seeds", "0", "--runs", "ar"],                                   # one seed, one setting: no difference
    ["--seeds", "0", "--runs", "ar", "--eval_glue", "none"],
    ["--seeds", "0", "--eval_ppl", "none"],
    ["--seeds", "0", "1", "--runs", "mlm", "--eval_ppl", "none", "--eval_glue", "none"]])
def test_figures_of_what_there_is(scripts, words):
    pytest.importorskip("matplotlib")
    run(*words, "--plot", "a.png", "--curves", "b.png")
    assert Path("a.png").read_bytes().startswith(b"\x89PNG") and Path("b.png").stat().st_size > 5000


def test_figures_where_one_setting_lacks_a_measurement(tmp_path):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    probe = {"test": "t", "metric": "accuracy", "predictions": "0110"}
    measured = {"perplexity after 3": perplexity(40.0), "t": probe, "t: e": {**probe, "baseline": True},
                "t: gain over e": {"test": "t", "of": "t", "minus": "t: e"}}
    runs = {"ar": {"0": {"measurements": measured, "curve": [[1000, 5.0]]}},
            "mlm": {"0": {"measurements": {}, "curve": []}}}
    left, right = figure.subplots(1, 2)
    report.plot_perplexity(runs, left)
    differences = report.find_differences(runs, {"t": {"labels": "0101", "groups": None}}, ["ar"])
    report.plot_gains(runs, differences, right)
    assert [text.get_text() for text in left.texts] == ["ar"]
    assert right.get_legend_handles_labels()[1] == ["ar"]
    report.plot_curves(runs, {}, tmp_path / "a.svg")


def test_word_frequencies_of_another_text_are_no_level_of_the_validation_loss(tmp_path):
    pytest.importorskip("matplotlib")
    measured = {report.UNIGRAM: {"value": 544.6}}
    runs = {"ar": {"0": {"measurements": measured, "curve": [[1000, 5.0], [2000, 4.0]]}}}

    def drawn(test):
        report.plot_curves(runs, {test: {}}, tmp_path / "a.svg")
        return "word frequencies" in (tmp_path / "a.svg").read_text(encoding="utf-8")

    assert drawn("val 0123abcd") and not drawn("wikitext-2 0123abcd")


def test_a_command_that_fails_says_how_it_ended(monkeypatch, tmp_path):
    """By its error line; by its last line; by the signal, of which its output says nothing."""
    args = type("Args", (), {"jobs": 1})
    monkeypatch.setattr(compare, "HERE", tmp_path)

    def message(body):
        (tmp_path / "script.py").write_text(body)
        with pytest.raises(ValueError) as error:
            compare.call(["script.py", "--flag"], args)
        assert not compare.children
        return str(error.value).removeprefix("python script.py --flag failed ")

    assert message("print('error: no data'); print('bye'); raise SystemExit(2)") \
        == "(exit code 2): error: no data"
    assert message("print('half done'); raise SystemExit(1)") == "(exit code 1): half done"
    assert message("raise SystemExit(1)") == "(exit code 1): no output"
    if os.name == "posix":
        kill = "import os, signal; print('half done', flush=True); os.kill(os.getpid(), signal.{})"
        assert message(kill.format("SIGKILL")) \
            == "(ended by a signal: Killed, perhaps for lack of memory): half done"
        crash = message(kill.format("SIGSEGV"))
        assert crash.startswith("(ended by a signal: Segmentation fault") and "Fatal Python error" in crash


@pytest.mark.parametrize("jobs", [1, 2])
def test_after_a_failure_nothing_else_is_begun(monkeypatch, jobs):
    """The second run fails, with two jobs while the first is at work. Its evaluation is not begun either."""
    begun = []
    first_began = threading.Event()
    second_fails = threading.Event()

    def call(words, args):
        begun.append(words[1])
        if words[1] == "a":
            first_began.set()
            if jobs == 2:
                assert second_fails.wait(60)
                time.sleep(0.5)
        if words[1] == "b":
            assert first_began.wait(60)
            second_fails.set()
            raise ValueError("b fails")
    monkeypatch.setattr(compare, "call", call)
    plans = [(None, [compare.Command(["train.py", name], 1)]) for name in "bcdef"]
    plans.insert(0, (None, [compare.Command(["train.py", "a"], 1)]))
    plans[1][1].append(compare.Command(["train.py", "b2"], 1))
    with pytest.raises(ValueError, match="b fails"):
        compare.execute(plans, argparse.Namespace(jobs=jobs))
    assert sorted(begun) == ["a", "b"]


@pytest.mark.parametrize("words, reason", [
    (["--eval_ppl", "--text nope.txt"], "--text nope.txt does not exist"),
    (["--eval_ppl", "--val --data_dir nowhere"], "--data_dir nowhere does not exist"),
    (["--eval_ppl", "--val --device cuda:7"], "cuda"),
    (["--spectrum=--data_dir nowhere"], "--data_dir nowhere does not exist"),
    (["--eval_glue", "--tasks RTE --glue_dir nope"], "nope")])
def test_what_an_evaluation_needs_is_there_before_the_first_run(scripts, capsys, words, reason):
    assert reason in refused(capsys, "--runs", "ar", *words)
    assert scripts.commands == []


def test_an_evaluation_that_cannot_save_its_result_is_not_finished(monkeypatch, tmp_path):
    monkeypatch.setattr(compare, "HERE", tmp_path)
    (tmp_path / "eval_ppl.py").write_text("print('error: not saved: a.json\\na table'); raise SystemExit(2)")
    job = compare.Job(None, 0, tmp_path)
    args = type("Args", (), {"jobs": 1})
    with pytest.raises(ValueError, match="exit code 2.: error: not saved: a.json"):
        compare.execute([(job, [compare.Command(["eval_ppl.py"], 1)])], args)
    assert not (tmp_path / "finished.json").exists()


def test_no_matplotlib_is_said_before_any_run(scripts, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)      # importing it raises ImportError
    for flag in ("--plot", "--curves"):
        assert "pip install matplotlib" in refused(capsys, flag, "a.png")
    assert not scripts.commands


def imports(name):
    """The files of ours that a file imports."""
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
    return {f"{module}.py" for module in modules if (ROOT / f"{module}.py").exists()}


def test_sources_are_what_training_imports():
    """Every file of ours that train.py imports, directly or not; sample.py writes its last lines only."""
    found, new = set(), {"train.py"}
    while new:
        found |= new
        new = set().union(*(imports(name) for name in new)) - found - {"sample.py"}
    assert found == set(common.source_digests())


def test_evaluation_code_is_what_evaluations_import():
    """A number counts as finished for the code that measured it: no file of it may be forgotten."""
    found = {"eval_ppl.py", "eval_glue.py", "spectrum.py"}
    new = set(found)
    while new:
        new = set().union(*(imports(name) for name in new)) - found
        found |= new
    assert found - set(common.source_digests()) == set(compare.EVALUATION_CODE)
    assert not set(compare.EVALUATION_CODE) & set(common.source_digests())


def test_digest_of_weights():
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(1.0)}
    digest = common.weights_digest(state)
    assert digest == common.weights_digest(dict(reversed(state.items())))
    assert digest == common.weights_digest({"a": state["a"].T.contiguous().T, "b": state["b"]})
    others = [{**state, "b": torch.tensor(2.0)}, {**state, "a": state["a"].view(3, 2)},
              {**state, "a": state["a"].bfloat16()}]
    assert digest not in [common.weights_digest(other) for other in others]


def test_a_result_is_read_for_its_weights_only(tmp_path, capsys):
    path = tmp_path / "new" / "eval.json"
    common.write_result(path, {"weights": "a", "nats": [1, 2]})
    assert common.read_result(path, "a") == {"weights": "a", "nats": [1, 2]}
    assert common.read_result(path, "b") is None and common.read_result(tmp_path / "none", "a") is None
    path.write_text('{"weights": "a"')
    assert common.read_result(path, "a") is None
    (tmp_path / "file").write_text("")
    common.write_result(tmp_path / "file" / "eval.json", {})
    assert capsys.readouterr().err.startswith("error: not saved: ")

# -----------------------------------------------------------------------------
# The real scripts

TINY = ["--max_iters", "3", "--eval_ppl", "--val --max_windows 4",
        "--eval_glue", "--tasks stdlib-pair --max_train 40", "--train",
        "--dataset toy --n_layer 1 --n_embd 32 --n_head 2 --block_size 32 --compile off --device cpu"]


@pytest.fixture
def toy(tmp_path):
    """A copy of the code, which may be edited, beside a dataset. Returns a function that runs a script."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    for i in range(40):
        text = "\n".join(f"line {i * j % 97} of file {i}" for j in range(40))
        (tmp_path / f"{i}.txt").write_text(text)

    def script(*words):
        return subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})

    made = script("data.py", "--dataset", "toy", "--tokenizer", "bytes", "--val_fraction", "0.2", "--files",
                  *sorted(path.name for path in tmp_path.glob("*.txt")))
    assert made.returncode == 0, made.stderr
    return script


def commands_in(output):
    return [line.split("] ")[1].split()[1] for line in output.splitlines() if line.startswith("[")]


@pytest.mark.slow
def test_a_small_run_of_all_scripts_resumes_and_notices_edits(toy, tmp_path):
    command = ["compare.py", "--runs", "mlm", "--seeds", "0", *TINY]
    first = toy(*command)
    assert first.returncode == 0, first.stderr
    assert commands_in(first.stdout) == ["train.py", "eval_ppl.py", "eval_ppl.py", "eval_glue.py"]
    folder = tmp_path / "out/compare"
    saved = json.loads((folder / "compare.json").read_text())
    result = json.loads((folder / "mlm-0/eval_ppl_val_left-to-right-matched-4-windows.json").read_text())
    measured = saved["runs"]["mlm"]["0"]["measurements"]["perplexity, all, sampled, masks as in training"]
    assert measured["value"] == result["all"]["perplexity"]
    mean_nats = sum(measured["nats"]) / sum(measured["tokens"])
    assert mean_nats == pytest.approx(math.log(measured["value"]), abs=1e-3)
    probe = saved["runs"]["mlm"]["0"]["measurements"]["stdlib-pair, accuracy, mean, 40 examples"]
    test = saved["tests"][probe["test"]]
    assert 100 * np.mean(report.decode(probe["predictions"]) == report.decode(test["labels"])) \
        == pytest.approx(probe["value"])

    # As if stopped there
    (folder / "mlm-0/eval_glue.json").unlink()
    again = toy(*command)
    assert commands_in(again.stdout) == ["eval_glue.py"]
    assert again.stdout[again.stdout.index("\n| "):] == first.stdout[first.stdout.index("\n| "):]

    # Another number of updates, a wrong flag of train.py's own checks
    changed = toy(*command, "--max_iters", "4")
    assert changed.returncode == 2 and "max_iters 3, not 4" in changed.stderr
    failing = toy(*command, "--out_dir", "out/b", "--train", "--dataset toy --n_head 3")
    assert failing.returncode == 2 and failing.stderr.startswith("error: ") and "n_head" in failing.stderr

    # After an edit of objectives.py no old number is printed, before and after training again
    path = tmp_path / "objectives.py"
    text = path.read_text()
    assert "count = mask_count(options.mask_ratio, options.block_size)" in text
    path.write_text(text.replace("count = mask_count(options.mask_ratio, options.block_size)",
                                 "count = mask_count(0.1, options.block_size)"))
    edited = toy(*command)
    assert edited.returncode == 2 and "another objectives.py" in edited.stderr and "|" not in edited.stdout
    new = toy(*command, "--overwrite")
    assert new.returncode == 0, new.stderr
    assert commands_in(new.stdout) == commands_in(first.stdout)
    now = json.loads((folder / "compare.json").read_text())
    assert now["runs"]["mlm"]["0"]["weights"] != saved["runs"]["mlm"]["0"]["weights"]


@pytest.mark.slow
def test_two_settings_that_are_the_same_model_do_not_differ(toy, tmp_path):
    done = toy("compare.py", "--runs", "ar", "dar --lookahead 1", "--seeds", "0", "1", "--jobs", "2", *TINY,
               "--eval_glue", "none")
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "out/compare/compare.json").read_text())
    assert len(saved["differences"]) > 4
    for found in saved["differences"]:
        assert found["by_seed"] == [0, 0] and found["se_seeds"] == found["se_test"] == 0, found
        assert found["shown"] is False
    weights = [saved["runs"][name]["0"]["weights"] for name in saved["runs"]]
    assert weights[0] == weights[1]
