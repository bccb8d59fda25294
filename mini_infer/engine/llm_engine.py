"""The engine as people call it: prompts in, whole answers out."""

import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Any

from mini_infer.config import EngineConfig
from mini_infer.engine.build import Parts, build
from mini_infer.engine.intake import Prompt, list_prompts, one_for_each
from mini_infer.engine.no_tokenizer import NoTokenizer
from mini_infer.engine.progress import generation_progress
from mini_infer.engine.request import Request
from mini_infer.engine.request_engine import RequestEngine
from mini_infer.exceptions import EngineError, InvalidConfigError, InvalidRequestError
from mini_infer.fields import check_bool, check_int, check_number
from mini_infer.outputs import EmbeddingOutput, GenerateOutput, Increment, as_embedding
from mini_infer.sampling import EMBEDDING, SamplingParams
from mini_infer.sparse import SparseConfig
from mini_infer.typing import TokenIds

if TYPE_CHECKING:
    from mini_infer.engine.tokenizer import RenderedChat, Tokenizer


class LLMEngine(RequestEngine):
    """Generates text with one model.

    Everything happens in ``step``: the scheduler plans, the model runs, tokens are sampled, sequences end. The other
    methods only add requests, call ``step`` until what they wait for has ended, or read results. Methods may be called
    from several threads; each call then moves every request along.

    Args:
        config: the configuration; None makes one of ``fields``.
        fields: fields of ``EngineConfig``, instead of ``config``.

    Raises:
        InvalidConfigError: an unknown or unusable field, or both ``config`` and fields.
        ModelNotFoundError, InvalidCheckpointError, UnsupportedModelError: about the checkpoint.
        OutOfMemoryError: the weights, or a sequence of ``max_model_len``, do not fit.
    """

    def __init__(self, config: EngineConfig | None = None, **fields: Any) -> None:
        if config is None:
            config = EngineConfig(**fields)
        elif not isinstance(config, EngineConfig):
            raise InvalidConfigError(f"config must be an EngineConfig, got {config!r}; or name its fields: model=...")
        elif fields:
            raise InvalidConfigError(f"give either a config or fields, not both; fields given: {', '.join(fields)}")
        super().__init__(config, build(config))

    @classmethod
    def of(cls, config: EngineConfig, parts: Parts) -> "LLMEngine":
        """An engine of parts that were made elsewhere, an executor of another kind, for example."""
        engine = cls.__new__(cls)
        RequestEngine.__init__(engine, config, parts)
        return engine

    # ---- whole answers -------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        sparse_configs: SparseConfig | Seq[SparseConfig] | None = None,
    ) -> list[GenerateOutput]:
        """Complete every prompt.

        Args:
            prompts: a text, a list of token ids, or a list of either.
            sampling_params: one for all prompts, or one for each; None is the model's own default, 100 tokens at most.
            use_tqdm: show a progress bar when the output is a terminal or a notebook.
            max_tokens, temperature, top_p, top_k: override ``sampling_params``.
            sparse_configs: the same for their ``sparse_config``; one for all prompts, or one for each.

        Returns:
            One output per prompt, in their order.

        Raises:
            InvalidRequestError: a prompt or parameter is unusable; nothing has run then.
        """
        prompt_list = list_prompts(prompts)
        params_list = one_for_each("sampling_params", SamplingParams, sampling_params, len(prompt_list))
        sparse_list = one_for_each("sparse_configs", SparseConfig, sparse_configs, len(prompt_list))
        overrides = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k}
        requests = self._each(
            prompt_list,
            lambda place, prompt: self._intake.make_request(
                prompt, params_list[place], {**overrides, "sparse_config": sparse_list[place]}
            ),
        )
        return self._run(requests, use_tqdm)

    def beam_search(
        self,
        prompts: Prompt | Seq[Prompt],
        beam_width: int,
        max_tokens: int,
        use_tqdm: bool = True,
        *,
        length_penalty: float = 1.0,
        early_stopping: bool = False,
    ) -> list[GenerateOutput]:
        """The likeliest completions of every prompt, as far as a beam search finds them.

        A completion's score is its ``cumulative_logprob / len(token_ids) ** length_penalty``.

        Args:
            prompts: a text, a list of token ids, or a list of either.
            beam_width: how many beginnings are followed at once.
            max_tokens: most tokens of a completion.
            use_tqdm: show a progress bar when the output is a terminal or a notebook.
            length_penalty: -10 to 10; above 0 it favours long completions, below 0 short ones.
            early_stopping: take the first ``beam_width`` completions that end, though better ones may follow.

        Returns:
            One output per prompt, in their order; its ``outputs`` are the ``beam_width`` best completions, best first.

        Raises:
            InvalidRequestError: a prompt or argument is unusable; nothing has run then.
        """
        beam_width = check_int(InvalidRequestError, "beam_width", beam_width, 1, self.config.max_num_seqs)
        check_int(InvalidRequestError, "max_tokens", max_tokens, 1)
        length_penalty = check_number(InvalidRequestError, "length_penalty", length_penalty, -10, 10)
        early_stopping = check_bool(InvalidRequestError, "early_stopping", early_stopping)
        params = SamplingParams(n=beam_width, max_tokens=max_tokens, temperature=0.0)
        searches = self._each(
            list_prompts(prompts),
            lambda place, prompt: self._intake.make_beam_search(prompt, params, length_penalty, early_stopping),
        )
        return self._run(searches, use_tqdm)

    def embed(self, prompts: Prompt | Seq[Prompt], use_tqdm: bool = True) -> list[EmbeddingOutput]:
        """One vector for every prompt: the mean of the model's hidden states after its last norm, over all its tokens.

        A model that was trained to generate was not trained for this; texts of a like meaning tend to lie close, and
        a model made for embeddings does better.

        Args:
            prompts: a text, a list of token ids, or a list of either.
            use_tqdm: show a progress bar when the output is a terminal or a notebook.

        Returns:
            One output per prompt, in their order.

        Raises:
            InvalidRequestError: a prompt is unusable; nothing has run then.
            NotFiniteError: the hidden states of a prompt are not finite.
        """
        return [as_embedding(output) for output in self.generate(prompts, EMBEDDING, use_tqdm)]

    def chat(
        self,
        messages: Seq[Mapping[str, Any]] | Seq[Seq[Mapping[str, Any]]],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[GenerateOutput]:
        """Answer a conversation, or each of several, in the model's own chat format.

        Args:
            messages: dicts with "role" and "content", a text or a list of text parts; or a list of such conversations.
            chat_template_kwargs: further variables of the chat template.

        The other arguments, the result and the errors are those of ``generate``.
        """
        several = isinstance(messages, list | tuple) and messages and isinstance(messages[0], list | tuple)
        conversations: Any = messages if several else [messages]
        return self.generate(
            [self.render_chat(conversation, **(chat_template_kwargs or {})) for conversation in conversations],
            sampling_params,
            use_tqdm,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
        )

    @property
    def tokenizer(self) -> "Tokenizer":
        """What turns text into token ids and back, and knows what each token stands for.

        Raises:
            EngineError: this engine has none.
        """
        if isinstance(self._tokenizer, NoTokenizer):
            raise EngineError("this engine has no tokenizer")
        return self._tokenizer

    def render_chat(
        self,
        messages: Seq[Mapping[str, Any]],
        /,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **template_kwargs: Any,
    ) -> "RenderedChat":
        """The prompt that the model's chat template makes of a conversation; for ``generate``, ``stream`` or
        ``tokenize``, which add no special token to it. It is a string like any other; put together with more text it is
        plain text again, which the tokenizer may begin with a token of its own.

        Args:
            messages: as for ``chat``.
            add_generation_prompt: end with what begins an answer.
            continue_final_message: leave the last message open instead, so that the answer goes on with it; then
                ``add_generation_prompt`` must be false.
            template_kwargs: further variables of the chat template.
        """
        return self._tokenizer.render_chat(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **template_kwargs,
        )

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> TokenIds:
        """The token ids of a text, as ``generate`` sees them but of any length.

        Args:
            add_special_tokens: false leaves out what the tokenizer puts around a text.

        Raises:
            InvalidRequestError: the text is no valid Unicode, or has no tokens.
        """
        return self._tokenizer.encode(text, max_tokens=sys.maxsize, add_special_tokens=add_special_tokens)

    def detokenize(self, token_ids: Seq[int]) -> str:
        """The text of token ids, special tokens included.

        Raises:
            InvalidRequestError: an id is not in the vocabulary.
        """
        return self._tokenizer.decode(self._intake.check_token_ids(token_ids), skip_special_tokens=False)

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
    ) -> Iterator[str]:
        """Complete one prompt and yield its text piece by piece; leaving the loop early aborts it.

        The arguments and errors are those of ``generate``; ``n`` must be 1.
        """
        overrides = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k}
        increments: deque[Increment] = deque()
        request = self._intake.make_request(prompt, sampling_params, overrides, listener=increments.append)
        if request.params.n != 1:
            raise InvalidRequestError(f"stream yields one text but n={request.params.n}; use generate, or n=1")

        def pieces() -> Iterator[str]:
            try:
                self.submit(request)
                ended = False
                while not ended:
                    if not increments:
                        self._advance()
                    while increments:
                        increment = increments.popleft()
                        ended = increment.output is not None
                        if increment.text:
                            yield increment.text
            finally:
                self.discard([request])

        return pieces()

    def _each(self, prompts: Seq[Prompt], make: Callable[[int, Prompt], Request]) -> list[Request]:
        """Prepare several prompts, each with its place; an error says which one is to blame."""
        requests = []
        for place, prompt in enumerate(prompts):
            try:
                requests.append(make(place, prompt))
            except InvalidRequestError as error:
                raise InvalidRequestError(f"prompts[{place}]: {error}" if len(prompts) > 1 else error) from error
        return requests

    def _run(self, requests: Seq[Request], show_progress: bool) -> list[GenerateOutput]:
        """Run until these have finished; whatever stops that, none of them is left behind."""
        generated_before = self._loop.counts.num_generated_tokens
        try:
            with self._lock:
                for request in requests:
                    self._enqueue(request)
            with generation_progress(len(requests), show_progress) as report:
                left = requests
                while left:
                    self._advance()
                    left = [request for request in left if not request.finished]
                    report(len(requests) - len(left), self._loop.counts.num_generated_tokens - generated_before)
            with self._lock:  # a step that another thread runs may have handed them over already
                return [request.output() for request in requests]
        finally:
            self.discard(requests)


class LLM(LLMEngine):
    """The same engine, made from a model and fields of ``EngineConfig``: ``LLM("path/to/model", max_num_seqs=64)``.

    Args:
        model: checkpoint directory or Hub name; None is the bundled tutor.
        fields: any other field of ``EngineConfig``.
    """

    def __init__(self, model: str | os.PathLike[str] | None = None, **fields: Any) -> None:
        super().__init__(EngineConfig(model=model, **fields))
