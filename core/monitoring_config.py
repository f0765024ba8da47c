"""Settings of what a process reports about itself."""

from pydantic import Field

from tandem.core.frozen_model import FrozenModel


class TracingSection(FrozenModel):
    """Traces of requests, by OTLP over HTTP. Headers, certificates and resource attributes of the exporter come from
    OpenTelemetry's own environment variables, such as OTEL_EXPORTER_OTLP_HEADERS."""

    endpoint: str | None = Field(
        default=None,
        pattern=r"^https?://[^/]+/.*$",
        description="Where traces go, such as http://127.0.0.1:4318/v1/traces; null: no traces",
    )
    sample_ratio: float = Field(
        default=1.0, ge=0, le=1, description="Share of traced requests among those whose client has not decided"
    )
