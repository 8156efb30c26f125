"""Text generation from prompts: complete texts in batches, or streamed texts."""

from __future__ import annotations

import codecs
import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from restomod.config.run import Device, Precision, SamplingConfig
from restomod.data.tokenizer import END_OF_TEXT, Tokenizer, gpt2_tokenizer
from restomod.engine.device import choose_device, choose_dtype
from restomod.generate.decode import (
    Prompt,
    cache_is_exact,
    generate,
    generate_with_transformers,
    max_rows,
)
from restomod.model.gpt import GPT
from restomod.model.hf_format import UnsupportedModel
from restomod.model.hf_io import read_model_config
from restomod.model.hf_models import TransformersModel, open_causal_model
from restomod.runs.open_model import find_model
from restomod.utils.errors import UserError, describe_os_error
from restomod.utils.files import read_limited

MAX_PROMPT_BYTES = 32 * 2**20  # maximum size of a prompt file


def continuations(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    n_samples: int,
    sampling: SamplingConfig,
    seed: int,
    dtype: torch.dtype,
) -> list[list[str]]:
    """Continue each prompt ``n_samples`` times, until ``<|endoftext|>`` or ``sampling.max_tokens``.

    The texts of a prompt depend on the model, the prompt and the seed, not on the other prompts.

    Args:
        model: model to sample from.
        tokenizer: tokenizer of the model.
        prompts: texts to continue.
        n_samples: number of texts per prompt.
        sampling: sampling settings.
        seed: seed of the random numbers.
        dtype: compute dtype.

    Returns:
        List of texts for each prompt, without the prompt.
    """
    samples = [Prompt(prompt_tokens(tokenizer, prompt), i) for prompt in prompts for i in range(n_samples)]
    longest = max((len(prompt.tokens) for prompt in samples), default=0)
    batch = max_rows(model.config, longest, sampling.max_tokens, dtype)
    texts: list[list[int]] = [[] for _ in samples]
    for start in range(0, len(samples), batch):
        for new in generate(model, samples[start : start + batch], sampling, seed, dtype):
            for i, token in new.items():
                texts[start + i].append(token)
    decoded = [tokenizer.decode([token for token in text if token != END_OF_TEXT]) for text in texts]
    return [decoded[start : start + n_samples] for start in range(0, len(decoded), n_samples)]


def stream_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    number: int,
    sampling: SamplingConfig,
    seed: int,
    dtype: torch.dtype,
) -> Iterator[str]:
    """Yield a text in pieces of complete characters; joined, they equal the text of `continuations`.

    ``number`` is the index of the sample.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for new in generate(model, [Prompt(prompt_tokens(tokenizer, prompt), number)], sampling, seed, dtype):
        if new[0] != END_OF_TEXT:
            yield decoder.decode(tokenizer.decode_bytes([new[0]]))
    yield decoder.decode(b"", final=True)


def stream_text_with_transformers(
    opened: TransformersModel, prompt: str, number: int, sampling: SamplingConfig, seed: int, cached: bool
) -> Iterator[str]:
    """Yield a text in pieces, like `stream_text`, from a model of `transformers`.

    ``cached`` is explained in `generate_with_transformers`.
    """

    def text_of(ids: list[int]) -> str:
        return str(opened.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    context = opened.encode(prompt, begin=True)
    tokens = generate_with_transformers(opened, Prompt(context, number), sampling, seed, cached)
    ids = list(context)
    end = len(text_of(ids))
    for token in tokens:
        ids.append(token)
        text = text_of(ids)
        if not text.endswith("\ufffd"):
            yield text[end:]
            end = max(end, len(text))
    yield text_of(ids)[end:]


def prompt_tokens(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Encode a prompt to token ids.

    ``<|endoftext|>`` in a prompt becomes the token that starts a document. An empty prompt becomes this token.
    """
    return tokenizer.encode_special(prompt).tolist() or [END_OF_TEXT]


