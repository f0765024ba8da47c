"""Settings of a router: ports, limits, routing, and who may call."""

from typing import Literal

from pydantic import Field, model_validator

from tandem.core.address import Address, is_loopback
from tandem.core.anchored_path import AnchoredPath
from tandem.core.byte_size import Bytes
from tandem.core.frozen_model import FrozenModel, WrongSetting
from tandem.core.monitoring_config import TracingSection
from tandem.core.secret_source import SecretReference
from tandem.core.slo import SloClasses
from tandem.core.tls import PublicTls


class RouterSection(FrozenModel):
    http: Address = Field(default="127.0.0.1:8000", description="OpenAI's API, health, /metrics, /ui; port 0: any free")
    grpc: Address = Field(default="127.0.0.1:8001", description="tandem.v1.InferenceService, for tandem.Client")
    control: Address = Field(default="127.0.0.1:8002", description="Where workers report; never for clients")
    request_timeout_s: float = Field(default=600.0, gt=0, description="Deadline of a request that names none")
    max_queue: int = Field(default=1024, ge=1, description="Requests in the router before it refuses more")
    outstanding_steps: float = Field(
        default=2.0,
        gt=0,
        description="Steps of an instance whose prompt tokens may wait there to be computed, before requests wait here",
    )
    max_outstanding_tokens: int | None = Field(
        default=16384,
        ge=1,
        description="Prompt tokens that may wait in an instance, to be computed or decoded, before requests wait here",
    )
    max_wait_s: float = Field(
        default=30.0, gt=0, description="A request that would wait here for longer is refused with 429"
    )
    policy: Literal["balanced", "goodput"] = Field(
        default="goodput",
        description="Instances by expected goodput, which needs step_cost of all instances, or else by the least work",
    )
    queue_order: Literal["fcfs", "edf", "goodput"] = Field(
        default="goodput",
        description="Order of requests that wait here: as they came, by TTFT target, or as many as possible in time",
    )
    slo: SloClasses = Field(default=(), description="Classes of requests, which name one with the header x-tandem-slo")
    tls: PublicTls | None = Field(default=None, description="TLS of the ports http and grpc")
    api_keys: SecretReference | None = Field(
        default=None, description="Keys of clients, file:PATH or env:NAME (`tandem key` makes them); null: none needed"
    )
    allow_anonymous: bool = Field(
        default=False,
        description="Serve without API keys though others reach http or grpc, because something else guards them",
    )
    open_metrics: bool = Field(default=False, description="/metrics needs no API key")
    share_prefixes: bool = Field(
        default=False,
        description="With API keys: tenants share cached prefixes. Faster, but times then tell what others have sent",
    )
    max_body: Bytes = Field(default=8 << 20, description="Of an HTTP request, and of a gRPC message to the router")
    max_bodies: Bytes = Field(default=256 << 20, description="HTTP bodies that all running requests together hold")
    max_body_items: int = Field(default=1 << 18, ge=1024, description="Items of lists and objects in one HTTP body")
    max_header: Bytes = Field(default=32 << 10, description="Request line and headers of one HTTP request")
    max_connections: int = Field(default=4096, ge=1, description="HTTP connections at once")
    max_client_connections: int = Field(default=1024, ge=1, description="HTTP connections of one client address")
    max_client_choices: int = Field(
        default=512, ge=1, description="Choices of one client (API key, or without keys address) at once"
    )
    max_response_logprobs: int = Field(default=1 << 19, ge=1, description="Log-probabilities in one response")
    header_timeout_s: float = Field(default=10.0, gt=0, description="For the headers of an HTTP request to arrive")
    body_timeout_s: float = Field(default=60.0, gt=0, description="For the body of an HTTP request to arrive")
    idle_timeout_s: float = Field(default=75.0, gt=0, description="Between two requests of an HTTP connection")
    write_timeout_s: float = Field(default=30.0, gt=0, description="For a client that does not read its response")
    cors_origins: tuple[str, ...] = Field(
        default=(), description='Web pages that may use the HTTP API, such as https://chat.example.com, or "*"'
    )
    allowed_hosts: tuple[str, ...] = Field(
        default=(), description="Names in the Host header besides localhost, when HTTP listens on this machine only"
    )
    reflection: bool = Field(default=True, description="gRPC clients such as grpcurl may list the services")
    generation_config: Literal["auto", "none"] = Field(
        default="auto",
        description="What requests get that name no temperature, top_p, top_k, min_p, repetition_penalty or limit of "
        "tokens: what the checkpoint's generation_config.json says (auto), or OpenAI's defaults (none)",
    )
    parse_control_tokens: bool = Field(
        default=False, description="Names of control tokens in prompts and messages count as these tokens, not as text"
    )
    resume: bool = Field(default=True, description="Continue on another instance when one is lost mid-stream")
    replacement_wait_s: float = Field(
        default=30.0, ge=0, description="How long a request that lost its instances waits for others"
    )
    profile_window_s: float = Field(
        default=300.0, gt=0, description="Requests of this long are compared with those that were planned for"
    )
    tracing: TracingSection = TracingSection()
    vllm_metrics: bool = Field(
        default=False, description="/metrics also has the four metrics of vLLM by which other gateways choose"
    )
    ui: bool = Field(default=True, description="Serve the page /ui, which shows the cluster, on the HTTP port")
    plan: AnchoredPath | None = Field(
        default=None, description="A plan that /ui shows beside what is measured; null: the one of the controller"
    )

    @model_validator(mode="after")
    def _check_clients(self) -> "RouterSection":
        """Raises WrongSetting for a public port that other machines reach without authentication."""
        knows_clients = self.api_keys is not None or (self.tls is not None and self.tls.client_ca is not None)
        for setting in ("http", "grpc"):
            address = getattr(self, setting)
            if not (knows_clients or self.allow_anonymous or is_loopback(address)):
                raise WrongSetting(
                    (setting,),
                    f"{address} can be reached from other machines, and everybody there would be served; set api_keys "
                    "(`tandem key` makes them) or tls.client_ca, or allow_anonymous: true if something else guards it",
                )
        return self

    @model_validator(mode="after")
    def _check_bodies(self) -> "RouterSection":
        if self.max_bodies < self.max_body:
            text = f"is {self.max_bodies}, less than max_body, {self.max_body}"
            raise WrongSetting(("max_bodies",), text)
        return self
