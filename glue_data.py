"""
The tasks of eval_glue.py: GLUE's official files, two built-in tasks, and the metrics.

    from glue_data import load_task
    task = load_task("RTE", "data/glue")            # downloaded to data/glue if it is missing there
    task.train.examples[0], task.train.y[0], task.dev[""].examples[0]

GLUE (Wang et al. 2019) is nine tasks on English sentences. The labels of its test sets are not
public, so everyone reports on dev. The built-in tasks `stdlib-topic` and `stdlib-pair` need no
download. They stand in for GLUE in a first run, and are not GLUE. Their training examples come from
files of the running Python's library that data.py puts into the training split, their test examples
from files of its validation split. So no test file was seen in pretraining or by the probe.
"""
import os
import shlex
from collections import Counter
from typing import NamedTuple

import numpy as np

from common import DataError, download_into, fetch, unzip
from data import VAL_FRACTION
from documents import document_is_val, read_text, stdlib_files


class Split(NamedTuple):
    """Examples with their labels. Tuples (text,) or (text, text), or lists of token ids.

    Examples with equal numbers in `groups` (chunks of one file) depend on each other: they are held out
    together and resampled together.
    """
    examples: list
    y: np.ndarray                           # (n,) class numbers, or scores
    groups: np.ndarray                      # (n,) int; in GLUE each example is its own group


class Task(NamedTuple):
    """A classification or regression task."""
    name: str
    train: Split
    dev: dict                               # {"": Split}, or {"matched": Split, "mismatched": Split}
    classes: tuple                          # () for scores (regression)
    metrics: tuple                          # names in METRICS; the first is what choices go by
    malformed: int = 0                      # rows that were skipped
    half: int = 0                           # pairs: tokens to take of each text, where they meet (0: all)


def load_task(name, glue_dir="data/glue", download=True):
    """The Task of that name. Raises DataError, one line."""
    if name in BUILT_IN:
        return BUILT_IN[name](stdlib_files())
    return load_glue(name, str(glue_dir), download)


def limit(task, n):
    """The task with at most n training examples (all if n is 0), the same in every run."""
    train = task.train
    chosen = np.random.default_rng(0).permutation(len(train.y))[:n or None]
    return task._replace(train=subset(train, np.sort(chosen)))


def subset(split, index):
    """The Split of these examples only."""
    return split._replace(examples=[split.examples[i] for i in index], y=split.y[index],
                          groups=split.groups[index])

# -----------------------------------------------------------------------------
# Metrics of predicted, true: (n,) class numbers, or scores for the correlations. Each returns a float

def accuracy(predicted, true):
    """Share of equal class numbers."""
    return float(np.mean(predicted == true))


def f1(predicted, true):
    """2 TP / (2 TP + FP + FN) of class 1; 0 if class 1 neither occurs nor is predicted."""
    tp = np.sum((predicted == 1) & (true == 1))
    either = np.sum(predicted == 1) + np.sum(true == 1)                     # = 2 TP + FP + FN
    return float(2 * tp / either) if either else 0.0


def matthews(predicted, true):
    """Matthews correlation of two binary arrays: Pearson's. 0 if either is constant."""
    return pearson(predicted, true)


def pearson(predicted, true):
    """Pearson correlation. 0 if either array is constant, where it is not defined."""
    if np.ptp(predicted) == 0 or np.ptp(true) == 0:
        return 0.0
    x = predicted - np.mean(predicted)
    y = true - np.mean(true)
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def spearman(predicted, true):
    """Pearson correlation of the ranks, where equal values share their mean rank."""
    return pearson(ranks(predicted), ranks(true))


def ranks(values):
    """(n,) float64 ranks, 1 for the smallest value.

    Equal values get the mean of their places: [3, 1, 3] -> [2.5, 1, 2.5].
    """
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()                                  # place of a value's last occurrence
    return (last - (counts - 1) / 2)[inverse]


METRICS = {"accuracy": accuracy, "F1": f1, "Matthews": matthews, "Pearson": pearson,
           "Spearman": spearman}


RESAMPLES = 500


def bootstrap(metric, predicted, true, groups):
    """Standard error of metric(predicted, true): its standard deviation over resamples of the groups."""
    return float(resample_metric(metric, predicted, true, groups)[1:].std(ddof=1))


def resample_metric(metric, predicted, true, groups):
    """metric(predicted, true), then the same on resamples of the groups, (1 + RESAMPLES,) float64.

    groups: (n,) numbers; examples of one group are not independent and stay together.
    """
    _, group = np.unique(groups, return_inverse=True)

    def value(times):
        index = np.repeat(np.arange(len(true)), times[group])
        return metric(predicted[index], true[index])

    return resample(value, group.max() + 1)


