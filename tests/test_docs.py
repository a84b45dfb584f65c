"""The examples in README.md and docs/ are run, page by page, as a reader would type them.

An example is an indented or fenced block in which a line calls sciexec (or apptainer or singularity).  One bash runs a page from
top to bottom, so that an example finds what an earlier one made.

    $ COMMAND                        lines without "$ " behind it are what it prints, on both streams; "..." is anything
    COMMAND                          in a block without any "$ ": every line is a command; what it prints is not looked at

The code must be 0, unless "FATAL: " is expected and the command does not end with `echo $?`.
Comments of HTML, which no reader sees, in front of a block:

    <!-- not run: REASON -->         the block needs what is not here
    <!-- not run (TEXT): REASON -->  its lines with TEXT in them do
    <!-- file: NAME -->              the block is the content of a file, which is there from the page's beginning
    <!-- setup: COMMAND -->          run in front of it
"""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import demo_image
import pytest
from conftest import Need, architecture

from sciexec import help, options
from sciexec.options import LATER, READY

TREE = Path(__file__).resolve().parent.parent
PAGES = [TREE / "README.md", *sorted((TREE / "docs").glob("*.md"))]
CALL = re.compile(r"(?:^|[\s;|&(!])(?:sciexec|apptainer|singularity) +[-a-z\"$]")
COMMENT = re.compile(r"<!-- *(not run|file|setup)(?: \(([^)]*)\))?: *(.*?) *-->", re.S)
REASONS = ("registry", "cluster", "GPU", "synopsis", "terminal", "site", "root")  # what is not here; a reason names one of them


class Block:
    """A block of code of a page: the number of its first line, its lines, and the comments (kind, text, value) before it."""

    def __init__(self, number: int, lines: list[str], comments: list[tuple[str, str, str]]) -> None:
        self.number = number
        self.lines = lines
        self.comments = comments

    def is_example(self) -> bool:
        return any(CALL.search(line.partition(" #")[0].lstrip("$ ")) for line in self.lines if not line.lstrip().startswith("#"))

    def value(self, kind: str) -> list[str]:
        return [value for name, text, value in self.comments if name == kind and not text]


class Step:
    """A command of a page, with what it must print (None: anything)."""

    def __init__(self, number: int, command: str, expected: str | None = None) -> None:
        self.number = number
        self.command = command
        self.expected = expected


def blocks(text: str) -> list[Block]:
    """The blocks of a page, fenced ones and indented ones (four blanks behind an empty line)."""
    found: list[Block] = []
    comments: list[tuple[str, str, str]] = []
    lines = text.split("\n")
    number = 0
    while number < len(lines):
        line = lines[number]
        if line.startswith("<!--"):
            end = next(index for index in range(number, len(lines)) if "-->" in lines[index])
            comments += [(kind, inside, value) for kind, inside, value in COMMENT.findall("\n".join(lines[number : end + 1]))]
            number = end + 1
            continue
        if line.startswith("```"):
            end = next(index for index in range(number + 1, len(lines)) if lines[index].startswith("```"))
            found.append(Block(number + 2, lines[number + 1 : end], comments))
            comments, number = [], end + 1
            continue
        if line.startswith("    ") and (number == 0 or not lines[number - 1].strip() or lines[number - 1].startswith("<!--")):
            end = number
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            body = [inner[4:] for inner in lines[number:end]]
            while not body[-1].strip():
                body.pop()
            found.append(Block(number + 1, body, comments))
            comments, number = [], end
            continue
        if line.strip():
            comments = []
        number += 1
    return found


