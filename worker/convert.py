"""Turn a GGUF file into what transformers loads: safetensors in float32, tokenizer.json, config, chat template.

    python -m worker.convert --gguf FILE --out DIR

DIR must not exist; it appears only when complete. Progress is one JSON object per line on standard output:
`{"step": 1, "steps": 3, "label": "..."}`. Weights become float32, the type that the de-quantization computes in.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils import logging

from llmos.store.gguf import read_metadata

SHARD_SIZE = "20GB"
DIGIT_SPLITTERS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
"""Values of tokenizer.ggml.pre whose vocabularies were trained on single digits; transformers' reader splits none."""
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|eom_id|>", "<|return|>", "<turn|>")
"""Tokens that end an assistant's turn. One that the chat template writes ends generation, besides the file's EOS."""
STRAY_CONFIG_KEYS = ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version")
STRAY_TOKENIZER_KEYS = ("is_local", "local_files_only", "name_or_path")


def convert(gguf: Path, out: Path) -> None:
    """Write the model in `gguf` to the new folder `out`. Raises what transformers raises for files it cannot read."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        metadata = read_metadata(gguf)
        report(1, "tokenizer")
        tokenizer, template = save_tokenizer(gguf, partial, metadata)
        report(2, "weights")
        model = load(gguf)
        report(3, "safetensors")
        save_model(model, partial, end_tokens(model, tokenizer, template))
        partial.chmod(0o755)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial)
        raise


def save_tokenizer(gguf: Path, out: Path, metadata: Mapping[str, Any]) -> tuple[Tokenizer, str]:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja; returns the tokenizer and the template."""
    loaded = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend: Tokenizer = loaded.backend_tokenizer
    if metadata.get("tokenizer.ggml.pre") in DIGIT_SPLITTERS:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    loaded.save_pretrained(out)
    context = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    rewrite(out / "tokenizer_config.json", STRAY_TOKENIZER_KEYS, {"model_max_length": context} if context else {})
    return backend, loaded.chat_template or ""


def load(gguf: Path) -> PreTrainedModel:
    """The de-quantized model, rebuilt without a trace of its quantization.

    What transformers loads from GGUF still calls itself quantized and refuses to be saved; a fresh model of the same
    configuration adopts its tensors (no copy).
    """
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    kept = {key: value for key, value in loaded.config.to_dict().items() if key not in STRAY_CONFIG_KEYS}
    with torch.device("meta"):
        fresh: PreTrainedModel = type(loaded)(type(loaded.config).from_dict(kept))
    fresh.load_state_dict(loaded.state_dict(), assign=True)
    fresh.tie_weights()
    return fresh


def end_tokens(model: PreTrainedModel, tokenizer: Tokenizer, template: str) -> list[int]:
    """Token ids that end generation: the file's own, then the end-of-turn tokens that the chat template writes."""
    own = model.config.eos_token_id
    ids = [own] if isinstance(own, int) else list(own or [])
    turns = [tokenizer.token_to_id(token) for token in END_OF_TURN if token in template]
    return list(dict.fromkeys(ids + [token for token in turns if token is not None]))


def save_model(model: PreTrainedModel, out: Path, eos: list[int]) -> None:
    """Write config.json, generation_config.json and the weights."""
    config = model.config
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        pad_token_id=config.pad_token_id,
        eos_token_id=eos[0] if len(eos) == 1 else eos or None,
    )
    model.save_pretrained(out, max_shard_size=SHARD_SIZE)
    for name in ("config.json", "generation_config.json"):
        rewrite(out / name, STRAY_CONFIG_KEYS, {})


def rewrite(path: Path, without: tuple[str, ...], extra: Mapping[str, Any]) -> None:
    """Drop and set keys of a JSON file: traces of this machine or of the conversion would change a version's hash."""
    content = {key: value for key, value in json.loads(path.read_text()).items() if key not in without}
    path.write_text(json.dumps({**content, **extra}, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def report(step: int, label: str) -> None:
    """One line of progress. Fails when the importer is gone, which ends the conversion."""
    sys.stdout.write(json.dumps({"step": step, "steps": 3, "label": label}) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Entry point of `python -m worker.convert`."""
    parser = argparse.ArgumentParser(prog="python -m worker.convert", description=__doc__)
    parser.add_argument("--gguf", type=Path, required=True, help="the file to read")
    parser.add_argument("--out", type=Path, required=True, help="the folder to make")
    options = parser.parse_args()
    logging.disable_progress_bar()
    convert(options.gguf.absolute(), options.out.absolute())


if __name__ == "__main__":
    main()
