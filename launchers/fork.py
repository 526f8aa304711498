"""Start a method as a copy of another. Later, print the difference between the two: that is the method.

    python -m launchers.fork ppo my_idea      # writes algorithms/my_idea.py, its configs and its test
    python -m launchers.fork --diff=my_idea   # the code in which my_idea differs from its parent, without comments
"""
import ast
import difflib
import io
import keyword
import re
import sys
import tokenize

from core.errors import UserError
from launchers import cli

CHILD = re.compile(r"Child of (\w+)\.py; the diff is the method\.")
COLORS = {"@": "\x1b[36m", "-": "\x1b[31m", "+": "\x1b[32m", " ": ""}


def fork(*names: str, diff: str | None = None) -> None:
    """Copy a method under a new name, e.g. fork ppo my_idea; or print the difference between a fork and its parent.

    Args:
        diff: A fork: print the code in which it differs from its parent.
    """
    if diff is not None and not names:
        color = sys.stdout.isatty()
        for line in difference(diff):
            print(f"{COLORS[line[0]]}{line}\x1b[0m" if color else line)
    elif diff is None and len(names) == 2:
        parent, child = names
        files = copy(parent, child)
        print("\n".join(f"wrote {name}" for name in files))
        print(f"next:\n    python -m launchers.train --config=algorithms/{child}.py --smoke")
        for stem in sorted(takes_a_method(parent) - configs_of(parent).keys()):
            print(f"    python -m launchers.train --config=configs/{stem}.py:{child} --smoke")
        if f"tests/test_{child}.py" in files:
            print(f"    python -m pytest tests/test_{child}.py")
        print(f"    python -m launchers.fork --diff={child}")
    else:
        raise UserError("name a method and the name of the copy, e.g. ppo my_idea; or say --diff=my_idea")


def source_of(name):
    known = [path.stem for path in (cli.ROOT / "algorithms").glob("*.py") if path.stem != "__init__"]
    if name not in known:  # a path such as ../core/ekf is no name, either
        raise UserError(f'unknown algorithm "{name}"; {cli.suggest(name, known)}')
    return (cli.ROOT / "algorithms" / f"{name}.py").read_text()


def copy(parent, child):
    """Write the files of `child`, all or none of them; returns their names."""
    if not child.isidentifier() or keyword.iskeyword(child):
        raise UserError(f'"{child}" cannot be the name of a Python file')
    files = {f"algorithms/{child}.py": with_parent(source_of(parent), parent)}
    configs = configs_of(parent)
    names = {parent: child} | {stem: f"{child}_{stem.removeprefix(family(stem) + '_')}" for stem in configs}
    files |= {f"configs/{names[stem]}.py": rename(text, names) for stem, text in configs.items()}
    test = cli.ROOT / "tests" / f"test_{parent}.py"
    if test.exists():
        files[f"tests/test_{child}.py"] = rename(test.read_text(), names)
    write(files)
    return list(files)


def configs_of(parent):
    """{name: text} of the configs that run the parent and have its name, or that of its own parent, before theirs."""
    texts = {path.stem: path.read_text() for path in sorted((cli.ROOT / "configs").glob("*.py"))
             if f"{parent}_".startswith(f"{family(path.stem)}_")}
    used = {stem: methods_of(ast.parse(text)) for stem, text in texts.items()}
    own, size = {parent}, 0
    while len(own) > size:
        size = len(own)
        own |= {stem for stem in texts if own & used[stem]}
    return {stem: text for stem, text in texts.items() if stem in own}


def family(config):
    """The longest name of a method that the name of a config begins with: ppo of ppo_cartpole."""
    names = [path.stem for path in (cli.ROOT / "algorithms").glob("*.py") if config.startswith(f"{path.stem}_")]
    return max(names, key=len, default=config)


def methods_of(tree):
    """What a config runs: the method that get_config takes by default, else the modules that it imports."""
    taken = {default.value for default in defaults(tree)}
    return taken or {alias.name for alias in imports(tree)}


