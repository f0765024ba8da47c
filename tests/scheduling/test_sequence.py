import pytest

from tandem.core.request import FinishReason, GenerationRequest, SamplingParams
from tandem.scheduling.sequence import Sequence, SequenceState

_EOS = frozenset({9})


def _sequence(sampling: SamplingParams, token_ids: tuple[int, ...] = (1, 2, 3), num_output_tokens: int = 0) -> Sequence:
    return Sequence("k", GenerationRequest("r", token_ids, sampling, num_output_tokens), arrival_s=0.0)


@pytest.mark.parametrize(
    ("sampling", "token_id", "max_model_len", "expected"),
    [
        (SamplingParams(max_tokens=5), 4, 100, None),
        (SamplingParams(max_tokens=5), 9, 100, FinishReason.STOP),
        (SamplingParams(max_tokens=5, ignore_eos=True), 9, 100, None),
        (SamplingParams(max_tokens=5, ignore_eos=True, stop_token_ids=(9,)), 9, 100, FinishReason.STOP),
        (SamplingParams(max_tokens=5, stop_token_ids=(4,)), 4, 100, FinishReason.STOP),
        (SamplingParams(max_tokens=1), 4, 100, FinishReason.LENGTH),
        (SamplingParams(max_tokens=1), 9, 100, FinishReason.STOP),
        (SamplingParams(max_tokens=5), 4, 4, FinishReason.LENGTH),
        (SamplingParams(max_tokens=5), 4, 5, None),
    ],
)
def test_finish_reason(
    sampling: SamplingParams, token_id: int, max_model_len: int, expected: FinishReason | None
) -> None:
    sequence = _sequence(sampling)
    sequence.append(token_id)
    assert sequence.finish_reason_after(token_id, _EOS, max_model_len) is expected


def test_tokens_of_earlier_attempts_count_as_generated() -> None:
    sequence = _sequence(SamplingParams(max_tokens=3), (1, 2, 3), num_output_tokens=2)
    assert (sequence.num_tokens, sequence.num_generated) == (3, 2)
    sequence.append(4)
    assert sequence.finish_reason_after(4, _EOS, 100) is FinishReason.LENGTH


def test_the_request_keeps_its_tokens() -> None:
    sequence = _sequence(SamplingParams())
    sequence.append(4)
    assert sequence.request.token_ids == (1, 2, 3)
    assert sequence.token_ids == [1, 2, 3, 4]


def test_only_documented_state_changes_are_allowed() -> None:
    sequence = _sequence(SamplingParams())
    with pytest.raises(AssertionError, match="from waiting to held"):
        sequence.move_to(SequenceState.HELD)
    sequence.move_to(SequenceState.RUNNING)
    sequence.move_to(SequenceState.HELD)
    sequence.move_to(SequenceState.FINISHED)
    for state in SequenceState:
        with pytest.raises(AssertionError):
            sequence.move_to(state)
