"""Layers that a module calls with one and the same input, so that they can be computed together.

Which these are is read from the source of the module's forward, once for a class, and never learnt from what happened
before: a run that is resumed computes what it would have computed. While such a module runs, the first of its layers
that is called computes the others' outputs too, and these take theirs if they are called with the very same input.
"""

import ast
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.reading import used_beside_forward
from lightning_lora.layers.source import syntax_of

_KEY: Any = "lightning_lora"  # of the hooks: the same in all modules, or compiled graphs could not be shared among them
_GROUPS = "_lora_groups"  # on a module: names of its layers with adapters that it calls with the same input
_top_hooks: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", bool)  # torch 2.8 tells them
_RUNNING = threading.local()
_LEAVES = (ast.Return, ast.Break, ast.Continue)
_STATEMENTS = (ast.stmt, ast.excepthandler, ast.match_case)
_PARTLY = (ast.IfExp, ast.BoolOp, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)  # may leave operands out


class Scope:
    """One call of a module.

    Args:
        parent: The module.
        groups: Names of its layers that get the same input.
    """

    def __init__(self, parent: nn.Module, groups: tuple[tuple[str, ...], ...]) -> None:
        self._parent, self._groups, self._began = parent, groups, _recording()
        self._input: tuple[Tensor, int, Any] | None = None
        self._outputs: dict[int, tuple[Tensor, Any]] = {}

    def is_of(self, module: nn.Module) -> bool:
        """Whether this is a call of a module."""
        return self._parent is module

    def together(self, layer: LoRALayer) -> list[LoRALayer]:
        """The layers that will be called with the same input after this one.

        None in a checkpoint that began since the module was called: its second run would not see this call.
        """
        if _recording() != self._began:
            return []
        children: Any = self._parent._modules
        for names in self._groups:
            layers = [children[name] for name in names if isinstance(children.get(name), LoRALayer)]
            if any(other is layer for other in layers):
                return [other for other in layers if other is not layer]
        return []

    def put(self, x: Tensor, outputs: Iterable[tuple[LoRALayer, Tensor]]) -> None:
        """Keeps the outputs of layers that will be called with x."""
        self._input = (x, x._version, _mode(x))
        self._outputs = {id(layer): (out, _state_of(layer)) for layer, out in outputs}

    def take(self, layer: LoRALayer, x: Tensor) -> Tensor | None:
        """The output of a layer for x, if it is there and is what the layer would compute now.

        If not, nothing is computed together any more in this call.
        """
        if id(layer) not in self._outputs or self._input is None:
            return None
        out, state = self._outputs.pop(id(layer))
        same, version, mode = self._input
        if same is x and version == x._version and mode == _mode(x) and state == _state_of(layer):
            return out
        self._groups, self._outputs = (), {}
        return None

    def close(self) -> None:
        """The call ends."""
        self._input, self._outputs = None, {}


def _recording() -> tuple[Any, ...]:
    """Whether and how what backward needs is kept: a checkpoint keeps it in another way, or not at all."""
    return torch.is_grad_enabled(), _top_hooks(True)


def _mode(x: Tensor) -> tuple[Any, ...]:
    """What else than its input and its tensors a product depends on."""
    device = x.device.type
    return torch.is_grad_enabled(), torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)


def _state_of(layer: LoRALayer) -> list[Any]:
    """What of a layer may be another by the time that it is called itself."""
    adapters: Any = layer._modules["lora"]._modules  # type: ignore[union-attr]
    state: list[Any] = [layer.lora_active, layer.lora_mixture]
    for name in layer.lora_active:
        state.append(adapters[name].training)
        for tensor in adapters[name]._parameters.values():
            state += (id(tensor), None if tensor is None else tensor._version)
    return state


def scope() -> Scope | None:
    """The call of a module that is running, if layers of it can be computed together."""
    stack = vars(_RUNNING).get("stack")
    return stack[-1] if stack else None


def keep_together(module: nn.Module) -> None:
    """Hooks a module that calls several layers with adapters with the same input, and no other one."""
    vars(module).pop(_GROUPS, None)
    if wanted := not isinstance(module, LoRALayer) and bool(groups := _groups(module)):
        vars(module)[_GROUPS] = groups
    if wanted and _KEY not in module._forward_pre_hooks:
        module._forward_pre_hooks[_KEY] = _enter
        module._forward_hooks[_KEY] = _leave
        module._forward_hooks_always_called[_KEY] = True
    elif not wanted and _KEY in module._forward_pre_hooks:
        for hooks in (module._forward_pre_hooks, module._forward_hooks, module._forward_hooks_always_called):
            hooks.pop(_KEY, None)


