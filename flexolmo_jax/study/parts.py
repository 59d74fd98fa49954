# SPDX-License-Identifier: Apache-2.0
"""Training text of owners who share a domain."""

from pathlib import Path

from flexolmo_jax.data import shards, tokenize
from flexolmo_jax.study.design import Owner


def write(whose: Owner, domain: Path, out: Path, tokenizer: Path) -> None:
    """Writes an owner's documents of a domain as token shards.

    Args:
      domain: token shards of the whole domain.

    Raises:
      DataError: the domain has too few documents, so that the owner would have none.
    """
    opened = shards.open_shards(domain)
    size = tokenize.token_byte_lengths(tokenize.load(tokenizer))
    mine = [opened.document(i) for i in range(opened.n_documents) if i % whose.of in whose.parts]
    shards.write_shards(
        out,
        mine,
        vocab_size=opened.info["vocab_size"],
        tokenizer_digest=opened.info["tokenizer_digest"],
        eos_id=opened.info["eos_id"],
        text_bytes=int(sum(size[d].sum() for d in mine)),
        source=whose.domain,
        split="train",
        recipe={"parts": list(whose.parts), "of": whose.of},
    )
