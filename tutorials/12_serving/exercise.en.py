"""Chapter 12: stream only text that is certain.

Fill in the body of ``append``. A server calls it with every token of an answer, and sends what it returns at once: what
is sent cannot be taken back. ``mini-infer learn check 12`` grades your answer.
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
        """
        ...