def resample(statistic, n):
    """A statistic of n independent test units and its resamples, (1 + RESAMPLES,) float64.

    statistic(times) -> float, where times (n,) says how often each unit (document, example) counts: first 1
    for all of them, then as often as it is drawn when n units are drawn with replacement. The draws depend on
    n alone. So all runs see the same ones, and a difference of two results is paired.
    """
    rng = np.random.default_rng(0)
    values = [statistic(np.ones(n, dtype=np.int64))]
    for _ in range(RESAMPLES):
        drawn = rng.integers(n, size=n)
        values.append(statistic(np.bincount(drawn, minlength=n)))
    return np.array(values)

# -----------------------------------------------------------------------------
# GLUE

class Layout(NamedTuple):
    """Where a task's text and labels are.

    Columns are names in the header, or numbers where there is no header.
    """
    url: str                                # after GLUE_URL
    text: tuple                             # one or two columns
    label: object                           # column
    labels: tuple                           # values of the label, class 0 first; () for a score
    metrics: tuple
    dev: tuple = ("dev.tsv",)


GLUE_URL = "https://dl.fbaipublicfiles.com/glue/data/"
MRPC_URL = "https://dl.fbaipublicfiles.com/senteval/senteval_data/msr_paraphrase_train.txt"
BINARY = ("0", "1")
NLI = ("entailment", "not_entailment")
GLUE = {
    "CoLA": Layout("CoLA.zip", (3,), 1, BINARY, ("Matthews",)),
    "SST-2": Layout("SST-2.zip", ("sentence",), "label", BINARY, ("accuracy",)),
    "MRPC": Layout("mrpc_dev_ids.tsv", ("#1 String", "#2 String"), "Quality", BINARY,
                   ("F1", "accuracy")),
    "STS-B": Layout("STS-B.zip", ("sentence1", "sentence2"), "score", (), ("Pearson", "Spearman")),
    "QQP": Layout("QQP-clean.zip", ("question1", "question2"), "is_duplicate", BINARY,
                  ("F1", "accuracy")),
    "MNLI": Layout("MNLI.zip", ("sentence1", "sentence2"), "gold_label",
                   ("entailment", "neutral", "contradiction"), ("accuracy",),
                   ("dev_matched.tsv", "dev_mismatched.tsv")),
    "QNLI": Layout("QNLIv2.zip", ("question", "sentence"), "label", NLI, ("accuracy",)),
    "RTE": Layout("RTE.zip", ("sentence1", "sentence2"), "label", NLI, ("accuracy",)),
    "WNLI": Layout("WNLI.zip", ("sentence1", "sentence2"), "label", BINARY, ("accuracy",)),
}


def load_glue(name, glue_dir, download):
    """Read a task from glue_dir/NAME, after downloading it there if that is allowed and needed.

    MRPC comes as one file and a list of the pairs that are dev. It is split here, in memory, if
    there is no train.tsv and no dev.tsv. Files that exist are read and never written.
    """
    layout = GLUE[name]
    folder = os.path.join(glue_dir, name)
    if download and missing(name, glue_dir):
        with download_into(folder, "without a network: --tasks stdlib"):
            download_glue(name, glue_dir)   # unless another process did while this one waited
    check_files([name], glue_dir)

    # The rows of each file
    files = ["train.tsv", *layout.dev]
    if name == "MRPC" and raw_mrpc(folder):
        contents = split_mrpc(*raw_mrpc(folder))
    else:
        contents = [read_lines(os.path.join(folder, file)) for file in files]
    splits = {}
    malformed = 0
    for file, lines in zip(files, contents):
        splits[file], skipped = parse(lines, layout, os.path.join(folder, file))
        malformed += skipped

    train = splits.pop("train.tsv")
    dev = {file[len("dev_"):-len(".tsv")]: split for file, split in splits.items()}
    return Task(name, train, dev, layout.labels, layout.metrics, malformed)


def missing(name, glue_dir):
    """The files of a task that are not in glue_dir/NAME."""
    folder = os.path.join(glue_dir, name)
    if name == "MRPC" and raw_mrpc(folder):
        return []
    return [file for file in ("train.tsv", *GLUE[name].dev)
            if not os.path.exists(os.path.join(folder, file))]


def check_files(names, glue_dir):
    """Raise DataError if a GLUE task's files are not all in glue_dir: before any of them is read."""
    ready = [name for name in GLUE if not missing(name, glue_dir)]
    for name in names:
        if name in GLUE and name not in ready:
            file = os.path.join(glue_dir, name, missing(name, glue_dir)[0])
            hint = f"--tasks {' '.join(ready)} takes what is in {shlex.quote(glue_dir)}; " if ready else ""
            raise DataError(f"{file} is missing: {hint}without --glue_dir it is downloaded to data/glue")


