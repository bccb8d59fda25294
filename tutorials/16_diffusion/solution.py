"""Chapter 16: which masks are written in this pass. Fill in the body of remask.
---
第 16 章：这一遍写下哪些掩码。填写 remask 的函数体。
"""


def remask(canvas: list[int | None], guesses: list[tuple[int, float]], block: range, count: int) -> list[int | None]:
    """The canvas after a pass.

    canvas:  for each place the token that is written there, or None: a mask
    guesses: for each place what the model says of it: a token, and how likely that is
    block:   the places that are written now; masks elsewhere have to wait
    count:   how many masks are written, or all of the block's if it has no more

    The likeliest guesses are kept, of equal ones the leftmost; everything else stays a mask, although the model has
    said something about it ("remasking"). What is written never changes, however sure a new guess may be. Return a new
    list, and leave canvas as it is.
    ---
    一遍之后的画布。

    canvas：  每个位置上已写下的词元，或者 None：掩码
    guesses： 模型对每个位置的预测：一个词元，以及它的概率
    block：   现在可以写的位置；别处的掩码要等
    count：   写下几个掩码；块里的掩码不够时，就全部写下

    留下概率最高的预测，概率相同时取靠左的；其余位置尽管模型也有预测，仍旧是掩码（“重掩码”）。
    已经写下的词元不再改变，新的预测再有把握也不行。返回一个新列表，不要改动 canvas。
    """
    # hole
    masks = [place for place in block if canvas[place] is None]
    masks.sort(key=lambda place: -guesses[place][1])  # equal ones stay in order · 相同的保持原来的顺序
    kept = masks[:count]
    return [guesses[place][0] if place in kept else token for place, token in enumerate(canvas)]
    # end
