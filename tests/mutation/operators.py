"""The small changes that seed a fault, of Python by its syntax tree, of C++ by its tokens, inside of a named function.

Each operator is generic: it knows no line of this package. C++ is formatted by clang-format, so that an operator
between two operands has a space on both sides, and what has none is a pointer, a sign or a template's bracket.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple


class Edit(NamedTuple):
    """One fault: the operator, and the text from ``start`` to ``end`` with what it becomes."""

    operator: str
    start: int
    end: int
    new: str

    def apply(self, source: str) -> str:
        """The source with the fault in it."""
        return source[: self.start] + self.new + source[self.end :]


SWAPPED = {"+": "-", "-": "+", "*": "/", "/": "*", "&&": "||", "||": "&&"}
SWAPPED |= {"<": ">=", ">=": "<", ">": "<=", "<=": ">", "==": "!=", "!=": "=="}
WORDS = {"and": "or", "or": "and", "is": "is not", "is not": "is", "in": "not in", "not in": "in"}
_KIND = dict.fromkeys("+-", "sign") | dict.fromkeys("*/", "factor") | dict.fromkeys(("&&", "||", "and", "or"), "logic")


def edits(source: str, name: str, python: bool) -> list[Edit]:
    """Every fault that can be seeded into the functions (structs, classes) of that name, in the order of the text."""
    if not re.search(rf"\b{re.escape(name)}\b", source):
        return []
    return sorted(_python(source, name) if python else _cpp(source, name), key=lambda e: (e.start, e.end))


# ---- Python

_SYMBOLS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">"}
_SYMBOLS |= {ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=", ast.Is: "is", ast.IsNot: "is not", ast.In: "in"}
_SYMBOLS |= {ast.NotIn: "not in", ast.And: "and", ast.Or: "or"}


def _python(source: str, name: str) -> Iterator[Edit]:
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def at(line: int, column: int) -> int:
        text = source[starts[line - 1] : starts[line]]
        return starts[line - 1] + len(text.encode()[:column].decode())

    def span(node) -> tuple[int, int]:
        return at(node.lineno, node.col_offset), at(node.end_lineno, node.end_col_offset)

    def between(left, symbol: str, right) -> Iterator[Edit]:
        begin, end = span(left)[1], span(right)[0]
        found = re.search(
            rf"(?<!\w){re.escape(symbol)}(?!\w)", re.sub(r"#.*", lambda m: " " * len(m[0]), source[begin:end])
        )
        new = (SWAPPED | WORDS).get(symbol)
        if found and new:
            yield Edit(_KIND.get(symbol, "compare"), begin + found.start(), begin + found.end(), new)

    for node in _inside(source, name):
        if isinstance(node, ast.BinOp) and type(node.op) in _SYMBOLS:
            yield from between(node.left, _SYMBOLS[type(node.op)], node.right)
        elif isinstance(node, ast.BoolOp):
            for left, right in zip(node.values, node.values[1:], strict=False):
                yield from between(left, _SYMBOLS[type(node.op)], right)
        elif isinstance(node, ast.Compare):
            for left, op, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
                yield from between(left, _SYMBOLS[type(op)], right)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            yield Edit("negative", span(node)[0], span(node)[0] + 1, " ")
        elif isinstance(node, (ast.If, ast.IfExp)):
            begin, end = span(node.test)
            yield Edit("condition", begin, end, f"(not ({source[begin:end]}))")
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
            begin, end = span(node)
            new = str(not node.value) if isinstance(node.value, bool) else f"({source[begin:end]} + 1)"
            yield Edit("constant", begin, end, new)
        elif isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
            yield Edit("drop", *span(node), "pass")


def _inside(source: str, name: str) -> Iterator[ast.AST]:
    """The nodes of the bodies: no decorator, default, annotation or assertion."""
    for found in ast.walk(_tree(source)):
        if isinstance(found, (ast.FunctionDef, ast.ClassDef)) and found.name == name:
            for statement in found.body:
                yield from ast.walk(statement) if not isinstance(statement, ast.Assert) else ()


@cache
def _tree(source: str) -> ast.Module:
    return ast.parse(source)


# ---- C++

_OPERATOR = re.compile(r"(?<= )(?:&&|\|\||<=|>=|==|!=|[-+*/<>])(?= )")
_ASSIGN = re.compile(r"(?<= )([-+*/])=(?= )")
_NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d*)?(?:e[-+]?\d+)?f?(?![\w.])")
_INDEX = re.compile(r"(?<=[\w\])])\[([^\[\]]*\b(?!k[A-Z])[a-z_][^\[\]]*)\]")
_STATEMENT = re.compile(
    r"(?<=[;{})])\s*(\*?(?!return\b|else\b|using\b)[\w.:>-]+(?:\[[^\]]*\])*"
    r"(?: [-+*/|&]?= [^;{}]*|(?:<[^<>;]*>)?\([^;{}]*\)));"
)


def _cpp(source: str, name: str) -> Iterator[Edit]:
    code = _masked(source)
    loops = [(m.end() - 1, _matching(code, m.end() - 1)) for m in re.finditer(r"\bfor \(", code)]
    for begin, end in _bodies(code, name):
        for m in _OPERATOR.finditer(code, begin, end):
            if not any(a < m.start() < b for a, b in loops):
                yield Edit(_KIND.get(m[0], "compare"), *m.span(), SWAPPED[m[0]])
            elif m[0] == "<":  # the last time around is left out
                yield Edit("bound", *m.span(), "+ 1 <")
        for m in _ASSIGN.finditer(code, begin, end):
            if not any(a < m.start() < b for a, b in loops):
                yield Edit(_KIND[m[1]], *m.span(), f"{SWAPPED[m[1]]}=")
        for m in _NUMBER.finditer(code, begin, end):
            yield Edit("constant", *m.span(), f"({m[0]} + 1)")
        for m in _INDEX.finditer(code, begin, end):
            yield Edit("index", *m.span(1), "0")
        for m in re.compile(r"\bif \(").finditer(code, begin, end):
            close = _matching(code, m.end() - 1)
            yield Edit("condition", m.end(), close, f"!({source[m.end() : close]})")
        for m in _STATEMENT.finditer(code, begin, end):
            if m[1].count("(") == m[1].count(")"):
                yield Edit("drop", *m.span(1), "")


@cache
def _masked(source: str) -> str:
    """The source with blanks for comments, strings and what the preprocessor reads."""
    kinds = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\'|^[ \t]*#(?:[^\n\\]|\\\n|\\.)*'
    return re.sub(kinds, lambda m: re.sub(r"[^\n]", " ", m[0]), source, flags=re.DOTALL | re.MULTILINE)


def _matching(code: str, at: int) -> int:
    """Where the bracket that opens at ``at`` is closed."""
    left, right, depth = code[at], {"(": ")", "{": "}"}[code[at]], 0
    for i in range(at, len(code)):
        depth += (code[i] == left) - (code[i] == right)
        if depth == 0:
            return i
    return len(code)


def _bodies(code: str, name: str) -> Iterator[tuple[int, int]]:
    """From brace to brace, of every definition of a function or a struct of that name."""
    for m in re.finditer(rf"\b(?:struct|class) {re.escape(name)}\b[^;{{(]*\{{", code):
        yield m.end(), _matching(code, m.end() - 1)
    for m in re.finditer(rf"\b{re.escape(name)}\(", code):
        close = _matching(code, m.end() - 1)
        head = re.compile(r"\)(?:\s|const\b|noexcept\b|override\b)*(?:->[^{;]*)?(?::[^{;]*)?\{").match(code, close)
        if head:
            yield head.end(), _matching(code, head.end() - 1)
