HINT = {"en": "a fixed number", "zh": "固定的字数"}

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
            num_held = min(len(text), max((len(stop) - 1 for stop in self.stop_strings), default=0))
        certain = text[: len(text) - num_held]
        self.held = text[len(certain) :]
        return certain
