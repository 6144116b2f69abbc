"""Functions that only Whisper needs: its window, its language tokens, and comparing transcripts."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

# Whisper's features have 100 frames per second. Its encoder halves them to 50 positions per second.
_FRAMES = 100
_POSITIONS = 50
# Languages without spaces between words, for which errors are counted in characters.
_NO_SPACES = frozenset({"zh", "yue", "ja", "th", "lo", "my"})


def window_positions(seconds: float | None, config: Any) -> int:
    """The number of encoder positions of a window.

    Args:
        seconds: the window's length in seconds. None: the model's own window.
        config: a Whisper model's configuration.

    Raises:
        ValueError: the window is longer than the model's own.

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
    """Shorten the window of a Whisper model's encoder to its first ``positions``, which saves time and memory.

    Weights and saved configuration do not change, so an adapter that was trained with a short window works with the
    whole one. Longer input is cut, because ``generate`` pads input to the whole window with silence.

    Args:
        model: a ``WhisperForConditionalGeneration``, which is changed in place.
        positions: the number of positions, 50 per second.
    """
    encoder = model.get_encoder()
    if positions >= encoder.embed_positions.num_embeddings:
        return
    frames = positions * encoder.conv1.stride[0] * encoder.conv2.stride[0]

    # The encoder compares the length of its input with its configuration, so it needs its own copy.
    encoder.config = copy.deepcopy(encoder.config)
    encoder.config.max_source_positions = positions
    encoder.embed_positions.num_embeddings = positions
    _before_encoding(encoder, lambda features: features[..., :frames])


def accept_any_dtype(model: Any) -> None:
    """Let a Whisper model in half precision accept float32 features, because ``generate`` runs without autocast.

    Args:
        model: a ``WhisperForConditionalGeneration``, which is changed in place.
    """
    encoder = model.get_encoder()
    _before_encoding(encoder, lambda features: features.to(encoder.conv1.weight.dtype))


def _before_encoding(encoder: Any, change: Callable[[Any], Any]) -> None:
    """Apply ``change`` to an encoder's input features, given by name or by position."""

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if "input_features" in kwargs:
            return args, {**kwargs, "input_features": change(kwargs["input_features"])}
        return (change(args[0]), *args[1:]), kwargs

    encoder.register_forward_pre_hook(hook, with_kwargs=True)


def is_multilingual(config: Any, generation_config: Any = None) -> bool:
    """Whether a Whisper model knows languages other than English, and so requires a language.

    Args:
        config: the model's configuration.
        generation_config: the model's generation configuration, or None.
    """
    said = getattr(generation_config, "is_multilingual", None)
    return bool(said) if said is not None else config.vocab_size >= 51865


def language_code(language: str) -> str | None:
    """The code of a language that is given by English name or by code. None: Whisper does not know it.

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
    """Whether errors in a language are counted in characters, because it has no spaces between words."""
    return code in _NO_SPACES


def transcript_tokens(tokenizer: Any, texts: Sequence[str], code: str | None) -> list[list[int]]:
    """The labels of transcripts: the tokens of language and task, the text, and the end token.

    The start token is not among them, because the model adds it.

    Args:
        tokenizer: Whisper's tokenizer, set to the language and the task.
        texts: the transcripts.
        code: the language's code. As in Whisper's training, each text gets a leading space if the language has spaces.
    """
    space = "" if counts_characters(code) else " "
    found = tokenizer([space + text.strip() for text in texts]).input_ids
    start = tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
    return [ids[1:] if ids[0] == start else ids for ids in found]


def normalizer(tokenizer: Any, code: str | None) -> Callable[[str], str]:
    """A function that normalizes transcripts for comparison: case, punctuation and, in English, spellings and numbers.

    Args:
        tokenizer: Whisper's tokenizer, which may have a table of English spellings.
        code: the language's code. None: English.
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
    """The number of inserted, missing or wrong words per word of the references. Empty references are left out.

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
