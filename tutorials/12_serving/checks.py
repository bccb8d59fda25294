"""Grades ``TextStream``: by hand, then against the definition worked out in full, then beside the engine's own."""

import random

from mini_infer.engine.detokenizer import StopStringMatcher


def stream(answer, pieces, stop_strings):
    """Feed pieces until one completes a stop string; returns what each gave, and the stream."""
    texts = answer.TextStream(list(stop_strings))
    sent = []
    for place, piece in enumerate(pieces):
        sent.append(texts.append(piece, place == len(pieces) - 1))
        assert isinstance(sent[-1], str), (
            f"append returned {sent[-1]!r}, expected a str · append 返回了 {sent[-1]!r}，应为 str"
        )
        if texts.stopped:
            break
    return sent, texts


def certain(text, stop_strings):
    """How much of a text without stop strings can be sent: up to where one might have begun. Every place is tried."""
    might_begin = (
        place
        for place in range(len(text))
        if any(stop.startswith(text[place:]) and stop != text[place:] for stop in stop_strings)
    )
    return text[: next(might_begin, len(text))]


def truth(pieces, stop_strings):
    """What must have been sent after each piece, from all the bytes so far."""
    sent = []
    for end in range(1, len(pieces) + 1):
        data, is_last = b"".join(pieces[:end]), end == len(pieces)
        text = data.decode("utf-8", "replace") if is_last else whole_characters(data)
        places = [text.index(stop) for stop in stop_strings if stop in text]
        if places:
            return [*sent, text[: min(places)]], True
        sent.append(text if is_last else certain(text, stop_strings))
    return sent, False


def whole_characters(data):
    """The text of bytes that may end within a character."""
    for size in range(4):
        try:
            return data[: len(data) - size].decode("utf-8")
        except UnicodeDecodeError:
            pass
    return data.decode("utf-8", "replace")  # the random texts below are all valid


def check(sent, wanted):
    assert sent == wanted, f"sent {sent!r}, expected {wanted!r} · 发送了 {sent!r}，应为 {wanted!r}"


def check_stopped(texts, wanted):
    assert texts.stopped == wanted, (
        f"stopped is {texts.stopped}, expected {wanted} · stopped 是 {texts.stopped}，应为 {wanted}"
    )


def test_plain_text(answer, explain):
    """plain text · 普通文字"""
    explain(
        "Without stop strings, the pieces b'Hel', b'lo' and b'!' are certain as soon as they come: append returns "
        "'Hel', then 'lo', then '!'.",
        "没有停止字符串时，b'Hel'、b'lo'、b'!' 一来就是确定的：append 依次返回 'Hel'、'lo'、'!'。",
    )
    sent, texts = stream(answer, [b"Hel", b"lo", b"!"], [])
    check(sent, ["Hel", "lo", "!"])
    check_stopped(texts, False)


def test_characters_in_parts(answer, explain):
    """a character in parts · 分成几份的字符"""
    data = "缓存🎉".encode()
    explain(
        f"The text '缓存🎉' came one byte at a time, {len(data)} pieces. A character may be sent only when its last "
        "byte is there; before that, append returns an empty text. A '\N{REPLACEMENT CHARACTER}' means that an "
        "unfinished character was decoded: leave it to the decoder, which remembers the bytes.",
        f"'缓存🎉' 一次一个字节，共 {len(data)} 份。字符要等最后一个字节到了才能发送，在那之前 append 返回空文字。"
        "出现 '\N{REPLACEMENT CHARACTER}'，说明没收完的字符被解码了：请交给 decoder，它会记住这些字节。",
    )
    sent, _ = stream(answer, [bytes([byte]) for byte in data], [])
    check(sent, ["", "", "缓", "", "", "存", "", "", "", "🎉"])
    explain(
        "The answer ends within a character, because max_tokens was reached. After the last piece nothing is held: "
        "pass is_last on to the decoder, which then makes a '\N{REPLACEMENT CHARACTER}' of the rest.",
        "回答达到 max_tokens，停在一个字符的中间。最后一个词元之后什么都不能留：把 is_last 传给 decoder，"
        "剩下的字节就会变成 '\N{REPLACEMENT CHARACTER}'。",
    )
    check("".join(stream(answer, [b"KV \xe7", b"\xbc"], [])[0]), "KV \N{REPLACEMENT CHARACTER}")


def test_a_stop_string_ends_the_text(answer, explain):
    """a stop string ends the text · 停止字符串结束文字"""
    explain(
        "The stop string is 'END', and the piece b'all. END of it' contains it: return 'all. ' and set stopped. "
        "Neither the stop string nor what follows it is part of the answer.",
        "停止字符串是 'END'，b'all. END of it' 里就有它：应当返回 'all. '，并把 stopped 设为真。"
        "停止字符串和它后面的内容都不属于回答。",
    )
    sent, texts = stream(answer, [b"That is ", b"all. END of it", b"."], ["END"])
    check("".join(sent), "That is all. ")
    check_stopped(texts, True)
    explain(
        "One piece completes two stop strings. The text ends before the one that begins first, whichever of them "
        "stands first in the list.",
        "一个词元里同时出现两个停止字符串。文字在起点最靠前的那一个之前结束，与它们在列表里的次序无关。",
    )
    check(stream(answer, [b"one two three", b""], ["three", "two"])[0], ["one "])