def choose_prompts(prompts: tuple[str, ...], file: str | None, default: tuple[str, ...]) -> tuple[str, ...]:
    """Choose the prompts: ``prompts``, or the lines of a file that are not blank, or ``default``.

    Raises:
        UserError: both prompts and a file are given, or the file is unreadable, not UTF-8 text, or has no prompts.
    """
    if file is None:
        return prompts or default
    if prompts:
        raise UserError("--prompt and --prompt-file cannot be combined: use one of them")
    if not file:
        raise UserError("--prompt-file needs a file name: a text file with one prompt per line")
    path = Path(file)
    try:
        content = read_limited(path, "prompt file", MAX_PROMPT_BYTES)
        lines = re.split("\r\n|\n|\r", content.decode("utf-8-sig"))  # str.splitlines would also split at U+2028
    except UnicodeDecodeError as e:
        raise UserError(
            f"--prompt-file {path} is not UTF-8 text: byte 0x{e.object[e.start]:02x} at offset {e.start} ({e.reason})"
        ) from None
    except OSError as e:
        raise UserError(
            f"--prompt-file {describe_os_error(e)}; it must be a text file with one prompt per line"
        ) from None
    found = tuple(line for line in lines if line.strip())
    if not found:
        raise UserError(f"--prompt-file {path} has no prompts: write one per line")
    return found


def find_readable_model(where: str) -> Path:
    """Find the folder of a model (see `find_model`), and check its configuration.

    Raises:
        UserError: the model does not exist, or is damaged.
    """
    folder = find_model(where)
    with contextlib.suppress(UnsupportedModel):  # transformers may support it
        read_model_config(folder)
    return folder


def sample_texts(
    where: str,
    prompts: Sequence[str],
    n_samples: int,
    sampling: SamplingConfig,
    seed: int,
    device: Device = "auto",
    precision: Precision = "auto",
    folder: Path | None = None,
) -> list[list[str]]:
    """Continue each prompt ``n_samples`` times.

    Args:
        where: run, checkpoint, model folder or hub name.
        prompts: texts to continue; an empty prompt starts a new document.
        n_samples: number of texts per prompt.
        sampling: sampling settings.
        seed: seed of the random numbers.
        device: device of the model.
        precision: compute dtype.
        folder: result of `find_readable_model` for ``where``; None calls it.

    Returns:
        List of texts for each prompt, without the prompt.

    Raises:
        UserError: the model does not exist or is damaged, or its logits are not finite.
    """
    model, dtype = _open(where, device, precision, folder)
    if isinstance(model, GPT):
        return continuations(model, gpt2_tokenizer(), prompts, n_samples, sampling, seed, dtype)
    texts = _streams(model, prompts, n_samples, sampling, seed, dtype)
    return [["".join(next(texts)) for _ in range(n_samples)] for _ in prompts]


def stream_texts(
    where: str,
    prompts: Sequence[str],
    n_samples: int,
    sampling: SamplingConfig,
    seed: int,
    device: Device = "auto",
    precision: Precision = "auto",
) -> Iterator[Iterator[str]]:
    """Yield the texts of `sample_texts` sequentially, each as an iterator of pieces."""
    model, dtype = _open(where, device, precision)
    yield from _streams(model, prompts, n_samples, sampling, seed, dtype)


def _open(
    where: str, device: Device, precision: Precision, folder: Path | None = None
) -> tuple[GPT | TransformersModel, torch.dtype]:
    target = choose_device(device)
    dtype = choose_dtype(precision, target)
    return open_causal_model(where, folder or find_readable_model(where), target, dtype), dtype


def _streams(
    model: GPT | TransformersModel,
    prompts: Sequence[str],
    n_samples: int,
    sampling: SamplingConfig,
    seed: int,
    dtype: torch.dtype,
) -> Iterator[Iterator[str]]:
    cached = not isinstance(model, GPT) and cache_is_exact(model.model)
    for prompt in prompts:
        for number in range(n_samples):
            if isinstance(model, GPT):
                yield stream_text(model, gpt2_tokenizer(), prompt, number, sampling, seed, dtype)
            else:
                yield stream_text_with_transformers(model, prompt, number, sampling, seed, cached)
