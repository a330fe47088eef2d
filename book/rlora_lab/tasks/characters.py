"""The characters of the tiny base, for code that is written for transformers' tokenizers."""

from collections.abc import Sequence

from .strings import VOCABULARY, decode, encode


class Characters:
    """`encode` and `decode`, and what else is asked of a tokenizer here."""

    pad_token_id, chat_template = 0, None
    eos_token_id = VOCABULARY.index("=")  # for files whose answers end

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        return {"input_ids": self.encode(text)}

    def encode(self, text: str) -> list[int]:
        """ValueError: a character that the base does not know."""
        if strange := sorted(set(text) - set(VOCABULARY)):
            raise ValueError(f"unknown characters {strange}; allowed are {VOCABULARY}")
        return encode(text).tolist()

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return decode(ids)
