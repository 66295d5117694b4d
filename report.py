"""
From the results of runs to differences, errors, tables and figures: what compare.py does with its numbers.

    python report.py out/compare/compare.json                               # all that it measured
    python report.py out/compare/compare.json --against ar mlm --rows "perplexity"      # some rows
    python report.py out/compare/compare.json --plot claims.png --curves curves.png
    python report.py out/few/compare.json --rows "all$|chi2$" --budgets few.png
    python report.py out/seed0/compare.json out/seed1/compare.json          # runs of several machines, joined

    runs    {setting: {seed: run}}, and run["measurements"] is {measurement: numbers}, as in compare.json
    tests   {name: contents} of the test sets, which the measurements refer to

Two settings are compared by the difference of runs with the same seed, averaged over the seeds. A difference
of log perplexities is printed as a ratio of perplexities, one of probes in points (percent). There are two
errors:

    over seeds     se_seeds = (standard deviation of the differences) / sqrt(number of seeds)
    over the test  se_test = standard deviation of the mean difference over resamples of the test documents
                   (examples, where they are independent), the same for both settings and all seeds

The same is printed for what a setting gains over its own baseline, as "ar" instead of "dar - ar".

RULE below says when such a difference is called shown. It has Student's t and not 2 because the spread of
three seeds is itself uncertain. With 2, pure noise between seeds would pass in 18 % of all cases, with t in
5 %. That holds per row: of 40 rows without any difference, two may pass.
"""
import hashlib
import json
import math
import re
from pathlib import Path

import numpy as np

from common import DataError, Parser, check_plot, one_line_errors, save_figure
from eval_glue import LABELS, title
from glue_data import METRICS, resample, resample_metric

RULE = """\
A difference is shown if it has the same sign in every seed and
|mean| > sqrt((t se_seeds)^2 + (2 se_test)^2), with Student's t for that many seeds (3 seeds: 4.30).
Otherwise it may be chance: other seeds, or another text, could turn it round.
A ratio is judged by its logarithm. The table has the geometric mean, and the logarithm's errors times that."""

# Student's t, 97.5 % quantile, by number of seeds (with one seed nothing is known about their spread)
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}

# -----------------------------------------------------------------------------
# Is a difference more than chance?

def is_shown(by_seed, se_test):
    """RULE. by_seed: (seeds,) differences, at least two."""
    n = len(by_seed)
    t = STUDENT.get(n, STUDENT[10])                         # more than ten: a little too strict
    se_seeds = se_over_seeds(by_seed)
    same_sign = (by_seed > 0).all() or (by_seed < 0).all()
    return bool(same_sign and abs(by_seed.mean()) > math.hypot(t * se_seeds, 2 * se_test))


def se_over_seeds(by_seed):
    """Standard error of the mean of (seeds,) differences."""
    return by_seed.std(ddof=1) / math.sqrt(len(by_seed))


def errors(differences):
    """The mean difference of two settings with both errors and the verdict, as a dict.

    differences: one array (1 + resamples,) per seed. With one seed "se_seeds" is None, and "shown" too, as
    nothing can be said. Without resamples, arrays (1,), "se_test" is None.
    """
    differences = np.array(differences)                     # (seeds, 1 + resamples)
    by_seed = differences[:, 0]
    mean = float(by_seed.mean())

    # The error over test examples: all seeds share them, so it is that of their mean
    resamples = differences.mean(axis=0)[1:]
    se_test = float(resamples.std(ddof=1)) if len(resamples) else None

    # The error over seeds
    se_seeds = None
    shown = None
    if len(by_seed) > 1:
        se_seeds = float(se_over_seeds(by_seed))
        shown = is_shown(by_seed, se_test or 0)
    return {"mean": mean, "by_seed": by_seed.tolist(), "se_seeds": se_seeds, "se_test": se_test,
            "shown": shown}


