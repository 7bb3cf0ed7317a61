"""What one request has produced so far: checks each output's epoch and index, turns tokens into text. Pure.

`take` accepts only the next index of a choice under the highest epoch seen; everything else is named by a verdict and
leaves no trace, so that a repeated, late or damaged frame never reaches a client.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from gateway.text.choice import ChoiceText
from gateway.types import Delta, Finish, Progress, TokenLogprob
from llmos.errors import InternalError, InvalidRequest
from llmos.internal.v1 import journal_pb2, request_pb2
from llmos.v1 import inference_pb2

_REASON: dict[Finish, inference_pb2.FinishReason.ValueType] = {
    "stop": inference_pb2.FINISH_REASON_STOP,
    "length": inference_pb2.FINISH_REASON_LENGTH,
}
_FINISH: dict[int, Finish] = {reason: finish for finish, reason in _REASON.items()}


class Verdict(Enum):
    """What became of an output."""

    TAKEN = "taken"
    STALE = "stale"
    """Of an epoch below the highest seen."""
    DUPLICATE = "duplicate"
    """All of it was there already."""
    GAP = "gap"
    """Something before it is missing."""
    CORRUPT = "corrupt"
    """It contradicts the request."""


@dataclass(slots=True)
class Taken:
    """The outcome of one output."""

    verdict: Verdict
    delta: Delta | None = None
    keep_until: int | None = None
    """Set when a stop string ended the choice before its producer did: tokens from here on aren't wanted."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What outputs of a request must look like."""

    choices: int
    max_tokens: int
    """Per choice."""
    vocab_size: int
    logprobs: bool


class _Choice:
    def __init__(self, text: ChoiceText) -> None:
        self.text = text
        self.tokens = array("I")
        self.finished = False
        self.reason: inference_pb2.FinishReason.ValueType = inference_pb2.FINISH_REASON_UNSPECIFIED
        """Why it ended, as far as is known."""

    def end(self, finish: Finish | None) -> None:
        """It has ended; None: it is not known why."""
        self.finished = True
        if finish is not None:
            self.reason = _REASON[finish]


