"""What requests may say: the bodies of the endpoints, and what each of their fields means.

That of ``/v1/responses``, which has a language of its own, is in `responses_body`.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from mini_infer.compat.http import NEUTRAL
from mini_infer.engine.tokenizer import whole_text
from mini_infer.engine.tools import MAX_TOOLS
from mini_infer.exceptions import InvalidRequestError
from mini_infer.sampling import (
    DIFFUSION_OPTIONS,
    MAX_STOP_STRING_LENGTH,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
)
from mini_infer.serving.limits import MAX_CHOICES, MAX_LOGIT_BIAS, MAX_MESSAGES
from mini_infer.serving.tool_fields import (
    ResponseFormat,
    ToolCall,
    ToolChoice,
    ToolsField,
    structured_outputs,
)
from mini_infer.structured import StructuredOutputsParams

_HELP = {field.name: field.metadata["help"] for field in fields(SamplingParams)}

IGNORED = "Accepted and ignored."
NOT_YET = "Not supported yet."

# Lists stop at their first bad item: collecting a million complaints would hold everybody up.
_TokenIds = Annotated[list[int], Field(fail_fast=True)]
_SEVERAL = Field(fail_fast=True, max_length=MAX_CHOICES)


def says(name: str, shape: str) -> WrapValidator:
    """What a field that takes several shapes says to others, in place of what each of its shapes would say."""

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            if any(problem["type"] in ("too_long", "string_too_long") for problem in error.errors(include_url=False)):
                raise  # which says the limit
            raise PydanticCustomError(
                "shape", "{message}", {"message": f"{name} must be {shape}", "param": name}
            ) from None

    return WrapValidator(check)


_Prompts = Annotated[
    str | _TokenIds | Annotated[list[str | _TokenIds], _SEVERAL],
    Field(union_mode="left_to_right"),
    says("prompt", "a text, token ids, or a list of either"),
]
_Stop = Annotated[str, Field(max_length=MAX_STOP_STRING_LENGTH)]
_Stops = Annotated[
    _Stop | Annotated[list[_Stop], Field(fail_fast=True, max_length=MAX_STOP_STRINGS)] | None,
    says("stop", "a string, or a list of strings"),
]


def _without_nulls(body: Any) -> Any:
    """``null`` means "not given", also for fields that are not known here."""
    return {name: value for name, value in body.items() if value is not None} if isinstance(body, dict) else body


class Body(BaseModel):
    """A JSON object whose every field is known, and of the right type."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    _drop_nulls = model_validator(mode="before")(_without_nulls)


