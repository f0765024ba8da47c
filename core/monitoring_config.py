"""Settings of what a process reports about itself."""

from pydantic import Field, model_validator

from tandem.core.frozen_model import FrozenModel, WrongSetting

_ENDPOINT = r"^(tcp://\S+:\d{1,5}|ipc://.+)$"


class TracingSection(FrozenModel):
    """Traces of requests, by OTLP over HTTP. Headers, certificates and resource attributes of the exporter come from
    OpenTelemetry's own environment variables, such as OTEL_EXPORTER_OTLP_HEADERS."""

    endpoint: str | None = Field(
        default=None,
        pattern=r"^https?://[^/\s]+/\S*$",
        description="Where traces go, such as http://127.0.0.1:4318/v1/traces; null: no traces",
    )
    sample_ratio: float = Field(
        default=1.0, ge=0, le=1, description="Share of traced requests among those whose client has not decided"
    )


class KvEventsSection(FrozenModel):
    """Events of an instance's prefix cache over ZeroMQ, for gateways that route by cached prefixes. They have the token
    ids of prompts, and ZeroMQ knows no authentication here."""

    endpoint: str | None = Field(
        default=None,
        pattern=_ENDPOINT,
        description="Where events go, such as tcp://gateway:5557; {name} becomes the instance's name. null: no events",
    )
    bind: bool = Field(
        default=False, description="Listen there for subscribers, instead of connecting to one that listens"
    )
    replay_endpoint: str | None = Field(
        default=None, pattern=_ENDPOINT, description="Where subscribers ask for events that they have missed"
    )
    buffer_batches: int = Field(default=10_000, ge=1, description="Batches of events that can be asked for")
    topic: str = Field(
        default="kv@{name}@{model}",
        description="The first part of each message; {name} and {model} become those of the instance",
    )
    open_to_network: bool = Field(
        default=False, description="Allow to listen on addresses that other machines reach: they may read all prompts"
    )

    @model_validator(mode="after")
    def _check_exposure(self) -> "KvEventsSection":
        listening = (("endpoint", self.endpoint if self.bind else None), ("replay_endpoint", self.replay_endpoint))
        for setting, endpoint in listening:
            if endpoint is not None and not self.open_to_network and not _is_local(endpoint):
                text = f"{endpoint} can be reached from other machines, and events have the token ids of all prompts"
                raise WrongSetting((setting,), f"{text}; listen on 127.0.0.1 or ipc://, or set open_to_network")
        return self


def _is_local(endpoint: str) -> bool:
    scheme, _, address = endpoint.partition("://")
    return scheme == "ipc" or address.rpartition(":")[0] in ("127.0.0.1", "localhost", "[::1]")