def find_differences(runs, tests, against):
    """Every setting against each of the settings in `against`: a list of dicts, one per measurement.

    Then what each setting gains over its own baselines, "against" None.
    """
    samples = {}
    for setting, by_seed in runs.items():
        samples[setting] = {seed: resample_run(run, tests) for seed, run in by_seed.items()}

    out = []
    for setting, reference in pairs_of_settings(list(runs), against):
        for name in names_to_compare(runs[setting], runs[reference]):
            # Runs with the same seed that both have this measurement
            paired = []
            same_test = True
            for seed in runs[setting]:
                a = find(name, runs[setting].get(seed))
                b = find(name, runs[reference].get(seed))
                if a and b:
                    paired.append(samples[setting][seed][a] - samples[reference][seed][b])
                    same_test &= test_of(runs[setting][seed], a) == test_of(runs[reference][seed], b)
            if not paired:
                continue

            found = errors(paired)
            if not same_test:                       # another text or other labels cannot be paired
                found |= {"se_test": None, "shown": None}
            out.append({"setting": setting, "against": reference, "measurement": name, **found})

    # The gains of each setting
    for setting, by_seed in runs.items():
        for name in measurement_names({setting: by_seed}):
            gains = []                              # of the seeds that have it
            for seed, run in by_seed.items():
                if "minus" in run["measurements"].get(name, {}):
                    gains.append(samples[setting][seed][name])
            if gains:
                out.append({"setting": setting, "against": None, "measurement": name, **errors(gains)})
    return out


def pairs_of_settings(settings, against):
    """[(setting, reference)], no pair twice."""
    pairs = []
    for reference in against:
        for setting in settings:
            if setting != reference and (reference, setting) not in pairs:
                pairs.append((setting, reference))
    return pairs


def names_to_compare(*by_seeds):
    """The measurements that any of these runs has, without the baselines, in the table's order."""
    names = {}                                      # a set that keeps the order
    for by_seed in by_seeds:
        for run in by_seed.values():
            for name, measured in run["measurements"].items():
                if "test" in measured and not measured.get("baseline"):
                    names[name] = None
    return list(names)


def find(name, run):
    """The name under which a run has a measurement; None if it does not have it.

    A model that has seen every number of masks in training has no line "masks as in training" of its own:
    its plain line is that.
    """
    if run is None:
        return None
    candidates = [name, name.removesuffix(MATCHED)]
    return next((name for name in candidates if name in run["measurements"]), None)


def test_of(run, name):
    """The key of the test set of a measurement."""
    return run["measurements"][name]["test"]

# -----------------------------------------------------------------------------
# Resampling the test documents or examples

def resample_perplexity(measured):
    """Mean nats per token, (1 + resamples,): the documents are resampled."""
    nats = np.array(measured["nats"])               # (documents,), sums over the scored tokens
    tokens = np.array(measured["tokens"])           # (documents,), how many those are

    def mean_nats(times):
        return times @ nats / max(1, times @ tokens)

    return resample(mean_nats, len(nats))


def resample_probe(measured, test):
    """A probe's metric in points, (1 + resamples,): the groups of test examples are resampled."""
    predicted = decode(measured["predictions"])     # (examples,)
    true = decode(test["labels"])                   # (examples,)
    groups = np.arange(len(true))
    if test["groups"] is not None:
        groups = test["groups"]
    return 100 * resample_metric(METRICS[measured["metric"]], predicted, true, groups)


def decode(values):
    """Classes, one base-36 digit per example ("0a2" -> [0, 10, 2]), or a list of scores, as an array."""
    if isinstance(values, str):
        return np.array([int(digit, 36) for digit in values])
    return np.array(values)


def resample_run(run, tests):
    """{measurement: (1 + resamples,)} of one run."""
    out = {}
    for name, measured in run["measurements"].items():
        if "nats" in measured:
            out[name] = resample_perplexity(measured)
        elif "predictions" in measured:
            out[name] = resample_probe(measured, tests[measured["test"]])
        elif "minus" in measured:                   # a gain: one measurement less another, on the same resamples
            out[name] = out[measured["of"]] - out[measured["minus"]]
        elif name.startswith(SPECTRUM):             # the same contexts for all runs: not resampled
            out[name] = np.log([measured["value"]])
    return out

# -----------------------------------------------------------------------------
# From the JSON files of the evaluations to measurements

SAMPLED = "perplexity, all, sampled"
MATCHED = ", masks as in training"
UNIGRAM = "perplexity, word frequencies alone"
OWN_LOSS = "validation loss, own objective"
SPECTRUM = "spectrum: "
CONTEXT_GAIN = "gain in nats, "
RATIOS = ("perplexity", SPECTRUM)       # measurements that are compared by their ratio begin so


