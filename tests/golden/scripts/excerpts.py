"""Statements from the middle of a library's function, for what the library has no function of its own."""

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable


def excerpt(function: Callable, first: str, last: str) -> Callable[..., dict]:
    """The statements of `function` from the one that begins with `first` to the next one that begins with `last`.

    Both stand in the same block. They run as they stand in the source, with the names of their module and those given
    as arguments; the result has all names afterwards.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    (block,) = [block for block in _blocks(tree) if _position(block, first) is not None]
    start = _position(block, first)
    length = _position(block[start:], last)
    assert length is not None, f"nothing begins with {last!r}"
    statements = ast.Module(block[start : start + length + 1], type_ignores=[])
    code = compile(statements, inspect.getsourcefile(function), "exec")

    def run(**names) -> dict:
        namespace = {**vars(sys.modules[function.__module__]), **names}
        exec(code, namespace)
        return namespace

    return run


def _blocks(tree: ast.AST):
    return (node.body for node in ast.walk(tree) if isinstance(getattr(node, "body", None), list))


def _position(block: list[ast.stmt], beginning: str) -> int | None:
    """Of the first statement that begins so, written as `ast.unparse` writes it."""
    return next((i for i, statement in enumerate(block) if ast.unparse(statement).startswith(beginning)), None)
