"""Grades ``schedule``: case by case, then on every small load, then beside the engine's own scheduler."""

import random
from collections import deque
from itertools import product

from mini_infer.scheduler import Scheduler, Sequence
from tutorials import harness


def sequence(name, num_prompt, num_output=8, num_computed=0):
    return Sequence(name, [0] * num_prompt, num_prompt, num_prompt + num_output, num_computed_tokens=num_computed)


def decode(name):
    """A sequence whose prompt of 5 is computed, and whose first token was just sampled."""
    made = sequence(name, 5, num_computed=5)
    made.token_ids.append(0)
    return made


def names(plan):
    return [(s.request_id, num_new_tokens) for s, num_new_tokens in plan]


def queue(sequences):
    return [s.request_id for s in sequences]


def check(plan, wanted):
    got = names(plan)
    assert got == wanted, f"the plan is {got}, expected {wanted} · 计划是 {got}，应为 {wanted}"


def check_queues(running, waiting, *wanted):
    got = queue(running), queue(waiting)
    assert got == wanted, (
        f"running is {got[0]} and waiting {got[1]}, expected {wanted[0]} and {wanted[1]} · "
        f"running 是 {got[0]}，waiting 是 {got[1]}；应为 {wanted[0]} 和 {wanted[1]}"
    )


def test_one_request(answer, explain):
    """one request · 一个请求"""
    explain(
        "Nobody runs, A waits with a prompt of 5 tokens, and there is budget for 100: the plan is all of A's prompt, "
        "and A moves from waiting to running.",
        "没有序列在运行，A 带着 5 个词元的提示词在等待，预算有 100：计划应当是 A 的整个提示词，A 从 waiting 移到 "
        "running。",
    )
    running, waiting = [], deque([sequence("A", 5)])
    check(answer.schedule(running, waiting, 100, 4), [("A", 5)])
    check_queues(running, waiting, ["A"], [])


def test_order(answer, explain):
    """first come, first served · 先到先得"""
    explain(
        "A, B and C wait, in this order, and there is room for all: whoever arrived first stands first in the plan.",
        "A、B、C 依次在等待，座位和预算都够：先到的在计划里排在前面。",
    )
    running, waiting = [], deque([sequence("A", 5), sequence("B", 3), sequence("C", 2)])
    check(answer.schedule(running, waiting, 100, 4), [("A", 5), ("B", 3), ("C", 2)])
    check_queues(running, waiting, ["A", "B", "C"], [])


def test_seats(answer, explain):
    """seats · 座位"""
    explain(
        "A, B and C wait for two seats: A and B get them. The seats taken must never be more than max_num_seqs; check "
        "before you admit somebody.",
        "A、B、C 在等两个座位：A 和 B 坐下，C 继续等。占用的座位数任何时候都不能超过 max_num_seqs，接纳之前就要检查。",
    )
    running, waiting = [], deque([sequence("A", 5), sequence("B", 3), sequence("C", 2)])
    check(answer.schedule(running, waiting, 100, 2), [("A", 5), ("B", 3)])
    check_queues(running, waiting, ["A", "B"], ["C"])


def test_joining(answer, explain):
    """joining a batch under way · 中途加入"""
    explain(
        "A decodes, B waits, and one of two seats is taken. As soon as a seat is free somebody takes it: B joins in "
        "this very step, and does not wait for A to end. This is what makes the batching continuous.",
        "A 正在解码，B 在等待，两个座位占了一个。座位一空就要有人坐上去：B 这一步就加入，不必等 A 结束。"
        "连续批处理的“连续”正在于此。",
    )
    running, waiting = [decode("A")], deque([sequence("B", 3)])
    check(answer.schedule(running, waiting, 100, 2), [("A", 1), ("B", 3)])


def test_rest_of_a_prompt(answer, explain):
    """the rest of a prompt · 余下的提示词"""
    explain(
        "6 of A's 10 prompt tokens are computed already: what is planned is the part still to be computed, 4 tokens.",
        "A 的提示词有 10 个词元，其中 6 个已经算好：该计划的是还没算的部分，也就是 4 个。",
    )
    check(answer.schedule([sequence("A", 10, num_computed=6)], deque(), 100, 2), [("A", 4)])


