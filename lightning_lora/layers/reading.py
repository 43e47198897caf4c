"""Layers that a module never calls, and whose weight it reads: told by its source, once for a class.

An adapter on a call of such a layer would be dead. Examples are the projections of WavLM's attention, and the relative
positions of DeBERTa.
"""

import ast
import inspect
import re
import types
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import nn

from lightning_lora.layers.branches import NONE, Facts, certain, conditions, facts_about, reached
from lightning_lora.layers.source import syntax_of

_SHOWS_NOTHING = {"dtype", "device", "shape", "size", "dim", "ndim", "numel", "requires_grad", "is_meta", "layout"}
_WITHOUT_GRADIENTS = {"no_grad", "inference_mode"}
_ASK = {"isinstance", "hasattr", "type", "id"}
_WEIGHTS = {"weight", "in_proj_weight"}
_STEPS = ("training_step", "validation_step", "test_step", "predict_step")


def facts_of(module: nn.Module, cls: Any) -> Facts:
    """What a module has, of all that conditions in the code of its class ask for."""
    return facts_about(module, _asked_for(cls))


@cache
def weights_read(cls: Any, facts: Facts = NONE) -> dict[str, bool]:
    """Names of children whose weight the forward of a class reads without calling them; whether gradients get there.

    Args:
        cls: The class.
        facts: Of a module, which does not take the branches that these exclude, see `facts_of`.
    """
    if issubclass(cls, nn.MultiheadAttention):
        return {"out_proj": True}
    mentioned, inside = _methods(cls)
    reads: dict[str, bool] = {}
    for method in (m for m in inside if "weight" in mentioned[m]):
        for name, how in _uses(method, facts):
            if how in ("read", "read without gradients"):
                reads[name] = reads.get(name, False) or how == "read"
    for method in mentioned:
        if not reads.keys().isdisjoint(mentioned[method]):
            used = {"called", "used"} if method in inside else {"called"}
            for name in [name for name, how in _uses(method, facts) if how in used]:
                reads.pop(name, None)
    return reads


@cache
def mentions_weight(cls: Any) -> bool:
    """Whether the code of a module reads a weight, of whatever; others call their layers, or choose among them."""
    functions = [
        f
        for base in cls.__mro__
        if not base.__module__.startswith("torch.nn.modules.module")
        for f in vars(base).values()
    ]
    codes = (getattr(inspect.unwrap(f), "__code__", None) for f in functions)
    return any(not _WEIGHTS.isdisjoint(names_in(code)) for code in codes)


def is_without_gradients(method: Any) -> bool:
    """Whether a method is decorated so."""
    function = syntax_of(method)
    decorators = [] if function is None else function.decorator_list
    return not _WITHOUT_GRADIENTS.isdisjoint(name for each in decorators for name in _attributes(each))


def used_beside_forward(cls: Any) -> set[str]:
    """The attributes that methods which the forward of a class calls use, called or handed on."""
    _, inside = _methods(cls)
    return {n for m in inside if m.__name__ != "forward" for n, how in _uses(m) if how in ("called", "used")}


def leaves_alone(cls: Any, name: str) -> bool:
    """Whether the forward of a class, and what it calls, never mention an attribute."""
    mentioned, inside = _methods(cls)
    return bool(inside) and not any(name in mentioned[method] for method in inside)


@cache
def asked_of(cls: Any) -> dict[str, set[str]]:
    """What the forward of a class, and what it calls, ask attributes for: in ``self.conv.stride`` the stride.

    Functions of its module that are given an attribute may do so too, as MobileNet's padding does.
    """
    _, inside = _methods(cls)
    asked: dict[str, set[str]] = {}
    for method in inside:
        if (function := syntax_of(method)) is None:
            continue
        owner = function.args.args[0].arg
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and (name := _attribute_of(owner, node.value)) is not None:
                asked.setdefault(name, set()).add(node.attr)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                given = [(i, name) for i, a in enumerate(node.args) if (name := _attribute_of(owner, a)) is not None]
                called = syntax_of(inspect.unwrap(method).__globals__.get(node.func.id)) if given else None
                for i, name in given if called is not None else ():
                    asked.setdefault(name, set()).update(_asked_of_parameter(called, i))
    return asked