def download_glue(name, glue_dir, base_url=GLUE_URL, mrpc_url=MRPC_URL):
    """Fetch what is missing of a task into glue_dir/NAME. Raises DataError."""
    files = missing(name, glue_dir)
    if not files:
        return
    folder = os.path.join(glue_dir, name)
    os.makedirs(folder, exist_ok=True)
    archive = os.path.join(folder, GLUE[name].url)
    if name != "MRPC":
        fetch(base_url + GLUE[name].url, archive)
        unzip(archive, {f"{name}/{file}": os.path.join(folder, file) for file in files})
        os.remove(archive)
    elif len(files) == 2:                   # with one of train.tsv and dev.tsv it stays incomplete
        fetch(base_url + GLUE[name].url, archive)
        fetch(mrpc_url, os.path.join(folder, "msr_paraphrase_train.txt"))


def raw_mrpc(folder):
    """The paths (all pairs, list of dev ids) if MRPC has to be made from them, else None.

    The official list is mrpc_dev_ids.tsv; the usual download script stores it as dev_ids.tsv.
    """
    if any(os.path.exists(os.path.join(folder, file)) for file in ("train.tsv", "dev.tsv")):
        return None
    pairs = os.path.join(folder, "msr_paraphrase_train.txt")
    for file in ("mrpc_dev_ids.tsv", "dev_ids.tsv"):
        ids = os.path.join(folder, file)
        if os.path.exists(pairs) and os.path.exists(ids):
            return pairs, ids
    return None


def split_mrpc(pairs, ids):
    """(lines of train, lines of dev), each with the header: a row is dev if its pair of ids is listed."""
    dev_ids = {tuple(line.split("\t")) for line in read_lines(ids)}
    header, *rows = read_lines(pairs) or [""]
    train = [header]
    dev = [header]
    for row in rows:
        listed = tuple(row.split("\t")[1:3]) in dev_ids
        (dev if listed else train).append(row)
    return train, dev


def read_lines(path):
    """The lines of a UTF-8 text file without a byte order mark. Raises DataError for another encoding.

    Lines end at a newline only: the text holds other characters at which str.splitlines would cut.
    """
    text = read_text(path)
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.rstrip("\r") for line in lines]


def parse(lines, layout, path):
    """Lines of an official file -> (Split, number of malformed rows). Raises DataError for a wrong file.

    Fields are separated by tabs, and quotes mean nothing (they occur in the text). A row that is too
    short or has another label is malformed.
    """
    rows = [line.split("\t") for line in lines]
    columns = [*layout.text, layout.label]

    # Column names -> numbers, if the first row is a header
    if isinstance(layout.label, str):
        header = rows[0] if rows else []
        for column in columns:
            if column not in header:
                raise DataError(f"{path}: no column {column!r} in its header: is it the official file, "
                                "with labels?")
        columns = [header.index(column) for column in columns]
        rows = rows[1:]
    *text_columns, label_column = columns

    # Rows -> examples and labels
    examples = []
    labels = []
    for row in rows:
        if len(row) <= max(columns):
            continue
        label = read_label(row[label_column], layout.labels)
        if label is not None:
            examples.append(tuple(row[column] for column in text_columns))
            labels.append(label)

    malformed = len(rows) - len(examples)
    if malformed >= len(examples):
        raise DataError(f"{path}: {malformed} of {len(rows)} rows are malformed: is it the official "
                        "file, with labels?")
    return Split(examples, np.array(labels), np.arange(len(labels))), malformed


def read_label(text, labels):
    """Class number, or score from 0 to 5 if labels is empty. None if it is neither."""
    if labels:
        return labels.index(text) if text in labels else None
    try:
        return float(text) if 0 <= float(text) <= 5 else None
    except ValueError:
        return None

# -----------------------------------------------------------------------------
# Built-in tasks, from the source text of the running Python's standard library

CHUNK = 256             # characters, about 90 tokens of the default vocabulary
HALF = 48               # tokens of each text of a pair
MAX_CLASSES = 16
PER_CLASS = 250         # most chunks of a class, in training and in test
PER_FILE = 40           # most chunks, or pairs, of a file
MAX_PAIRS = 2000        # most first texts, in training and in test


