"""
Metrics, readers and built-in tasks of glue_data.py, features.py, finetune.py and the command line of
eval_glue.py against independent references.
No network.
"""
import http.server
import json
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import documents
import tokenizer
import eval_glue
import features
import finetune
import glue_data
import probe
from common import DataError, load_checkpoint, save_checkpoint, save_config, unzip
from glue_data import GLUE, f1, matthews, parse, pearson, ranks, read_lines, spearman
from model import Config, Transformer

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data" / "glue"


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)

# -----------------------------------------------------------------------------
# Metrics

def test_metrics_on_published_examples():
    # documentation of scikit-learn (matthews_corrcoef, f1_score), scipy (spearmanr); Anscombe's first quartet
    assert matthews(np.array([1, -1, 1, 1]), np.array([1, 1, 1, -1])) == pytest.approx(-1 / 3)
    assert f1(np.array([0, 1, 0, 0, 1, 1]), np.array([0, 1, 1, 0, 1, 0])) == pytest.approx(2 / 3)
    assert spearman(np.array([1, 2, 3, 4, 5.]), np.array([5, 6, 7, 8, 7.])) == pytest.approx(0.82078268)
    x = np.array([10, 8, 13, 9, 11, 14, 6, 4, 12, 7, 5.])
    y = np.array([8.04, 6.95, 7.58, 8.81, 8.33, 9.96, 7.24, 4.26, 10.84, 4.82, 5.68])
    assert pearson(x, y) == pytest.approx(0.81642052)


def test_matthews_and_f1_are_their_formulas():
    rng = np.random.default_rng(0)
    for _ in range(20):
        p, t = rng.integers(0, 2, (2, 30))
        tp, tn, fp, fn = [int(np.sum((p == a) & (t == b))) for a, b in [(1, 1), (0, 0), (1, 0), (0, 1)]]
        assert matthews(p, t) == pytest.approx((tp * tn - fp * fn)
                                               / ((tp+fp) * (tp+fn) * (tn+fp) * (tn+fn)) ** .5)
        assert f1(p, t) == pytest.approx(2 * (tp / (tp+fp)) * (tp / (tp+fn)) / (tp / (tp+fp) + tp / (tp+fn)))


def test_metrics_of_adversarial_cases():
    t, zeros, ones = np.array([0, 1, 1, 0]), np.zeros(4, int), np.ones(4, int)
    assert matthews(zeros, t) == matthews(ones, t) == matthews(t, zeros) == 0 and matthews(1 - t, t) == -1
    assert (f1(zeros, zeros) == 0 and f1(zeros, t) == 0 and f1(ones, zeros) == 0
            and f1(ones, t) == pytest.approx(2 / 3))
    assert pearson(np.full(4, .3), t) == 0 and spearman(np.full(4, .3), t) == 0
    assert ranks(np.array([3., 1, 3, 2, 3])).tolist() == [4, 1, 4, 2, 4]
    assert spearman(np.exp(np.arange(9.)), np.arange(9.)) == pytest.approx(1)


def test_bootstrap_is_the_binomial_error_of_an_accuracy():
    p, t = np.r_[np.ones(300, int), np.zeros(100, int)], np.ones(400, int)
    assert glue_data.bootstrap(glue_data.accuracy, p, t, np.arange(400)) == \
        pytest.approx((.75 * .25 / 400) ** .5, rel=0.15)


def test_bootstrap_keeps_groups_together():
    """400 examples in 100 groups of 4 that are right or wrong together are worth 100, not 400."""
    true = np.ones(400)
    predicted = np.repeat((np.arange(100) % 4 > 0).astype(float), 4)
    error = glue_data.bootstrap(glue_data.accuracy, predicted, true, np.repeat(np.arange(100), 4))
    assert error == pytest.approx((.75 * .25 / 100) ** .5, rel=0.15)

# -----------------------------------------------------------------------------
# Readers: tiny files in the official layouts

HEADERS = {"SST-2": "sentence\tlabel", "MRPC": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
           "STS-B": "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
           "QQP": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
           "QNLI": "index\tquestion\tsentence\tlabel",
           "MNLI": "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
                   "sentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
           "RTE": "index\tsentence1\tsentence2\tlabel", "WNLI": "index\tsentence1\tsentence2\tlabel"}
MNLI_DEV = HEADERS["MNLI"].replace("gold_label", "label2\tlabel3\tlabel4\tlabel5\tgold_label")
COLUMNS = {"CoLA": (3, 1), "SST-2": (0, 1), "MRPC": (3, 4, 0), "STS-B": (7, 8, 9), "QQP": (3, 4, 5),
           "MNLI": (8, 9, 11), "QNLI": (1, 2, 3), "RTE": (1, 2, 3),
           "WNLI": (1, 2, 3)}               # 0-based, text and then label, as distributed
TEXTS = ['say "no', "it 's \u2028 é\x85"]   # stray quote; line separators that str.splitlines would cut at


def write(path, rows, header=None, end="\n", bom=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ([header] if header else []) + ["\t".join(row) for row in rows]
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + "".join(line + end for line in lines).encode())
    return path


def rows_of(name, columns, width):
    labels = GLUE[name].labels or ("2.5", "0.0")
    out = []
    for i in range(6):
        row = ["x"] * width
        for text, column in zip(TEXTS if i % 2 else TEXTS[::-1], columns):
            row[column] = text
        row[columns[-1]] = labels[i % len(labels)]
        out.append(row)
    return out


