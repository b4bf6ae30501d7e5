"""No key is used twice in code that users read: pages, docstrings, scripts and notebooks, and the library.

The check reads code, and runs nothing. A key is what `jax.random` makes, what an argument or attribute is called
(`key`, `start_key`), or one of several by its number (`keys[0]`). A use is to be passed to a call. A loop counts as
two rounds, a branch as the worse of the two. To use a key again on purpose, for the same draws, a comment says why:

    # same key: every beta sees the same batches

What it cannot see: keys that pass through containers other than `keys[0]`, two functions that are given the same key,
or make one of the same seed, and numbers that are not constant (`keys[i]`).
"""

import ast
import copy
import doctest
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [path for path in ROOT.rglob("*.md") if ".venv" not in path.parts]
CODE = [path for folder in ("dpo_jax", "experiments") for path in sorted((ROOT / folder).rglob("*.py"))]
ON_PURPOSE = "# same key:"
MAKERS = {"key", "PRNGKey", "wrap_key_data", "split", "fold_in", "clone"}
LOOKS_ONLY = {"checks.key", "clone", "key_impl", "eval_shape", "make_jaxpr", "trace", "compiled", "lower", "len"}
"""Calls that draw nothing: they ask for a type or a shape, or make a program for arguments of this shape."""
KEY_NAME = re.compile(r"(.*_)?keys?$")


def called(node):
    """The last name of what a call calls."""
    function = node.func if isinstance(node, ast.Call) else None
    return getattr(function, "attr", getattr(function, "id", None))


def names_in(node):
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


class Keys(ast.NodeVisitor):
    """Follows the keys of a piece of code; `reused` says where one is used for the second time."""

    def __init__(self, source):
        self.allowed = {number for number, line in enumerate(source.splitlines(), 1) if ON_PURPOSE in line}
        self.known = {}  # what a name stands for: the text of a key
        self.uses = {}  # by the text of a key: what it is folded with, and the names in text and fold
        self.reused = {}
        self.visit(ast.parse(source))

    def text_of(self, node):
        """What a key is called, or None if a node is none."""
        if isinstance(node, ast.Name):
            return self.known.get(node.id)
        if isinstance(node, ast.Attribute) and KEY_NAME.match(node.attr) and isinstance(node.ctx, ast.Load):
            return ast.unparse(node)
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            whole = self.text_of(node.value)
            return whole and f"{whole}[{node.slice.value}]"
        if called(node) in ("key", "PRNGKey", "wrap_key_data") and "random" in ast.unparse(node.func):
            return ast.unparse(node)
        return None

    def use(self, text, call):
        folded = ast.unparse(call.args[1]) if called(call) == "fold_in" and len(call.args) > 1 else None
        related = [
            earlier
            for other, uses in self.uses.items()
            if other == text or other.startswith(f"{text}[") or text.startswith(f"{other}[")
            for earlier in uses
        ]
        if any(folded is None or earlier in (None, folded) for earlier in related):
            self.reused.setdefault(call.lineno, text)
        self.uses.setdefault(text, []).append(folded)

    def bind(self, target, text=None):
        """Names get a new meaning: what was known of the old one is forgotten."""
        for name in {part.id for part in ast.walk(target) if isinstance(part, ast.Name)}:
            self.known.pop(name, None)
            self.known = {other: key for other, key in self.known.items() if name not in words(key)}
            self.uses = {
                key: left
                for key, folds in self.uses.items()
                if name not in words(key) and (left := [fold for fold in folds if name not in words(fold or "")])
            }
            if text is not None:
                self.known[name] = text if text and isinstance(target, ast.Name) and name not in words(text) else name

    def visit_Call(self, node):
        self.visit(node.func)
        allowed = self.allowed & set(range(node.lineno - 1, node.end_lineno + 1))
        for argument in [*node.args, *(keyword.value for keyword in node.keywords)]:
            parts = argument.elts if isinstance(argument, ast.Tuple | ast.List) else [argument]
            for part in parts:
                part = part.value if isinstance(part, ast.Starred) else part
                text = self.text_of(part)
                if text is None:
                    self.visit(part)
                elif not allowed and not {called(node), ast.unparse(node.func)} & LOOKS_ONLY:
                    self.use(text, node)

    def visit_Assign(self, node):
        self.visit(node.value)
        for target in node.targets:
            self.assign(target, node.value)

    def assign(self, target, value):
        """Names that stand for keys from here on: those of a tuple one by one."""
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for name, part in zip(target.elts, value.elts, strict=False):
                self.assign(name, part)
        else:
            made = called(value) in MAKERS and "random" in ast.unparse(value.func)
            self.bind(target, self.text_of(value) or ("" if made else None))

    def branches(self, *blocks):
        """Each block starts from here; afterwards a key counts as used as often as where it was used most."""
        before, after = (copy.deepcopy(self.known), copy.deepcopy(self.uses)), []
        for block in blocks:
            self.known, self.uses = copy.deepcopy(before)
            for node in block:
                self.visit(node)
            if not (block and isinstance(block[-1], ast.Return | ast.Raise | ast.Continue | ast.Break)):
                after.append((self.known, self.uses))
        self.known, self.uses = {}, {}
        for known, uses in after or [before]:
            self.known |= known
            self.uses |= {key: max(folds, self.uses.get(key, []), key=len) for key, folds in uses.items()}

    def visit_If(self, node):
        self.visit(node.test)
        self.branches(node.body, node.orelse)

    def visit_IfExp(self, node):
        self.visit(node.test)
        self.branches([node.body], [node.orelse])

    def visit_For(self, node):
        self.visit(node.iter)
        for _ in range(2):
            self.bind(node.target, self.each_of(node.iter))
            for statement in node.body:
                self.visit(statement)
        for statement in node.orelse:
            self.visit(statement)

    def visit_While(self, node):
        for part in 2 * [node.test, *node.body]:
            self.visit(part)

    def each_of(self, node):
        """A key, if these are keys."""
        many = self.text_of(node) is not None or (called(node) == "split" and "random" in ast.unparse(node))
        return "" if many else None

    def comprehension(self, node):
        before = dict(self.known)
        for _ in range(2):
            for generator in node.generators:
                self.visit(generator.iter)
                self.bind(generator.target, self.each_of(generator.iter))
                for condition in generator.ifs:
                    self.visit(condition)
            for part in (node.key, node.value) if isinstance(node, ast.DictComp) else (node.elt,):
                self.visit(part)
        self.known = before

    visit_ListComp = visit_SetComp = visit_GeneratorExp = visit_DictComp = comprehension  # noqa: N815

    def visit_Lambda(self, node):
        self.function(node, [node.body])

    def visit_FunctionDef(self, node):
        self.function(node, node.body)

    def function(self, node, body):
        """A function's own keys are its own; those of the code around it count as used there, once."""
        known, arguments = dict(self.known), node.args
        for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
            self.bind(ast.Name(argument.arg), argument.arg if KEY_NAME.match(argument.arg) else None)
            if KEY_NAME.match(argument.arg):
                self.known[argument.arg] = argument.arg
        for statement in body:
            self.visit(statement)
        self.known = known