class SamplingBody(Body):
    """How tokens are chosen, and when to stop: OpenAI's fields, and the extensions that vLLM made common."""

    temperature: float | None = Field(None, description=_HELP["temperature"])
    top_p: float | None = Field(None, description=_HELP["top_p"])
    n: int | None = Field(None, description=_HELP["n"])
    stop: _Stops = Field(None, description=_HELP["stop"])
    seed: int | None = Field(None, description=_HELP["seed"])
    presence_penalty: float | None = Field(None, description=_HELP["presence_penalty"])
    frequency_penalty: float | None = Field(None, description=_HELP["frequency_penalty"])
    logit_bias: (
        Annotated[
            dict[str, Any],
            Field(max_length=MAX_LOGIT_BIAS),
            WithJsonSchema(
                {"type": "object", "additionalProperties": {"type": "number"}, "maxProperties": MAX_LOGIT_BIAS}
            ),
        ]
        | None
    ) = Field(None, description="Token ids, as strings, and what to add to their logits, -100 to 100 each")

    top_k: int | None = Field(None, description=f"Extension. {_HELP['top_k']}")
    min_p: float | None = Field(None, description=f"Extension. {_HELP['min_p']}")
    repetition_penalty: float | None = Field(None, description=f"Extension. {_HELP['repetition_penalty']}")
    min_tokens: int | None = Field(None, description=f"Extension. {_HELP['min_tokens']}")
    stop_token_ids: Annotated[list[int], Field(fail_fast=True, max_length=MAX_STOP_TOKEN_IDS)] | None = Field(
        None, description=f"Extension. {_HELP['stop_token_ids']}"
    )
    ignore_eos: bool | None = Field(None, description=f"Extension. {_HELP['ignore_eos']}")
    skip_special_tokens: bool | None = Field(None, description=f"Extension. {_HELP['skip_special_tokens']}")
    cache_salt: str | None = Field(None, description=f"Extension. {_HELP['cache_salt']}")
    priority: int = Field(0, description="Extension. Higher goes first, with --scheduling-policy priority")
    gen_length: int | None = Field(None, description=f"Extension. {_HELP['gen_length']}")
    steps: int | None = Field(None, description=f"Extension. {_HELP['steps']}")
    block_length: int | None = Field(None, description=f"Extension. {_HELP['block_length']}")
    cfg_scale: float | None = Field(None, description=f"Extension. {_HELP['cfg_scale']}")
    remasking: str | None = Field(None, description=f"Extension. {_HELP['remasking']}")
    alg: str | None = Field(None, description=f"Extension. {_HELP['alg']}")
    alg_temp: float | None = Field(None, description=f"Extension. {_HELP['alg_temp']}")
    threshold: float | None = Field(None, description=f"Extension. {_HELP['threshold']}")
    factor: float | None = Field(None, description=f"Extension. {_HELP['factor']}")
    kv_reuse: str | None = Field(None, description=f"Extension. {_HELP['kv_reuse']}")
    refresh_interval: int | None = Field(None, description=f"Extension. {_HELP['refresh_interval']}")
    sparse_config: dict[str, Any] | None = Field(None, description=f"Extension. {_HELP['sparse_config']}")

    _SAMPLING: ClassVar = (
        *("temperature", "top_p", "n", "stop", "seed", "presence_penalty", "frequency_penalty", "top_k", "min_p"),
        *("repetition_penalty", "min_tokens", "stop_token_ids", "ignore_eos", "skip_special_tokens", "cache_salt"),
        *DIFFUSION_OPTIONS,
    )

    def sampling_params(self, defaults: SamplingParams, **settled: Any) -> SamplingParams:
        """What this body asks for; where it says nothing, the model's defaults.

        Args:
            defaults: the model's.
            settled: options that the endpoint derives from the body in its own way.

        Raises:
            InvalidRequestError: a value is out of range.
        """
        given = {name: getattr(self, name) for name in self._SAMPLING if getattr(self, name) is not None}
        if self.logit_bias is not None:
            given["logit_bias"] = {_token_id(key): value for key, value in self.logit_bias.items()}
        most = settled.get("max_tokens")
        if defaults.diffusion_options and most is not None and self.gen_length is None:
            # A canvas of so many masks, each written by a step of its own unless that is said.
            decides_itself = self.threshold is not None or self.factor is not None
            given = {**({} if decides_itself else {"steps": most}), **given, "gen_length": most}
        return replace(defaults, **{**given, **settled})


class StreamOptions(Body):
    include_usage: bool = Field(False, description="End with one more event that counts the tokens")
    continuous_usage_stats: bool = Field(
        False, description="Extension. With include_usage, count them in every event, as far as they go"
    )
    include_canvas: bool = Field(
        False, description="Extension. Of a diffusion model, after every step: each token's text, null for a mask"
    )
    include_obfuscation: Any = Field(None, description=IGNORED)


class OpenAIBody(SamplingBody):
    """What chats and completions have in common beside sampling."""

    model: str | None = Field(None, description="The served model's name; null for whatever is served")
    stream: bool = Field(False, description="Send the answer piece by piece as server-sent events")
    stream_options: StreamOptions | None = Field(None, description="Only with stream")

    user: Any = Field(None, description=IGNORED)
    metadata: Any = Field(None, description=IGNORED)
    store: Any = Field(None, description=IGNORED)
    service_tier: Any = Field(None, description=IGNORED)
    safety_identifier: Any = Field(None, description=IGNORED)
    prompt_cache_key: Any = Field(None, description=IGNORED)
    prompt_cache_retention: Any = Field(None, description=IGNORED)
    prediction: Any = Field(None, description=IGNORED)

    response_format: ResponseFormat | None = Field(None, description="text, json_object, or json_schema with a schema")
    structured_outputs: dict[str, Any] | None = Field(
        None, description="Extension. One of json, regex, choice, grammar, json_object"
    )
    guided_json: dict[str, Any] | str | None = Field(None, description="Extension. An older name")
    guided_regex: str | None = Field(None, description="Extension. An older name")
    guided_choice: list[str] | None = Field(None, description="Extension. An older name")
    guided_grammar: str | None = Field(None, description="Extension. An older name")

    # Values that ask for nothing, and why anything else is refused.
    _NOT_SUPPORTED: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {}

    def structured(self) -> StructuredOutputsParams | None:
        """What the answer's text must be like.

        Raises:
            InvalidRequestError: it is said twice, or malformed.
        """
        names = ("json", "regex", "choice", "grammar")
        guided = {name: value for name in names if (value := getattr(self, f"guided_{name}")) is not None}
        return structured_outputs(self.response_format, self.structured_outputs, guided)

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, body: Any) -> Any:
        """Fields of other servers; see ``compat/http.py``."""
        if not isinstance(body, dict):
            return body
        for name in NEUTRAL.keys() & body.keys() - cls.model_fields.keys():
            harmless, instead = NEUTRAL[name]
            if body[name] is not None and body[name] not in harmless:
                message = f"{name}={repr(body[name])[:40]} is not supported here: {instead}"
                raise PydanticCustomError("not_supported", "{message}", {"message": message, "param": name})
        return {name: value for name, value in body.items() if name in cls.model_fields or name not in NEUTRAL}

    @model_validator(mode="after")
    def _refuse_what_is_not_there_yet(self) -> "OpenAIBody":
        for name, (harmless, reason) in self._NOT_SUPPORTED.items():
            value = getattr(self, name)
            if value is not None and value not in harmless:
                raise PydanticCustomError("not_supported", "{message}", {"message": reason, "param": name})
        if self.stream_options is not None and not self.stream:
            message = "stream_options is given but stream is not true; set stream to true or leave the options out"
            raise PydanticCustomError("stream_options", "{message}", {"message": message, "param": "stream_options"})
        return self


