"""Grades ``run_overlapped`` on a device that plays scripts and notes the order of things."""

import random
from collections import Counter

STOP, JUNK = 0, 99


class Device:
    """Plays each request's script; behind its end comes junk. Notes who was launched, and when a step was read."""

    def __init__(self, scripts):
        self.scripts = scripts
        self.steps = []  # names
        self.log = []  # ("launch" or "read", number of the step)
        self.counts = Counter()

    def launch(self, names):
        assert len(self.steps) < 500, "500 steps were launched, expected an end · 已经发起 500 步，应当早已结束"
        number = len(self.steps)
        self.steps.append(list(names))
        self.log.append(("launch", number))
        token_ids = []
        for name in names:
            script, place = self.scripts[name], self.counts[name]
            token_ids.append(script[place] if place < len(script) else JUNK)
            self.counts[name] += 1
        return Handle(self, number, token_ids)


class Handle:
    def __init__(self, device, number, token_ids):
        self.device, self.number, self.token_ids = device, number, token_ids

    def wait(self):
        self.device.log.append(("read", self.number))
        return list(self.token_ids)


def run(answer, wanted):
    """Run requests given as {name: (max_tokens, script)}; returns the tokens and the device."""
    device = Device({name: script for name, (_, script) in wanted.items()})
    requests = [answer.Request(name, max_tokens, STOP) for name, (max_tokens, _) in wanted.items()]
    return answer.run_overlapped(requests, device.launch), device


def truth(wanted):
    """The tokens, from the scripts alone."""
    tokens = {}
    for name, (max_tokens, script) in wanted.items():
        end = script.index(STOP) + 1 if STOP in script else len(script)
        tokens[name] = script[: min(end, max_tokens)]
    return tokens


def told(log):
    return ", ".join(f"{what} {number}" for what, number in log)


def check_tokens(tokens, wanted):
    assert tokens == wanted, f"the tokens are {tokens}, expected {wanted} · 词元是 {tokens}，应为 {wanted}"


def check_order(log, first, second):
    assert first in log and second in log and log.index(first) < log.index(second), (
        f"the order is {told(log)}, expected {told([first])} before {told([second])} · "
        f"次序是 {told(log)}，{told([first])} 应当在 {told([second])} 之前"
    )


def check_steps(device, name, most):
    count = device.counts[name]
    assert count <= most, (
        f"{name} was in {count} steps, expected {most} at most · {name} 参加了 {count} 步，最多应为 {most} 步"
    )


def check_none_empty(device):
    assert [] not in device.steps, (
        f"the steps are {device.steps}, expected no empty one · 各步是 {device.steps}，不应有空的"
    )


def test_one_request(answer, explain):
    """one request · 一个请求"""
    explain(
        "One request with max_tokens=3, for which the device samples 7, 8, 9: run_overlapped should return "
        "{'A': [7, 8, 9]}. A token is missing if the last step was never read; one is too many if a step was launched "
        "for a fourth.",
        "只有一个请求，max_tokens=3，设备依次采样出 7、8、9：run_overlapped 应当返回 {'A': [7, 8, 9]}。"
        "少一个，多半是最后一步没有读取；多一个，多半是为第四个词元也发起了一步。",
    )
    check_tokens(run(answer, {"A": (3, [7, 8, 9])})[0], {"A": [7, 8, 9]})


def test_results_belong_to_their_own_step(answer, explain):
    """a result belongs to its own step · 结果属于它自己那一步"""
    wanted = {"A": (1, [10]), "B": (3, [20, 21, 22]), "C": (2, [30, 31])}
    explain(
        "A wants 1 token, B 3 and C 2, so every step is smaller than the one before. What wait returns belongs to the "
        "requests that this very step was launched for, not to those of the step that was launched after it: keep a "
        "step's requests together with its handle.",
        "A 要 1 个词元，B 要 3 个，C 要 2 个，所以每一步都比前一步小。wait 的结果属于发起那一步时的请求，"
        "不属于后来发起的那一步：请把一步的请求和它的 handle 放在一起保存。",
    )
    check_tokens(run(answer, wanted)[0], truth(wanted))


def test_a_step_is_under_way_while_another_is_read(answer, explain):
    """one step under way, and not two · 有一步在途，也只有一步"""
    _, device = run(answer, {"A": (4, [1, 2, 3, 4])})
    for number in range(3):
        explain(
            f"One request with 4 tokens; your order was: {told(device.log)}. Step {number} was read before step "
            f"{number + 1} was launched, so the device had nothing to do while the host was reading. Launch first, "
            "then wait.",
            f"一个请求，4 个词元；你的次序是：{told(device.log)}。第 {number} 步先被读取，第 {number + 1} 步才发起，"
            "主机读取的时候设备无事可做。应当先发起，再 wait。",
        )
        check_order(device.log, ("launch", number + 1), ("read", number))
    for number in range(2):
        explain(
            f"One request with 4 tokens; your order was: {told(device.log)}. Step {number + 2} was launched before "
            f"step {number} was read: three steps were under way. One running and one behind it keep the device busy; "
            "more would only be planned on older knowledge.",
            f"一个请求，4 个词元；你的次序是：{told(device.log)}。第 {number} 步还没有读取，第 {number + 2} 步"
            "就发起了：同时有三步在途。一步在算、一步排在后面，设备就不会闲着；再多，只会让计划依据更旧的信息。",
        )
        check_order(device.log, ("read", number), ("launch", number + 2))