def perplexities(result, tests):
    """The measurements in a result of eval_ppl.py. Adds its test set to `tests`."""
    contents = {"text_sha256": result.get("text_sha256"), **result["documents"]}
    sample = {**contents, "samples": result["samples"]}
    kind = MATCHED if result["suffix"] == "matched" else ""
    out = {}

    def add(name, key, found, scored):
        """key: that of the sums in `result`, found: what follows from them, scored: on which test set."""
        test = remember(tests, result["text"], scored)
        nats = [round(nats, 3) for nats in result["nats"][key]]
        out[name + kind] = {"value": found["perplexity"], "test": test,
                            "tokens": result["tokens"][key], "nats": nats}

    # A masked model is scored on a sample of all tokens, a causal one on all of them and on the same sample
    for k, found in result["prompt_lengths"].items():
        add(f"perplexity after {k}", k, found, contents)
    if result["method"] != "left-to-right":                 # another number, that has its own name
        add(f"perplexity, {result['method']}", "all", result["all"], sample)
    elif result["suffix"] is not None:
        add(SAMPLED, "all", result["all"], sample)
    else:
        add("perplexity, all", "all", result["all"], contents)
        if result["sample"]:
            add(SAMPLED, "sample", result["sample"], sample)

    # The same tokens with more and more of the text before them visible
    visible = sorted(result["context"], key=lambda m: math.inf if m == "all" else int(m))
    scored = {**sample, "visible": visible}
    for m in visible:
        add(f"perplexity, {m} tokens visible", f"context {m}", result["context"][m], scored)
    out |= context_gains(out, visible, kind)

    if result["unigram"] and not kind:
        out[UNIGRAM] = {"value": result["unigram"]["perplexity"]}
    return out


def context_gains(measurements, visible, kind):
    """What more visible text is worth in nats, from each of the lengths `visible` to the next, and in all."""
    steps = list(zip(visible, visible[1:]))
    if len(steps) > 1:
        steps.append((visible[0], visible[-1]))

    out = {}
    for fewer, more in steps:
        before = f"perplexity, {fewer} tokens visible{kind}"
        after = f"perplexity, {more} tokens visible{kind}"
        nats = math.log(measurements[before]["value"] / measurements[after]["value"])
        name = f"{CONTEXT_GAIN}from {fewer} to {more} tokens visible{kind}"
        out[name] = {"value": nats, "test": measurements[before]["test"], "of": before, "minus": after}
    return out


def probes(result, tests):
    """The measurements of the last command in a result of eval_glue.py: model, baseline, and gain over it."""
    out = {}
    for row in result["results"]:
        if row["command"] != result["command"]:                 # the file also keeps those of other commands
            continue
        contents = result["tests"][row["task"]]
        test = remember(tests, row["task"], {"labels": contents["labels"], "groups": contents["groups"]})
        source = "embeddings" if row.get("embeddings") else "untrained"
        name = probe_name(row)
        label = LABELS[row["protocol"]][source]
        baseline = f"{name}: {label}"

        # The three lines of the table
        common = {"test": test, "metric": row["metric"]}
        points = 100 * row["model"]["value"]
        points_below = 100 * row[source]["value"]
        out[name] = {"value": points, **common, "predictions": row["model"]["predictions"]}
        out[baseline] = {"value": points_below, **common, "baseline": True,
                         "predictions": row[source]["predictions"]}
        out[f"{name}: gain over {label}"] = {
            "value": points - points_below, "test": test, "of": name, "minus": baseline}
    return out


def spectra(result, tests):
    """The measurements in a result of spectrum.py: positive numbers, compared by their ratio."""
    test = f"{result['contexts']} contexts, seed {result['seed']}"
    values = {"chi2": result["chi2"], "chi2, extrapolated": result["chi2_limit"],
              "mean hitting time": result["hitting"], "effective rank": result.get("effective_rank")}
    for i in (2, 16, 128):
        if i <= len(result["singular_values"]):
            values[f"s_{i}"] = result["singular_values"][i - 1]
    return {SPECTRUM + name: {"value": value, "test": test} for name, value in values.items() if value}


READERS = {"eval_ppl.py": perplexities, "eval_glue.py": probes, "spectrum.py": spectra}


def read_curve(path):
    """[(tokens, validation loss), ...] of a run, from its log.jsonl. Damaged lines are left out."""
    curve = []
    for text in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if "val_loss" in line:
            curve.append((line["tokens"], line["val_loss"]))
    return curve


