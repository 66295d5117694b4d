"""
The tasks of eval_glue.py: reading GLUE's official files, two built-in tasks, and the metrics.

    from glue_data import load_task
    task = load_task("RTE", "data/glue")                # downloaded to data/glue if it is not there

GLUE (Wang et al. 2019) is nine tasks on English sentences; labels of its test sets are not public, so
everyone reports on dev. The built-in tasks `stdlib-topic` and `stdlib-pair` need no download and stand in for
GLUE in a first run; they are not GLUE. Their training examples come from files of the running Python's
library that data.py puts into the training split, their test examples from files of its validation split: no
test file was seen in pretraining or by the probe.
"""
import os
from typing import NamedTuple

import numpy as np

from data import VAL_FRACTION
from documents import document_is_val, stdlib_files
from common import DataError, fetch, unzip, write_atomically

# -----------------------------------------------------------------------------
# Metrics of predicted, true: (n,) class numbers, or scores for the correlations. Each returns a float

def accuracy(predicted, true):
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
    """0 if either array is constant, where it is not defined."""
    if np.ptp(predicted) == 0 or np.ptp(true) == 0:
        return 0.0
    x, y = predicted - np.mean(predicted), true - np.mean(true)
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def spearman(predicted, true):
    """Pearson correlation of the ranks, where equal values share their mean rank."""
    return pearson(ranks(predicted), ranks(true))


