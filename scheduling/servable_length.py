"""How long a prompt and its answer may be together on the instances that are usable now."""

from collections.abc import Mapping

from tandem.core.errors import ContextLengthError, UnavailableError
from tandem.core.session import Role
from tandem.scheduling.known_instance import KnownInstance
from tandem.scheduling.recent_failures import RecentFailures


class ServableLength:
    """The longest prompt plus answer, in tokens, that fits on a usable colocated instance or on a prefill instance with
    a decode instance that can read its KV. With neither, and if `local_prefill` allows it, on a decode instance alone.
    """

    __slots__ = ("_failures", "_instances", "_is_local", "_local_prefill", "_tokens")

    def __init__(
        self, instances: Mapping[str, KnownInstance], failures: RecentFailures, *, local_prefill: bool
    ) -> None:
        """The caller may change both objects, and then calls `changed`."""
        self._instances = instances
        self._failures = failures
        self._local_prefill = local_prefill
        self._tokens: int | None = None  # None: to be computed at the next use
        self._is_local = False

    def changed(self) -> None:
        """Instances, their memory or the pairs that can exchange KV have changed."""
        self._tokens = None

    @property
    def tokens(self) -> int:
        """0: no instance is usable."""
        if self._tokens is None:
            self._tokens = self._find()
        return self._tokens

    @property
    def is_local(self) -> bool:
        """Whether decode instances compute prompts because no other instance can."""
        return self.tokens > 0 and self._is_local

    def require(self) -> int:
        """As `tokens`; instead of 0, raises an UnavailableError that says what is missing."""
        if tokens := self.tokens:
            return tokens
        usable = {instance.role for instance in self._instances.values() if instance.is_usable}
        if not usable:  # a cluster need not have all roles, so none is named
            raise UnavailableError("no worker is ready")
        for role in (Role.PREFILL, Role.DECODE):
            if role not in usable:
                raise UnavailableError(f"no {role.value} worker is ready")
        raise UnavailableError("no prefill worker is ready whose KV a ready decode worker can read")

    def check(self, num_tokens: int) -> None:
        """Raises ContextLengthError if no usable instance holds such a prompt and one token of answer, and
        UnavailableError without a usable instance."""
        tokens = self.require()
        if num_tokens >= tokens:
            raise ContextLengthError(
                f"the prompt has {num_tokens} tokens; the workers that are up hold at most {tokens} tokens of "
                "prompt and answer"
            )

    def _find(self) -> int:
        longest: dict[Role, dict[str, int]] = {role: {} for role in Role}  # by fingerprint
        without_reader = self._failures.prefills_without_reader(self._instances)
        for instance in self._instances.values():
            if instance.is_usable and instance.instance_id not in without_reader:
                found, fingerprint = longest[instance.role], instance.status.fingerprint
                found[fingerprint] = max(instance.capacity_tokens, found.get(fingerprint, 0))
        prefills, decodes = longest[Role.PREFILL], longest[Role.DECODE]
        pairs = (min(prefills[each], decodes[each]) for each in prefills.keys() & decodes.keys())
        tokens = max((*pairs, *longest[Role.COLOCATED].values()), default=0)
        self._is_local = tokens == 0 and self._local_prefill
        return max(decodes.values(), default=0) if self._is_local else tokens
