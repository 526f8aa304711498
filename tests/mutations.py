"""One-line errors made from the syntax tree of a file: what a tired author could have written instead.

`candidates(path, source, required)` lists them all, each an edit of a few bytes, so that the rest of the file stays as
it is. Left out is what no test of behaviour sees: text for people (docstrings, f-strings, what is raised or printed),
annotations, decorators, imports, `get_config`, whose numbers are choices, and the sizes and colours of pictures.
"""
import ast
import random
from typing import NamedTuple

COMPARISONS = {ast.Lt: ("<=", ">"), ast.LtE: ("<", ">="), ast.Gt: (">=", "<"), ast.GtE: (">", "<="), ast.Eq: ("!=",),
               ast.NotEq: ("==",), ast.Is: ("is not",), ast.IsNot: ("is",), ast.In: ("not in",), ast.NotIn: ("in",)}
SYMBOLS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.MatMult: "@", ast.Mod: "%",
           ast.BitAnd: "&", ast.BitOr: "|", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==",
           ast.NotEq: "!=", ast.Is: "is", ast.IsNot: "is not", ast.In: "in", ast.NotIn: "not in", ast.And: "and",
           ast.Or: "or", ast.Pow: "**", ast.BitXor: "^", ast.LShift: "<<", ast.RShift: ">>"}
OTHER_SYMBOL = {ast.Add: ("sign", "-"), ast.Sub: ("sign", "+"), ast.Mult: ("product", "/"), ast.Div: ("product", "*"),
                ast.BitAnd: ("logic", "|"), ast.BitOr: ("logic", "&")}
EXTREMES = [("minimum", "maximum"), ("min", "max"), ("argmin", "argmax"), ("nanmin", "nanmax")]
TWINS = [("next_obs", "obs"), ("next_x", "x"), ("terminated", "truncated"), ("mean", "sum"), ("size", "capacity"),
         ("std", "var"), ("low", "high"), ("any", "all")]
OPTIONAL = {"sum", "mean", "max", "min", "std", "var", "any", "all", "argmin", "argmax", "squeeze", "cumsum", "split"}
SYMMETRIC = {"minimum", "maximum", "min", "max", "add", "multiply", "logical_and", "logical_or", "allclose",
             "array_equal"}
UNSWAPPED = {"isinstance", "issubclass", "getattr", "setattr", "hasattr", "vmap", "jit", "scan", "partial", "map",
             "grad", "fori_loop", "while_loop", "cond", "where", "enumerate", "open"}


class Error(NamedTuple):
    path: str
    function: str  # where it is: "Agent.loss", "" outside of all
    first: int  # the line at which that function starts, with its decorators; 0 outside of all
    line: int
    kind: str
    start: int  # of the bytes that `text` replaces
    end: int
    text: str
    before: str  # the whole line
    after: str

    def planted(self, source):
        data = source.encode()
        return (data[:self.start] + self.text.encode() + data[self.end:]).decode()

    @property
    def name(self):  # does not change when other lines do
        return self.path, self.function, self.before, self.after


def draw(errors, count, seed, sources):
    """`count` different ones: a kind, all kinds alike, and one of it, so that a file weighs by how many it has."""
    dice, kinds = random.Random(seed), {}
    for error in errors:
        kinds.setdefault(error.kind, []).append(error)
    drawn, texts = [], set()
    while len(drawn) < count and kinds:
        kind = dice.choice(sorted(kinds))
        error = kinds[kind].pop(dice.randrange(len(kinds[kind])))
        if not kinds[kind]:
            del kinds[kind]
        text = error.planted(sources[error.path])
        if (error.path, text) not in texts and is_another_program(sources[error.path], text):
            texts.add((error.path, text))
            drawn.append(error)
    return drawn


def is_another_program(right, wrong):
    try:
        return ast.dump(ast.parse(right)) != ast.dump(ast.parse(wrong))
    except SyntaxError:
        return False


