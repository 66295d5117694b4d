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
    return printed[printed.index("\nmean over seeds"):]


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


def test_figures_need_the_file_only(finished):
    pytest.importorskip("matplotlib")
    report.main(["saved.json", "--plot", "a.png", "--curves", "b.svg"])
    assert Path("a.png").read_bytes().startswith(b"\x89PNG") and b"<svg" in Path("b.svg").read_bytes()


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
    Path("saved.json").write_text("[]")
    assert "not written by compare.py" in refused(capsys)
    Path("saved.json").unlink()
    assert "saved.json" in refused(capsys)
