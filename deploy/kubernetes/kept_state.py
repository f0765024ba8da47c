"""What should run, kept in a ConfigMap of the cluster, and which controller is in charge of it.

The chart makes the ConfigMap, so the controller needs no right to make any. Of two controllers, the one that began
later is in charge, and the other one leaves at its next write or check. The cluster token is not kept.
"""

import json
import secrets
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn

from tandem.core.errors import UnavailableError
from tandem.deploy.desired import Desired
from tandem.deploy.kubernetes.api import KubernetesApi
from tandem.deploy.kubernetes.instance_pod import Document

_DESIRED, _SETTINGS, _IN_CHARGE = "desired", "settings", "inCharge"
_WRITES = 5  # tries, while others change labels of the ConfigMap


class KeptState:
    """`settings` identifies the chart's settings, which are newer than what is kept if they are others. `leave` ends
    this process."""

    def __init__(
        self, api: KubernetesApi, name: str, settings: str, token: str | None, leave: Callable[[str], NoReturn]
    ) -> None:
        self._api = api
        self._name = name
        self._settings = settings
        self._token = token
        self._leave = leave
        self._id = secrets.token_hex(8)
        self._is_in_charge = False

    async def load(self) -> tuple[Desired | None, bool]:
        """What an earlier controller has kept, and whether that was for the same settings of the chart. Raises
        ValueError, KeyError or TypeError for what this version cannot read, and as `KubernetesApi`."""
        data = _data_of(await self._api.read_config_map(self._name))
        if _DESIRED not in data:
            return None, False
        desired = Desired.from_json(json.loads(data[_DESIRED]))
        config = desired.config.model_copy(update={"cluster_token": self._token})
        return replace(desired, config=config), data.get(_SETTINGS) == self._settings

    async def save(self, desired: Desired) -> None:
        """The first call takes charge. Raises as `KubernetesApi`."""
        fields: dict[str, Any] = desired.to_json()
        fields["config"]["cluster_token"] = None
        data = {_DESIRED: json.dumps(fields), _SETTINGS: self._settings, _IN_CHARGE: self._id}
        for _ in range(_WRITES):
            found = await self._api.read_config_map(self._name)
            self._check(found)
            if await self._api.replace_config_map(found | {"data": data}):
                self._is_in_charge = True
                return
        raise UnavailableError(f"the ConfigMap {self._name} is changed by others all the time; nothing was changed")

    async def check_in_charge(self) -> None:
        """Returns if no other controller has taken charge since."""
        self._check(await self._api.read_config_map(self._name))

    def _check(self, found: Document) -> None:
        if self._is_in_charge and _data_of(found).get(_IN_CHARGE) != self._id:
            self._leave(f"another controller has taken charge of {self._name}")


def _data_of(config_map: Document) -> dict[str, str]:
    return config_map.get("data") or {}