def takes_a_method(parent):
    """The configs whose argument is a method, by default this one, a child or a parent of it."""
    texts = {path.stem: path.read_text() for path in (cli.ROOT / "configs").glob("*.py")}
    taken = {stem: {default.value for default in defaults(ast.parse(text))} for stem, text in texts.items()}
    return {stem for stem, names in taken.items() for name in names
            if f"{name}_".startswith(f"{parent}_") or f"{parent}_".startswith(f"{name}_")}


def defaults(tree):
    """The nodes of default arguments that are names of methods."""
    known = {path.stem for path in (cli.ROOT / "algorithms").glob("*.py")}
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [node for function in functions for node in function.args.defaults
            if isinstance(node, ast.Constant) and node.value in known]


def with_parent(source, parent):
    """`source` with the name of its parent in the first paragraph of its docstring."""
    if not source.startswith('"""'):
        raise UserError(f"algorithms/{parent}.py does not begin with a docstring")
    note = f"Child of {parent}.py; the diff is the method."
    opening = source[3:].split('"""')[0].split("\n\n")[0]
    if CHILD.search(opening):
        return source.replace(opening, CHILD.sub(note, opening), 1)
    lines = opening.split("\n")
    sentence = next((i for i, line in enumerate(lines) if line.endswith(".")), 0)
    return source.replace(opening, "\n".join([*lines[:sentence + 1], note, *lines[sentence + 1:]]), 1)


def imports(tree):
    """The nodes that import a module of algorithms/ or configs/."""
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return [alias for node in froms if node.module in ("algorithms", "configs") for alias in node.names]


def rename(source, names):
    """`source` with new names, {parent: child, config: its copy, …}: in imports, where they are used, in default
    arguments, in paths, and in the names of tests."""
    tree = ast.parse(source)
    aliases = [alias for alias in imports(tree) if alias.name in names]
    bound = {alias.name for alias in aliases if alias.asname is None}
    uses = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id in bound]
    taken = [node for node in defaults(tree) if node.value in names]
    lines = source.splitlines(keepends=True)
    for node in sorted([*aliases, *uses, *taken], key=lambda node: (node.lineno, node.col_offset), reverse=True):
        line, start = lines[node.lineno - 1].encode(), node.col_offset + (node in taken)  # in bytes, after a quote
        old = node.id if isinstance(node, ast.Name) else node.value if node in taken else node.name
        lines[node.lineno - 1] = (line[:start] + names[old].encode() + line[start + len(old):]).decode()
    words = "|".join(sorted(names, key=len, reverse=True))
    source = re.sub(rf"\b(algorithms|configs)([/.])({words})\b", lambda m: m[1] + m[2] + names[m[3]], "".join(lines))
    parent = next(iter(names))
    others = [path.stem for path in (cli.ROOT / "algorithms").glob(f"{parent}_*.py")]  # keep test_<parent>_<other>
    longer = "".join(rf"(?!{other.removeprefix(parent)}\b)" for other in others)
    return re.sub(rf"\btest_{parent}(?![a-zA-Z0-9]){longer}", f"test_{names[parent]}", source)


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
    """Lines of a diff from the parent to `child`. Above each part stands the function that it is in."""
    match = CHILD.search((ast.get_docstring(ast.parse(source_of(child))) or "").split("\n\n")[0])
    if not match:
        raise UserError(f"algorithms/{child}.py names no parent: the first paragraph of its docstring has no sentence "
                        '"Child of ….py; the diff is the method."')
    parent = match[1]
    before, after = canonical(source_of(parent)), canonical(source_of(child))
    groups = list(difflib.SequenceMatcher(None, before, after, autojunk=False).get_grouped_opcodes(2))
    if not groups:
        yield f" algorithms/{child}.py has the code of its parent {parent}.py"
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
    """Lines of the code without docstrings and comments, all in one layout."""
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
    cli.run(fork)