def test_a_stop_string_in_parts(answer, explain):
    """a stop string in parts · 分成几份的停止字符串"""
    explain(
        "The stop string '\\n\\n' comes in two pieces, b'Yes.\\n' and b'\\nNext'. The first newline may be the "
        "beginning of a stop string, so it has to be held back; once it is sent, it cannot be taken back.",
        "停止字符串 '\\n\\n' 分两次到来：b'Yes.\\n' 和 b'\\nNext'。第一个换行可能是停止字符串的开头，必须先留着；"
        "一旦发送，就收不回来了。",
    )
    sent, texts = stream(answer, [b"Yes.\n", b"\nNext", b""], ["\n\n"])
    check("".join(sent), "Yes.")
    check_stopped(texts, True)
    explain(
        "The stop string 'User:' comes one character at a time. All but its last character had to be held, four of "
        "them: also the longest beginning, which lacks a single character, is a beginning.",
        "停止字符串 'User:' 一次来一个字符。除了最后一个字符，前四个都要留着：只差一个字符的最长的开头，也是开头。",
    )
    sent, texts = stream(answer, [bytes([byte]) for byte in b"Hi User: x"], ["User:"])
    check("".join(sent), "Hi ")
    check_stopped(texts, True)
    explain(
        "The stop string is three newlines, and they come one by one. After the second, two ends of the text are "
        "beginnings of the stop string: one newline, and two. Hold the longest of them.",
        "停止字符串是三个换行，一次来一个。收到第二个时，文字有两个末尾都是停止字符串的开头：一个换行和两个换行。"
        "要留下其中最长的那个。",
    )
    sent, texts = stream(answer, [b"Yes.", b"\n", b"\n", b"\n", b"Next"], ["\n\n\n"])
    check("".join(sent), "Yes.")
    check_stopped(texts, True)


def test_a_false_alarm(answer, explain):
    """a false alarm · 虚惊一场"""
    explain(
        "The stop string is 'User:', and the text is 'Users agree.': what was held as a possible beginning turns out "
        "to be none and must be sent, in the right place, before what came after it.",
        "停止字符串是 'User:'，文字是 'Users agree.'：先前留着的开头原来不是，就要发出去，而且要排在后来的文字之前。",
    )
    sent, texts = stream(answer, [b"The Us", b"er", b"s agree."], ["User:"])
    check("".join(sent), "The Users agree.")
    check_stopped(texts, False)
    explain(
        "The answer ends with a possible beginning of a stop string. Nothing can complete it any more, so with the "
        "last piece it has to be sent.",
        "回答的末尾恰好像停止字符串的开头。后面不会再有文字把它补全，所以随着最后一个词元应当发送出去。",
    )
    check("".join(stream(answer, [b"Ask the ", b"User"], ["User:"])[0]), "Ask the User")


def test_nothing_certain_is_held(answer, explain):
    """nothing certain is held · 确定的文字不多留"""
    explain(
        "The stop string is '\\n\\nQuestion:'. After the piece b'Paged attention' nothing of the text can belong to "
        "it, so all of it should be sent at once. Hold only an end that is the beginning of a stop string; a fixed "
        "number of characters would make every user wait.",
        "停止字符串是 '\\n\\nQuestion:'。收到 b'Paged attention' 之后，没有哪个字可能属于它，应当立即全部发送。"
        "只留下恰好是停止字符串开头的末尾；如果总是留固定的字数，每个用户都要白等。",
    )
    check(stream(answer, [b"Paged attention", b" reads blocks."], ["\n\nQuestion:"])[0][0], "Paged attention")
    explain(
        "There are two stop strings, '###' and 'Note that'. The text 'See Note' ends with a beginning of the second, "
        "so 'See ' is certain and 'Note' is not. Look at all stop strings, and hold the longest end.",
        "停止字符串有 '###' 和 'Note that' 两个。'See Note' 的末尾是第二个的开头，所以 'See ' 确定，'Note' 不确定。"
        "每个停止字符串都要看，留下最长的末尾。",
    )
    check(stream(answer, [b"See Note", b"s.", b""], ["###", "Note that"])[0][:2], ["See ", "Notes."])


def test_random_texts(answer, explain):
    """random texts, beside every possibility and the engine · 随机文字，与穷举和引擎对照"""
    seed = 12
    print("seed", seed)
    draw = random.Random(seed)
    for _ in range(1500):
        letters = draw.choice(["ab", "abc", "aé缓🎉"])
        stop_strings = ["".join(draw.choices(letters, k=draw.randint(1, 5))) for _ in range(draw.randint(0, 3))]
        data, pieces = "".join(draw.choices(letters, k=draw.randint(1, 14))).encode(), []
        while data:
            size = draw.randint(1, 4)
            pieces.append(data[:size])
            data = data[size:]
        expected, stops = truth(pieces, stop_strings)
        explain(
            f"Stop strings {stop_strings}, pieces {pieces}. After each piece, the text sent so far should be "
            f"{expected}; stopped should be {stops} in the end.",
            f"停止字符串 {stop_strings}，各份 {pieces}。每收到一份之后，累计发送的文字应当是 {expected}；"
            f"最后 stopped 应当是 {stops}。",
        )
        sent, texts = stream(answer, pieces, stop_strings)
        check(["".join(sent[: end + 1]) for end in range(len(sent))], expected)
        check_stopped(texts, stops)

        matcher, whole = StopStringMatcher(stop_strings), b"".join(pieces).decode()
        plain = [matcher.append(character) for character in whole]
        released, found = [text for text, _ in plain], [stop for _, stop in plain]
        if any(found):
            released = released[: [stop is not None for stop in found].index(True) + 1]
        else:
            released.append(matcher.flush())
        explain(
            f"Stop strings {stop_strings}, text {whole!r}, one character at a time: the engine sends {released}.",
            f"停止字符串 {stop_strings}，文字 {whole!r}，一次一个字符：引擎发送 {released}。",
        )
        sent, _ = stream(answer, [*(character.encode() for character in whole), b""], stop_strings)
        check(sent, released)
