"""Chapter 12: stream only text that is certain.

Fill in the body of ``append``. A server calls it with every token of an answer, and sends what it returns at once: what
is sent cannot be taken back. ``mini-infer learn check 12`` grades your answer.
---
第 12 章：只发送已经确定的文字。

请补全 ``append`` 的函数体。回答每来一个词元，服务器就调用它一次，并立即把返回值发出去：发出去的文字收不回来。
然后用 ``mini-infer learn check 12`` 批改。
"""

import codecs


class TextStream:
    """The text of one answer, while its tokens come.

    Attributes:
        stop_strings: none is empty; the text ends before the first one that is complete, and never contains it.
        stopped: whether a stop string was found; nothing is appended after that.
        decoder: ``decoder.decode(data, final)`` turns the next bytes into text and keeps for itself an unfinished
            character at their end, unless ``final`` is true. Bytes that are no text become U+FFFD, the replacement
            character.
        held: text that was decoded and not sent yet.
    ---
    一个回答的文字，词元边来边处理。

    属性：
        stop_strings: 停止字符串，都不为空；文字在第一个完整出现的停止字符串之前结束，不包含它。
        stopped: 是否已经遇到停止字符串；此后不再调用 append。
        decoder: ``decoder.decode(data, final)`` 把接下来的字节变成文字，末尾没有收完的字符由它自己留着，
            除非 ``final`` 为真。不成文字的字节变成替换字符 U+FFFD。
        held: 已经变成文字、但还没有发送的部分。
    """

    def __init__(self, stop_strings: list[str]) -> None:
        self.stop_strings = stop_strings
        self.stopped = False
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.held = ""

    def append(self, piece: bytes, is_last: bool) -> str:
        """Take the bytes of the next token; return the text that can be sent now.

        - Look for stop strings in the text that was held and the new text together. If some are complete, set
          ``stopped`` and return what stands before the one that begins first.
        - Otherwise return all text but the end that may still become a stop string: the longest end of the text that is
          the beginning of a stop string. Hold that. Hold nothing more: users are waiting.
        - After the last piece no more text comes, so everything can be returned that is not behind a stop string.

        Args:
            piece: the bytes that the token stands for; a character may be spread over several tokens.
            is_last: whether the answer ends with this token.

        Returns:
            Text, possibly empty. All of it put together is the answer.
        ---
        接收下一个词元的字节，返回现在可以发送的文字。

        - 把先前留着的文字和新的文字接在一起，在其中寻找停止字符串。如果有完整的，就把 ``stopped`` 设为真，
          返回其中起点最靠前的那一个之前的文字。
        - 否则返回全部文字，只留下可能变成停止字符串的末尾：也就是文字的各个末尾当中，恰好是某个停止字符串开头的、
          最长的那一个。别的一个字也不要多留：用户在等着。
        - 最后一个词元之后不会再有文字，所以只要不在停止字符串后面，就全部返回。

        参数：
            piece: 这个词元代表的字节；一个字符可能分散在几个词元里。
            is_last: 回答是否到这个词元为止。

        返回：
            文字，可能为空。把所有返回值接起来就是回答。
        """
        # hole
        text = self.held + self.decoder.decode(piece, is_last)
        places = [text.index(stop) for stop in self.stop_strings if stop in text]
        if places:
            self.stopped = True
            return text[: min(places)]
        num_held = 0
        if not is_last:
            sizes = (size for stop in self.stop_strings for size in range(1, len(stop)) if text.endswith(stop[:size]))
            num_held = max(sizes, default=0)
        certain = text[: len(text) - num_held]
        self.held = text[len(certain) :]
        return certain
        # end