def words(text):
    return set(re.findall(r"[^\W\d]\w*", text))


def reused_in(source):
    """Where a key is used again: the key by the number of the line."""
    return Keys(source).reused


def code_of_page(text):
    """All Python on a page as one piece, each line where it stands."""
    lines, inside = [], False
    for line in text.splitlines():
        if line.startswith("```"):
            inside = line == "```python"
            lines.append("")
        else:
            lines.append(line if inside else "")
    return "\n".join(lines)


def docstrings_of(source):
    """The examples of each docstring as one piece of code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and (text := ast.get_docstring(node)):
            yield getattr(node, "name", "module"), "".join(e.source for e in doctest.DocTestParser().get_examples(text))


REUSED = {
    "twice": "key = jax.random.key(0)\nf(key)\ng(key)",
    "by the same seed": "f(jax.random.key(0))\ng(jax.random.key(0))",
    "under two names": "a = jax.random.key(0)\nb = a\nf(a)\ng(b)",
    "of several": "keys = jax.random.split(key, 3)\nf(keys[0])\ng(keys[1], z=keys[0])",
    "all and one": "keys = jax.random.split(key, 3)\nf(keys[0])\ng(keys)",
    "after a split": "def f(key):\n    a, b = jax.random.split(key)\n    return g(a, key)",
    "an argument": "def f(start_key):\n    g(start_key)\n    return h(start_key)",
    "an attribute": "def f(setup):\n    g(setup.key)\n    return h(setup.key)",
    "in a loop": "key = jax.random.key(0)\nfor beta in betas:\n    f(key, beta)",
    "in a comprehension": "def f(key):\n    return [g(key, beta) for beta in betas]",
    "after a branch": "def f(key):\n    if a:\n        g(key)\n    return h(key)",
    "in a function around": "keys = jax.random.split(key)\ndef f(beta):\n    g(keys[0])\nh(keys[0])",
    "folded alike": "def f(key):\n    return g(jax.random.fold_in(key, 1)), g(jax.random.fold_in(key, 1))",
    "folded and not": "def f(key):\n    return g(key), g(jax.random.fold_in(key, 1))",
}
USED_ONCE = {
    "new names": "def f(key):" + "\n    key, a = jax.random.split(key)\n    g(a)" * 2,
    "of several": "keys = jax.random.split(jax.random.key(0), 3)\nf(keys[0])\ng(keys[1])",
    "two branches": "def f(key):\n    if a:\n        return g(key)\n    return h(key)",
    "each in a loop": "for key in jax.random.split(jax.random.key(0), 3):\n    f(key)",
    "each in a comprehension": "f(g(key) for key in jax.random.split(jax.random.key(0), 3))",
    "by seed": "[f(jax.random.key(seed)) for seed in seeds]",
    "folded in a loop": "def f(key):\n    for i in range(3):\n        g(jax.random.fold_in(key, i))",
    "shapes": "def f(key):\n    return watch.compiled(g, key)(key)",
    "no key": "for key, value in table.items():\n    f(key)\n    g(key)",
    "on purpose": "def f(key):\n    g(key)\n    # same key: two methods in one world\n    h(key)",
}


@pytest.mark.parametrize("name", REUSED)
def test_a_key_that_is_used_twice_is_found(name):
    assert reused_in(REUSED[name])


@pytest.mark.parametrize("name", USED_ONCE)
def test_keys_that_are_used_once_are_fine(name):
    assert not reused_in(USED_ONCE[name])


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_use_each_key_once(path):
    assert not reused_in(code_of_page(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_and_its_docstrings_use_each_key_once(path):
    source = path.read_text(encoding="utf-8")
    if path.parent.name != "sweep":  # which hands one key to all its programs, and they fold in their seeds
        assert not reused_in(source)
    assert not {name: found for name, code in docstrings_of(source) if (found := reused_in(code))}