def steps(block: Block) -> list[Step]:
    """What has to be done for a block, in order."""
    found = [Step(block.number, command) for command in block.value("setup")]
    for name in block.value("file"):
        text = "\n".join(block.lines) + "\n"
        mode = "755" if text.startswith("#!") else "644"
        write = f"printf %s {shlex.quote(text)} > {shlex.quote(name)} && chmod {mode} {shlex.quote(name)}"
        return [*found, Step(block.number, write)]
    if not block.is_example() or block.value("not run"):
        return found
    left_out = [text for kind, text, _ in block.comments if kind == "not run" and text]
    has_prompts = any(line.startswith("$ ") for line in block.lines)
    number, lines = block.number, iter(block.lines)
    for line in lines:
        at = number
        number += 1
        if has_prompts and not line.startswith("$ "):
            assert found, f"line {at}: output in front of the first command"
            found[-1].expected = line if found[-1].expected is None else f"{found[-1].expected}\n{line}"
            continue
        command = line.removeprefix("$ ") if has_prompts else line
        while command.endswith("\\"):
            command = f"{command}\n{next(lines)}"
            number += 1
        if command.strip() and not command.lstrip().startswith("#"):
            found.append(Step(at, command))
    return [step for step in found if not any(text in step.command for text in left_out)]


def story(text: str) -> list[Step]:
    """All that has to be done for a page, its files first."""
    files, others = [], []
    for block in blocks(text):
        (files if block.value("file") else others).extend(steps(block))
    return files + others


def matches(expected: str, shown: str) -> bool:
    """Whether what was printed is what was expected, blanks at the end of a line and empty lines at the end aside."""

    def tidy(text: str) -> str:
        return "\n".join(line.rstrip() for line in text.rstrip().split("\n"))

    pattern = re.escape(tidy(expected)).replace("\\.\\.\\.\\\n", r"(?:.*\n)?").replace(r"\.\.\.", r".*?")
    return re.fullmatch(pattern, tidy(shown), re.S) is not None