def own_loss(curve):
    """The last validation loss of a run as a measurement. Compare it along one objective only."""
    if not curve:
        return {}
    _, loss = curve[-1]
    return {OWN_LOSS: {"value": loss}}


def probe_name(row):
    """Whatever makes two rows of one task differ: "RTE, accuracy, mean, layer 2, 500 examples"."""
    parts = title(row)
    if row["max_train"]:
        parts.append(f"{row['max_train']} examples")
    if row["protocol"] == "finetune":
        parts.append("fine-tuned")
    return ", ".join(parts)


def remember(tests, name, contents):
    """Store a test set once. Returns its key, which two runs share only if they share the test set."""
    digest = hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
    key = f"{name} {digest[:8]}"
    tests[key] = contents
    return key


def all_runs(runs):
    """The runs of all settings and seeds, a list."""
    return [run for by_seed in runs.values() for run in by_seed.values()]

# -----------------------------------------------------------------------------
# Tables, in Markdown

WIDE = 6                    # settings: more columns do not fit on a page


def show(runs, differences, rows=""):
    """Print both tables. rows: a regular expression, only the measurements that it finds."""
    seeds = sorted({int(seed) for by_seed in runs.values() for seed in by_seed})
    print(f"\nMean over seeds {seeds} [least, greatest]. Probes in percent. Word frequencies are scored on "
          "the same tokens as the setting. For a masked model these are a sample.\n")
    print(table(runs, rows))
    wanted = [found for found in differences if re.search(rows, found["measurement"])]
    if wanted:
        print(f"\n{RULE}\n\n{difference_table(wanted)}")


def table(runs, rows=""):
    """One column per setting: mean over the seeds [least, greatest]. rows: see `show`.

    Many settings are too wide for a page, they get one row each.
    """
    lines = [["", *runs]]
    for name in measurement_names(runs, rows):
        row = [name]
        for by_seed in runs.values():
            found = [run["measurements"].get(name) for run in by_seed.values()]
            values = [measured["value"] for measured in found if measured]
            digits = 3 if name.startswith((f"{SPECTRUM}s_", OWN_LOSS, CONTEXT_GAIN)) else 1
            row.append(mean_and_range(values, digits) if values else "-")
        lines.append(row)
    if len(runs) > WIDE:
        lines = list(zip(*lines))
    return markdown(lines)


def measurement_names(runs, rows=""):
    """The names of all measurements that a regular expression finds, in order, a list."""
    names = {}                                      # a set that keeps the order
    for run in all_runs(runs):
        names |= dict.fromkeys(name for name in run["measurements"] if re.search(rows, name))
    return list(names)


def mean_and_range(values, digits=1):
    """Mean [least, greatest] of the values, with as many digits as make sense."""
    mean = np.mean(values)
    return with_range(mean, values, digits=0 if mean >= 100 else digits)


def with_range(mean, values, digits):
    """"12.3 [11.9, 12.8]", and "12.3" of a single seed."""
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    numbers = [f"{value:.{digits}f}" for value in (mean, min(values), max(values))]
    return "{} [{}, {}]".format(*numbers)


def difference_table(differences):
    """One row per difference: mean over seeds [least, greatest], both errors, and the verdict.

    A setting alone stands before what it gains over its own baseline.
    """
    rows = [["difference", "measurement", "mean over seeds", "se seeds", "se test", "verdict"]]
    for found in differences:
        mean = found["mean"]
        by_seed = found["by_seed"]

        # Logarithms become a ratio, points and nats stay what they are
        sign = "-"
        unit = ", points"
        digits = 1
        scale = 1.0
        if found["measurement"].startswith(CONTEXT_GAIN):
            unit = ""                               # its name says it
            digits = 3
        elif found["measurement"].startswith(RATIOS):
            sign = "/"
            unit = ", ratio"
            digits = 3
            mean = np.exp(mean)
            by_seed = np.exp(by_seed)
            scale = mean                            # of an error: d exp(x) = exp(x) dx

        def error(kind):
            return "-" if found[kind] is None else f"{scale * found[kind]:.{digits}f}"

        settings = found["setting"]
        if found["against"]:
            settings = f"{settings} {sign} {found['against']}"
        measurement = found["measurement"] + unit
        verdict = {True: "shown", False: "not shown", None: "-"}[found["shown"]]
        rows.append([settings, measurement, with_range(mean, by_seed, digits),
                     error("se_seeds"), error("se_test"), verdict])
    return markdown(rows)


