"""The processes that train one network together, as `torchrun` starts them; alone, every function here is the identity.

Each process holds the same weights and is given its rows of every batch. What it computes is its share: shares are added up over the processes, so the
gradient, the batch statistics and every decision that steers the training are those of one process with the whole batch. CPU processes talk by gloo,
CUDA processes by NCCL. A script that has called `torch.distributed.init_process_group` itself is taken as it is.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import deque
from collections.abc import Iterator
from functools import cache
from math import sqrt
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any

from toolchain.endings import TERMINATED
from toolchain.errors import ToolchainError, UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["add_gradients", "rank", "rows", "share_weights", "size", "together"]

SPOKEN = "toolchain/spoken"
"""The key under which the first process that fails says so, so that one sentence is printed and not one a process."""

PATIENCE = 5.0
"""Seconds that a process whose partners are gone waits for one of them to say why."""

ASKED = "torchrun ended this training, since it was told to or another process of it was killed: see what it says, then go on with --resume"

_LENT: deque[Any] = deque(maxlen=8)
"""The tensors last handed to the transport. Its threads let go of them a moment after the call has returned; were theirs the last hold, they would want the
interpreter's lock for it, and `destroy_process_group`, which waits for these threads with the lock in its hand, would never return."""


def _group() -> Any:
    """torch.distributed where a group of several processes is there, else None."""
    from torch import distributed as group

    return group if group.is_available() and group.is_initialized() and group.get_world_size() > 1 else None


def size() -> int:
    """How many processes train together; 1 alone."""
    group = _group()
    return 1 if group is None else int(group.get_world_size())


def rank() -> int:
    """This process's number, from 0."""
    group = _group()
    return 0 if group is None else int(group.get_rank())


def alone() -> bool:
    """Whether torchrun started no other process."""
    return os.environ.get("WORLD_SIZE", "1") in ("", "0", "1")


def speaks() -> bool:
    """Whether this process prints what all of them would: the first one that torchrun started, or the only one."""
    return alone() or os.environ.get("RANK", "0") == "0"


def rows(count: int) -> slice:
    """This process's rows of `count`, which the number of processes divides; UsageError where it does not."""
    if count % size():
        raise UsageError(f"{count} samples cannot be dealt to {size()} processes equally: make train.batch a multiple of {size()}")
    each = count // size()
    return slice(rank() * each, (rank() + 1) * each)


def _on_group_device(tensor: Tensor) -> Tensor:
    """NCCL adds on GPUs only."""
    group = _group()
    return tensor.cuda() if group.get_backend() == "nccl" and tensor.device.type != "cuda" else tensor


def total(values: Tensor) -> Tensor:
    """The sum over the processes, without a gradient."""
    group = _group()
    if group is None:
        return values
    whole = _on_group_device(values.detach().clone().contiguous())
    _LENT.append(whole)
    group.all_reduce(whole)
    return whole.to(values.device)


def total_number(value: float) -> float:
    """The sum over the processes of one number a process."""
    import torch

    return value if _group() is None else float(total(torch.tensor(value, dtype=torch.float64)))


def first_says(word: bool) -> bool:
    """`word` of the first process, which the others wait for."""
    return bool(total_number(float(word and rank() == 0)))


def norm(values: Tensor) -> float:
    """The Euclidean norm of what all processes hold together."""
    if _group() is None:
        return float(values.norm())
    return sqrt(float(total(values.double().square().sum())))


def joint_sum(values: Tensor) -> Tensor:
    """The sum over the processes, whose gradient is again summed: what one process does to it concerns the samples of all."""
    if _group() is None:
        return values
    summed: Tensor = _joint_sum().apply(values)
    return summed


@cache
def _joint_sum() -> Any:
    import torch

    class JointSum(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, values: Tensor) -> Tensor:
            return total(values)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return total(grads[0])

    return JointSum


def kth_largest(values: Tensor, k: int) -> float:
    """The k-th largest (from 1) of what all processes hold together, as many values each."""
    import torch

    group = _group()
    if group is None:
        return float(values.kthvalue(len(values) - k + 1).values)
    own = _on_group_device(values.topk(min(k, len(values))).values.contiguous())
    parts = [torch.empty_like(own) for _ in range(size())]
    _LENT.append((parts, own))
    group.all_gather(parts, own)
    return float(torch.cat(parts).topk(k).values[-1])


