"""What should run: a serve configuration, and what operators have changed since."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tandem.core.address import split_address
from tandem.core.config import ServeConfig, WorkerConfig
from tandem.core.errors import ConfigError
from tandem.core.instance_section import InstanceSection, RoleName
from tandem.core.other_versions import read_known
from tandem.core.plan import Plan
from tandem.deploy.topology import Machine, ProcessSpec, plan_processes

_ADDRESSES = ("http", "grpc", "control")
_OUTSIDE_PLANS = {"start_router", "cluster_tls", "model_hash", "load_timeout_s", "log_format"}


@dataclass(frozen=True, slots=True)
class Desired:
    """`drained` processes stay out of service; `roles` are those of instances whose role was changed, by the process's
    name. `grace_s` is for requests of processes that stop, where nothing else is said. `config` has its token, and no
    port 0 in the router's addresses. `plan` is what it was made of; None for a serve file. `stands_in`: a process that
    was started under another name goes on as this instance; the instance's name -> the process's."""

    config: ServeConfig
    grace_s: float = 10.0
    drained: frozenset[str] = frozenset()
    roles: Mapping[str, RoleName] = field(default_factory=dict)
    plan: Plan | None = None
    stands_in: Mapping[str, str] = field(default_factory=dict)

    def processes(self, machine: Machine) -> tuple[ProcessSpec, ...]:
        """Raises ConfigError as `plan_processes`."""
        planned = plan_processes(self.config, machine)
        own_names = {spec.name for spec in planned}
        specs = [
            spec.under_name(name) if (name := self.stands_in.get(spec.name, spec.name)) not in own_names else spec
            for spec in planned
        ]
        return tuple(self._with_role(spec) for spec in specs if spec.name not in self.drained)

    def reusing(self, running: "Desired", machine: Machine) -> "Desired":
        """With processes of `running` that are wanted no more in the place of new ones that differ only in their role
        and the bounds of their steps: nothing has to load a model."""
        before, after = running.processes(machine), self.processes(machine)
        kept = {spec.name for spec in after} | self.drained
        free = [spec for spec in before if spec.name not in kept and isinstance(spec.config, WorkerConfig)]
        known = {spec.name for spec in before}
        wanted = {spec.name for spec in plan_processes(self.config, machine)}
        stands_in = {name: process for name, process in self.stands_in.items() if name in wanted and process in known}
        for spec in after:
            if spec.name in known or not isinstance(spec.config, WorkerConfig):
                continue
            reused = next((each for each in free if each.can_become(spec.under_name(each.name))), None)
            if reused is not None:
                free.remove(reused)
                stands_in[spec.name] = reused.name
        return replace(self, stands_in=stands_in)

    def with_config(self, config: ServeConfig, plan: Plan | None = None) -> "Desired":
        """For new settings, and the plan that they were made of. Roles are those of the settings again; what is drained
        stays drained. What a cluster has beside its instances stays as it is where `config` does not name it: token,
        addresses of the router, whether there is one, and the name of the same model in the API; for settings that were
        made of a plan, which speaks of instances and SLO classes only, all the rest, too.
        Raises ConfigError for what a running cluster cannot change."""
        running = self.config
        names = {"start_router"} if plan is None else _OUTSIDE_PLANS
        if config.model == running.model:
            names = names | {"model_name"}
        update: dict[str, Any] = {name: getattr(running, name) for name in names - config.model_fields_set}
        config = config.model_copy(update=update)
        if config.served_name != running.served_name:
            raise ConfigError(
                f"the cluster serves {running.served_name}, and these settings are for {config.served_name}; end the "
                "cluster and start another"
            )
        if config.cluster_token not in (None, running.cluster_token):
            raise ConfigError("the cluster_token of a running cluster cannot change; leave it out")
        kept = {
            name: getattr(running.router, name)
            for name in _ADDRESSES
            if name not in config.router.model_fields_set or split_address(getattr(config.router, name))[1] == 0
        }
        if plan is not None:
            kept |= {name: value for name, value in running.router if name not in config.router.model_fields_set}
        router = config.router.model_copy(update=kept)
        update = {"router": router, "cluster_token": running.cluster_token, "controller": running.controller}
        return replace(self, config=config.model_copy(update=update), roles={}, plan=plan, stands_in={})

    def with_instances(self, counts: Mapping[str, int]) -> "Desired":
        """With `counts[role]` instances of each role in `counts`. Raises ConfigError for a role without instances, or
        with several kinds of instances, and for numbers below 1."""
        changes: dict[str, tuple[InstanceSection, ...]] = {}
        for role, count in counts.items():
            sections: tuple[InstanceSection, ...] = getattr(self.config, role, ())
            if len(sections) != 1:
                kinds = f"{len(sections)} kinds of {role} instances" if sections else f"no {role} instances"
                raise ConfigError(f"the cluster has {kinds}; only a role with one kind can be scaled")
            if count < 1:
                raise ConfigError(f"there must be at least 1 {role} instance, not {count}")
            changes[role] = (sections[0].model_copy(update={"instances": count}),)
        return replace(self, config=self.config.model_copy(update=changes))

    def with_drained(self, name: str, *, undo: bool) -> "Desired":
        """Raises ConfigError if the process is not drained, or already is."""
        if undo is (name not in self.drained):
            raise ConfigError(f"{name} is {'not' if undo else 'already'} drained")
        return replace(self, drained=self.drained - {name} if undo else self.drained | {name})

    def with_role(self, name: str, role: RoleName) -> "Desired":
        return replace(self, roles={**self.roles, name: role})

    def to_json(self) -> dict[str, Any]:
        config = self.config.model_dump(mode="json")
        return {
            "config": config,
            "grace_s": self.grace_s,
            "drained": sorted(self.drained),
            "roles": dict(self.roles),
            "plan": None if self.plan is None else self.plan.model_dump(mode="json"),
            "stands_in": dict(self.stands_in),
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Desired":
        """Of this version or another. Raises ValueError, KeyError or TypeError for what this one cannot read."""
        config = read_known(ServeConfig, fields["config"])
        plan = None if fields["plan"] is None else read_known(Plan, fields["plan"])
        drained, stands_in = frozenset(fields["drained"]), fields.get("stands_in", {})
        return cls(config, fields["grace_s"], drained, fields["roles"], plan, stands_in)

    def _with_role(self, spec: ProcessSpec) -> ProcessSpec:
        if isinstance(spec.config, WorkerConfig) and (role := self.roles.get(spec.name)) is not None:
            return replace(spec, config=spec.config.model_copy(update={"role": role}))
        return spec