@pytest.mark.parametrize("name", list(GLUE))
@pytest.mark.parametrize("end, bom", [("\n", False), ("\r\n", True)])
def test_official_layouts(tmp_path, name, end, bom):
    columns, header = COLUMNS[name], HEADERS.get(name)
    rows = rows_of(name, columns, len(header.split("\t")) if header else 4)
    path = write(tmp_path / "t.tsv", rows + [["short"]], header, end, bom)
    (examples, y, _), malformed = parse(read_lines(str(path)), GLUE[name], path)
    assert malformed == 1 and len(y) == 6
    assert examples == [tuple(row[i] for i in columns[:-1]) for row in rows]
    expected = [float(r[columns[-1]]) if name == "STS-B" else GLUE[name].labels.index(r[columns[-1]])
                for r in rows]
    assert y.tolist() == expected


def test_mnli_has_two_dev_sets_with_the_label_elsewhere(tmp_path):
    write(tmp_path / "MNLI/train.tsv", rows_of("MNLI", (8, 9, 11), 12), HEADERS["MNLI"])
    for n, kind in enumerate(["matched", "mismatched"], start=4):
        rows = rows_of("MNLI", (8, 9, 15), 16)[:n]
        rows[0][15] = "-"                                       # no gold label: malformed
        write(tmp_path / f"MNLI/dev_{kind}.tsv", rows, MNLI_DEV)
    task = glue_data.load_task("MNLI", tmp_path, download=False)
    assert ({k: len(d.y) for k, d in task.dev.items()} == {"matched": 3, "mismatched": 4}
            and task.malformed == 2)


def mrpc(folder, ids="mrpc_dev_ids.tsv"):
    """The files as they are distributed, or as the usual download script stores them."""
    rows = [["1", "10", "20", 'a "b', "c"], ["0", "11", "21", "d", "e"], ["1", "10", "21", "f", "g"]]
    write(folder / "MRPC/msr_paraphrase_train.txt", rows, HEADERS["MRPC"], "\r\n", bom=True)
    write(folder / "MRPC" / ids, [["11", "21"]])
    return {path: path.read_bytes() for path in (folder / "MRPC").iterdir()}


def unchanged(before):
    """Whether a folder holds the files {path: content} and no others."""
    folder = next(iter(before)).parent
    return {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("ids", ["mrpc_dev_ids.tsv", "dev_ids.tsv"])
def test_mrpc_is_split_by_the_list_of_dev_ids_and_nothing_is_written(tmp_path, ids):
    before = mrpc(tmp_path, ids)
    task = glue_data.load_task("MRPC", tmp_path, download=False)
    assert task.train.examples == [('a "b', "c"), ("f", "g")] and task.train.y.tolist() == [1, 1]
    assert task.dev[""].examples == [("d", "e")]
    assert unchanged(before)


@pytest.mark.parametrize("ids", ["mrpc_dev_ids.tsv", "dev_ids.tsv", None])
def test_ready_files_of_mrpc_are_read_and_never_written(tmp_path, ids):
    if ids:
        mrpc(tmp_path, ids)
    for file, text in [("train.tsv", "mine"), ("dev.tsv", "ours")]:
        write(tmp_path / "MRPC" / file, [["0", "1", "2", text, "x"]] * 2, HEADERS["MRPC"])
    before = {path: path.read_bytes() for path in (tmp_path / "MRPC").iterdir()}
    task = glue_data.load_task("MRPC", tmp_path, download=False)
    assert task.train.examples == [("mine", "x")] * 2 and task.dev[""].examples == [("ours", "x")] * 2
    assert unchanged(before)


@pytest.mark.parametrize("encoding, named", [("utf-16-le", "UTF-16"), ("latin-1", "Latin-1")])
def test_other_encodings_are_named_in_one_line(tmp_path, encoding, named):
    path = tmp_path / "RTE/train.tsv"
    path.parent.mkdir()
    path.write_bytes((HEADERS["RTE"] + "\n0\tcaf\u00e9\tb\tentailment\n").encode(encoding))
    write(tmp_path / "RTE/dev.tsv", [["0", "a", "b", "entailment"]] * 2, HEADERS["RTE"])
    with pytest.raises(DataError, match=named) as error:
        glue_data.load_task("RTE", tmp_path, download=False)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize("name, header, rows, message", [
    ("RTE", HEADERS["SST-2"], [["a", "1"]], "no column"),
    ("RTE", "index\tsentence1\tsentence2", [["0", "a", "b"]], "no column 'label'"),        # the test file
    ("SST-2", HEADERS["WNLI"].replace("sentence1", "sentence"), [["0", "a", "b", "maybe"]] * 3, "malformed"),
    ("CoLA", "index\tsentence", [["0", "a"]] * 3, "malformed"),                            # the test file
    ("CoLA", None, [], "malformed")])
def test_wrong_files_are_refused_in_one_line(tmp_path, name, header, rows, message):
    with pytest.raises(DataError, match=message) as error:
        path = write(tmp_path / "t.tsv", rows, header)
        parse(read_lines(str(path)), GLUE[name], path)
    assert "\n" not in str(error.value)


def test_official_files_where_they_are():
    if not SHARED.exists():
        pytest.skip("needs ../shared/data/glue")
    for name, n, m in [("CoLA", 8551, 1043), ("SST-2", 67349, 872), ("RTE", 2490, 277), ("WNLI", 635, 71)]:
        task = glue_data.load_task(name, SHARED, download=False)
        assert (len(task.train.y), len(task.dev[""].y), task.malformed) == (n, m, 0)

# -----------------------------------------------------------------------------
# Downloads

@pytest.fixture
def server(tmp_path):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path / "www"))

        def log_message(self, *args):
            pass

    (tmp_path / "www").mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()


