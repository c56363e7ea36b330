"""What of the work is a rank's, and how that fits into its memory."""

from __future__ import annotations

from m27quant.calib.activations import Chunk, plan_chunks
from m27quant.calib.memory import MemoryPlan, plan_memory
from m27quant.distributed.ranks import Ranks
from m27quant.layer_statistics import statistics_bytes
from m27quant.prepare import Options, Prepared


def share_of(
    prepared: Prepared, options: Options, ranks: Ranks, chunk_tokens: int
) -> tuple[list[Chunk], MemoryPlan]:
    """This rank's chunks, of those that a single process would have, and its memory plan.

    `max_memory` is one process's; without it the ranks of a machine share what is free there.

    Raises:
        EnvironmentFault: that is too little.
    """
    lengths = prepared.sequences.lengths
    chunks = plan_chunks(lengths, chunk_tokens)
    mine = [chunks[i] for i in ranks.part(len(chunks))]
    memory = prepared.memory
    if ranks.size > 1 or chunk_tokens != memory.chunk_tokens:
        memory = plan_memory(
            prepared.source.config,
            num_tokens=sum(map(len, mine)),
            longest=max(lengths),
            device=prepared.device,
            budget=prepared.budget if options.max_memory else prepared.budget // ranks.local_size,
            chunk_tokens=chunk_tokens,
            beside=statistics_bytes(
                prepared.plan.resolved.algorithm, options.input_range, prepared.source.config, prepared.device
            ),
        )
    return mine, memory
