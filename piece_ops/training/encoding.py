"""From rows of text to tensors: chat template or plain text, the loss mask, truncation, padding.

What the model sees of a row is ``<prompt tokens> <answer tokens> <end token>``:

* ``chat``: the prompt is one user turn of the tokenizer's chat template, up to and including the
  header of the answer; the end token is the one with which the template closes a turn.
* ``plain``: the prompt as it stands (with the tokenizer's own leading special tokens), then the
  answer, set off by one space unless the prompt ends in white space; the end token is the
  tokenizer's end-of-sequence token.

The loss counts the answer tokens and the end token; prompt and padding have the label -100. A row
longer than `max_tokens` loses the first tokens of its prompt (the answer and the words just before
it matter most); an answer that does not fit by itself is an error, unless `max_answer_tokens` lets
it be cut: it then ends where it is cut, without an end token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from piece_ops.training.tasks import Row

IGNORED = -100
"""The label that torch's cross entropy leaves out."""

FORMATS = ("auto", "chat", "plain")


@dataclass(frozen=True)
class EncodedRow:
    """One row as token ids; `answer` includes the end token."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


class Encoder:
    """Turns rows into token ids for one tokenizer.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        Must have an end-of-sequence token.
    form : {"auto", "chat", "plain"}
        ``"auto"`` takes the chat template if the tokenizer has one, else plain text.
    max_tokens : int
        Longest row in tokens, prompt, answer and end token together; at least 8.
    max_answer_tokens : int, optional
        Longest answer with its end token, at least 1; None: as long as it is.

    Attributes
    ----------
    form : str
        ``"chat"`` or ``"plain"``.
    end_id : int
        Token that ends an answer.
    pad_id : int
        Token that fills up a batch; it is masked and has no label, so which one it is does not
        matter.
    truncated : int
        How many rows lost tokens of their prompt so far.
    cut_answers : int
        How many rows lost tokens of their answer so far.

    Raises
    ------
    ValueError
        For an unknown form, a chat form without a template, or a limit below its least value.

    Examples
    --------
    >>> encoder = Encoder(tokenizer, "plain")  # doctest: +SKIP
    >>> encoder.encode(Row("1+1=", "2"))  # doctest: +SKIP
    """

    def __init__(
        self,
        tokenizer: Any,
        form: str = "auto",
        max_tokens: int = 512,
        max_answer_tokens: int | None = None,
    ) -> None:
        if form not in FORMATS:
            raise ValueError(
                f"piece_ops.Encoder: form must be one of {', '.join(FORMATS)}, got {form!r}"
            )
        if max_tokens < 8:
            raise ValueError(f"piece_ops.Encoder: max_tokens must be at least 8, got {max_tokens}")
        if max_answer_tokens is not None and max_answer_tokens < 1:
            raise ValueError(
                f"piece_ops.Encoder: max_answer_tokens must be at least 1, got {max_answer_tokens}"
            )
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if form == "chat" and not has_template:
            raise ValueError(
                "piece_ops.Encoder: form 'chat' needs a chat template, got a tokenizer without one"
            )
        self.tokenizer = tokenizer
        self.form = ("chat" if has_template else "plain") if form == "auto" else form
        self.max_tokens = max_tokens
        self.max_answer_tokens = max_answer_tokens
        self.end_id: int = self._turn_end() if self.form == "chat" else int(tokenizer.eos_token_id)
        pad_id = tokenizer.pad_token_id
        self.pad_id: int = int(tokenizer.eos_token_id if pad_id is None else pad_id)
        self.truncated = 0
        self.cut_answers = 0

    def _turn_end(self) -> int:
        """Find the token with which the chat template closes an answer; eos if it shows none."""
        turn = [{"role": "user", "content": "a"}]
        head = self._template(turn, add_generation_prompt=True)
        whole = self._template([*turn, {"role": "assistant", "content": "b"}])
        if whole.startswith(head + "b"):
            ids = self._plain_ids(whole[len(head) + 1 :])
            if ids and ids[0] in self.tokenizer.all_special_ids:
                return ids[0]
        return int(self.tokenizer.eos_token_id)

    def _template(self, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return str(text)

    def _plain_ids(self, text: str) -> list[int]:
        return [int(i) for i in self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    def _leading(self) -> list[int]:
        """Return the beginning-of-text token if the tokenizer adds one by itself."""
        bos = self.tokenizer.bos_token_id
        ids = self.tokenizer("a")["input_ids"]
        return [int(bos)] if bos is not None and ids and ids[0] == bos else []

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return the token ids of everything before the answer, not truncated."""
        if self.form == "chat":
            # The template writes its special tokens itself.
            return self._plain_ids(
                self._template([{"role": "user", "content": prompt}], add_generation_prompt=True)
            )
        ids = [int(i) for i in self.tokenizer(prompt)["input_ids"]]
        if ids and ids[-1] == self.tokenizer.eos_token_id:
            ids.pop()  # some tokenizers close every text with it; the answer comes first
        return ids

    def encode(self, row: Row) -> EncodedRow:
        """Encode one row.

        Parameters
        ----------
        row : Row

        Returns
        -------
        EncodedRow
            At most `max_tokens` long.

        Raises
        ------
        ValueError
            If the answer and the end token leave no room for any prompt token.
        """
        answer = row.answer
        if self.form == "plain" and not row.prompt[-1:].isspace():
            answer = " " + answer
        answer_ids = [*self._plain_ids(answer), self.end_id]
        if self.max_answer_tokens is not None and len(answer_ids) > self.max_answer_tokens:
            self.cut_answers += 1
            answer_ids = answer_ids[: self.max_answer_tokens]
        room = self.max_tokens - len(answer_ids)
        if room < 1:
            raise ValueError(
                "piece_ops.Encoder: an answer and its end token must take at most "
                f"{self.max_tokens - 1} tokens "
                f"(max_tokens {self.max_tokens}), got {len(answer_ids)} for {row.answer[:40]!r}; "
                "max_answer_tokens cuts longer ones"
            )
        prompt = self.prompt_ids(row.prompt)
        if len(prompt) > room:
            self.truncated += 1
            prompt = prompt[-room:]
        return EncodedRow(tuple(prompt), tuple(answer_ids))

    def encode_all(self, rows: Sequence[Row]) -> list[EncodedRow]:
        """Encode rows in order."""
        return [self.encode(row) for row in rows]

    def training_batch(self, rows: Sequence[EncodedRow], device: Any = "cpu") -> dict[str, Tensor]:
        """Collate rows for a forward pass with loss: padded on the right.

        Parameters
        ----------
        rows : sequence of EncodedRow, B of them
        device : torch.device or str

        Returns
        -------
        dict
            ``input_ids``, ``attention_mask``, ``labels``: int64, shape [B, longest row].
        """
        length = max(len(row) for row in rows)
        ids, mask, labels = [], [], []
        for row in rows:
            fill = length - len(row)
            ids.append([*row.prompt, *row.answer, *[self.pad_id] * fill])
            mask.append([1] * len(row) + [0] * fill)
            labels.append([IGNORED] * len(row.prompt) + list(row.answer) + [IGNORED] * fill)
        return {
            "input_ids": torch.tensor(ids, device=device),
            "attention_mask": torch.tensor(mask, device=device),
            "labels": torch.tensor(labels, device=device),
        }

    def generation_batch(
        self, rows: Sequence[EncodedRow], device: str = "cpu"
    ) -> dict[str, Tensor]:
        """Collate the prompts of rows for ``generate``: padded on the left, so all answers align.

        Parameters
        ----------
        rows : sequence of EncodedRow, B of them
        device : torch.device or str

        Returns
        -------
        dict
            ``input_ids``, ``attention_mask``: int64, shape [B, longest prompt].
        """
        length = max(len(row.prompt) for row in rows)
        ids = [[self.pad_id] * (length - len(row.prompt)) + list(row.prompt) for row in rows]
        mask = [[0] * (length - len(row.prompt)) + [1] * len(row.prompt) for row in rows]
        return {
            "input_ids": torch.tensor(ids, device=device),
            "attention_mask": torch.tensor(mask, device=device),
        }

    def text_windows(
        self, text: str, window: int, most_tokens: int | None = None
    ) -> list[list[int]]:
        """Cut a text into windows of token ids that do not overlap.

        Parameters
        ----------
        text : str
        window : int
            Tokens a window, at least 2. The last one may be shorter (but has at least 2). Where the
            tokenizer puts a beginning-of-text token before every text, each window gets one in
            addition.
        most_tokens : int, optional
            Use only this many tokens from the start of the text.

        Returns
        -------
        list of list of int

        Raises
        ------
        ValueError
            If `window` is below 2 or the text has fewer than 2 tokens.
        """
        if window < 2:
            raise ValueError(
                f"piece_ops.Encoder: a window must have at least 2 tokens, got {window}"
            )
        ids = self._plain_ids(text)[:most_tokens]
        windows = [ids[start : start + window] for start in range(0, len(ids), window)]
        windows = [self._leading() + part for part in windows if len(part) >= 2]
        if not windows:
            raise ValueError(
                f"piece_ops.Encoder: a text must have at least 2 tokens, got {len(ids)}"
            )
        return windows


def chunks(rows: Sequence[EncodedRow], size: int) -> Iterator[list[EncodedRow]]:
    """Yield consecutive groups of at most `size` rows."""
    for start in range(0, len(rows), size):
        yield list(rows[start : start + size])
