"""``python -m mini_infer`` is ``mini-infer``."""

from mini_infer.cli import app

app(prog_name="mini-infer")
