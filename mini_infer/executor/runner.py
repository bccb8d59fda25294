"""The runner: a step's arrays become tensors, the model runs on them, tokens are drawn."""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mini_infer.executor.confidence import confidences
from mini_infer.executor.device import send_arrays
from mini_infer.executor.graphs import DecodeGraphs
from mini_infer.executor.logprobs import ScoreTensors, score_tokens, stacked
from mini_infer.executor.sampler import sample
from mini_infer.executor.whole import Scratch
from mini_infer.kernels import AttentionMetadata
from mini_infer.kernels.host import send
from mini_infer.memory.kv_cache import KVCache
from mini_infer.models import Batch, Decoder
from mini_infer.parallel.group import Link
from mini_infer.step import Draws, Pools, Scores, StepInput, StepOutput

_LOGITS_BYTES = 1 << 27
"""Of logits that tokens are drawn from at once, before any copies: sampling makes up to five."""

_SCORED_ROWS = 64
"""Rows of the vocabulary that are scored at once, to bound their memory."""


class Computed(NamedTuple):
    """What a step gives, as tensors: on the model's device, or copied to CPU memory.

    Attributes:
        token_ids, logprobs: ``[D]``, of the draws.
        token_scores: of those draws that asked for them; None where none did.
        scores: of the rows to score; None where there are none.
        pooled: float32 ``[E, hidden_size]``, of the runs to sum; None where there are none.
        confidences: ``[D]``, of the draws; None where none asked for them.
    """

    token_ids: Tensor
    logprobs: Tensor
    token_scores: ScoreTensors | None
    scores: ScoreTensors | None
    pooled: Tensor | None = None
    confidences: Tensor | None = None

    def in_memory(self) -> "Computed":
        """Copies in CPU memory, which are there once the device has come so far."""

        def copy(tensor: Tensor) -> Tensor:
            return tensor.to("cpu", non_blocking=True)

        def copies(scores: ScoreTensors | None) -> ScoreTensors | None:
            return scores and ScoreTensors(*map(copy, scores))

        return Computed(
            token_ids=copy(self.token_ids),
            logprobs=copy(self.logprobs),
            token_scores=copies(self.token_scores),
            scores=copies(self.scores),
            pooled=None if self.pooled is None else copy(self.pooled),
            confidences=None if self.confidences is None else copy(self.confidences),
        )

    def to_output(self, step: StepInput) -> StepOutput:
        """As plain numbers. The tensors must be in CPU memory."""
        asked = [num for num in step.draws.num_logprobs.tolist() if num >= 0]
        return StepOutput(
            token_ids=self.token_ids.tolist(),
            logprobs=self.logprobs.tolist(),
            token_scores=self.token_scores.to_scores(asked) if self.token_scores else [],
            scores=self.scores.to_scores(step.scores.num_top.tolist()) if self.scores else [],
            pooled=[] if self.pooled is None else list(self.pooled.numpy()),
            confidences=[] if self.confidences is None else self.confidences.tolist(),
        )


_NOTHING = Computed(torch.empty(0, dtype=torch.int64), torch.empty(0), None, None)


