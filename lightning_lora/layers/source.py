"""The source of functions, as a syntax tree."""

import ast
import inspect
import textwrap
from typing import Any


def syntax_of(function: Any) -> ast.FunctionDef | None:
    """The definition of a method, behind its decorators; None where there is no source, or no ``self`` in it."""
    try:
        found = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None
    return found if isinstance(found, ast.FunctionDef) and found.args.args else None
