"""`python -m tests.faults.doubles.model STORE`: a tiny random Llama with a tokenizer that knows JSON, in a model store.

In a process of its own, so that the harness need not import torch.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

NAME = "tiny"
CONTEXT = 2048


def make(store: Path) -> None:
    """Write the model into the store; the same one each time."""
    import torch
    import transformers

    from llmos.store import Store, import_model
    from tests.fakes import json_tokens
    from tests.fakes.models import TEMPLATE

    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=json_tokens.SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.4,
        bos_token_id=json_tokens.OTHER,
        eos_token_id=json_tokens.END,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = json_tokens.write(Path(name))
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        ends = {"bos_token": "<|other|>", "eos_token": "<|end|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(ends))
        (folder / "chat_template.jinja").write_text(TEMPLATE)
        import_model(Store(store), str(folder), name=NAME, environ={})


if __name__ == "__main__":
    make(Path(sys.argv[1]))
