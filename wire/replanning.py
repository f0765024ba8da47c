"""Conversion of the state of replanning: protobuf <-> core values."""

from tandem.core.errors import InvalidRequestError
from tandem.core.replanning import DriftState, Proposal, ReplanStatus, WorkloadChange
from tandem.v1 import worker_pb2


def replan_to_pb(status: ReplanStatus) -> worker_pb2.ReplanStatus:
    pb = worker_pb2.ReplanStatus(
        state=status.state.value,
        changes=[
            worker_pb2.ReplanStatus.Change(
                name=change.name, planned=change.planned, live=change.live, strength=change.strength
            )
            for change in status.changes
        ],
        note=status.note,
    )
    if (proposal := status.proposal) is not None:
        pb.proposal.summary = proposal.summary
        pb.proposal.changes.extend(proposal.changes)
        pb.proposal.gain = proposal.gain
        pb.proposal.folder = proposal.folder
    return pb


def replan_from_pb(pb: worker_pb2.ReplanStatus) -> ReplanStatus:
    """Raises InvalidRequestError for an unknown state."""
    try:
        state = DriftState(pb.state)
    except ValueError as error:
        raise InvalidRequestError(f"the replanning state '{pb.state}' is unknown") from error
    proposal = pb.proposal
    return ReplanStatus(
        state=state,
        changes=tuple(
            WorkloadChange(change.name, change.planned, change.live, change.strength) for change in pb.changes
        ),
        note=pb.note,
        proposal=Proposal(proposal.summary, tuple(proposal.changes), proposal.gain, proposal.folder)
        if pb.HasField("proposal")
        else None,
    )
