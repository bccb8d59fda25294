"""The engine: takes requests, runs steps, gives outputs."""

import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

from torch import Tensor, tensor

from mini_infer.config import EngineConfig
from mini_infer.engine.build import build
from mini_infer.engine.intake import Intake, Prompt, list_params, list_prompts
from mini_infer.engine.logprobs import token_logprobs
from mini_infer.engine.progress import generation_progress
from mini_infer.engine.request import Completion, Request
from mini_infer.engine.sampler import sample
from mini_infer.exceptions import InvalidConfigError, InvalidRequestError, QueueFullError
from mini_infer.outputs import FinishReason, GenerateOutput, StepOutput
from mini_infer.sampling import SamplingParams
from mini_infer.scheduler import SchedulerOutputs, Sequence

logger = logging.getLogger(__name__)

_LOGPROB_ROWS = 64
"""Rows of the vocabulary that prompt log probabilities are computed for at once, to bound their memory."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The engine at one moment, and what it has done so far.

    Attributes:
        num_running, num_waiting: sequences.
        num_blocks, num_used_blocks, peak_used_blocks: KV blocks in all, taken now, and at most so far.
        num_steps, num_computed_tokens, num_generated_tokens, num_preemptions: totals since the start.
    """

    num_running: int
    num_waiting: int
    num_blocks: int
    num_used_blocks: int
    peak_used_blocks: int
    num_steps: int
    num_computed_tokens: int
    num_generated_tokens: int
    num_preemptions: int


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
        self._eos_token_ids = parts.defaults.eos_token_ids
        self._tokenizer = parts.tokenizer
        self._intake = Intake(
            parts.tokenizer, parts.defaults, parts.model_config.vocab_size, parts.max_model_len, config.seed
        )
        self._scheduler = parts.scheduler
        self._runner = parts.runner
        self.device = parts.runner.device
        self._requests: dict[str, Request] = {}
        self._completions: dict[Sequence, Completion] = {}
        self._finished: dict[str, GenerateOutput] = {}
        self._lock = threading.RLock()
        self._num_steps = self._num_computed_tokens = self._num_generated_tokens = self._num_preemptions = 0

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
        requests = []
        for place, (prompt, params) in enumerate(zip(prompt_list, params_list, strict=True)):
            try:
                requests.append(self._intake.make_request(prompt, params, overrides))
            except InvalidRequestError as error:
                raise InvalidRequestError(f"prompts[{place}]: {error}" if len(prompt_list) > 1 else error) from error
        return self._run(requests, use_tqdm)

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
        several = bool(messages) and not isinstance(messages, str | Mapping) and not isinstance(messages[0], Mapping)
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

    def render_chat(self, messages: Seq[Mapping[str, Any]], **template_kwargs: Any) -> str:
        """The prompt that the model's chat template makes of a conversation; for ``generate`` or ``stream``."""
        return self._tokenizer.render_chat(messages, **template_kwargs)

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
            priority: only 0 is supported yet.

        Raises:
            InvalidRequestError: the prompt, a parameter or the id is unusable.
            QueueFullError: ``max_waiting`` requests wait already.
        """
        if priority != 0:
            raise InvalidRequestError(f"priority={priority!r} is not supported yet; leave it at 0")
        request = self._intake.make_request(prompt, sampling_params, {"max_tokens": max_tokens}, request_id=request_id)
        self.submit(request)
        return request.request_id

    def get_output(self, request_id: str) -> GenerateOutput | None:
        """The output of a request once it has finished, else None after running one step.

        A finished output is handed over once.

        Raises:
            InvalidRequestError: no such request, or its output was handed over already.
        """
        with self._lock:
            if request_id in self._requests:
                self._advance()
            elif request_id not in self._finished:
                raise InvalidRequestError(
                    f"request_id {request_id!r} is unknown, or its output was handed over already; "
                    "use an id that add_request returned"
                )
            return self._finished.pop(request_id, None)

    def step(self) -> tuple[list[tuple[str, list[int]]], int]:
        """Run one step.

        Returns:
            ``(request_id, token_ids)`` of each request that finished (those of its first completion; ``get_output``
            has the rest), and the number of tokens computed, negative for a step that only decoded.
        """
        with self._lock:
            plan, finished = self._advance()
            return finished, -plan.num_tokens if plan.only_decodes else plan.num_tokens

    def is_finished(self) -> bool:
        """Whether there is nothing left to do for ``step``."""
        return self._scheduler.is_finished()

    def abort(self, request_id: str) -> None:
        """End a request with reason "abort"; its output holds what was generated so far.

        Aborting a request that has just finished does nothing.

        Raises:
            InvalidRequestError: no such request, or its output was handed over already.
        """
        with self._lock:
            request = self._requests.get(request_id)
            if request is not None:
                self._abort(request)
            elif request_id not in self._finished:
                raise InvalidRequestError(f"request_id {request_id!r} is unknown; nothing to abort")

    def stats(self) -> EngineStats:
        """Queue lengths, KV blocks, and totals since the start."""
        with self._lock:
            blocks = self._scheduler.block_manager
            return EngineStats(
                num_running=len(self._scheduler.running),
                num_waiting=len(self._scheduler.waiting),
                num_blocks=blocks.num_gpu_blocks,
                num_used_blocks=blocks.num_used_blocks,
                peak_used_blocks=blocks.peak_used_blocks,
                num_steps=self._num_steps,
                num_computed_tokens=self._num_computed_tokens,
                num_generated_tokens=self._num_generated_tokens,
                num_preemptions=self._num_preemptions,
            )

    # ---- prepared requests, for faces that listen ----------------------------------------------------------------

    def make_request(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        listener: Callable[[StepOutput], None] | None = None,
    ) -> Request:
        """Check a request and prepare it, without queueing it; may run on any thread while a step runs on another.

        Args:
            listener: told of every increment, on the thread that runs the step. Such a request's output comes with
                its last increment, not through ``get_output``.

        Raises:
            InvalidRequestError: the prompt, a parameter or the id is unusable.
        """
        return self._intake.make_request(prompt, sampling_params, {}, request_id=request_id, listener=listener)

    def submit(self, request: Request) -> None:
        """Queue a request that ``make_request`` prepared.

        Raises:
            InvalidRequestError: its id is taken by a request whose output is still to come or to be fetched.
            QueueFullError: ``max_waiting`` requests wait already.
        """
        with self._lock:
            waiting = len(self._scheduler.waiting)
            if self.config.max_waiting is not None and waiting >= self.config.max_waiting:
                raise QueueFullError(
                    f"{waiting} requests wait already and max_waiting is {self.config.max_waiting}; try again later"
                )
            self._enqueue(request)

    def _enqueue(self, request: Request) -> None:
        if request.request_id in self._requests or request.request_id in self._finished:
            raise InvalidRequestError(f"request_id {request.request_id!r} is taken; choose another or fetch its output")
        self._requests[request.request_id] = request
        for completion in request.completions:
            self._completions[completion.sequence] = completion
            self._scheduler.add(completion.sequence)

    # ---- the loop ------------------------------------------------------------------------------------------------

    def _run(self, requests: Seq[Request], show_progress: bool) -> list[GenerateOutput]:
        """Run until these have finished; whatever stops that, none of them is left behind."""
        generated_before = self._num_generated_tokens
        try:
            with self._lock:
                for request in requests:
                    self._enqueue(request)
            with generation_progress(len(requests), show_progress) as report:
                while not all(request.finished for request in requests):
                    self._advance()
                    done = sum(request.finished for request in requests)
                    report(done, self._num_generated_tokens - generated_before)
            with self._lock:
                return [self._finished.pop(request.request_id) for request in requests]
        finally:
            self.discard(requests)

    def _advance(self) -> tuple[SchedulerOutputs, list[tuple[str, list[int]]]]:
        """One step: schedule, forward, sample, update. Returns the plan, and which requests it finished."""
        with self._lock:
            plan = self._scheduler.schedule()
            if not plan.scheduled:
                return plan, []
            now = time.monotonic()
            for sequence, _ in plan.scheduled:
                request = self._requests[sequence.request_id]
                request.first_scheduled_time = request.first_scheduled_time or now

            hidden = self._runner.forward(plan.scheduled)
            self._note_prompt_logprobs(plan, hidden)
            sampling = [self._completions[s.sequence] for s in plan.scheduled if s.samples]
            tokens = self._sample(plan, hidden, sampling) if sampling else []
            self._scheduler.update(plan, tokens)

            self._num_steps += 1
            self._num_computed_tokens += plan.num_tokens
            self._num_generated_tokens += len(tokens)
            self._num_preemptions += len(plan.preempted)
            return plan, self._publish(plan, sampling, tokens)

    def _sample(self, plan: SchedulerOutputs, hidden: Tensor, sampling: list[Completion]) -> list[int]:
        """Next tokens of the sequences whose last token this step computed; notes their log probabilities."""
        logits = self._runner.compute_logits(hidden[tensor(plan.sampling_rows, device=hidden.device)])
        token_ids, logprobs = sample(logits, sampling)
        asking = [row for row, completion in enumerate(sampling) if completion.params.logprobs is not None]
        if asking:
            rows = tensor(asking, device=logits.device)
            num_top = [sampling[row].params.logprobs or 0 for row in asking]
            places = token_logprobs(logits[rows], token_ids[rows], num_top, self._tokenizer.decode_token)
            for row, place in zip(asking, places, strict=True):
                sampling[row].logprobs.append(place)
        for completion, logprob in zip(sampling, logprobs.tolist(), strict=True):
            completion.cumulative_logprob += logprob
        tokens: list[int] = token_ids.tolist()
        return tokens

    def _publish(
        self, plan: SchedulerOutputs, sampling: list[Completion], tokens: list[int]
    ) -> list[tuple[str, list[int]]]:
        """Turn new tokens into text, end what a stop string ends, tell the listeners, hand over what has finished."""
        now = time.monotonic()
        new_tokens = {completion.sequence: token for completion, token in zip(sampling, tokens, strict=True)}
        finished = []
        for sequence, _ in plan.scheduled:
            completion = self._completions[sequence]
            request = self._requests[sequence.request_id]
            new = [new_tokens[sequence]] if sequence in new_tokens else []
            text = ""
            if new:
                request.first_token_time = request.first_token_time or now
                text = self._read_token(completion, new[0])
            if sequence.finish_reason is not None:
                text += completion.end()
                del self._completions[sequence]
            if new or sequence.finish_reason is not None:
                request.tell(completion, text, new, sequence.finish_reason)
            if request.finished:
                finished.append((request.request_id, request.completions[0].sequence.generated_token_ids))
                self._retire(request)
        return finished

    def _read_token(self, completion: Completion, token_id: int) -> str:
        """The text that a new token releases; ends the sequence if that completes a stop string."""
        sequence = completion.sequence
        if math.isnan(completion.cumulative_logprob):
            self._end(sequence, "abort")
            logger.error(
                "request %s: its logits are not finite, so it is aborted; a wider dtype may help", sequence.request_id
            )
            return ""
        if sequence.finish_reason == "stop":  # by this token, which is not part of the text
            completion.stop_reason = None if token_id in self._eos_token_ids else token_id
            return ""
        text = completion.append(token_id)
        if completion.stop_reason is not None:
            self._end(sequence, "stop")  # also when this token was the last one that max_tokens allowed
        return text

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence for a reason that goes before the one it may just have ended for."""
        if sequence.finish_reason is None:
            self._scheduler.finish(sequence, reason)
        sequence.finish_reason = reason

    def _note_prompt_logprobs(self, plan: SchedulerOutputs, hidden: Tensor) -> None:
        """For requests that want them, the log probability of each prompt token given those before it."""
        start = 0
        for sequence, num_new in plan.scheduled:
            rows = hidden[start : start + num_new]
            start += num_new
            request = self._requests[sequence.request_id]
            num_top = request.params.prompt_logprobs
            if num_top is None or sequence is not request.completions[0].sequence:
                continue
            if not request.prompt_logprobs:
                request.prompt_logprobs.append(None)
            # Row i of the chunk predicts the token after it. After a preemption, what is known is not added again.
            known, offset = len(request.prompt_logprobs), sequence.num_computed_tokens + 1
            targets = sequence.token_ids[max(known, offset) : min(offset + num_new, sequence.num_prompt_tokens)]
            rows = rows[max(known, offset) - offset :][: len(targets)]
            for first in range(0, len(targets), _LOGPROB_ROWS):
                part = tensor(targets[first : first + _LOGPROB_ROWS], device=hidden.device)
                logits = self._runner.compute_logits(rows[first : first + _LOGPROB_ROWS])
                request.prompt_logprobs += token_logprobs(
                    logits, part, [num_top] * len(part), self._tokenizer.decode_token
                )

    def _abort(self, request: Request) -> None:
        for completion in request.completions:
            sequence = completion.sequence
            if not completion.done:
                self._scheduler.finish(sequence, "abort")
                del self._completions[sequence]
                request.tell(completion, completion.end(), [], "abort")
        self._retire(request)

    def _retire(self, request: Request) -> None:
        """A request has finished: without a listener its output waits to be fetched."""
        del self._requests[request.request_id]
        if request.listener is None:
            self._finished[request.request_id] = request.output()

    def discard(self, requests: Seq[Request]) -> None:
        """Forget requests that nobody waits for any more, wherever they are."""
        with self._lock:
            for request in requests:
                if self._requests.get(request.request_id) is request:
                    self._abort(request)
                    self._finished.pop(request.request_id, None)


class LLM(LLMEngine):
    """The same engine, made from a model and fields of ``EngineConfig``: ``LLM("path/to/model", max_num_seqs=64)``.

    Args:
        model: checkpoint directory or Hub name; None is the bundled tutor.
        fields: any other field of ``EngineConfig``.
    """

    def __init__(self, model: str | os.PathLike[str] | None = None, **fields: Any) -> None:
        super().__init__(EngineConfig(model=model, **fields))