class CompletionBody(OpenAIBody):
    prompt: _Prompts = Field(description="A text, token ids, or a list of either")
    max_tokens: int | None = Field(16, description="Most tokens to generate; 0 only with echo")
    echo: bool = Field(False, description="Begin each choice with its prompt")
    logprobs: int | None = Field(None, description="Report each token's log probability and this many likeliest")
    best_of: Any = Field(None, description=NOT_YET)
    suffix: Any = Field(None, description=NOT_YET)

    _NOT_SUPPORTED: ClassVar = {
        "best_of": ((1,), "best_of is not supported yet; ask for n completions and choose among them yourself"),
        "suffix": (("",), "suffix is not supported: the models here complete a text at its end only"),
    }


def _whole_text(content: Any) -> Any:
    try:
        return whole_text(content)
    except InvalidRequestError as error:
        raise PydanticCustomError("content_part", "{message}", {"message": str(error)}) from error


_TEXT_PARTS = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                "required": ["type", "text"],
            },
        },
    ]
}


class Message(Body):
    """Unlike anywhere else, fields that are not known are ignored: answers come back as part of a conversation with
    whatever a server or a client put into them, such as ``annotations``."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(
        description="developer is the same as system; tool is the result of a call"
    )
    content: Annotated[str, BeforeValidator(_whole_text), WithJsonSchema(_TEXT_PARTS)] | None = Field(
        None,
        description="Text, or a list of text parts, which are put on lines of their own; may be null beside tool_calls",
    )
    name: str | None = Field(None, description="Handed to the chat template")
    reasoning_content: Any = Field(None, description="What an answer of the model's own came with; for the template")
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = Field(
        None, description="Calls that an answer made"
    )
    tool_call_id: str | None = Field(None, description="Of the call that this is the result of")
    function_call: Any = Field(None, description=NOT_YET)

    @model_validator(mode="after")
    def _has_something_to_say(self) -> "Message":
        message, param = "", "messages"
        if self.function_call:
            message, param = "function_call is an old form of tool_calls; give that instead", "function_call"
        elif self.tool_calls and self.role != "assistant":
            message = f"a message of role {self.role} cannot have tool_calls"
        elif self.content is None and not self.tool_calls:
            message = f"content: Field required in a message of role {self.role}, unless it has tool_calls"
        if message:
            raise PydanticCustomError("message", "{message}", {"message": message, "param": param})
        return self

    @classmethod
    def of(cls, role: str, content: Any, **fields: Any) -> "Message":
        """A message from its parts; raises pydantic's ``ValidationError`` unless it is one."""
        return cls.model_validate({"role": role, "content": content, **fields})

    def for_template(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": self.content}
        for name in ("name", "tool_call_id"):
            if getattr(self, name) is not None:
                message[name] = getattr(self, name)
        if isinstance(self.reasoning_content, str):
            message["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump(exclude_none=True) for call in self.tool_calls]
        return message


_Messages = Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
TemplateVariables = dict[str, Any]


class ChatBody(OpenAIBody):
    messages: _Messages = Field(description="The conversation so far")
    chat_template_kwargs: TemplateVariables = Field({}, description="Extension. Further variables of the chat template")
    add_generation_prompt: bool | None = Field(
        None, description="Extension. Begin an answer behind the messages; true unless continue_final_message is"
    )
    continue_final_message: bool = Field(
        False, description="Extension. Go on with the last message instead of answering it"
    )
    max_tokens: int | None = Field(None, description="Most tokens to generate; null for as many as the context holds")
    max_completion_tokens: int | None = Field(None, description="The newer name of max_tokens")
    logprobs: bool = Field(False, description="Report each token's log probability")
    top_logprobs: int | None = Field(None, description="And those of this many likeliest; only with logprobs")
    tools: ToolsField | None = Field(None, description="Functions that the answer may call")
    tool_choice: ToolChoice | None = Field(
        None, description="none, auto (if there are tools), required, one function, or a selection with a mode"
    )
    parallel_tool_calls: bool | None = Field(None, description="false allows one call at most")
    functions: Any = Field(None, description=NOT_YET)
    function_call: Any = Field(None, description=NOT_YET)
    modalities: Any = Field(None, description=NOT_YET)
    audio: Any = Field(None, description=NOT_YET)
    reasoning_effort: str | None = Field(
        None, description="How much to think, where the chat template has a switch for that"
    )

    _NOT_SUPPORTED: ClassVar = {
        "functions": (([],), "functions are not supported: they are an old form of tools; give tools instead"),
        "function_call": (
            ("none", "auto"),
            "function_call is not supported: it is an old form of tool_choice; give that instead",
        ),
        "modalities": ((["text"],), "only text is supported; leave modalities out"),
        "audio": ((), "only text is supported; leave audio out"),
    }

    @model_validator(mode="after")
    def _settle_names(self) -> "ChatBody":
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            message = f"max_tokens={self.max_tokens} and max_completion_tokens={self.max_completion_tokens}; give one"
            raise PydanticCustomError("twice", "{message}", {"message": message, "param": "max_completion_tokens"})
        if self.top_logprobs and not self.logprobs:
            message = "top_logprobs is given but logprobs is not true; set logprobs to true as well"
            raise PydanticCustomError("logprobs", "{message}", {"message": message, "param": "top_logprobs"})
        return self


_Inputs = Annotated[
    str | _TokenIds | Annotated[list[str | _TokenIds], _SEVERAL],
    Field(union_mode="left_to_right"),
    says("input", "a text, token ids, or a list of either"),
]


class EmbeddingsBody(Body):
    model: str | None = Field(None, description="The served model's name; null for whatever is served")
    input: _Inputs = Field(description="A text, token ids, or a list of either")
    encoding_format: Literal["float", "base64"] = Field("float", description="base64 is of float32, little-endian")
    dimensions: int | None = Field(None, description="Nothing but the model's own")
    user: Any = Field(None, description=IGNORED)
    priority: int = Field(0, description="Extension. Higher goes first, with --scheduling-policy priority")


class TokenizeBody(Body):
    model: str | None = Field(None, description="The served model's name; null for whatever is served")
    prompt: str | None = Field(None, description="A text; or give messages")
    messages: _Messages | None = Field(None, description="A conversation, put into the model's chat template first")
    chat_template_kwargs: TemplateVariables = Field({}, description="Further variables of the chat template")
    add_special_tokens: bool | None = Field(
        None, description="Put around it what the tokenizer adds to a text; true for prompt, false for messages"
    )
    add_generation_prompt: bool | None = Field(None, description="Of messages, as in chats")
    continue_final_message: bool = Field(False, description="Of messages, as in chats")
    return_token_strs: bool = Field(False, description="Give the tokens' names in the vocabulary as well")

    @model_validator(mode="after")
    def _one_of_two(self) -> "TokenizeBody":
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("one_of_two", "give either prompt or messages", {"param": "prompt"})
        return self


class DetokenizeBody(Body):
    model: str | None = Field(None, description="The served model's name; null for whatever is served")
    tokens: _TokenIds = Field(description="Token ids")


class GenerateOptions(SamplingBody):
    """Sampling of the plain endpoints, which answer with an id and keep the result."""

    max_tokens: int | None = Field(None, description="Most tokens to generate, 100 if not given")
    gen_length: int | None = Field(None, description="Masks of a diffusion model; else another name of max_tokens")

    @model_validator(mode="after")
    def _settle_names(self) -> "GenerateOptions":
        if self.max_tokens is not None and self.gen_length not in (None, self.max_tokens):
            message = f"max_tokens={self.max_tokens} and gen_length={self.gen_length}; give one"
            raise PydanticCustomError("twice", "{message}", {"message": message, "param": "gen_length"})
        return self


_BATCH = Field(fail_fast=True, min_length=1, max_length=MAX_CHOICES)


class GenerateBody(GenerateOptions):
    prompt: str | _TokenIds = Field(description="A text, or token ids")


class GenerateBatchBody(GenerateOptions):
    prompts: Annotated[
        Annotated[list[str], _BATCH] | Annotated[list[_TokenIds], _BATCH], Field(union_mode="left_to_right")
    ] = Field(description="Texts, or lists of token ids")


def _token_id(key: str) -> int:
    try:
        return int(key)
    except ValueError:
        raise InvalidRequestError(f"each key of logit_bias must be a token id, got {key[:40]!r}") from None
