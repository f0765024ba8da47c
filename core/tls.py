"""Settings of TLS: which PEM files a process shows and trusts. A process reads them again when they change."""

from pydantic import Field

from tandem.core.anchored_path import AnchoredFile
from tandem.core.frozen_model import FrozenModel


class PublicTls(FrozenModel):
    """TLS of the ports for clients, HTTP and gRPC."""

    certificate: AnchoredFile = Field(description="This server's certificate and those between it and its authority")
    key: AnchoredFile = Field(description="The certificate's private key, which only this user should be able to read")
    client_ca: AnchoredFile | None = Field(
        default=None, description="Clients need a certificate of these authorities; null: none needed"
    )


class ClusterTls(FrozenModel):
    """TLS of the ports between processes of one cluster. Both ends of each connection show a certificate."""

    certificate: AnchoredFile = Field(description="This process's certificate, for its server and as a client")
    key: AnchoredFile = Field(description="The certificate's private key, which only this user should be able to read")
    ca: AnchoredFile = Field(description="The authorities of all certificates of the cluster, and of no others")
    server_name: str | None = Field(
        default=None,
        description="A name that all these certificates have; null: the host of the address that is called",
    )
