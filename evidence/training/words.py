"""Tokenizer for captions: one token per word of a world, and one for unknown words."""

from collections.abc import Sequence

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Generator, Tensor

LENGTH = 24  # tokens of a caption with start and end; the longest caption of shapes has 17 words
START, END, UNKNOWN = "<start>", "<end>", "<unknown>"


def make_tokenizer(words: Sequence[str]) -> Tokenizer:
    """Return a tokenizer that lowercases, removes punctuation, adds start and end, and splits at whitespace."""
    vocabulary = {word: number for number, word in enumerate((START, END, UNKNOWN, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex("[^a-z<>]+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(mark, vocabulary[mark]) for mark in (START, END)]
    )
    return tokenizer


def tokens_of(tokenizer: Tokenizer, captions: list[str]) -> Tensor:
    """Return the tokens of captions, padded with end tokens like CLIP's, [captions, LENGTH] int64."""
    end = tokenizer.token_to_id(END)
    rows = [[*encoded.ids[: LENGTH - 1], end][:LENGTH] for encoded in tokenizer.encode_batch(captions)]
    return torch.tensor([row + [end] * (LENGTH - len(row)) for row in rows])


def roughen(caption: str, generator: Generator) -> str:
    """Return the caption as a user might write it: sometimes empty, without a ground, or with unknown words."""
    chance = torch.rand(3, generator=generator).tolist()
    if chance[0] < 0.1:
        return ""
    if chance[1] < 0.1:
        caption = caption[: caption.index(" on ")]
    words = caption.split()
    if chance[2] < 0.2:
        for _ in range(int(torch.randint(1, 4, (), generator=generator))):
            words.insert(int(torch.randint(len(words) + 1, (), generator=generator)), UNKNOWN)
    return " ".join(words)