class Transcript:
    """Owned by one stream. `new_text` makes the text state of a choice, `spell` a token's bytes for logprobs."""

    def __init__(self, shape: Shape, new_text: Callable[[], ChoiceText], spell: Callable[[int], bytes]) -> None:
        self._shape = shape
        self._spell = spell
        self._choices = [_Choice(new_text()) for _ in range(shape.choices)]
        self._open = shape.choices
        self._epoch = (0, 0)
        self._first_epoch: tuple[int, int] | None = None
        self.cached_tokens = 0
        """Prompt tokens that the first attempt found in a prefix cache; later ones are not the client's concern."""

    @property
    def epoch(self) -> tuple[int, int]:
        """Highest `(term, attempt)` seen."""
        return self._epoch

    @property
    def finished(self) -> bool:
        """Every choice has ended."""
        return self._open == 0

    @property
    def completion_tokens(self) -> int:
        """Tokens of all choices, those of a resume included."""
        return sum(len(choice.tokens) for choice in self._choices)

    def resume(self, progress: Sequence[Progress]) -> list[Delta]:
        """Take up what a client already holds; returns what it lacks although its tokens say it. Call once, first.

        Raises InvalidRequest where the progress contradicts the request.
        """
        if len({held.choice for held in progress}) < len(progress):
            raise InvalidRequest("A choice is named twice.", param="resume.choices")
        deltas = [self._resume_choice(held) for held in progress]
        return [delta for delta in deltas if delta is not None]

    def resume_state(self) -> list[request_pb2.ChoiceResume]:
        """What a scheduler must know to go on from here; choices that have nothing yet are left out."""
        return [
            request_pb2.ChoiceResume(
                choice=number, token_ids=choice.tokens, finished=choice.finished, finish_reason=choice.reason
            )
            for number, choice in enumerate(self._choices)
            if choice.tokens or choice.finished
        ]

    def replay(self, said: journal_pb2.JournalChoice, held: int) -> list[Delta]:
        """Take up what the fleet remembers of a choice, of which the client has `held` tokens: all of it, in two parts
        that meet there, or up to there where the rest lacks log-probabilities and must be computed again. Call first.

        Raises InternalError where it contradicts the request.
        """
        shape, token_ids = self._shape, said.token_ids[:]
        sound = said.choice < shape.choices and len(token_ids) <= shape.max_tokens
        if not sound or (token_ids and max(token_ids) >= shape.vocab_size):
            raise InternalError("what is remembered of a stream is not of its request")
        choice, finished = self._choices[said.choice], said.finished
        known_from = len(token_ids) - len(said.logprobs) if shape.logprobs else 0
        if known_from > held:
            token_ids, finished, known_from = token_ids[:held], False, held
        finished = finished or len(token_ids) >= shape.max_tokens
        if token_ids:
            self._first_epoch = (0, 0)
        logprobs = said.logprobs[max(0, held - known_from) :] if shape.logprobs else []
        cut = min(held, len(token_ids)) if 0 < held < len(token_ids) else 0
        deltas = [self._replay_part(said, choice, token_ids[:cut], (), False)] if cut else []
        if not choice.finished and (finished or cut < len(token_ids)):
            rest = () if held >= len(token_ids) else logprobs
            deltas.append(self._replay_part(said, choice, token_ids[cut:], rest, finished))
        return deltas

    def _replay_part(
        self,
        said: journal_pb2.JournalChoice,
        choice: _Choice,
        token_ids: Sequence[int],
        logprobs: Sequence[request_pb2.LogprobEntry],
        finished: bool,
    ) -> Delta:
        index = len(choice.tokens)
        piece = choice.text.push(token_ids)
        text, stopped = piece.text, piece.stopped
        choice.tokens.extend(token_ids[: piece.taken])
        if finished and not stopped:
            last = choice.text.end()
            text, stopped = text + last.text, last.stopped
        finish: Finish | None = "stop" if stopped else None
        if finished and not stopped:
            is_full = len(choice.tokens) >= self._shape.max_tokens
            finish = _FINISH.get(said.finish_reason, "length" if is_full else "stop")
        if finish is not None:
            choice.end(finish)
            self._open -= 1
        spoken = tuple(map(self._logprob, logprobs[: piece.taken]))
        taken = tuple(token_ids[: piece.taken])
        return Delta(said.choice, index, text, taken, spoken, finish, parts=piece.parts)

    def take(self, output: request_pb2.Output) -> Taken:
        """Add an output if it is the next of its choice; tokens that are there already are skipped."""
        wire_epoch = output.epoch
        epoch = (wire_epoch.term, wire_epoch.attempt)
        token_ids = output.token_ids[:]
        verdict = self._judge(output, epoch, token_ids)
        if verdict is not Verdict.TAKEN:
            return Taken(verdict)
        choice = self._choices[output.choice]
        if epoch != self._epoch or not choice.tokens:
            self._begin_attempt(epoch, output)
        known = len(choice.tokens) - output.index
        return self._extend(output, choice, token_ids[known:] if known else token_ids)

    def _begin_attempt(self, epoch: tuple[int, int], output: request_pb2.Output) -> None:
        self._epoch = epoch
        self._first_epoch = self._first_epoch or epoch
        if epoch == self._first_epoch:
            self.cached_tokens = max(self.cached_tokens, output.cached_tokens)

    def _judge(self, output: request_pb2.Output, epoch: tuple[int, int], token_ids: Sequence[int]) -> Verdict:
        if epoch < self._epoch:
            return Verdict.STALE
        shape, index, finish = self._shape, output.index, output.finish_reason
        count = len(token_ids)
        end = index + count
        is_sound = (
            output.choice < shape.choices
            and end <= shape.max_tokens
            and (max(token_ids) < shape.vocab_size if count else finish != 0)
            and len(output.logprobs) == (count if shape.logprobs else 0)
            and (finish == 0 or finish in _FINISH)
        )
        if not is_sound:
            return Verdict.CORRUPT
        choice = self._choices[output.choice]
        if choice.finished:
            return Verdict.DUPLICATE
        have = len(choice.tokens)
        if index > have:
            return Verdict.GAP
        is_new = end > have or (finish and end == have)
        return Verdict.TAKEN if is_new else Verdict.DUPLICATE

    def _extend(self, output: request_pb2.Output, choice: _Choice, token_ids: Sequence[int]) -> Taken:
        index = len(choice.tokens)
        piece = choice.text.push(token_ids)
        text, stopped = piece.text, piece.stopped
        given = len(token_ids)
        if piece.taken < given:
            token_ids = token_ids[: piece.taken]
        choice.tokens.extend(token_ids)
        finish = _FINISH.get(output.finish_reason)
        if finish and not stopped:
            last = choice.text.end()
            text, stopped = text + last.text, last.stopped
        if stopped or finish is not None:
            choice.end("stop" if stopped else finish)
            self._open -= 1
        ended_early = stopped and (finish is None or piece.taken < given)
        delta = Delta(
            choice=output.choice,
            index=index,
            text=text,
            token_ids=tuple(token_ids),
            logprobs=self._logprobs(output, given, piece.taken) if self._shape.logprobs else (),
            finish="stop" if stopped else finish,
            parts=piece.parts,
        )
        return Taken(Verdict.TAKEN, delta, len(choice.tokens) if ended_early else None)

    def _logprobs(self, output: request_pb2.Output, given: int, taken: int) -> tuple[TokenLogprob, ...]:
        """Of the tokens that were taken, of those that were new and given to the text."""
        known = len(output.logprobs) - given
        return tuple(map(self._logprob, output.logprobs[known : known + taken]))

    def _logprob(self, entry: request_pb2.LogprobEntry) -> TokenLogprob:
        top = [
            self._entry(token_id, logprob)
            for token_id, logprob in zip(entry.top_token_ids, entry.top_logprobs, strict=False)
        ]
        return self._entry(entry.token_id, entry.logprob, tuple(top))

    def _entry(self, token_id: int, logprob: float, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        raw = self._spell(token_id)
        return TokenLogprob(token_id, raw.decode(errors="replace"), raw, logprob, top)

    def _resume_choice(self, held: Progress) -> Delta | None:
        self._check_progress(held)
        choice = self._choices[held.choice]
        piece = choice.text.push(held.token_ids)
        text, stopped = piece.text, piece.stopped
        choice.tokens.extend(held.token_ids[: piece.taken])
        used_up = len(choice.tokens) >= self._shape.max_tokens
        if (held.finished or used_up) and not stopped:
            last = choice.text.end()
            text, stopped = text + last.text, last.stopped
        ended: Finish | None = "stop" if stopped else "length" if used_up else None
        if held.finished or ended is not None:
            choice.end(ended if stopped or not held.finished else None)
            self._open -= 1
        if held.text_chars > len(text) or piece.taken < len(held.token_ids):
            raise InvalidRequest("The tokens held don't give the text held.", param="resume.choices.text_chars")
        finish = None if held.finished else ended
        missing = text[held.text_chars :]
        if not missing and finish is None:
            return None
        return Delta(held.choice, len(choice.tokens), missing, (), (), finish)

    def _check_progress(self, held: Progress) -> None:
        if held.choice >= self._shape.choices:
            raise InvalidRequest("There is no such choice.", param="resume.choices.choice")
        if len(held.token_ids) > self._shape.max_tokens:
            raise InvalidRequest("More tokens are held than asked for.", param="resume.choices.token_ids")
        if any(token_id >= self._shape.vocab_size for token_id in held.token_ids):
            raise InvalidRequest("A token id is not in the vocabulary.", param="resume.choices.token_ids")
