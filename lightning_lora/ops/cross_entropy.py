"""The loss of a language model from its last hidden states, without the logits of all tokens at once."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_lora.checks import choice_problems, is_number, is_positive_int
from lightning_lora.errors import ConfigError, UnsupportedError, raise_all
from lightning_lora.ops.row_losses import row_losses, widened
from lightning_lora.ops.sharded import PLAIN, gathered, is_sharded
from lightning_lora.ops.transforms import in_transform, without_autocast

ROWS = 256  # tokens at a time, at least: products of fewer rows wait for the head to be read
LOGITS = 1 << 22  # logits at a time where that is more tokens, on a CPU; an accelerator takes 16 times as many
VOCABULARY = 1 << 17  # rows of a head that does not say how many it has

Head = Tensor | Callable[[Tensor], Tensor]


def linear_cross_entropy(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    label_smoothing: float = 0.0,
    shift: bool = False,
    chunk_size: int | None = None,
) -> Tensor:
    r"""The cross-entropy of the logits that a head gives, which are never there for all tokens at once.

    .. math:: \ell_t = \log \sum_v e^{z_{tv}} - z_{t y_t}, \qquad z_t = W h_t + b, \qquad
        \frac{\partial \ell_t}{\partial h_t} = W^T (\mathrm{softmax}(z_t) - e_{y_t})

    The same as ``F.cross_entropy(F.linear(hidden, head, bias).float(), labels)`` and, with ``shift=True``, as the loss
    of a causal language model in transformers. The head is taken for some tokens at a time, and for tokens without a
    label not at all. With a frozen head the gradient of ``hidden`` is made in the forward pass, so no product is taken
    twice, and that gradient is all that is kept for the backward pass. A weight that is trained gets its gradient from
    logits that are made again in the backward pass; so does a head of any other kind (an adapted or packed layer).

    The idea is that of Liger Kernel's FusedLinearCrossEntropy (arXiv:2410.10989), here in plain torch, on any device;
    cut cross-entropy (arXiv:2411.09009) goes further, with kernels that make no logits in memory at all. Under
    ``torch.compile`` and ``torch.func`` transforms the logits are made as a whole.

    Args:
        hidden: (..., d): what the head is given.
        head: The weight (vocabulary, d), a layer (``model.lm_head``, adapted or not), or any function from (n, d) to
            logits (n, vocabulary), for a model that does more to them: ``lambda h: 30 * torch.tanh(lm_head(h) / 30)``.
        labels: (...,): the classes; with ``shift=True`` the tokens themselves.
        bias: (vocabulary,), or None. A layer has its own.
        ignore_index: The label of tokens that don't count.
        reduction: "mean" over the tokens that count (nan if none does), "sum", or "none".
        label_smoothing: As in ``F.cross_entropy``, in [0, 1].
        shift: Whether each token is to predict the label behind it, along the last dimension of ``labels``. The last
            one has none then.
        chunk_size: Tokens at a time; by default as many as make products fast.

    Returns:
        A scalar, or for "none" a tensor like ``labels`` with 0 where there is nothing to predict; in float32, or
        float64 if ``hidden`` is. Logits are in the dtype of autocast or else that of ``hidden``.

    Raises:
        ConfigError: If shapes, dtypes or options don't fit.
        UnsupportedError: If the weight is trained and sharded over ranks.
        IndexError: If a label is none of the vocabulary.

    Example:
        >>> hidden, lm_head = torch.ones(2, 5, 8), nn.Linear(8, 32, bias=False).requires_grad_(False)
        >>> labels = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, -100, -100]])
        >>> loss = linear_cross_entropy(hidden, lm_head, labels, shift=True)
        >>> logits = lm_head(hidden)[:, :-1].flatten(0, 1)
        >>> torch.allclose(loss, F.cross_entropy(logits, labels[:, 1:].flatten()))
        True
    """
    weight, bias = _weight_and_bias(head, bias)
    problems = _problems(hidden, head, weight, bias, labels, reduction, label_smoothing, shift, chunk_size)
    raise_all(ConfigError, problems, "linear_cross_entropy")
    product = head if weight is None else functools.partial(F.linear, weight=weight, bias=bias)
    assert not isinstance(product, Tensor)
    labels = labels.to(hidden.device, torch.long)
    if shift:
        labels = F.pad(labels[..., 1:], (0, 1), value=ignore_index)
    targets = labels.reshape(-1)
    if torch.compiler.is_compiling() or in_transform():
        logits = product(hidden).reshape(targets.shape[0], -1)
        options: dict[str, Any] = {"reduction": reduction, "label_smoothing": label_smoothing}
        loss = F.cross_entropy(widened(logits), targets, ignore_index=ignore_index, **options)
        return loss.view(labels.shape) if reduction == "none" else loss

    rows, kept = hidden.reshape(-1, hidden.shape[-1]), _that_count(targets, ignore_index)
    if len(kept) < len(targets):
        rows, targets = rows.index_select(0, kept), targets[kept]
    if weight is None or type(weight) not in PLAIN:
        losses = _through_function(rows, product, targets, ignore_index, label_smoothing, chunk_size)
    else:
        _check_range(targets, len(weight), ignore_index)
        losses = _through_weight(rows, weight, bias, targets, label_smoothing, chunk_size)
    if reduction == "none":
        return losses.new_zeros(labels.numel()).index_copy(0, kept, losses).view(labels.shape)
    return losses.sum() / len(targets) if reduction == "mean" else losses.sum()


def _weight_and_bias(head: Head, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """What a head multiplies with and adds, whole; no weight if it has to be called."""
    weight: Tensor | None = head if isinstance(head, Tensor) else None
    if isinstance(head, nn.Linear) and bias is None and _is_untouched(head):
        weight, bias = head.weight, head.bias
    if weight is not None and is_sharded(weight):
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (weight, bias)):
            raise UnsupportedError(
                "linear_cross_entropy: the head is trained, and each rank has a part of it: call fully_shard on "
                "the head itself too, and give the layer"
            )
        weight, bias = gathered(weight), None if bias is None else gathered(bias)
    return weight, bias


def _is_untouched(layer: nn.Linear) -> bool:
    """Whether calling a layer is the product with its weight, and nothing hangs on the call."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return type(layer).forward is nn.Linear.forward and "forward" not in vars(layer) and not any(hooks)