def required_arguments(sources):
    """{name of a function or class: arguments without a default}: to drop one is no error that could go unnoticed."""
    required = {}
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                plain = node.args.posonlyargs + node.args.args
                names = plain[:len(plain) - len(node.args.defaults)]
                names = names + [a for a, value in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
                                 if value is None]
                required.setdefault(node.name, set()).update(a.arg for a in names if a.arg not in ("self", "cls"))
            elif isinstance(node, ast.ClassDef):
                fields = {f.target.id for f in node.body if isinstance(f, ast.AnnAssign) and f.value is None}
                required.setdefault(node.name, set()).update(fields)
    return required


def default_texts(tree, text_of):
    """{key: text of its value} of `get_config`, where that is a literal: lr=positive(1e-3) gives 1e-3."""
    defaults = {}
    for function in tree.body:
        if not isinstance(function, ast.FunctionDef) or function.name != "get_config":
            continue
        for call in ast.walk(function):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "dict":
                for keyword in call.keywords:
                    value = keyword.value
                    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and len(value.args) == 1:
                        value = value.args[0]
                    try:
                        ast.literal_eval(value)
                    except ValueError:
                        continue
                    if keyword.arg:
                        defaults.setdefault(keyword.arg, text_of(value))
    return defaults


def candidates(path, source, required=None):
    finder = Finder(path, source, required or {})
    finder.visit(finder.tree)
    return finder.errors


