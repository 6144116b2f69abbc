"""What is Whisper's own in training it: its window of time, its language tokens, its way to compare texts."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

# Whisper hears 100 frames a second, and halves them: its encoder has 50 positions a second.
_FRAMES = 100
_POSITIONS = 50
# Written without spaces between words: errors are counted in characters.
_NO_SPACES = frozenset({"zh", "yue", "ja", "th", "lo", "my"})


def window_positions(seconds: float | None, config: Any) -> int:
    """Encoder positions of a window of time.

    Args:
        seconds: its length; None for all that the model takes.
        config: the configuration of a Whisper model.

    Raises:
        ValueError: it is longer than what the model takes.

    Example:
        >>> from types import SimpleNamespace
        >>> window_positions(6.0, SimpleNamespace(max_source_positions=1500))
        300
    """
    most = int(config.max_source_positions)
    wanted = most if seconds is None else math.ceil(seconds * _POSITIONS)
    if wanted > most:
        raise ValueError(f"is {seconds:g}, but the model takes at most {most / _POSITIONS:g} seconds")
    return wanted


def shorten_window(model: Any, positions: int) -> None:
    """Let a Whisper model's encoder hear only the first ``positions`` of its window, so that it computes no more.

    No weight changes, and neither does the configuration that is saved: whatever is trained in a short window serves
    the whole one. Longer input is cut, as ``generate`` fills it up to the whole window with silence.

    Args:
        model: a ``WhisperForConditionalGeneration``, changed in place.
        positions: 50 a second.
    """
    encoder = model.get_encoder()
    if positions >= encoder.embed_positions.num_embeddings:
        return
    frames = positions * encoder.conv1.stride[0] * encoder.conv2.stride[0]

    # The encoder compares the length of its input with its configuration, which it else shares with the model.
    encoder.config = copy.deepcopy(encoder.config)
    encoder.config.max_source_positions = positions
    encoder.embed_positions.num_embeddings = positions
    _before_encoding(encoder, lambda features: features[..., :frames])


def accept_any_dtype(model: Any) -> None:
    """Let a Whisper model in half precision take float32 features, as ``generate`` runs outside of autocast.

    Args:
        model: a ``WhisperForConditionalGeneration``, changed in place.
    """
    encoder = model.get_encoder()
    _before_encoding(encoder, lambda features: features.to(encoder.conv1.weight.dtype))


def _before_encoding(encoder: Any, change: Callable[[Any], Any]) -> None:
    """Change the features that come into an encoder, by name or by position."""

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if "input_features" in kwargs:
            return args, {**kwargs, "input_features": change(kwargs["input_features"])}
        return (change(args[0]), *args[1:]), kwargs

    encoder.register_forward_pre_hook(hook, with_kwargs=True)


def is_multilingual(config: Any, generation_config: Any = None) -> bool:
    """Whether a Whisper model knows languages other than English, and so wants to be told which.

    Args:
        config: the model's configuration.
        generation_config: its configuration for generating, which may say so.
    """
    said = getattr(generation_config, "is_multilingual", None)
    return bool(said) if said is not None else config.vocab_size >= 51865


def language_code(language: str) -> str | None:
    """The code of a language by its English name or its code; None if Whisper does not know it.

    Example:
        >>> language_code("German"), language_code("de"), language_code("klingon")
        ('de', 'de', None)
    """
    from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

    name = language.lower()
    code = name if name in LANGUAGES else TO_LANGUAGE_CODE.get(name)
    return None if code is None else str(code)


def languages() -> list[str]:
    """The English names of the languages that Whisper knows."""
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    return list(LANGUAGES.values())


def counts_characters(code: str | None) -> bool:
    """Whether errors in a language are counted in characters, since it puts no spaces between words."""
    return code in _NO_SPACES


def transcript_tokens(tokenizer: Any, texts: Sequence[str], code: str | None) -> list[list[int]]:
    """The labels of transcripts: language and task, the text, and its end.

    The model puts the token of the start before them by itself, so that it is not among them.

    Args:
        tokenizer: Whisper's, with its prefix set.
        texts: the transcripts.
        code: of the language; a text begins with a space where words are parted by spaces, as in Whisper's training.
    """
    space = "" if counts_characters(code) else " "
    found = tokenizer([space + text.strip() for text in texts]).input_ids
    start = tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
    return [ids[1:] if ids[0] == start else ids for ids in found]


def normalizer(tokenizer: Any, code: str | None) -> Callable[[str], str]:
    """What makes two transcripts comparable: case, punctuation and, in English, spellings and numbers aside.

    Args:
        tokenizer: Whisper's; brings a table of English spellings, if its folder has one.
        code: of the language; None for English.
    """
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    made: Callable[[str], str]
    if code in (None, "en"):
        made = EnglishTextNormalizer(getattr(tokenizer, "english_spelling_normalizer", None) or {})
    else:
        made = BasicTextNormalizer(split_letters=counts_characters(code))
    return made


def word_error_rate(
    references: Sequence[str], guesses: Sequence[str], normalize: Callable[[str], str]
) -> float:
    """Words put in, left out or wrong, for each word of the references; texts without a word are left out.

    Example:
        >>> word_error_rate(["It is.", "..."], ["it was", "yes"], lambda text: text.lower().strip("."))
        0.5
    """
    import jiwer

    pairs = [(normalize(true), normalize(guess)) for true, guess in zip(references, guesses, strict=True)]
    pairs = [(true, guess) for true, guess in pairs if true]
    if not pairs:
        return 0.0
    return float(jiwer.wer([true for true, _ in pairs], [guess for _, guess in pairs]))