def test_long_prompt(answer, explain):
    """a prompt longer than the budget · 提示词比预算长"""
    explain(
        "A prompt of 10 tokens meets a budget of 4. It is cut: 4 tokens are computed in this step, the rest in later "
        "ones. Were it to wait for a step with room for all of it, it would wait forever.",
        "提示词有 10 个词元，预算只有 4。这时要把它切开：这一步算 4 个，余下的留给后面的步。"
        "如果非要等到一步能放下整个提示词，它就永远等不到。",
    )
    running, waiting = [], deque([sequence("A", 10)])
    check(answer.schedule(running, waiting, 4, 2), [("A", 4)])
    check_queues(running, waiting, ["A"], [])


def test_budget(answer, explain):
    """the budget · 预算"""
    explain(
        "A, B and C decode, D waits with a prompt of 10, and the budget is 5. Decodes count as well: three tokens are "
        "spent, and two of D's fit.",
        "A、B、C 正在解码，D 带着 10 个词元的提示词在等待，预算为 5。解码也要算进预算：用掉 3 个，D 只能算 2 个。",
    )
    running, waiting = [decode("A"), decode("B"), decode("C")], deque([sequence("D", 10)])
    check(answer.schedule(running, waiting, 5, 8), [("A", 1), ("B", 1), ("C", 1), ("D", 2)])


def test_decodes_first(answer, explain):
    """decodes first · 解码优先"""
    explain(
        "A's long prompt is under way, B decodes, and the budget is 4. Whatever the order of arrival, decodes come "
        "first: otherwise the text that B's reader watches would stop while A's prompt is computed.",
        "A 的长提示词算到一半，B 正在解码，预算为 4。不论谁先到，都是解码优先：否则在算 A 的提示词期间，B 的读者会看到"
        "文字停住。",
    )
    running = [sequence("A", 20, num_computed=4), decode("B")]
    check(answer.schedule(running, deque(), 4, 2), [("B", 1), ("A", 3)])


def test_nothing_left(answer, explain):
    """an empty budget · 预算用完"""
    explain(
        "The budget of 2 is spent on A and B. C, who decodes, and D, who waits, get no token: neither is in the plan, "
        "and D stays in waiting.",
        "预算只有 2，都给了 A 和 B。正在解码的 C 和等待中的 D 一个词元也分不到：两者都不进入计划，D 留在 waiting 里。",
    )
    running, waiting = [decode("A"), decode("B"), decode("C")], deque([sequence("D", 10)])
    check(answer.schedule(running, waiting, 2, 8), [("A", 1), ("B", 1)])
    check_queues(running, waiting, ["A", "B", "C"], ["D"])


def compute(plan, running):
    """What the engine does with a plan; those that ended leave their seats."""
    for s, num_new_tokens in plan:
        s.num_computed_tokens += num_new_tokens
        if s.num_uncomputed_tokens == 0:
            s.token_ids.append(0)
            if len(s) >= s.max_length:
                running.remove(s)


def check_plan(plan, running, waiting, everyone, token_budget, max_num_seqs):
    """What holds for every plan of a scheduler that wastes nothing."""
    num_new_tokens = dict(plan)
    got, spent = names(plan), sum(n for _, n in plan)
    assert len(num_new_tokens) == len(plan), (
        f"the plan is {got}, expected nobody twice · 计划是 {got}，每个序列最多出现一次"
    )
    assert spent <= token_budget, (
        f"the plan is {got}: {spent} tokens, expected at most {token_budget} · "
        f"计划是 {got}，共 {spent} 个词元，不能超过 {token_budget} 个"
    )
    for s, n in plan:
        left = s.num_uncomputed_tokens
        assert 1 <= n <= left, (
            f"{s.request_id} gets {n} tokens, expected 1 to {left}, which are left to compute · "
            f"{s.request_id} 分到 {n} 个词元，应为 1 到 {left} 个，即还没算的部分"
        )
    assert len(running) <= max_num_seqs, (
        f"running is {queue(running)}, expected at most {max_num_seqs} · "
        f"running 是 {queue(running)}，不能超过 {max_num_seqs} 个"
    )
    assert set(num_new_tokens) <= set(running), (
        f"the plan is {got} and running {queue(running)}, expected only those who run in the plan · "
        f"计划是 {got}，running 是 {queue(running)}；计划里只应有正在运行的序列"
    )
    assert [*running, *waiting] == everyone, (
        f"running is {queue(running)} and waiting {queue(waiting)}, expected {queue(everyone)} in this order · "
        f"running 是 {queue(running)}，waiting 是 {queue(waiting)}，连起来应当依次是 {queue(everyone)}"
    )
    unused = token_budget - spent
    if unused:
        for s in running:
            n, left = num_new_tokens.get(s, 0), s.num_uncomputed_tokens
            assert n == left, (
                f"{unused} tokens of the budget are unused and {s.request_id} gets {n}, expected {left} · "
                f"预算还剩 {unused} 个词元，{s.request_id} 却只分到 {n} 个，应为 {left} 个"
            )
        assert not waiting or len(running) == max_num_seqs, (
            f"{unused} tokens of the budget and a seat are unused, expected {queue(waiting)[0]} to join · "
            f"预算还剩 {unused} 个词元，座位也有空，{queue(waiting)[0]} 应当加入"
        )