class Finder(ast.NodeVisitor):
    def __init__(self, path, source, required):
        self.path, self.data, self.required, self.errors = path, source.encode(), required, []
        self.lines = self.data.splitlines(keepends=True)
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line))
        self.tree = ast.parse(source)
        self.defaults = default_texts(self.tree, self.text)
        self.functions, self.keys, self.words, self.called = [], [], set(), set()
        for node in ast.walk(self.tree):
            self.words |= {getattr(node, field) for field in ("attr", "arg", "id", "value", "name", "asname")
                           if isinstance(getattr(node, field, None), str)}

    def span(self, node):
        return (self.starts[node.lineno - 1] + node.col_offset, self.starts[node.end_lineno - 1] + node.end_col_offset)

    def text(self, node):
        start, end = self.span(node)
        return self.data[start:end].decode()

    def between(self, left, right, symbol):
        """The span of an operator. Around it there may be parentheses and white space, and no comment."""
        start, end = self.span(left)[1], self.span(right)[0]
        place = self.data[start:end].find(symbol.encode())
        return (start + place, start + place + len(symbol)) if place >= 0 else None

    def add(self, kind, span, text):
        if span is None or b"\n" in self.data[span[0]:span[1]] or self.data[span[0]:span[1]] == text.encode():
            return
        line = self.data.count(b"\n", 0, span[0])
        before = self.lines[line].decode().strip()
        begin = self.starts[line]
        after = self.data[begin:span[0]] + text.encode() + self.data[span[1]:self.starts[line + 1]]
        name, first = self.functions[-1] if self.functions else ("", 0)
        self.errors.append(Error(self.path, name, first, line + 1, kind, *span, text, before, after.decode().strip()))

    def leave(self, node):
        pass

    visit_Import = visit_ImportFrom = visit_JoinedStr = visit_Raise = visit_Assert = leave

    def visit_FunctionDef(self, node):
        if node.name in ("get_config", "__repr__", "__str__"):
            return
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        outer = f"{self.functions[-1][0]}." if self.functions else ""
        self.functions.append((outer + node.name, first))
        self.keys.append(key_names(node))
        for child in [*node.args.defaults, *filter(None, node.args.kw_defaults), *node.body]:
            self.visit(child)
        self.functions.pop()
        self.keys.pop()

    def visit_ClassDef(self, node):
        first = self.functions[-1][1] if self.functions else 0
        outer = f"{self.functions[-1][0]}." if self.functions else ""
        self.functions.append((outer + node.name, first))
        for child in node.body:
            self.visit(child)
        self.functions.pop()

    def visit_AnnAssign(self, node):
        if node.value:
            self.visit(node.value)

    def visit_Call(self, node):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in ("print", "warn", "UserError", "TypeVar", "NewType") or name.endswith("Error"):
            return
        required = self.required.get(name, set())
        for keyword in node.keywords:
            kept = required | {None, "strict"}  # `strict` changes nothing as long as lengths agree
            if keyword.arg not in kept and (len(node.keywords) + len(node.args) > 1 or required):
                self.add("keyword dropped", self.with_comma(node, keyword), "")
            if keyword.arg == "axis":
                self.axis(keyword.value)
        if node.args and not node.keywords and name in OPTIONAL and isinstance(node.func, ast.Attribute):
            module = isinstance(node.func.value, ast.Name) and node.func.value.id in ("jnp", "np", "jax", "lax")
            if len(node.args) > module:
                self.add("argument dropped", self.with_comma(node, node.args[-1]), "")
        for left, right in zip(node.args, node.args[1:], strict=False):
            if name not in SYMMETRIC | UNSWAPPED and not isinstance(left, (ast.Starred, ast.Lambda, ast.Constant)) \
                    and not isinstance(right, (ast.Starred, ast.Lambda)):
                self.swap("arguments swapped", left, right)
        if name == "where" and len(node.args) == 3:
            self.swap("branches swapped", *node.args[1:])
        self.called.add(id(node.func))
        if name == "split" and len(node.args) == 2 and self.text(node.func).endswith("random.split") \
                and "jnp" in self.words:
            key, count = map(self.text, node.args)
            shape = count if isinstance(node.args[1], ast.Tuple) else f"({count},)"
            self.add("key shared", self.span(node), f"jnp.broadcast_to({key}, {shape})")
        if name == "stop_gradient" and len(node.args) == 1:
            self.add("gradient", self.span(node), f"({self.text(node.args[0])})")
        for child in [node.func, *node.args, *(k.value for k in node.keywords if k.arg != "axis")]:
            self.visit(child)

    def with_comma(self, call, node):
        """The span of an argument and the comma on one of its sides."""
        start, end = self.span(node)
        rest, stop = self.data[end:], self.span(call)[1] - end
        after = rest[:len(rest) - len(rest.lstrip(b" ,"))]
        if b"," in after and len(after) < stop:
            return start, end + len(after)
        before = self.data[:start].rstrip(b" ")
        return (start - (start - len(before)) - before.endswith(b","), end)

    def swap(self, kind, left, right):
        (start, a), (b, end) = self.span(left), self.span(right)
        self.add(kind, (start, end), self.text(right) + self.data[a:b].decode() + self.text(left))

    def axis(self, node):
        number = literal(node)
        if number is not None:
            self.add("axis", self.span(node), {0: "1", 1: "0"}.get(number, "0"))

    def visit_BinOp(self, node):
        if any(isinstance(side, (ast.Tuple, ast.List, ast.JoinedStr)) or isinstance(getattr(side, "value", 0), str)
               and isinstance(side, ast.Constant) for side in (node.left, node.right)):
            return self.generic_visit(node)
        symbol = self.between(node.left, node.right, SYMBOLS[type(node.op)])
        if type(node.op) in OTHER_SYMBOL:
            kind, other = OTHER_SYMBOL[type(node.op)]
            self.add(kind, symbol, other)
        if symbol:
            start = len(self.data[:symbol[0]].rstrip())
            self.add("term dropped", (start, self.span(node)[1]), "")
        if isinstance(node.op, ast.Mult) and isinstance(node.left, (ast.Name, ast.Attribute, ast.Call)):
            self.add("sign", (self.span(node.left)[0],) * 2, "-")
        if self.functions and "loss" in self.functions[-1][0] and "jax" in self.words:
            for side in (node.left, node.right):
                if isinstance(side, ast.Name):
                    self.add("gradient", self.span(side), f"jax.lax.stop_gradient({side.id})")
        self.generic_visit(node)

    def visit_UnaryOp(self, node):
        if isinstance(node.op, (ast.USub, ast.Invert, ast.Not)):
            start, end = self.span(node)
            operand = self.data[start:end].decode()
            kind = "sign" if isinstance(node.op, ast.USub) else "logic"
            self.add(kind, (start, end), operand.removeprefix("not").lstrip("-~ "))
        self.generic_visit(node)

    def visit_BoolOp(self, node):
        symbol = SYMBOLS[type(node.op)]
        for left, right in zip(node.values, node.values[1:], strict=False):
            self.add("logic", self.between(left, right, symbol), "or" if symbol == "and" else "and")
        self.generic_visit(node)

    def visit_Compare(self, node):
        if len(node.ops) == 1:
            place = self.between(node.left, node.comparators[0], SYMBOLS[type(node.ops[0])])
            for other in COMPARISONS[type(node.ops[0])]:
                self.add("comparison", place, other)
        self.generic_visit(node)

    def negate(self, node):
        self.add("condition negated", self.span(node.test), f"not ({self.text(node.test)})")
        self.generic_visit(node)

    def visit_If(self, node):
        if "__name__" not in self.text(node.test):
            self.negate(node)

    visit_IfExp = visit_While = negate

    def visit_Return(self, node):
        if isinstance(node.value, ast.Tuple):
            for left, right in zip(node.value.elts, node.value.elts[1:], strict=False):
                if not isinstance(left, ast.Starred) and not isinstance(right, ast.Starred):
                    self.swap("results swapped", left, right)
        self.generic_visit(node)

    def visit_Subscript(self, node):
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        bounds = [b for p in parts for b in ((p.lower, p.upper) if isinstance(p, ast.Slice) else (p,))]
        for bound in bounds:
            number = literal(bound)
            if number is not None:
                self.add("index shifted", self.span(bound), str(number + 1 if number >= 0 else number - 1))
            elif isinstance(bound, ast.Constant) and isinstance(bound.value, str):
                self.twins(bound, bound.value, lambda other: f'"{other}"')
            elif bound is not None:
                if isinstance(bound, (ast.Name, ast.Attribute)) and any(isinstance(p, ast.Slice) for p in parts):
                    self.add("index shifted", self.span(bound), f"{self.text(bound)} + 1")
                self.visit(bound)
        self.visit(node.value)

    def visit_Constant(self, node):
        number = literal(node)
        if self.path.endswith("render.py") or self.functions and ".draw" in self.functions[-1][0]:
            return
        if isinstance(node.value, bool):
            self.add("constant", self.span(node), str(not node.value))
        if number is None or abs(number) >= 1e9:
            return
        texts = {repr(number + 1)}
        if isinstance(number, float) and abs(number) > 1e-4:  # twice a guard against division by zero is as good
            texts |= {repr(2 * number), repr(number / 2)}
        elif number:
            texts |= {repr(2 * number), repr(number // 2)}
        for text in sorted(texts - {repr(number)}) if number == 0 or abs(number) > 1e-4 else [repr(number + 1)]:
            self.add("constant", self.span(node), text)

    def visit_Name(self, node):
        if not isinstance(node.ctx, ast.Load):
            return
        self.twins(node, node.id, str)
        self.extremes(node.id, self.span(node))
        for pairs in self.keys:
            for other in pairs.get(node.id, ()):
                self.add("another key", self.span(node), other)

    def visit_Attribute(self, node):
        end = self.span(node)[1]
        place = end - len(node.attr), end
        if isinstance(node.ctx, ast.Load):
            self.twins(node, node.attr, lambda other: other, place)
            self.extremes(node.attr, place)
            if node.attr == "T":
                self.add("transpose dropped", (place[0] - 1, end), "")
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            if owner == "config" and node.attr in self.defaults:
                self.add("config key ignored", self.span(node), self.defaults[node.attr])
        self.visit(node.value)

    def extremes(self, name, place):
        for pair in EXTREMES:
            if name in pair:
                self.add("extremes", place, pair[1 - pair.index(name)])

    def twins(self, node, name, quote, place=None):
        """A name for one it is mistaken for, where the file knows the other, too. Every array has a mean and a sum."""
        for pair in TWINS:
            if name in pair:
                other = pair[1 - pair.index(name)]
                method = id(node) in self.called and pair in (("mean", "sum"), ("std", "var"), ("any", "all"))
                if method or id(node) not in self.called and other in self.words and pair != ("mean", "sum"):
                    self.add("name", place or self.span(node), quote(other))


def literal(node):
    """The number that a node is, or None."""
    sign = 1
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        sign, node = -1, node.operand
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return sign * node.value
    return None


def key_names(function):
    """{key: the keys that come from the same split} of `a_key, b_key = ...` in a function."""
    pairs = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
            names = [getattr(name, "id", "") for name in node.targets[0].elts]
            if len(names) > 1 and all(name.endswith("key") for name in names):
                for name in names:
                    pairs.setdefault(name, []).extend(other for other in names if other != name)
    return pairs