def stdlib_topic(files):
    """From which top-level package is this chunk? files: [(path in the library, text), ...].

    The classes are the MAX_CLASSES packages with the most training chunks.
    """
    parts = cut_files(files, chunks)

    # Chunks per package, in training and in test
    size = {side: Counter() for side in parts}
    for side, members in parts.items():
        for member in members:
            size[side][member.package] += len(member.pieces)

    # The classes: largest first, and only packages that the test can show
    packages = [name for name in size["train"] if name and size["test"][name] >= 5]
    packages.sort(key=lambda name: (-size["train"][name], name))
    classes = tuple(sorted(packages[:MAX_CLASSES]))

    # At most PER_CLASS chunks of each, in the order of the files
    rng = np.random.default_rng(0)
    examples = {side: [] for side in parts}
    for side, members in parts.items():
        for label, package in enumerate(classes):
            mine = []
            for member in members:
                if member.package == package:
                    mine += [Example((text,), label, member.number) for text in member.pieces]
            chosen = sorted(rng.permutation(len(mine))[:PER_CLASS])
            examples[side] += [mine[i] for i in chosen]
    return make_task("stdlib-topic", examples, classes)


def stdlib_pair(files):
    """Does the second text continue the first? files: [(path in the library, text), ...].

    Each first text occurs twice: with its own continuation (class 1) and with that of another file
    (class 0). Of each the HALF tokens next to the cut are taken. So both texts are distributed alike
    in both classes and of one length, and a linear probe on the mean of token embeddings is at
    chance: only context helps. (Not so a maximum: texts that belong together share more tokens.)
    """
    rng = np.random.default_rng(0)
    examples = {"train": [], "test": []}
    for side, members in cut_files(files, halves).items():
        pairs = [(pair, member.number) for member in members for pair in member.pieces]
        chosen = sorted(rng.permutation(len(pairs))[:MAX_PAIRS])
        pairs = [pairs[i] for i in chosen]                          # still in the order of the files

        # The continuation of another file is `shift` pairs further on, beyond the longest file
        n = len(pairs)
        largest = np.bincount([number for _, number in pairs]).max() if n else 0
        shift = int(rng.integers(largest, max(largest, n - largest) + 1))
        for i, ((first, second), number) in enumerate(pairs):
            (_, foreign), _ = pairs[(i + shift) % n]
            examples[side].append(Example((first, second), 1, number))
            examples[side].append(Example((first, foreign), 0, number))
    return make_task("stdlib-pair", examples, ("other", "continues"), HALF)


BUILT_IN = {"stdlib-topic": stdlib_topic, "stdlib-pair": stdlib_pair}


class File(NamedTuple):
    """A source file of the library, cut into examples."""
    package: str                            # top-level package, "" for a module outside of any
    number: int
    pieces: list                            # chunks, or pairs


class Example(NamedTuple):
    """An example of a built-in task."""
    texts: tuple                            # one or two
    label: int                              # class number
    file: int                               # number of its file: those of one file depend on each other


def cut_files(files, cut):
    """{"train": list of File, "test": list of File}, with pieces = cut(text)."""
    parts = {"train": [], "test": []}
    for number, (path, text) in enumerate(files):
        package = path.split("/")[0] if "/" in path else ""
        side = "test" if document_is_val(text, VAL_FRACTION["stdlib"]) else "train"
        parts[side].append(File(package, number, cut(text)))
    return parts


def chunks(text):
    """Pieces of CHUNK characters that do not overlap, at most PER_FILE, evenly spread over the text."""
    starts = np.arange(0, len(text) - CHUNK + 1, CHUNK)
    if len(starts) > PER_FILE:
        starts = starts[np.linspace(0, len(starts) - 1, PER_FILE).astype(int)]
    return [text[i:i + CHUNK] for i in starts]


def halves(text):
    """Pairs of texts, the CHUNK characters before and after the end of a line.

    At most PER_FILE, from the beginning of the text, about one in 4 * CHUNK characters. No word is cut in
    two, which would tell which texts belong together.
    """
    last = 0
    pairs = []
    for start in range(CHUNK, len(text) - CHUNK, 4 * CHUNK):
        cut = text.find("\n", max(start, last + CHUNK)) + 1
        if cut and cut + CHUNK <= len(text):
            pairs.append((text[cut - CHUNK:cut], text[cut:cut + CHUNK]))
            last = cut + CHUNK
    return pairs[:PER_FILE]


def make_task(name, examples, classes, half=0):
    """The Task of examples, {"train": list of Example, "test": list of Example}."""
    if len(classes) < 2 or not examples["train"] or not examples["test"]:
        raise DataError(f"{name}: the standard library of this Python has too few source files")
    splits = []
    for side in ("train", "test"):
        rows, y, groups = zip(*examples[side])
        splits.append(Split(list(rows), np.array(y), np.array(groups)))
    train, dev = splits
    return Task(name, train, {"": dev}, classes, ("accuracy",), half=half)