def _groups(module: nn.Module) -> tuple[tuple[str, ...], ...]:
    adapted = [name for name, child in module._modules.items() if isinstance(child, LoRALayer)]
    if len(adapted) < 2:
        return ()
    cls: Any = type(module)
    found = [tuple(name for name in names if name in adapted) for names in called_alike(cls)]
    return tuple(names for names in found if len(names) > 1)


def _enter(module: nn.Module, args: Any) -> None:
    if torch.compiler.is_compiling():
        return
    if not module.training and not torch.is_grad_enabled():
        return  # each layer computes its own, in fewer operations
    groups = vars(module).get(_GROUPS, ())
    stack = vars(_RUNNING).setdefault("stack", [])
    for i, other in enumerate(stack):
        if other.is_of(module):  # left by an interrupt, with which torch calls no hooks
            del stack[i:]
            break
    stack.append(Scope(module, groups))


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    stack = vars(_RUNNING).get("stack")
    if stack and stack[-1].is_of(module):
        stack.pop().close()


@contextmanager
def called(module: nn.Module) -> Iterator[None]:
    """As long as it lasts a call of a module goes on, whose forward runs by itself: in a checkpoint."""
    if _KEY not in module._forward_pre_hooks:
        yield
        return
    _enter(module, ())
    try:
        yield
    finally:
        _leave(module, (), None)


@cache
def called_alike(cls: Any) -> tuple[tuple[str, ...], ...]:
    """Names of attributes that the forward of a class calls with the same variable, in groups.

    What another method uses too is in none: the keys' layer of DeBERTa is called once more, with positions.
    """
    if (function := syntax_of(cls.forward)) is None:
        return ()  # there is no source: each layer computes its own
    calls = _Calls(function.args.args[0].arg)
    calls.visit_block(function.body)
    groups: dict[Any, list[str]] = {}
    elsewhere = used_beside_forward(cls)
    for name, inputs in calls.inputs.items():
        if len(inputs) == 1 and name not in elsewhere:
            groups.setdefault(inputs[0], []).append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


class _Calls(ast.NodeVisitor):
    """Calls ``self.name(variable)``, with which value of the variable, in the order of evaluation, and in which block.

    What is in a block by itself (a branch, a loop, a ``with``) may not run, or without gradients, or in another dtype.
    """

    def __init__(self, owner: str) -> None:
        self.inputs: dict[str, list[tuple[str, int, int]]] = {}
        self._owner = owner
        self._values: dict[str, int] = {}  # how often a variable was assigned to
        self._block, self._blocks = 0, 0

    def visit_block(self, nodes: Sequence[ast.AST]) -> None:
        """Visits what runs as a whole or not at all; behind what may leave it begins another block."""
        around = self._block
        self._begin()
        for node in nodes:
            self.visit(node)
            if not isinstance(node, _LEAVES) and any(isinstance(inner, _LEAVES) for inner in ast.walk(node)):
                self._begin()
        self._block = around

    def _begin(self) -> None:
        self._blocks += 1
        self._block = self._blocks

    def generic_visit(self, node: ast.AST) -> None:
        """Statements in statements, and operands that may not be evaluated, are blocks."""
        for _, value in ast.iter_fields(node):
            several = isinstance(value, list)
            nodes = [each for each in (value if several else [value]) if isinstance(each, ast.AST)]
            if several and nodes and isinstance(nodes[0], _STATEMENTS):
                self.visit_block(nodes)
                continue
            apart = isinstance(node, ast.BoolOp if several else _PARTLY)
            for each in nodes:
                self.visit_block([each]) if apart else self.visit(each)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        called, args = node.func, node.args
        if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id == self._owner:
            if len(args) == 1 and isinstance(args[0], ast.Name) and not node.keywords:
                variable = args[0].id
                value = variable, self._values.get(variable, 0), self._block
                self.inputs.setdefault(called.attr, []).append(value)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        for target in node.targets:
            self.visit(target)

    def visit_Name(self, node: ast.Name) -> None:
        if not isinstance(node.ctx, ast.Load):
            self._values[node.id] = self._values.get(node.id, 0) + 1

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """What it calls is called later, if at all."""

    def visit_Lambda(self, node: ast.Lambda) -> None:
        """Likewise."""