def markdown(rows):
    """Rows of strings as a Markdown table that also reads well on a screen. The first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        lines.append(f"| {' | '.join(cells)} |")
    rule = "|".join("-" * (width + 2) for width in widths)
    lines.insert(1, f"|{rule}|")
    return "\n".join(lines)

# -----------------------------------------------------------------------------
# Figures. Colours that the colour-blind can tell apart (Okabe and Ito 2008), and markers besides

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"]
MARKERS = "osD^vP*X"


def style(i):
    """Colour and marker of setting number i."""
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 5}


def plot(runs, differences, path):
    """The paper's two sides in one figure, generation and classification. differences: of find_differences.

    Perplexity by prompt length, and what linear probes read from context (gain over the input embeddings).
    Bands and bars go from the lowest to the highest seed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    plot_perplexity(runs, left)
    plot_gains(runs, differences, right)
    save_figure(figure, path)


def plot_perplexity(runs, axes):
    """Perplexity against prompt length, one curve per setting."""
    # One curve per setting
    ends = draw_curves(runs, axes, perplexity_points)
    level = without_context(runs)
    if level:
        dotted(axes, level)

    # Both axes are logarithmic. Prompt lengths 1, 4, 16, ... are named
    axes.set(xscale="log", yscale="log", xlabel="prompt length (tokens)",
             ylabel="perplexity of the next token", title="Generation (lower is better)")
    plain_numbers(axes.yaxis)
    lengths = {k for run in all_runs(runs) for k, _ in perplexity_points(run)}
    ticks = [k for k in sorted(lengths) if math.log2(k) % 2 == 0]
    axes.set_xticks(ticks, ticks, minor=False)
    axes.set_xticks([], minor=True)
    label_ends(axes, ends)