def test_every_small_load(answer, explain):
    """every small load · 穷举小规模负载"""
    requests = list(product((1, 2, 5), (1, 3)))
    for load, token_budget, max_num_seqs in product(product(requests, repeat=3), (1, 2, 3, 7), (1, 2, 3)):
        prompts, outputs = zip(*load, strict=True)
        explain(
            f"Three requests with prompts of {prompts} and outputs of {outputs} tokens, budget {token_budget}, "
            f"{max_num_seqs} seats, step after step until all have ended. No step may exceed the budget or the seats, "
            "lose anybody, or leave budget unused while somebody could have used it.",
            f"三个请求，提示词长度 {prompts}，输出长度 {outputs}，预算 {token_budget}，座位 {max_num_seqs} 个，一步一"
            "步走到全部结束。任何一步都不能超出预算或座位，不能丢掉谁，也不能在还有人用得上时把预算闲置。",
        )
        running, waiting = [], deque(sequence(name, *lengths) for name, lengths in zip("ABC", load, strict=True))
        num_steps = 0
        while running or waiting:
            everyone = [*running, *waiting]
            plan = answer.schedule(running, waiting, token_budget, max_num_seqs)
            check_plan(plan, running, waiting, everyone, token_budget, max_num_seqs)
            compute(plan, running)
            num_steps += 1
            most = sum(prompts) + sum(outputs)
            assert num_steps <= most, (
                f"not done after {num_steps} steps, expected {most} at most · "
                f"走了 {num_steps} 步还没结束，最多应为 {most} 步"
            )


def test_beside_the_engine(answer, explain):
    """beside the engine's scheduler · 与引擎的调度器并排"""
    for seed in range(60):
        draw = random.Random(seed)
        token_budget, max_num_seqs = draw.choice([1, 3, 8, 32]), draw.choice([1, 2, 4, 8])
        explain(
            f"Requests that keep arriving (seed {seed}, budget {token_budget}, {max_num_seqs} seats), beside the "
            "engine's own scheduler with memory enough: every step must be the same. (The engine puts entries of one "
            "token first in the end; that is done for you here.)",
            f"请求陆续到达（种子 {seed}，预算 {token_budget}，座位 {max_num_seqs} 个），与引擎自己的调度器并排运行，内"
            "存充足：每一步的计划都必须相同。（引擎最后会把只算一个词元的项挪到前面，这里已经替你做了。）",
        )
        engine = Scheduler(max_num_seqs, 64, 16, max_num_batched_tokens=token_budget, watermark=0)
        running, waiting = [], deque()
        for name in map(str, range(12)):
            lengths = draw.randint(1, 40), draw.randint(1, 20)
            engine.add(sequence(name, *lengths))
            waiting.append(sequence(name, *lengths))
            last = name == "11"
            for _ in range(1000 if last else draw.randint(0, 12)):
                wanted = engine.schedule()
                plan = answer.schedule(running, waiting, token_budget, max_num_seqs)
                ordered = sorted(plan, key=lambda item: item[1] > 1)
                check(ordered, list(harness.computed(wanted).items()))
                engine.commit(harness.outcomes(wanted))
                compute(plan, running)
        assert not running, (
            f"{queue(running)} still run, expected nobody: the engine has finished · "
            f"{queue(running)} 还在运行，应当一个也没有：引擎已全部做完"
        )