def ranks(values):
    """(n,) float64: 1 for the smallest; equal values get the mean of their places."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()                                              # place of a value's last occurrence
    return (last - (counts - 1) / 2)[inverse]


METRICS = {"accuracy": accuracy, "F1": f1, "Matthews": matthews, "Pearson": pearson, "Spearman": spearman}


def bootstrap(metric, predicted, true, groups, samples=500):
    """Standard error of metric(predicted, true): its standard deviation over resamples of the groups.

    groups: (n,) numbers; examples of one group (chunks of one file) are not independent and stay together.
    """
    rng, (names, group) = np.random.default_rng(0), np.unique(groups, return_inverse=True)
    values = []
    for _ in range(samples):
        times = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))  # each is drawn
        i = np.repeat(np.arange(len(true)), times[group])
        values.append(metric(predicted[i], true[i]))
    return float(np.std(values, ddof=1))

# -----------------------------------------------------------------------------
# GLUE

class Layout(NamedTuple):
    """Where a task's text and labels are.
    Columns are names in the header, or numbers where there is no header.
    """
    url: str                                # after GLUE_URL
    text: tuple                             # one or two columns
    label: object                           # column
    labels: tuple                           # values of the label, class 0 first; () for a score (regression)
    metrics: tuple
    dev: tuple = ("dev.tsv",)


class Task(NamedTuple):
    """Examples are lists of (text,) or (text, text).

    y: class numbers, or scores if classes is (). groups: examples with equal numbers are never split between
    fit and held-out, and stay together in the bootstrap (GLUE: each its own).
    """
    name: str
    train: list
    y: np.ndarray                           # (n,)
    groups: np.ndarray                      # (n,)
    dev: dict                               # {"": (examples, y, groups)}, or "matched" and "mismatched"
    classes: tuple
    metrics: tuple
    malformed: int                          # rows that were skipped
    half: int = 0                           # pairs: tokens to take of each text, where they meet (0: all)


GLUE_URL = "https://dl.fbaipublicfiles.com/glue/data/"
MRPC_URL = "https://dl.fbaipublicfiles.com/senteval/senteval_data/msr_paraphrase_train.txt"
BINARY, NLI = ("0", "1"), ("entailment", "not_entailment")
GLUE = {
    "CoLA": Layout("CoLA.zip", (3,), 1, BINARY, ("Matthews",)),
    "SST-2": Layout("SST-2.zip", ("sentence",), "label", BINARY, ("accuracy",)),
    "MRPC": Layout("mrpc_dev_ids.tsv", ("#1 String", "#2 String"), "Quality", BINARY, ("F1", "accuracy")),
    "STS-B": Layout("STS-B.zip", ("sentence1", "sentence2"), "score", (), ("Pearson", "Spearman")),
    "QQP": Layout("QQP-clean.zip", ("question1", "question2"), "is_duplicate", BINARY, ("F1", "accuracy")),
    "MNLI": Layout("MNLI.zip", ("sentence1", "sentence2"), "gold_label",
                   ("entailment", "neutral", "contradiction"), ("accuracy",),
                   ("dev_matched.tsv", "dev_mismatched.tsv")),
    "QNLI": Layout("QNLIv2.zip", ("question", "sentence"), "label", NLI, ("accuracy",)),
    "RTE": Layout("RTE.zip", ("sentence1", "sentence2"), "label", NLI, ("accuracy",)),
    "WNLI": Layout("WNLI.zip", ("sentence1", "sentence2"), "label", BINARY, ("accuracy",)),
}


def read_tsv(path, layout):
    """(examples, labels (n,), number of malformed rows) of an official file. Raises DataError
    for a wrong one.

    Fields are separated by tabs and quotes mean nothing (they occur in the text). A row that is too short or
    has another label is malformed.
    """
    with open(path, encoding="utf-8-sig", newline="\n") as file:    # MRPC begins with a byte order mark
        try:
            rows = [line.rstrip("\r\n").split("\t") for line in file]
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: invalid UTF-8: {error.reason}") from None
    columns = [*layout.text, layout.label]
    if isinstance(layout.label, str):                                       # the first row is a header
        header = rows[0] if rows else []
        missing = [name for name in columns if name not in header]
        if missing:
            raise DataError(f"{path}: no column {missing[0]!r} in its header: is it the official file, "
                            "with labels?")
        columns, rows = [header.index(name) for name in columns], rows[1:]
    examples, labels = [], []
    for row in rows:
        label = read_label(row[columns[-1]], layout.labels) if len(row) > max(columns) else None
        if label is not None:
            examples.append(tuple(row[i] for i in columns[:-1]))
            labels.append(label)
    malformed = len(rows) - len(examples)
    if malformed >= len(examples):
        raise DataError(f"{path}: {malformed} of {len(rows)} rows are malformed: is it the official file, "
                        "with labels?")
    return examples, np.array(labels), malformed


def read_label(text, labels):
    """Class number, or score from 0 to 5 if labels is empty; None if it is neither."""
    if labels:
        return labels.index(text) if text in labels else None
    try:
        return float(text) if 0 <= float(text) <= 5 else None
    except ValueError:
        return None


def load_glue(name, glue_dir, download):
    layout, folder = GLUE[name], os.path.join(glue_dir, name)
    files = ["train.tsv", *layout.dev]
    if name == "MRPC" and os.path.exists(os.path.join(folder, "msr_paraphrase_train.txt")):
        split_mrpc(folder)
    for file in files:
        path = os.path.join(folder, file)
        if not os.path.exists(path):
            if not download:
                raise DataError(f"{path} is not there: leave out --glue_dir to download it, or the task")
            download_glue(name, glue_dir, files)
    (train, y, bad), *dev = [read_tsv(os.path.join(folder, file), layout) for file in files]
    names = [file[4:-4] for file in layout.dev]                             # "" or matched, mismatched
    dev_sets = {n: (examples, y, np.arange(len(y))) for n, (examples, y, _) in zip(names, dev)}
    return Task(name, train, y, np.arange(len(y)), dev_sets, layout.labels, layout.metrics,
                bad + sum(d[2] for d in dev))


def download_glue(name, glue_dir, files, base_url=GLUE_URL, mrpc_url=MRPC_URL):
    """Fetch the files of a task into glue_dir/NAME. Raises DataError."""
    folder = os.path.join(glue_dir, name)
    os.makedirs(folder, exist_ok=True)
    url = base_url + GLUE[name].url
    archive = os.path.join(folder, GLUE[name].url)
    fetch(url, archive)
    if name == "MRPC":
        fetch(mrpc_url, os.path.join(folder, "msr_paraphrase_train.txt"))
        split_mrpc(folder)
    else:
        unzip(archive, {f"{name}/{file}": os.path.join(folder, file) for file in files})
        os.remove(archive)


def split_mrpc(folder):
    """train.tsv and dev.tsv from msr_paraphrase_train.txt:
    a row is dev if mrpc_dev_ids.tsv lists its pair of ids.
    """
    try:
        with open(os.path.join(folder, "mrpc_dev_ids.tsv"), "rb") as file:
            dev_ids = {tuple(line.strip().split(b"\t")) for line in file}
        with open(os.path.join(folder, "msr_paraphrase_train.txt"), "rb") as file:
            header, *rows = file.readlines()
    except (FileNotFoundError, ValueError) as error:
        raise DataError(f"{folder}: MRPC cannot be split into train and dev: {error}") from None
    split = {"train.tsv": [header], "dev.tsv": [header]}
    for row in rows:
        split["dev.tsv" if tuple(row.split(b"\t")[1:3]) in dev_ids else "train.tsv"].append(row)
    for file, lines in split.items():
        content = b"".join(lines)
        write_atomically(os.path.join(folder, file), lambda out: out.write(content))

# -----------------------------------------------------------------------------
# Built-in tasks, from the source text of the running Python's standard library

CHUNK = 256                                 # characters, about 90 tokens of the default vocabulary
HALF = 48                                   # tokens of each text of a pair
MAX_CLASSES, PER_CLASS, PER_FILE = 16, 250, 40              # PER_*: chunks of a training class, of a file


def chunks(text):
    """The non-overlapping pieces of CHUNK characters, at most PER_FILE of them,
    evenly spread over the text.
    """
    starts = np.arange(0, len(text) - CHUNK + 1, CHUNK)
    if len(starts) > PER_FILE:
        starts = starts[np.linspace(0, len(starts) - 1, PER_FILE).astype(int)]
    return [text[i:i + CHUNK] for i in starts]


def stdlib_chunks(files, cut):
    """{False: training, True: test} -> [(top-level package or "", file number, cut(text))],
    one for each file.
    """
    split = {False: [], True: []}
    for number, (path, text) in enumerate(files):
        package = path.split("/")[0] if "/" in path else ""
        split[document_is_val(text, VAL_FRACTION["stdlib"])].append((package, number, cut(text)))
    return split


def stdlib_topic(files):
    """From which top-level package is this chunk? The MAX_CLASSES packages with the most training chunks."""
    split = stdlib_chunks(files, chunks)
    size = {part: {} for part in split}
    for part, members in split.items():
        for package, _, texts in members:
            size[part][package] = size[part].get(package, 0) + len(texts)
    packages = sorted((p for p in size[False] if p and size[True].get(p, 0) >= 5),
                      key=lambda p: (-size[False][p], p))
    classes = tuple(sorted(packages[:MAX_CLASSES]))
    rng, rows = np.random.default_rng(0), {False: [], True: []}
    for part, members in split.items():
        for label, package in enumerate(classes):
            mine = [((text,), label, number) for p, number, texts in members if p == package
                    for text in texts]
            rows[part] += [mine[i] for i in sorted(rng.permutation(len(mine))[:PER_CLASS])]
    return make_task("stdlib-topic", rows, classes)


def stdlib_pair(files):
    """Does the second text continue the first? Each first text occurs twice: with its own continuation
    (class 1) and with that of another file (class 0), and of each the HALF tokens next to the cut are taken.
    So both texts are distributed alike in both classes and of one length, and a linear probe on the mean of
    token embeddings is at chance: only context helps. (Not so a maximum: texts that belong together share
    more tokens.)
    """
    rng, rows = np.random.default_rng(0), {False: [], True: []}
    for part, members in stdlib_chunks(files, halves).items():
        pairs = [(pair, number) for _, number, texts in members for pair in texts]
        pairs = [pairs[i] for i in sorted(rng.permutation(len(pairs))[:2000])]          # still in file order
        n = len(pairs)
        largest = np.bincount([number for _, number in pairs]).max() if n else 0    # so far is another file
        shift = int(rng.integers(largest, max(largest, n - largest) + 1))
        for i, ((first, second), number) in enumerate(pairs):
            foreign = pairs[(i + shift) % n][0][1]
            rows[part] += [((first, second), 1, number), ((first, foreign), 0, number)]
    return make_task("stdlib-pair", rows, ("other", "continues"), HALF)


def halves(text):
    """Pairs of CHUNK characters before and after the end of a line, spread over the text: no cut word tells
    which belong together."""
    last, pairs = 0, []
    for start in range(CHUNK, len(text) - CHUNK, 4 * CHUNK):
        cut = text.find("\n", max(start, last + CHUNK)) + 1
        if cut and cut + CHUNK <= len(text):
            pairs.append((text[cut - CHUNK:cut], text[cut:cut + CHUNK]))
            last = cut + CHUNK
    return pairs[:PER_FILE]


def make_task(name, rows, classes, half=0):
    if len(classes) < 2 or not rows[False] or not rows[True]:
        raise DataError(f"{name}: the standard library of this Python has too few source files")
    (train, y, groups), test = [list(zip(*rows[part])) for part in (False, True)]
    dev = (list(test[0]), np.array(test[1]), np.array(test[2]))
    return Task(name, list(train), np.array(y), np.array(groups), {"": dev}, classes, ("accuracy",), 0, half)


STDLIB = {"stdlib-topic": stdlib_topic, "stdlib-pair": stdlib_pair}


def load_task(name, glue_dir, download=True):
    """The Task of that name. Raises DataError, one line."""
    return STDLIB[name](stdlib_files()) if name in STDLIB else load_glue(name, glue_dir, download)