def plot_curves(runs, tests, path):
    """Validation loss of each setting by tokens seen. The loss is that of its own objective."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    ends = draw_curves(runs, axes, loss_points)

    # Word frequencies are known on the text of the perplexities: a level here only if it is the same text
    level = without_context(runs)
    if level and any(name.startswith("val ") for name in tests):
        dotted(axes, math.log(level))

    axes.set(xlabel="tokens seen (millions)", ylabel="validation loss (nats per scored token)",
             title="Each objective's own loss")
    label_ends(axes, ends)
    save_figure(figure, path)


def plot_budgets(runs, rows, path):
    """Measurements by the tokens that a run has seen in all, one panel each.

    Settings that differ in nothing but --max_iters become one line. rows: see `show`.
    """
    from matplotlib.figure import Figure

    # {setting without its length: {(setting, seed): run}}
    lines = {}
    for setting, by_seed in runs.items():
        words = re.sub(r" --max_iters[ =]\S+", "", setting)
        for seed, run in by_seed.items():
            lines.setdefault(words, {})[setting, seed] = run

    # One panel per measurement, two side by side
    names = measurement_names(runs, rows)
    high = math.ceil(len(names) / 2)
    wide = min(len(names), 2)
    figure = Figure(figsize=(5.5 * wide, 3.6 * high), layout="constrained")
    for i, name in enumerate(names):
        plot_budget(lines, name, figure.add_subplot(high, wide, i + 1))

    # One legend, as lines that end anywhere leave no room for names at their ends
    legend = {line.get_label(): line for axes in figure.axes for line in axes.lines}
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=3, frameon=False)
    save_figure(figure, path)


def plot_budget(lines, name, axes):
    """One measurement against the tokens seen, one curve for each of `lines` ({name: {key: run}})."""
    def points(run):
        """(million tokens, value), of a run that has the measurement."""
        if name in run["measurements"] and run["curve"]:
            tokens, _ = run["curve"][-1]
            yield tokens / 1e6, run["measurements"][name]["value"]

    draw_curves(lines, axes, points)
    axes.set(xscale="log", xlabel="tokens seen in all (millions)", title=name)
    plain_numbers(axes.xaxis)
    if name.startswith(RATIOS):
        axes.set(yscale="log")
        plain_numbers(axes.yaxis)
    axes.spines[["top", "right"]].set_visible(False)


def draw_curves(runs, axes, points):
    """One curve per setting, with a band over its seeds. points(run): the (x, y) of one run.

    Returns [(last x, last y, setting, colour), ...] for `label_ends`.
    """
    ends = []
    for i, (setting, by_seed) in enumerate(runs.items()):
        # {x: values of the seeds}
        curve = {}
        for run in by_seed.values():
            for x, y in points(run):
                curve.setdefault(x, []).append(y)
        if not curve:
            continue

        # Mean as a line, lowest to highest as a band
        xs = sorted(curve)
        lowest = [min(curve[x]) for x in xs]
        highest = [max(curve[x]) for x in xs]
        mean = [np.mean(curve[x]) for x in xs]
        colour = style(i)["color"]
        axes.fill_between(xs, lowest, highest, alpha=0.2, linewidth=0, color=colour)
        axes.plot(xs, mean, label=setting, **style(i))
        ends.append((xs[-1], mean[-1], setting, colour))
    return ends


def perplexity_points(run):
    """Yield (prompt length, perplexity) of a run."""
    for name, measured in run["measurements"].items():
        found = re.fullmatch(r"perplexity after (\d+)", name)
        if found:
            yield int(found[1]), measured["value"]


def loss_points(run):
    """(million tokens, validation loss) of a run, a list."""
    return [(tokens / 1e6, loss) for tokens, loss in run["curve"]]


def without_context(runs):
    """The perplexity of word frequencies alone, None if it was not measured."""
    for run in all_runs(runs):
        if UNIGRAM in run["measurements"]:
            return run["measurements"][UNIGRAM]["value"]
    return None


def dotted(axes, level):
    """A dotted line at the level of word frequencies alone."""
    axes.axhline(level, color="gray", linestyle=":")
    axes.annotate("word frequencies alone", (1, level), xycoords=("axes fraction", "data"),
                  xytext=(0, 3), textcoords="offset points", color="gray", fontsize=9, ha="right")


def plain_numbers(axis):
    """5, 10, 20, 50, 100, ... along a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def label_ends(axes, ends):
    """Write each setting at the end of its line. Labels that would overlap are moved apart."""
    axes.spines[["top", "right"]].set_visible(False)        # room for the labels
    axes.figure.draw_without_rendering()                    # settles the scales
    gap = 13                                                # points, the height of a label
    above = -math.inf
    for x, y, setting, colour in sorted(ends, key=lambda end: end[1]):
        height = axes.transData.transform((x, y))[1] * 72 / axes.figure.dpi
        placed = max(height, above + gap)
        above = placed
        axes.annotate(setting, (x, y), xytext=(8, placed - height), textcoords="offset points",
                      color=colour, va="center", annotation_clip=False)


def plot_gains(runs, differences, axes):
    """What each probe gains over the input embeddings, one group of bars per probe."""
    gains = {(found["setting"], found["measurement"]): found
             for found in differences if found["against"] is None}

    # The leading directions only where there is nothing else
    probed = [name for name in measurement_names(runs, ": gain") if "fine-tuned" not in name]
    whole = [name for name in probed if "directions" not in name]
    names = short_names(whole or probed)

    for i, setting in enumerate(runs):
        shift = (i - (len(runs) - 1) / 2) * 0.8 / len(runs)         # side by side within a measurement
        label = setting
        for place, name in enumerate(names):
            found = gains.get((setting, name))
            if not found:
                continue

            # Thick bar: lowest to highest seed. Dot: mean. Whisker: standard error over test examples
            x = place + shift
            least = min(found["by_seed"])
            greatest = max(found["by_seed"])
            axes.plot([x, x], [least, greatest], color=style(i)["color"], alpha=0.35, linewidth=7,
                      solid_capstyle="butt")
            axes.errorbar(x, found["mean"], found["se_test"], capsize=3, linewidth=1, label=label,
                          **style(i))
            label = None                                            # once in the legend

    axes.spines[["top", "right"]].set_visible(False)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(names)), names.values(), fontsize=9)
    axes.set(ylabel="points above its input embeddings",
             title="Linear probes (higher is better)")
    if names:
        axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4,
                           frameon=False)


def short_names(names):
    """{name: what stands below the axis} of gains: the task, and below it what differs between them."""
    parts = {}
    for name in names:
        words = name.split(": gain")[0].replace("stdlib-", "").split(", ")
        parts[name] = [word for word in words if word not in ("accuracy", "Matthews")]

    # What all have in common, such as "300 examples", would only make them overlap
    common = set()
    if len(parts) > 1:
        common = set.intersection(*map(set, parts.values()))

    short = {}
    for name, (task, *rest) in parts.items():
        differs = [word for word in rest if word not in common]
        short[name] = "\n".join([task, *differs])
    return short

