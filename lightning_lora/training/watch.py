"""Looks at what is trained: whether gradients reach it, and whether steps change it."""

import warnings
from collections.abc import Collection, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from lightning_lora.errors import DeadAdapterError, listing, raise_all
from lightning_lora.layers import LoRALayer
from lightning_lora.layers.reading import mentions_weight
from lightning_lora.methods.added import added_modules
from lightning_lora.names import ancestors, is_inside, last_part
from lightning_lora.ops.sharded import gathered
from lightning_lora.optim import held_by
from lightning_lora.state import trained_parameters
from lightning_lora.targets.walk import nodes
from lightning_lora.training.attached import tells_steps
from lightning_lora.training.movement import below_compiled, gradient_of, mark_of
from lightning_lora.training.ways_out import PATIENCE, WAYS_OUT, left_out

DIVERGED = f"not finite any more. {WAYS_OUT['diverged']}"


class Watch:
    """Looks at every trained tensor during the first optimizer steps, and then goes away.

    A tensor is well once an optimizer step found it with a gradient that is not 0 and changed it. It may wait for that
    as long as its learning rate or its gradient is 0, or its layer was not reached (an expert without tokens,
    LayerDrop), for `PATIENCE` steps. It is dead at once if its layer was called since the optimizer's last step and no
    gradient ever came, or if the module around its layer was called, the layer itself was not, and that module's code
    reads a weight. Steps in which nothing has a gradient do not count; nor is it known what is called inside a
    compiled module. Steps count of any optimizer that holds some of the tensors, such as the one within SAM.

    Biases that are trained without the weight beside them (``bias="all"``) are told, and left, where something else
    moves: the loss may not depend on some of them.

    Args:
        model: The model.
        optimizers: Its optimizers, each of which is watched from its own first step on, if it tells when it steps.
        adapter_names: The adapters that the run trains.
        without: Ids of parameters that are not looked at.
        unmoved: Gets the ids of biases that are told.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: list[Optimizer],
        adapter_names: Collection[str],
        *,
        without: Collection[int] = (),
        unmoved: set[int] | None = None,
    ) -> None:
        self.training = False  # a batch is being trained; what other loops call says nothing about gradients
        self._names = {id(p): name for name, p in trained_parameters(model, adapter_names) if p.requires_grad}
        for key in (*held_by(each for each in optimizers if not tells_steps(each)), *without):
            self._names.pop(key, None)
        self._all = [*self._names.values()]
        self._before: dict[int, Tensor] = {}
        self._steps: dict[int, int] = {}
        self._owners: dict[int, tuple[nn.Module, list[nn.Module]]] = {}
        self._holders: dict[int, nn.Module] = {}  # the adapter, or the module that is trained in full
        self._flowed: set[int] = set()  # where a gradient came since the last step, which may have taken it away again
        self._empty: dict[int, int] = {}  # steps of an optimizer without any gradient, one after another
        self._clock = 0  # counts the steps of all optimizers
        self._called_at: dict[int, int] = {}  # by module
        self._stepped_at: dict[int, int] = {}  # by optimizer
        self._began_at: dict[int, int] = {}  # when an optimizer began its step
        self._had_gradient: set[int] = set()
        self._moved: dict[int, tuple[str, int]] = {}  # holders of a tensor that moved: its name, and when
        self._biases = set[str]()  # that are trained without the weight beside them
        self._unmoved = set() if unmoved is None else unmoved
        self._handles: list[RemovableHandle] = []
        compiled = below_compiled(model)
        parents_of = {n.module: n.parents if isinstance(n.module, LoRALayer) else [] for n in nodes(model).values()}
        for owner, above in [*parents_of.items(), *((found.module, []) for found in added_modules(model))]:
            parents, watched = [parent for parent in above if parent is not model], self._watched_of(owner)
            own = [self._names[id(parameter)] for parameter, holder in watched if holder is owner]
            self._biases |= {*own} if all("bias" in last_part(name) for name in own) else set()
            for parameter, holder in watched:
                self._owners[id(parameter)], self._holders[id(parameter)] = (owner, parents), holder
                register: Any = parameter.register_post_accumulate_grad_hook
                self._handles.append(register(self._note_gradient))
                for module in (owner, *parents):
                    if id(module) not in compiled:  # there a hook would be traced into the graph: its layers may wait
                        self._handles.append(module.register_forward_pre_hook(self._note_call))
        self._listed = {id(optimizer) for optimizer in optimizers}
        for optimizer in filter(tells_steps, optimizers):
            self._handles.append(optimizer.register_step_pre_hook(self._before_step))
            self._handles.append(optimizer.register_step_post_hook(self._after_step))
        self._handles.append(register_optimizer_step_pre_hook(self._before_another))
        self._handles.append(register_optimizer_step_post_hook(self._after_another))

    def close(self, finished: bool = False) -> None:
        """Takes all hooks off. If the run is over, warns about layers of which nothing has moved yet."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        still = [name for key, name in self._names.items() if id(self._holders[key]) not in self._moved]
        if finished and still:
            warnings.warn(
                f"{len(still)} trainable tensors never moved in this run: {listing(still, 4)}. Their learning rate or "
                "gradient was 0, or their layers were not reached, in all of its steps",
                stacklevel=2,
            )
        self._names, self._before = {}, {}

    @property
    def waiting(self) -> Collection[int]:
        """Ids of the parameters that are still looked at."""
        return self._names.keys()

    @property
    def done(self) -> bool:
        """Whether nothing is left to watch, so that it can be closed (not by itself: hooks can't remove hooks)."""
        return not self._names

    def _watched_of(self, module: nn.Module) -> list[tuple[nn.Parameter, nn.Module]]:
        holders = [module, *(module.lora.children() if isinstance(module, LoRALayer) else ())]
        return [(p, h) for h in holders for p in h._parameters.values() if p is not None and id(p) in self._names]

    def _note_call(self, module: nn.Module, args: Any) -> None:
        if self.training:
            self._called_at[id(module)] = self._clock
            if isinstance(module, LoRALayer):
                adapters = module.lora_adapters()
                self._called_at |= {id(adapters[name]): self._clock for name in module.lora_active}

    _note_call.lora_only_looks = True  # type: ignore[attr-defined]  # layers can still be computed together

    def _note_gradient(self, parameter: Tensor) -> None:
        if parameter.requires_grad:  # autograd calls the hook where it keeps nothing, too
            self._flowed.add(id(parameter))

    def _before_another(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if id(optimizer) not in self._listed:
            self._before_step(optimizer, args, kwargs)

    def _after_another(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if id(optimizer) not in self._listed and any(True for _ in self._waiting(optimizer)):
            self._after_step(optimizer, args, kwargs)

    def _was_called(self, module: nn.Module, optimizer: Optimizer) -> bool:
        """Whether it was called since the optimizer's last step."""
        return self._called_at.get(id(module), -1) >= self._stepped_at.get(id(optimizer), 0)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._began_at[id(optimizer)] = self._clock
        for parameter, _ in self._waiting(optimizer):
            self._before[id(parameter)] = mark_of(parameter, optimizer)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        flowed, self._flowed = self._flowed, set()
        held = [p for group in optimizer.param_groups for p in group["params"]]
        if not any(id(p) in flowed or gradient_of(p, optimizer) is not None for p in held):
            if self._began_at.get(id(optimizer)) == self._clock:  # no optimizer within it had them
                self._count_empty(optimizer)
            return
        self._empty[id(optimizer)] = 0
        self._steps[id(optimizer)] = self._steps.get(id(optimizer), 0) + 1
        dead: dict[str, list[str]] = {}
        for parameter, lr in list(self._waiting(optimizer)):
            before = self._before.pop(id(parameter), None)
            verdict = None if before is None else self._verdict(parameter, optimizer, lr, before, flowed)
            if verdict is True:
                self._moved[id(self._holders[id(parameter)])] = self._names.pop(id(parameter)), self._clock
            elif verdict:
                dead.setdefault(verdict, []).append(self._names[id(parameter)])
        self._clock += 1
        self._stepped_at[id(optimizer)] = self._clock
        self._conclude(optimizer, self._steps[id(optimizer)], dead)

    def _count_empty(self, optimizer: Optimizer) -> None:
        """A step without any gradient, by a training_step that returned None say. One says nothing, and many do."""
        self._empty[id(optimizer)] = steps = self._empty.get(id(optimizer), 0) + 1
        called = [p for p, _ in self._waiting(optimizer) if self._was_called(self._holders[id(p)], optimizer)]
        if steps >= PATIENCE and called:
            names = listing([self._names[id(p)] for p in called], 4)
            raise DeadAdapterError(
                f"{names}: called in {steps} steps in which nothing had a gradient. {WAYS_OUT['nothing']}"
            )

    def _conclude(self, optimizer: Optimizer, steps: int, dead: dict[str, list[str]]) -> None:
        """Raises for what is dead after a step, by the reason."""
        if not dead and steps >= PATIENCE:
            late = [p for p, _ in self._waiting(optimizer) if not self._is_alternative(p, optimizer)]
            late = [p for p in late if self._clock - self._moved.get(id(self._holders[id(p)]), ("", 0))[1] >= PATIENCE]
            if late:  # A's gradient is 0 up to the step behind B's first one
                dead[f"did not move in {PATIENCE} steps. {WAYS_OUT['late']}"] = [self._names[id(p)] for p in late]
        if self._moved and (left := [n for why in dead for n in dead[why] if n in self._biases and why != DIVERGED]):
            warnings.warn(f"{listing(left, 4)}: {WAYS_OUT['biases']}", stacklevel=2)
            self._unmoved |= (keys := {key for key, name in self._names.items() if name in left})
            self._names = {key: name for key, name in self._names.items() if key not in keys}
            dead = {why: rest for why, names in dead.items() if (rest := [n for n in names if n not in left])}
        problems = [f"{listing(names, 4)}: {why}{left_out(names, self._all, why)}" for why, names in dead.items()]
        raise_all(DeadAdapterError, problems, "dead adapters")

    def _is_alternative(self, parameter: nn.Parameter, optimizer: Optimizer) -> bool:
        """Whether it was not reached, but a module beside it in a list was: an expert, a head for another task.

        Rows of tokens may be those of rare ones: that they did not move is said when the run is over.
        """
        owner = self._owners[id(parameter)][0]
        if isinstance(owner, LoRALayer) and any(parameter is getattr(a, "rows", 0) for a in owner.lora.children()):
            return True
        name = self._names[id(parameter)]
        numbered = [prefix for prefix in ancestors(name) if last_part(prefix).isdigit()]
        lists = {prefix.rpartition(".")[0] for prefix in numbered} - {""}
        return gradient_of(parameter, optimizer) is None and any(
            is_inside(moved, outer) for outer in lists for moved, _ in self._moved.values()
        )

    def _waiting(self, optimizer: Optimizer) -> Iterator[tuple[nn.Parameter, Any]]:
        for group in optimizer.param_groups:
            yield from ((p, group.get("lr")) for p in group["params"] if id(p) in self._names)

    def _verdict(
        self, parameter: nn.Parameter, optimizer: Optimizer, lr: Any, before: Tensor, flowed: Collection[int]
    ) -> bool | str | None:
        """True: well. None: it may wait. Otherwise why it is dead."""
        (_, parents), holder = self._owners[id(parameter)], self._holders[id(parameter)]
        gradient, waits = gradient_of(parameter, optimizer), lr is not None and float(lr) == 0  # some have none here
        if gradient is None and id(parameter) in flowed:  # an optimizer that took it away
            return True if not torch.equal(mark_of(parameter, optimizer), before) else None
        if gradient is None:
            beside = [p for p in holder._parameters.values() if p is not None]
            had = (id(p) in self._had_gradient or id(p) in flowed for p in beside)
            if any(had) or any(gradient_of(p, optimizer) is not None for p in beside):
                return None  # it had one before, or what it lies beside has one: a parameter that some batches need
            if waits:
                return None
            if self._was_called(holder, optimizer) and not parameter.requires_grad:
                return f"called, but no gradient came back. {WAYS_OUT['inactive']}"
            if self._was_called(holder, optimizer):
                return f"called, but no gradient came back. {WAYS_OUT['called']}"
            if any(
                self._was_called(parent, optimizer) and mentions_weight(cast("Any", type(parent))) for parent in parents
            ):
                return f"the module around it was called and it was not. {WAYS_OUT['read']}"
            return None
        self._had_gradient.add(id(parameter))
        if not gathered(gradient.any()):
            return None
        now = mark_of(parameter, optimizer)
        if not now.isfinite().all():
            return DIVERGED
        if not torch.equal(now, before):
            return True
        if waits or before.any():
            return None
        return f"it has a gradient, and the optimizer left it at 0. {WAYS_OUT['stuck']}"