def test_download(tmp_path, server):
    with zipfile.ZipFile(tmp_path / "www/RTE.zip", "w") as z:
        for file in ("train.tsv", "dev.tsv", "test.tsv"):
            z.writestr(f"RTE/{file}", file)
    glue = str(tmp_path / "glue")
    glue_data.download_glue("RTE", glue, server)
    assert files(tmp_path / "glue/RTE") == {"train.tsv": "train.tsv", "dev.tsv": "dev.tsv"}
    with pytest.raises(DataError, match="404"):
        glue_data.download_glue("WNLI", glue, server)


def files(folder):
    """{name: text} without what a lock may leave."""
    return {path.name: path.read_text() for path in folder.iterdir() if path.suffix != ".lock"}


def test_download_adds_what_is_missing_and_keeps_what_is_there(tmp_path, server):
    with zipfile.ZipFile(tmp_path / "www/RTE.zip", "w") as z:
        for file in ("train.tsv", "dev.tsv"):
            z.writestr(f"RTE/{file}", file)
    (tmp_path / "glue/RTE").mkdir(parents=True)
    (tmp_path / "glue/RTE/train.tsv").write_text("mine")
    glue_data.download_glue("RTE", str(tmp_path / "glue"), server)
    assert files(tmp_path / "glue/RTE") == {"train.tsv": "mine", "dev.tsv": "dev.tsv"}


def test_download_of_mrpc_leaves_the_two_files_as_they_came(tmp_path, server):
    before = mrpc(tmp_path / "www")
    base = server + "MRPC/"
    glue_data.download_glue("MRPC", str(tmp_path / "glue"), base, base + "msr_paraphrase_train.txt")
    assert files(tmp_path / "glue/MRPC").keys() == {path.name for path in before}
    assert len(glue_data.load_task("MRPC", tmp_path / "glue", download=False).train.y) == 2


@pytest.mark.parametrize("bad", ["../evil.tsv", "/evil.tsv", "RTE/../../evil.tsv", "..\\evil.tsv"])
def test_only_the_named_members_of_an_archive_are_written(tmp_path, bad):
    archive = tmp_path / "in" / "RTE.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as z:
        z.writestr("RTE/train.tsv", "x")
        z.writestr(bad, "x")
    unzip(archive, {"RTE/train.tsv": archive.parent / "train.tsv"})
    assert [p.name for p in tmp_path.rglob("*.tsv")] == ["train.tsv"]
    assert not Path("/evil.tsv").exists()


def test_what_is_no_archive_is_refused(tmp_path):
    archive = tmp_path / "RTE.zip"
    archive.write_bytes(b"<html>not a zip</html>")
    with pytest.raises(DataError):
        unzip(archive, {"RTE/train.tsv": tmp_path / "train.tsv"})
    assert not (tmp_path / "train.tsv").exists()

# -----------------------------------------------------------------------------
# Built-in tasks, on an invented library

def library():
    rng = np.random.default_rng(1)
    words = ["alpha", "beta", "gamma", "delta", "if", "return", "self", "None"]
    return [(f"p{i % 4}/f{i}.py", "\n".join(" ".join(rng.choice(words, 6)) + f" {i}" for _ in range(60)))
            for i in range(120)]


def test_builtin_tasks_never_share_a_file_between_train_and_test():
    files = library()
    for make in glue_data.BUILT_IN.values():
        task = make(files)
        of_test = {text for _, text in files if documents.document_is_val(text, data.VAL_FRACTION["stdlib"])}
        for example in task.train.examples:
            assert not any(example[0] in text for text in of_test)
        for example in task.dev[""].examples:
            assert any(example[0] in text for text in of_test)
    assert set(glue_data.stdlib_topic(files).classes) <= {"p0", "p1", "p2", "p3"}


def test_pair_is_balanced_and_its_halves_have_the_same_distribution_in_both_classes():
    task = glue_data.stdlib_pair(library())
    for examples, y, _ in (task.train, task.dev[""]):
        assert 2 * y.sum() == len(y)
        for half in (0, 1):
            kept = [sorted(e[half] for e, label in zip(examples, y) if label == k) for k in (0, 1)]
            assert kept[0] == kept[1]
    texts = [text for _, text in library()]
    for test in (lambda a, b, text: a + b in text,
                 lambda a, b, text: a in text and b in text):               # the latter: one file
        assert ([any(test(a, b, text) for text in texts) for a, b in task.train.examples]
                == task.train.y.astype(bool).tolist())
    assert {len(half) for example in task.train.examples for half in example} == {glue_data.CHUNK}


def test_pair_takes_equally_many_tokens_of_both_texts_where_they_meet():
    encoding, pair = tokenizer.build_encoding({"name": "bytes"}), ("abcdefgh", "123456")
    for T, half, a, b in [(64, 3, "fgh", "123"), (6, 3, "gh", "12"), (64, 0, *pair)]:
        (row,), _ = features.encode(encoding, [pair], T, half)
        assert row == [*a.encode(), encoding.eot_token, *b.encode()]

# -----------------------------------------------------------------------------
# Features

