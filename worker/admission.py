"""What a worker itself checks of a request: no router is trusted to be sane, and no bad token must reach a step."""

from tandem.core.errors import InvalidRequestError
from tandem.core.model_spec import ModelSpec
from tandem.core.request import GenerationRequest


def check_request(request: GenerationRequest, spec: ModelSpec) -> None:
    """Raises InvalidRequestError."""
    if min(request.token_ids) < 0 or max(request.token_ids) >= spec.vocab_size:
        raise InvalidRequestError(f"The prompt holds token ids that the model, with {spec.vocab_size}, does not have.")
