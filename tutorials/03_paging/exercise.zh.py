"""第 3 章：为序列的新词元准备槽位。

请补全 ``prepare_slots`` 的函数体，然后用 ``mini-infer learn check 3`` 批改。
"""

from mini_infer.memory import BlockManager
from mini_infer.scheduler import BlockCopy
from mini_infer.typing import BlockTable


def prepare_slots(
    block_table: BlockTable, num_computed_tokens: int, num_new_tokens: int, manager: BlockManager
) -> tuple[list[int], list[BlockCopy]]:
    """为序列接下来的词元腾出位置，并说明每个词元放在哪里。

    位置 p 的词元放在块 ``block_table[p // block_size]`` 里，块内偏移为 ``p % block_size``，
    槽位编号是 ``块号 * block_size + 偏移``。写入之前，这个块必须存在，而且只归这一个序列所有：

    - 块表不够长，就追加一个块：``manager.allocate(1)`` 返回只含一个块号的列表；
    - 块被共享（``manager.is_shared(block)``），就换一个新块顶替它的位置，记下 ``BlockCopy(旧块, 新块)``，
      再用 ``manager.free([旧块])`` 放开旧块。

    没有新词元写入的块，不管是否共享，都不要动。一个块也不要多拿。

    参数：
        block_table: 序列现有的块，就地修改；至少装得下已经算好的词元。
        num_computed_tokens: 键和值已在缓存里的词元数，它们占据从 0 开始的位置。
        num_new_tokens: 这一次新来的词元数，位置紧接其后；至少为 1。
        manager: 块的主人，手里的块够用。``manager.block_size`` 是一个块的槽位数。

    返回：
        新词元的槽位，按顺序排列；以及写入之前必须完成的块复制。
    """
    ...