def _attribute_of(owner: str, node: ast.AST) -> str | None:
    """The name in ``self.name``."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == owner:
        return node.attr
    return None


def _asked_of_parameter(function: Any, index: int) -> set[str]:
    """What a function asks one of its parameters for."""
    names = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)][index : index + 1]
    return {
        node.attr
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names
    }


@cache
def casts_to(cls: Any) -> set[str]:
    """The attributes to the dtype of whose weight the forward of a class casts: in ``x.to(self.mlp.wo.weight.dtype)``.

    A packed weight has the dtype of bytes, to which the input of its product would be rounded. Methods that know of
    such a dtype see to it themselves.
    """
    found = set[str]()
    for function in filter(None, map(syntax_of, _methods(cls)[1])):
        inner = [*ast.walk(function)]
        if not any(isinstance(node, ast.Attribute) and node.attr == "uint8" for node in inner):
            given = [
                [*node.args, *(each.value for each in node.keywords)]
                for node in inner
                if isinstance(node, ast.Call) and isinstance(f := node.func, ast.Attribute) and f.attr in ("to", "type")
            ]
            owned = _path_to("weight.dtype", function)
            found |= {m[1] for values in given for value in values if (m := owned.fullmatch(ast.unparse(value)))}
    return found


@cache
def weights_taken(cls: Any, facts: Facts = NONE) -> set[str]:
    """The attributes whose weight the forward of a class, or a step of a LightningModule, takes, called or not.

    It has to be what it stands for there: a weight of int8 would be computed with as it is, without a word. What is
    taken in a branch only, of which ``facts`` don't say that it is the one, is left out: for most it is another way to
    the same (BLOOM's tensor parallelism).
    """
    found = set[str]()
    for function in filter(None, map(syntax_of, _methods(cls, ("forward", *_STEPS))[1])):
        inner, others = [*certain(function, function.args.args[0].arg, facts)], list[ast.AST]()
        for node in inner:
            if isinstance(node, ast.Attribute) and node.attr in _SHOWS_NOTHING:
                others.append(node.value)
            elif isinstance(node, ast.Compare):
                others += [node.left, *node.comparators]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _ASK:
                others += node.args
        owned, left = _path_to("weight", function), {*map(id, others)}
        loads = (node for node in inner if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load))
        texts = (ast.unparse(node) for node in loads if node.attr == "weight" and id(node) not in left)
        found |= {match[1] for text in texts if (match := owned.fullmatch(text))}
    return found


def _path_to(end: str, function: Any) -> re.Pattern[str]:
    """Finds the path in ``self.path.end``, as a method writes it."""
    return re.compile(rf"{function.args.args[0].arg}\.([\w.]+)\.{re.escape(end)}")


@cache
def _methods(cls: Any, entries: tuple[str, ...] = ("forward",)) -> tuple[dict[Any, set[str]], list[Any]]:
    """The methods of a class with all names in them, and which of them these, its forward, may get to."""
    own = [base for base in cls.__mro__ if base is not nn.Module and not base.__module__.startswith("torch.")]
    methods = [(name, method) for base in own for name, method in vars(base).items() if _code(method) is not None]
    mentioned = {method: {*names_in(_code(method))} for _, method in methods}
    reached, more = set[str](), {*entries}
    while more:
        reached |= more
        more = {n for name, m in methods if name in more for n in mentioned[m]} - reached
        more &= {name for name, _ in methods}
    return mentioned, [method for name, method in methods if name in reached]


def _code(method: Any) -> types.CodeType | None:
    return getattr(inspect.unwrap(method), "__code__", None) if callable(method) else None


def names_in(code: types.CodeType | None) -> Iterator[str]:
    """What a function mentions, and functions in it."""
    if code is not None:
        yield from code.co_names
        for constant in code.co_consts:
            if inspect.iscode(constant):
                yield from names_in(constant)


@cache
def _asked_for(cls: Any) -> set[str]:
    """The attributes that conditions in the forward of a class, or in a step of a LightningModule, ask for."""
    functions: Any = filter(None, map(syntax_of, _methods(cls, ("forward", *_STEPS))[1]))
    tests = [node.test for function in functions for node in conditions(function)]
    return {each.attr for test in tests for each in ast.walk(test) if isinstance(each, ast.Attribute)}


@cache
def _uses(method: Any, facts: Facts = NONE) -> list[tuple[str, str]]:
    """The attributes of ``self`` that a method mentions where it may get to, and how."""
    function = syntax_of(method)
    return [] if function is None else [*_in(function, function.args.args[0].arg, (), True, facts)]


def _in(
    node: ast.AST, owner: str, above: tuple[ast.AST, ...], gradients: bool, facts: Facts
) -> Iterator[tuple[str, str]]:
    contexts: list[Any] = [item.context_expr for item in node.items] if isinstance(node, ast.With) else []
    contexts += node.decorator_list if isinstance(node, ast.FunctionDef) else []
    gradients = gradients and _WITHOUT_GRADIENTS.isdisjoint(n for context in contexts for n in _attributes(context))
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == owner:
        if isinstance(node.ctx, ast.Load) and (how := _how(node, above, gradients)) is not None:
            yield node.attr, how
    for child in reached(node, owner, facts):
        yield from _in(child, owner, (node, *above), gradients, facts)


def _how(node: ast.Attribute, above: tuple[ast.AST, ...], gradients: bool) -> str | None:
    """How ``self.name`` is used; None where that says nothing: its dtype is asked, or whether it is None."""
    first, second = above[:2]
    if isinstance(first, ast.Attribute):
        if first.attr == "forward":
            return "called"
        if first.attr != "weight":
            return None
        if not isinstance(first.ctx, ast.Load):
            return "used"
        if isinstance(second, ast.Attribute) and second.attr in _SHOWS_NOTHING:
            return None
        cut = isinstance(second, ast.Attribute) and second.attr in ("detach", "data")
        return "read" if gradients and not cut else "read without gradients"
    if isinstance(first, ast.Compare):
        return None
    return "called" if isinstance(first, ast.Call) and first.func is node else "used"


def _attributes(node: ast.AST) -> Iterator[str]:
    return (
        inner.attr if isinstance(inner, ast.Attribute) else inner.id
        for inner in ast.walk(node)
        if isinstance(inner, (ast.Attribute, ast.Name))
    )
