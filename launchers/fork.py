"""Start a method as a copy of another, and see later what the method is.

    python -m launchers.fork ppo my_idea      # algorithms/my_idea.py, its configs and its test
    python -m launchers.fork --diff my_idea   # what it does otherwise than its parent; comments and layout do not count
"""
import ast
import difflib
import io
import keyword
import re
import sys
import tokenize

from absl import flags

from core.errors import UserError
from launchers import cli

FLAGS = flags.FLAGS
flags.DEFINE_string("diff", None, "A fork: print what it does otherwise than its parent.")

CHILD = re.compile(r"Child of (\w+)\.py; the diff is the method\.")
COLORS = {"@": "\x1b[36m", "-": "\x1b[31m", "+": "\x1b[32m", " ": ""}


def main(argv):
    if FLAGS.diff is not None and len(argv) == 1:
        color = sys.stdout.isatty()
        for line in difference(FLAGS.diff):
            print(f"{COLORS[line[0]]}{line}\x1b[0m" if color else line)
    elif FLAGS.diff is None and len(argv) == 3:
        print("\n".join(fork(*argv[1:])))
    else:
        raise UserError("say what to fork and its new name, e.g. ppo my_idea; or --diff=my_idea")


def source_of(name):
    path = cli.ROOT / "algorithms" / f"{name}.py"
    if not path.is_file() or name == "__init__":
        known = [p.stem for p in path.parent.glob("*.py") if p.stem != "__init__"]
        raise UserError(f'unknown algorithm "{name}"; {cli.suggest(name, known)}')
    return path.read_text()


def fork(parent, child):
    """Write the files of `child`, all or none; returns what to tell the user."""
    if not child.isidentifier() or keyword.iskeyword(child):
        raise UserError(f'"{child}" cannot be the name of a Python file')
    files = {f"algorithms/{child}.py": adopt(source_of(parent), parent)}
    configs = {path.stem: path.read_text() for path in sorted((cli.ROOT / "configs").glob(f"{parent}_*.py"))}
    configs = {stem: text for stem, text in configs.items() if parent in imported(ast.parse(text))}
    names = {stem: child + stem.removeprefix(parent) for stem in [parent, *configs]}
    files |= {f"configs/{names[stem]}.py": rename(text, names) for stem, text in configs.items()}
    test = cli.ROOT / "tests" / f"test_{parent}.py"
    if test.exists():
        files[f"tests/test_{child}.py"] = rename(test.read_text(), names)
    write(files)
    return [*(f"wrote {name}" for name in files), "next:",
            f"    python -m launchers.train --config=algorithms/{child}.py --smoke",
            f"    python -m pytest tests/test_{child}.py",
            f"    python -m launchers.fork --diff {child}"]


def adopt(source, parent):
    """`source` with the line that names its parent as the second of its docstring."""
    first, *rest = source.splitlines(keepends=True)
    if not first.startswith('"""'):
        raise UserError(f"algorithms/{parent}.py does not begin with a docstring")
    note = f"Child of {parent}.py; the diff is the method.\n"
    if first.rstrip().endswith('"""') and first.strip() != '"""':
        first, note = first.rstrip()[:-3] + "\n", note + '"""\n'
    elif rest and CHILD.match(rest[0]):
        rest.pop(0)
    return "".join([first, note, *rest])


def imported(tree):
    """The modules of algorithms/ and configs/ that a file names, with where it does so."""
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return {alias.name: alias for node in imports if node.module in ("algorithms", "configs") for alias in node.names}


def rename(source, names):
    """`source` with the modules called by their new `names`: imports, uses, paths in strings, names of tests."""
    tree = ast.parse(source)
    modules = {name: alias for name, alias in imported(tree).items() if name in names}
    uses = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id in modules]
    lines = source.splitlines(keepends=True)
    for node in sorted([*modules.values(), *uses], key=lambda node: (node.lineno, node.col_offset), reverse=True):
        line, start = lines[node.lineno - 1].encode(), node.col_offset  # in bytes
        old = node.id if isinstance(node, ast.Name) else node.name
        lines[node.lineno - 1] = (line[:start] + names[old].encode() + line[start + len(old):]).decode()
    words = "|".join(sorted(names, key=len, reverse=True))
    source = re.sub(rf"\b(algorithms|configs)([/.])({words})\b", lambda m: m[1] + m[2] + names[m[3]], "".join(lines))
    parent = min(names, key=len)
    return re.sub(rf"\btest_{parent}(?![a-zA-Z0-9])", f"test_{names[parent]}", source)


def write(files):
    """All of {path: text}, or none; never over an existing file."""
    if there := [name for name in files if (cli.ROOT / name).exists()]:
        raise UserError(f"{there[0]} exists already")
    written = []
    try:
        for name, text in files.items():
            with open(cli.ROOT / name, "x") as file:
                written.append(cli.ROOT / name)
                file.write(text)
    except BaseException:
        for path in written:
            path.unlink()
        raise


def difference(child):
    """Lines of a diff from the parent to `child`, each hunk headed by the function it is in."""
    match = CHILD.match(source_of(child).split("\n")[1])
    if not match:
        raise UserError(f'algorithms/{child}.py has no parent: line 2 is not "Child of ….py; the diff is the method."')
    parent = match[1]
    before, after = canonical(source_of(parent)), canonical(source_of(child))
    groups = list(difflib.SequenceMatcher(None, before, after, autojunk=False).get_grouped_opcodes(2))
    if not groups:
        yield f" algorithms/{child}.py does what its parent {parent}.py does"
    for group in groups:
        _, i, stop, j, _ = next(change for change in group if change[0] != "equal")
        yield f"@@ {scope(before, i) if stop > i else scope(after, j)} @@"
        for change, i, stop, j, new_stop in group:
            if change == "equal":
                yield from (f" {line}" for line in after[j:new_stop])
            else:
                yield from (f"-{line}" for line in before[i:stop])
                yield from (f"+{line}" for line in after[j:new_stop])


def canonical(source):
    """Lines of the code without docstrings, comments and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return [part for line in ast.unparse(tree).splitlines() if line for part in wrap(line)]


def wrap(line, width=100):
    """A long line, cut at the commas of the bracket that has most of them."""
    if len(line) <= width:
        return [line]
    commas, opened = {}, []
    for token in tokenize.generate_tokens(io.StringIO(line.strip()).readline):
        if token.type == tokenize.OP and token.string in "([{":
            opened.append(token.start[1])
        elif token.type == tokenize.OP and token.string in ")]}":
            opened.pop()
        elif token.string == "," and opened:
            commas.setdefault(opened[-1], []).append(token.end[1])
    cuts = max(commas.values(), key=len, default=[])
    indent = " " * (len(line) - len(line.lstrip()))
    parts = [line.strip()[a:b].strip() for a, b in zip([0, *cuts], [*cuts, None], strict=True)]
    return [indent + parts[0], *(f"{indent}        {part}" for part in parts[1:])]


def scope(lines, i):
    """The function or class that line i lies in, dotted."""
    names, indent = [], len(lines[i])
    for line in reversed(lines[:i + 1]):
        depth = len(line) - len(line.lstrip())
        if depth < indent:
            match, indent = re.match(r" *(?:async def|def|class) (\w+)", line), depth
            names = [match[1], *names] if match else names
    return ".".join(names) or "module"


if __name__ == "__main__":
    cli.run(main)