def add_gradients(module: nn.Module) -> None:
    """Replace every `.grad` by its sum over the processes; a parameter has one on all of them or on none."""
    import torch

    if _group() is None:
        return
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    if not grads:
        return
    for kind in dict.fromkeys(g.dtype for g in grads):  # one message, not one a parameter
        same = [g for g in grads if g.dtype == kind]
        whole = total(torch.cat([g.flatten() for g in same]))
        for grad, part in zip(same, torch.split(whole, [g.numel() for g in same]), strict=True):
            grad.copy_(part.reshape(grad.shape))


def share_weights(module: nn.Module) -> None:
    """Give every process the first one's parameters and buffers."""
    group = _group()
    if group is None:
        return
    for tensor in module.state_dict().values():
        sent = _on_group_device(tensor.detach().clone().contiguous())
        _LENT.append(sent)
        group.broadcast(sent, 0)
        tensor.copy_(sent)


def wait() -> None:
    """Until every process is here."""
    import torch

    total(torch.zeros(1))


@contextlib.contextmanager
def together(device: str) -> Iterator[None]:
    """Join the processes that torchrun started and part from them at the end; nothing happens alone, or where a script has joined them already.

    Where one process fails, all end: the first that knows why raises its error, the others leave in silence with its exit code (torchrun reports them).
    """
    if alone():
        yield
        return
    import torch
    import torch.distributed as group

    if not group.is_available() or group.is_initialized():
        yield
        return
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    try:
        group.init_process_group("nccl" if cuda else "gloo")
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"the processes cannot find each other ({_first_line(error)}): start them all with torchrun") from None
    lost: Exception | None = None
    try:
        try:
            yield
        except Exception as error:  # whatever it is, one process says it
            if _partner_is_gone(error):
                lost = error
            said = not _claims() if lost is None else _said_by_another()
            if said:
                raise SystemExit(error.exit_code if isinstance(error, ToolchainError) else 1) from None
            if lost is not None:
                raise _left_alone(lost) from None
            raise
    except SystemExit as left:
        # torchrun terminates those that outlive one that was killed, which could say nothing
        if left.code == TERMINATED and _claims():
            raise (ToolchainError(ASKED) if lost is None else _left_alone(lost)) from None
        raise
    finally:
        with contextlib.suppress(RuntimeError):
            group.destroy_process_group()
        _LENT.clear()


def _left_alone(error: Exception) -> ToolchainError:
    return ToolchainError(
        f"another process of this training is gone ({_first_line(error)}): see what torchrun says of it, then go on with --resume"
    )


def _claims() -> bool:
    """Whether this process is the first to say why it ends."""
    from torch.distributed import distributed_c10d

    try:
        return int(distributed_c10d._get_default_store().add(SPOKEN, 1)) == 1
    except RuntimeError:  # the process that held the store is gone, and has spoken
        return speaks()


def _said_by_another() -> bool:
    """Whether another process says why it ended; it may still be about to."""
    from torch.distributed import distributed_c10d

    until = monotonic() + PATIENCE
    try:
        store = distributed_c10d._get_default_store()
        while monotonic() < until:
            if int(store.add(SPOKEN, 0)):
                return True
            sleep(0.1)
    except RuntimeError:  # the first process held the store and was killed: the next one speaks
        return rank() != 1
    return not _claims()


def _partner_is_gone(error: Exception) -> bool:
    """A partner that left breaks the next sum, in whatever words the transport has."""
    words = str(error).lower()
    return (
        isinstance(error, RuntimeError)
        and not isinstance(error, ToolchainError)
        and any(word in words for word in ("connection", "gloo", "nccl", "timed out", "peer"))
    )


def _first_line(error: BaseException) -> str:
    """Without the place in the transport's source that gloo puts before it."""
    return re.sub(r"^\[[^\]]*:\d+\] ", "", (str(error).splitlines() or [type(error).__name__])[0])