def trained(causal, n_layer=2):
    torch.manual_seed(3)
    model = Transformer(Config(vocab_size=257, block_size=24, n_layer=n_layer, n_head=2, n_embd=16,
                               causal=causal))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.eval()


@pytest.mark.parametrize("causal", [False, True])
def test_features_do_not_depend_on_batching(causal):
    model, rng = trained(causal), np.random.default_rng(0)
    rows = [rng.integers(0, 256, n).tolist() for n in rng.integers(1, 25, 40)]
    for layer in (None, 1):
        batched = features.extract(model, rows, 256, layer, ["mean", "max", "last"])
        for i, row in enumerate(rows):
            hidden = model.features(torch.tensor([row]), layer=layer)[0].detach()
            for kind, value in [("mean", hidden.mean(0)), ("max", hidden.max(0).values),
                                ("last", hidden[-1])]:
                torch.testing.assert_close(batched[kind][i], value, atol=1e-5, rtol=1e-4)


def test_batches_hold_everything_once_within_the_limit():
    lengths = np.random.default_rng(0).integers(1, 100, 300).tolist()
    cut = list(features.batches_by_length(lengths, 500))
    assert sorted(np.concatenate(cut)) == list(range(300))
    assert all(max(lengths[i] for i in b) * len(b) <= 500 for b in cut)


def test_untrained_features_are_its_embeddings():
    model = eval_glue.untrained(trained(False))
    ids = torch.randint(257, (3, 24))
    assert torch.equal(model.features(ids), model.features(ids, layer=0))
    assert torch.equal(model.wte.weight, eval_glue.untrained(trained(True)).wte.weight)


def test_pairs_are_cut_to_fit():
    encoding = tokenizer.build_encoding({"name": "bytes"})
    for a, b in [("a" * 40, "bb"), ("aa", "b" * 40), ("a" * 40, "b" * 40), ("", ""), ("a" * 10, "b" * 13)]:
        [row], cut = features.encode(encoding, [(a, b)], 24)
        ids_a, ids_b = row[:row.index(256)], row[row.index(256) + 1:]
        assert len(row) == min(24, len(a) + len(b) + 1) and cut == (len(a) + len(b) + 1 > 24)
        assert set(ids_a) <= {97} and set(ids_b) <= {98}
        assert len(ids_a) >= min(len(a), 11) and len(ids_b) >= min(len(b), 11)
    assert features.encode(encoding, [("",)], 24) == ([[256]], 0)

# -----------------------------------------------------------------------------
# The script

def save(folder, causal):
    folder.mkdir(parents=True)
    model = trained(causal)
    save_config(folder, model.config, train={})
    save_checkpoint(folder, model, [], 7)
    tokenizer.save_tokenizer({"name": "bytes"}, folder)


def rte(folder, n_train, n_dev, pair, flip=0.0, seed=0):
    """A task of two classes in the layout of RTE: pair(class, number) -> two texts. flip: share of dev
    labels that are wrong."""
    rng = np.random.default_rng(seed)
    for file, n in [("train.tsv", n_train), ("dev.tsv", n_dev)]:
        y = rng.integers(0, 2, n)
        wrong = rng.random(n) < (flip if file == "dev.tsv" else 0)
        rows = [[str(i), *pair(k, i), GLUE["RTE"].labels[k ^ w]] for i, (k, w) in enumerate(zip(y, wrong))]
        write(folder / file, rows, HEADERS["RTE"])


def different_words(k, i):
    return ["yes!", "no"][k], f"b{i}"


def different_order(k, i):
    """The same letters in both classes: only what sees their order can tell."""
    return [("aab", "cdd"), ("ddc", "baa")][k]


