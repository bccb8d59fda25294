"""The engine: takes requests, runs steps, gives outputs."""

import os
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from mini_infer.compat.step import SignedStep, signed_step
from mini_infer.config import EngineConfig
from mini_infer.engine.build import Parts, build
from mini_infer.engine.fork import OwnLock
from mini_infer.engine.intake import Prompt, list_prompts, one_for_each
from mini_infer.engine.loop import CLOSED, StepObserver, StepResult
from mini_infer.engine.no_tokenizer import NoTokenizer
from mini_infer.engine.progress import generation_progress
from mini_infer.engine.request import Request
from mini_infer.engine.stats import EngineSnapshot, EngineStats, loops_of
from mini_infer.exceptions import EngineError, InvalidConfigError, InvalidRequestError, QueueFullError
from mini_infer.fields import check_bool, check_int, check_number
from mini_infer.outputs import EmbeddingOutput, GenerateOutput, Increment, as_embedding
from mini_infer.sampling import EMBEDDING, SamplingParams
from mini_infer.sparse import SparseConfig
from mini_infer.typing import TokenIds

if TYPE_CHECKING:
    import torch

    from mini_infer.engine.tokenizer import RenderedChat, Tokenizer
    from mini_infer.models import ModelConfig


_Engine = TypeVar("_Engine", bound="LLMEngine")

_KEPT_OUTPUTS = 256
"""Outputs that `step` handed over and `get_output` still finds; no more, so that a loop of `step` stays small."""