# -----------------------------------------------------------------------------
# Command line

def build_parser():
    p = Parser("The tables and figures of a finished comparison.")
    p.add_argument("files", nargs="+", metavar="FILE",
                   help="compare.json of a comparison; several with other seeds, settings or measurements "
                        "are joined")
    p.add_argument("--runs", nargs="+", metavar="SETTING", help="only these settings, in this order")
    p.add_argument("--against", nargs="+", metavar="SETTING",
                   help="settings that the others are compared with (default: the first)")
    p.add_argument("--rows", default="", metavar="REGEX", help="only measurements whose names match")
    p.add_argument("--plot", metavar="FILE", help="draw perplexity by prompt length and probe gains")
    p.add_argument("--curves", metavar="FILE", help="draw validation loss by tokens seen")
    p.add_argument("--budgets", metavar="FILE",
                   help="draw the measurements by tokens seen in training; settings that differ only in "
                        "--max_iters are one line")
    return p


def read(paths, settings):
    """(runs, tests) of one comparison, or of several joined, only these settings. Raises DataError.

    The files may have different settings, seeds, or measurements of the same runs.
    """
    runs = {}
    tests = {}
    for path in paths:
        try:
            contents = json.loads(Path(path).read_text(encoding="utf-8"))
            tests |= contents["tests"]
            found = {setting: dict(by_seed) for setting, by_seed in contents["runs"].items()}
            for run in all_runs(found):
                run["measurements"] |= own_loss(run.setdefault("curve", []))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} was not written by compare.py: {error!r}") from None

        # A run of an earlier file gets its other measurements
        for setting, by_seed in found.items():
            joined = runs.setdefault(setting, {})
            for seed, run in by_seed.items():
                earlier = joined.setdefault(seed, run)
                difference = contradiction(earlier, run)
                if difference:
                    raise DataError(f"{path}: {setting!r} with seed {seed} is in an earlier file too, "
                                    f"with {difference}")
                earlier["measurements"] |= run["measurements"]

    missing = [name for name in settings or [] if name not in runs]
    if missing:
        raise DataError(f"{', '.join(paths)}: no setting {missing[0]!r}, only: {', '.join(runs)}")
    return {name: runs[name] for name in settings or runs}, tests


def contradiction(run, other):
    """How two runs differ that should be one, measured by several commands, in words. None if they do not."""
    if run.get("weights") != other.get("weights"):
        return "different weights"
    for name, measured in run["measurements"].items():
        if other["measurements"].get(name, measured) != measured:
            return f"a different {name}"
    return None


def keep(runs, rows):
    """Drop the measurements that are neither asked for nor part of a gain that is, as resampling is slow."""
    for run in all_runs(runs):
        measurements = run["measurements"]
        wanted = {name for name in measurements if re.search(rows, name)}
        for name in list(wanted):
            wanted |= {measurements[name].get("of"), measurements[name].get("minus")}
        run["measurements"] = {name: measured for name, measured in measurements.items() if name in wanted}


def main(argv=None):
    args = build_parser().parse_args(argv)
    with one_line_errors():
        # Everything that can be wrong with the command line
        for path in (args.plot, args.curves, args.budgets):
            check_plot(path)
        runs, tests = read(args.files, args.runs)
        against = args.against or list(runs)[:1]
        unknown = [name for name in against if name not in runs]
        if unknown:
            raise DataError(f"--against {unknown[0]!r} is not one of: {', '.join(runs)}")
        try:
            re.compile(args.rows)
        except re.error as error:
            raise DataError(f"--rows {args.rows!r} is not a regular expression: {error}") from None

        # The measurements that are wanted, as tables and figures
        keep(runs, args.rows)
        if not measurement_names(runs):
            raise DataError(f"--rows {args.rows!r} finds no measurement in {', '.join(args.files)}")
        differences = find_differences(runs, tests, against)
        show(runs, differences, args.rows)
        if args.plot:
            plot(runs, differences, args.plot)
        if args.curves:
            plot_curves(runs, tests, args.curves)
        if args.budgets:
            plot_budgets(runs, args.rows, args.budgets)


if __name__ == "__main__":
    main()
