"""Grades ``remask``: by hand, then against a slow way on random canvases."""

import random


def shown(canvas):
    return [("░" if token is None else token) for token in canvas]


def same(got, wanted, case=""):
    assert got is not None, "remask returned None · remask 返回了 None"
    got, wanted = shown(got), shown(wanted)
    assert got == wanted, f"{case}{got}, expected {wanted} · {case}得到 {got}，应为 {wanted}"


GUESSES = [(10, 0.3), (11, 0.9), (12, 0.6), (13, 0.8)]


def test_the_likeliest(answer, explain):
    """the likeliest are kept · 留下概率最高的"""
    explain(
        "Four masks, two are to be written: those with 0.9 and 0.8. The other two stay None.",
        "四个掩码，要写下两个：概率为 0.9 和 0.8 的。另外两个仍是 None。",
    )
    got = answer.remask([None] * 4, GUESSES, range(4), 2)
    same(got, [None, 11, None, 13])


def test_what_is_written_stays(answer, explain):
    """what is written never changes · 写下的不再改变"""
    explain(
        "Place 1 is written already. The new guess for it, however likely, changes nothing, and is not one of the two.",
        "位置 1 已经写好。对它的新预测再有把握也不起作用，也不算在两个之内。",
    )
    got = answer.remask([None, 7, None, None], GUESSES, range(4), 2)
    same(got, [None, 7, 12, 13])


def test_the_block(answer, explain):
    """only the block · 只写这一块"""
    explain(
        "The block is places 0 to 2. Place 3 is surer than two of them, and has to wait. When five are to come and "
        "the block has three masks, it gets full, and nothing else happens.",
        "这一块是位置 0 到 2。位置 3 比其中两个更有把握，但还要等。"
        "要写五个而块里只有三个掩码时，就写满这一块，别处不动。",
    )
    same(answer.remask([None] * 4, GUESSES, range(3), 2), [None, 11, 12, None])
    same(answer.remask([None] * 4, GUESSES, range(3), 5), [10, 11, 12, None])


def test_ties(answer, explain):
    """equal ones · 概率相同"""
    explain(
        "Places 0, 2 and 3 are equally sure, and one is to be written: the leftmost, so that everybody gets the same "
        "text.",
        "位置 0、2、3 同样有把握，只写一个：取最靠左的，这样谁来运行都得到同样的文本。",
    )
    guesses = [(5, 0.5), (6, 0.1), (7, 0.5), (8, 0.5)]
    same(answer.remask([None] * 4, guesses, range(4), 1), [5, None, None, None])


def test_the_canvas_is_left_alone(answer, explain):
    """a new list · 一个新列表"""
    explain(
        "The canvas that was handed in must be as before: the engine goes back to it when a step fails.",
        "传进来的画布必须原样不动：一步失败时，引擎要回到它。",
    )
    canvas = [None, 3, None, None]
    answer.remask(canvas, GUESSES, range(4), 3)
    assert canvas == [None, 3, None, None], (
        f"canvas became {shown(canvas)}, expected it unchanged · canvas 变成了 {shown(canvas)}，本应不变"
    )


def test_random_canvases(answer, explain):
    """random canvases · 随机的画布"""
    explain(
        "300 random canvases, with many equal probabilities. The right answer is found by looking for the best mask, "
        "one after the other.",
        "300 张随机的画布，其中很多概率相同。正确答案是一次找一个最有把握的掩码，逐个找出来的。",
    )
    draw = random.Random(16)
    for _ in range(300):
        size = draw.randint(1, 12)
        canvas = [draw.choice([None, None, draw.randrange(100)]) for _ in range(size)]
        guesses = [(draw.randrange(100), draw.randrange(4) / 4) for _ in range(size)]
        start = draw.randrange(size)
        block, count = range(start, draw.randint(start, size)), draw.randrange(5)
        wanted = list(canvas)
        for _ in range(count):
            best = None
            for place in block:
                if wanted[place] is None and (best is None or guesses[place][1] > guesses[best][1]):
                    best = place
            if best is not None:
                wanted[best] = guesses[best][0]
        case = f"canvas={shown(canvas)}, guesses={guesses}, block={block}, count={count}: "
        same(answer.remask(canvas, guesses, block, count), wanted, case)
