"""
A copy of this repository for students: the functions of the exercises are blank, and nothing in it gives a
solution away.

    python dev/student_copy.py ../assignment                        # all exercises
    python dev/student_copy.py ../assignment --exercises 1 2 3      # these are blank, the others stay solved

The copy holds the files that git tracks, without history, answers, results and the tests that contain
solutions, and has a README of its own. The body of every function in EXERCISES becomes one line that raises
NotImplementedError. Signature and docstring stay. Functions are found by name, so no markers stand in the
code.
"""
import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))               # so that it runs as `python dev/student_copy.py`

from common import Parser, one_line_errors    # noqa: E402

# {exercise: {file: functions whose bodies the students write}}; exercise 6 is reading curves, not code
EXERCISES = {
    1: {"objectives.py": ["ar"]},
    2: {"objectives.py": ["dar"]},
    3: {"objectives.py": ["uniform_masks", "mask_batch", "mlm"]},
    4: {"objectives.py": ["vlm"]},
    5: {"model.py": ["attention", "plain_loss"]},
    7: {"eval_ppl.py": ["left_to_right_masked"]},
    8: {"probe.py": ["probe"]},
}

# What holds solutions or their numbers, or tests what is left out
LEFT_OUT = [".ci", "results", "assets", "docs/ANSWERS.md", "docs/RESULTS.md", "docs/THEORY.md",
            "dev/LOG.md", "dev/student_copy.py", "tests/test_student_copy.py", "tests/test_readme.py",
            "tests/test_grader.py", "tests/test_grader_model.py", "tests/test_grader_evals.py",
            "tests/test_answers.py", "tests/test_results.py"]

# The copy's README: this, then two sections of ours
README = """\
# Look ahead or look around? The assignment

One small Transformer, one training loop, four pretraining objectives, after
[*Look Ahead or Look Around? A Theoretical Comparison Between Autoregressive and Masked Pretraining*](https://arxiv.org/abs/2407.00935)
(Zhang et al., ICML 2024). You write the functions whose body is `raise NotImplementedError`. What each must do, and how
it is graded: [docs/EXERCISES.md](docs/EXERCISES.md).

```sh
python -m venv .venv && source .venv/bin/activate     # if your system's pip refuses to install anything
pip install -r requirements.txt
python -m pytest --exercises
```

Python 3.10 or newer. The last command prints your points.

"""

# -----------------------------------------------------------------------------
# Blanking a function

def find_function(tree, name):
    """The ast node of a function "f" or method "Class.f". Raises ValueError if there is none."""
    node = tree
    for part in name.split("."):
        inside = [child for child in node.body if getattr(child, "name", None) == part]
        if not inside:
            raise ValueError(f"there is no function {name}")
        node = inside[0]
    return node


def body_span(function):
    """(first, last) line number of a function's body without its docstring, counted from 1."""
    docstring = ast.get_docstring(function) is not None
    if docstring and len(function.body) == 1:
        raise ValueError(f"{function.name} has no body to blank")
    first = function.body[0].end_lineno + 1 if docstring else function.body[0].lineno
    return first, function.end_lineno


def blank(source, functions, exercise):
    """The source of a file in which the bodies of `functions` raise NotImplementedError.

    Returns (new source, the removed lines).

        blank("def f(x):\\n    return x + 1\\n", ["f"], 3)
        -> 'def f(x):\\n    raise NotImplementedError("exercise 3: f, see docs/EXERCISES.md")\\n'
    """
    tree = ast.parse(source)
    lines = source.splitlines()
    nodes = [find_function(tree, name) for name in functions]

    # From the last function to the first, so that line numbers stay right
    removed = []
    for name, node in sorted(zip(functions, nodes), key=lambda pair: -pair[1].lineno):
        first, last = body_span(node)
        indent = " " * (node.col_offset + 4)
        message = f"exercise {exercise}: {name}, see docs/EXERCISES.md"
        removed += lines[first - 1:last]
        lines[first - 1:last] = [f'{indent}raise NotImplementedError("{message}")']
    return "\n".join(lines) + "\n", removed

# -----------------------------------------------------------------------------
# Documents

def section(text, heading):
    """A section of a Markdown text: from its line "## heading" to the next such line."""
    found = re.search(rf"^## {re.escape(heading)}\n.*?(?=\n## |\Z)", text, flags=re.M | re.S)
    if not found:
        raise ValueError(f"there is no section {heading}")
    return found[0]


def readme(ours):
    """The copy's README, from the text of ours."""
    files = section(ours, "Files, in reading order").replace("  results/", "")
    return README + section(ours, "The idea") + "\n" + files


def without_answers(text):
    """A Markdown text without what stands between "<!-- answers -->" and "<!-- end of answers -->".

    Other comments go as well: they name the results that tables were made from.
    """
    text = re.sub(r"<!-- answers -->\n.*?<!-- end of answers -->\n+", "", text, flags=re.S)
    return re.sub(r"<!--.*?-->\n+", "", text, flags=re.S)

# -----------------------------------------------------------------------------
# The copy

def tracked_files():
    """Paths of the repository's files, relative to its root."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{ROOT} is no git repository: {done.stderr.strip()}")
    return [name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def is_left_out(name):
    """Whether a file, by its path in the repository, is not for students."""
    return any(name == out or name.startswith(out + "/") for out in LEFT_OUT)


def read(path):
    return path.read_text(encoding="utf-8")


def write(path, text):
    path.write_text(text, encoding="utf-8")


def make_copy(folder, exercises):
    """Write the student copy to `folder`, which must not exist. Returns the removed lines.

    Raises ValueError, one line, if the folder exists or an exercise has no function to write.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists already: name a new folder")
    unknown = [number for number in exercises if number not in EXERCISES]
    if unknown:
        raise ValueError(f"exercise {unknown[0]} has no function to write; "
                         f"those that have one: {', '.join(map(str, EXERCISES))}")

    # Make it beside its place, and move it there when it is complete
    unfinished = folder.with_name(folder.name + ".tmp")
    if unfinished.exists():
        raise ValueError(f"{unfinished} is in the way, perhaps a copy that was not finished: remove it")
    try:
        for name in tracked_files():
            if not is_left_out(name):
                target = unfinished / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, target)

        # Its documents
        write(unfinished / "README.md", readme(read(unfinished / "README.md")))
        for page in unfinished.glob("docs/*.md"):
            write(page, without_answers(read(page)))

        # Its blank functions
        removed = []
        for number in exercises:
            for name, functions in EXERCISES[number].items():
                source, lines = blank(read(unfinished / name), functions, number)
                write(unfinished / name, source)
                removed += lines
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return removed


def build_parser():
    p = Parser(__doc__.split("\n\n")[0].strip())
    p.add_argument("folder", help="where the copy goes; it must not exist")
    p.add_argument("--exercises", type=int, nargs="+", metavar="N", default=list(EXERCISES),
                   help="the exercises whose functions are blank")
    return p


def main(argv=None):
    args = build_parser().parse_args(argv)
    with one_line_errors():
        removed = make_copy(args.folder, args.exercises)
        print(f"{args.folder}: exercises {', '.join(map(str, args.exercises))}, "
              f"{len(removed)} lines to write. The handout is docs/EXERCISES.md")


if __name__ == "__main__":
    main()