@dataclass(frozen=True)
class ModelRunner:
    """Runs the model over the paged cache.

    Attributes:
        model: the decoder.
        kv_cache: keys and values of each layer, in whatever layout their kernels made them, and the CPU's blocks.
        device: where all of it lives.
        tables: int32 ``[num_rows, width]``, the block ids of the sequences that run.
        sampled: int64 ``[num_rows]``, the token that was drawn last for each of them.
        graphs: how to run decodes; None runs them like everything else.
        link: the way to the stages before and after.
        scratch: where sequences have their keys and values that are computed whole; None if the model has no such.
    """

    model: Decoder
    kv_cache: KVCache
    device: torch.device
    tables: Tensor
    sampled: Tensor
    graphs: DecodeGraphs | None
    link: Link = field(default_factory=Link)
    scratch: Scratch | None = None

    @torch.inference_mode()
    def run(self, step: StepInput) -> Computed:
        """Carry out a step. On a GPU everything is launched, and nothing waited for."""
        if len(step.swap_out):
            self.kv_cache.swap_out(step.swap_out)
        if len(step.copy):
            self.kv_cache.copy_blocks(step.copy)
        if len(step.swap_in):
            self.kv_cache.swap_in(step.swap_in)
        if not len(step.token_ids):
            return _NOTHING
        hidden = self._forward(self._batch(step))
        if not self.model.share.is_last:
            self.link.send(hidden)
            return _NOTHING
        scores = self._score(hidden, step.scores) if len(step.scores) else None
        pooled = self._pool(hidden, step.pools) if len(step.pools) else None
        if not len(step.draws):
            return _NOTHING._replace(scores=scores, pooled=pooled)
        return self._draw(hidden, step.draws)._replace(scores=scores, pooled=pooled)

    def _forward(self, batch: Batch) -> Tensor:
        arriving = None
        if not self.model.share.is_first:
            shape = (2, len(batch.token_ids), self.model.config.hidden_size)
            arriving = self.link.receive(shape, self.model.dtype, self.device)
        if self.graphs is not None and self.graphs.fits(batch):
            return self.graphs.run(batch, arriving)
        return self.model.forward(batch, self.kv_cache.layers, arriving)

    def _draw(self, hidden: Tensor, draws: Draws) -> Computed:
        """A part of the draws after the other, so that the logits of a diffusion model's many rows never are too much
        memory at once."""
        config = self.model.config
        parts = draws.split(max(1, _LOGITS_BYTES // (config.vocab_size * hidden.element_size())))
        most = int(draws.num_logprobs.max())
        drawn = [self._draw_some(hidden, some, most) for some in parts]
        if len(drawn) == 1:
            return drawn[0]
        scores = [some.token_scores for some in drawn if some.token_scores is not None]
        rated = [some.confidences for some in drawn if some.confidences is not None]
        return Computed(
            token_ids=torch.cat([some.token_ids for some in drawn]),
            logprobs=torch.cat([some.logprobs for some in drawn]),
            token_scores=stacked(scores) if scores else None,
            scores=None,
            confidences=torch.cat(rated) if rated else None,
        )

    def _draw_some(self, hidden: Tensor, draws: Draws, most: int) -> Computed:
        """Of ranks that share the last layers one has the logits, draws, and tells the others the tokens."""
        rows, table_rows = send_arrays([draws.rows, draws.table_rows], self.device)
        logits = self.model.compute_logits(hidden.index_select(0, rows))
        group = self.model.share.group
        if len(draws.guides):
            logits = self._guided(logits, hidden, draws)
        if logits is None:
            self.sampled.index_copy_(0, table_rows, group.tell(torch.empty_like(table_rows)))
            return _NOTHING
        if self.model.config.diffusion is not None:
            logits[:, self.model.config.diffusion.mask_token_id] = -torch.inf  # a gap is no answer
        token_ids, logprobs = sample(logits, draws, self.model.kernels)
        self.sampled.index_copy_(0, table_rows, group.tell(token_ids))
        rated = confidences(logits, draws, token_ids) if len(draws.confidences) else None
        asking = np.flatnonzero(draws.num_logprobs >= 0)
        scores = None
        if len(asking):
            wanted = send(asking, self.device)
            scores = score_tokens(logits[wanted], token_ids[wanted], most)
        return Computed(token_ids, logprobs, scores, None, confidences=rated)

    def _guided(self, logits: Tensor | None, hidden: Tensor, draws: Draws) -> Tensor | None:
        """Away from what would be said without the prompt (Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022,
        https://arxiv.org/abs/2207.12598)."""
        guided = np.flatnonzero(draws.guides >= 0)
        places, rows = send_arrays([guided, draws.guides[guided]], self.device)
        without = self.model.compute_logits(hidden[rows])
        if logits is None or without is None:
            return None
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        scale = send(draws.guidance[guided], self.device).to(wide.dtype)[:, None]
        wide[places] = without + (scale + 1) * (wide[places] - without)
        return wide

    def _score(self, hidden: Tensor, scores: Scores) -> ScoreTensors | None:
        rows, targets = send_arrays([scores.rows, scores.targets], self.device)
        most = int(scores.num_top.max())
        parts = []
        for some, tokens in zip(rows.split(_SCORED_ROWS), targets.split(_SCORED_ROWS), strict=True):
            logits = self.model.compute_logits(hidden[some])
            if logits is not None:
                parts.append(score_tokens(logits, tokens, most))
        if not parts:
            return None
        return stacked(parts)

    def _pool(self, hidden: Tensor, pools: Pools) -> Tensor:
        owners = np.repeat(np.arange(len(pools)), pools.ends - pools.starts)
        rows = np.concatenate([np.arange(start, end) for start, end in zip(pools.starts, pools.ends, strict=True)])
        sent_owners, sent_rows = send_arrays([owners, rows], self.device)
        sums = torch.zeros(len(pools), hidden.shape[1], dtype=torch.float32, device=self.device)
        return sums.index_add_(0, sent_owners, hidden[sent_rows].float())

    def _batch(self, step: StepInput) -> Batch:
        """The step's tokens and where they stand; decodes are padded to the size of a graph.

        A row of padding has slot -1, which writes nowhere, and a context of 0 tokens, which reads nothing.
        """
        span, whole, n = self.model.config.attention_span, None, step.num_whole
        if n:
            assert self.scratch is not None
            whole = self.scratch.lay_out(step, span, self.device)
        num_seqs, num_decodes = len(step.context_lens) - n, step.num_decodes
        token_ids, positions, slot_mapping = step.token_ids, step.positions, step.slot_mapping
        query_start_loc, context_lens, table_rows = step.query_start_loc, step.context_lens, step.table_rows
        if n:  # what follows is about the others
            slot_mapping, query_start_loc = slot_mapping[query_start_loc[n] :], query_start_loc[n:] - query_start_loc[n]
            context_lens, table_rows = context_lens[n:], table_rows[n:]
        elif self.graphs is not None and num_decodes == num_seqs:
            num_rows = self.graphs.size_for(num_seqs)
            if num_rows is not None and num_rows > num_seqs:
                spare = num_rows - num_seqs
                token_ids, positions, table_rows = (
                    np.append(array, np.zeros(spare, np.int64)) for array in (token_ids, positions, table_rows)
                )
                context_lens = np.append(context_lens, np.zeros(spare, np.int32))
                slot_mapping = np.append(slot_mapping, np.full(spare, -1))
                query_start_loc = np.arange(num_rows + 1, dtype=np.int32)
                num_decodes = num_rows
        prefill_start_loc = query_start_loc[num_decodes:] - query_start_loc[num_decodes]
        sent = send_arrays(
            [
                token_ids,
                positions,
                slot_mapping,
                query_start_loc,
                prefill_start_loc,
                context_lens,
                table_rows,
                step.changed,
                step.changed_blocks,
                step.sampled_at,
                step.sampled_from,
            ],
            self.device,
        )
        if len(step.changed):
            self.tables.view(-1)[sent[7]] = sent[8]
        if len(step.sampled_at):
            ids = sent[0].clone() if self.device.type == "cpu" else sent[0]  # a CPU's tensor is the step's own array
            ids[sent[9]] = self.sampled[sent[10]]
        else:
            ids = sent[0]
        return Batch(
            token_ids=ids,
            positions=sent[1],
            attention=AttentionMetadata(
                slot_mapping=sent[2],
                query_start_loc=sent[3],
                prefill_start_loc=sent[4],
                context_lens=sent[5],
                block_tables=self.tables[:, : step.width].index_select(0, sent[6]),
                num_decodes=num_decodes,
                span=span,
            ),
            whole=whole,
        )