class LLMEngine:
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
        self._assemble(config, build(config))

    @classmethod
    def of(cls, config: EngineConfig, parts: Parts) -> "LLMEngine":
        """An engine of parts that were made elsewhere, an executor of another kind, for example."""
        engine = cls.__new__(cls)
        engine._assemble(config, parts)
        return engine

    def _assemble(self, config: EngineConfig, parts: Parts) -> None:
        self.config = config
        self.max_model_len = parts.max_model_len
        self.default_sampling_params = parts.defaults.sampling
        self._parts = parts
        self._tokenizer = parts.tokenizer
        self._intake = parts.intake
        self._loop = parts.loop
        self._finished = parts.loop.finished  # whose output nobody has fetched
        self._handed_over: OrderedDict[str, GenerateOutput] = OrderedDict()  # the last ones that `step` gave
        self._lock = OwnLock()

    @property
    def model_config(self) -> "ModelConfig":
        """What the checkpoint says of itself.

        Raises:
            EngineError: there is no checkpoint behind this engine's executor.
        """
        if self._parts.model_config is None:
            raise EngineError("this engine's executor was made elsewhere, and has no checkpoint that it knows of")
        return self._parts.model_config

    @property
    def device(self) -> "torch.device":
        """Where the model is; raises as ``model_config`` does."""
        if self._parts.device is None:
            raise EngineError("this engine's executor was made elsewhere, and has no device that it knows of")
        return self._parts.device

    def close(self) -> None:
        """Abort what runs, and free the model and the KV memory. Safe to call twice. Nothing can be queued then."""
        with self._lock:
            for request in list(self._loop.requests.values()):
                self._loop.abort(request)
            self._parts = replace(self._parts, executor=CLOSED)
            self._loop.close()

    def __enter__(self: _Engine) -> _Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

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

    # ---- one request at a time -----------------------------------------------------------------------------------

    def add_request(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        max_tokens: int | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
    ) -> str:
        """Queue a request and return its id; ``step`` or ``get_output`` move it along.

        Args:
            prompt: text or token ids.
            sampling_params: None is the model's own default, 100 tokens at most.
            max_tokens: overrides ``sampling_params``.
            request_id: a name of your own; None makes one.
            priority: higher goes first, with ``scheduling_policy="priority"``.

        Raises:
            InvalidRequestError: the prompt, a parameter or the id is unusable.
            QueueFullError: ``max_waiting`` requests wait already.
        """
        request = self._intake.make_request(
            prompt, sampling_params, {"max_tokens": max_tokens}, request_id=request_id, priority=priority
        )
        self.submit(request)
        return request.request_id

    def get_output(self, request_id: str) -> GenerateOutput | None:
        """The output of a request once it has finished, else None after running one step.

        A finished output is handed over once.

        Raises:
            InvalidRequestError: no such request, or its output was handed over already.
        """
        with self._lock:
            if isinstance(request_id, str) and request_id in self._loop.requests:
                self._advance()
            elif isinstance(request_id, str) and request_id in self._handed_over:
                return self._handed_over.pop(request_id)
            elif not isinstance(request_id, str) or request_id not in self._finished:
                raise InvalidRequestError(
                    f"request_id {request_id!r} is unknown, or its output was handed over already; "
                    "use an id that add_request returned"
                )
            request = self._finished.pop(request_id, None)
            return None if request is None else request.output()

    def step(self) -> SignedStep:
        """Run one step.

        Returns:
            ``(request_id, token_ids)`` of each request that finished, and so is handed over (the tokens are those of
            its first completion; ``get_output`` still has the rest, of the last 256), and the number of tokens
            computed, negative for a step that only decoded.
        """
        with self._lock:
            result = self._advance()
            finished = [request.output() for request in result.finished]
            self._hand_over(finished)
            for output in finished:
                self._finished.pop(output.request_id, None)
            return signed_step(finished, result.plan.num_tokens, result.plan.only_decodes)

    def _hand_over(self, outputs: Seq[GenerateOutput]) -> None:
        """Keep outputs that are somebody's already, or that nobody need ask for, as long as few others follow."""
        self._handed_over |= {output.request_id: output for output in outputs}
        while len(self._handed_over) > _KEPT_OUTPUTS:
            self._handed_over.popitem(last=False)

    def is_finished(self) -> bool:
        """Whether there is nothing left to do for ``step``."""
        return self._loop.is_finished()

    def abort(self, request_id: str) -> None:
        """End a request with reason "abort"; its output holds what was generated so far.

        Aborting a request that has just finished does nothing.

        Raises:
            InvalidRequestError: no such request, or its output was handed over already.
        """
        with self._lock:
            request = self._loop.requests.get(request_id) if isinstance(request_id, str) else None
            if request is not None:
                self._loop.abort(request)
                if request_id in self._finished:
                    self._hand_over([request.output()])
                    del self._finished[request_id]
            elif not isinstance(request_id, str) or request_id not in {*self._finished, *self._handed_over}:
                raise InvalidRequestError(f"request_id {request_id!r} is unknown; nothing to abort")

    def stats(self) -> EngineStats:
        """Queue lengths, KV blocks, and totals since the start."""
        with self._lock:
            return EngineStats.of(self._loop)

    def stats_per_replica(self) -> list[EngineStats]:
        """The same of each replica of the model."""
        with self._lock:
            return [EngineStats.of(loop) for loop in loops_of(self._loop)]

    def snapshot(self) -> EngineSnapshot:
        """Who runs, who waits, and which blocks they hold."""
        with self._lock:
            return EngineSnapshot.of(self._loop)

    # ---- prepared requests, for faces that listen ----------------------------------------------------------------

    def make_request(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        caller: Hashable = None,
        listener: Callable[[Increment], None] | None = None,
    ) -> Request:
        """Check a request and prepare it, without queueing it; may run on any thread while a step runs on another.

        Args:
            caller: who asks; while others do, too, no caller takes more than a share of the seats and of each step.
            listener: told of every increment, on the thread that runs the step. Such a request's output comes with
                its last increment, not through ``get_output``.

        Raises:
            InvalidRequestError: the prompt, a parameter or the id is unusable.
        """
        return self._intake.make_request(
            prompt, sampling_params, {}, request_id=request_id, priority=priority, caller=caller, listener=listener
        )

    def submit(self, request: Request) -> None:
        """Queue a request that ``make_request`` prepared.

        Raises:
            InvalidRequestError: its id is taken by a request whose output is still to come or to be fetched.
            QueueFullError: ``max_waiting`` requests wait already.
        """
        with self._lock:
            limit = self.config.max_waiting
            if limit is not None and (waiting := self._loop.num_waiting_requests) >= limit:
                raise QueueFullError(f"{waiting} requests wait already and max_waiting is {limit}; try again later")
            self._enqueue(request)

    def _enqueue(self, request: Request) -> None:
        if request.request_id in self._loop.requests or request.request_id in self._finished:
            raise InvalidRequestError(f"request_id {request.request_id!r} is taken; choose another or fetch its output")
        self._handed_over.pop(request.request_id, None)
        self._loop.enqueue(request)

    # ---- the loop ------------------------------------------------------------------------------------------------

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
                while not all(request.finished for request in requests):
                    self._advance()
                    done = sum(request.finished for request in requests)
                    report(done, self._loop.counts.num_generated_tokens - generated_before)
            with self._lock:  # a step that another thread runs may have handed them over already
                return [request.output() for request in requests]
        finally:
            self.discard(requests)

    def watch(self, observer: StepObserver) -> None:
        """Have somebody told of every step from now on, on the thread that runs it."""
        with self._lock:
            for loop in loops_of(self._loop):
                loop.watch(observer)

    def _advance(self) -> StepResult:
        with self._lock:
            return self._loop.advance()

    def discard(self, requests: Seq[Request]) -> None:
        """Forget requests that nobody waits for any more, wherever they are."""
        with self._lock:
            for request in requests:
                if self._loop.requests.get(request.request_id) is request:
                    self._loop.abort(request)
                if self._finished.get(request.request_id) is request:
                    del self._finished[request.request_id]


class LLM(LLMEngine):
    """The same engine, made from a model and fields of ``EngineConfig``: ``LLM("path/to/model", max_num_seqs=64)``.

    Args:
        model: checkpoint directory or Hub name; None is the bundled tutor.
        fields: any other field of ``EngineConfig``.
    """

    def __init__(self, model: str | os.PathLike[str] | None = None, **fields: Any) -> None:
        super().__init__(EngineConfig(model=model, **fields))