@pytest.fixture
def checkpoints(tmp_path, monkeypatch):
    save(tmp_path / "ar", True)
    save(tmp_path / "vlm", False)
    rte(tmp_path / "glue/RTE", 120, 40, different_words)
    write(tmp_path / "glue/WNLI/train.tsv", [[str(i), "ab"[i % 2], "c", str(i % 2)] for i in range(60)],
          HEADERS["WNLI"])
    write(tmp_path / "glue/WNLI/dev.tsv", [[str(i), "ab"[i % 2], "c", str(i % 2)] for i in range(21)],
          HEADERS["WNLI"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(probe, "ENOUGH", 20)                                # faster: two tenths are judged
    monkeypatch.setattr(glue_data, "RESAMPLES", 20)
    return tmp_path


def main(*flags, checkpoint="vlm"):
    eval_glue.main(["--checkpoint", checkpoint, "--glue_dir", "glue", *flags])
    return report(checkpoint)


def report(checkpoint="vlm"):
    return json.loads(Path(checkpoint, "eval_glue.json").read_text())


def names(report):
    return sorted({row["task"] for row in report["results"]})


@pytest.mark.slow
def test_script_writes_a_table_and_a_json_for_each_checkpoint(checkpoints):
    done = subprocess.run([sys.executable, str(ROOT / "eval_glue.py"), "--checkpoint", "ar", "vlm",
                           "--glue_dir", "glue", "--tasks", "RTE", "--pool", "mean", "last"],
                          cwd=checkpoints, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "RTE, accuracy, mean" in done.stdout and "most frequent class" in done.stdout
    [line] = [line for line in done.stdout.splitlines() if line.startswith("vlm: RTE:")]
    assert "100.0 ± 0.0" in line                                    # the value, as soon as it is known
    for name in ("ar", "vlm"):
        found = report(name)
        assert found["step"] == 7 and "--tasks RTE" in found["command"] and len(found["results"]) == 2
        assert found["weights"] == load_checkpoint(name)[1]["weights"]
        mean = found["results"][0]
        assert mean["model"]["value"] == 1.0 and mean["n_train"] == 120 and mean["n_dev"] == 40
        assert mean["majority"]["value"] < 0.8 and mean["majority"]["se"] > 0
        assert mean["protocol"] == "probe" and mean["layer"] is mean["directions"] is None


def test_value_and_error_can_be_computed_again_from_the_file(checkpoints):
    found = main("--tasks", "RTE", "--max_train", "30")
    row, test = found["results"][0], found["tests"]["RTE"]
    labels = np.array([int(c, 36) for c in test["labels"]])
    assert test["groups"] is None and len(labels) == 40
    for source in ("model", "embeddings", "untrained", "majority"):
        predicted = np.array([int(c, 36) for c in row[source]["predictions"]])
        assert np.mean(predicted == labels) == row[source]["value"]
        error = glue_data.bootstrap(glue_data.accuracy, predicted, labels, np.arange(40))
        assert error == row[source]["se"]


def test_predictions_are_compact():
    assert eval_glue.compact(np.array([0, 9, 10, 35]), tuple(range(36))) == "09az"
    assert eval_glue.compact(np.array([1.23456, -2]), ()) == [1.2346, -2.0]


def test_groups_of_the_built_in_tasks_are_stored(monkeypatch):
    task = glue_data.stdlib_topic(library())
    stored = eval_glue.dev_labels(task)["stdlib-topic"]
    assert stored["groups"] == task.dev[""].groups.tolist()
    assert [int(c, 36) for c in stored["labels"]] == task.dev[""].y.tolist()


def test_result_does_not_depend_on_the_global_seed(checkpoints):
    values = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        rows = main("--tasks", "RTE")["results"]
        values.append([{name: row[name] for name in row if name != "seconds"} for row in rows])
    assert values[0] == values[1]


@pytest.mark.slow
def test_results_of_other_commands_on_the_same_weights_are_kept(checkpoints):
    main("--tasks", "RTE")
    main("--tasks", "WNLI")
    main("--tasks", "RTE", "--pool", "max")
    main("--tasks", "RTE", "--layer", "1")
    main("--tasks", "RTE", "--directions", "4", "all")
    main("--tasks", "RTE", "--max_train", "50")
    main("--tasks", "RTE", "--finetune", "--seeds", "1", "--epochs", "1", "--lr", "1e-3")
    found = main("--tasks", "RTE", "--finetune", "--seeds", "1", "--epochs", "1", "--lr", "1e-2")
    assert sorted(found["tests"]) == names(found) == ["RTE", "WNLI"]
    assert len(found["results"]) == 8
    assert len(main("--tasks", "RTE", "WNLI")["results"]) == 8              # measured again: replaced
    assert {row["directions"] for row in found["results"]} == {None, 4}
    assert sorted(row["protocol"] for row in found["results"]) == ["finetune"] * 2 + ["probe"] * 6


def test_results_of_other_weights_are_dropped(checkpoints, capsys):
    main("--tasks", "RTE")
    model = trained(False)
    with torch.no_grad():
        model.wte.weight[0, 0] += 1
    save_checkpoint(checkpoints / "vlm", model, [], 7)                      # same step, same command
    found = main("--tasks", "WNLI")
    assert names(found) == ["WNLI"] and "other weights" in capsys.readouterr().out
    assert found["weights"] == load_checkpoint("vlm")[1]["weights"]


def test_results_on_other_dev_examples_are_dropped(checkpoints):
    main("--tasks", "RTE")
    main("--tasks", "WNLI")
    rte(checkpoints / "glue/RTE", 120, 40, different_words, seed=1)
    found = main("--tasks", "RTE", "--pool", "max")
    assert [(row["task"], row["pool"]) for row in found["results"]] == [("WNLI", "mean"), ("RTE", "max")]


def test_a_failure_in_the_second_task_keeps_the_first(checkpoints, monkeypatch):
    evaluate = eval_glue.evaluate

    def fails(model, encoding, task, args):
        if task.name == "WNLI":
            raise KeyboardInterrupt
        return evaluate(model, encoding, task, args)

    monkeypatch.setattr(eval_glue, "evaluate", fails)
    with pytest.raises(SystemExit):
        main("--tasks", "RTE", "WNLI")
    assert names(report()) == ["RTE"]


def test_a_missing_task_stops_before_anything_is_computed(checkpoints, monkeypatch, capsys):
    monkeypatch.setattr(eval_glue, "evaluate", None)
    monkeypatch.setattr(eval_glue, "load_task", None)                       # nor read
    with pytest.raises(SystemExit) as stop:
        main("--tasks", "RTE", "SST-2")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "SST-2/train.tsv is missing" in error
    assert "--tasks RTE WNLI " in error and not Path("vlm/eval_glue.json").exists()


def test_hint_about_what_is_there_works_when_typed_in(checkpoints):
    with pytest.raises(DataError) as error:
        glue_data.check_files(["SST-2"], "glue")
    hint = str(error.value).split(": ", 1)[1].split(" takes ")[0]
    assert names(main(*hint.split())) == ["RTE", "WNLI"]


def test_where_nothing_can_be_written_the_table_is_printed_and_one_line_says_so(checkpoints, capsys):
    (checkpoints / "vlm/eval_glue.json.tmp").mkdir()                        # not even root can write here
    with pytest.raises(SystemExit) as stop:
        eval_glue.main(["--checkpoint", "vlm", "ar", "--glue_dir", "glue", "--tasks", "RTE", "WNLI"])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and names(report("ar")) == ["RTE", "WNLI"]
    assert "RTE, accuracy, mean" in out and "WNLI, accuracy, mean" in out
    assert err.count("\n") == 1 and "--results DIR" in err
    eval_glue.main(["--checkpoint", "vlm", "--glue_dir", "glue", "--tasks", "RTE", "--results", "mine"])
    assert names(json.loads(Path("mine/vlm/eval_glue.json").read_text())) == ["RTE"]
    assert not Path("vlm/eval_glue.json").exists()


@pytest.mark.parametrize("flags, message", [("vlm vlm", "vlm twice"), ("vlm other/vlm --results mine", "same name")])
def test_two_checkpoints_do_not_share_a_file_of_results(checkpoints, capsys, flags, message):
    save(checkpoints / "other/vlm", True)
    with pytest.raises(SystemExit) as stop:
        eval_glue.main(["--glue_dir", "glue", "--tasks", "RTE", "--checkpoint", *flags.split()])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_malformed_rows_are_said_where_there_are_some(checkpoints, capsys):
    main("--tasks", "WNLI")
    assert "malformed" not in capsys.readouterr().out
    with open("glue/WNLI/train.tsv", "a") as file:
        file.write("60\ta\tc\tno label\n")
    main("--tasks", "WNLI")
    assert "1 malformed rows skipped" in capsys.readouterr().out

# -----------------------------------------------------------------------------
# What is compared with what

def test_baselines_without_context_cannot_tell_the_order_of_words(checkpoints):
    """The mean of embeddings is the same for both classes, trained or not. Fed with the model's own
    features, these baselines would be as good as the model."""
    rte(checkpoints / "glue/RTE", 120, 40, different_order)
    [row] = main("--tasks", "RTE")["results"]
    assert row["model"]["value"] == 1.0
    for source in ("embeddings", "untrained"):
        assert len(set(row[source]["predictions"])) == 1, source


def test_embeddings_baseline_is_the_probe_of_the_trained_embeddings(checkpoints):
    """By hand, from the checkpoint's embedding matrix."""
    task = glue_data.load_task("RTE", "glue", download=False)
    rng = np.random.default_rng(0)
    noisy = task.train._replace(y=np.where(rng.random(120) < 0.3, 1 - task.train.y, task.train.y))
    rows = [["0", *texts, GLUE["RTE"].labels[k]] for texts, k in zip(noisy.examples, noisy.y)]
    write(checkpoints / "glue/RTE/train.tsv", rows, HEADERS["RTE"])
    [row] = main("--tasks", "RTE")["results"]

    table = load_checkpoint("vlm")[0].wte.weight.detach().double()
    table = table / (table.square().mean(1, keepdim=True) + 1e-6).sqrt()
    def features(examples):
        ids = [[*a.encode(), 256, *b.encode()] for a, b in examples]
        return torch.stack([table[i].mean(0) for i in ids]).float()

    (predicted,), _ = probe.probe(features(noisy.examples), noisy.y, noisy.groups,
                                      [features(task.dev[""].examples)], 2, glue_data.accuracy)
    assert row["embeddings"]["predictions"] == "".join(map(str, predicted))


def test_directions_are_stored_in_rows_of_their_own(checkpoints):
    """Six letters, each as likely as the others: a single direction cannot tell two sets of three."""
    def letter(k, i):
        return "ace"[i % 3] if k else "bdf"[i % 3], ""

    rte(checkpoints / "glue/RTE", 120, 40, letter)
    found = main("--tasks", "RTE", "--directions", "1", "16", "all")["results"]
    assert [row["directions"] for row in found] == [1, 16, None]
    assert found[0]["model"]["value"] < 0.95
    assert found[1]["model"]["value"] == found[2]["model"]["value"] == 1.0


def test_best_layer_is_chosen_on_training_examples_only(checkpoints, monkeypatch):
    """Layer 1 of two is the only one that knows: it is chosen, whatever the labels of dev are."""
    features = Transformer.features

    def only_layer_1_knows(model, inputs, valid=None, layer=None, cache=None):
        hidden = features(model, inputs, valid, layer, cache)
        return hidden if layer == 1 else torch.ones_like(hidden)

    monkeypatch.setattr(Transformer, "features", only_layer_1_knows)
    for flip in (0.0, 1.0):
        rte(checkpoints / "glue/RTE", 120, 40, different_words, flip)
        [row] = main("--tasks", "RTE", "--layer", "best")["results"]
        assert row["layer"] == "best" and row["model"]["layer"] == 1
        assert row["model"]["value"] == 1 - flip


def test_by_length_is_the_metric_on_short_middle_and_long_texts(checkpoints):
    def pair(k, i):
        """Long texts are wrong in dev only through the flipped label below."""
        return ["y", "n"][k], "b" * (1 + i % 9)

    rte(checkpoints / "glue/RTE", 200, 90, pair)
    lines = (checkpoints / "glue/RTE/dev.tsv").read_text().splitlines()
    wrong = {"entailment": "not_entailment", "not_entailment": "entailment"}
    for i in range(6, 90, 9):                               # texts of 1 + 1 + 7 tokens
        fields = lines[1 + i].split("\t")
        lines[1 + i] = "\t".join([*fields[:3], wrong[fields[3]]])
    (checkpoints / "glue/RTE/dev.tsv").write_text("\n".join(lines) + "\n")
    [row] = main("--tasks", "RTE", "--by_length")["results"]
    parts = [(part["up_to"], part["n"], round(part["value"], 3)) for part in row["by_length"]]
    assert parts == [(5, 30, 1.0), (8, 30, 1.0), (11, 30, 0.667)]
    assert row["model"]["value"] == pytest.approx(80 / 90)


def test_texts_of_one_length_are_one_part(checkpoints):
    rte(checkpoints / "glue/RTE", 60, 30, different_order)
    [row] = main("--tasks", "RTE")["results"]
    assert [(part["up_to"], part["n"]) for part in row["by_length"]] == [(7, 30)]

# -----------------------------------------------------------------------------
# Fine-tuning

def flags_of(*flags):
    return eval_glue.build_parser().parse_args(["--checkpoint", "vlm", "--finetune", *flags])


def test_batches_of_fine_tuning():
    """Every example once, all batches full but one, in another order each epoch, with less padding than chance."""
    lengths = np.random.default_rng(0).integers(1, 100, size=1003)
    rng = np.random.default_rng(1)
    epochs = [finetune.shuffled_batches(lengths, 20, rng) for _ in range(2)]
    for batches in epochs:
        assert sorted(np.concatenate(batches)) == list(range(1003))
        assert sorted(map(len, batches)) == [3] + 50 * [20]
    first, second = ({tuple(sorted(batch)) for batch in batches} for batches in epochs)
    assert len(first & second) < 5

    # Long and short batches are mixed
    longest = [lengths[batch].max() for batch in epochs[0]]
    assert 0.25 < np.mean(np.diff(longest) > 0) < 0.75
    padded = sum(len(batch) * lengths[batch].max() for batch in epochs[0])
    chance = sum(20 * lengths[start:start + 20].max() for start in range(0, 1000, 20))
    assert padded < 1.15 * lengths.sum() < 0.65 * chance

    # Few examples are one batch
    [only] = finetune.shuffled_batches(lengths[:5], 20, rng)
    assert sorted(only) == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_finetune_starts_at_the_checkpoint_and_leaves_it_unchanged(checkpoints):
    model = trained(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    task = glue_data.load_task("RTE", "glue", False)
    task, _ = features.tokenize(task, tokenizer.build_encoding({"name": "bytes"}), 24)
    finetune.finetune(model, task.train, [task.train], 2, 256, "mean", 1e-3, 0, flags_of("--epochs", "1"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    [row] = main("--tasks", "RTE", "--finetune", "--seeds", "2", "--epochs", "10",
                 "--lr", "3e-3", "1e-2")["results"]
    assert len(row["model"]["seeds"]) == 2 and row["model"]["value"] > 0.9
    assert row["model"]["lr"] in (3e-3, 1e-2)


def test_baseline_of_finetuning_is_the_same_finetuning_from_initial_weights(checkpoints, monkeypatch):
    """A frozen probe of the initial model cannot tell the order of words; fine-tuned, it can."""
    rte(checkpoints / "glue/RTE", 100, 40, different_order)
    flags = ["--tasks", "RTE", "--finetune", "--seeds", "1", "--epochs", "10", "--lr", "1e-2"]
    [row] = main(*flags)["results"]
    assert row["untrained"]["value"] > 0.9 and "embeddings" not in row
    assert row["untrained"]["lr"] == 1e-2

    # What each run of it began with
    begun = []
    tune = finetune.finetune

    def record(model, *rest, **how):
        begun.append(model.wte.weight.clone())
        return tune(model, *rest, **how)

    monkeypatch.setattr(finetune, "finetune", record)
    main(*flags)
    first, second = begun
    assert torch.equal(first, load_checkpoint("vlm")[0].wte.weight)
    assert torch.equal(second, eval_glue.untrained(trained(False)).wte.weight)


def test_learning_rate_is_chosen_on_training_examples_only(checkpoints):
    """All labels of dev are wrong: chosen there, the rate that is far too large to learn would win."""
    rte(checkpoints / "glue/RTE", 120, 40, different_words, flip=1.0)
    [row] = main("--tasks", "RTE", "--finetune", "--seeds", "1", "--epochs", "5",
                 "--lr", "1e-2", "1e2")["results"]
    assert row["model"]["lr"] == 1e-2 and row["model"]["value"] < 0.2
    assert row["model"]["held_out"]["0.01"] > 0.9


def test_learning_rate_is_judged_on_examples_that_were_not_fitted(checkpoints, monkeypatch):
    rte(checkpoints / "glue/RTE", 120, 40, different_words)
    calls = []

    def record(model, train, tests, lr, seed, **how):
        calls.append((train.groups, [test.groups for test in tests], lr, seed))
        return [test.y if lr == 1e-3 else 0 * test.y for test in tests]

    monkeypatch.setattr(finetune, "finetune", record)
    main("--tasks", "RTE", "--finetune", "--seeds", "3", "--lr", "1e-2", "1e-3")
    assert len(calls) == 10                         # model and untrained: two rates, then all of it with 3 seeds
    fitted, [judged], _, _ = calls[0]
    assert sorted([*fitted, *judged]) == list(range(120)) and len(judged) == 12
    assert [lr for _, _, lr, _ in calls[:2]] == [1e-3, 1e-2]
    final = calls[2:5]
    assert [len(fitted) for fitted, *_ in final] == [120] * 3
    assert [(lr, seed) for *_, lr, seed in final] == [(1e-3, 0), (1e-3, 1), (1e-3, 2)]


@pytest.mark.parametrize("seeds", [1, 2, 3, 4])
def test_value_error_and_predictions_of_fine_tuning_are_of_one_seed(seeds):
    """The median of the metric that is asked for: of an even number of seeds, the lower of the two."""
    y = np.array([0, 1] * 10)
    split = glue_data.Split([], y, np.arange(20))
    by_seed = []
    for wrong in (6, 2, 4, 0)[:seeds]:
        predicted = y.copy()
        predicted[:wrong] = 1 - predicted[:wrong]
        by_seed.append([predicted])
    fit = eval_glue.Fit(by_seed, {})
    found = eval_glue.score(fit, 0, split, glue_data.accuracy, ("a", "b"))
    values = [0.7, 0.9, 0.8, 1.0][:seeds]
    assert found["value"] == sorted(values)[(seeds - 1) // 2]
    assert found.get("seeds", values) == values and ("seeds" in found) == (seeds > 1)
    predicted = np.array([int(digit) for digit in found["predictions"]])
    assert found["value"] == np.mean(predicted == y)
    assert found["se"] == glue_data.bootstrap(glue_data.accuracy, predicted, y, split.groups)
    assert eval_glue.median_seed(fit, 0, split, glue_data.accuracy)[0].tolist() == predicted.tolist()

    # Accuracy by length is of the same seed: of equal lengths there is one part
    equal = glue_data.Split([[1, 2]] * 20, y, np.arange(20))
    [part] = eval_glue.by_length({"model": fit}, 0, equal, glue_data.accuracy)
    assert part == {"up_to": 2, "n": 20, "value": found["value"]}


def test_ties_between_learning_rates_go_to_the_middle():
    for values, best in [([1, 1, 1, 0], 1), ([1, 1, 1, 1], 1), ([0, 1, 1, 1], 1), ([0, 0, 1, 1], 2),
                         ([1, 0, 0, 1], 0), ([0, 2, 1], 1), ([1], 0), ([1, 1, 1, 1, 1], 2)]:
        assert finetune.best_rate(values) == best


def test_chosen_rate_is_printed_and_the_edge_of_the_grid_is_named(checkpoints, monkeypatch, capsys):
    rates = []

    def learns_at(model, train, tests, n_classes, eot, kind, lr, seed, args):
        """Knows everything at the rate 1e-2, nothing at others."""
        rates.append(lr)
        return [test.y if lr == 1e-2 else 0 * test.y for test in tests]

    monkeypatch.setattr(finetune, "finetune", learns_at)
    main("--tasks", "RTE", "--finetune", "--seeds", "1", "--lr", "1e-2", "1e-3")
    assert "(lr 0.01, at the upper edge of the grid: try --lr 0.01 0.03 0.1)" in capsys.readouterr().out
    main("--tasks", "RTE", "--finetune", "--seeds", "1", "--lr", "1e-3", "1e-2", "1e-1")
    assert "(lr 0.01)" in capsys.readouterr().out
    rates.clear()
    main("--tasks", "RTE", "--finetune", "--seeds", "2", "--lr", "1e-1")    # nothing to choose
    assert "(lr 0.1)" in capsys.readouterr().out and rates == [1e-1] * 4


def test_batch_size_is_the_number_of_examples_per_update(checkpoints, monkeypatch):
    sizes = []
    collate = features.collate
    monkeypatch.setattr(finetune, "collate",
                        lambda rows, *rest: (sizes.append(len(rows)), collate(rows, *rest))[1])
    task, _ = features.tokenize(glue_data.load_task("RTE", "glue", False),
                                tokenizer.build_encoding({"name": "bytes"}), 24)
    finetune.finetune(trained(False), task.train, [], 2, 256, "mean", 1e-3, 0,
                      flags_of("--epochs", "2", "--batch_size", "50"))
    assert sorted(sizes[:3]) == sorted(sizes[3:]) == [20, 50, 50]

# -----------------------------------------------------------------------------
# Bad input

@pytest.mark.parametrize("flags", [["--tasks", "SST-2"], ["--tasks", "RTE", "--layer", "9"],
                                   ["--tasks", "RTE", "--layer", "-1"], ["--tasks", "RTE", "--layer", "x"],
                                   ["--tasks", "nonsense"], ["--tasks", "RTE", "--max_train", "-1"],
                                   ["--tasks", "RTE", "--directions", "17"],
                                   ["--tasks", "RTE", "--directions", "0"],
                                   ["--tasks", "RTE", "--finetune", "--layer", "best"],
                                   ["--tasks", "RTE", "--finetune", "--directions", "4"],
                                   ["--tasks", "RTE", "--finetune", "--lr", "0"],
                                   ["--tasks", "RTE", "--finetune", "--batch_size", "0"],
                                   ["--checkpoint", "nowhere"]])
def test_bad_input_gets_one_line_and_exit_code_2(checkpoints, capsys, flags):
    with pytest.raises(SystemExit) as stop:
        eval_glue.main(["--checkpoint", "ar", "--glue_dir", "glue", *flags])
    assert stop.value.code == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].count("error: ") == 1
