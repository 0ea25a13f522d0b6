"""A tiny Llama from a fixed seed: a fleet can serve and be tested without a model hub."""

import os
import shutil
import tempfile
from pathlib import Path

SEED = 2024
BOS, EOS = "<s>", "</s>"
PRINTABLE = range(ord(" "), ord("~") + 1)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def build(folder: Path) -> None:
    """Writes the model, tokenizer and generation config to `folder`, which must not exist.

    Every build writes the same bytes. The folder appears complete or not at all.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists")
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _write_tokenizer(scratch)
        _write_model(scratch)
        for path in (scratch, *scratch.iterdir()):  # mkdtemp and safetensors make theirs private
            path.chmod(0o755 if path.is_dir() else 0o644)
        os.rename(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _byte_symbols() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte, as the byte-level coder of `tokenizers` uses."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + position) for position, byte in enumerate(others)
    }


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {symbol: byte for byte, symbol in sorted(_byte_symbols().items())}  # id = byte value
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(BOS, special=True), AddedToken(EOS, special=True)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
    ).save_pretrained(folder)


def _write_model(folder: Path) -> None:
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=8192,
        # Ten times the usual: with 0.02, greedy output repeats one token and compares nothing.
        initializer_range=0.3,
        bos_token_id=256,
        eos_token_id=257,
        tie_word_embeddings=False,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(SEED)
        model = LlamaForCausalLM(config)
        # Only printable ASCII is ever likely: the answers can be read, and none ends by chance.
        silent = torch.ones(config.vocab_size, dtype=torch.bool)
        silent[list(PRINTABLE)] = False
        model.lm_head.weight[silent] = 0.0
    model.generation_config = GenerationConfig(bos_token_id=256, eos_token_id=257)
    model.save_pretrained(folder)


def main(folder: Path) -> int:
    """Builds the model unless the folder is there. The exit code is 0 where it is, afterwards."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        build(folder)
    except FileExistsError as error:
        print(f"{error}: left as it is")
    return 0
