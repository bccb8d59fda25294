"""Fields of requests that other servers have and this one has not, and which of their values ask for nothing.

Clients send such values without meaning anything by them; so they are accepted, and all others are refused by name.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

Neutral: TypeAlias = tuple[tuple[Any, ...], str]
"""Values that ask for nothing, and what to do instead of asking for another."""

_LEAVE_OUT = "leave it out"
_IN_PYTHON = "over HTTP it is not supported; in Python there is LLM.beam_search"

NEUTRAL: Mapping[str, Neutral] = {
    # OpenAI's
    "verbosity": (("medium",), _LEAVE_OUT),
    "web_search_options": ((), "nothing is searched here; leave it out"),
    # vLLM's
    "add_special_tokens": ((), "texts get what the tokenizer adds, chats nothing; send token ids for anything else"),
    "allowed_token_ids": (([],), "use logit_bias"),
    "bad_words": (([],), "use logit_bias"),
    "best_of": ((1,), "ask for n completions and choose among them yourself"),
    "chat_template": ((), "the model's own is used, since a template is a program"),
    "detokenize": ((True,), _LEAVE_OUT),
    "documents": (([],), "put them into a message"),
    "early_stopping": ((False,), _IN_PYTHON),
    "echo": ((False,), "use /v1/completions"),
    "include_reasoning": ((True,), _LEAVE_OUT),
    "include_stop_str_in_output": ((False,), "stop_reason tells which string it was"),
    "kv_transfer_params": (({},), _LEAVE_OUT),
    "length_penalty": ((1.0,), _IN_PYTHON),
    "logits_processors": (([],), "code does not come with requests; use logit_bias"),
    "mm_processor_kwargs": (({},), "only text is supported"),
    "prompt_logprobs": ((), "in /v1/completions, echo with logprobs reports the prompt's"),
    "return_token_ids": ((False,), "/tokenize gives the ids of a prompt, and the API in Python those of everything"),
    "return_tokens_as_token_ids": ((False,), _LEAVE_OUT),
    "spaces_between_special_tokens": ((True,), _LEAVE_OUT),
    "truncate_prompt_tokens": ((-1,), "nothing is cut off in silence; shorten the prompt yourself"),
    "truncation_side": (("right", "left"), _LEAVE_OUT),
    "use_beam_search": ((False,), _IN_PYTHON),
    "vllm_xargs": (({},), _LEAVE_OUT),
    # SGLang's and llama.cpp's
    "cache_prompt": ((True,), "prefixes are shared by all or by none; see --enable-prefix-caching"),
    "lora_path": ((), "adapters are not supported"),
    "no_stop_trim": ((False,), "stop_reason tells which string it was"),
    "separate_reasoning": ((True,), _LEAVE_OUT),
    "stop_regex": ((), "use stop, with strings"),
    "stream_reasoning": ((True,), _LEAVE_OUT),
}
