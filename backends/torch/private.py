"""All of PyTorch's private API that this backend uses. After an upgrade of PyTorch, this is the file that may fail."""

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as modules
from torch.utils import _pytree

tree_map, tree_leaves = _pytree.tree_map, _pytree.tree_leaves
# oneDNN's linear on dense tensors, which torch's compiler calls: without copies, without a gradient. None if missing.
onednn_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


# As PyTorch wrote it: somebody may put another in its place.
MODULE_CALL = nn.Module.__call__


def hooked(*members: nn.Module) -> bool:
    """Whether any of these modules, or all modules, have hooks."""
    if modules._global_forward_hooks or modules._global_forward_pre_hooks:
        return True
    if modules._global_backward_hooks or modules._global_backward_pre_hooks:
        return True
    # A loop, because a generator costs a fourth of what a block's native step does in Python.
    for member in members:
        if member._forward_hooks or member._forward_pre_hooks or member._backward_hooks or member._backward_pre_hooks:
            return True
    return False


def in_forward_mode() -> bool:
    """Whether tensors may carry tangents."""
    return forward_ad._current_level >= 0


def transformed() -> bool:
    """Whether a transformation of torch.func is under way. A compiler handles those itself, so it is told no."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def intercepted() -> bool:
    """Whether a mode sees the operators or the functions that are called."""
    return bool(torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack())


def register_namedtuple(kind: type, name: str) -> None:
    """Lets torch.export.save write this NamedTuple under that name."""
    _pytree._register_namedtuple(kind, serialized_type_name=name)
