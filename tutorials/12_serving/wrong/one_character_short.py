HINT = {"en": "lacks a single character", "zh": "只差一个字符"}

import codecs


class TextStream:
    def __init__(self, stop_strings: list[str]) -> None:
        self.stop_strings = stop_strings
        self.stopped = False
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.held = ""

    def append(self, piece: bytes, is_last: bool) -> str:
        text = self.held + self.decoder.decode(piece, is_last)
        places = [text.index(stop) for stop in self.stop_strings if stop in text]
        if places:
            self.stopped = True
            return text[: min(places)]
        num_held = 0
        if not is_last:
            sizes = (
                size
                for stop in self.stop_strings
                for size in range(1, max(2, len(stop) - 1))
                if text.endswith(stop[:size])
            )
            num_held = max(sizes, default=0)
        certain = text[: len(text) - num_held]
        self.held = text[len(certain) :]
        return certain