@pytest.fixture(scope="module")
def demo(rootfs: Path, need: Need, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with demo.sif and demo/, the same unpacked."""
    work = tmp_path_factory.mktemp("demo")
    tree = demo_image.make_tree(rootfs, work / "demo")
    demo_image.make_sif(need("mksquashfs"), tree, work / "demo.sif", architecture())
    return work


@pytest.fixture(scope="module")
def archives(oci_layout: Path, need: Need, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with layout/, an OCI layout with the tag 1.0, and model.tar, the same as `docker save` writes it."""
    work, skopeo = tmp_path_factory.mktemp("archives"), need("skopeo")
    source = f"oci:{oci_layout}:app"
    for target in (f"oci:{work}/layout:1.0", f"docker-archive:{work}/model.tar:model:1.0"):
        done = subprocess.run([skopeo, "--insecure-policy", "copy", "--quiet", source, target], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return work


PREPARATION = """
cp -a {demo}/demo.sif {demo}/demo {archives}/layout {archives}/model.tar .
ln demo.sif model.sif
ln demo.sif image.sif
cp -a demo sandbox
mkdir -p data/era5 home scratch .cache
echo '271.5 272.0' > data/era5/t2m
echo '1 2 3' > data/table
printf '#!/bin/sh\\nls "$@"\\n' > analyse
chmod +x analyse
"""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_examples_of_a_page(page: Path, demo: Path, archives: Path, sciexec_path: Path, tmp_path: Path) -> None:
    todo = story(page.read_text())
    work, results = tmp_path / "page", tmp_path / "results"
    work.mkdir()
    results.mkdir()
    subprocess.run(["sh", "-ec", PREPARATION.format(demo=demo, archives=archives)], cwd=work, check=True)
    script = [
        f"{{ {step.command}\n}} >{results}/{index} 2>&1 </dev/null; sciexec_code=$?; echo $sciexec_code >{results}/{index}.code"
        for index, step in enumerate(todo)
    ]
    environment = {
        "PATH": f"{sciexec_path.parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
        "HOME": str(work / "home"),
        "SCRATCH": str(work / "scratch"),
        "TMPDIR": str(tmp_path),
        "SCIEXEC_CACHEDIR": str(work / ".cache"),
        "LANG": "C.UTF-8",
    }
    subprocess.run(["bash", "-c", "\n".join(script)], cwd=work, env=environment, stdin=subprocess.DEVNULL, timeout=280, check=False)
    wrong = []
    for index, step in enumerate(todo):
        shown = (results / str(index)).read_text(errors="backslashreplace")
        code = (results / f"{index}.code").read_text().strip() if (results / f"{index}.code").exists() else "none: the page ended here"
        fails = "\nFATAL: " in f"\n{step.expected}" and not step.command.endswith("echo $?")
        if (code == "0") == fails or not (code.isdigit() and (step.expected is None or matches(step.expected, shown))):
            expected = "" if step.expected is None else f"\n--- expected:\n{step.expected}"
            wrong.append(f"{page.name}:{step.number}: $ {step.command}\n--- code {code}:\n{shown}{expected}")
    if wrong:
        pytest.fail("\n\n".join(wrong), pytrace=False)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_not_run_says_why(page: Path) -> None:
    """With a reason that a machine of ours cannot help; and no comment is misspelt or in front of nothing."""
    text = page.read_text()
    found = [comment for block in blocks(text) for comment in block.comments]
    assert len(found) == len(re.findall(r"^<!--.*(?:run|file|setup)", text, re.M)), "a comment that belongs to no block, or is misspelt"
    for kind, _, value in found:
        assert value and (kind != "not run" or any(reason in value for reason in REASONS)), f"not run: {value}: {' '.join(REASONS)}?"
    for block in blocks(text):
        for kind, inside, _ in block.comments:
            assert kind != "not run" or block.is_example(), f"line {block.number}: would not be run anyway"
            assert not inside or any(inside in line for line in block.lines), f"line {block.number}: no line has {inside}"


# The pages of docs/ in which an option of a theme is explained, by the headings of `sciexec run --help`.
THEMES = {
    "Files of the host": "binds data overlays run",
    "Environment": "environment run",
    "Isolation": "isolation binds",
    "Writing into the image": "overlays",
    "Devices": "devices",
    "MPI": "mpi",
    "Limits": "limits isolation",
    "Instances": "instances",
    "Where IMAGE is a URI": "run",
    "Messages": "run",
    help.OTHERS: "switch",
}
FIRST = {"Files of the host": "mount", "Writing into the image": "overlay", "Devices": "nv", "Limits": "memory", "Instances": "pid_file"}


def theme(option: options.Option) -> str:
    return next((title for title, slots in help.THEMES.items() if option.slot.lstrip("-").replace("-", "_") in slots.split()), help.OTHERS)


@pytest.mark.parametrize("title", THEMES)
def test_every_option_is_on_the_page_of_its_theme(title: str) -> None:
    """The first page of some themes comes with the first option that this release did not have before."""
    pages = [TREE / f"docs/{name}.md" for name in THEMES[title].split()]
    state = {option.slot: option.state for option in options.OPTIONS}
    if not pages[0].exists() and state.get(FIRST.get(title, ""), READY) == LATER:
        return
    text = "".join(page.read_text() for page in pages if page.exists())
    wanted = [option for option in options.OPTIONS if theme(option) == title and option.state != LATER]
    missing = [option.names[0] for option in wanted if not any(re.search(rf"(?<![-\w]){name}(?![-\w])", text) for name in option.names)]
    assert not missing, f"not in docs/{THEMES[title].replace(' ', '.md, docs/')}.md"


PAGE = """\
Text.

    sciexec exec a
    # a comment
    sciexec exec b \\
        c

<!-- not run (pull): a registry -->
```
$ sciexec pull x
$ echo sciexec run
one
...
$ sciexec run
```

    make all

<!-- file: x.sh -->

    #!/bin/sh

<!-- not run: a cluster -->

    srun -n 4 sciexec run a
"""


def test_the_reading_of_pages() -> None:
    made = [(step.number, step.command, step.expected) for step in story(PAGE)]
    assert made == [
        (21, "printf %s '#!/bin/sh\n' > x.sh && chmod 755 x.sh", None),
        (3, "sciexec exec a", None),
        (5, "sciexec exec b \\\n    c", None),
        (11, "echo sciexec run", "one\n..."),
        (14, "sciexec run", None),
    ]
    assert matches("a\n...", "a\nb\nc\n") and matches("a ... c\n...\nd", "a b c\nd\n") and not matches("a", "a\nb")