def test_the_length_is_known_in_advance(answer, explain):
    """max_tokens is known in advance · max_tokens 事先就知道"""
    wanted = {"A": (2, [1, 2]), "B": (5, [1, 2, 3, 4, 5])}
    tokens, device = run(answer, wanted)
    for name, (max_tokens, _) in wanted.items():
        explain(
            f"{name} has max_tokens={max_tokens} and was in {device.counts[name]} steps. No result is needed to see "
            "this end coming: count the tokens that are under way together with those that are known.",
            f"{name} 的 max_tokens 是 {max_tokens}，却参加了 {device.counts[name]} 步。这样的结尾不看结果也能预见："
            "在途的词元要和已知的词元一起数。",
        )
        check_steps(device, name, max_tokens)
    check_tokens(tokens, truth(wanted))


def test_nothing_follows_a_stop(answer, explain):
    """nothing follows a stop token · 停止词元之后不再有词元"""
    wanted = {"A": (6, [5, STOP, JUNK, JUNK]), "B": (6, [6, 6, 6, 6, 6, 6])}
    tokens, _ = run(answer, wanted)
    explain(
        "A's second token is its stop token. When the host reads it, the next step is under way with A in it. What "
        "that step samples for A has to be dropped; the stop token itself is the last that counts.",
        "A 的第二个词元就是停止词元。主机读到它时，带着 A 的下一步已经在途。那一步为 A 采样的词元必须丢弃；"
        "最后一个算数的词元是停止词元本身。",
    )
    check_tokens(tokens.get("A"), [5, STOP])
    explain(
        "A stops early and B goes on: dropping A's token must not cost B one of its own.",
        "A 提前停止，B 继续：丢弃 A 的词元时，不能把 B 的也丢了。",
    )
    check_tokens(tokens.get("B"), [6] * 6)


def test_a_stop_costs_one_step_at_most(answer, explain):
    """a stop costs one step at most · 停止至多浪费一步"""
    for place in range(5):
        wanted = {"A": (9, [*range(1, place + 1), STOP]), "B": (9, list(range(1, 10)))}
        tokens, device = run(answer, wanted)
        needed = place + 1
        explain(
            f"A stops with token {needed} and was in {device.counts['A']} steps. One too many cannot be helped; the "
            "next plan comes after the stop token was read, and must know about it.",
            f"A 在第 {needed} 个词元处停止，却参加了 {device.counts['A']} 步。多一步无法避免；"
            "再下一步的计划是在读到停止词元之后做的，必须考虑到它。",
        )
        check_steps(device, "A", needed + 1)
        check_tokens(tokens, truth(wanted))


def test_no_step_is_empty(answer, explain):
    """no step is empty · 没有空的一步"""
    explain(
        "With no requests at all there is nothing to launch, and the result is an empty dictionary.",
        "一个请求也没有时，什么都不必发起，结果是空字典。",
    )
    tokens, device = run(answer, {})
    check_tokens(tokens, {})
    assert device.steps == [], f"the steps are {device.steps}, expected none · 各步是 {device.steps}，应当一步也没有"
    explain(
        "A step without requests was launched. Look whether there is anybody left before you launch.",
        "发起了一个没有请求的空步。发起之前，先看看还有没有请求。",
    )
    _, device = run(answer, {"A": (3, [1, STOP]), "B": (1, [4])})
    check_none_empty(device)


def test_random_scripts(answer, explain):
    """random scripts, beside the loop that waits · 随机脚本，与同步循环对照"""
    seed = 11
    print("seed", seed)
    draw = random.Random(seed)
    for _ in range(300):
        wanted = {}
        for name in "ABCDEF"[: draw.randint(1, 6)]:
            max_tokens = draw.randint(1, 8)
            wanted[name] = (max_tokens, [draw.choice([STOP, 1, 2, 3, 4, 5]) for _ in range(max_tokens)])
        tokens, device = run(answer, wanted)
        explain(
            f"Requests as name: (max_tokens, what the device samples), with stop token {STOP}: {wanted}. The tokens "
            "must be those of the synchronous loop.",
            f"请求写作 名字: (max_tokens, 设备采样的词元)，停止词元是 {STOP}：{wanted}。词元必须与同步循环得到的相同。",
        )
        requests = [answer.Request(name, max_tokens, STOP) for name, (max_tokens, _) in wanted.items()]
        alone = Device({name: script for name, (_, script) in wanted.items()})
        check_tokens(tokens, truth(wanted))
        check_tokens(answer.run_synchronously(requests, alone.launch), truth(wanted))
        explain(
            f"Requests as name: (max_tokens, what the device samples), with stop token {STOP}: {wanted}. The tokens "
            f"are right, but the steps are not: {device.steps}, in the order {told(device.log)}.",
            f"请求写作 名字: (max_tokens, 设备采样的词元)，停止词元是 {STOP}：{wanted}。词元都对，但步不对："
            f"{device.steps}，次序是 {told(device.log)}。",
        )
        check_none_empty(device)
        for number in range(1, len(device.steps)):
            check_order(device.log, ("launch", number), ("read", number - 1))
            if number >= 2:
                check_order(device.log, ("read", number - 2), ("launch", number))
        for name, (max_tokens, _) in wanted.items():
            check_steps(device, name, min(max_tokens, len(tokens[name]) + 1))
