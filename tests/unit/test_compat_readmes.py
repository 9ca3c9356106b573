"""The Python of the READMEs of MiniMamba and mambapy, with the import changed alone, and where that is not enough with
the patches below. The READMEs are theirs and not kept here: they lie beside a checkout, or in $MAMBA_CORE_READMES."""

import os
import re
from pathlib import Path

import pytest

import mamba_core as mc

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
FOLDER = Path(os.environ.get("MAMBA_CORE_READMES", Path(__file__).parents[3] / "shared" / "reference"))
IMPORTS = {
    r"from minimamba import": "from mamba_core.compat.minimamba import",
    r"from mambapy\.": "from mamba_core.compat.mambapy.",
}
# README -> number of a block -> (what stands there, what stands instead, why); None for a block that is no program.
PATCHES = {
    "MiniMamba-0.2-README.md": {},
    "MiniMamba-1.0.1-README.zh.md": {4: None},  # lines of a function, before and after
    "mamba.py-README.md": {
        1: [("import LM,", "import MambaLM,", "it imports LM and uses MambaLM")],
        2: [
            ("'state-spaces/mamba-130m'", "LOCAL_MAMBA", "no network"),
            ("'EleutherAI/gpt-neox-20b'", "LOCAL_TOKENIZER", "no network"),
            ('"cuda"', '"cpu"', "no GPU"),
        ],
        3: [("'TechxGenus/Mini-Jamba'", "LOCAL_JAMBA", "no network"), ('"cuda"', '"cpu"', "no GPU")],
    },
}


WORDS = ("[UNK]", "Mamba", "is", "a", "type", "of", "def", "min", "(", "arr", "):")


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Small checkpoints and a tokenizer in the place of those of the hub."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("hub")
    words = {word: number for number, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    sizes = {"d_model": 16, "n_layer": 2, "vocab_size": len(words)}
    attention = {"num_heads": 4, "num_kv_heads": 2, "attn_layer_period": 2, "attn_layer_offset": 1}
    hybrid = mc.JambaConfig(**sizes, **attention, d_intermediate=12)
    for name, config, layout in (("mamba", mc.MambaConfig(**sizes), "mamba_ssm"), ("jamba", hybrid, "hf")):
        mc.save(mc.build(config, backend="torch", device="cpu"), folder / name, layout=layout)
        fast.save_pretrained(folder / name)
    names = {"LOCAL_MAMBA": "mamba", "LOCAL_TOKENIZER": "mamba", "LOCAL_JAMBA": "jamba"}
    return {variable: str(folder / name) for variable, name in names.items()}


@pytest.mark.parametrize("readme", PATCHES)
def test_every_block_runs_with_another_import(readme, local):
    path = FOLDER / readme
    if not path.exists():
        pytest.skip(f"{readme} is not in {FOLDER.name}; $MAMBA_CORE_READMES names the folder")
    blocks, seen = re.findall(r"```python\n(.*?)```", path.read_text(errors="replace"), re.DOTALL), dict(local)
    assert blocks
    for number, block in enumerate(blocks):
        patches = PATCHES[readme].get(number, [])
        if patches is None:
            continue
        for pattern, ours in IMPORTS.items():
            block = re.sub(pattern, ours, block)
        for theirs, instead, _ in patches:
            assert theirs in block
            block = block.replace(theirs, instead)
        exec(compile(block, f"{readme}, block {number}", "exec"), seen)
    assert set(PATCHES[readme]) <= set(range(len(blocks)))
    check(readme, seen)


def check(readme: str, seen: dict) -> None:
    """What the blocks have left is right."""
    if readme.startswith("MiniMamba-0.2"):
        whole = seen["model"](torch.cat([seen["input1"], seen["input2"]], 1))
        torch.testing.assert_close(seen["logits2"][:, 0], whole[:, 1], rtol=1e-4, atol=1e-5)
    elif readme.startswith("MiniMamba"):
        assert seen["generated"].shape == (1, 60)
        assert seen["cache_info"]["memory_mb"] > 0
        assert seen["logits"].shape == (2, 128, 10000)
    else:
        assert seen["logits"].shape == (16, 64, 32000)
        assert isinstance(seen["output"], str)
