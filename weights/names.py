"""Tensor names: a table per layout from canonical names to theirs, anchored and both ways.

A layout's table is made from the parameter table of the config, so it names every tensor that a file of that config
holds and no other. Canonical names are those of Hugging Face's transformers.
"""

from mamba_core.spec.params import parameter_table

EMBEDDING = "backbone.embeddings.weight"
HEAD = "lm_head.weight"

# layout -> canonical name -> theirs, for the names that differ.
RENAMED = {
    "hf": {},
    "mamba_ssm": {EMBEDDING: "backbone.embedding.weight"},
}

# layout -> whether a tied head is written, as a copy of the embedding. Read, it may be there or not.
WRITES_TIED_HEAD = {"hf": False, "mamba_ssm": True}


def names(config, layout: str) -> dict[str, str]:
    """Canonical name -> the layout's, for every parameter of the config, in the order of its table."""
    renamed = RENAMED[layout]
    return {name: renamed.get(name, name) for name in parameter_table(config)}