def _problems(
    hidden: Tensor,
    head: Head,
    weight: Tensor | None,
    bias: Tensor | None,
    labels: Tensor,
    reduction: str,
    smoothing: float,
    shift: bool,
    chunk_size: int | None,
) -> Iterator[str]:
    """What is wrong with the arguments."""
    shape, wanted = tuple(hidden.shape), tuple(hidden.shape[:-1])
    if not hidden.is_floating_point() or not shape:
        yield f"hidden must be a floating-point tensor (..., d), got {hidden.dtype} of shape {shape}"
    elif tuple(labels.shape) != wanted:
        hint = ""
        if labels.dim() == len(wanted) and labels.shape[:-1] == wanted[:-1]:
            hint = ". With shift=True both have all tokens: leave the slicing out"
        yield f"hidden of shape {shape} needs labels of shape {wanted}, got {tuple(labels.shape)}{hint}"
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        yield f"labels must be classes as integers, got {labels.dtype}"
    if shift and not labels.dim():
        yield "shift=True needs labels (..., tokens), got a scalar"
    if weight is None and not callable(head):
        yield f"head must be a weight (vocabulary, d), a layer or a function, got {type(head).__name__}"
    elif weight is None and bias is not None:
        yield "bias goes with a weight: a layer or a function adds its own"
    elif weight is not None and shape:
        if weight.dim() != 2 or weight.shape[1] != shape[-1]:
            hint = ". Give head.T" if weight.dim() == 2 and weight.shape[0] == shape[-1] else ""
            hint = hint or ". If a strategy keeps it elsewhere between its uses, give the layer instead of its weight"
            yield f"hidden of shape {shape} needs a head (vocabulary, {shape[-1]}), got {tuple(weight.shape)}{hint}"
        elif bias is not None and bias.shape != weight.shape[:1]:
            yield f"a head of shape {tuple(weight.shape)} needs a bias ({len(weight)},), got {tuple(bias.shape)}"
        dtypes = {t.dtype for t in (hidden, weight, bias) if t is not None}
        if len(dtypes) > 1 and (torch.float64 in dtypes or not torch.is_autocast_enabled(hidden.device.type)):
            found = " and ".join(sorted(map(str, dtypes)))
            yield f"hidden and head must have one dtype outside autocast, got {found}: hidden.to(head.dtype), say"
    yield from choice_problems("reduction", reduction, ("mean", "sum", "none"))
    if not is_number(smoothing) or not 0 <= smoothing <= 1:
        yield f"label_smoothing must be in [0, 1], got {smoothing!r}"
    if chunk_size is not None and not is_positive_int(chunk_size):
        yield f"chunk_size must be a number of tokens, or None, got {chunk_size!r}"


def _that_count(targets: Tensor, ignore_index: int) -> Tensor:
    """Which tokens have a label; on shapes alone, which don't tell, all."""
    if isinstance(targets, FakeTensor):
        return torch.arange(len(targets), device=targets.device)
    return (targets != ignore_index).nonzero().squeeze(1)


def _tokens_at_a_time(vocabulary: int, device: torch.device) -> int:
    logits = LOGITS if device.type == "cpu" else 16 * LOGITS
    return max(ROWS, logits // max(1, vocabulary) // 64 * 64)


def _check_range(targets: Tensor, vocabulary: int, ignore_index: int) -> None:
    low, high = map(int, targets.aminmax()) if len(targets) and not isinstance(targets, FakeTensor) else (0, 0)
    if low < 0 or high >= vocabulary:
        raise IndexError(
            f"linear_cross_entropy: label {low if low < 0 else high} is out of bounds of a vocabulary of {vocabulary}. "
            f"Tokens that don't count have the label ignore_index, which is {ignore_index}"
        )


def _through_function(
    rows: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor, ignore: int, smoothing: float, chunk: int | None
) -> Tensor:
    """The loss of each row, (n,), by autograd; logits are made once for the loss and once for the gradients."""

    def losses(rows: Tensor, targets: Tensor) -> Tensor:
        logits = widened(head(rows))
        return F.cross_entropy(logits, targets, ignore_index=ignore, reduction="none", label_smoothing=smoothing)

    chunk = chunk or _tokens_at_a_time(getattr(head, "out_features", VOCABULARY), rows.device)
    pieces = zip(torch.split(rows, chunk), torch.split(targets, chunk), strict=True)
    return torch.cat([checkpoint(losses, *piece, use_reentrant=False) for piece in pieces])


def _through_weight(
    rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, smoothing: float, chunk: int | None
) -> Tensor:
    """The same with a weight, in the dtype of autocast, which leaves float64 alone."""
    device, dtype = rows.device.type, rows.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    rows, weight, bias = rows.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    chunk = chunk or _tokens_at_a_time(len(weight), rows.device)
    with without_autocast(device):
        return row_losses(rows, weight, bias, targets, smoothing, chunk)
