"""Everything Mini-Infer raises on purpose.

Each class is also the builtin that a caller would expect to catch. A message says what was wrong, shows the
offending value, and says what to do about it.
"""


class MiniInferError(Exception):
    """The root of every error that Mini-Infer raises on purpose."""


class InvalidConfigError(MiniInferError, ValueError):
    """An engine configuration field is unknown, malformed, out of range or not supported yet."""


class InvalidRequestError(MiniInferError, ValueError):
    """A prompt, a sampling parameter or a request id cannot be used; no other request is affected."""


class ContextLengthError(InvalidRequestError):
    """A prompt is longer than the model's context; the message begins and ends as OpenAI's, which programs look for."""

    def __init__(self, max_model_len: int, what_it_has: str) -> None:
        super().__init__(
            f"This model's maximum context length is {max_model_len} tokens, but the prompt has {what_it_has}; shorten "
            "it or raise max_model_len (context_length_exceeded)"
        )


class ModelNotFoundError(MiniInferError, FileNotFoundError):
    """No checkpoint was found: neither as a directory nor on the Hub nor in the local cache."""


class InvalidCheckpointError(MiniInferError, ValueError):
    """A checkpoint was found but is incomplete, malformed, or does not match its own config."""


class UnsupportedModelError(MiniInferError, ValueError):
    """The checkpoint's architecture, or an option in its config, is one that Mini-Infer does not implement."""


class QueueFullError(MiniInferError, RuntimeError):
    """``max_waiting`` requests wait already; try again once some have run."""


class StepError(MiniInferError, RuntimeError):
    """A step of the engine raised, so that the requests in it could not go on; the cause is chained to it."""


class RequestError(MiniInferError, RuntimeError):
    """Something that concerns one request alone raised: its listener, or the tokenizer. It ends; no other does."""


class NotFiniteError(RequestError, ArithmeticError):
    """A request's logits are infinite or not numbers, so that no token follows; a wider dtype may help."""


class DeadEndError(RequestError):
    """Nothing continues a request's text under its grammar: no token does, or the grammar takes too long to follow."""


class EngineError(MiniInferError, RuntimeError):
    """The engine was called where it cannot be: by its own listener, after it was closed, or in a forked process."""


class RankError(MiniInferError, RuntimeError):
    """A process that had a share of the model died, hung or never came, and starting it again did not help."""


class OutOfMemoryError(MiniInferError, MemoryError):
    """The weights do not fit the device, or one sequence could never fit the KV memory."""


class KernelError(MiniInferError, ValueError):
    """A kernel was called with unusable tensors, or a backend was asked for that is not there."""


class NotRecordableError(MiniInferError, RuntimeError):
    """What a function does cannot be recorded: it depends on values of tensors, or it is done where nobody sees it."""
