"""report.py as a script: the tables and figures of a finished comparison, from compare.json alone."""
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

import compare
import report
from test_compare import cells, run, scripts                                  # noqa: F401


@pytest.fixture
def finished(scripts, capsys):                                               # noqa: F811
    """compare.json of three settings and two seeds whose folders are gone, and what compare.py printed."""
    run("--runs", "ar", "dar --lookahead 4", "mlm", "--seeds", "0", "1", "--against", "ar", "mlm",
        "--spectrum", "")
    printed = capsys.readouterr().out
    shutil.move("out/compare/compare.json", "saved.json")
    shutil.rmtree("out")
    return printed[printed.index("\nMean over seeds"):]


def refused(capsys, *words):
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        report.main(["saved.json", *words])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    return error


def test_it_prints_what_compare_printed(finished, capsys):
    report.main(["saved.json", "--against", "ar", "mlm"])
    assert capsys.readouterr().out == finished


def test_rows_and_settings_can_be_chosen(finished, capsys):
    report.main(["saved.json", "--runs", "mlm", "ar", "--rows", "all$|chi2$"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = cells("\n".join(lines))
    assert [row[0] for row in rows if len(row) == 3] == ["", "perplexity, all", "spectrum: chi2"]
    assert rows[0] == ["", "mlm", "ar"]
    assert [row[:2] for row in rows if len(row) == 6][1:] == [
        ["ar / mlm", "perplexity, all, ratio"], ["ar / mlm", "spectrum: chi2, ratio"]]


def test_files_with_other_seeds_or_settings_are_joined(finished, capsys):
    """Split by seed and by setting and joined again, it is the same comparison."""
    whole = json.loads(Path("saved.json").read_text())
    parts = {"first.json": lambda setting, seed: seed == "0" and setting != "mlm",
             "second.json": lambda setting, seed: seed == "1" and setting != "mlm",
             "third.json": lambda setting, seed: setting == "mlm"}
    for name, wanted in parts.items():
        runs = {setting: {seed: run for seed, run in by_seed.items() if wanted(setting, seed)}
                for setting, by_seed in whole["runs"].items()}
        runs = {setting: by_seed for setting, by_seed in runs.items() if by_seed}
        Path(name).write_text(json.dumps({**whole, "runs": runs}))
    report.main([*parts, "--against", "ar", "mlm"])
    assert capsys.readouterr().out == finished


def test_measurements_of_the_same_runs_are_joined(finished, capsys):
    """Split by measurement and joined again, it is the same comparison. Contradictions are refused."""
    whole = json.loads(Path("saved.json").read_text())
    def part(wanted, **changes):
        contents = json.loads(json.dumps(whole))
        for run in report.all_runs(contents["runs"]):
            run["measurements"] = {name: m for name, m in run["measurements"].items() if wanted(name)}
            run |= changes
        return json.dumps(contents)

    Path("first.json").write_text(part(lambda name: "perplexity" in name))
    Path("second.json").write_text(part(lambda name: "perplexity" not in name))
    report.main(["first.json", "second.json", "first.json", "--against", "ar", "mlm"])
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(finished.splitlines())

    Path("other.json").write_text(part(lambda name: "perplexity" not in name, weights="0123"))
    assert "other.json: 'ar' with seed 0 is in an earlier file too, with different weights" in refused(capsys, "other.json")
    contents = json.loads(part(lambda name: True))
    contents["runs"]["mlm"]["1"]["measurements"]["perplexity after 1"]["value"] *= 2
    Path("other.json").write_text(json.dumps(contents))
    assert "'mlm' with seed 1 is in an earlier file too, with a different perplexity after 1" in refused(capsys, "other.json")


def test_figures_need_the_file_only(finished):
    pytest.importorskip("matplotlib")
    report.main(["saved.json", "--plot", "a.png", "--curves", "b.svg"])
    assert Path("a.png").read_bytes().startswith(b"\x89PNG") and b"<svg" in Path("b.svg").read_bytes()


def test_the_baseline_of_fine_tuning_has_its_own_name():
    """It is no probe, and not above input embeddings."""
    def score(predictions):
        return {"value": 0.5, "predictions": predictions}

    row = {"task": "RTE", "metric": "accuracy", "pool": "mean", "layer": None, "directions": None, "max_train": 0,
           "protocol": "finetune", "model": score("01"), "untrained": score("00"), "command": "python eval_glue.py"}
    earlier = {**row, "pool": "max", "command": "python eval_glue.py --pool max"}       # not of this command
    result = {"command": "python eval_glue.py", "results": [earlier, row], "tests": {"RTE": {"labels": "01", "groups": None}}}
    assert list(report.probes(result, {})) == [
        "RTE, accuracy, mean, fine-tuned", "RTE, accuracy, mean, fine-tuned: the same from initial weights",
        "RTE, accuracy, mean, fine-tuned: gain over the same from initial weights"]


def test_names_below_the_axis_say_what_differs():
    """What all have in common would only make them overlap."""
    ours = "stdlib-topic, accuracy, mean: gain over its input embeddings"
    cola = "CoLA, Matthews, max, 300 examples: gain over its input embeddings"
    assert report.short_names([ours]) == {ours: "topic\nmean"}
    assert list(report.short_names([cola, cola.replace("max", "mean")]).values()) == ["CoLA\nmax", "CoLA\nmean"]
    assert list(report.short_names([cola, ours]).values()) == ["CoLA\nmax\n300 examples", "topic\nmean"]
    assert report.short_names([]) == {}


def test_a_gain_over_a_baseline_is_judged_like_a_difference():
    """Three seeds that are 30, 40 and 50 points above their baseline on 10 examples, by hand. And 30, 40, -50."""
    def run(right, baseline):
        """Of 10 examples, all of class 0, so many are right."""
        def score(right):
            return {"test": "t", "metric": "accuracy", "predictions": right * "0" + (10 - right) * "1"}

        gain = {"value": 10 * (right - baseline), "test": "t", "of": "a", "minus": "a: b"}
        return {"measurements": {"a": score(right), "a: b": {**score(baseline), "baseline": True}, "a: gain": gain}}

    tests = {"t": {"labels": 10 * "0", "groups": None}}
    runs = {"ar": {"0": run(6, 3), "1": run(7, 3), "2": run(8, 3)},
            "mlm": {"0": run(6, 3), "1": run(7, 3), "2": run(3, 8)}}
    ar, mlm = [found for found in report.find_differences(runs, tests, ["ar"]) if found["against"] is None]
    assert (ar["setting"], ar["measurement"], ar["by_seed"]) == ("ar", "a: gain", [30, 40, 50])
    assert ar["se_seeds"] == pytest.approx(10 / 3 ** 0.5)

    # Examples 4 to 6 are gained by all three seeds, 7 by two and 8 by one: the mean over examples has this error
    gained = np.array([0, 0, 0, 1, 1, 1, 2 / 3, 1 / 3, 0, 0])
    assert ar["se_test"] == pytest.approx(100 * gained.std() / 10 ** 0.5, rel=0.1)
    assert ar["shown"] and 40 > math.hypot(4.303 * ar["se_seeds"], 2 * ar["se_test"])
    assert mlm["by_seed"] == [30, 40, -50] and not mlm["shown"]
    row = cells(report.difference_table([ar]))[2]
    assert row[:3] == ["ar", "a: gain, points", "40.0 [30.0, 50.0]"]


def test_many_settings_get_a_row_each():
    def run(value):
        return {"0": {"measurements": {"perplexity, all": {"value": value}, "spectrum: s_2": {"value": 0.5}}}}

    six = cells(report.table({f"mlm {i}": run(i) for i in range(6)}))
    seven = cells(report.table({f"mlm {i}": run(i) for i in range(7)}))
    assert six[0][1:] == [f"mlm {i}" for i in range(6)] and len(six) == 4
    assert seven[0] == ["", "perplexity, all", "spectrum: s_2"] and len(seven) == 9
    assert seven[-1][:2] == ["mlm 6", "6.0"] and seven[-1][2].startswith("0.500")


def test_budgets_are_one_line_where_only_the_length_differs(monkeypatch):
    """Three lengths of ar, one with another weight decay, and vlm, with two seeds: values = 100 * length + seed."""
    pytest.importorskip("matplotlib")
    saved = []
    monkeypatch.setattr(report, "save_figure", lambda figure, path: saved.append(figure))

    def by_seed(updates, names):
        return {seed: {"curve": [[0, 9], [updates * 10 ** 6, 5]],
                       "measurements": {name: {"value": 100 * updates + int(seed)} for name in names}}
                for seed in "02"}

    both = ["perplexity, all", "spectrum: chi2"]
    runs = {"ar --max_iters 2": by_seed(2, both), "ar": by_seed(4, both), "ar --max_iters 1": by_seed(1, both),
            "ar --weight_decay 1 --max_iters 2": by_seed(2, both), "vlm --max_iters 2": by_seed(2, both[:1])}
    report.plot_budgets(runs, "all$|chi2$", "x.png")
    [figure] = saved
    left, right = figure.axes
    assert [left.get_title(), right.get_title()] == both
    assert [line.get_label() for line in left.lines] == ["ar", "ar --weight_decay 1", "vlm"]
    assert [line.get_xydata().tolist() for line in left.lines] == [
        [[1, 101], [2, 201], [4, 401]], [[2, 201]], [[2, 201]]]
    assert len(right.lines) == 2


def test_spectra_are_compared_by_their_ratio_and_by_seeds_alone(finished):
    saved = json.loads(Path("saved.json").read_text())
    name = "spectrum: chi2"
    a, b = [[saved["runs"][setting][seed]["measurements"][name]["value"] for seed in "01"]
            for setting in ("dar --lookahead 4", "ar")]
    [found] = [found for found in saved["differences"]
               if found["measurement"] == name and found["against"] == "ar" and found["setting"] != "mlm"]
    assert found["by_seed"] == pytest.approx(np.log(np.array(a) / b))
    assert found["se_test"] is None and found["se_seeds"] == pytest.approx(np.std(found["by_seed"], ddof=1) / 2 ** 0.5)
    row = report.difference_table([found]).splitlines()[-1]
    assert f"{math.exp(found['mean']):.3f} [" in row and "chi2, ratio" in row
    assert "spectrum: mean hitting time" not in saved["runs"]["ar"]["0"]["measurements"], "an infinite one"
    assert "spectrum: s_2" in saved["runs"]["ar"]["0"]["measurements"]


def test_finished_spectra_are_kept(scripts):                                 # noqa: F811
    run("--runs", "ar", "--spectrum=--contexts 64")
    commands = list(scripts.commands)
    assert commands[-1] == "spectrum.py --checkpoint out/compare/ar-0 --contexts 64"
    run("--runs", "ar", "--spectrum=--contexts 64")
    assert scripts.commands == commands
    run("--runs", "ar", "--spectrum=--contexts 32")
    assert len(scripts.commands) == len(commands) + 1
    assert "spectrum.py" in compare.EVALUATION_CODE


def test_bad_input_is_one_line_and_exit_2(finished, capsys):
    assert "no setting 'vlm'" in refused(capsys, "--runs", "vlm")
    assert "not one of: ar" in refused(capsys, "--against", "vlm")
    assert "regular expression" in refused(capsys, "--rows", "(")
    assert "'bleu' finds no measurement" in refused(capsys, "--rows", "bleu")
    for text in ("[]", '{"runs": [], "tests": {}}', '{"runs": {"ar": 1}, "tests": {}}',
                 '{"runs": {"ar": {"0": {"curve": []}}}, "tests": {}}'):
        Path("saved.json").write_text(text)
        assert "not written by compare.py" in refused(capsys)
    Path("saved.json").unlink()
    assert "saved.json" in refused(capsys)
