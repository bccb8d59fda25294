"""The engine: takes requests, runs steps, gives outputs."""

import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from typing import Any

from mini_infer.config import EngineConfig
from mini_infer.engine.beam_search import BeamSearch
from mini_infer.engine.build import build
from mini_infer.engine.device import on
from mini_infer.engine.fork import OwnLock
from mini_infer.engine.intake import Intake, Prompt, list_params, list_prompts
from mini_infer.engine.loop import EngineLoop, StepResult
from mini_infer.engine.overlap import OverlappedLoop
from mini_infer.engine.progress import generation_progress
from mini_infer.engine.request import Request
from mini_infer.engine.stats import EngineSnapshot, EngineStats
from mini_infer.engine.step_queue import step_queue
from mini_infer.exceptions import InvalidConfigError, InvalidRequestError, QueueFullError
from mini_infer.fields import check_bool, check_int, check_number
from mini_infer.outputs import GenerateOutput, StepOutput
from mini_infer.sampling import SamplingParams
from mini_infer.typing import TokenIds


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
        parts = build(config)
        self.config = config
        self.model_config = parts.model_config
        self.max_model_len = parts.max_model_len
        self.default_sampling_params = parts.defaults.sampling
        self._tokenizer = parts.tokenizer
        self._intake = Intake(
            parts.tokenizer, parts.defaults, parts.model_config.vocab_size, parts.max_model_len, config
        )
        self._trace = parts.trace
        self.device = parts.runner.device
        self._loop = (
            OverlappedLoop(parts.scheduler, parts.runner, parts.tokenizer, step_queue(self.device))
            if config.overlaps
            else EngineLoop(parts.scheduler, parts.runner, parts.tokenizer)
        )
        self._finished: dict[str, Request] = {}
        self._lock = OwnLock()

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
    ) -> list[GenerateOutput]:
        """Complete every prompt.

        Args:
            prompts: a text, a list of token ids, or a list of either.
            sampling_params: one for all prompts, or one for each; None is the model's own default, 100 tokens at most.
            use_tqdm: show a progress bar when the output is a terminal or a notebook.
            max_tokens, temperature, top_p, top_k: override ``sampling_params``.

        Returns:
            One output per prompt, in their order.

        Raises:
            InvalidRequestError: a prompt or parameter is unusable; nothing has run then.
        """
        prompt_list = list_prompts(prompts)
        params_list = list_params(sampling_params, len(prompt_list))
        overrides = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k}
        return self._run(self._make_requests(prompt_list, params_list, overrides), use_tqdm)

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
        check_int(InvalidRequestError, "beam_width", beam_width, 1, self.config.max_num_seqs)
        check_int(InvalidRequestError, "max_tokens", max_tokens, 1)
        check_number(InvalidRequestError, "length_penalty", length_penalty, -10, 10)
        check_bool(InvalidRequestError, "early_stopping", early_stopping)
        prompt_list = list_prompts(prompts)
        params = SamplingParams(n=beam_width, max_tokens=max_tokens, temperature=0.0)
        searches = [
            BeamSearch(
                request_id=request.request_id,
                prompt=request.prompt,
                prompt_token_ids=request.prompt_token_ids,
                params=request.params,
                completions=request.completions,
                listener=None,
                length_penalty=length_penalty,
                early_stopping=early_stopping,
            )
            for request in self._make_requests(prompt_list, [params] * len(prompt_list), {})
        ]
        return self._run(searches, use_tqdm)

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
            messages: dicts with "role" and "content"; or a list of such conversations.
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

    def render_chat(self, messages: Seq[Mapping[str, Any]], /, **template_kwargs: Any) -> str:
        """The prompt that the model's chat template makes of a conversation; for ``generate`` or ``stream``."""
        return self._tokenizer.render_chat(messages, **template_kwargs)

    def tokenize(self, text: str) -> TokenIds:
        """The token ids of a text, as ``generate`` sees them but of any length.

        Raises:
            InvalidRequestError: the text is no valid Unicode, or has no tokens.
        """
        return self._tokenizer.encode(text, max_tokens=sys.maxsize)

    def detokenize(self, token_ids: Seq[int]) -> str:
        """The text of token ids, special tokens included.

        Raises:
            InvalidRequestError: an id is not in the vocabulary.
        """
        self._intake.check_token_ids(token_ids)
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)

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
        increments: deque[StepOutput] = deque()
        request = self._intake.make_request(prompt, sampling_params, overrides, listener=increments.append)
        if request.params.n != 1:
            raise InvalidRequestError(f"stream yields one text but n={request.params.n}; use generate, or n=1")

        def pieces() -> Iterator[str]:
            self.submit(request)
            try:
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
            elif not isinstance(request_id, str) or request_id not in self._finished:
                raise InvalidRequestError(
                    f"request_id {request_id!r} is unknown, or its output was handed over already; "
                    "use an id that add_request returned"
                )
            request = self._finished.pop(request_id, None)
            return None if request is None else request.output()

    def step(self) -> tuple[list[tuple[str, list[int]]], int]:
        """Run one step.

        Returns:
            ``(request_id, token_ids)`` of each request that finished (those of its first completion; ``get_output``
            has the rest), and the number of tokens computed, negative for a step that only decoded.
        """
        with self._lock:
            result = self._advance()
            finished = [(request.request_id, request.output().token_ids) for request in result.finished]
            num_tokens = result.plan.num_tokens
            return finished, -num_tokens if result.plan.only_decodes else num_tokens

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
                self._keep_output(request)
            elif not isinstance(request_id, str) or request_id not in self._finished:
                raise InvalidRequestError(f"request_id {request_id!r} is unknown; nothing to abort")

    def stats(self) -> EngineStats:
        """Queue lengths, KV blocks, and totals since the start."""
        with self._lock:
            return EngineStats.of(self._loop)

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
        listener: Callable[[StepOutput], None] | None = None,
    ) -> Request:
        """Check a request and prepare it, without queueing it; may run on any thread while a step runs on another.

        Args:
            listener: told of every increment, on the thread that runs the step. Such a request's output comes with
                its last increment, not through ``get_output``.

        Raises:
            InvalidRequestError: the prompt, a parameter or the id is unusable.
        """
        return self._intake.make_request(
            prompt, sampling_params, {}, request_id=request_id, priority=priority, listener=listener
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
        self._loop.enqueue(request)

    # ---- the loop ------------------------------------------------------------------------------------------------

    def _make_requests(
        self, prompts: Seq[Prompt], params: Seq[SamplingParams | None], overrides: Mapping[str, Any]
    ) -> list[Request]:
        """Check several prompts, each with its parameters, and prepare them; an error says which one is to blame."""
        requests = []
        for place, (prompt, own) in enumerate(zip(prompts, params, strict=True)):
            try:
                requests.append(self._intake.make_request(prompt, own, overrides))
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
            with self._lock:
                return [self._finished.pop(request.request_id).output() for request in requests]
        finally:
            self.discard(requests)

    def _advance(self) -> StepResult:
        """One step; outputs that nobody listens for wait to be fetched."""
        with self._lock, on(self.device):
            result = self._loop.advance() if self._trace is None else self._trace.step(self._loop)
            for request in result.finished:
                self._keep_output(request)
            return result

    def _keep_output(self, request: Request) -> None:
        if request.listener is None:
            self._finished[request.request_id] = request

    def discard(self, requests: Seq[Request]) -> None:
        """Forget requests that nobody waits for any more, wherever they are."""
        with self._lock:
            for request in requests:
                if self._loop.requests.get(request.request_id) is request:
                    self._loop.abort(request)
                elif self._finished.get(request.request_id) is request:
                    del self._finished[request.request_id]


class LLM(LLMEngine):
    """The same engine, made from a model and fields of ``EngineConfig``: ``LLM("path/to/model", max_num_seqs=64)``.

    Args:
        model: checkpoint directory or Hub name; None is the bundled tutor.
        fields: any other field of ``EngineConfig``.
    """

    def __init__(self, model: str | os.PathLike[str] | None = None, **fields: Any) -> None:
        super().__init__(EngineConfig(model=model, **fields))
