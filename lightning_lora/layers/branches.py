"""Branches of its code that a module does not take, as far as what it has tells: ``if self.q_bias is None``."""

import ast
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

Facts = frozenset[tuple[str, bool]]
"""What is known of an attribute: that ``name is None``, or how it counts as a condition by itself, ``name``."""

NONE: Facts = frozenset()
_CHANGES = "training"


def conditions(function: ast.AST) -> list[ast.If | ast.IfExp]:
    """The statements and expressions of a function that go one way or the other."""
    return [node for node in ast.walk(function) if isinstance(node, (ast.If, ast.IfExp))]


def facts_about(module: nn.Module, names: Iterable[str]) -> Facts:
    """What is known of some of its attributes. What properties would give is not: they run code."""
    found = set[tuple[str, bool]]()
    for name in names:
        for place in (vars(module), module._parameters, module._buffers, module._modules):
            if name in place and name != _CHANGES:
                value: Any = place[name]
                found.add((f"{name} is None", value is None))
                if value is None or isinstance(value, (bool, int)):
                    found.add((name, bool(value)))
    return frozenset(found)


def reached(node: ast.AST, owner: str, facts: Facts) -> Iterator[ast.AST]:
    """The children of a node that may run: without the branch of a condition that is not taken, or what it leaves out.

    Args:
        node: Any part of a function.
        owner: What the function calls ``self``.
        facts: Of the module.
    """
    if isinstance(node, (ast.If, ast.IfExp)):
        yield from (node.test, *_taken(node, owner, facts))
    elif isinstance(node, ast.FunctionDef):
        for statement in node.body:
            yield statement
            if _always_leaves(statement, owner, facts):
                return
    else:
        yield from ast.iter_child_nodes(node)


def certain(node: ast.AST, owner: str, facts: Facts) -> Iterator[ast.AST]:
    """A node and what is in it, but for the branches of statements of which it is not known whether they run."""
    yield node
    children: Iterable[ast.AST] = reached(node, owner, facts)
    if isinstance(node, ast.If) and _decided(node, owner, facts) is None:
        children = [node.test]
    for child in children:
        yield from certain(child, owner, facts)


def _decided(node: ast.If | ast.IfExp, owner: str, facts: Facts) -> bool | None:
    """Which way a condition goes; None where that is not known."""
    return _truth(node.test, owner, dict(facts))


def _taken(node: ast.If | ast.IfExp, owner: str, facts: Facts) -> list[ast.AST]:
    """What may run of the branches of a condition: one of them where it is known which, else both."""
    truth = _decided(node, owner, facts)
    ways: list[Any] = [node.body] * (truth is not False) + [node.orelse] * (truth is not True)
    return [each for way in ways for each in (way if isinstance(way, list) else [way])]


def _always_leaves(statement: ast.stmt, owner: str, facts: Facts) -> bool:
    if isinstance(statement, ast.If) and _decided(statement, owner, facts) is not None:
        return any(isinstance(each, (ast.Return, ast.Raise)) for each in _taken(statement, owner, facts))
    return False


def _truth(test: ast.expr, owner: str, facts: dict[str, bool]) -> bool | None:
    match test:
        case ast.UnaryOp(op=ast.Not(), operand=inner):
            return _opposite(_truth(inner, owner, facts))
        case ast.BoolOp(op=how, values=values):
            ends = isinstance(how, ast.Or)  # what decides it by itself
            truths = [_truth(value, owner, facts) for value in values]
            return ends if ends in truths else None if None in truths else not ends
        case ast.Compare(left=left, ops=[ast.Is() | ast.IsNot() as how], comparators=[ast.Constant(value=None)]):
            is_none = facts.get(f"{_name(left, owner)} is None")
            return _opposite(is_none) if isinstance(how, ast.IsNot) else is_none
    return facts.get(_name(test, owner))


def _name(node: ast.expr, owner: str) -> str:
    """The name in ``self.name``; empty for anything else."""
    match node:
        case ast.Attribute(value=ast.Name(id=found), attr=name) if found == owner:
            return name
    return ""


def _opposite(truth: bool | None) -> bool | None:
    return None if truth is None else not truth
