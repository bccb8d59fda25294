"""Your own kernel, from outside the package: three steps, and two commands that do not know it from ours.

    pytest tests/kernels --kernel-backend examples/my_rmsnorm.py:mine               # is it right?
    pytest --benchmark --kernel-backend examples/my_rmsnorm.py:mine -k rmsnorm      # is it fast?

你自己的算子：三步写成，再用上面两条命令检验对错、测量快慢，与内置算子一视同仁。
"""

import torch
from torch import Tensor

from mini_infer.kernels import register


# Step 1: give the backend a name and say which operation it does. Arguments come by position, with defaults filled in,
# exactly as the public function documents them (mini_infer/kernels/contract.py).
@register("rmsnorm", backend="mine", devices=("cpu", "cuda"))
def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    # Step 2: keep the promises. Any leading shape, any strides, and arithmetic in float32 or wider: the squares of
    # float16 numbers overflow at 256.
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # The idea that makes this version differ from the reference: the length of a row is one pass over memory.
    # ‖x‖² / hidden_size is the mean of squares, and no tensor of squares is ever written.
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    mean_square = length.square() / x.shape[-1]
    return (wide * torch.rsqrt(mean_square + eps)).to(x.dtype) * weight


# Step 3: use it.
#
#     LLM(kernel_backend="examples/my_rmsnorm.py:mine")     # in an engine
#     mini-infer serve --kernel-backend examples/my_rmsnorm.py:mine
#     with kernels.use_backend("examples/my_rmsnorm.py:mine"): ...     # for calls by hand
#
# What "mine" does not have runs on the reference. An installed package is found by the name alone if its pyproject.toml
# says:
#
#     [project.entry-points."mini_infer.kernels"]
#     mine = "my_rmsnorm"
